"""What a person sees while a job runs: a spinner and tables on a terminal, plain lines in a log. All on standard error."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from recray.config import Settings


class Reporter:
    """Says things. As a context manager it shows a spinner on a terminal."""

    def __init__(self) -> None:
        plain = Console(stderr=True)
        self.console = plain if plain.is_terminal else Console(stderr=True, width=140, no_color=True, highlight=False)
        self._started = time.monotonic()
        self._status = self.console.status("starting") if self.console.is_terminal else None

    def __enter__(self) -> Reporter:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def say(self, message: str) -> None:
        elapsed = f"{time.monotonic() - self._started:6.1f}s  "
        self.console.print(Text.assemble((elapsed, "dim"), message), soft_wrap=True)
        if self._status:
            self._status.update(Text(message[: max(self.console.width - 6, 10)]))  # one line: a wrapped spinner leaves traces

    def show(self, what: RenderableType) -> None:
        self.console.print(what)

    def show_evaluation(self, path: str, settings: Settings) -> None:
        """The table of an evaluation directory."""
        from recray.evaluation.evaluate import SETTINGS, order
        from recray.evaluation.report import render

        table: dict[str, Any] = json.loads((Path(path) / "metrics.json").read_text())
        self.show(render({s: {name: table[s][name] for name in order(table[s])} for s in SETTINGS}, settings.evaluate.k[0]))
