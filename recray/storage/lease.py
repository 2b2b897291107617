"""One job at a time in a workspace, and fencing of an attempt that was considered dead.

The holder locks `.lock`, writes its name and attempt number into it, and touches it periodically. Another
job is refused while the file is touched. If it is not touched for `lease_s` (the holder is frozen, or lost
with its node), the other job replaces the lock file and takes the next attempt number. Outputs become visible
only inside `commit`, which refuses a replaced attempt. So an attempt that wakes up late publishes nothing.

Needs flock on the file system of storage.root; on NFS that requires version 4.
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
from typing import IO, TypedDict

from recray.errors import RefusedError, StorageError

LOCK = ".lock"
COMMIT = ".commit.lock"
HEARTBEATS_PER_LEASE = 10  # touches of the lock file in a lease
FAULT = "RECRAY_FAULT"

_current_lease: Lease | None = None


class Holder(TypedDict, total=False):
    """The content of the lock file; empty before the first holder has written it.

    attempt : number of the holder, from 1
    job, host, pid : the holding process
    since : start of the hold, ISO 8601 in UTC
    """

    attempt: int
    job: str
    host: str
    pid: int
    since: str


class Lease:
    """A held lock file. `attempt` counts the holders of the workspace, from 1."""

    def __init__(self, root: Path, file: IO[str], attempt: int) -> None:
        self.root, self.attempt = root, attempt
        self._file = file

    def check(self) -> None:
        """Raises RefusedError if another attempt has taken over."""
        own_stat = os.fstat(self._file.fileno())
        try:
            lock_stat = os.stat(self.root / LOCK)
            holder = _read_holder(self.root)
        except FileNotFoundError:
            lock_stat, holder = None, {}
        if (
            lock_stat is None
            or (lock_stat.st_dev, lock_stat.st_ino) != (own_stat.st_dev, own_stat.st_ino)
            or holder.get("attempt") != self.attempt
        ):
            raise RefusedError(
                f"attempt {self.attempt} was considered dead and is fenced off: {_describe(holder)} has "
                f"taken over in {self.root}",
                "nothing to do: the later attempt finishes the job; raise storage.lease_s if this one was "
                "only slow",
            )


@contextlib.contextmanager
def hold(root: Path, job: str, lease_s: float) -> Iterator[Lease]:
    """Hold the workspace for a job. Raises RefusedError that names a live holder, StorageError if the
    workspace cannot be written to.
    """
    global _current_lease
    with contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_acquire(root, lease_s))
            with hold_file_lock(root / COMMIT, lease_s):
                attempt = int(_read_holder(root).get("attempt", 0)) + 1
                since = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
                holder = Holder(
                    attempt=attempt, job=job, host=socket.gethostname(), pid=os.getpid(), since=since
                )
                _write(file, holder)
        except OSError as error:
            raise StorageError(
                f"storage.root {root} cannot be written to: {error}",
                "check its permissions, its mount and its free space",
            ) from None

        lease = Lease(root, file, attempt)
        stop_event = threading.Event()
        heartbeat = threading.Thread(
            target=_run_heartbeat,
            args=(file.fileno(), stop_event, lease_s / HEARTBEATS_PER_LEASE),
            daemon=True,
        )
        heartbeat.start()
        _current_lease = lease
        commit_point("lease:held")
        try:
            yield lease
        finally:
            _current_lease = None
            stop_event.set()
            heartbeat.join()


@contextlib.contextmanager
def commit(root: Path | None = None) -> Iterator[None]:
    """The section in which an output becomes visible. Raises RefusedError in an attempt that was fenced off.

    root : None for the workspace that this process holds; without one nothing is checked
    """
    root = root or (_current_lease.root if _current_lease else None)
    if root is None:
        yield
        return
    with hold_file_lock(root / COMMIT, None):
        if _current_lease is not None and _current_lease.root == root:
            _current_lease.check()
        yield


def commit_point(name: str) -> None:
    """A point between two durable steps for fault injection: `RECRAY_FAULT=KILL@<name>` kills this process
    here, `STOP@<name>` halts it.
    """
    fault, _, point = os.environ.get(FAULT, "").partition("@")
    if point == name:
        os.kill(os.getpid(), signal.Signals[f"SIG{fault}"])


@contextlib.contextmanager
def hold_exclusively(root: Path, name: str) -> Iterator[None]:
    """Hold a lock for a long-running process, independent of the lease. Raises RefusedError if another
    process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f".{name}.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RefusedError(
                f"another {name} ({file.read().strip()}) runs in {root}", "stop that one, or let it run"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def describe_holder(root: Path) -> str | None:
    """Text that describes the holder of the workspace; None without a holder."""
    path = root / LOCK
    if not path.exists():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _describe(_read_holder(root))
    return None


