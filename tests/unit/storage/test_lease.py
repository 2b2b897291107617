"""One job at a time, the dead are replaced, and who was replaced publishes nothing."""

import json
import os
import signal
import subprocess
import sys

import pytest

from recray.errors import RefusedError, StorageError
from recray.storage import immutable_directory, lease

HOLD = """
import sys, time
from pathlib import Path
from recray.storage import lease
from recray.storage import immutable_directory
root = Path(sys.argv[1])
with lease.hold(root, "nightly", 1.0):
    print("held", flush=True)
    sys.stdin.readline()
    with immutable_directory(root / "bundles" / "k", "bundle", "k", {}) as folder:
        (folder / "f").write_text("late")
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_holder_that_lives_is_named(holder, tmp_path):
    with (
        pytest.raises(
            RefusedError,
            match=rf"nightly \(attempt 1, process {holder.pid} on .*since .*is running in {tmp_path}",
        ),
        lease.hold(tmp_path, "train", 1.0),
    ):
        pass
    assert f"process {holder.pid}" in lease.describe_holder(tmp_path)


def test_a_holder_that_died_is_followed_at_once(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert lease.describe_holder(tmp_path) is None
    with lease.hold(tmp_path, "train", 1000.0) as held:
        assert held.attempt == 2


def test_a_frozen_holder_is_replaced_and_can_publish_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with lease.hold(tmp_path, "nightly", 1.0) as held:
        assert held.attempt == 2
        with immutable_directory(tmp_path / "bundles" / "k", "bundle", "k", {}) as folder:
            (folder / "f").write_text("in time")
    os.kill(holder.pid, signal.SIGCONT)
    _, said = holder.communicate("\n")
    assert (
        holder.returncode == 1
        and "attempt 1 was considered dead and is fenced off: nightly (attempt 2" in said
    )
    assert (tmp_path / "bundles" / "k" / "f").read_text() == "in time"
    assert [p.name for p in (tmp_path / "bundles").iterdir()] == ["k"]


def test_a_holder_that_was_frozen_too_long_has_lost_its_lease(holder, tmp_path):
    os.kill(holder.pid, signal.SIGSTOP)
    with lease.hold(tmp_path, "nightly", 1.0):
        os.kill(holder.pid, signal.SIGCONT)
        _, said = holder.communicate("\n")
    assert holder.returncode == 1 and "fenced off" in said and not list((tmp_path / "bundles").iterdir())


def test_attempts_are_counted_and_a_damaged_lock_file_is_no_obstacle(tmp_path):
    for number in (1, 2):
        with lease.hold(tmp_path, "prepare", 1.0) as held:
            assert held.attempt == number
            assert json.loads((tmp_path / lease.LOCK).read_text())["job"] == "prepare"
    (tmp_path / lease.LOCK).write_text("{")
    with lease.hold(tmp_path, "prepare", 1.0) as held:
        held.check()


def test_a_root_that_cannot_be_written_to_is_named():
    with (
        pytest.raises(StorageError, match="/proc/nowhere cannot be written to"),
        lease.hold(lease.Path("/proc/nowhere"), "prepare", 1.0),
    ):
        pass


def test_commit_without_a_lease_still_lets_one_in_at_a_time(tmp_path):
    with (
        lease.commit(tmp_path),
        pytest.raises(RefusedError, match="hangs while it publishes"),
        lease.hold_file_lock(tmp_path / lease.COMMIT, 0.1),
    ):
        pass
    with lease.hold_file_lock(tmp_path / lease.COMMIT, 0.1):
        assert lease.describe_holder(tmp_path) is None
