"""The promote stage: checks the promotion criteria, writes the decision as an artifact, and updates
RELEASE.json.

Uses storage and criteria, but no MLflow. The same case is decided once: a repeated run reuses its decision.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from recray.bundle import Bundle
from recray.config import Settings
from recray.config.formats import RESULTS_SINCE
from recray.dataset.reader import Dataset
from recray.errors import ArtifactError
from recray.evaluation import criteria
from recray.evaluation.evaluate import evaluate, evaluate_key
from recray.evaluation.statement import list_violations, load_audits
from recray.inference.policy import CheckRecord
from recray.privacy.accounting import epsilon_of
from recray.privacy.ledger import Ledger
from recray.release import Member, Release
from recray.storage import Storage, immutable_directory, is_complete, key_of, read_json

KIND = "promotion"


class Decision(TypedDict):
    """A decision about a challenger, the content of `decision.json`.

    reason : why the challenger is not promoted; empty if it is
    challenger, champion, dataset : run keys; None: there is no champion
    as_of_s : the end of the dataset
    """

    promoted: bool
    reason: str
    challenger: str
    champion: str | None
    dataset: str
    as_of_s: int
    checks: list[CheckRecord]
    comparison: criteria.Comparison


def promote(
    settings: Settings, dataset: Dataset, challenger: Bundle, *, is_manual: bool = False
) -> tuple[str, Decision, bool]:
    """Decide whether the challenger becomes the champion, and update RELEASE.json.

    Returns the promotion's run key, the decision, and whether RELEASE.json changed. If a criterion fails, the
    decision has `promoted` false; that is no error.

    is_manual : allow a bundle that was rolled back
    """
    storage = Storage(settings.root())
    release = Release.read(storage)
    if release.champion and release.champion.digest == challenger.digest:
        return _reuse_decision(storage, release, dataset, challenger)
    if challenger.key in release.rolled_back and not is_manual:
        reason = f"bundle {challenger.key} was rolled back; `recray promote {challenger.key}` allows it again"
        return "", _to_decision(dataset, challenger, release, [], {}, reason), False

    champion = _open_champion(storage, release, is_manual=is_manual)
    privacy = None
    if settings.privacy.enabled:
        privacy = _check_privacy(settings, challenger)
        if champion is not None and not champion.privacy["differential_privacy"]:
            champion = None  # it may have learned from the test users

    key = promote_key(settings, dataset, challenger, champion, privacy)
    path = storage.promotion(key)
    if not is_complete(path, KIND, key):
        _write_decision(settings, path, key, dataset, challenger, champion, release, privacy)
    decision = read_json(path / "decision.json")
    changed = _update_release(storage, challenger, key, promoted=decision["promoted"], is_manual=is_manual)
    return key, decision, changed


def promote_key(
    settings: Settings,
    dataset: Dataset,
    challenger: Bundle,
    champion: Bundle | None,
    privacy: criteria.Check | None = None,
) -> str:
    """Run key of promote. `privacy` is today's check of the ledger."""
    return key_of(
        "promote",
        settings.key_settings("promotion", "evaluate", "score"),
        dataset.key,
        dataset.digest,
        challenger.digest,
        champion and champion.digest,
        None if privacy is None else asdict(privacy),
        RESULTS_SINCE,
    )


def _open_champion(storage: Storage, release: Release, *, is_manual: bool) -> Bundle | None:
    """The champion, to compare with. If it is missing or damaged, only a promotion by hand continues."""
    if release.champion is None:
        return None
    try:
        return release.champion.open(storage)
    except ArtifactError:
        if not is_manual:
            raise
        return None


