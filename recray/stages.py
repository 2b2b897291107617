"""The stages of a night: what each reads, which key names its result, when it is skipped, and what it tells MLflow.

A stage is safe to repeat: its run key names its output, and an output that is there is not made again. MLflow is told
through an outbox, so that no stage needs it.

What needs torch or MLflow is imported by the stage that uses it: the driver of prepare stays small.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from recray import __version__, cluster, lease
from recray.config import Settings
from recray.dataset.reader import KIND as DATASET
from recray.dataset.reader import Dataset
from recray.errors import ArtifactError, MissingArtifactError, RefusedError, TrackingError
from recray.prepare import prepare as preparation
from recray.storage import Storage, is_sealed, key_of, manifest_digest, read_json, write_json

if TYPE_CHECKING:
    from recray.bundle import Bundle
    from recray.inference.policy import Policy
    from recray.tracking.outbox import Entry, Outbox

AsOf = dt.datetime | None


class Say(Protocol):
    """Takes what a person or a log is told; `fields` (stage, level) are for the log."""

    def __call__(self, message: str, **fields: Any) -> None: ...


@dataclass
class JobResult:
    """How a job ended. `status`: ok | skipped | refused | failed; `seconds` of wall time.

    `reason` says why a gate refused or an error ended the job; `warnings` name what a person should look at although
    the job ended well.
    """

    job: str
    status: str
    run_key: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return {"ok": 0, "skipped": 0, "refused": RefusedError.exit_code}.get(self.status, 1)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass
class Work:
    """What the stages of one job share."""

    settings: Settings
    storage: Storage
    say: Say
    warnings: list[str] = field(default_factory=list)
    _outbox: Outbox | None = None

    @property
    def outbox(self) -> Outbox:
        if self._outbox is None:
            from recray.tracking.outbox import Outbox
            from recray.tracking.runs import Tracking

            self._outbox = Outbox(self.storage, Tracking(self.settings.tracking, self.storage))
        return self._outbox

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            self.say(f"warning: {text}", level="warning")


def collect(work: Work) -> JobResult:
    """What the endpoint was told since the last time, as Parquet: events for prepare, decisions and outcomes."""
    from recray.state import collect as collecting
    from recray.state.log import open_log

    started = time.monotonic()
    options = work.settings.serve
    log = open_log(options.state, work.storage.root, options.keep_days)
    try:
        path, counts = collecting.collect(work.storage, log)
        collecting.forget(work.storage, log, options.keep_days, _published_through(work.storage, log.identity))
    finally:
        log.close()
    for folder in sorted(work.storage.collected.glob("[!.]*")):  # also one after which an attempt was killed
        if not (work.storage.outbox / f"{folder.name}.json").exists():
            step = read_json(folder / "manifest.json")["collected_at_s"]
            named = {"run_key": f"endpoint {log.identity}", "run_name": "endpoint", "order": [step, 0]}
            work.outbox.put(folder.name, {**named, "metrics": {"values": collecting.summary(folder), "step": step}})
    deliver(work)
    told = ", ".join(f"{count} {kind}s" if kind != "set_aside" else f"{count} outcomes set aside" for kind, count in counts.items())
    work.say(f"collected: {told or 'nothing new'}", stage="collect")
    outputs = {} if path is None else {"collected": str(path)}
    metrics = {f"collected_{kind}s": count for kind, count in counts.items()}
    return result_of("collect", path is None, "" if path is None else path.name, outputs, metrics, started, work)


def _published_through(storage: Storage, identity: str) -> int:
    """The last number of a log that the published night knows, 0 for none."""
    if not storage.latest.exists():
        return 0
    snapshot = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    found: dict[str, int] = read_json(storage.root / snapshot["dataset"] / "manifest.json").get("collected", {})
    return found.get(identity, 0)


def prepare(work: Work, as_of: AsOf, key: str) -> JobResult:
    """Events to the dataset `key`."""
    started = time.monotonic()
    path = work.storage.dataset(key)
    skipped = is_sealed(path, DATASET, key)
    dataset = preparation.prepare(work.settings, key, as_of)
    manifest = dataset.manifest
    metrics = {name: manifest[name] for name in ("users", "items", "events", "rows", "bad_rows")}
    work.say(f"dataset {key}: {dataset.n_users} users, {dataset.n_items} items, {dataset.n_events} events, {manifest['bad_rows']} bad rows")
    return result_of("prepare", skipped, key, {"dataset": str(path)}, metrics, started)


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
        live = _Live(work, key, _run_name(dataset.as_of_s))
        cluster.start()
        stops = f"stops {settings.train.patience} epochs after the best"
        if settings.privacy.enabled:
            stops = f"{settings.privacy.steps} steps, no early stop"
        mechanism = trainer.mechanism_for(settings, dataset, key)
        users = dataset.n_users if mechanism is None else mechanism.users
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
        "folders": {"bundle": _under(work, str(path))},
        "register": tags,
        "finished": True,
    }
    _tell(work, key, bundle, 0, bundle.as_of_s, told)
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
    metrics = headline(table, settings)
    documents = {f"evaluation/{date_of(dataset.as_of_s)}-{key}.json": table}
    values = {"values": metrics, "step": day_of(dataset.as_of_s)}
    _tell(work, key, bundle, 1, dataset.as_of_s, {"metrics": values, "documents": documents})
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
        _tell(work, key, bundle, 2, dataset.as_of_s, {"metrics": {"values": metrics, "step": day_of(dataset.as_of_s)}, "documents": {path: decision}})
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


def adapt(work: Work) -> JobResult:
    """The champion's next attention policy from what answers that explored were worth; the gate decides as for `tune`.

    Collects first. Raises RefusedError where there is too little to learn from.
    """
    from policies.adapt import adapt as learn_policy
    from policies.logs import matured
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
    told = [folder for folder in storage.collected.glob("[!.]*") if any((folder / f"{kind}.parquet").exists() for kind in ("decisions", "outcomes"))]
    folders = sorted(told, key=lambda folder: read_json(folder / "manifest.json")["collected_at_s"])
    folders, dataset, now_s = folders[-settings.policy.rounds :], published_dataset(storage), time.time()
    chosen = settings.result_settings("policy", "privacy", "split", "score", "evaluate")
    ripe = matured(folders, now_s - settings.policy.wait_s)
    asked = key_of("adapt", chosen, dataset.digest, bundle.digest, [folder.name for folder in folders], ripe, __version__)
    key = key_of(asked, name)
    if last is not None and as_then and last["asked"] == asked:
        key = last["key"]
    path = storage.policy(key)
    skipped = is_sealed(path, KIND, key)
    if not skipped:
        known = {"", *(found.name for found in storage.policy("").glob("[!.]*"))}
        if settings.policy.learner == "ppo":
            cluster.start()
        policy, _, aside = learn_policy(settings, folders, dataset, bundle, live, known, now_s)
        for reason, count in aside.items():
            work.warn(f"{count} decisions were set aside: {reason}")
        policy.about |= {"key": key, "asked": asked, "against": name, "made_s": now_s, "private": private}
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


def sound_policy(work: Work, bundle: Bundle, name: str | None) -> Policy | None:
    """The policy of that run key; a warning and None for one that does not decide, see `Policy.sound`."""
    from recray.inference.policy import Policy

    if name is None:
        return None
    settings = work.settings
    found, why = Policy.sound(work.storage.policy(name), bundle.digest, private=settings.privacy.enabled, bound=settings.policy.bound)
    if why:
        work.warn(f"policy {name} does not decide, the trained model does as it is: {why}")
    return found


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
    _tell(work, key, bundle, 3, as_of_s, {"metrics": {"values": values, "step": day_of(as_of_s)}, "documents": document})
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


def score(work: Work, dataset: Dataset) -> JobResult:
    """Every user's list by the champion, published. Raises RefusedError if there is no champion, or the night is older than it."""
    from recray.inference import unmatched
    from recray.promotion import champion_of, keep_private, policy_of
    from recray.scoring import score as scoring
    from recray.snapshot import writer

    started = time.monotonic()
    storage, settings = work.storage, work.settings
    bundle = champion_of(storage)
    keep_private(settings, bundle)
    if bundle.as_of_s > dataset.as_of_s:
        raise RefusedError(
            f"champion {bundle.key} knows events up to {date_of(bundle.as_of_s)}, later than this night of {date_of(dataset.as_of_s)}",
            "score a later night, or an older one in a storage.root of its own",
        )
    for name in unmatched(settings.score.rules(), dataset):
        work.warn(f"a rule of section score is about {name!r}, which no item has")
    if settings.privacy.enabled and settings.privacy.counts_share and not bundle.manifest["shape"].get("counts"):
        work.warn(f"champion {bundle.key} has no item counts of its own: the popular list is of the exact ones, until the next training")
    policy = policy_of(storage)
    if sound_policy(work, bundle, policy) is None:
        policy = None
    key = scoring.score_key(settings, dataset, bundle, policy)
    path = writer.snapshot_path(storage, dataset.as_of_s, key)
    skipped = is_sealed(path, writer.KIND, key)
    if not skipped:
        cluster.start()
    path, manifest, changed = scoring.score(settings, key, dataset, bundle, policy)
    metrics = {name: manifest[name] for name in ("users", "popular_users", "coverage@10")}
    document = {name: value for name, value in manifest.items() if name != "files"}
    document.update(date=date_of(dataset.as_of_s), manifest_sha256=manifest_digest(path))
    quantiles = {f"best_score_q{q}": value for q, value in manifest["best_score_quantiles"].items()}
    values = {f"snapshot_{name}": value for name, value in {**metrics, **quantiles}.items()}
    told: Entry = {
        "documents": {f"snapshots/{date_of(dataset.as_of_s)}-{key}.json": document},
        "metrics": {"values": values, "step": day_of(dataset.as_of_s)},
    }
    _tell(work, key, bundle, 4, dataset.as_of_s, told)
    published = "published" if changed else "was published"
    work.say(f"snapshot {key} by bundle {bundle.key}: {manifest['users']} users, {manifest['popular_users']} with the popular list; {published}")
    outputs = {"snapshot": str(path), "latest": str(storage.latest)}
    return result_of("score", skipped and not changed, key, outputs, metrics, started, work)


