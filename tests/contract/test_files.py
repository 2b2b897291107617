"""What the repository promises: configs show every default, jobs are shells, the sample is what it says it is."""

import json
import os
import re
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from recray import cli, pipeline
from recray.config import Settings, load_settings, render_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "jobs" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_open_with_their_command_and_show_every_setting(path, monkeypatch):
    monkeypatch.setenv("RECRAY_DATA", "/data")
    text = path.read_text()
    assert "recray" in text.splitlines()[0] and text.startswith("# ")
    content = yaml.safe_load(text)
    heading = "\n".join(line[2:] for line in text.split("\n\nstorage:")[0].splitlines())
    if os.environ.get("RECRAY_RECORD"):
        text = render_yaml(Settings.model_validate(content), heading)
        path.write_text(text)
        content = yaml.safe_load(text)
    assert list(content) == list(Settings.model_fields)
    for section, field in Settings.model_fields.items():
        assert list(content[section]) == list(field.annotation.model_fields)
    shown = render_yaml(load_settings(path), heading).splitlines()
    for mine, rendered in zip(text.splitlines(), shown, strict=True):
        assert mine.split("  # ")[-1] == rendered.split("  # ")[-1]


def test_the_default_config_is_the_default():
    assert load_settings(REPOSITORY / "jobs" / "configs" / "default.yaml") == Settings()


def test_top_level_is_what_was_agreed():
    visible = {p.name for p in REPOSITORY.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert visible == {"pyproject.toml", "README.md", "jobs", "recray", "policies", "tests", "infra"}


@pytest.mark.parametrize("job", ["collect", "prepare", "train", "evaluate", "promote", "score", "nightly", "rollback", "serve"])
def test_each_job_can_be_submitted_and_is_a_command(job):
    text = (REPOSITORY / "jobs" / f"{job}.py").read_text()
    assert f'job_main("{job}")' in text and len(text.splitlines()) < 15
    assert job in cli.JOBS
    assert job == "serve" or hasattr(pipeline, f"run_{job}")


def test_the_audit_can_be_submitted():
    assert 'job_main("privacy", "audit")' in (REPOSITORY / "jobs" / "audit.py").read_text() and "audit" in cli.SUBMITTED


def test_dashboard_and_alerts_ask_for_metrics_that_the_endpoint_has():
    telemetry = (REPOSITORY / "recray" / "serving" / "telemetry.py").read_text()
    counted = set(re.findall(r'"(recray_[a-z_]+)", "', telemetry))
    board = json.loads((REPOSITORY / "infra" / "grafana" / "recray.json").read_text())
    rules = yaml.safe_load((REPOSITORY / "infra" / "grafana" / "alerts.yaml").read_text())["groups"][0]["rules"]
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]] + [rule["expr"] for rule in rules]
    named = {re.sub(r"_(bucket|sum|count)$", "", name) for text in asked for name in re.findall(r"ray_(recray_[a-z_]+)", text)}
    assert len(counted) >= 10 and named == counted
    assert all(rule["annotations"]["summary"] and rule["annotations"]["fix"] for rule in rules)


def test_init_writes_a_file_that_works_and_keeps_what_is_there(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert cli.main(["init", str(path)]) == 0
    assert load_settings(path) == Settings()
    assert cli.main(["init", str(path)]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_sample_is_small_attributed_and_clean():
    folder = resources.files("recray") / "dataset" / "online_retail"
    assert sum(p.stat().st_size for p in Path(str(folder)).glob("*.parquet")) < 3_000_000
    assert "CC BY 4.0" in (folder / "ATTRIBUTION.md").read_text() and "10.24432/C5BW33" in (folder / "ATTRIBUTION.md").read_text()
    events = pq.read_table(str(folder / "events.parquet"))
    assert events.num_rows == 386_354
    assert events["user_id"].null_count == 0 and set(events["event"].unique().to_pylist()) == {"purchase"}
    assert {"title", "price"} <= set(pq.read_schema(str(folder / "items.parquet")).names)


def test_the_sample_is_the_published_data_cleaned(shared_data):
    raw = pq.read_table(shared_data / "online-retail" / "interactions.parquet").to_pandas()
    items = pq.read_table(shared_data / "online-retail" / "items.parquet").to_pandas()
    keep = raw.user_id.notna() & (raw.event == "purchase") & raw.item_id.isin(items[items.is_product_code].item_id)
    clean = raw[keep].drop_duplicates(["user_id", "item_id", "invoice_no"])
    folder = resources.files("recray") / "dataset" / "online_retail"
    sample = pq.read_table(str(folder / "events.parquet")).to_pandas()
    columns = ["user_id", "item_id", "invoice_no", "timestamp", "quantity"]
    mine, theirs = (t[columns].sort_values(columns[:3]).reset_index(drop=True) for t in (sample, clean))
    assert len(mine) == len(theirs)
    assert (mine[["item_id", "invoice_no", "quantity"]].values == theirs[["item_id", "invoice_no", "quantity"]].values).all()
    assert (mine.user_id.values == theirs.user_id.values.astype(int)).all()
    assert (mine.timestamp.values.astype("datetime64[s]") == theirs.timestamp.values.astype("datetime64[s]")).all()
