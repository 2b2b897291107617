"""What the repository promises: configs show every default, jobs are shells, the sample is what it says it
is.
"""

import json
import re
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from recray import cli, pipeline
from recray.config import Settings, load_settings
from recray.serving.telemetry import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_LINES = 45  # of a settings file that people read
CONFIGS = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_open_with_their_command_and_say_why_they_differ_from_the_defaults(path, monkeypatch):
    monkeypatch.setenv("RECRAY_DATA", "/data")
    text = path.read_text()
    assert "recray" in text.splitlines()[0] and text.startswith("# ") and len(text.splitlines()) <= MOST_LINES
    content, defaults = yaml.safe_load(text), json.loads(Settings().model_dump_json())
    load_settings(path)
    explained = ""
    for line in text.splitlines():
        if re.match(r"  [a-z_]+: ", line) and "$RECRAY_DATA" not in line and "sample:" not in line:
            assert "  # " in line or explained.startswith("  # "), f"no reason: {line}"
        explained = line
    same = [
        f"{section}.{name}"
        for section, fields in content.items()
        for name, value in fields.items()
        if value == defaults[section][name]
    ]
    assert not same, "these are the defaults"


def test_settings_prints_all_that_init_leaves_out(tmp_path, capsys):
    assert cli.main(["settings"]) == 0
    path = tmp_path / "all.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_settings(path) == Settings()
    content = yaml.safe_load(path.read_text())
    assert {section: list(fields) for section, fields in content.items()} == {
        section: list(field.annotation.model_fields) for section, field in Settings.model_fields.items()
    }
    assert all("  # " in line for line in path.read_text().splitlines() if line.startswith("  "))
    assert cli.main(["settings", "train", "train.epochs=3"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert list(printed) == ["train"] and printed["train"]["epochs"] == 3


def test_top_level_is_what_was_agreed():
    visible = {
        p.name
        for p in REPOSITORY.iterdir()
        if not p.name.startswith(".") and not p.name.endswith(".egg-info")
    }
    assert visible == {"pyproject.toml", "README.md", "jobs", "recray", "policies", "tests", "infra"}


@pytest.mark.parametrize(
    "job", ["collect", "prepare", "train", "evaluate", "promote", "score", "nightly", "rollback", "serve"]
)
def test_each_job_can_be_submitted_and_is_a_command(job):
    text = (REPOSITORY / "jobs" / f"{job}.py").read_text()
    assert f'job_main("{job}")' in text and len(text.splitlines()) < 15
    assert job in cli.JOBS
    assert job == "serve" or job in (*pipeline.STAGE_JOBS, *pipeline.JOBS)


def test_the_audit_can_be_submitted():
    assert (
        'job_main("privacy", "audit")' in (REPOSITORY / "jobs" / "audit.py").read_text()
        and "audit" in cli.SUBMITTED
    )


def test_dashboard_and_alerts_ask_for_metrics_that_the_endpoint_has():
    board = json.loads((REPOSITORY / "infra" / "grafana" / "recray.json").read_text())
    rules = yaml.safe_load((REPOSITORY / "infra" / "grafana" / "alerts.yaml").read_text())["groups"][0][
        "rules"
    ]
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]] + [
        rule["expr"] for rule in rules
    ]
    named = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for text in expressions
        for name in re.findall(r"ray_(recray_[a-z_]+)", text)
    }
    assert len(METRICS) >= 10 and named == set(METRICS)
    assert all(rule["annotations"]["summary"] and rule["annotations"]["fix"] for rule in rules)


def test_init_writes_a_file_that_works_and_keeps_what_is_there(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert cli.main(["init", str(path)]) == 0
    assert load_settings(path) == Settings() and len(path.read_text().splitlines()) <= MOST_LINES
    assert cli.main(["init", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_sample_is_small_attributed_and_clean():
    folder = resources.files("recray") / "dataset" / "online_retail"
    assert sum(p.stat().st_size for p in Path(str(folder)).glob("*.parquet")) < 3_000_000
    assert (
        "CC BY 4.0" in (folder / "ATTRIBUTION.md").read_text()
        and "10.24432/C5BW33" in (folder / "ATTRIBUTION.md").read_text()
    )
    events = pq.read_table(str(folder / "events.parquet"))
    assert events.num_rows == 386_354
    assert events["user_id"].null_count == 0 and set(events["event"].unique().to_pylist()) == {"purchase"}
    assert {"title", "price"} <= set(pq.read_schema(str(folder / "items.parquet")).names)


def test_the_sample_is_the_published_data_cleaned(shared_data):
    raw = pq.read_table(shared_data / "online-retail" / "interactions.parquet").to_pandas()
    items = pq.read_table(shared_data / "online-retail" / "items.parquet").to_pandas()
    keep = (
        raw.user_id.notna()
        & (raw.event == "purchase")
        & raw.item_id.isin(items[items.is_product_code].item_id)
    )
    clean = raw[keep].drop_duplicates(["user_id", "item_id", "invoice_no"])
    folder = resources.files("recray") / "dataset" / "online_retail"
    sample = pq.read_table(str(folder / "events.parquet")).to_pandas()
    columns = ["user_id", "item_id", "invoice_no", "timestamp", "quantity"]
    ours, theirs = (t[columns].sort_values(columns[:3]).reset_index(drop=True) for t in (sample, clean))
    assert len(ours) == len(theirs)
    assert (
        ours[["item_id", "invoice_no", "quantity"]].values
        == theirs[["item_id", "invoice_no", "quantity"]].values
    ).all()
    assert (ours.user_id.values == theirs.user_id.values.astype(int)).all()
    assert (
        ours.timestamp.values.astype("datetime64[s]") == theirs.timestamp.values.astype("datetime64[s]")
    ).all()
