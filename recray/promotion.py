"""The promote stage: the gate's decision as a sealed directory, and the flip of RELEASE.json that follows from it.

Knows storage and gates, no MLflow. The same question is decided once: a repeated night finds its decision.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import ArtifactError, RefusedError
from recray.evaluation import gates
from recray.evaluation.evaluate import evaluate, evaluate_key
from recray.evaluation.statement import audits, objections
from recray.release import Member, Release
from recray.storage import Storage, is_sealed, key_of, read_json, sealed_directory
from recray.version import __version__

KIND = "promotion"

Decision = dict[str, Any]
"""promoted, reason, challenger, champion (run keys), dataset, as_of_s, checks, comparison."""


def promote(settings: Settings, dataset: Dataset, challenger: Bundle, *, by_hand: bool = False) -> tuple[str, Decision, bool]:
    """Decide whether the challenger becomes the champion, and make it so.

    Returns the promotion's run key, the decision, and whether RELEASE.json changed. A refusal by the gate is a decision
    with `promoted` false, not an error. `by_hand`: also a bundle that was rolled back may come back.
    """
    storage = Storage(settings.root())
    release = Release.read(storage)
    if release.champion and release.champion.digest == challenger.digest:
        return _again(storage, release, dataset, challenger)
    if challenger.key in release.rolled_back and not by_hand:
        reason = f"bundle {challenger.key} was rolled back; `recray promote {challenger.key}` lets it come back"
        return "", _decision(dataset, challenger, release, [], {}, reason), False
    champion = _champion(storage, release, by_hand=by_hand)
    privacy = None
    if settings.privacy.enabled:
        privacy = _private(settings, challenger)
        if champion is not None and not champion.privacy["differential_privacy"]:
            champion = None  # it may have learned of those who are asked
    key = promote_key(settings, dataset, challenger, champion, privacy)
    path = storage.promotion(key)
    if not is_sealed(path, KIND, key):
        _seal(settings, path, key, dataset, challenger, champion, release, privacy)
    decision = read_json(path / "decision.json")
    return key, decision, _flip(storage, challenger, key, promoted=decision["promoted"], by_hand=by_hand)


def promote_key(settings: Settings, dataset: Dataset, challenger: Bundle, champion: Bundle | None, privacy: gates.Check | None = None) -> str:
    """Run key of promote. `privacy` is what the ledger says today."""
    chosen = settings.result_settings("gates", "evaluate", "score")
    said = None if privacy is None else asdict(privacy)
    return key_of("promote", chosen, dataset.key, dataset.digest, challenger.digest, champion and champion.digest, said, __version__)


def keep_private(settings: Settings, bundle: Bundle) -> None:
    """Raises RefusedError if privacy is on and a bundle was trained without it: what it scores would be published."""
    if settings.privacy.enabled and not bundle.privacy["differential_privacy"]:
        raise RefusedError(
            f"privacy.enabled, but bundle {bundle.key} was trained without privacy; its scores are not published",
            "begin with a storage.root of its own, or promote a private bundle first",
        )


def roll_back(storage: Storage) -> Release:
    """Take the champion's policy away, or, where it has none, give its place back to the one before it. Raises RefusedError if none is known."""

    def how(release: Release) -> Release:
        if release.champion is not None and release.champion.policy is not None:
            gone = tuple(sorted({*release.rolled_back, release.champion.name}))
            plain = replace(release.champion, policy=None)
            return replace(release, champion=plain, challenger=None, share=0.0, shadow=False, rolled_back=gone)
        if release.champion is None or release.previous is None:
            raise RefusedError(
                f"{storage.release} knows no champion before this one", "recray models lists the bundles; recray promote KEY takes one"
            )
        release.previous.open(storage)
        rolled_back = {*release.rolled_back, release.champion.name} - {release.previous.name}
        return Release(champion=release.previous, rolled_back=tuple(sorted(rolled_back)))

    return Release.change(storage, how)[0]


