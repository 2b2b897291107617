"""The stages from events to published lists, in the order of a night, and the audit of a private training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recray import cluster, lease
from recray.config import Settings
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset, nothing_learned_of
from recray.errors import MissingArtifactError, RefusedError, TrackingError
from recray.prepare import prepare as preparation
from recray.stages.work import AsOf, JobResult, Work, date_of, day_of, deliver, result_of, run_name, sound_policy, tell, under
from recray.storage import Storage, is_sealed, manifest_digest, read_json, write_json

if TYPE_CHECKING:
    from recray.bundle import Bundle
    from recray.tracking.outbox import Entry

PLURALS = {"event": "events", "decision": "decisions", "outcome": "outcomes", "set_aside": "outcomes set aside", "access": "accesses"}


def collect(work: Work) -> JobResult:
    """What the endpoint was told since the last time, as Parquet: events for prepare, decisions and outcomes."""
    from recray.state import collect as collecting
    from recray.state.rewards import Rewards
    from recray.state.store import open_log

    started = time.monotonic()
    options = work.settings.serve
    rewards = Rewards.declared(options)
    log = open_log(options.state, work.storage.root, options.keep_days)
    try:
        path, counts = collecting.collect(work.storage, log)
        collecting.forget(work.storage, log, options.keep_days, _published_through(work.storage, log.identity))
    finally:
        log.close()
    private, split = work.settings.privacy.enabled, work.settings.split.model_dump()
    among = partial(nothing_learned_of, split=split) if private else None
    for folder in sorted(work.storage.collected.glob("[!.]*")):  # also one after which an attempt was killed
        if not (work.storage.outbox / f"{folder.name}.json").exists():
            step = read_json(folder / "manifest.json")["collected_at_s"]
            named = {"run_key": f"endpoint {log.identity}", "run_name": "endpoint", "order": [step, 0]}
            work.outbox.put(folder.name, {**named, "metrics": {"values": collecting.summary(folder, rewards, among), "step": step}})
    deliver(work)
    told = ", ".join(f"{count} {PLURALS[kind]}" for kind, count in counts.items())
    work.say(f"collected: {told or 'nothing new'}", stage="collect")
    outputs = {} if path is None else {"collected": str(path)}
    metrics = {f"collected_{PLURALS[kind].replace(' ', '_')}": count for kind, count in counts.items()}
    return result_of("collect", path is None, "" if path is None else path.name, outputs, metrics, started, work)


def _published_through(storage: Storage, identity: str) -> int:
    """The last number of a log that the published night knows, 0 for none."""
    if not storage.latest.exists():
        return 0
    snapshot = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    found: dict[str, int] = read_json(storage.root / snapshot["dataset"] / "manifest.json").get("collected", {})
    return found.get(identity, 0)


def prepare(work: Work, as_of: AsOf, given: preparation.Input) -> JobResult:
    """Events to dataset."""
    started = time.monotonic()
    key = preparation.prepare_key(work.settings, as_of, given)
    path = work.storage.dataset(key)
    skipped = is_sealed(path, DATASET, key)
    dataset = preparation.prepare(work.settings, as_of, given)
    manifest = dataset.manifest
    metrics = {name: manifest[name] for name in ("users", "items", "events", "rows", "bad_rows")} | preparation.left_out(manifest)
    for note in (*given.notes, *manifest.get("notes", [])):
        work.warn(note)
    what = f"{dataset.n_users} users, {dataset.n_items} items, {dataset.n_events} events, {manifest['bad_rows']} bad rows"
    work.say(f"dataset {key}: {what}{preparation.left_out_words(manifest)}")
    return result_of("prepare", skipped, key, {"dataset": str(path)}, metrics, started, work)


def train(work: Work, dataset: Dataset) -> JobResult:
    """Dataset to bundle."""
    from recray.bundle import KIND, Bundle
    from recray.tracking import runs
    from recray.training import trainer

    started = time.monotonic()
    settings, say = work.settings, work.say
    key = trainer.train_key(settings, dataset)
    path = work.storage.bundle(key)
    skipped = is_sealed(path, KIND, key)
    if not skipped:
        live = _Live(work, key, run_name(dataset.as_of_s))
        cluster.start()
        stops = f"stops {settings.train.patience} epochs after the best"
        if settings.privacy.enabled:
            stops = f"{settings.privacy.steps} steps, no early stop"
        mechanism = trainer.mechanism_for(settings, dataset, key)
        users = f"{dataset.n_users}" if mechanism is None else f"about {mechanism.users}"
        say(f"training on {users} users, {settings.train.workers} worker(s); {stops}")
        if mechanism is not None:
            for words in mechanism.words():
                say(words)
        parent = trainer.parent_of(settings, dataset)
        if parent or settings.train.warm_start:
            say(f"begins with the weights of bundle {parent.key}" if parent else "begins anew: no champion of before to begin with")
        try:
            trainer.train(settings, key, dataset, live)
        except Exception:
            live.failed()
            raise
    bundle = trainer.train(settings, key, dataset) if skipped else Bundle.open(path)
    tags = {runs.RUN_KEY: key, runs.DATASET: bundle.manifest["dataset"], runs.DIGEST: bundle.digest}
    told: Entry = {
        "settings": trainer.bundle_settings(settings),
        "curve": bundle.metrics["curve"],
        "folders": {"bundle": under(work, str(path))},
        "register": tags,
        "finished": True,
    }
    tell(work, key, bundle, 0, bundle.as_of_s, told)
    metrics = {"validation_ndcg": bundle.metrics["best_ndcg"], "epochs": bundle.metrics["epoch"], "best_epoch": bundle.metrics["best_epoch"]}
    say(f"bundle {key}: best epoch {metrics['best_epoch']}, validation ndcg {metrics['validation_ndcg']:.4f}")
    return result_of("train", skipped, key, {"bundle": str(path)}, metrics, started, work)


class _Live:
    """Shows the learning curve as it grows, here and in MLflow; what MLflow misses it gets from the outbox at the end."""

    def __init__(self, work: Work, key: str, name: str) -> None:
        self.work, self.tracking, self.run = work, work.outbox.tracking, ""
        with self._if_there():
            self.run = self.tracking.run(key, name)

    def __call__(self, line: dict[str, float]) -> None:
        k = self.work.settings.evaluate.k[0]
        loss = f"loss {line['loss']:.4f}  " if "loss" in line else f"{line['steps']:.0f} steps  "
        shown = f"{loss}validation ndcg@{k} {line['validation_ndcg']:.4f}  {line['seconds']:.1f} s"
        self.work.say(f"epoch {line['epoch']:.0f}  {shown}", **line)
        with self._if_there():
            if self.run:
                self.tracking.curve(self.run, [line])

    def failed(self) -> None:
        """Say so in MLflow, unless a later attempt has taken the run over."""
        with contextlib.suppress(RefusedError), lease.commit(), self._if_there():
            if self.run:
                self.tracking.finish(self.run, "FAILED")

    @contextlib.contextmanager
    def _if_there(self) -> Iterator[None]:
        try:
            yield
        except TrackingError as error:
            self.run = ""
            self.work.warn(f"{error.what}; what it is to be told is spooled in {self.work.storage.outbox}")


def evaluate(work: Work, dataset: Dataset) -> JobResult:
    """The current bundle and the baselines on the dataset's test users."""
    from recray.evaluation import evaluate as evaluation

    started = time.monotonic()
    settings, bundle = work.settings, current_bundle(work.settings, dataset)
    key = evaluation.evaluate_key(settings, dataset, bundle)
    path = work.storage.evaluation(key)
    skipped = is_sealed(path, evaluation.KIND, key)
    table = evaluation.evaluate(settings, key, dataset, bundle)
    metrics = _headline(table, settings)
    documents = {f"evaluation/{date_of(dataset.as_of_s)}-{key}.json": table}
    values = {"values": metrics, "step": day_of(dataset.as_of_s)}
    tell(work, key, bundle, 1, dataset.as_of_s, {"metrics": values, "documents": documents})
    headline_ndcg = f"ndcg@{settings.evaluate.k[0]}"
    for setting, rows in table.items():
        if "skipped" in rows[evaluation.MODEL]:
            work.say(f"{setting}: skipped, {rows[evaluation.MODEL]['skipped']}")
            continue
        found = rows[evaluation.MODEL]["segments"]
        segments = [(name, found[name]) for name in evaluation.SEGMENTS if found[name]["users"]]
        shown = ", ".join(f"{name} {segment['ndcg']:.4f} ({segment['users']})" for name, segment in segments)
        work.say(f"{setting}: {headline_ndcg} {rows[evaluation.MODEL][headline_ndcg]:.4f}; by segment (users): {shown}")
    return result_of("evaluate", skipped, key, {"evaluation": str(path)}, metrics, started, work)


