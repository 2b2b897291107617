"""The jobs that people run: one stage, or a night of them, under the lease of a storage root.

A night is the stages one after the other; repeated, it goes on at the stage that failed. It is refused if a later night
is published, or if an attempt with other settings did not end.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recray import lease, stages
from recray.config import Settings
from recray.dataset.context import CODES
from recray.dataset.features import notes
from recray.dataset.reader import Dataset
from recray.errors import (
    ArtifactError,
    DataError,
    MissingArtifactError,
    PrivacySpentError,
    Problems,
    RecrayError,
    RefusedError,
    SettingsError,
    StateError,
    TrackingError,
    TrainingError,
)
from recray.prepare import prepare as preparation
from recray.prepare.rehearse import rehearse, without_items
from recray.stages import AsOf, JobResult, Say, Work, date_of
from recray.state.store import sqlite_file
from recray.storage import Storage, check_place, key_of, read_json, storage_error, write_json

if TYPE_CHECKING:
    from recray.release import Member, Release
    from recray.state.log import Log
    from recray.terminal import Reporter

RESULT_SECTIONS = ("data", "split", "model", "train", "privacy", "evaluate", "gates", "policy", "score")


def _quiet(message: str, **fields: Any) -> None:
    """Default of `say`: nobody listens."""


def run_validate(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Check settings, files and columns, and prepare a sample of the rows in a folder that is thrown away. Writes nothing else.

    Raises what prepare would raise, all that is wrong at once.
    """
    from recray.serving import guard

    started, problems = time.monotonic(), Problems()
    root = problems.of(settings.root)
    if root is not None:
        problems.of(lambda: check_place(root))
    problems.of(lambda: guard.check(settings.serve))
    inspected = problems.of(lambda: preparation.inspect(settings, as_of))
    if inspected is None:  # what the item table hides
        with contextlib.suppress(RecrayError):
            inspected = preparation.inspect(without_items(settings), as_of)
    if inspected is None:
        problems.raise_all()
        raise AssertionError
    source, items = inspected
    say(f"events: {len(source.files)} files, {source.rows} rows, ordered by {source.clock}; columns {', '.join(source.columns)}")
    say(f"items: {'none' if items is None else f'{len(items)} rows'}; storage.root {root}")
    found = [] if items is None else notes(items, dict(settings.data.features), settings.model.feature_buckets)
    metrics = {"rows": source.rows, "items": 0 if items is None else len(items)}
    with tempfile.TemporaryDirectory(prefix="recray-validate-") as folder:
        chosen = settings if items is not None or settings.data.items is None else without_items(settings)
        rehearsal = rehearse(chosen, as_of, Path(folder), source, items)
        problems.found += rehearsal.problems
        found = [*rehearsal.notes, *found]
        if (dataset := rehearsal.dataset) is not None:
            if rehearsal.as_asked:
                _describe(dataset, rehearsal.where, say)
            metrics |= {name: dataset.manifest[name] for name in ("users", "events", "bad_rows", "duplicates")}
            if rehearsal.where:
                metrics["sample_rows"] = rehearsal.rows
            asked = [*_unknown_actions(settings, dataset.event_types), *_rules(settings, dataset)]
            found += [f"{rehearsal.where}{problem.what}" for problem in asked if rehearsal.where]
            found += _crowded(dataset)
            problems.found += [] if rehearsal.where else asked
    problems.raise_all()
    for note in found:
        say(f"note: {note}", level="warning")
    return JobResult("validate", "ok", metrics=metrics, warnings=found, seconds=round(time.monotonic() - started, 2))


def _rules(settings: Settings, dataset: Dataset) -> Iterator[RecrayError]:
    """Rules of section score about what no item of a dataset is, or that leave none."""
    from recray.inference.rules import leaves_nothing, unmatched

    if not set(settings.data.features) <= set(dataset.items.column_names):
        return
    rules = settings.score.rules()
    for name in unmatched(rules, dataset):
        yield SettingsError(f"score: no item has {name}", "correct the rule, or take it out")
    if leaves_nothing(rules, dataset):
        yield SettingsError("score.exclude leaves no item to recommend", "exclude less")


