"""Jobs that change what serves: promote, rollback, canary, and the next attention policy."""

from __future__ import annotations

from recray.bundle import Bundle
from recray.config import Settings
from recray.errors import RefusedError
from recray.inference.policy import Policy
from recray.pipeline import discard, hold_workspace, open_dataset
from recray.pipeline.follow import run_follow
from recray.release import (
    Member,
    Published,
    Release,
    begin_experiment,
    end_experiment,
    release_policy,
    require_private,
    roll_back,
)
from recray.stages import AsOf, JobResult, ProgressLog, run_stage
from recray.stages.policy import open_published_dataset, require_usable_policy
from recray.stages.train import current_bundle
from recray.storage import Storage


def promote(
    settings: Settings, as_of: AsOf, progress: ProgressLog = discard, *, bundle: str | None = None
) -> JobResult:
    """Check a bundle (its run key; None: the current one) against the promotion criteria, and promote it.

    Raises RefusedError if it does not become the champion.
    """
    if bundle and "+" in bundle:
        return _adopt_policy(settings, bundle, progress)
    with hold_workspace("promote", settings, progress) as context:
        dataset = open_dataset(settings, as_of)
        named = Bundle.open(context.storage.bundle(bundle)) if bundle else None
        challenger = named or current_bundle(context, dataset)
        result = run_stage("promote", context, dataset, named)
        champion = Release.read(context.storage).champion
        if champion is None or champion.run_key != challenger.key:
            raise RefusedError(
                result.reason,
                f"the champion stays; the checks are in {result.outputs.get('promotion', 'the log')}",
            )
        return result


def _adopt_policy(settings: Settings, name: str, progress: ProgressLog) -> JobResult:
    """Let a policy decide for all users of the champion (BUNDLE+POLICY). Raises RefusedError for a policy
    that did not meet its promotion criteria.
    """
    bundle_key, _, key = name.partition("+")
    with hold_workspace("promote", settings, progress) as context:
        bundle = Bundle.open(context.storage.bundle(bundle_key))
        require_private(settings, bundle)
        require_usable_policy(settings, Policy.load(context.storage.policy(key), bundle.digest), key)
        _, reason = release_policy(context.storage, bundle, key, 1.0)
        if reason:
            raise RefusedError(f"policy {key}: {reason}", "recray tune makes another one")
        progress(f"policy {key} decides for everybody; recray score applies it to the batch recommendations")
        return JobResult("promote", "ok", name, {"release": str(context.storage.release)})


def rollback(settings: Settings, as_of: AsOf, progress: ProgressLog = discard) -> JobResult:
    """Make the previous champion the champion again, and score the published run with it."""
    with hold_workspace("rollback", settings, progress) as context:
        storage = context.storage
        release = Release.read(storage)
        has_policy = release.champion is not None and release.champion.policy is not None
        if release.previous is not None and not has_policy:
            require_private(settings, release.previous.open(storage))
        can_go_back = release.previous is not None and not is_policy_withdrawn(storage, release)
        if has_policy or can_go_back or _is_published_by(storage, release.champion):
            release = roll_back(storage)
        # otherwise an earlier attempt rolled back, but ended before it scored
        assert release.champion is not None

        rolled_back = ", ".join(release.rolled_back)
        progress(f"champion is bundle {release.champion.name} again; those rolled back: {rolled_back}")
        context.deliver()
        outputs = {"release": str(storage.release)}
        result = JobResult("rollback", "ok", release.champion.run_key, outputs, warnings=context.warnings)
        if storage.latest.exists():
            scored = run_stage("score", context, open_published_dataset(storage))
            result.outputs.update(scored.outputs)
            result.metrics = scored.metrics
        return result


def _is_published_by(storage: Storage, champion: Member | None) -> bool:
    """Whether the published snapshot is the champion's, or no other could be scored."""
    if champion is None or (published := Published.read(storage)) is None:
        return True
    return (published.bundle_digest, published.policy) == (champion.digest, champion.policy)


def is_policy_withdrawn(storage: Storage, release: Release) -> bool:
    """Whether the published snapshot is of a policy that was withdrawn from the champion: an attempt ended
    before it scored.
    """
    champion = release.champion
    if champion is None or (published := Published.read(storage)) is None or published.policy is None:
        return False
    if published.bundle_digest != champion.digest:
        return False
    return f"{champion.run_key}+{published.policy}" in release.rolled_back


def canary(
    settings: Settings,
    as_of: AsOf,
    progress: ProgressLog = discard,
    *,
    bundle: str,
    share: float,
    shadow: bool = False,
) -> JobResult:
    """Begin an experiment: a bundle (or BUNDLE+POLICY) serves a share of the endpoint's users, or gets shadow
    traffic. It is rolled back automatically if it fails.
    """
    storage = Storage(settings.root())
    bundle_key, _, policy = bundle.partition("+")
    challenger = Bundle.open(storage.bundle(bundle_key))
    require_private(settings, challenger)
    if policy:
        require_usable_policy(settings, Policy.load(storage.policy(policy), challenger.digest), policy)
    begin_experiment(storage, challenger, share, shadow=shadow, policy=policy or None)
    reach = "gets all requests as shadow traffic" if shadow else f"serves {share:.0%} of the users"
    progress(f"bundle {bundle} {reach}; recray serve rollback ends it")
    return JobResult("serve canary", "ok", bundle, {"release": str(storage.release)})


def serve_rollback(settings: Settings, as_of: AsOf, progress: ProgressLog = discard) -> JobResult:
    """End the running experiment; without one, as `rollback`.

    Raises RefusedError if an experiment ended since the last promotion: ending it was probably intended, not
    another champion.
    """
    storage = Storage(settings.root())
    release = Release.read(storage)
    if not release.has_experiment and release.ended:
        raise RefusedError(
            f"no experiment is running, the last one ended: {release.ended}",
            "recray rollback goes back to the previous champion",
        )
    if not release.has_experiment:
        return rollback(settings, as_of, progress)
    release = end_experiment(storage, "ended by hand")
    progress(f"the champion serves everybody; {release.ended}")
    key = "" if release.champion is None else release.champion.run_key
    return JobResult("serve rollback", "ok", key, {"release": str(storage.release)})


def adapt(
    settings: Settings, as_of: AsOf, progress: ProgressLog = discard, *, follow: bool = False
) -> JobResult:
    """Learn the champion's next attention policy from the outcomes of responses that explored.

    follow : repeat, see `recray.pipeline.follow`
    """
    if not follow:
        return _adapt_once(settings, progress)

    enough = settings.policy.round_decisions
    return run_follow(settings, lambda: _adapt_once(settings, progress, enough=enough), progress)


def _adapt_once(settings: Settings, progress: ProgressLog, *, enough: int = 0) -> JobResult:
    with hold_workspace("adapt", settings, progress) as context:
        return run_stage("adapt", context, enough=enough)
