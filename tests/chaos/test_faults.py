"""A disk that is full or read-only, a frozen attempt, two jobs at once, settings that change: named, and
nothing half-written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import synthetic_overrides
from harness import AS_OF, STAGES, Job, assert_nothing_half_written, content
from preflight import absent

from recray.storage import lease

DISK = "96m"


@pytest.fixture
def disk(workspace):
    """The workspace on a small file system of its own."""
    workspace.root.mkdir(exist_ok=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "recray", str(workspace.root)], capture_output=True
    ).returncode:
        absent("this machine does not let us mount a file system to fill")
    yield workspace.root
    subprocess.run(["umount", "-l", str(workspace.root)], check=True)


@contextlib.contextmanager
def full(disk: Path):
    """Every byte that was left is taken."""
    ballast = disk / "ballast"
    with open(ballast, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    yield
    ballast.unlink()


@contextlib.contextmanager
def read_only(disk: Path):
    """What is opened from now on is on a read-only view of the same files; what is open stays open.

    The view is made read-only beside the disk, then laid over it: on the disk itself a writer in between
    would keep it busy.
    """
    view = disk.with_name("view")
    view.mkdir(exist_ok=True)
    for words in (
        ["--bind", str(disk), str(view)],
        ["-o", "remount,bind,ro", str(view)],
        ["--bind", str(view), str(disk)],
    ):
        subprocess.run(["mount", *words], check=True)
    yield
    for mounted in (disk, view):
        subprocess.run(["umount", "-l", str(mounted)], check=True)


FAULTS = {full: "No space left on device", read_only: "Read-only file system"}


@pytest.mark.parametrize("read_only_at", [("train", "score"), pytest.param(STAGES, marks=pytest.mark.slow)])
def test_a_disk_that_takes_nothing_is_named_and_the_job_is_repeated(workspace, disk, read_only_at):
    """Full at each stage, then read-only, then in order again."""
    root = workspace.cut("prepare")
    for stage in STAGES:
        for fault in (full, read_only) if stage in read_only_at else (full,):
            job = workspace.job(stage, "train.max_failures=0", fault="STOP@lease:held")
            stopped = job.stops()
            with fault(disk):
                os.kill(stopped, signal.SIGCONT)
                code, result = job.end()
                reason = result["reason"]
                assert (code, result["status"]) == (1, "failed"), (stage, reason)
                assert FAULTS[fault] in reason and str(root) in reason and "then repeat the job" in reason, (
                    stage,
                    reason,
                )
                assert_nothing_half_written(root, workspace.reference)
        workspace.job(stage).ends_ok()
    workspace.nightly_finds_the_rest_right()


def test_read_only_storage_is_named_by_each_job(head, workspace, disk):
    workspace.cut("end")
    jobs = ("nightly", *STAGES, "rollback")
    script = (
        "import sys; from recray import cli; [print(cli.main([job, *sys.argv[2:]])) for job in "
        "sys.argv[1].split(',')]"
    )
    words = [
        sys.executable,
        "-c",
        script,
        ",".join(jobs),
        "--as-of",
        AS_OF,
        *synthetic_overrides(workspace.data_folder, disk),
    ]
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = subprocess.run(words, env=head.environment, capture_output=True, text=True)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert [line for line in done.stdout.splitlines() if not line.startswith("{")] == ["1"] * len(jobs), (
        done.stderr
    )
    errors = done.stderr.split("error: ")[1:]
    assert len(errors) == len(jobs)
    for error in errors:
        assert (
            f"{disk} cannot be written to" in error and "Read-only file system" in error and "fix:" in error
        )
    assert workspace.job("nightly").ends_ok()["status"] == "skipped"
    workspace.assert_right()


def test_a_frozen_attempt_is_replaced_and_fenced_off(workspace):
    root = workspace.cut("score")
    stopped_job = workspace.job("nightly", fault="STOP@snapshot:complete")
    stopped = stopped_job.stops()
    workspace.job("nightly").ends_ok()
    before = content(root)
    os.kill(stopped, signal.SIGCONT)
    code, result = stopped_job.end()
    assert (code, result["status"]) == (3, "refused"), result["reason"]
    assert "attempt 2 was considered dead and is fenced off: nightly (attempt 3" in result["reason"]
    assert content(root) == before
    workspace.assert_right()


def test_of_two_jobs_at_once_the_second_is_refused_by_name(workspace):
    root = workspace.cut("report")
    with lease.hold(root, "nightly", 5.0) as held:
        code, result = workspace.job("nightly").end()
        assert (code, result["status"]) == (3, "refused")
        assert (
            f"nightly (attempt {held.attempt}, process {os.getpid()} on " in result["reason"]
            and str(root) in result["reason"]
        )
    workspace.nightly_finds_the_rest_right()


def test_settings_that_changed_between_attempts_are_refused_and_named(workspace):
    workspace.cut("report")
    first = workspace.job("nightly", fault="KILL@report:written")
    first.is_killed()
    assert "memory" in first.end()[1]["reason"]
    other = "evaluate.bootstrap=200"
    code, result = workspace.job("nightly", other).end()
    assert (
        (code, result["status"]) == (3, "refused")
        and "evaluate.bootstrap 100 → 200" in result["reason"]
        and "--restart" in result["reason"]
    )
    before = set((workspace.root / "evaluations").iterdir())
    assert workspace.job("nightly", other, "--restart").ends_ok()["outputs"]["evaluation"] not in map(
        str, before
    )


@pytest.mark.jobs
def test_a_ray_that_is_not_there_is_named(synthetic_folder, tmp_path):
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    code, result = Job("nightly", synthetic_folder, tmp_path, environment).end()
    assert (code, result["status"]) == (1, "failed")
    assert "no Ray responds at 127.0.0.1:1" in result["reason"] and "RAY_ADDRESS" in result["reason"]
    assert not (tmp_path / "datasets").exists() or not list((tmp_path / "datasets").iterdir())


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "0123456789abcdef0123456789abcdef"), ("RAY_AUTH_MODE", "disabled")]
)
def test_a_wrong_or_missing_token_is_named(head, synthetic_folder, tmp_path, name, value):
    environment = {
        **head.environment,
        "RAY_NUM_REDIS_GET_RETRIES": "3",
        name: value,
    }  # attempts of Ray's, a second each
    code, result = Job("nightly", synthetic_folder, tmp_path, environment, fork=False).end()
    assert (code, result["status"]) == (1, "failed")
    assert "refused the connection" in result["reason"] and "check the token" in result["reason"]
