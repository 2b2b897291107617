"""What a search tells while it runs."""

from __future__ import annotations

import math
import time
from typing import Any

from ray import tune

from recray.search.trial import Search, describe_values, read_trial
from recray.stages import ProgressLog
from recray.storage import read_json, write_json


class Watch(tune.Callback):  # type: ignore[misc]  # Ray's class has no type
    """Logs each trial as it ends, and keeps the seconds of all attempts of a search."""

    def __init__(self, search: Search, progress: ProgressLog) -> None:
        self._search, self._progress = search, progress
        self._file = search.folder / "elapsed.json"
        self._before_s = float(read_json(self._file)) if self._file.exists() else 0.0
        self._started, self._best, self._ended = time.monotonic(), -math.inf, 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles its callbacks, and needs nothing of this one

    @property
    def elapsed_s(self) -> float:
        return self._before_s + time.monotonic() - self._started

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        write_json(self._file, round(self.elapsed_s, 1))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._log(trial)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._log(trial)

    def _log(self, trial: Any) -> None:
        ended = read_trial(self._search.trial_folder(trial.config))
        self._ended += 1
        if ended.reason:
            self._progress(f"trial {self._ended} failed: {ended.reason.splitlines()[0]}", level="warning")
            return
        self._best = max(self._best, ended.ndcg)
        left_min = max(self._search.settings.search.minutes - self.elapsed_s / 60, 0)
        values = describe_values(ended.values, self._search.settings)
        self._progress(
            f"trial {self._ended}: validation ndcg {ended.ndcg:.4f} after {ended.epochs} epochs ({values}); "
            f"best {self._best:.4f}, {left_min:.0f} min left"
        )
