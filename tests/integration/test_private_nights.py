"""Private nights on real Ray and MLflow: two workers, fixed features, a warm start from the private champion,
and the audit.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path

import mlflow
import pytest
from conftest import private_overrides

from recray import pipeline
from recray.bundle import Bundle
from recray.cli import main
from recray.config import load_settings
from recray.errors import TrainingError
from recray.privacy.ledger import Ledger
from recray.release import Release
from recray.storage import Storage

FIRST = dt.datetime(2024, 4, 20, 23, 59, 59, tzinfo=dt.UTC)
SECOND = FIRST + dt.timedelta(days=1)
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def overrides(synthetic_folder, tmp_path_factory):
    fixed = [
        "model.items=features",
        "data.features={category: categorical, brand: categorical, tags: multi, title: text}",
    ]
    options = [
        "train.warm_start=true",
        "promotion.margin=1",
        "privacy.audit_canaries=1000",
        "privacy.audit_claims=[2]",
    ]
    options += ["train.workers=2", "train.cpus_per_worker=0.5"]
    return [*private_overrides(synthetic_folder, tmp_path_factory.mktemp("private")), *fixed, *options]


@pytest.fixture(scope="module")
def settings(overrides):
    return load_settings(None, overrides)


def test_a_nightly_run_continues_the_private_champion_and_both_are_accounted_for(settings):
    storage = Storage(settings.root())
    assert pipeline.run("nightly", settings, FIRST).status == "ok"
    first = Release.read(storage).champion.open(storage)
    assert pipeline.run("nightly", settings, SECOND).status == "ok"
    second = Release.read(storage).champion.open(storage)
    assert second.key != first.key and second.manifest["parent"] == first.key
    assert first.privacy["began_with"] == "random weights" and first.digest in second.privacy["began_with"]
    ledger = Ledger.read(settings.ledger_url(), settings.privacy.population)
    assert [run.committed for run in ledger.runs()] == [True, True] and [
        run.counts_taken for run in ledger.runs()
    ] == [1, 1]
    assert [run.steps_taken for run in ledger.runs()] == [12, 12], "two workers take each step together"
    assert (
        second.privacy["epsilon_of_all_trainings"]
        > first.privacy["epsilon_of_all_trainings"]
        == pytest.approx(first.privacy["epsilon"], abs=0.02)
    )
    model = Bundle.open(second.path).model()
    assert model.items.ids is None and model.items.adapter is not None
    assert model.offset_V.min() < model.offset_V.max() == 0


def test_a_training_that_diverges_pays_for_its_steps_once(synthetic_folder, tmp_path):
    overrides = ["train.learning_rate=1e30", "train.warmup_steps=0", "train.max_failures=2"]
    settings = load_settings(None, [*private_overrides(synthetic_folder, tmp_path), *overrides])
    pipeline.run("prepare", settings, FIRST)
    with pytest.raises(TrainingError, match=r"after step 5 a weight is not finite") as raised:
        pipeline.run("train", settings, FIRST)
    (run,) = Ledger.read(settings.ledger_url(), settings.privacy.population).runs()
    assert (run.steps_taken, run.committed) == (5, False), "it did not begin anew to fail in the same way"
    assert "train.learning_rate" in raised.value.fix


def test_the_audit_reports_to_a_person_a_file_and_mlflow(settings, overrides, capsys):
    assert main(["privacy", "audit", "--as-of", FIRST.isoformat(), *overrides]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out.splitlines()[-1])
    audit = json.loads(Path(result["outputs"]["audit"]).read_text())
    assert audit == result["metrics"]
    assert list(audit["runs"]) == ["no noise", "not private", "own ε", "private", "rows made up", "ε 2"], (
        "sorted"
    )
    assert [(claim["training"], claim["verdict"]) for claim in audit["claims"]] == [
        ("ε 2", "not refuted"),
        ("own ε", "cannot tell"),
    ]
    assert any(
        "1000 canaries do not suffice; raise privacy.audit_canaries" in warning
        for warning in result["warnings"]
    )
    assert {check["name"] for check in audit["checks"]} >= {
        "contribution",
        "rate",
        "noise",
        "fresh noise",
        "noise of its own",
        "ledger",
    }
    assert all(check["passed"] for check in audit["checks"])
    assert (
        audit["runs"]["ε 2"]["epsilon"]
        < 2
        < audit["runs"]["no noise"]["epsilon"]
        <= audit["runs"]["no noise"]["ceiling"]
    )
    for name in ("private", "not private"):
        assert 0 <= audit["runs"][name]["true_positives_at_0.01"] <= 1 and audit["runs"][name]["others"] > 30
    assert "ε is above" in said.err and "not refuted; without noise it would have been refuted" in said.err
    assert len(Ledger.read(settings.ledger_url(), settings.privacy.population).runs()) == 2, (
        "nothing of an audit is released"
    )
    mlflow.set_tracking_uri(f"sqlite:///{settings.root()}/mlflow/mlflow.db")
    (run,) = mlflow.search_runs(
        experiment_names=["recray"], filter_string="attributes.run_name LIKE 'audit%'", output_format="list"
    )
    assert run.data.metrics["no_noise_epsilon"] == audit["runs"]["no noise"]["epsilon"]
    assert main(["privacy", "audit", "--as-of", FIRST.isoformat(), *overrides]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"] == audit, (
        "an audit that was made is not made again"
    )