def report(work: Work, dataset: Dataset) -> JobResult:
    """A page about the night."""
    from recray.evaluation import report

    started = time.monotonic()
    key, path, skipped = report.write(work.settings, dataset, current_bundle(work.settings, dataset))
    told: Entry = {"folders": {f"reports/{date_of(dataset.as_of_s)}-{key}": _under(work, str(path))}}
    _tell(work, key, current_bundle(work.settings, dataset), 5, dataset.as_of_s, told)
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


def headline(table: dict[str, Any], settings: Settings) -> dict[str, float]:
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


def _tell(work: Work, key: str, bundle: Bundle, stage: int, as_of_s: int, entry: Entry) -> None:
    """Spool what the job `key` has to tell of a bundle's run, and try to deliver it."""
    named = {"run_key": bundle.key, "run_name": _run_name(bundle.as_of_s), "order": [as_of_s, stage]}
    work.outbox.put(key, {**named, **entry})
    deliver(work)


def deliver(work: Work) -> None:
    """Tell MLflow what is pending; if it cannot be told, a warning."""
    try:
        work.outbox.deliver()
    except TrackingError as error:
        work.warn(f"{error.what}; what it is to be told is spooled in {work.storage.outbox}")


def _under(work: Work, path: str) -> str:
    """A path relative to the root."""
    return path.removeprefix(f"{work.storage.root}/")


def _run_name(as_of_s: int) -> str:
    return f"train {date_of(as_of_s)}"


def result_of(
    job: str, skipped: bool, key: str, outputs: dict[str, str], metrics: dict[str, Any], started: float, work: Work | None = None
) -> JobResult:
    """The result of a stage or a job that began at `started` (time.monotonic)."""
    status, seconds = "skipped" if skipped else "ok", round(time.monotonic() - started, 2)
    return JobResult(job, status, key, outputs, metrics, seconds, warnings=work.warnings if work else [])


def day_of(as_of_s: int) -> int:
    """Days since 1970: the step of a night's metrics."""
    return as_of_s // 86_400


def date_of(as_of_s: int) -> str:
    """The UTC date of a moment."""
    return str(dt.datetime.fromtimestamp(as_of_s, dt.UTC).date())
