"""The documents: every link leads somewhere, code runs, the site builds, and the README stays short and
plain.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from harness import served

from recray.config import ScoreSettings, ServeSettings, Settings
from recray.serving.service import Service
from recray.serving.telemetry import METRICS
from recray.testing.published import publish_synthetic
from recray.tracking.runs import RUN_KEY, Tracking

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / ".github" / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "infra" / "docs" / "pages").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
MOST_LINES, MOST_WORDS, MEAN_WORDS = 170, 35, 18  # of the README; words of a sentence


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    dead = []
    for target, anchor in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path = page if not target else (page.parent / target).resolve()
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(f"{target}#{anchor}")
    assert not dead


def test_the_readme_is_read_in_five_minutes():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    prose = re.sub(r"^(#|\||!).*$", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    prose = re.sub(
        r"^\[Your data\].*?\n\n", "", LINK.sub("]", prose), flags=re.DOTALL | re.MULTILINE
    )  # the list of pages
    sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?:])\s+", prose) if sentence.strip()]
    assert len(sentences) > 40
    assert max(map(len, sentences)) <= MOST_WORDS and sum(map(len, sentences)) / len(sentences) <= MEAN_WORDS


def test_the_walks_name_what_is_there():
    text = (REPOSITORY / "infra" / "docs" / "pages" / "life.md").read_text()
    names = re.findall(r"`(recray/[\w/]+\.py):([\w.]+)`", text)
    assert len(names) > 20
    for file, name in names:
        scope = ast.parse((REPOSITORY / file).read_text()).body
        for part in name.split("."):
            missing = [
                node
                for node in scope
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name == part
            ]
            assert missing, f"{file} has no {name}"
            scope = missing[0].body


def test_the_site_builds_without_a_warning_and_has_every_setting_command_and_endpoint(tmp_path):
    program = Path(sys.executable).with_name("mkdocs")
    words = [
        program,
        "build",
        "--strict",
        "--quiet",
        "-f",
        REPOSITORY / "infra" / "docs" / "mkdocs.yml",
        "-d",
        tmp_path,
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    settings, commands, rest, metrics = (
        (tmp_path / f"{name}.html").read_text() for name in ("configuration", "commands", "rest", "metrics")
    )
    assert len(METRICS) > 10 and all(f"<code>{name}</code>" in metrics for name in METRICS)
    for section, field in Settings.model_fields.items():
        for name in field.annotation.model_fields:
            assert f"<code>{section}.{name}</code>" in settings
    from recray.cli import JOBS

    assert all(f"recray {job}" in commands for job in JOBS)
    assert all(
        path in rest
        for path in (
            "/v1/recommend",
            "/v1/score",
            "/v1/similar",
            "/v1/events",
            "/v1/feedback",
            "/v1/history",
            "/v1/models",
        )
    )
    messages = (tmp_path / "troubleshooting.html").read_text()
    assert messages.count("<tr>") > 150 and "another … (…) runs in …" in messages
    assert (tmp_path / "files" / "jobs" / "configs" / "shop.yaml").exists(), "what a page links to is there"
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=.https?://", settings), (
        "nothing is loaded from elsewhere"
    )


def run_blocks(page, shared):
    """Run the Python code of a page, one block after the other; the names that it defined."""
    text = (REPOSITORY / "infra" / "docs" / "pages" / page).read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, shared)
    return shared


def test_code_that_reads_the_outputs_runs(tmp_path):
    storage = publish_synthetic(tmp_path, users=30, items=20, events_per_user=6)
    shared = run_blocks("outputs.md", {"WORKSPACE": str(storage.root)})
    assert len(shared["rows"]) == len(shared["duckdb"].sql(shared["query"])) > 30


def test_code_of_the_page_about_python_runs(tmp_path, capsys, monkeypatch):
    storage = publish_synthetic(tmp_path, users=30, items=20, events_per_user=6)
    events = pq.read_table(tmp_path / "shop" / "events")
    tracking = Tracking(Settings().tracking, storage)
    (bundle,) = (storage.root / "bundles").glob("[!.]*")
    run = tracking.run(bundle.name, "train")
    tracking.log_folder(run, bundle, "bundle")
    tracking.register(run, bundle, {RUN_KEY: bundle.name})
    tracking._client.set_registered_model_alias("recray", "champion", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow adds the code of the model
    service = Service(storage, ServeSettings(), ScoreSettings())
    with served(service) as address:
        names = {"WORKSPACE": str(storage.root), "TRACKING": tracking.uri}
        names |= {"ADDRESS": address, "events": events}
        shared = run_blocks("python.md", names)
    service.close()
    assert len(shared["response"]["items"]) == 5
    assert shared["lists"]["item_ids"].str.len().tolist() == [5, 5]
    assert len(shared["top"]) == 10 and len(shared["for_visitor"]) == 3 and len(shared["alike"]) == 3
    assert len(shared["scores"]) == 20 and len(shared["reasons"]) > 0 and len(shared["metrics"]) > 10
    assert "training" in capsys.readouterr().out
