import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from recray.errors import DamagedArtifactError, MissingArtifactError, OutputExistsError, RefusedError
from recray.snapshot.writer import publish
from recray.storage import (
    Storage,
    immutable_directory,
    is_complete,
    open_immutable,
    to_storage_error,
    write_json,
)
from recray.storage.lease import FAULT


def seal(path, key="k", **fields):
    with immutable_directory(path, "thing", key, fields) as folder:
        (folder / "a.bin").write_bytes(b"content")
    return path


def test_an_immutable_directory_is_all_or_nothing(tmp_path):
    with pytest.raises(RuntimeError), immutable_directory(tmp_path / "x", "thing", "k", {}) as folder:
        (folder / "a.bin").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    seal(tmp_path / "x", users=3)
    assert open_immutable(tmp_path / "x", "thing")["users"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_one_changed_byte_is_found(tmp_path):
    path = seal(tmp_path / "x")
    (path / "a.bin").write_bytes(b"kontent")
    with pytest.raises(DamagedArtifactError, match="a.bin") as error:
        open_immutable(path, "thing")
    assert "repeat the job" in error.value.fix


def test_missing_and_foreign_directories_are_named(tmp_path):
    with pytest.raises(MissingArtifactError, match="no thing"):
        open_immutable(tmp_path / "x", "thing")
    assert not is_complete(tmp_path / "x", "thing", "k")
    seal(tmp_path / "x")
    assert is_complete(tmp_path / "x", "thing", "k")
    with pytest.raises(OutputExistsError, match="belongs to"):
        is_complete(tmp_path / "x", "thing", "other")
    (tmp_path / "y").mkdir()
    with pytest.raises(OutputExistsError, match="move"):
        is_complete(tmp_path / "y", "thing", "k")


def test_a_faster_attempt_of_the_same_run_wins(tmp_path):
    with immutable_directory(tmp_path / "x", "thing", "k", {"by": "slow"}) as folder:
        (folder / "a.bin").write_bytes(b"content")
        seal(tmp_path / "x", by="fast")
    assert open_immutable(tmp_path / "x", "thing")["by"] == "fast"


def test_an_older_snapshot_cannot_replace_a_newer_one(tmp_path):
    storage = Storage(tmp_path)
    nights = {}
    for as_of, key in ((100, "old"), (200, "new")):
        path = storage.scores / key
        with immutable_directory(path, "snapshot", key, {"as_of_s": as_of}):
            pass
        nights[key] = (path, open_immutable(path, "snapshot"))
    assert publish(storage, *nights["new"])
    assert not publish(storage, *nights["new"])
    with pytest.raises(RefusedError, match="newer"):
        publish(storage, *nights["old"])
    assert json.loads(storage.latest.read_text())["run_key"] == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_takes_nothing_is_named_however_deep(tmp_path, number):
    try:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("while writing") from error
    except RuntimeError as error:
        storage_error = to_storage_error(error, tmp_path)
    assert (
        str(tmp_path) in storage_error.message
        and os.strerror(number) in storage_error.message
        and "repeat the job" in storage_error.fix
    )
    assert to_storage_error(RuntimeError(f"native: {os.strerror(number)} (os error {number})"), tmp_path)
    assert to_storage_error(RuntimeError("something else"), tmp_path) is None
    assert to_storage_error(None, tmp_path) is None


COMMIT = """
import sys
from pathlib import Path
from recray.storage import immutable_directory, write_json
root = Path(sys.argv[1])
with immutable_directory(root / "x", "thing", "k", {}) as folder:
    (folder / "a.bin").write_bytes(b"content")
write_json(root / "LATEST.json", {"new": 1})
write_json(root / "nights" / "k.json", {"new": 1})
"""


@pytest.mark.parametrize(
    ("point", "directory", "pointer", "file"),
    [
        ("thing:written", False, False, False),
        ("thing:complete", False, False, False),
        ("thing:visible", True, False, False),
        ("LATEST.json:written", True, False, False),
        ("LATEST.json:visible", True, True, False),
        ("nights:written", True, True, False),
        ("nights:visible", True, True, True),
        ("nothing:visible", True, True, True),
    ],
)
def test_who_is_killed_at_a_commit_point_leaves_all_or_nothing(tmp_path, point, directory, pointer, file):
    paths = (tmp_path / "x", tmp_path / "LATEST.json", tmp_path / "nights" / "k.json")
    write = [sys.executable, "-c", COMMIT, str(tmp_path)]
    done = subprocess.run(write, env={**os.environ, FAULT: f"KILL@{point}"})
    assert done.returncode == (0 if point.startswith("nothing") else -signal.SIGKILL)
    assert tuple(path.exists() for path in paths) == (directory, pointer, file)
    assert subprocess.run(write).returncode == 0
    assert open_immutable(paths[0], "thing")["files"].keys() == {"a.bin"}
    assert [json.loads(path.read_text()) for path in paths[1:]] == [{"new": 1}] * 2
    assert not list(tmp_path.glob(".x.*")), "what a killed attempt had begun is gone"


def test_a_failed_replacement_leaves_the_old_file_and_no_scratch(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and len(list(tmp_path.iterdir())) == 1
