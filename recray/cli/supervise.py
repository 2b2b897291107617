"""Runs a job in a child process, so that its end is always reported.

Ray's native code ends a driver that lost its cluster, and the kernel ends one that uses too much memory; the
process cannot report either. The parent is small, waits, and reports it. Standard output is for results
alone: other output of the job, especially Ray's, is sent to standard error.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
STDOUT, STDERR = 1, 2
END_SIGNALS = (signal.SIGINT, signal.SIGTERM)

WriteLine = Callable[[str], None]
"""Writes a line with a result of the job to standard output."""


def supervise(job: Callable[[WriteLine], int], report_loss: Callable[[str, str], int]) -> int:
    """Run `job` in a forked child and return its exit code.

    If the child ends before the job does, `report_loss(message, fix)` reports in its place and returns the
    exit code. SIGINT and SIGTERM are forwarded to the child; if the parent is killed, so is the child. Call
    before any thread is started.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    # some callers ignore SIGCHLD, and then the end of the child would not be signalled
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # blocked for sigwait, so that no signal is missed
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*END_SIGNALS, signal.SIGCHLD))
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        os.close(reader)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        results = _redirect_stdout()
        code = job(lambda line: _write(results, f"{line}\n".encode()))
        os.write(writer, bytes([code]))
        sys.exit(code)
    os.close(writer)
    status = _wait_for_child(child)
    signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
    with os.fdopen(reader, "rb") as pipe:
        if exit_code := pipe.read():
            return exit_code[0]  # the job was over before its process ended
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        memory = ", which the kernel sends when memory runs out" if number == signal.SIGKILL else ""
        message = f"the job's process was ended by signal {number} ({signal.Signals(number).name}){memory}"
        return report_loss(
            message,
            "check the kernel's log and the memory of this node, then repeat the job; it resumes where it "
            "stopped",
        )
    return report_loss(
        "Ray ended the job's process: it lost the cluster's head node (its last lines are above)",
        "start the cluster again, then repeat the job; it resumes where it stopped",
    )


def _redirect_stdout() -> int:
    """A descriptor of standard output, whose further output is sent to standard error. Either may be
    closed.
    """
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


def _wait_for_child(child: int) -> int:
    """Wait status of the child when it has ended; SIGINT and SIGTERM are forwarded until then. The signals
    are blocked.
    """
    while True:
        number = signal.sigwait((*END_SIGNALS, signal.SIGCHLD))
        if number in END_SIGNALS:
            os.kill(child, number)
        ended_pid, status = os.waitpid(child, os.WNOHANG)
        if ended_pid:
            return status


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