def promote(work: Work, dataset: Dataset, bundle: Bundle | None = None) -> JobResult:
    """Ask the gate about a bundle (None: the current one). `promoted` and `reason` of the result say what came of it."""
    from recray import promotion
    from recray.release import Release

    started = time.monotonic()
    storage, by_hand = work.storage, bundle is not None
    bundle = bundle or current_bundle(work.settings, dataset)
    deliver(work)
    release = Release.read(storage)
    is_champion = release.champion is not None and release.champion.run_key == bundle.key
    if not is_champion and (waits := _registry_says_no(work, bundle, first=release.champion is None)):
        return _not_promoted(work, waits, started)
    key, decision, changed = promotion.promote(work.settings, dataset, bundle, by_hand=by_hand)
    for check in decision["checks"]:
        work.say(f"{'passed' if check['passed'] else 'FAILED'}  {check['name']}: {check['text']}")
    metrics: dict[str, Any] = {"promoted": int(decision["promoted"])}
    if decision["comparison"]:
        metrics.update(champion_difference=decision["comparison"]["difference"], champion_difference_low=decision["comparison"]["low"])
    if key:
        path = f"promotions/{date_of(dataset.as_of_s)}-{key}.json"
        tell(work, key, bundle, 2, dataset.as_of_s, {"metrics": {"values": metrics, "step": day_of(dataset.as_of_s)}, "documents": {path: decision}})
    elif changed:
        deliver(work)
    work.say(f"bundle {bundle.key} {'is the champion' if decision['promoted'] else 'is not promoted: ' + decision['reason']}")
    outputs = {"release": str(storage.release)} | ({"promotion": str(storage.promotion(key))} if key else {})
    result = result_of("promote", not changed, key, outputs, metrics, started, work)
    result.reason = decision["reason"]
    return result


