"""The demo as a person runs it, and what its model must reach on Online Retail by the reference protocol."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WHOLE = pytest.param(("train.threads=1",), marks=pytest.mark.slow, id="whole")
SHORT = pytest.param(("train.epochs=2", "train.threads=1"), id="two epochs")


@pytest.fixture(scope="module", params=[SHORT, WHOLE])
def demo(request, own_home, tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "root"
    recray = Path(sys.executable).with_name("recray")
    words = [str(recray), "demo", "--root", str(root), "serve.timeout_s=30", *request.param]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def table(demo):
    return json.loads((Path(demo[0]["outputs"]["evaluation"]) / "metrics.json").read_text())


def test_it_ends_ok_and_shows_what_it_did(demo):
    result, said = demo
    assert result["job"] == "demo" and result["status"] == "ok"
    assert result["metrics"]["with_repeats_ndcg@10"] > 0 and result["metrics"]["filter_seen_ndcg@10"] > 0
    for word in (
        "item-kNN",
        "EASE",
        "personal frequency",
        "with seen-item filter",
        "an unknown user",
        "look at: file://",
        "[snapshot,",
        "[realtime,",
        "[popular,",
    ):
        assert word in said, word
    assert all(Path(path).exists() for path in result["outputs"].values())


@pytest.mark.parametrize("setting", ["with_repeats", "filter_seen"])
@pytest.mark.parametrize("baseline", ["most popular", "popular, last 7 days", "item-kNN"])
def test_the_model_is_above_popularity_and_neighbours(table, setting, baseline):
    rows = table[setting]
    assert rows["recray"]["ndcg@10"] > rows[baseline]["ndcg@10"]
    if baseline == "item-kNN":
        assert rows[baseline]["model_lead_low"] > 0


@pytest.mark.parametrize("setting", ["with_repeats", "filter_seen"])
def test_the_model_is_above_every_baseline(table, setting):
    rows = {name: row["ndcg@10"] for name, row in table[setting].items() if "skipped" not in row}
    assert len(rows) >= 4 and max(rows, key=rows.get) == "recray"
