import json

import pytest

from recray.errors import DamagedArtifactError, MissingArtifactError, OutputExistsError, RefusedError
from recray.snapshot.writer import publish
from recray.storage import Storage, is_sealed, open_sealed, sealed_directory


def seal(path, key="k", **fields):
    with sealed_directory(path, "thing", key, fields) as folder:
        (folder / "a.bin").write_bytes(b"content")
    return path


def test_a_sealed_directory_is_all_or_nothing(tmp_path):
    with pytest.raises(RuntimeError), sealed_directory(tmp_path / "x", "thing", "k", {}) as folder:
        (folder / "a.bin").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    seal(tmp_path / "x", users=3)
    assert open_sealed(tmp_path / "x", "thing")["users"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_one_changed_byte_is_found(tmp_path):
    path = seal(tmp_path / "x")
    (path / "a.bin").write_bytes(b"kontent")
    with pytest.raises(DamagedArtifactError, match="a.bin") as error:
        open_sealed(path, "thing")
    assert "repeat the job" in error.value.fix


def test_missing_and_foreign_directories_are_named(tmp_path):
    with pytest.raises(MissingArtifactError, match="no thing"):
        open_sealed(tmp_path / "x", "thing")
    assert not is_sealed(tmp_path / "x", "thing", "k")
    seal(tmp_path / "x")
    assert is_sealed(tmp_path / "x", "thing", "k")
    with pytest.raises(OutputExistsError, match="belongs to"):
        is_sealed(tmp_path / "x", "thing", "other")
    (tmp_path / "y").mkdir()
    with pytest.raises(OutputExistsError, match="move"):
        is_sealed(tmp_path / "y", "thing", "k")


def test_a_faster_attempt_of_the_same_run_wins(tmp_path):
    with sealed_directory(tmp_path / "x", "thing", "k", {"by": "slow"}) as folder:
        (folder / "a.bin").write_bytes(b"content")
        seal(tmp_path / "x", by="fast")
    assert open_sealed(tmp_path / "x", "thing")["by"] == "fast"


def test_an_older_night_cannot_replace_a_newer_one(tmp_path):
    storage = Storage(tmp_path)
    nights = {}
    for as_of, key in ((100, "old"), (200, "new")):
        path = storage.scores / key
        with sealed_directory(path, "snapshot", key, {"as_of_s": as_of}):
            pass
        nights[key] = (path, open_sealed(path, "snapshot"))
    assert publish(storage, *nights["new"])
    assert not publish(storage, *nights["new"])
    with pytest.raises(RefusedError, match="newer"):
        publish(storage, *nights["old"])
    assert json.loads(storage.latest.read_text())["run_key"] == "new"
