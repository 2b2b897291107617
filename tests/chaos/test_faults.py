"""A disk that is full or read-only, a frozen attempt, two nights at once, settings that change: named, and nothing half-written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import world_overrides
from harness import ARTIFACTS, AS_OF, STAGES, Night, assert_right, content

from recray import lease

DISK = "96m"


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "recray", str(where)], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a file system to fill")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def assert_nothing_half_written(root: Path, reference: dict[str, bytes]) -> None:
    for name in ARTIFACTS:
        for path in (root / name).rglob("*"):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
                assert reference[str(path.relative_to(root))] == path.read_bytes(), path
    for name in ("LATEST.json", "RELEASE.json"):
        assert not (root / name).exists() or (root / name).read_bytes() == reference[name]


@contextlib.contextmanager
def full(disk: Path):
    ballast = fill(disk)
    yield
    ballast.unlink()


@contextlib.contextmanager
def read_only(disk: Path):
    """What is opened from now on is on a read-only view of the same files; what is open stays open.

    The view is made read-only beside the disk, then laid over it: on the disk itself a writer in between would keep it busy.
    """
    view = disk.with_name("view")
    view.mkdir(exist_ok=True)
    for words in (["--bind", str(disk), str(view)], ["-o", "remount,bind,ro", str(view)], ["--bind", str(view), str(disk)]):
        subprocess.run(["mount", *words], check=True)
    yield
    for mounted in (disk, view):
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@pytest.mark.parametrize(
    ("fault", "named", "stages"),
    [
        pytest.param(full, "No space left on device", STAGES, id="full"),
        pytest.param(read_only, "Read-only file system", ("train", "score"), id="read-only"),
        pytest.param(read_only, "Read-only file system", STAGES, id="read-only-everywhere", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_takes_nothing_at_each_stage_is_named_and_repaired(head, reference, world_folder, disk, fault, named, stages):
    root = disk / "root"
    for stage in stages:
        night = Night(world_folder, root, head.environment, "train.max_failures=0")
        assert night.reaches(stage), night.said
        with fault(disk):
            code, result = night.end()
            assert (code, result["status"]) == (1, "failed"), (stage, result["reason"])
            assert named in result["reason"] and str(root) in result["reason"] and "then repeat the job" in result["reason"], (
                stage,
                result["reason"],
            )
            assert_nothing_half_written(root, reference)
    code, result = Night(world_folder, root, head.environment).end()
    assert code == 0, result
    assert_right(root, reference)


def test_read_only_storage_is_named_by_each_job(head, reference, world_folder, disk):
    root = disk / "root"
    code, _ = Night(world_folder, root, head.environment).end()
    assert code == 0
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for job in ("nightly", *STAGES, "rollback"):
        words = ["-c", f"import sys; from recray import cli; sys.exit(cli.main(['{job}', *sys.argv[1:]]))"]
        done = subprocess.run(
            [sys.executable, *words, "--as-of", AS_OF, *world_overrides(world_folder, root)], env=head.environment, capture_output=True, text=True
        )
        assert done.returncode == 1 and "cannot be written to" in done.stderr and "Read-only file system" in done.stderr, done.stderr
        assert str(root) in done.stderr and "fix:" in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    code, result = Night(world_folder, root, head.environment).end()
    assert (code, result["status"]) == (0, "skipped")
    assert_right(root, reference)


def test_a_frozen_attempt_is_replaced_and_fenced_off(head, reference, world_folder, tmp_path):
    frozen = Night(world_folder, tmp_path, head.environment)
    assert frozen.reaches("score")
    time.sleep(0.3)
    _stop_outside_of_a_commit(frozen.job, tmp_path)
    second = Night(world_folder, tmp_path, head.environment)
    code, result = second.end()
    assert code == 0, result
    before = content(tmp_path)
    os.kill(frozen.job, signal.SIGCONT)
    code, result = frozen.end()
    assert (code, result["status"]) == (3, "refused"), result["reason"]
    assert "fenced off" in result["reason"] and "attempt 2" in result["reason"]
    assert content(tmp_path) == before
    assert_right(tmp_path, reference)


def _stop_outside_of_a_commit(job: int | None, root: Path) -> None:
    """One that is stopped while it publishes keeps all others out, and rightly so."""
    assert job is not None, "the night ended before it could be stopped"
    while True:
        os.kill(job, signal.SIGSTOP)
        with open(root / lease.COMMIT, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                os.kill(job, signal.SIGCONT)
        time.sleep(0.01)


def test_of_two_nights_at_once_the_second_is_refused_by_name(head, world_folder, tmp_path):
    first = Night(world_folder, tmp_path, head.environment)
    assert first.reaches("prepare")
    code, result = Night(world_folder, tmp_path, head.environment).end()
    assert (code, result["status"]) == (3, "refused")
    assert f"nightly (attempt 1, process {first.job} on " in result["reason"] and str(tmp_path) in result["reason"]
    assert first.end()[0] == 0


def test_settings_that_changed_between_attempts_are_refused_and_named(head, world_folder, tmp_path):
    first = Night(world_folder, tmp_path, head.environment)
    assert first.reaches("train")
    os.kill(first.job, signal.SIGKILL)
    code, result = first.end()
    assert (code, result["status"]) == (1, "failed") and "signal 9" in result["reason"] and "memory" in result["reason"]
    code, result = Night(world_folder, tmp_path, head.environment, "train.epochs=1").end()
    assert (code, result["status"]) == (3, "refused") and "train.epochs 3 → 1" in result["reason"] and "--restart" in result["reason"]
    code, result = Night(world_folder, tmp_path, head.environment, "train.epochs=1", "--restart").end()
    assert code == 0 and result["metrics"]["epochs"] == 1


def test_a_ray_that_is_not_there_is_named(world_folder, tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    code, result = Night(world_folder, tmp_path, environment).end()
    assert (code, result["status"]) == (1, "failed")
    assert "no Ray answers at 127.0.0.1:1" in result["reason"] and "RAY_ADDRESS" in result["reason"]
    assert not (tmp_path / "datasets").exists() or not list((tmp_path / "datasets").iterdir())


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef"), ("RAY_AUTH_MODE", "disabled")])
def test_a_wrong_or_missing_token_is_named(head, world_folder, tmp_path, name, value):
    code, result = Night(world_folder, tmp_path, {**head.environment, name: value}).end()
    assert (code, result["status"]) == (1, "failed")
    assert "does not let us in" in result["reason"] and "check the token" in result["reason"]
