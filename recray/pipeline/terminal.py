"""Reports the progress of a job on standard error: a spinner and tables for a person, one JSON object a line
for a log.
"""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from recray.config import Settings


class Reporter:
    """Reports to a person. As a context manager it shows a spinner on a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self.console = (
            console
            if console.is_terminal
            else Console(stderr=True, width=140, no_color=True, highlight=False)
        )
        self._started = time.monotonic()
        self._status = self.console.status("starting") if self.console.is_terminal else None

    def __enter__(self) -> Reporter:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def progress(self, message: str, **fields: Any) -> None:
        """Print a line with the seconds since the start; level `debug` in `fields` hides it."""
        if fields.get("level") == "debug":
            return
        elapsed = f"{time.monotonic() - self._started:6.1f}s  "
        self.console.print(Text.assemble((elapsed, "dim"), message), soft_wrap=True)
        if self._status:
            # one line, since a wrapped spinner is not erased
            self._status.update(Text(message[: max(self.console.width - 6, 10)]))

    def show(self, table: RenderableType) -> None:
        """Print a table."""
        self.console.print(table)

    def show_evaluation(self, path: str, settings: Settings) -> None:
        """Print the table of an evaluation directory."""
        from recray.evaluation.evaluate import read_table
        from recray.evaluation.table import render_table

        self.show(render_table(read_table(Path(path)), settings.evaluate.k[0]))

    def error(self, text: str) -> None:
        """Print an error that ends the job."""
        print(f"error: {text}", file=sys.stderr)


class LogReporter(Reporter):
    """Reports to a log: time (UTC), level, job, stage, message, and the fields of a message. Tables are left
    out.
    """

    def __init__(self, job: str) -> None:
        self._job, self._stage, self._started = job, "", time.monotonic()

    def __enter__(self) -> LogReporter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def progress(self, message: str, **fields: Any) -> None:
        self._stage = fields.pop("stage", self._stage)
        timestamp = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        line = {
            "time": timestamp,
            "level": fields.pop("level", "info"),
            "job": self._job,
            "stage": self._stage,
            "message": message,
            **fields,
        }
        print(json.dumps(line, default=str), file=sys.stderr, flush=True)

    def show(self, table: RenderableType) -> None:
        return

    def show_evaluation(self, path: str, settings: Settings) -> None:
        return

    def error(self, text: str) -> None:
        self.progress(text, level="error")