def begin_trial(storage: Storage, challenger: Bundle, share: float, *, shadow: bool = False, policy: str | None = None) -> Release:
    """Let a challenger answer a share of the users, or all of them as a shadow whose answers nobody sees.

    policy : run key of the attention policy that decides for it

    Raises RefusedError where there is no champion, or for the champion itself.
    """

    def how(release: Release) -> Release:
        if release.champion is None:
            raise RefusedError(f"no bundle of {storage.root} was promoted yet", "run `recray promote`, or `recray nightly`")
        member = Member.of(challenger, policy)
        if release.champion.name == member.name:
            raise RefusedError(f"bundle {member.name} is the champion", "recray models lists the others")
        rolled_back = tuple(sorted(set(release.rolled_back) - {member.name}))
        return replace(release.begin(member, 0.0 if shadow else share, shadow=shadow), rolled_back=rolled_back)

    return Release.change(storage, how)[0]


def release_policy(storage: Storage, bundle: Bundle, policy: str, share: float, *, trial_s: float = math.inf) -> tuple[Release, str]:
    """Let a policy that passed its gate decide for the champion: for all users at a share of 1, else on trial.

    trial_s : after so long another policy of the bundle that is on trial, and neither won nor lost, gives way

    Returns what is released, and why that is not the policy, empty if it is. A policy whose trial ended does not come back by itself.
    """
    why = ""

    def how(release: Release) -> Release:
        nonlocal why
        member = Member.of(bundle, policy)
        now, on_trial = release.champion, release.challenger if release.on_trial else None
        if now is None or now.digest != bundle.digest:
            why = f"bundle {bundle.key} is not the champion any more"
        elif member.name in release.rolled_back:
            why = f"policy {policy} was on trial before, and ended: {release.ended or 'rolled back'}"
        elif on_trial is not None and on_trial != member and (on_trial.digest != bundle.digest or time.time() < release.since_s + trial_s):
            why = f"the trial of {on_trial.name} goes on"
        elif now.policy != policy and (on_trial != member or share >= 1):
            if share < 1:
                return release.begin(member, share)
            return replace(release, champion=member, challenger=None, share=0.0, shadow=False, ended=None)
        return release

    return Release.change(storage, how)[0], why


def adopt_policy(storage: Storage, challenger: str, since_s: float) -> Release:
    """The policy on trial decides for all users, where it is still on that trial and its bundle is the champion."""

    def how(release: Release) -> Release:
        now, on_trial = release.champion, release.challenger if release.on_trial else None
        if now is None or on_trial is None or (on_trial.name, release.since_s) != (challenger, since_s) or on_trial.digest != now.digest:
            return release
        return replace(release, champion=on_trial, challenger=None, share=0.0, shadow=False, ended=None)

    return Release.change(storage, how)[0]


def end_trial(storage: Storage, reason: str, challenger: str | None = None) -> Release:
    """The champion answers everybody again, and the challenger does not come back by itself.

    challenger : whose trial; another one's goes on. None: whosever it is. Raises RefusedError where none is on trial
    """

    def how(release: Release) -> Release:
        if release.challenger is None or not release.on_trial or challenger not in (None, release.challenger.name):
            if challenger is not None:
                return release
            raise RefusedError(f"{storage.release} has no challenger on trial", "recray serve canary KEY begins a trial")
        rolled_back = tuple(sorted({*release.rolled_back, release.challenger.name}))
        return replace(release, share=0.0, shadow=False, ended=f"bundle {release.challenger.name}: {reason}", rolled_back=rolled_back)

    return Release.change(storage, how)[0]


def champion_of(storage: Storage) -> Bundle:
    """The champion. Raises RefusedError if there is none yet, MissingArtifactError if its bundle is gone."""
    release = Release.read(storage)
    if release.champion is None:
        raise RefusedError(f"no bundle of {storage.root} was promoted yet", "run `recray promote`, or `recray nightly`")
    return release.champion.open(storage)


def policy_of(storage: Storage) -> str | None:
    """Run key of the policy that decides for the champion."""
    champion = Release.read(storage).champion
    return None if champion is None else champion.policy


def _champion(storage: Storage, release: Release, *, by_hand: bool) -> Bundle | None:
    """The champion to compare with. One that is gone or damaged stops a night, but not a person who promotes another."""
    if release.champion is None:
        return None
    try:
        return release.champion.open(storage)
    except ArtifactError:
        if not by_hand:
            raise
        return None


