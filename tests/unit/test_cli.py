"""What a person or a scheduler meets: exit codes, the last line, errors that name the thing and the fix."""

import json

import pytest
from conftest import bundle_here, prepare_here, world_overrides

from recray import cli
from recray.bundle import Bundle
from recray.config import load_settings
from recray.errors import DamagedArtifactError


def call(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_validate_reads_footers_only(capsys, world_folder, tmp_path):
    code, result, said = call(capsys, "validate", *world_overrides(world_folder, tmp_path / "root"))
    assert (code, result["status"]) == (0, "ok") and result["metrics"]["items"] == 120
    assert "ordered by timestamp" in said
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["prepare", "train.epoch=3"], 2, "did you mean epochs?"),
        (["prepare", "--config", "/nowhere.yaml"], 2, "recray init"),
        (["prepare", "--as-of", "soon"], 2, "--as-of"),
        (["prepare", "storage.root=relative"], 2, "absolute"),
        (["validate", "data.events=/nowhere"], 1, "/nowhere does not exist"),
        (["validate", "data.columns={timestamp: null}"], 1, "needs a timestamp column"),
        (["prepare", "storage.root=/proc/nowhere"], 1, "cannot be written to"),
        (["train", "storage.root={tmp}"], 1, "recray prepare"),
    ],
)
def test_errors_are_named_without_a_traceback(capsys, tmp_path, arguments, code, named):
    arguments = [argument.format(tmp=tmp_path) if "{tmp}" in argument else argument for argument in arguments]
    found, result, said = call(capsys, *arguments)
    assert (found, result["status"]) == (code, "failed")
    assert named in said and "fix:" in said and "Traceback" not in said
    _, _, loud = call(capsys, *arguments, "--traceback")
    assert "Traceback" in loud


def test_later_stages_name_the_stage_that_is_missing(capsys, world_folder, tmp_path):
    overrides = world_overrides(world_folder, tmp_path)
    prepare_here(load_settings(None, overrides))
    for job in ("evaluate", "score"):
        code, _, said = call(capsys, job, *overrides)
        assert code == 1 and "recray train" in said


def test_a_damaged_dataset_stops_the_job_before_any_work(capsys, world_folder, tmp_path):
    overrides = world_overrides(world_folder, tmp_path)
    data = prepare_here(load_settings(None, overrides))
    file = data.path / "items.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    code, result, said = call(capsys, "train", *overrides)
    assert (code, result["status"]) == (1, "failed") and "items.parquet differs from the digest" in said
    assert not (tmp_path / "bundles").exists() and not (tmp_path / "training").exists()


def test_a_damaged_bundle_is_refused(capsys, world_folder, tmp_path):
    settings = load_settings(None, world_overrides(world_folder, tmp_path))
    path = tmp_path / "bundle"
    bundle_here(settings, prepare_here(settings), path, "k")
    for name in ("model.safetensors", "items.parquet", "config.yaml", "popularity.parquet", "privacy.json", "metrics.json"):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        original = (path / name).read_bytes()
        (path / name).write_bytes(content)
        with pytest.raises(DamagedArtifactError, match=name):
            Bundle.open(path)
        (path / name).write_bytes(original)
    Bundle.open(path)
    original = (path / "manifest.json").read_bytes()
    for place in range(0, len(original), 37):
        changed = bytearray(original)
        changed[place] ^= 1
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(DamagedArtifactError):
            Bundle.open(path)


def test_one_job_at_a_time_in_a_root(capsys, world_folder, tmp_path):
    from recray.storage import locked

    with locked(tmp_path / ".lock", wait=False):
        code, result, said = call(capsys, "prepare", *world_overrides(world_folder, tmp_path))
    assert (code, result["status"]) == (3, "refused") and "another job is at work" in said