def _write_decision(
    settings: Settings,
    path: Path,
    key: str,
    dataset: Dataset,
    challenger: Bundle,
    champion: Bundle | None,
    release: Release,
    privacy: criteria.Check | None,
) -> None:
    """Check the criteria and write the decision."""
    storage = Storage(settings.root())
    evaluation_key = evaluate_key(settings, dataset, challenger)
    table = evaluate(settings, evaluation_key, dataset, challenger)
    training_data = storage.dataset(challenger.manifest["dataset"])
    checks, comparison = criteria.check_promotion(
        settings, dataset, challenger, champion, table, storage.evaluation(evaluation_key), training_data
    )
    if privacy is not None:
        checks.append(privacy)
    failures = [check.text for check in checks if not check.passed]
    content = _to_decision(dataset, challenger, release, checks, comparison, "; ".join(failures))
    with immutable_directory(path, KIND, key, {"bundle": challenger.key, "dataset": dataset.key}) as folder:
        (folder / "decision.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _check_privacy(settings: Settings, challenger: Bundle) -> criteria.Check:
    """Whether a bundle was trained privately, its training is in the ledger, no audit refuted it, and the
    population has not spent more than its cap.
    """
    name, options = "privacy", settings.privacy
    if not challenger.privacy["differential_privacy"]:
        return criteria.Check(name, False, f"bundle {challenger.key} was not trained privately")
    try:
        ledger = Ledger.read(settings.ledger_url(), options.population)
    except ArtifactError as error:
        return criteria.Check(name, False, error.message)
    if not ledger.has_committed(challenger.key):
        return criteria.Check(
            name, False, f"the ledger of {options.population} has no training {challenger.key} that committed"
        )
    if refuted := _describe_refutation(settings, challenger):
        return criteria.Check(name, False, refuted)
    spent = epsilon_of(ledger.spent(), options.delta)
    text = f"{options.population} spent ε {spent:.2f} at δ {options.delta:g}" + (
        "" if options.cap is None else f" of {options.cap:g}"
    )
    return criteria.Check(name, options.cap is None or spent <= options.cap, text)


def _describe_refutation(settings: Settings, challenger: Bundle) -> str | None:
    """The audit that refuted trainings with the settings of a bundle, and how; None if none did."""
    for key, audit in load_audits(settings.root(), challenger.manifest["settings_key"]).items():
        if violations := list_violations(audit):
            file = Storage(settings.root()).audit(key)
            return (
                f"audit {key}: {'; '.join(violations)}; publish nothing of it (to audit again, delete {file} "
                "and repeat recray privacy audit)"
            )
    return None


def _to_decision(
    dataset: Dataset,
    challenger: Bundle,
    release: Release,
    checks: list[criteria.Check],
    comparison: criteria.Comparison,
    reason: str,
) -> Decision:
    return {
        "promoted": not reason,
        "reason": reason,
        "challenger": challenger.key,
        "champion": None if release.champion is None else release.champion.run_key,
        "dataset": dataset.key,
        "as_of_s": dataset.as_of_s,
        "checks": [check.to_record() for check in checks],
        "comparison": comparison,
    }


def _reuse_decision(
    storage: Storage, release: Release, dataset: Dataset, champion: Bundle
) -> tuple[str, Decision, bool]:
    """The decision that made this bundle the champion if it was on this dataset, else a decision that changes
    nothing.
    """
    if release.decision:
        path = storage.promotion(release.decision)
        if is_complete(path, KIND, release.decision):
            decision = read_json(path / "decision.json")
            if decision["dataset"] == dataset.key:
                return release.decision, decision, False
    reason = f"bundle {champion.key} is the champion already"
    return "", _to_decision(dataset, champion, release, [], {}, reason), False


def _update_release(
    storage: Storage, challenger: Bundle, key: str, *, promoted: bool, is_manual: bool
) -> bool:
    """Write the release that follows from a decision; False if it was written before."""

    def transform(release: Release) -> Release:
        if not promoted:  # a running experiment continues
            return release if release.has_experiment else replace(release, challenger=Member.of(challenger))
        if release.champion is not None and release.champion.digest == challenger.digest:
            return release  # by an earlier attempt that was killed after this step
        if challenger.key in release.rolled_back and not is_manual:
            return release  # its experiment ended while the criteria were checked
        return Release(
            champion=Member.of(challenger),
            previous=release.champion,
            decision=key,
            rolled_back=tuple(set(release.rolled_back) - {challenger.key}),
        )

    return Release.update(storage, transform)[1]
