"""SIGKILL of a job at each of its commit points, of its workers and of the Ray head: the nightly run,
repeated, is right.

A stage is tried alone, on a copy of a finished workspace from before it (or, where all that follows would
have to be done again, without what it wrote). Random moments of whole nightly runs are in `--full`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from harness import WRITES, assert_nothing_half_written, kill
from processes import titled

POINTS = {
    "prepare": ("dataset:written", "dataset:complete", "dataset:visible"),
    "train": ("bundle:complete", "bundle:visible", "tracked:written"),
    "evaluate": ("evaluation:written", "evaluation:complete", "evaluation:visible", "tracked:visible"),
    "promote": (
        "promotion:complete",
        "promotion:visible",
        "RELEASE.json:written",
        "RELEASE.json:visible",
        "tracked:written",
    ),
    "score": ("snapshot:complete", "snapshot:visible", "LATEST.json:written", "LATEST.json:visible"),
    "report": ("report:written", "report:complete", "report:visible"),
}
"""The commit points of each stage, in the order in which a job that is repeated comes to them."""

PLANS = [
    (stage, victim)
    for stage, victims in {
        "prepare": ("launcher", "driver", "worker", "head"),
        "train": ("worker", "head", "driver", "launcher", "worker", "driver"),
        "evaluate": ("driver", "head"),
        "promote": ("driver", "head"),
        "score": ("worker", "driver", "head", "launcher"),
        "report": ("driver", "launcher"),
    }.items()
    for victim in victims
]  # 20: driver is the job's process, launcher the small one that waits for it and reports
WORKERS = {"prepare": "ray::Map", "train": "RayTrainWorker", "score": "MapWorker"}
LASTS_S = {"prepare": 3.0, "train": 14.0, "evaluate": 0.6, "promote": 0.6, "score": 4.0, "report": 1.5}


@pytest.mark.parametrize("stage", [stage for stage in POINTS if stage != "train"])
def test_a_job_killed_at_a_commit_point_is_repeated(workspace, stage):
    root = workspace.cut_out(stage) if stage in WRITES else workspace.cut(stage)
    for point in POINTS[stage]:
        workspace.job(stage, fault=f"KILL@{point}").is_killed()
        assert_nothing_half_written(root, workspace.reference)
    workspace.nightly_finds_the_rest_right()


def test_a_nightly_run_killed_before_its_first_stage_is_begun_anew(workspace):
    root = workspace.cut("report")
    (progress_file,) = (root / "nights").iterdir()
    progress_file.unlink()
    for point in ("lease:held", "nights:written", "nights:visible"):
        workspace.job("nightly", fault=f"KILL@{point}").is_killed()
        assert progress_file.exists() == (point == "nights:visible")
    workspace.nightly_finds_the_rest_right()


def test_a_training_that_lost_its_worker_and_then_its_driver_is_repeated(head, workspace):
    workspace.cut_out("train")
    first, *others = POINTS["train"]
    job = workspace.job("train", fault=f"KILL@{first}")
    kill(*_in_the_second_epoch(head, workspace, job))  # another one takes its place
    job.is_killed()
    for point in others:
        workspace.job("train", fault=f"KILL@{point}").is_killed()
    workspace.nightly_finds_the_rest_right()
    _goes_on_from_its_checkpoint(workspace.root)


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_says_so_and_is_repeated(workspace):
    workspace.cut("train")
    long = ("train.epochs=25", "train.patience=25")
    job = workspace.job("train", *long)
    job.logs(epoch=2)
    os.kill(job.pid, signal.SIGINT)
    code, result = job.end()
    assert (code, result["status"]) == (1, "failed") and "stopped by a signal" in result["reason"], result
    assert workspace.job("train", *long).ends_ok()["metrics"]["epochs"] == 25


@pytest.mark.parametrize(
    ("stage", "victim"), [("prepare", "launcher"), ("train", "head"), ("score", "worker")]
)
def test_a_job_that_lost_a_process_is_repeated(head, workspace, stage, victim):
    if stage in WRITES:
        workspace.cut_out(stage)
    else:
        workspace.cut(stage)
    job = workspace.job(stage)
    if stage == "train":
        _in_the_second_epoch(head, workspace, job)
    if victim == "worker":
        kill(*job.waits_for("a worker", lambda: titled(head.home, WORKERS[stage])))
        job.ends_ok()  # another one takes its place
    elif victim == "head":
        head.kill()
        code, result = job.end()
        head.start()
        assert (code, result["status"]) == (1, "failed") and "repeat the job" in result["reason"], result
    else:
        job.waits_for("the job's process", lambda: job.worker)
        kill(job.pid)
        assert job.end() == (-9, {}), "nobody is left to say something"
    workspace.nightly_finds_the_rest_right()
    if stage == "train":
        _goes_on_from_its_checkpoint(workspace.root)


def _in_the_second_epoch(head, workspace, job) -> list[int]:
    """Wait until a training has ended its first epoch; its workers."""
    workers = job.waits_for("a worker", lambda: titled(head.home, WORKERS["train"]))
    job.waits_for(
        "the first epoch",
        lambda: any("\n" in path.read_text() for path in workspace.root.glob("training/*.jsonl")),
        every_s=0.01,
    )
    return workers


def _goes_on_from_its_checkpoint(root) -> None:
    epochs = [
        json.loads(line)["epoch"]
        for line in next((root / "training").glob("*.jsonl")).read_text().splitlines()
    ]
    assert max(epochs) == 3 and len(epochs) <= 4, "the repeated job goes on from the checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "stage", "victim"), [(seed, *plan) for seed, plan in enumerate(PLANS)])
def test_a_nightly_run_killed_at_any_moment_is_repeated(head, workspace, seed, stage, victim):
    """A night that was cut off before the stage goes on there, and is hit within it."""
    delay_s = random.Random(seed).uniform(0, LASTS_S[stage])
    root = workspace.cut(stage)
    job = workspace.job("nightly", fork=victim != "launcher")
    job.logs(stage=stage)
    if victim == "worker":
        workers = job.waits_for("a worker", lambda: titled(head.home, WORKERS[stage]))
        time.sleep(min(delay_s, 1.0) if stage == "train" else 0)
        kill(*workers)
    else:
        time.sleep(delay_s)
    if victim == "driver":
        kill(job.worker)
    elif victim == "launcher":
        kill(job.pid)
    elif victim == "head":
        head.kill()
    code, result = job.end()
    if victim == "head":
        head.start()
    if code == 0:
        assert victim == "worker" or '"stage": "report"' in job.said, f"{stage} {victim}: nobody was hit"
    elif victim != "launcher":
        assert code == 1 and result["status"] == "failed" and result["reason"], result
    for _ in range(3):
        if code == 0:
            break
        code, result = workspace.job("nightly").end()
    assert code == 0, result
    workspace.assert_right()
    if stage in ("prepare", "train"):
        _goes_on_from_its_checkpoint(root)
