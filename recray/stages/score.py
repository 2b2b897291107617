"""The stage that writes and publishes the batch recommendations."""

from __future__ import annotations

from recray import cluster
from recray.dataset.reader import Dataset
from recray.errors import RefusedError
from recray.inference.filters import SeenRule
from recray.inference.rules import find_unmatched, is_everything_excluded
from recray.release import Release, load_champion, read_policy_key, require_private
from recray.snapshot import score as scoring
from recray.snapshot import writer
from recray.stages.context import JobContext, Record, StageReport, load_usable_policy, to_date, to_day
from recray.stages.train import current_bundle
from recray.storage import is_complete, manifest_digest
from recray.tracking.outbox import Entry


def score(context: JobContext, dataset: Dataset) -> StageReport:
    """Score every user with the champion, and publish the lists. Before the first champion, publish the
    popularity fallback if `promotion.first_run` is fallback.

    Raises RefusedError if there is no champion, or if the dataset is older than it.
    """
    storage, settings = context.storage, context.settings
    model = _select_model(context, dataset)
    bundle = model.bundle
    _check_rules(context, dataset)
    if settings.score.cold_item_share and not bundle.metrics.get("cold_gaps"):
        context.warn(
            f"score.cold_item_share does nothing: bundle {bundle.key} was trained without cold items that "
            "have features, or with too few validation users, or without train.calibrate"
        )
    key = scoring.score_key(settings, dataset, model)
    is_new = not is_complete(writer.snapshot_path(storage, dataset.as_of_s, key), writer.KIND, key)
    if is_new:
        cluster.start()
    path, manifest, changed = scoring.score(settings, key, dataset, model)

    metrics = {name: manifest[name] for name in ("users", "popular_users", "coverage@10")}
    # with privacy, the number of users is not published; the rest is of holdout users
    hidden = {"files", "users"} if bundle.privacy["differential_privacy"] else {"files"}
    document = {name: value for name, value in manifest.items() if name not in hidden}
    document |= {"date": to_date(dataset.as_of_s), "manifest_sha256": manifest_digest(path)}
    quantiles = {f"best_score_q{q}": value for q, value in manifest["best_score_quantiles"].items()}
    figures = {name: value for name, value in {**metrics, **quantiles}.items() if name not in hidden}
    values = {f"snapshot_{name}": value for name, value in figures.items()}
    entry: Entry = {
        "documents": {f"snapshots/{to_date(dataset.as_of_s)}-{key}.json": document},
        "metrics": {"values": values, "step": to_day(dataset.as_of_s)},
    }

    context.progress(
        f"snapshot {key} by bundle {bundle.key}: {manifest['users']} users, {manifest['popular_users']} with "
        f"the popularity fallback; {'published' if changed else 'was published before'}"
    )
    outputs = {"snapshot": str(path), "latest": str(storage.latest)}
    record = Record(bundle, dataset.as_of_s, entry)
    return StageReport(key, outputs, metrics, is_new or changed, record=record)


def _select_model(context: JobContext, dataset: Dataset) -> scoring.ScoringModel:
    """The champion with its policy, or the popularity fallback before the first champion."""
    storage, settings = context.storage, context.settings
    popular_only = settings.promotion.first_run == "fallback" and Release.read(storage).champion is None
    bundle = current_bundle(context, dataset) if popular_only else load_champion(storage)
    require_private(settings, bundle)
    if popular_only:
        context.warn(
            "no model was promoted yet: everybody gets the popularity fallback (promotion.first_run: "
            "fallback)"
        )
    if bundle.as_of_s > dataset.as_of_s:
        raise RefusedError(
            f"champion {bundle.key} was trained on events up to {to_date(bundle.as_of_s)}, later than this "
            f"run of {to_date(dataset.as_of_s)}",
            "score a later run, or an older one in a storage.root of its own",
        )
    policy = read_policy_key(storage)
    has_usable_policy = load_usable_policy(context, bundle, policy) is not None
    return scoring.ScoringModel(bundle, policy if has_usable_policy else None, popular_only)


def _check_rules(context: JobContext, dataset: Dataset) -> None:
    options = context.settings.score
    rules, seen = options.rules(), SeenRule.from_settings(options.seen())
    if problem := seen.find_problem(dataset.event_types, has_time=dataset.has_time):
        raise RefusedError(f"score.{problem[0]}", problem[1])
    if is_everything_excluded(rules, dataset):
        raise RefusedError("score.exclude leaves no item to recommend", "exclude less")
    for name in find_unmatched(rules, dataset):
        context.warn(f"a rule of section score names {name!r}, which no item has")
