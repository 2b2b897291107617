"""SIGKILL of a worker, an actor, the driver or the Ray head at seeded moments of every stage: the night, repeated, is right."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import pytest
from harness import Night, assert_right, kill, titled

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
IN_CI = {("prepare", "launcher"), ("train", "worker"), ("train", "head"), ("promote", "driver"), ("score", "worker")}
WORKERS = {"prepare": "ray::Map", "train": "RayTrainWorker", "score": "MapWorker"}
LASTS_S = {"prepare": 3.0, "train": 14.0, "evaluate": 0.6, "promote": 0.6, "score": 4.0, "report": 1.5}


def cases():
    seen = set()
    for seed, plan in enumerate(PLANS):
        marks = [] if plan in IN_CI - seen else [pytest.mark.slow]
        seen.add(plan)
        yield pytest.param(seed, *plan, marks=marks)


@pytest.mark.parametrize(("seed", "stage", "victim"), cases())
def test_a_killed_night_repeated_is_right(head, reference, world_folder, tmp_path, seed, stage, victim):
    delay = random.Random(seed).uniform(0, LASTS_S[stage])
    root = tmp_path / "root"
    night = Night(world_folder, root, head.environment)
    assert night.reaches(stage)
    if victim == "worker":
        while not (found := titled(head.home, WORKERS[stage])):
            assert night.process.poll() is None, "the night ended before it had workers"
            time.sleep(0.02)
        time.sleep(min(delay, 1.0) if stage == "train" else 0)
        kill(*found)
    time.sleep(0 if victim == "worker" else delay)
    if victim == "driver":
        kill(night.job)
    elif victim == "launcher":
        kill(night.process.pid)
    elif victim == "head":
        os.killpg(head.process.pid, signal.SIGKILL)
        head.process.wait()
    code, result = night.end()
    if victim == "head":
        kill(*titled(head.home, "raylet", "gcs_server", "ray::", "dashboard", "ray/_private"))
        head.start()
    if code == 0:
        assert victim == "worker" or night.said.count('"stage": "report"'), f"{stage} {victim}: nobody was hit"
    elif victim != "launcher":
        assert code == 1 and result["status"] == "failed" and result["reason"], result
    for _ in range(3):
        if code == 0:
            break
        code, result = Night(world_folder, root, head.environment).end()
    assert code == 0, result
    assert_right(root, reference)
    epochs = [json.loads(line)["epoch"] for line in next((root / "training").glob("*.jsonl")).read_text().splitlines()]
    assert max(epochs) == 3 and len(epochs) <= 4, "the repeated night goes on from the checkpoint"
    shutil.rmtree(root)
