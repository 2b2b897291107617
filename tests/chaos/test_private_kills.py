"""SIGKILL of a private training while it reserves, trains and commits: no step is lost from the ledger, none
is counted twice.
"""

from __future__ import annotations

import json
import shutil
import sqlite3

import pytest
from conftest import private_overrides
from harness import AS_OF, QUICK, Job, kill
from processes import titled

from recray.config import load_settings, parse_as_of
from recray.privacy.accounting import epsilon_of
from recray.privacy.ledger import Ledger
from recray.testing.published import prepare_here

STEPS, EVERY = 60, 20
OVERRIDES = (f"privacy.steps={STEPS}", f"privacy.report_every={EVERY}")


@pytest.fixture(scope="module")
def prepared(synthetic_folder, tmp_path_factory):
    """A root whose dataset is prepared."""
    root = tmp_path_factory.mktemp("private")
    prepare_here(
        load_settings(None, [*private_overrides(synthetic_folder, root), *QUICK, *OVERRIDES]),
        parse_as_of(AS_OF),
    )
    return root


@pytest.fixture
def job(head, synthetic_folder, prepared, tmp_path):
    """Starts a job on a copy of the prepared root."""
    root = shutil.copytree(prepared, tmp_path / "root")

    def start(name: str, *overrides: str, **options) -> Job:
        return Job(
            name,
            synthetic_folder,
            root,
            head.environment,
            *private_overrides(synthetic_folder, root),
            *OVERRIDES,
            *overrides,
            **options,
        )

    return start


def kinds(root) -> list[str]:
    """Kinds of the ledger's entries so far."""
    file = root / "privacy.sqlite"
    if not file.exists():
        return []
    try:
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10) as connection:
            return [kind for (kind,) in connection.execute("SELECT kind FROM entries ORDER BY number")]
    except sqlite3.OperationalError:  # not begun yet
        return []


def reserved(root) -> bool:
    return kinds(root) == ["reserve"]


def taken_twice(root) -> bool:
    return kinds(root).count("take") >= 3  # the counts, the first piece, the second one


def test_a_training_whose_driver_is_killed_accounts_for_every_step(job, tmp_path):
    root = tmp_path / "root"
    for event, moment in (("a reservation", reserved), ("the second piece", taken_twice)):
        training = job("train")
        training.waits_for(f"{event} in the ledger", lambda moment=moment: moment(root))
        taken = kinds(root).count("take")
        kill(training.worker)
        assert training.end()[0] == 1
    job("train").ends_ok()
    _assert_accounted(root, most_redone=2)
    assert taken >= 3 and job("train").ends_ok()["status"] == "skipped"


def test_a_training_whose_worker_is_killed_and_its_driver_before_the_commit_accounts_for_every_step(
    head, job, tmp_path
):
    root = tmp_path / "root"
    training = job("train", fault="KILL@bundle:visible")
    training.waits_for("the second piece in the ledger", lambda: taken_twice(root))
    taken = kinds(root).count("take")
    kill(*titled(head.home, "RayTrainWorker"))  # another one takes its place
    training.is_killed()
    assert "commit" not in kinds(root) and list((root / "bundles").iterdir()), (
        "the bundle is there, and the ledger does not know"
    )
    job("nightly").ends_ok()
    _assert_accounted(root, most_redone=3 if taken > 3 else 2)
    assert job("nightly").ends_ok()["status"] == "skipped"
    assert kinds(root).count("commit") == 1


def _assert_accounted(root, *, most_redone: int) -> None:
    """The ledger, the curve and the statement agree. What a kill undid is counted once more, and nothing
    else: the piece it hit, and those whose checkpoints Ray had not taken over yet.
    """
    ledger = Ledger.read(f"sqlite:///{root / 'privacy.sqlite'}", "users")
    (run,) = ledger.runs()
    assert run.committed and run.steps_reserved >= run.steps_taken and kinds(root).count("commit") == 1
    redone = run.steps_taken - STEPS
    assert redone in range(0, (most_redone + 1) * EVERY, EVERY)
    assert redone or kinds(root).count("take") == 1 + STEPS // EVERY
    assert 1 <= run.counts_taken <= run.counts_reserved <= 2  # drawn again where no checkpoint was left
    amounts = [
        json.loads(line)["steps"]
        for line in next((root / "training").glob("*.jsonl")).read_text().splitlines()
    ]
    assert max(amounts) == STEPS
    (statement,) = (json.loads(path.read_text()) for path in (root / "bundles").glob("*/privacy.json"))
    assert statement["steps"] == STEPS
    assert statement["epsilon_of_all_trainings"] == pytest.approx(
        epsilon_of(ledger.spent(), statement["delta"]), abs=1e-3
    )


def test_a_training_over_the_cap_is_refused_before_its_first_step(job, tmp_path):
    root = tmp_path / "root"
    for share, words in ((0.0, "these fit"), (0.1, "item counts alone do not fit")):
        code, result = job("train", "privacy.cap=0.5", f"privacy.counts_share={share}").end()
        assert (code, result["status"]) == (3, "refused") and words in result["reason"]
        assert kinds(root) == [] and not list(root.glob("bundles/*"))
