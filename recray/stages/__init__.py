"""The stages of a night: what each reads, which key names its result, when it is skipped, and what it tells MLflow.

A stage is safe to repeat: its run key names its output, and an output that is there is not made again. MLflow is told
through an outbox, so that no stage needs it.

What needs torch or MLflow is imported by the stage that uses it: the driver of prepare stays small.
"""

from recray.stages.night import audit, collect, current_bundle, evaluate, prepare, promote, report, score, train
from recray.stages.policy import adapt, keep_policy, published_dataset, tune
from recray.stages.work import AsOf, JobResult, Say, Work, date_of, day_of, deliver, result_of, sound_policy

__all__ = [
    "AsOf",
    "JobResult",
    "Say",
    "Work",
    "adapt",
    "audit",
    "collect",
    "current_bundle",
    "date_of",
    "day_of",
    "deliver",
    "evaluate",
    "keep_policy",
    "prepare",
    "promote",
    "published_dataset",
    "report",
    "result_of",
    "score",
    "sound_policy",
    "train",
    "tune",
]