def _unknown_actions(settings: Settings, event_types: list[str]) -> Iterator[RecrayError]:
    """Actions of section policy about events or features that there are not."""
    known = {"event": event_types, "weight": ["id", *settings.data.features]}
    for action in settings.policy.actions:
        what, _, name = action.partition(".")
        if what in known and name not in known[what]:
            yield SettingsError(f"policy.actions: {action}: there is no {name!r}", f"known: {', '.join(known[what])}")


def _crowded(dataset: Dataset) -> Iterator[str]:
    """Fields of the context of which so many codes are taken that values share them, for a person."""
    for name in dataset.context:
        taken = set().union(*(np.unique(shard.context[name]).tolist() for shard in dataset.shards() if name in shard.context))
        if len(taken) > CODES / 2:
            yield f"context {name}: {len(taken)} of {CODES - 1} codes are taken, so that values share some; group its values"


def _describe(dataset: Dataset, sample: str, say: Say) -> None:
    """What a rehearsal of prepare found, for a person; `sample` says of which rows, where these are not all."""
    manifest = dataset.manifest
    span = f", up to {date_of(dataset.as_of_s)}" if dataset.has_time else ""
    say(f"{sample}{dataset.n_users} users, {dataset.n_items} items, {dataset.n_events} events{span}; types {', '.join(dataset.event_types)}")
    say(f"{sample}{manifest['bad_rows']} bad rows, {manifest['duplicates']} rows that equal another{preparation.left_out_words(manifest)}")
    split = np.concatenate([np.asarray(shard.split) for shard in dataset.shards()])
    learned, asked = int(sum(shard.learned.sum() for shard in dataset.shards())), int((split[:, 3] > split[:, 2]).sum())
    cuts = "".join(f", {name} from {date_of(moment)}" for name, moment in manifest["cuts"].items())
    say(f"{sample}{learned} events to learn from, {asked} users to test with{cuts}")


