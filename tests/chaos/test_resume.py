"""The same night in two empty roots, one of them killed in the middle: the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import world_overrides

ARTIFACTS = ("datasets", "bundles", "evaluations", "scores")
AS_OF = "2024-04-20"


def command(folder: Path, root: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "jobs.nightly", "--as-of", AS_OF, *world_overrides(folder, root), "train.epochs=4", "train.patience=4", *more]


def run(arguments: list[str]) -> dict:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def kill_group(process: subprocess.Popen, pids: set[int]) -> None:
    """SIGKILL the driver and everything it started."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(timeout=30)


def descendants(root: int) -> set[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for name in ARTIFACTS for p in sorted((root / name).rglob("*")) if p.is_file()}


@pytest.mark.usefixtures("own_home")
def test_a_killed_night_repeated_gives_the_same_bytes(world_folder, tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    whole = run(command(world_folder, quiet))
    assert whole["status"] == "ok"

    process = subprocess.Popen(command(world_folder, killed), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not any(p.read_text() for p in (killed / "training").glob("*.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "training never began"
        time.sleep(0.05)
    kill_group(process, descendants(process.pid))
    assert not list((killed / "bundles").glob("*")), "killed too late to show a resume"

    again = run(command(world_folder, killed))
    assert again["status"] == "ok" and again["metrics"] == whole["metrics"]
    mine, theirs = content(quiet), content(killed)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if mine[name] != theirs[name]] == []
    assert (quiet / "LATEST.json").read_bytes() == (killed / "LATEST.json").read_bytes()
    epochs = [json.loads(line)["epoch"] for line in next((killed / "training").glob("*.jsonl")).read_text().splitlines()]
    assert epochs[-1] == 4 and len(epochs) <= 5, "the second attempt went on from the checkpoint"


@pytest.mark.usefixtures("own_home")
def test_a_job_that_fails_names_the_stage_to_run_and_exits_1(world_folder, tmp_path):
    arguments = command(world_folder, tmp_path)
    arguments[2] = "jobs.train"
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "recray prepare" in done.stderr and "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"
