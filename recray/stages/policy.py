"""The stages that make an attention policy: `tune` from held-out users, `adapt` from what answers that explored were worth."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from recray import cluster, lease
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import ArtifactError, RefusedError
from recray.stages.night import collect
from recray.stages.work import JobResult, Work, date_of, day_of, result_of, sound_policy, tell
from recray.state.collect import collected_folders
from recray.state.rewards import Rewards
from recray.storage import Storage, is_sealed, key_of, read_json
from recray.version import __version__

if TYPE_CHECKING:
    from recray.bundle import Bundle
    from recray.inference.policy import Policy


def tune(work: Work, dataset: Dataset) -> JobResult:
    """An attention policy for the champion, learned from held-out users; where the gate lets it pass it goes on trial, or live."""
    from policies.tune import tune as learn_policy
    from recray.evaluation.gates import incomparable
    from recray.inference.policy import KIND
    from recray.promotion import champion_of, keep_private, policy_of

    started = time.monotonic()
    storage, settings = work.storage, work.settings
    bundle = champion_of(storage)
    keep_private(settings, bundle)
    private = settings.privacy.enabled
    live = sound_policy(work, bundle, policy_of(storage))
    if why := incomparable(dataset, bundle):
        raise RefusedError(f"bundle {bundle.key} {why}", "tune on the data of its night")
    chosen = settings.result_settings("policy", "evaluate", "privacy", "split", "score")
    asked = key_of("tune", chosen, dataset.key, dataset.digest, bundle.digest, __version__)
    if live is not None and live.about.get("asked") == asked:  # this job made it, before
        live = sound_policy(work, bundle, live.about["against"])
    start = live if live is not None and live.actions == settings.policy.actions else _policy_before(work, bundle)
    before, against = (policy and policy.about.get("key") for policy in (start, live))
    key = key_of(asked, before, against)
    path = storage.policy(key)
    skipped = is_sealed(path, KIND, key)
    if not skipped:
        cluster.start()
        work.say(f"a policy for bundle {bundle.key}" + (f", which begins as {before}" if start else ""))

        def told(decisions: int, metrics: dict[str, float]) -> None:
            gain = f"{settings.policy.metric} {metrics['reward']:+.4f} to the trained model's"
            work.say(f"{decisions:,} decisions, {gain}", level="debug", decisions=decisions, **metrics)

        with lease.commit():
            storage.staging.mkdir(parents=True, exist_ok=True)
        checkpoint = storage.staging / f"{key}.safetensors"
        policy, _ = learn_policy(settings, dataset, bundle, start=start, live=live, checkpoint=checkpoint, on_metrics=told)
        policy.about |= {"key": key, "asked": asked, "against": against, "private": private}
        policy.save(path, key)
        checkpoint.unlink(missing_ok=True)
    return _released(work, "tune", key, bundle, dataset.as_of_s, started, skipped=skipped)


def adapt(work: Work, *, enough: int = 0) -> JobResult:
    """The champion's next attention policy from what answers that explored were worth; the gate decides as for `tune`.

    Collects first. Raises RefusedError where there is too little to learn from.

    enough : decisions that have to be ripe and were in no round before; with fewer nothing is done
    """
    from policies import logs
    from policies.adapt import adapt as learn_policy
    from policies.gate import level_of
    from recray.inference.policy import KIND
    from recray.promotion import champion_of, keep_private, policy_of

    started = time.monotonic()
    storage, settings = work.storage, work.settings
    bundle = champion_of(storage)
    keep_private(settings, bundle)
    private, name, last = settings.privacy.enabled, policy_of(storage), _last_adapted(storage, bundle)
    as_then = last is not None and name in (last["key"], last["against"])
    if last is not None and time.time() < last["made_s"] + 3600 * settings.policy.every_hours:
        work.say(f"policy {last['key']} is not {settings.policy.every_hours:g} hours old")
        if as_then:  # an attempt may have ended before it was released
            return _released(work, "adapt", last["key"], bundle, int(last["made_s"]), started, skipped=True)
        return result_of("adapt", True, last["key"], {"policy": str(storage.policy(last["key"]))}, {}, started, work)
    collect(work)
    live = sound_policy(work, bundle, name)
    options, dataset, now_s = settings.policy, published_dataset(storage), time.time()
    rewards, bound = Rewards.declared(settings.serve), options.bound if live is None else live.bound
    folders, until_s = collected_folders(storage), now_s - options.attribution_window_s
    if enough:
        fresh = logs.count_fresh(folders, options, after_s=last.get("newest_s", 0.0) if last is not None else 0.0, until_s=until_s, bound=bound)
        if fresh < enough:
            return result_of("adapt", True, "" if last is None else last["key"], {}, {"fresh": fresh}, started, work)
    ripe = logs.read(folders, options, rewards, until_s=until_s, bound=bound)
    chosen = settings.result_settings("policy", "privacy", "split", "score", "evaluate")
    asked = key_of("adapt", chosen, dataset.digest, bundle.digest, logs.digest(ripe.rounds), __version__)
    key = key_of(asked, name)
    if last is not None and as_then and last["asked"] == asked:
        key = last["key"]
    number = last["round"] + 1 if last is not None and last["against"] == name and "round" in last else 1
    path = storage.policy(key)
    skipped = is_sealed(path, KIND, key)
    if not skipped:
        known = {"", *(found.name for found in storage.policy("").glob("[!.]*"))}
        if options.learner == "ppo":
            cluster.start()
        policy, _, aside = learn_policy(settings, ripe.rounds, ripe.aside, dataset, bundle, live, known, level_of(number))
        for reason, count in aside.items():
            work.warn(f"{count} decisions were set aside: {reason}")
        policy.about |= {"key": key, "asked": asked, "against": name, "round": number, "made_s": now_s, "private": private}
        policy.about["newest_s"] = ripe.newest_s
        policy.save(path, key)
    return _released(work, "adapt", key, bundle, int(now_s), started, skipped=skipped)


def _last_adapted(storage: Storage, bundle: Bundle) -> dict[str, Any] | None:
    """What is known of the last policy that `adapt` made for a bundle, among those that can be read."""
    made = []
    for path in storage.policy("").glob("[!.]*"):
        with contextlib.suppress(ArtifactError, OSError, KeyError, ValueError):
            about = read_json(path / "policy.json")["about"]
            if "made_s" in about and about["bundle"] == bundle.key:
                made.append(about)
    return max(made, key=lambda about: float(about["made_s"]), default=None)


def published_dataset(storage: Storage) -> Dataset:
    """What the published night was scored from. Raises MissingArtifactError, DamagedArtifactError."""
    published = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    return Dataset.open(storage.root / published["dataset"], verify=True)


def keep_policy(settings: Settings, policy: Policy, key: str) -> None:
    """Raises RefusedError for a policy that its gate refused, or that was learned from users who were promised privacy."""
    if not policy.about["promoted"]:
        raise RefusedError(f"policy {key}: {policy.about['reason']}", "recray tune makes another one")
    if settings.privacy.enabled and not policy.about.get("private"):
        raise RefusedError(f"privacy.enabled, but policy {key} was learned from all users", "recray tune with privacy.enabled makes another one")


def _released(work: Work, job: str, key: str, bundle: Bundle, as_of_s: int, started: float, *, skipped: bool) -> JobResult:
    """Say what the gate said of a policy, let it go where it may, and tell MLflow."""
    from recray.inference.policy import Policy
    from recray.promotion import release_policy
    from recray.release import Release

    storage, settings = work.storage, work.settings
    about = Policy.load(storage.policy(key), bundle.digest).about
    for check in about["checks"]:
        work.say(f"{'passed' if check['passed'] else 'FAILED'}  {check['name']}: {check['text']}")
    reason, before = about["reason"], Release.read(storage)
    release = before
    if about["promoted"]:
        release, reason = release_policy(storage, bundle, key, settings.policy.share, trial_s=settings.policy.trial_days * 86_400)
    live = "decides for everybody" if release.champion and release.champion.policy == key else f"answers {release.share:.0%} of the users"
    work.say(f"policy {key} {'does not go live: ' + reason if reason else live}")
    metrics: dict[str, Any] = {**about["figures"], "promoted": int(about["promoted"])}
    values = {f"policy_{name}": value for name, value in metrics.items()}
    document = {f"policies/{date_of(as_of_s)}-{key}.json": about}
    tell(work, key, bundle, 3, as_of_s, {"metrics": {"values": values, "step": day_of(as_of_s)}, "documents": document})
    outputs = {"policy": str(storage.policy(key)), "release": str(storage.release)}
    result = result_of(job, skipped and release == before, key, outputs, metrics, started, work)
    result.reason = reason
    return result


def _policy_before(work: Work, bundle: Bundle) -> Policy | None:
    """A policy of another bundle that turns the same controls and can be begun with: the champion's before this one, or one on trial that
    did not lose."""
    from recray.inference.policy import Policy
    from recray.release import Release

    release = Release.read(work.storage)
    for member in (release.previous, release.challenger):
        lost = member is not None and member.name in release.rolled_back
        if member is not None and not lost and member.policy is not None and member.digest != bundle.digest:
            try:
                found = Policy.load(work.storage.policy(member.policy), member.digest)
            except ArtifactError as error:
                work.warn(error.what)
                continue
            if found.actions == work.settings.policy.actions and (found.about.get("private") or not work.settings.privacy.enabled):
                return found
    return None
