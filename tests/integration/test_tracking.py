"""Outbox and registry against a real MLflow store (sqlite): told once, in order, and what does not fit is
named.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from conftest import synthetic_overrides
from harness import wait_for

from recray import pipeline
from recray.config import load_settings
from recray.errors import MissingArtifactError, RefusedError, TrackingError
from recray.release import Member, Release
from recray.stages import JobContext
from recray.storage import Storage
from recray.testing.published import prepare_here, untrained_bundle
from recray.tracking import runs
from recray.tracking.outbox import Outbox
from recray.tracking.runs import Tracking


@pytest.fixture
def shop(tmp_path, synthetic_folder, own_home):
    """Settings, storage, dataset, and two bundles of which MLflow knows nothing yet."""
    overrides = [
        *synthetic_overrides(synthetic_folder, tmp_path / "root"),
        "promotion.must_beat=[]",
        "promotion.margin=1",
        "promotion.consistency_users=8",
    ]
    settings = load_settings(None, overrides)
    dataset, storage = prepare_here(settings), Storage(settings.root())
    bundles = []
    for seed in range(2):
        bundles.append(
            untrained_bundle(
                load_settings(None, [*overrides, f"train.seed={seed}"]),
                dataset,
                storage.bundle(f"b{seed}"),
                f"b{seed}",
            )
        )
    return settings, storage, dataset, bundles


def entry(storage, bundle, **fields):
    tags = {runs.RUN_KEY: bundle.key, runs.DATASET: bundle.manifest["dataset"], runs.DIGEST: bundle.digest}
    folders = {"bundle": bundle.path.relative_to(storage.root).as_posix()}
    return {
        "run_key": bundle.key,
        "run_name": "train",
        "order": [0, 0],
        "folders": folders,
        "register": tags,
        "finished": True,
        **fields,
    }


def test_what_is_queued_is_logged_once_and_in_order(shop):
    from mlflow import MlflowClient

    settings, storage, _, (first, second) = shop
    outbox = Outbox(storage, Tracking(settings.tracking, storage))
    outbox.put("late", entry(storage, second, order=[2, 0], metrics={"values": {"ndcg@10": 0.2}, "step": 2}))
    outbox.put(
        "early",
        entry(storage, first, order=[1, 0], curve=[{"epoch": 1, "loss": 1.0, "validation_ndcg": 0.5}]),
    )
    outbox.put("early", {"run_key": "other"})
    assert [key for key, _ in outbox.pending()] == ["early", "late"]
    Release(champion=Member.of(first), challenger=Member.of(second)).write(storage)
    mark = storage.outbox / "late.json"
    queued = mark.read_text()
    for _ in range(2):
        outbox.deliver()
        assert outbox.pending() == []
    client = MlflowClient(outbox.tracking.uri)
    assert {
        v.tags[runs.RUN_KEY]: int(v.version) for v in client.search_model_versions("name = 'recray'")
    } == {"b0": 1, "b1": 2}
    assert outbox.tracking.aliases() == {"champion": "1", "challenger": "2"}
    run = outbox.tracking.run("b1", "train")
    assert client.get_run(run).info.status == "FINISHED" and client.get_run(run).data.metrics == {
        "ndcg_at_10": 0.2
    }
    mark.write_text(queued)  # killed before the mark
    outbox.deliver()
    assert (
        len(client.get_metric_history(run, "ndcg_at_10")) == 1
        and len(client.search_model_versions("name = 'recray'")) == 2
    )
    Release(champion=Member.of(second)).write(storage)
    outbox.deliver()
    assert outbox.tracking.aliases() == {"champion": "2"}


def test_a_bundle_registered_under_another_dataset_is_refused(shop):
    settings, storage, _, (first, _) = shop
    outbox = Outbox(storage, Tracking(settings.tracking, storage))
    wrong = entry(storage, first)
    wrong["register"][runs.DATASET] = "ffff000011112222"
    outbox.put("b0", wrong)
    with pytest.raises(
        RefusedError,
        match="registers bundle b0 under dataset ffff000011112222.*it was trained on "
        f"{first.manifest['dataset']}",
    ):
        pipeline.run("promote", settings, None, bundle="b0")
    assert Release.read(storage).champion is None


def test_an_alias_that_points_nowhere_is_refused_and_fixed(shop):
    from mlflow import MlflowClient

    settings, storage, _, (first, second) = shop
    outbox = Outbox(storage, Tracking(settings.tracking, storage))
    outbox.put("b0", entry(storage, first))
    assert pipeline.run("promote", settings, None, bundle="b0").metrics["promoted"] == 1
    client = MlflowClient(outbox.tracking.uri)
    assert outbox.tracking.aliases() == {"champion": "1"}
    client.delete_model_version("recray", "1")
    if outbox.tracking.aliases():
        with pytest.raises(RefusedError, match="points at version 1, which does not exist"):
            pipeline.run("promote", settings, None, bundle="b1")
        client.delete_registered_model_alias("recray", "champion")
    outbox.put("b1", entry(storage, second))
    assert pipeline.run("promote", settings, None, bundle="b1").metrics["promoted"] == 1
    assert outbox.tracking.aliases()["champion"] == str(outbox.tracking.version("b1").version)


def test_a_missing_champion_can_be_replaced_by_hand(shop):
    settings, storage, _, (first, second) = shop
    outbox = Outbox(storage, Tracking(settings.tracking, storage))
    for bundle in (first, second):
        outbox.put(bundle.key, entry(storage, bundle))
    pipeline.run("promote", settings, None, bundle="b0")
    shutil.rmtree(first.path)
    with pytest.raises(MissingArtifactError, match="recray promote KEY"):
        pipeline.run("score", settings, None)
    assert pipeline.run("promote", settings, None, bundle="b1").metrics["promoted"] == 1
    assert Release.read(storage).champion == Member.of(second)


def test_an_entry_that_mlflow_does_not_take_does_not_hold_up_the_others(shop):
    settings, storage, _, (first, second) = shop
    outbox = Outbox(storage, Tracking(settings.tracking, storage))
    outbox.put(
        "bad",
        entry(
            storage,
            first,
            order=[1, 0],
            metrics={"values": {"not a / valid: name?!": float("nan")}, "step": "soon"},
        ),
    )
    outbox.put("good", entry(storage, second, order=[2, 0]))
    with pytest.raises(TrackingError):
        outbox.deliver()
    assert [key for key, _ in outbox.pending()] == ["bad"]


@pytest.mark.parametrize("size", [1, 200_000])  # of the database so far, of about 950,000 bytes
def test_a_kill_while_the_database_is_made_does_no_lasting_harm(tmp_path, own_home, size):
    settings = load_settings(None, [f"storage.root={tmp_path}"])
    code = (
        "import sys; from pathlib import Path; from recray.config import *; from recray.storage import "
        "Storage\n"
    )
    code += "from recray.tracking.runs import Tracking\n"
    code += (
        "Tracking(load_settings(None, [f'storage.root={sys.argv[1]}']).tracking, "
        "Storage(Path(sys.argv[1]))).ping()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)

    def in_the_making() -> bool:
        return any(path.stat().st_size >= size for path in (tmp_path / "mlflow").glob(".making-*.db"))

    wait_for("a database in the making", in_the_making, every_s=0.001, ended=process.poll)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow" / "mlflow.db").exists()
    Tracking(settings.tracking, Storage(tmp_path)).ping()
    assert {p.name for p in (tmp_path / "mlflow").iterdir()} == {"mlflow.db"}


def test_a_gate_that_refuses_ends_the_command_with_its_words(shop):
    settings, storage, _, _ = shop
    strict = settings.model_copy(
        update={"promotion": settings.promotion.model_copy(update={"must_beat": ("EASE",)})}
    )
    strict = strict.model_copy(
        update={"evaluate": strict.evaluate.model_copy(update={"protocol": "filter_seen"})}
    )
    for _ in range(2):
        with pytest.raises(RefusedError, match="EASE"):
            pipeline.run("promote", strict, None, bundle="b0")
    assert Release.read(storage).champion is None and Release.read(storage).challenger.run_key == "b0"


def test_an_unavailable_mlflow_is_named_and_costs_no_more_than_its_limits(shop):
    settings, storage, _, (first, _) = shop
    tracking = settings.tracking.model_copy(
        update={"uri": "http://127.0.0.1:9", "timeout_s": 1, "retries": 0}
    )
    outbox = Outbox(storage, Tracking(tracking, storage))
    outbox.put("b0", entry(storage, first))
    with pytest.raises(TrackingError, match="MLflow at http://127.0.0.1:9 does not respond"):
        outbox.deliver()
    assert [key for key, _ in outbox.pending()] == ["b0"]
    context = JobContext(
        settings.model_copy(update={"tracking": tracking}), storage, lambda message, **fields: None
    )
    context.deliver()
    context.deliver()
    assert len(context.warnings) == 1 and str(storage.outbox) in context.warnings[0]
