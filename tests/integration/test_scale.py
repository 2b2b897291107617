"""Slow checks of quality and memory; run by `bash infra/test.sh --full`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
RECRAY = str(Path(sys.executable).with_name("recray"))
CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def call(*arguments, timeout):
    done = subprocess.run([RECRAY, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_movielens_1m_by_leave_one_out(own_home, shared_data, tmp_path, monkeypatch):
    monkeypatch.setenv("RECRAY_DATA", str(shared_data))
    arguments = (
        "--config",
        CONFIGS / "ml-1m.yaml",
        f"storage.root={tmp_path}",
        "train.epochs=24",
    )  # it stops at 36 by itself
    call("prepare", *arguments, timeout=120)
    call("train", *arguments, "train.threads=1", timeout=2400)  # the other lanes have the other core
    result = call("evaluate", *arguments, timeout=300)
    assert result["metrics"]["filter_seen_ndcg@10"] >= 0.17


def test_prepare_stays_within_its_memory(own_home, tmp_path):
    metrics = call("benchmark", "prepare", "--out", tmp_path, timeout=900)["metrics"]
    assert metrics["1m_events"] > 900_000 and metrics["10m_events"] > 9_000_000
    assert metrics["1m_peak_ratio"] <= 1.0 and metrics["10m_peak_ratio"] <= 1.0
