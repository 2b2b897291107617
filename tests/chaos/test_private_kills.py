"""SIGKILL of a private night while it reserves, trains and commits: no step is lost from the ledger, none is counted twice."""

from __future__ import annotations

import json
import sqlite3
import time

import pytest
from conftest import private_overrides
from harness import Night, kill, titled

from recray.privacy.accounting import epsilon_of
from recray.privacy.ledger import Ledger

STEPS, EVERY = 60, 20
MORE = (f"privacy.steps={STEPS}", f"privacy.report_every={EVERY}")


def private_night(folder, root, environment, *more):
    return Night(folder, root, environment, *private_overrides(folder, root), *MORE, *more)


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


MOMENTS = {
    "reserve": lambda root: kinds(root) == ["reserve"],
    "train": lambda root: kinds(root).count("take") >= 3,  # the counts, the first piece, the second one
    "bundle": lambda root: any((root / "bundles").glob("[!.]*")),
}


@pytest.mark.parametrize("victim", ["driver", "worker"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_private_night_repeated_accounts_for_every_step(head, world_folder, tmp_path, moment, victim):
    if victim == "worker" and moment != "train":
        pytest.skip("there is no worker then")
    root = tmp_path / "root"
    night = private_night(world_folder, root, head.environment)
    assert night.reaches("train")
    while not MOMENTS[moment](root):
        assert night.process.poll() is None, night.said[-2000:]
        time.sleep(0.01)
    taken = kinds(root).count("take")
    kill(*(titled(head.home, "RayTrainWorker") if victim == "worker" else [night.job]))
    code, result = night.end()
    for _ in range(3):
        if code == 0:
            break
        code, result = private_night(world_folder, root, head.environment).end()
    assert code == 0, result
    ledger = Ledger.read(f"sqlite:///{root / 'privacy.sqlite'}", "users")
    (run,) = ledger.runs()
    assert run.committed and run.reserved >= run.taken
    redone = run.taken - STEPS
    # what a kill undid is counted once more, and nothing else: the piece it hit, and those whose checkpoints Ray had not taken over yet
    assert redone in (0, EVERY, 2 * EVERY, *((3 * EVERY,) if victim == "worker" and taken > 3 else ()))
    if moment == "train":
        assert redone or kinds(root).count("take") == 1 + STEPS // EVERY
    assert 1 <= run.counts_taken <= run.counts_reserved <= 2  # drawn again where no checkpoint was left
    told = [json.loads(line)["steps"] for line in next((root / "training").glob("*.jsonl")).read_text().splitlines()]
    assert max(told) == STEPS
    (statement,) = (json.loads(path.read_text()) for path in (root / "bundles").glob("*/privacy.json"))
    assert statement["steps"] == STEPS
    assert statement["epsilon_of_all_trainings"] == pytest.approx(epsilon_of(ledger.spent(), statement["delta"]), abs=1e-3)
    again = private_night(world_folder, root, head.environment)
    assert again.end()[1]["status"] == "skipped"
    assert kinds(root).count("commit") == 1 and len(ledger.runs()) == 1


def test_a_night_over_the_cap_is_refused_before_its_first_step(head, world_folder, tmp_path):
    root = tmp_path / "root"
    for share, words in ((0.0, "what would fit"), (0.1, "item counts alone do not fit")):
        code, result = private_night(world_folder, root, head.environment, "privacy.cap=0.5", f"privacy.counts_share={share}").end()
        assert (code, result["status"]) == (3, "refused") and words in result["reason"]
        assert kinds(root) == [] and not list(root.glob("bundles/*"))
