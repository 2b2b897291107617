"""Faults made by hand in what must never be wrong: tests that are in CI notice each. Run by `bash
infra/test.sh --full`.

A mutant is a copy of the code with a few words changed. One that no test notices says which promise is no
longer tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.second]
REPOSITORY = Path(__file__).resolve().parents[2]

MUTANTS = {
    "storage: what a killed attempt had begun stays": (
        "recray/storage/__init__.py",
        'for leftover in path.parent.glob(f".{path.name}.*"):',
        "for leftover in ():",
        "tests/unit/storage/test_storage.py",
    ),
    "storage: a directory is visible before its manifest is": (
        "recray/storage/__init__.py",
        "        _seal(scratch, kind, run_key, fields)\n",
        "        os.rename(scratch, path)\n        _seal(path, kind, run_key, fields)\n",
        "tests/unit/storage/test_storage.py",
    ),
    "storage: a changed byte goes unseen": (
        "recray/storage/__init__.py",
        'sha256_file(path / name) == files[name]["sha256"]',
        "True",
        "tests/unit/storage/test_storage.py",
    ),
    "storage: what another run wrote is taken for one's own": (
        "recray/storage/__init__.py",
        'or manifest.get("run_key") != run_key:',
        "or not run_key:",
        "tests/unit/storage/test_storage.py",
    ),
    "snapshot: an older date replaces a newer one": (
        "recray/snapshot/writer.py",
        'if published["as_of_s"] > entry["as_of_s"]:',
        "if False:",
        "tests/unit/storage/test_storage.py",
    ),
    "lease: who was taken for dead still publishes": (
        "recray/storage/lease.py",
        "            _current_lease.check()\n        yield\n",
        "            pass\n        yield\n",
        "tests/unit/storage/test_lease.py",
    ),
    "lease: a holder that lives is taken for dead": (
        "recray/storage/lease.py",
        "if previous_stamp is not None and lock_stamp != previous_stamp:",
        "if False:",
        "tests/unit/storage/test_lease.py",
    ),
    "release: a bundle that was replaced keeps its role": (
        "recray/release.py",
        "if bundle.digest != self.digest:",
        "if False:",
        "tests/unit/evaluation/test_promotion.py",
    ),
    "release: what was rolled back comes back": (
        "recray/evaluation/promotion.py",
        "if challenger.key in release.rolled_back and not is_manual:\n        reason",
        "if False:\n        reason",
        "tests/unit/evaluation/test_promotion.py",
    ),
    "ledger: more steps are taken than were reserved": (
        "recray/privacy/ledger.py",
        "run.steps_taken + steps > run.steps_reserved",
        "False",
        "tests/unit/privacy/test_ledger.py",
    ),
    "ledger: a training over the cap is reserved": (
        "recray/privacy/ledger.py",
        "mechanism.delta) > cap:",
        "mechanism.delta) > 100 * cap:",
        "tests/unit/privacy/test_ledger.py",
    ),
    "event store: an event that comes twice is kept twice": (
        "recray/events/sqlite.py",
        "DO NOTHING RETURNING number",
        "DO UPDATE SET at_s = excluded.at_s RETURNING number",
        "tests/unit/events/test_log.py",
    ),
    "event store: acknowledged before it is written": (
        "recray/events/sqlite.py",
        'connection.execute("COMMIT")',
        "pass",
        "tests/unit/events/test_log.py",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_noticed(tmp_path, name):
    file, right, wrong, tests = MUTANTS[name]
    for folder in ("recray", "policies", "jobs", "tests"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    code = (tmp_path / file).read_text()
    assert code.count(right) == 1, f"{file} does not say {right!r} once; write this mutant anew"
    (tmp_path / file).write_text(code.replace(right, wrong))
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", "-p", "no:cacheprovider", tests]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "FAILED" in done.stdout, f"no test notices it: {done.stdout[-1500:]}"