def _registry_says_no(work: Work, bundle: Bundle, *, first: bool) -> str | None:
    """Why MLflow stands in the way of a promotion, None if it does not. The first champion of a root does not wait for MLflow."""
    try:
        return work.outbox.tracking.foreign(bundle.key, bundle.manifest["dataset"], bundle.digest)
    except TrackingError as error:
        work.warn(f"{error.what}; what it is to be told is spooled in {work.storage.outbox}")
        return None if first else "MLflow cannot be reached: the promotion waits for the next run, the champion stays"


def _not_promoted(work: Work, reason: str, started: float) -> JobResult:
    work.warn(reason)
    result = result_of("promote", False, "", {"release": str(work.storage.release)}, {"promoted": 0}, started, work)
    result.reason = reason
    return result


def score(work: Work, dataset: Dataset) -> JobResult:
    """Every user's list by the champion, published; before the first one, the popular list where `gates.first_run` says so.

    Raises RefusedError if there is no champion, or the night is older than it.
    """
    from recray.inference.rules import leaves_nothing, unmatched
    from recray.promotion import champion_of, keep_private, policy_of
    from recray.release import Release
    from recray.scoring import score as scoring
    from recray.snapshot import writer

    started = time.monotonic()
    storage, settings = work.storage, work.settings
    popular_only = settings.gates.first_run == "fallback" and Release.read(storage).champion is None
    bundle = current_bundle(settings, dataset) if popular_only else champion_of(storage)
    keep_private(settings, bundle)
    if popular_only:
        work.warn("no model was promoted yet: everybody gets the popular list (gates.first_run: fallback)")
    if bundle.as_of_s > dataset.as_of_s:
        raise RefusedError(
            f"champion {bundle.key} knows events up to {date_of(bundle.as_of_s)}, later than this night of {date_of(dataset.as_of_s)}",
            "score a later night, or an older one in a storage.root of its own",
        )
    if leaves_nothing(settings.score.rules(), dataset):
        raise RefusedError("score.exclude leaves no item to recommend", "exclude less")
    for name in unmatched(settings.score.rules(), dataset):
        work.warn(f"a rule of section score is about {name!r}, which no item has")
    policy = policy_of(storage)
    if sound_policy(work, bundle, policy) is None:
        policy = None
    by = scoring.By(bundle, policy, popular_only)
    key = scoring.score_key(settings, dataset, by)
    path = writer.snapshot_path(storage, dataset.as_of_s, key)
    skipped = is_sealed(path, writer.KIND, key)
    if not skipped:
        cluster.start()
    path, manifest, changed = scoring.score(settings, key, dataset, by)
    metrics = {name: manifest[name] for name in ("users", "popular_users", "coverage@10")}
    private = bundle.privacy["differential_privacy"]
    hidden = {"files", "users"} if private else {"files"}  # how many users there are is nobody's business; the rest is of those held out
    document = {name: value for name, value in manifest.items() if name not in hidden}
    document.update(date=date_of(dataset.as_of_s), manifest_sha256=manifest_digest(path))
    quantiles = {f"best_score_q{q}": value for q, value in manifest["best_score_quantiles"].items()}
    values = {f"snapshot_{name}": value for name, value in {**metrics, **quantiles}.items() if name not in hidden}
    told: Entry = {
        "documents": {f"snapshots/{date_of(dataset.as_of_s)}-{key}.json": document},
        "metrics": {"values": values, "step": day_of(dataset.as_of_s)},
    }
    tell(work, key, bundle, 4, dataset.as_of_s, told)
    published = "published" if changed else "was published"
    work.say(f"snapshot {key} by bundle {bundle.key}: {manifest['users']} users, {manifest['popular_users']} with the popular list; {published}")
    outputs = {"snapshot": str(path), "latest": str(storage.latest)}
    return result_of("score", skipped and not changed, key, outputs, metrics, started, work)


