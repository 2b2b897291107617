"""What runs on this machine, and with which home it was started."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import psutil


class Running(NamedTuple):
    process: psutil.Process
    home: Path
    title: str


def running() -> list[Running]:
    """All processes that we may look at."""
    found = []
    for process in psutil.process_iter():
        try:
            title, home = " ".join(process.cmdline()).strip(), process.environ().get("HOME", "")
        except psutil.Error:  # it ended, or is another user's
            continue
        if title:
            found.append(Running(process, Path(home), title))
    return found


def titled(home: Path, *words: str) -> list[int]:
    """Processes of a home whose title holds one of the words."""
    return [one.process.pid for one in running() if one.home == home and any(word in one.title for word in words)]


def children(pid: int) -> list[int]:
    """The processes that a process started, if it lives."""
    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def status(pid: int | None) -> str:
    """What a process does, in psutil's words; "gone" where there is none."""
    try:
        return str(psutil.Process(pid).status()) if pid is not None else "gone"
    except psutil.NoSuchProcess:
        return "gone"
