"""What would make tests fail for no fault of the code is said before the first one: a full disk, a taken
port, what an aborted run left.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path

import psutil
import pytest
from processes import running

NEEDED = {tempfile.gettempdir(): 4 << 30, "/dev/shm": 1 << 30}
"""Free bytes: data sets, workspaces and Ray's logs; and the object stores of the Rays that run at once."""
NOBODY_LISTENS = (1, 9)
"""Ports of 127.0.0.1 that tests take for servers that are not there."""
ENDS_IN_S = 10.0
"""What a run that just ended leaves has time to end: the processes that wait for its pipe to close."""


def problems() -> list[str]:
    """Why tests cannot run on this machine as it is now, with what to do about each."""
    return [*_full_disks(), *_taken_ports(), *_left_behind()]


def absent(server: str) -> None:
    """Skip a test for want of something that this machine lacks. In CI that is a failure: there, nothing is
    left out unseen.
    """
    if os.environ.get("CI"):
        pytest.fail(f"{server}; in CI no test is left out for that")
    pytest.skip(server)


def _full_disks() -> list[str]:
    free = {path: shutil.disk_usage(path).free for path in NEEDED if Path(path).is_dir()}
    return [
        f"{path} has {free[path] / 2**30:.1f} GiB free, the tests need {NEEDED[path] >> 30}: make room there"
        + (", or name another folder with TMPDIR" if path != "/dev/shm" else "")
        for path in free
        if free[path] < NEEDED[path]
    ]


def _taken_ports() -> list[str]:
    ports = []
    for port in NOBODY_LISTENS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                ports.append(
                    f"something listens on 127.0.0.1:{port}, which tests take for a server that is not "
                    "there: stop it"
                )
    return ports


def _left_behind() -> list[str]:
    """Processes whose home is a folder of a pytest run that is over, and which do not end by themselves."""
    left = {}
    for process, home, title in running():
        run = next((path for path in home.parents if path.parent.name.startswith("pytest-of-")), None)
        if run is not None and not _runs(run):
            left[process] = title[:60]
    _, alive = psutil.wait_procs(list(left), timeout=ENDS_IN_S)
    if not alive:
        return []
    shown = "; ".join(f"{process.pid} {left[process]}" for process in alive[:3])
    pids = " ".join(str(process.pid) for process in alive)
    return [f"an aborted run of the tests left {len(alive)} processes ({shown} …): kill -9 {pids}"]


def _runs(run: Path) -> bool:
    """Whether the pytest process whose temporary folder this is lives: its lock names it."""
    try:
        return psutil.pid_exists(int((run / ".lock").read_text()))
    except (OSError, ValueError):
        return False