def _seal(
    settings: Settings,
    path: Path,
    key: str,
    dataset: Dataset,
    challenger: Bundle,
    champion: Bundle | None,
    release: Release,
    privacy: gates.Check | None,
) -> None:
    """Ask the gate and write down what it said."""
    storage = Storage(settings.root())
    evaluated = evaluate_key(settings, dataset, challenger)
    table = evaluate(settings, evaluated, dataset, challenger)
    known = storage.dataset(challenger.manifest["dataset"])
    checks, comparison = gates.decide(settings, dataset, challenger, champion, table, storage.evaluation(evaluated), known)
    if privacy is not None:
        checks.append(privacy)
    refusals = [check.text for check in checks if not check.passed]
    content = _decision(dataset, challenger, release, checks, comparison, "; ".join(refusals))
    with sealed_directory(path, KIND, key, {"bundle": challenger.key, "dataset": dataset.key}) as folder:
        (folder / "decision.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _private(settings: Settings, challenger: Bundle) -> gates.Check:
    """Whether a bundle was trained privately, all its steps are in the ledger, and the population has not spent more than its cap."""
    from recray.privacy.accounting import epsilon_of
    from recray.privacy.ledger import Ledger

    name, options = "privacy", settings.privacy
    if not challenger.privacy["differential_privacy"]:
        return gates.Check(name, False, f"bundle {challenger.key} was not trained privately")
    try:
        ledger = Ledger.read(settings.ledger_url(), options.population)
    except ArtifactError as error:
        return gates.Check(name, False, error.what)
    if not ledger.holds(challenger.key):
        return gates.Check(name, False, f"the ledger of {options.population} has no training {challenger.key} that committed")
    if refuted := _refuted(settings, challenger):
        return gates.Check(name, False, refuted)
    spent = epsilon_of(ledger.spent(), options.delta)
    text = f"{options.population} spent ε {spent:.2f} at δ {options.delta:g}" + ("" if options.cap is None else f" of {options.cap:g}")
    return gates.Check(name, options.cap is None or spent <= options.cap, text)


def _refuted(settings: Settings, challenger: Bundle) -> str | None:
    """Which audit of trainings with the settings of a bundle found that they promise more than they keep; None if none did."""
    for key, audit in audits(settings.root(), challenger.manifest["settings_key"]).items():
        if wrong := objections(audit):
            file = Storage(settings.root()).audit(key)
            return f"audit {key}: {'; '.join(wrong)}; release nothing of it (to look again, delete {file} and repeat recray privacy audit)"
    return None


def _decision(dataset: Dataset, challenger: Bundle, release: Release, checks: list[gates.Check], comparison: dict[str, Any], reason: str) -> Decision:
    return {
        "promoted": not reason,
        "reason": reason,
        "challenger": challenger.key,
        "champion": release.champion and release.champion.run_key,
        "dataset": dataset.key,
        "as_of_s": dataset.as_of_s,
        "checks": [asdict(check) for check in checks],
        "comparison": comparison,
    }


def _again(storage: Storage, release: Release, dataset: Dataset, champion: Bundle) -> tuple[str, Decision, bool]:
    """The decision that made this bundle the champion if it is tonight's, else that there is nothing to decide."""
    if release.decision:
        path = storage.promotion(release.decision)
        if is_sealed(path, KIND, release.decision):
            decision = read_json(path / "decision.json")
            if decision["dataset"] == dataset.key:
                return release.decision, decision, False
    return "", _decision(dataset, champion, release, [], {}, f"bundle {champion.key} is the champion already"), False


def _flip(storage: Storage, challenger: Bundle, key: str, *, promoted: bool, by_hand: bool) -> bool:
    """Write the release that follows from a decision; False if it was written before."""

    def how(now: Release) -> Release:
        if promoted:
            if now.champion is not None and now.champion.digest == challenger.digest:
                return now  # by an attempt that ended here
            if challenger.key in now.rolled_back and not by_hand:
                return now  # its trial ended while the gate was asked
            rolled_back = tuple(set(now.rolled_back) - {challenger.key})
            return Release(champion=Member.of(challenger), previous=now.champion, decision=key, rolled_back=rolled_back)
        return now if now.on_trial else replace(now, challenger=Member.of(challenger))  # a trial goes on

    return Release.change(storage, how)[1]
