"""`recray tune` on a published night: learned on held-out users, judged on others, sealed once, told to MLflow, released or not."""

from __future__ import annotations

import pytest
from conftest import prepare_here

from policies import gate
from policies import tune as tuning
from recray import pipeline
from recray.benchmark.nights import publish_untrained
from recray.bundle import Bundle
from recray.config import load_settings
from recray.dataset.worlds import World
from recray.errors import DataError, RefusedError
from recray.inference.policy import Policy
from recray.release import Release
from recray.storage import Storage
from recray.tracking.runs import Tracking


@pytest.fixture(scope="module")
def settings(ray_session, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    World(users=900, items=80, events_per_user=14, seed=3).write(folder)
    return load_settings(
        None,
        [
            f"data.events=[{folder / 'events'}]", f"storage.root={folder / 'root'}", "split.kind=leave_one_out", "model.dim=16", "model.history=32",
            "score.k=10", "policy.decisions=3000", "policy.share=0.3", "policy.actions=[temperature]",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def storage(settings):
    publish_untrained(settings, prepare_here(settings), settings.root())
    return Storage(settings.root())


def test_a_policy_is_made_judged_and_kept(settings, storage):
    before = storage.release.read_bytes()
    result = pipeline.run_tune(settings, None)
    bundle = Bundle.open(storage.bundle("untrained"))
    policy = Policy.load(storage.policy(result.run_key), bundle.digest)
    assert policy.actions == ("temperature",) and policy.about["decisions"] >= 3000
    names = [check["name"] for check in policy.about["checks"]]
    assert names == ["gain", "segment short histories", "segment middle histories", "segment long histories", "diversity", "latency"]
    assert 0 < policy.about["figures"]["latency"] < 1 and policy.about["figures"]["users"] >= tuning.LEAST
    assert bool(result.metrics["promoted"]) == (result.reason == "") == Release.read(storage).on_trial
    if not result.metrics["promoted"]:
        assert storage.release.read_bytes() == before
    tracking = Tracking(settings.tracking, storage)
    run = tracking._client.get_run(tracking.run("untrained", ""))
    assert run.data.metrics["policy_gain"] == pytest.approx(policy.about["figures"]["gain"])
    again = pipeline.run_tune(settings, None)
    assert again.status == "skipped" and again.run_key == result.run_key


def test_what_passes_goes_on_trial_and_what_is_refused_is_not_adopted(settings, storage, monkeypatch):
    verdict = gate.Verdict([gate.Check("gain", True, "gains")], {"gain": 1.0})
    monkeypatch.setattr(tuning, "judge", lambda *_: verdict)
    before = storage.release.read_bytes()
    result = pipeline.run_tune(settings.model_copy(update={"policy": settings.policy.model_copy(update={"decisions": 600})}), None)
    release = Release.read(storage)
    assert result.reason == "" and release.challenger.name == f"untrained+{result.run_key}" and release.share == 0.3
    storage.release.write_bytes(before)
    monkeypatch.setattr(tuning, "judge", lambda *_: gate.Verdict([gate.Check("gain", False, "gains nothing")]))
    refused = pipeline.run_tune(settings.model_copy(update={"policy": settings.policy.model_copy(update={"decisions": 700})}), None)
    assert refused.reason == "gains nothing" and storage.release.read_bytes() == before
    with pytest.raises(RefusedError, match="gains nothing"):
        pipeline.run_promote(settings, None, bundle=f"untrained+{refused.run_key}")
    pipeline.run_promote(settings, None, bundle=f"untrained+{result.run_key}")
    assert Release.read(storage).champion.policy == result.run_key
    storage.release.write_bytes(before)


def test_bad_circumstances_are_named(settings, storage, world_settings, world_dataset, tmp_path):
    bundle = Bundle.open(publish_untrained(world_settings, world_dataset, tmp_path / "small").bundle("untrained"))
    with pytest.raises(DataError, match="too few for a policy"):
        tuning.tune(world_settings, world_dataset, bundle)
    private = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"enabled": True})})
    with pytest.raises(RefusedError, match="privacy"):
        tuning.tune(private, world_dataset, bundle)
