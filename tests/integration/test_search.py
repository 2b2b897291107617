"""A search on real Ray Tune, Optuna and MLflow: what it writes, that it goes on, and what it says."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import synthetic_overrides
from harness import wait_for

from recray import pipeline
from recray.bundle import Bundle
from recray.config import load_settings, with_values
from recray.errors import TrainingError
from recray.storage import read_json
from recray.tracking.runs import PARENT, RUN_KEY, Tracking

SPACE = "search.space={model.dropout: [0.1, 0.4], train.learning_rate: {min: 0.0003, max: 0.01, log: true}}"
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def overrides(synthetic_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("search") / "root"
    return [*synthetic_overrides(synthetic_folder, root), SPACE, "search.trials=4", "train.epochs=3"]


@pytest.fixture(scope="module")
def first(overrides):
    return pipeline.run("search", load_settings(None, overrides))


def curves(result):
    return {
        path.parent.name: read_json(path)
        for path in sorted((_folder(result) / "trials").glob("*/curve.json"))
    }


def _folder(result):
    from pathlib import Path

    return Path(result.outputs["search"])


def test_the_best_trial_becomes_a_settings_file_and_a_bundle(first, overrides):
    document = read_json(_folder(first) / "search.json")
    trials = document["trials"]
    assert len(trials) == first.metrics["trials"] == 4 and first.metrics["failed_trials"] == 0
    best = max(trials, key=lambda trial: trial["validation_ndcg"])
    assert document["winner"] == trials[0]["key"] == best["key"]
    settings = load_settings(None, overrides)
    own = {"model.dropout": 0.1, "train.learning_rate": settings.train.learning_rate}
    assert own in [trial["values"] for trial in trials], (
        "the first trial is as close to the settings as can be"
    )
    written = load_settings(first.outputs["config"], ["storage.root=" + str(settings.root())])
    expected = with_values(settings, best["values"])
    assert (written.model, written.train, written.data) == (expected.model, expected.train, expected.data)
    bundle = Bundle.open(first.outputs["bundle"])
    assert bundle.settings["model"]["dropout"] == best["values"]["model.dropout"]
    curve = [line["validation_ndcg"] for line in bundle.metrics["curve"]]
    trial_curve = [line["validation_ndcg"] for line in curves(first)[best["key"]]]
    assert curve[: len(trial_curve)] == trial_curve, "the training goes on where the trial was"
    for name in ("importance.png", "parallel.png"):
        assert (_folder(first) / name).stat().st_size > 5_000
    assert sum(document["importance"].values()) == pytest.approx(1, abs=0.01)
    assert not (_folder(first) / "tune").exists()


def test_mlflow_has_the_search_with_a_child_run_for_each_trial(first, overrides):
    settings = load_settings(None, overrides)
    from recray.storage import Storage

    client = Tracking(settings.tracking, Storage(settings.root()))._client
    runs = client.search_runs([client.get_experiment_by_name("recray").experiment_id])
    (parent,) = (run for run in runs if run.data.tags[RUN_KEY] == first.run_key)
    children = [run for run in runs if run.data.tags.get(PARENT) == parent.info.run_id]
    assert len(children) == 4 and {run.info.status for run in children} == {"FINISHED"}
    best = max(run.data.metrics["validation_ndcg"] for run in children)
    assert parent.data.metrics["validation_ndcg"] >= best
    assert {name for run in children for name in run.data.params} == {"model.dropout", "train.learning_rate"}


def test_a_longer_search_goes_on_and_trains_no_trial_again(first, overrides):
    before = curves(first)
    again = pipeline.run("search", load_settings(None, [*overrides, "search.trials=5"]))
    assert again.run_key == first.run_key and again.metrics["trials"] == 5
    after = curves(again)
    assert {key: after[key][: len(curve)] for key, curve in before.items()} == before
    assert again.metrics["validation_ndcg"] >= first.metrics["validation_ndcg"]


def test_a_search_whose_trials_all_fail_says_which_and_why(first, overrides):
    broken = load_settings(None, [*overrides, "search.space={train.learning_rate: [1e30]}"])
    bundles = set(broken.root().glob("bundles/*"))
    with pytest.raises(TrainingError) as error:
        pipeline.run("search", broken)
    assert "all 1 trials failed; the first (learning_rate=1e+30" in error.value.message
    assert "TrainingError: " in error.value.message and "search.space" in error.value.fix
    assert set(broken.root().glob("bundles/*")) == bundles


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on(overrides, tmp_path):
    words = [sys.executable, "-m", "recray.cli", "search", *overrides, f"storage.root={tmp_path}"]
    words += ["search.trials=8", "train.epochs=6", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as killed:
        wait_for("two curves", lambda: len(list(tmp_path.glob("searches/*/trials/*/curve.json"))) >= 2)
        killed.send_signal(signal.SIGKILL)
    before = {path.parent.name: read_json(path) for path in tmp_path.glob("searches/*/trials/*/curve.json")}
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["metrics"]["trials"] == 8
    for path in tmp_path.glob("searches/*/trials/*/curve.json"):
        known = before.get(path.parent.name, [])
        assert read_json(path)[: len(known)] == known
