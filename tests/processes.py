"""What runs on this machine, and with which home it was started."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import psutil


class Running(NamedTuple):
    process: psutil.Process
    home: Path
    title: str


def running(*words: str) -> list[Running]:
    """All processes that we may look at, or those whose title holds one of the words."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended, or is another user's
            title = " ".join(process.cmdline()).strip()
            if title and (not words or any(word in title for word in words)):
                processes.append(Running(process, Path(process.environ().get("HOME", "")), title))
    return processes


def titled(home: Path, *words: str) -> list[int]:
    """Processes of a home whose title holds one of the words."""
    return [one.process.pid for one in running(*words) if one.home == home]


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
