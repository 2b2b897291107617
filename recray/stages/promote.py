"""The stage that decides whether a bundle becomes the champion."""

from __future__ import annotations

from recray.bundle import Bundle
from recray.dataset.reader import Dataset
from recray.errors import TrackingError
from recray.evaluation import promotion
from recray.release import Release
from recray.stages.context import JobContext, Record, StageReport, to_date, to_day
from recray.stages.train import current_bundle
from recray.tracking.outbox import Entry

PROMOTION_WAITS = "MLflow is unavailable: the promotion waits for the next run, the champion stays"


def promote(context: JobContext, dataset: Dataset, bundle: Bundle | None = None) -> StageReport:
    """Check a bundle (None: the current one) against the promotion criteria, and promote it if it meets them.

    `promoted` and `reason` of the report give the result.
    """
    storage, is_manual = context.storage, bundle is not None
    bundle = bundle or current_bundle(context, dataset)
    context.deliver()
    release = Release.read(storage)
    is_champion = release.champion is not None and release.champion.run_key == bundle.key
    if not is_champion and (
        reason := find_registry_conflict(context, bundle, first=release.champion is None)
    ):
        context.warn(reason)
        return StageReport(outputs={"release": str(storage.release)}, metrics={"promoted": 0}, reason=reason)

    key, decision, changed = promotion.promote(context.settings, dataset, bundle, is_manual=is_manual)
    for check in decision["checks"]:
        context.progress(f"{'passed' if check['passed'] else 'FAILED'}  {check['name']}: {check['text']}")
    is_promoted = bool(decision["promoted"])
    status = "is the champion" if is_promoted else f"is not promoted: {decision['reason']}"
    context.progress(f"bundle {bundle.key} {status}")

    metrics: dict[str, float] = {"promoted": int(is_promoted)}
    if comparison := decision["comparison"]:
        metrics["champion_difference"] = comparison["difference"]
        metrics["champion_difference_low"] = comparison["low"]
    outputs, record = {"release": str(storage.release)}, None
    if key:
        outputs["promotion"] = str(storage.promotion(key))
        entry: Entry = {
            "metrics": {"values": metrics, "step": to_day(dataset.as_of_s)},
            "documents": {f"promotions/{to_date(dataset.as_of_s)}-{key}.json": decision},
        }
        record = Record(bundle, dataset.as_of_s, entry)
    elif changed:
        context.deliver()
    return StageReport(key, outputs, metrics, changed, decision["reason"], record)


def find_registry_conflict(context: JobContext, bundle: Bundle, *, first: bool) -> str | None:
    """The reason why MLflow prevents a promotion, or None.

    The first champion of a workspace does not wait for MLflow.
    """
    try:
        return context.outbox.tracking.find_mismatch(bundle.key, bundle.manifest["dataset"], bundle.digest)
    except TrackingError as error:
        context.warn_of_tracking(error)
        return None if first else PROMOTION_WAITS