@contextlib.contextmanager
def _acquire(root: Path, lease_s: float) -> Iterator[IO[str]]:
    """The locked lock file, once its holder has died or has not touched it for `lease_s`."""
    path = root / LOCK
    previous_stamp, silent_s, poll_s = None, 0.0, min(lease_s / HEARTBEATS_PER_LEASE, 0.2)
    checked_at_s = time.monotonic()
    while True:
        file: IO[str] = open(path, "a+")  # noqa: SIM115 - entered below
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock_stamp = (os.fstat(file.fileno()).st_ino, os.fstat(file.fileno()).st_mtime_ns)
            file.close()
            if previous_stamp is not None and lock_stamp != previous_stamp:
                raise RefusedError(
                    f"{_describe(_read_holder(root))} is running in {root}",
                    "wait until it ends, or use another storage.root",
                ) from None
            previous_stamp, now = lock_stamp, time.monotonic()
            # a longer gap means that this process was suspended, and so perhaps was the holder
            silent_s += min(now - checked_at_s, 2 * poll_s)
            checked_at_s = now
            if silent_s > lease_s:
                replacement = _replace(root, lease_s, lock_stamp)
                if replacement is not None:
                    file = replacement
                    break
                previous_stamp, silent_s = None, 0.0  # another job was faster
                continue
            time.sleep(poll_s)
        else:
            if path.exists() and os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
            file.close()  # replaced between open and lock
    with file:
        yield file


def _replace(root: Path, lease_s: float, lock_stamp: tuple[int, int]) -> IO[str] | None:
    """Replace the lock file of a dead holder by a new locked one; None if it was touched since `lock_stamp`
    (inode and mtime).
    """
    scratch = root / f"{LOCK}.{uuid.uuid4().hex[:8]}"
    with hold_file_lock(root / COMMIT, lease_s):
        current = os.stat(root / LOCK)
        if (current.st_ino, current.st_mtime_ns) != lock_stamp:
            return None
        file = open(scratch, "a+")  # noqa: SIM115 - the caller holds it
        fcntl.flock(file, fcntl.LOCK_EX)
        _write(file, _read_holder(root))
        os.replace(scratch, root / LOCK)
    return file


@contextlib.contextmanager
def hold_file_lock(path: Path, timeout_s: float | None) -> Iterator[None]:
    """Hold an exclusive lock of a file; waits for it at most `timeout_s` (None: as long as it takes)."""
    with open(path, "a+") as file:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if deadline is not None and time.monotonic() > deadline:
                    raise RefusedError(
                        f"{_describe(_read_holder(path.parent))} hangs while it publishes in {path.parent}",
                        "stop that process, then repeat",
                    ) from None
                time.sleep(0.05)
        yield


def _run_heartbeat(descriptor: int, stop_event: threading.Event, every_s: float) -> None:
    while not stop_event.wait(every_s):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _write(file: IO[str], content: Holder) -> None:
    file.seek(0)
    file.truncate()
    json.dump(content, file)
    file.flush()
    os.fsync(file.fileno())


def _read_holder(root: Path) -> Holder:
    try:
        holder: Holder = json.loads((root / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return holder


def _describe(holder: Holder) -> str:
    if not holder:
        return "another job"
    return (
        f"{holder['job']} (attempt {holder['attempt']}, process {holder['pid']} on {holder['host']}, "
        f"since {holder['since']})"
    )