def run_collect(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """What the endpoint was told, as events of the next night."""
    with _at_work("collect", settings, say) as work:
        return stages.collect(work)


def run_prepare(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Events to dataset."""
    with _at_work("prepare", settings, say) as work:
        return stages.prepare(work, as_of, preparation.find_input(settings))


def run_train(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Dataset to bundle, with its MLflow run."""
    with _at_work("train", settings, say) as work:
        return stages.train(work, _dataset(settings, as_of))


def run_evaluate(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """The current bundle and the baselines on the dataset's test users."""
    with _at_work("evaluate", settings, say) as work:
        return stages.evaluate(work, _dataset(settings, as_of))


def run_promote(settings: Settings, as_of: AsOf, say: Say = _quiet, *, bundle: str | None = None) -> JobResult:
    """Ask the gate whether a bundle (its run key; None: the current one) becomes the champion. Raises RefusedError if it says no."""
    from recray.bundle import Bundle
    from recray.release import Release

    if bundle and "+" in bundle:
        return _adopt(settings, bundle, say)
    with _at_work("promote", settings, say) as work:
        dataset = _dataset(settings, as_of)
        wanted = Bundle.open(work.storage.bundle(bundle)) if bundle else stages.current_bundle(settings, dataset)
        result = stages.promote(work, dataset, wanted if bundle else None)
        champion = Release.read(work.storage).champion
        if champion is None or champion.run_key != wanted.key:
            raise RefusedError(result.reason, f"the champion stays; the checks are in {result.outputs.get('promotion', 'the log')}")
        return result


def _adopt(settings: Settings, named: str, say: Say) -> JobResult:
    """Let a policy decide for the champion (BUNDLE+POLICY), for all users. Raises RefusedError where the gate refused it."""
    from recray.bundle import Bundle
    from recray.inference.policy import Policy
    from recray.promotion import keep_private, release_policy

    name, _, key = named.partition("+")
    with _at_work("promote", settings, say) as work:
        bundle = Bundle.open(work.storage.bundle(name))
        keep_private(settings, bundle)
        stages.keep_policy(settings, Policy.load(work.storage.policy(key), bundle.digest), key)
        _, why = release_policy(work.storage, bundle, key, 1.0)
        if why:
            raise RefusedError(f"policy {key}: {why}", "recray tune makes another one")
        say(f"policy {key} decides for everybody; recray score brings it into the nightly lists")
        return JobResult("promote", "ok", named, {"release": str(work.storage.release)})


def run_rollback(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Make the champion before this one the champion again, and score the published night with it."""
    from recray.promotion import keep_private, roll_back
    from recray.release import Release

    with _at_work("rollback", settings, say) as work:
        storage = work.storage
        release = Release.read(storage)
        if release.previous is not None and (release.champion is None or release.champion.policy is None):
            keep_private(settings, release.previous.open(storage))
        steered = release.champion is not None and release.champion.policy is not None
        if steered or (release.previous is not None and not _policy_gone(storage, release)) or _published_by(storage, release.champion):
            release = roll_back(storage)
        assert release.champion is not None  # else: flipped by an attempt that ended before it had scored
        say(f"champion is bundle {release.champion.name} again; those rolled back: {', '.join(release.rolled_back)}")
        stages.deliver(work)
        result = JobResult("rollback", "ok", release.champion.run_key, {"release": str(storage.release)}, warnings=work.warnings)
        if storage.latest.exists():
            scored = stages.score(work, stages.published_dataset(storage))
            result.outputs.update(scored.outputs)
            result.metrics = scored.metrics
        return result


def run_forget(settings: Settings, as_of: AsOf, say: Say = _quiet, *, user: str) -> JobResult:
    """Forget a user: nothing that lies under the root, or in the endpoint's log, names the user any more, and nothing is kept from now on."""
    from recray import erasure
    from recray.release import bundles

    started = time.monotonic()
    with _at_work("forget", settings, say) as work:
        with _log(settings) as log:
            found = erasure.forget(work.storage, user, log)
        say(f"the user is {'on' if found.new else 'on, as before,'} the opt-out list: no event is kept, and answers are those for nobody")
        say(f"dropped: {found.log} entries of the endpoint's log, {found.rows} rows of collected and bad events")
        for path in found.artifacts:
            say(f"written anew or removed: {path}", level="debug")
        remains = len(list(bundles(work.storage)))
        if remains:
            say(
                f"what remains: the weights of {remains} bundles, and aggregates published before, here and in MLflow; the next training learns "
                "nothing of the user. data.events is yours: the user's rows there are passed by from now on"
            )
        metrics = {"new": found.new, "log_entries": found.log, "rows": found.rows, "bundles_that_remain": remains}
        return JobResult("forget", "ok", metrics=metrics, seconds=round(time.monotonic() - started, 2), warnings=work.warnings)


def run_export(settings: Settings, as_of: AsOf, say: Say = _quiet, *, user: str, out: str | None) -> JobResult:
    """Copy what is kept of a user to a file of JSON lines."""
    from recray import export

    started = time.monotonic()
    file = Path(out or f"recray-export-{time.strftime('%Y%m%dT%H%M%S')}.jsonl")
    with _log(settings) as log:
        counts = export.export(Storage(settings.root()), user, log, file)
    for kind, n in sorted(counts.items()):
        say(f"{kind}: {n}")
    say(f"{counts.total()} records in {file}" if counts else f"nothing is kept of this user; {file} is empty")
    say("data.events is yours, and not in it; weights and aggregates name nobody")
    return JobResult("export", "ok", outputs={"export": str(file)}, metrics=dict(counts), seconds=round(time.monotonic() - started, 2))


@contextlib.contextmanager
def _log(settings: Settings) -> Iterator[Log | None]:
    """The endpoint's log while it is read or written; None where there is none yet."""
    from recray.state.store import open_log

    options, root = settings.serve, settings.root()
    if options.state == "sqlite" and not sqlite_file(root).exists():
        yield None
        return
    with contextlib.closing(open_log(options.state, root, options.keep_days)) as log:
        yield log


def run_canary(settings: Settings, bundle: str, share: float, *, shadow: bool, say: Say = _quiet) -> JobResult:
    """Let a bundle (or BUNDLE+POLICY) answer a share of the endpoint's users, or all as a shadow. It ends by itself where it fails."""
    from recray.bundle import Bundle
    from recray.inference.policy import Policy
    from recray.promotion import begin_trial, keep_private

    storage = Storage(settings.root())
    name, _, policy = bundle.partition("+")
    challenger = Bundle.open(storage.bundle(name))
    keep_private(settings, challenger)
    if policy:
        stages.keep_policy(settings, Policy.load(storage.policy(policy), challenger.digest), policy)
    begin_trial(storage, challenger, share, shadow=shadow, policy=policy or None)
    say(f"bundle {bundle} {'answers all, unseen' if shadow else f'answers {share:.0%} of the users'}; recray serve rollback ends it")
    return JobResult("serve canary", "ok", bundle, {"release": str(storage.release)})


def run_serve_rollback(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """End the trial of a challenger; without one, as `run_rollback`.

    Raises RefusedError where a trial ended since the last promotion: whoever wants to end that one does not want another champion.
    """
    from recray.promotion import end_trial
    from recray.release import Release

    storage = Storage(settings.root())
    now = Release.read(storage)
    if not now.on_trial and now.ended:
        raise RefusedError(f"no challenger is on trial, the last one's ended: {now.ended}", "recray rollback takes the champion back")
    if not now.on_trial:
        return run_rollback(settings, as_of, say)
    release = end_trial(storage, "ended by hand")
    say(f"the champion answers everybody; {release.ended}")
    return JobResult("serve rollback", "ok", "" if release.champion is None else release.champion.run_key, {"release": str(storage.release)})


def run_tune(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """An attention policy for the champion; the gate decides whether it goes on trial, or live."""
    with _at_work("tune", settings, say) as work:
        return stages.tune(work, _dataset(settings, as_of))


def run_adapt(settings: Settings, as_of: AsOf, say: Say = _quiet, *, follow: bool = False) -> JobResult:
    """The champion's next attention policy, from what answers that explored were worth; `follow`: one after the other, see `recray.follow`."""
    if follow:
        from recray.follow import run_follow

        return run_follow(settings, lambda: run_adapt_once(settings, say, enough=settings.policy.round_decisions), say)
    return run_adapt_once(settings, say)


def run_adapt_once(settings: Settings, say: Say, *, enough: int = 0) -> JobResult:
    """One round. Raises as `recray.stages.adapt`."""
    with _at_work("adapt", settings, say) as work:
        return stages.adapt(work, enough=enough)


def run_score(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """Every user's list by the champion, published."""
    with _at_work("score", settings, say) as work:
        return stages.score(work, _dataset(settings, as_of))


def run_report(settings: Settings, as_of: AsOf, say: Say = _quiet) -> JobResult:
    """A page about the night: what was promoted and why, the figures, the plots."""
    with _at_work("report", settings, say) as work:
        return stages.report(work, _dataset(settings, as_of))


def run_nightly(settings: Settings, as_of: AsOf, say: Say = _quiet, *, restart: bool = False) -> JobResult:
    """A night: prepare, train (when `train.every_days` have passed), evaluate, promote, score, report.

    A night that was begun with other settings and did not end is refused, unless `restart`.
    """
    started = time.monotonic()
    with _at_work("nightly", settings, say) as work:
        given = preparation.find_input(settings)
        journal = work.storage.night(key_of("night", as_of, given.digests))
        if not journal.exists() or read_json(journal)["ended"]:  # a night that was begun goes on with the data that it began with
            _collect(work)
            given = preparation.find_input(settings)
            journal = work.storage.night(key_of("night", as_of, given.digests))
        _begin(journal, settings, as_of, restart=restart)
        with _ending(journal):
            results = _stages(work, as_of, given)
            refused = _publishes_nothing(work)
    outputs = {name: path for result in results for name, path in result.outputs.items()}
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    reasons = [result.reason for result in results if result.reason]
    skipped = all(result.status == "skipped" for result in results)
    done = stages.result_of("nightly", skipped, results[-2].run_key, outputs, metrics, started, work)
    done.reason = "; ".join(reasons)
    if refused:
        done.status = "refused"
        fix = "nothing was published; train longer or otherwise (sections train, model), or ask less of a first model (gates.must_beat), "
        fix += "then repeat; gates.first_run=fallback publishes the popular list until one passes"
        done.reason = f"{done.reason}; fix: {fix}; the report shows what it was compared with: {outputs['report']}"
    return done


def _collect(work: Work) -> None:
    """Collect where there is an endpoint's log. One that is away costs the night its last events, not the night."""
    if work.settings.serve.state == "sqlite" and not sqlite_file(work.storage.root).exists():
        return
    work.say("── collect", stage="collect")
    try:
        stages.collect(work)
    except StateError as error:
        work.warn(f"what users did since the last night is not in this one: {error.what}")


def _stages(work: Work, as_of: AsOf, given: preparation.Input) -> list[JobResult]:
    """The stages of a night, one after the other; what needs a champion is left out where there is none."""
    settings, say = work.settings, work.say
    say("── prepare", stage="prepare")
    results = [stages.prepare(work, as_of, given)]
    dataset = Dataset.open(results[0].outputs["dataset"], verify=True)
    _in_order(work.storage, dataset)
    tune = (stages.tune,) if settings.policy.enabled else ()
    for stage in (stages.train, stages.evaluate, stages.promote, *tune, stages.score, stages.report):
        say(f"── {stage.__name__}", stage=stage.__name__)
        if stage is stages.train and not _train_is_due(settings, dataset):
            say("the last bundle is younger than train.every_days")
            continue
        try:
            results.append(stage(work, dataset))
        except PrivacySpentError as error:
            if not _has_champion(work.storage):
                raise
            work.warn(f"{error.what}; the champion scores the night")
            continue
        except Exception as error:  # whatever it is, a night does not need a policy
            if stage is not stages.tune:
                raise
            work.warn(f"no policy tonight: {error.what if isinstance(error, RecrayError) else f'unexpected {type(error).__name__}: {error}'}")
            continue
        if stage is stages.promote and _publishes_nothing(work):
            say("── report", stage="report")
            return [*results, stages.report(work, dataset)]
    return results


@contextlib.contextmanager
def _ending(journal: Path) -> Iterator[None]:
    """Note that a night ended: well, or with words that ask for other data or settings. What was cut off stays open."""
    try:
        yield
    except (DataError, RefusedError, TrainingError):
        _close(journal)
        raise
    _close(journal)


def _close(journal: Path) -> None:
    content = read_json(journal)
    if not content["ended"]:
        with lease.commit(), contextlib.suppress(OSError):
            write_json(journal, {**content, "ended": True})


@contextlib.contextmanager
def _at_work(job: str, settings: Settings, say: Say) -> Iterator[Work]:
    """One job at a time in a root. Raises RefusedError, or StorageError if the root cannot be written to."""
    root = settings.root()
    with lease.hold(root, job, settings.storage.lease_s) as held:
        say(f"{job} in {root}, attempt {held.attempt}", level="debug", attempt=held.attempt)
        try:
            yield Work(settings, Storage(root), say)
        except Exception as error:
            held.check()  # what befell an attempt that was fenced off is of no interest
            found = None if isinstance(error, RecrayError) else storage_error(error, root)
            if found is None:
                raise
            raise found from error


def run_models(settings: Settings, reporter: Reporter) -> JobResult:
    """The bundles of the root, oldest first, with their roles and their versions in MLflow."""
    from rich.table import Table

    from recray.bundle import Bundle
    from recray.release import Release, bundles

    started = time.monotonic()
    work = Work(settings, Storage(settings.root()), reporter.say)
    release = Release.read(work.storage)
    table = Table("bundle", "as of", "validation NDCG", "roles", "MLflow version", title=f"{work.storage.root}", title_justify="left")
    found = []
    opened = []
    for path in bundles(work.storage):
        try:
            opened.append(Bundle.open(path))
        except ArtifactError as error:
            work.warn(error.what)
    for bundle in sorted(opened, key=lambda bundle: (bundle.as_of_s, bundle.key)):
        ndcg = bundle.metrics.get("best_ndcg")
        roles = release.roles_of(bundle.key)
        version = _version(work, bundle.key)
        found.append({"bundle": bundle.key, "as_of": date_of(bundle.as_of_s), "validation_ndcg": ndcg, "roles": roles, "version": version})
        table.add_row(bundle.key, date_of(bundle.as_of_s), "–" if ndcg is None else f"{ndcg:.4f}", ", ".join(roles) or "–", version or "–")
    reporter.show(table)
    return JobResult("models", "ok", metrics={"models": found}, seconds=round(time.monotonic() - started, 2), warnings=work.warnings)


def run_privacy(settings: Settings, what: str, as_of: AsOf, reporter: Reporter, *, days: int = 30, training: str | None = None) -> JobResult:
    """`status`: what the population has spent, training by training. `plan`: what cadences and shards of users would spend.
    `close`: end a training that will not go on. `audit`: how much of its ε a training shows."""
    from recray.privacy import tables
    from recray.privacy.ledger import Ledger

    started = time.monotonic()
    outputs, warnings = {}, []
    if what == "close":
        if training is None:
            raise SettingsError("recray privacy close: which training?", "--training KEY, as recray privacy status names it")
        with _at_work("privacy close", settings, reporter.say):  # so no training of this root is at work
            Ledger.read(settings.ledger_url(), settings.privacy.population).commit(training)
    if what == "audit":
        with _at_work("audit", settings, reporter.say) as work:
            found, file = stages.audit(work, _dataset(settings, as_of))
        outputs["audit"], warnings = str(file), work.warnings
        table, metrics = tables.audit(found)
    else:
        table, metrics = tables.plan(settings, days) if what == "plan" else tables.status(settings)
    reporter.show(table)
    done = JobResult("privacy", "ok", outputs=outputs, metrics=metrics, seconds=round(time.monotonic() - started, 2), warnings=warnings)
    if what == "audit":
        _judge(done, metrics)
    return done


def _judge(done: JobResult, metrics: dict[str, Any]) -> None:
    """What an audit's claims and checks make of its job: failed where one is refuted or failed, or where the control was not caught."""
    wrong = [f"{check['name']} (training {check['training']}): {check['text']}" for check in metrics["checks"] if not check["passed"]]
    for claim in metrics["claims"]:
        named = f"ε {claim['claim']:.3g}"
        if claim["verdict"] == "refuted":
            wrong.insert(0, f"{named} is refuted")
        elif claim["verdict"] == "cannot tell":
            done.warnings.append(f"{named}: {metrics['canaries']} canaries cannot tell; raise privacy.audit_canaries or lower privacy.delta")
        elif not claim["control_caught"]:
            wrong.append(f"{named} was not refuted without noise either, so the audit says nothing of it; raise privacy.steps")
    if wrong:
        done.status, done.reason = "failed", f"{'; '.join(wrong)}; release nothing of this training"


def _version(work: Work, key: str) -> str | None:
    if any("MLflow" in warning for warning in work.warnings):
        return None  # MLflow did not answer before
    try:
        found = work.outbox.tracking.version(key)
    except TrackingError as error:
        work.warn(error.what)
        return None
    return None if found is None else str(found.version)


def _begin(journal: Path, settings: Settings, as_of: AsOf, *, restart: bool) -> None:
    """Note with which settings a night is begun. Raises RefusedError if it was begun with others and did not end."""
    now = settings.result_settings(*RESULT_SECTIONS)
    before = read_json(journal) if journal.exists() else None
    if before is not None and before["settings"] == now:
        return
    if before is not None and not before["ended"] and not restart:
        old = before["settings"]
        pairs = [(f"{s}.{f}", old.get(s, {}).get(f), value) for s, fields in now.items() for f, value in fields.items()]
        changed = [f"{name} {was!r} → {value!r}" for name, was, value in pairs if was != value]
        raise RefusedError(
            f"this night (as of {as_of or 'all there is'}) was begun with other settings and did not end: {', '.join(changed)}",
            "repeat it with the settings it was begun with, or begin anew with these: --restart",
        )
    write_json(journal, {"as_of": as_of and as_of.isoformat(), "settings": now, "ended": False})


def _in_order(storage: Storage, dataset: Dataset) -> None:
    """Raises RefusedError if a later night was published: the as-of, or the clock it was taken from, went back."""
    if not storage.latest.exists():
        return
    published = read_json(storage.latest)
    if published["as_of_s"] > dataset.as_of_s:
        raise RefusedError(
            f"the night of {date_of(published['as_of_s'])} is published; this one ends before, on {date_of(dataset.as_of_s)}: was a clock set back?",
            f"choose a later --as-of; to publish the older night on purpose, remove {storage.latest}, or use another storage.root",
        )


def _published_by(storage: Storage, champion: Member | None) -> bool:
    """Whether the published snapshot is the champion's (or there is nothing that could be scored instead)."""
    if champion is None or not storage.latest.exists():
        return True
    published = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    return bool(published["bundle_digest"] == champion.digest and published.get("policy") == champion.policy)


def _policy_gone(storage: Storage, release: Release) -> bool:
    """Whether the published snapshot is of a policy that was taken from the champion: an attempt ended before it had scored."""
    champion = release.champion
    if champion is None or not storage.latest.exists():
        return False
    published = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    policy = published.get("policy")
    return bool(policy is not None and published["bundle_digest"] == champion.digest and f"{champion.run_key}+{policy}" in release.rolled_back)


def _publishes_nothing(work: Work) -> bool:
    """Whether a night ends without lists: the gate never let a bundle pass, and the settings want nothing else meanwhile."""
    return work.settings.gates.first_run == "refuse" and not _has_champion(work.storage)


def _has_champion(storage: Storage) -> bool:
    from recray.release import Release

    return Release.read(storage).champion is not None


def _dataset(settings: Settings, as_of: AsOf) -> Dataset:
    key = preparation.prepare_key(settings, as_of)
    try:
        return Dataset.open(Storage(settings.root()).dataset(key), verify=True)
    except MissingArtifactError as error:
        raise MissingArtifactError(error.what, "run `recray prepare` with the same settings first, or `recray nightly`") from None


def _train_is_due(settings: Settings, dataset: Dataset) -> bool:
    from recray.bundle import latest_bundle, settings_key
    from recray.evaluation.gates import incomparable
    from recray.training import trainer

    storage = Storage(settings.root())
    last = latest_bundle(storage.root / "bundles", settings_key(trainer.bundle_settings(settings)), dataset.as_of_s)
    if last is None or incomparable(dataset, last) or storage.bundle(trainer.train_key(settings, dataset)).exists():
        return True
    age = stages.day_of(dataset.as_of_s) - stages.day_of(last.as_of_s)
    return not 0 < age < settings.train.every_days