def report(work: Work, dataset: Dataset) -> JobResult:
    """A page about the night."""
    from recray.evaluation import report

    started = time.monotonic()
    key, path, skipped = report.write(work.settings, dataset, current_bundle(work.settings, dataset))
    told: Entry = {"folders": {f"reports/{date_of(dataset.as_of_s)}-{key}": under(work, str(path))}}
    tell(work, key, current_bundle(work.settings, dataset), 5, dataset.as_of_s, told)
    work.say(f"report: {path / report.PAGE}")
    return result_of("report", skipped, key, {"report": str(path / report.PAGE)}, {}, started, work)


def audit(work: Work, dataset: Dataset) -> tuple[dict[str, Any], Path]:
    """How much of its ε a private training on the dataset shows, and the file that it is kept in. An MLflow run of its own.

    What an attempt that was stopped had found is kept, and so is a whole audit: delete the file to make it anew.
    """
    from recray.training import audit as auditing
    from recray.training import trainer

    key = auditing.audit_key(work.settings, dataset)
    file = work.storage.audit(key)
    known = read_json(file) if file.exists() else {"runs": {}}
    if "claims" not in known:
        cluster.start()
        known = auditing.audit(work.settings, dataset, work.say, known["runs"], lambda runs: write_json(file, {"runs": runs}))
        write_json(file, known)
    else:
        work.say(f"audit: was made before; delete {file} to make it anew")
    figures = [(f"{name.replace('ε', 'epsilon')} {figure}", value) for name, run in known["runs"].items() for figure, value in run.items()]
    values = {name.replace(" ", "_"): float(value) for name, value in figures}
    told: Entry = {"run_key": key, "run_name": f"audit {date_of(dataset.as_of_s)}", "order": [dataset.as_of_s, 5]}
    told |= {"settings": trainer.bundle_settings(work.settings), "metrics": {"values": values, "step": day_of(dataset.as_of_s)}}
    work.outbox.put(key, {**told, "documents": {f"audit/{key}.json": known}, "finished": True})
    deliver(work)
    return known, file


def _headline(table: dict[str, Any], settings: Settings) -> dict[str, float]:
    """The model's figures at the first k of `evaluate.k`, by setting: `repeats_ndcg@10`, …; none for a skipped setting."""
    from recray.evaluation.evaluate import MODEL

    k = settings.evaluate.k[0]
    names = [f"{metric}@{k}" for metric in ("hr", "ndcg", "mrr", "recall", "coverage", "popularity_share")]
    return {f"{setting}_{name}": rows[MODEL][name] for setting, rows in table.items() for name in names if name in rows[MODEL]}


def current_bundle(settings: Settings, dataset: Dataset) -> Bundle:
    """The challenger: the bundle trained on this dataset, or else the last one trained alike that knows nothing of its test."""
    from recray.bundle import Bundle, latest_bundle, settings_key
    from recray.evaluation.gates import incomparable
    from recray.training import trainer

    storage = Storage(settings.root())
    own = storage.bundle(trainer.train_key(settings, dataset))
    if own.exists():
        return Bundle.open(own)
    found = latest_bundle(storage.root / "bundles", settings_key(trainer.bundle_settings(settings)), dataset.as_of_s)
    if found is None or incomparable(dataset, found):
        raise MissingArtifactError(f"no bundle of these settings in {storage.root / 'bundles'}", "run `recray train` first")
    return found
