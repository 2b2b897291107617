"""Runs a job in a child process, so that whatever ends it is reported.

Ray's native code ends a driver that lost its cluster, and the kernel ends one that takes too much memory; neither leaves
room for a last word. The parent is small, waits, and has it. Standard output is for results alone: whatever else in the
job prints there, Ray above all, is sent to standard error.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
STDOUT, STDERR = 1, 2
ASKS = (signal.SIGINT, signal.SIGTERM)  # for an end

Tell = Callable[[str], None]
"""Prints a result of the job, one line, on standard output."""


def supervise(job: Callable[[Tell], int], lost: Callable[[str, str], int]) -> int:
    """Run `job` in a forked child and return its exit code.

    If the child ends before the job does, `lost(what, fix)` reports in its place and gives the exit code. Signals that ask
    for an end reach the child; if the parent is killed, so is the child. Call before any thread is started.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored (as some callers leave it), the child's end would not be told
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*ASKS, signal.SIGCHLD))  # kept for sigwait, so that none is missed
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reader)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        results = _results()
        code = job(lambda line: _write(results, f"{line}\n".encode()))
        os.write(writer, bytes([code]))
        sys.exit(code)
    os.close(writer)
    status = _wait(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with os.fdopen(reader, "rb") as pipe:
        if told := pipe.read():
            return told[0]  # the job was over: what ended its process after that does not matter
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        memory = ", which is what the kernel sends when memory runs out" if number == signal.SIGKILL else ""
        what = f"the job's process was ended by signal {number} ({signal.Signals(number).name}){memory}"
        return lost(what, "look at the kernel's log and at the memory of this node, then repeat the job; it goes on where it stopped")
    return lost(
        "Ray ended the job's process: it lost the cluster's head node (its last lines are above)",
        "start the cluster again, then repeat the job; it goes on where it stopped",
    )


def _results() -> int:
    """A descriptor of standard output; from now on, what is written there goes to standard error. Either may be closed."""
    for descriptor in (STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    results = os.dup(STDOUT)
    if sys.stdout is not None:
        sys.stdout.flush()
    os.dup2(STDERR, STDOUT)
    return results


def _wait(child: int) -> int:
    """Wait status of the child when it has ended; what asks for an end until then is passed on. The signals are blocked."""
    while True:
        number = signal.sigwait((*ASKS, signal.SIGCHLD))
        if number in ASKS:
            os.kill(child, number)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
