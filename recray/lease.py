"""One job at a time under a storage root, and what fences off an attempt that was taken for dead.

The holder locks `.lock`, writes its name and attempt number into it and touches it while it lives. Who finds it locked
watches: a holder that stirs refuses the newcomer; one that does not for `lease_s` (frozen, or lost with its node) is
replaced, by a new lock file with the next attempt number. Whatever becomes visible does so inside `commit`, which
refuses an attempt that was replaced. So a late attempt that wakes up can finish its sums and publish nothing.

Needs flock on the file system of storage.root; on NFS that is version 4.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from recray.errors import RefusedError, StorageError

LOCK = ".lock"
COMMIT = ".commit.lock"
BEATS = 10  # touches in a lease
FAULT = "RECRAY_FAULT"

_held: Lease | None = None


class Lease:
    """A held lock file. `attempt` counts the holders of the root, from 1."""

    def __init__(self, root: Path, file: IO[str], attempt: int) -> None:
        self.root, self.attempt = root, attempt
        self._file = file

    def check(self) -> None:
        """Raises RefusedError if another attempt has taken over."""
        mine = os.fstat(self._file.fileno())
        try:
            now = os.stat(self.root / LOCK)
            holder = _holder(self.root)
        except FileNotFoundError:
            now, holder = None, {}
        if now is None or (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino) or holder.get("attempt") != self.attempt:
            raise RefusedError(
                f"attempt {self.attempt} was taken for dead and is fenced off: {_described(holder)} has taken over in {self.root}",
                "nothing to do: the later attempt ends the work; raise storage.lease_s if this one was only slow",
            )


@contextlib.contextmanager
def hold(root: Path, job: str, lease_s: float) -> Iterator[Lease]:
    """Hold the root for a job. Raises RefusedError naming a holder that lives, StorageError if the root cannot be written to."""
    global _held
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_acquire(root, lease_s))
            with _flocked(root / COMMIT, lease_s):
                attempt = int(_holder(root).get("attempt", 0)) + 1
                who = {"attempt": attempt, "job": job, "host": socket.gethostname(), "pid": os.getpid()}
                _write(file, {**who, "since": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")})
        except OSError as error:
            raise StorageError(f"storage.root {root} cannot be written to: {error}", "check its permissions, its mount and its free space") from None
        lease = Lease(root, file, attempt)
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(file.fileno(), ended, lease_s / BEATS), daemon=True)
        beat.start()
        _held = lease
        commit_point("lease:held")
        try:
            yield lease
        finally:
            _held = None
            ended.set()
            beat.join()


@contextlib.contextmanager
def commit(root: Path | None = None) -> Iterator[None]:
    """The moment in which something becomes visible. Raises RefusedError in an attempt that was fenced off.

    root : where; None for the root that this process holds, and for no check where it holds none
    """
    root = root or (_held.root if _held else None)
    if root is None:
        yield
        return
    with _flocked(root / COMMIT, None):
        if _held is not None and _held.root == root:
            _held.check()
        yield


def commit_point(name: str) -> None:
    """A moment between two durable steps: `RECRAY_FAULT=KILL@<name>` ends this process here as a crash would, `STOP@<name>` halts it."""
    fault, _, point = os.environ.get(FAULT, "").partition("@")
    if point == name:
        os.kill(os.getpid(), signal.Signals[f"SIG{fault}"])


@contextlib.contextmanager
def only_one(root: Path, what: str) -> Iterator[None]:
    """Hold a lock of the root beside the lease, as long as a process lives that runs for long. Raises RefusedError where another one does."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{what}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RefusedError(f"another {what} ({file.read().strip()}) runs in {root}", "stop that one, or leave it to it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def holder(root: Path) -> str | None:
    """Who holds the root now, in words; None if nobody does."""
    path = root / LOCK
    if not path.exists():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _described(_holder(root))
    return None


@contextlib.contextmanager
def _acquire(root: Path, lease_s: float) -> Iterator[IO[str]]:
    """The locked lock file, after the one who held it died or did not stir for `lease_s`."""
    path = root / LOCK
    seen, silent, poll = None, 0.0, min(lease_s / BEATS, 0.2)
    looked = time.monotonic()
    while True:
        file: IO[str] = open(path, "a+")  # noqa: SIM115 - entered below
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = (os.fstat(file.fileno()).st_ino, os.fstat(file.fileno()).st_mtime_ns)
            file.close()
            if seen is not None and found != seen:
                raise RefusedError(f"{_described(_holder(root))} is at work in {root}", "wait until it ends, or use another storage.root") from None
            seen, now = found, time.monotonic()
            silent += min(now - looked, 2 * poll)  # what was longer we slept through, as the holder may have
            looked = now
            if silent > lease_s:
                replacement = _replace(root, lease_s, found)
                if replacement is not None:
                    file = replacement
                    break
                seen, silent = None, 0.0  # another newcomer was faster
                continue
            time.sleep(poll)
        else:
            if path.exists() and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
            file.close()  # replaced between open and lock
    with file:
        yield file


def _replace(root: Path, lease_s: float, found: tuple[int, int]) -> IO[str] | None:
    """A new lock file, locked, in the place of one whose holder does not stir; None if it is not the one that was `found`."""
    scratch = root / f"{LOCK}.{uuid.uuid4().hex[:8]}"
    with _flocked(root / COMMIT, lease_s):
        now = os.stat(root / LOCK)
        if (now.st_ino, now.st_mtime_ns) != found:
            return None
        file = open(scratch, "a+")  # noqa: SIM115 - the caller holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        _write(file, _holder(root))
        os.replace(scratch, root / LOCK)
    return file


@contextlib.contextmanager
def _flocked(path: Path, timeout_s: float | None) -> Iterator[None]:
    with open(path, "a+") as file:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if deadline is not None and time.monotonic() > deadline:
                    raise RefusedError(
                        f"{_described(_holder(path.parent))} is stuck while it publishes in {path.parent}", "stop that process, then repeat"
                    ) from None
                time.sleep(0.05)
        yield


def _beat(descriptor: int, ended: threading.Event, every_s: float) -> None:
    while not ended.wait(every_s):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _write(file: IO[str], content: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    json.dump(content, file)
    file.flush()
    os.fsync(file.fileno())


def _holder(root: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((root / LOCK).read_text()))
    except (OSError, ValueError):
        return {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another job"
    return f"{holder['job']} (attempt {holder['attempt']}, process {holder['pid']} on {holder['host']}, since {holder['since']})"
