"""The stages that learn an attention policy: `tune` from holdout users, `adapt` from the outcomes of
responses that explored.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from policies import gate, logs
from policies.adapt import adapt as learn_from_logs
from policies.tune import tune as learn_from_users
from recray import cluster
from recray.config import Settings
from recray.config.formats import RESULTS_SINCE
from recray.dataset.reader import Dataset
from recray.errors import ArtifactError, MissingArtifactError, RefusedError
from recray.evaluation.criteria import explain_incomparable
from recray.events.collect import collected_folders
from recray.events.rewards import Rewards
from recray.inference.policy import KIND, Policy, PolicyAbout
from recray.release import Published, Release, load_champion, read_policy_key, release_policy, require_private
from recray.stages.context import (
    JobContext,
    Record,
    StageReport,
    load_usable_policy,
    run_stage,
    to_date,
    to_day,
)
from recray.storage import Storage, is_complete, key_of, lease, read_json
from recray.tracking.outbox import Entry

if TYPE_CHECKING:
    from recray.bundle import Bundle


def tune(context: JobContext, dataset: Dataset) -> StageReport:
    """Learn an attention policy for the champion from holdout users. One that meets its promotion criteria
    goes into an experiment, or live.
    """
    storage, settings = context.storage, context.settings
    bundle = load_champion(storage)
    require_private(settings, bundle)
    live = load_usable_policy(context, bundle, read_policy_key(storage))
    if reason := explain_incomparable(dataset, bundle):
        raise RefusedError(f"bundle {bundle.key} {reason}", "tune on the data of its run")
    sections = settings.key_settings("policy", "evaluate", "privacy", "split", "score")
    request = key_of("tune", sections, dataset.key, dataset.digest, bundle.digest, RESULTS_SINCE)
    if live is not None and live.about.get("asked") == request:  # an earlier attempt of this job made it
        live = load_usable_policy(context, bundle, live.about["against"])

    start = live
    if live is None or live.actions != settings.policy.actions:
        start = _earlier_policy(context, bundle)
    start_key, against = (None if policy is None else policy.about.get("key") for policy in (start, live))
    key = key_of(request, start_key, against)
    path = storage.policy(key)
    is_new = not is_complete(path, KIND, key)
    if is_new:
        cluster.start()
        context.progress(
            f"a policy for bundle {bundle.key}" + (f", starting from {start_key}" if start else "")
        )
        with lease.commit():
            storage.staging.mkdir(parents=True, exist_ok=True)
        checkpoint = storage.staging / f"{key}.safetensors"
        policy, _ = learn_from_users(
            settings,
            dataset,
            bundle,
            start=start,
            live=live,
            checkpoint=checkpoint,
            on_metrics=_make_progress(context),
        )
        policy.about |= {
            "key": key,
            "asked": request,
            "against": against,
            "private": settings.privacy.enabled,
        }
        policy.save(path, key)
        checkpoint.unlink(missing_ok=True)
    return _release(context, key, bundle, dataset.as_of_s, is_new=is_new)


def _make_progress(context: JobContext) -> Any:
    metric = context.settings.policy.metric

    def log_progress(decisions: int, metrics: dict[str, float]) -> None:
        gain = f"{metric} {metrics['reward']:+.4f} compared with the unmodified model"
        context.progress(f"{decisions:,} decisions, {gain}", level="debug", decisions=decisions, **metrics)

    return log_progress


def adapt(context: JobContext, *, enough: int = 0) -> StageReport:
    """Learn the champion's next attention policy from the outcomes of responses that explored; promotion
    criteria apply as in `tune`.

    enough : required number of new mature decisions, in no round before; with fewer, nothing is learned

    Collects first. Raises RefusedError where the data do not suffice.
    """
    storage, options = context.storage, context.settings.policy
    bundle = load_champion(storage)
    require_private(context.settings, bundle)
    deciding, last = read_policy_key(storage), _last_adapted(storage, bundle)
    is_same_start = last is not None and deciding in (last["key"], last["against"])
    if last is not None and time.time() < last["made_s"] + 3600 * options.every_hours:
        context.progress(f"policy {last['key']} is not {options.every_hours:g} hours old")
        if is_same_start:  # an attempt may have ended before the release
            return _release(context, last["key"], bundle, int(last["made_s"]), is_new=False)
        return StageReport(last["key"], {"policy": str(storage.policy(last["key"]))}, is_new=False)

    run_stage("collect", context)
    live = load_usable_policy(context, bundle, deciding)
    now_s, rewards = time.time(), Rewards.declared(context.settings.serve)
    bound = options.bound if live is None else live.bound
    folders, until_s = collected_folders(storage), now_s - options.attribution_window_s
    if enough:
        after_s = 0.0 if last is None else last.get("newest_s", 0.0)
        fresh = logs.count_fresh(folders, options, after_s=after_s, until_s=until_s, bound=bound)
        if fresh < enough:
            return StageReport("" if last is None else last["key"], metrics={"fresh": fresh}, is_new=False)

    mature = logs.read_rounds(folders, options, rewards, until_s=until_s, bound=bound)
    dataset = open_published_dataset(storage)
    sections = context.settings.key_settings("policy", "privacy", "split", "score", "evaluate")
    request = key_of(
        "adapt", sections, dataset.digest, bundle.digest, logs.digest(mature.rounds), RESULTS_SINCE
    )
    key, number = key_of(request, deciding), 1
    if last is not None and is_same_start and last["asked"] == request:
        key = last["key"]
    if last is not None and last["against"] == deciding and "round" in last:
        number = last["round"] + 1
    is_new = not is_complete(storage.policy(key), KIND, key)
    if is_new:
        about: PolicyAbout = {
            "key": key,
            "asked": request,
            "against": deciding,
            "round": number,
            "made_s": now_s,
            "private": context.settings.privacy.enabled,
            "newest_s": mature.newest_s,
        }
        _learn_round(context, mature, dataset, bundle, live, about)
    return _release(context, key, bundle, int(now_s), is_new=is_new)


def _learn_round(
    context: JobContext,
    mature: logs.MatureDecisions,
    dataset: Dataset,
    bundle: Bundle,
    live: Policy | None,
    about: PolicyAbout,
) -> None:
    """Learn the policy of a round, and write it."""
    settings, storage = context.settings, context.storage
    policy_keys = {"", *(path.name for path in storage.policy("").glob("[!.]*"))}
    if settings.policy.learner == "ppo":
        cluster.start()
    level = gate.spend_level(about["round"])
    policy, _, set_aside = learn_from_logs(
        settings, mature.rounds, mature.excluded, dataset, bundle, live, policy_keys, level
    )
    for reason, count in set_aside.items():
        context.warn(f"{count} decisions were set aside: {reason}")
    policy.about |= about
    policy.save(storage.policy(about["key"]), about["key"])


def _last_adapted(storage: Storage, bundle: Bundle) -> PolicyAbout | None:
    """How the last policy was learned that `adapt` made for a bundle, among those that can be read."""
    adapted: list[PolicyAbout] = []
    for path in storage.policy("").glob("[!.]*"):
        with contextlib.suppress(ArtifactError, OSError, KeyError, ValueError):
            about = read_json(path / "policy.json")["about"]
            if "made_s" in about and about["bundle"] == bundle.key:
                adapted.append(about)
    return max(adapted, key=lambda about: float(about["made_s"]), default=None)


def open_published_dataset(storage: Storage) -> Dataset:
    """The dataset of the published run. Raises MissingArtifactError, DamagedArtifactError."""
    published = Published.read(storage)
    if published is None:
        raise MissingArtifactError(f"nothing is published in {storage.root}", "run recray nightly first")
    return Dataset.open(published.dataset, verify=True)


def require_usable_policy(settings: Settings, policy: Policy, key: str) -> None:
    """Raises RefusedError for a policy that did not meet its promotion criteria, or that was learned from
    users with privacy.
    """
    if not policy.about["promoted"]:
        raise RefusedError(f"policy {key}: {policy.about['reason']}", "recray tune makes another one")
    if settings.privacy.enabled and not policy.about.get("private"):
        raise RefusedError(
            f"privacy.enabled, but policy {key} was learned from all users",
            "recray tune with privacy.enabled makes another one",
        )


def _release(context: JobContext, key: str, bundle: Bundle, as_of_s: int, *, is_new: bool) -> StageReport:
    """Report the checks of a policy's promotion criteria, and release it where they passed."""
    storage, options = context.storage, context.settings.policy
    about = Policy.load(storage.policy(key), bundle.digest).about
    for check in about["checks"]:
        context.progress(f"{'passed' if check['passed'] else 'FAILED'}  {check['name']}: {check['text']}")
    before = release = Release.read(storage)
    reason = about["reason"]
    if about["promoted"]:
        release, reason = release_policy(
            storage, bundle, key, options.experiment_share, experiment_s=options.experiment_days * 86_400
        )

    if reason:
        status = f"does not go live: {reason}"
    elif release.champion and release.champion.policy == key:
        status = "decides for everybody"
    else:
        status = f"serves {release.share:.0%} of the users"
    context.progress(f"policy {key} {status}")
    metrics = {**about["figures"], "promoted": int(about["promoted"])}
    entry: Entry = {
        "metrics": {
            "values": {f"policy_{name}": value for name, value in metrics.items()},
            "step": to_day(as_of_s),
        },
        "documents": {f"policies/{to_date(as_of_s)}-{key}.json": about},
    }
    outputs = {"policy": str(storage.policy(key)), "release": str(storage.release)}
    changed = is_new or release != before
    return StageReport(key, outputs, metrics, changed, reason, Record(bundle, as_of_s, entry))


def _earlier_policy(context: JobContext, bundle: Bundle) -> Policy | None:
    """A policy of another bundle with the same controls to start from: the previous champion's, or one of an
    experiment that was not rolled back.
    """
    release, settings = Release.read(context.storage), context.settings
    for member in (release.previous, release.challenger):
        if member is None or member.policy is None or member.digest == bundle.digest:
            continue
        if member.name in release.rolled_back:
            continue
        try:
            policy = Policy.load(context.storage.policy(member.policy), member.digest)
        except ArtifactError as error:
            context.warn(error.message)
            continue
        is_private_enough = policy.about.get("private") or not settings.privacy.enabled
        if policy.actions == settings.policy.actions and is_private_enough:
            return policy
    return None
