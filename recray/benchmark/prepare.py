"""Peak memory of prepare, and its events a second beside another checkout of recray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from recray.benchmark.checkouts import beside, environment_of
from recray.errors import RecrayError
from recray.stages import Say
from recray.testing.synthetic import SyntheticShop

MILLIONS = (1, 10)
ROUNDS = 9
PERIOD_S = 0.2
BASE_BYTES = 1_000_000_000  # the bound is this and 100 bytes an event


class MemoryPeak:
    """The most memory that a job took: of its own processes and Ray's workers, and of the pages of its object store.

    Memory is PSS: private pages of the job and the workers (Ray's daemons are left out), shared ones of all processes below this one, so
    that whatever else uses /dev/shm on the machine does not count.
    """

    def __init__(self) -> None:
        self.total = 0
        self.workers = 0
        self.store = 0

    def look(self, job: int) -> None:
        """Once, at the job of that process id, which may have forked itself."""
        below = _below()
        found = {pid: _pss(pid) for pid in below}
        workers = sum(found[pid][0] for pid, title in below.items() if title == below.get(job) or _is_worker(title))
        store = sum(shared for _, shared in found.values())
        self.total = max(self.total, workers + store)
        self.workers, self.store = max(self.workers, workers), max(self.store, store)


def measure_prepare(folder: Path, say: Say) -> dict[str, float]:
    """Peak memory of prepare at 1 and 10 million synthetic events, against 1 GB + 100 B an event."""
    metrics: dict[str, float] = {}
    for millions in MILLIONS:
        say(f"writing a world of {millions} million events")
        world = SyntheticShop(users=50_000 * millions, items=20_000, events_per_user=20.0)
        world.write(folder / f"world-{millions}")
        metrics.update(_measure(folder, millions, say))
    return metrics


def measure_against(folder: Path, other: Path, say: Say) -> dict[str, float]:
    """Events a second of prepare at 1 million synthetic events, here and in another checkout, in turns, without the start of Ray and imports.

    Raises SettingsError for a folder that is no checkout.
    """
    SyntheticShop(users=50_000, items=20_000, events_per_user=20.0).write(folder / "world")
    return beside(other, "prepare", ROUNDS, lambda checkout: {"": _events_a_second(folder, checkout)}, "events/s", say)


_CHILD = """
import json, shutil, sys, time
from recray import cluster
from recray.config import load_settings
from recray.prepare.prepare import prepare
folder = sys.argv[1]
settings = load_settings(None, [f"data.events=[{folder}/world/events]", f"data.items={folder}/world/items.parquet", f"storage.root={folder}/root"])
cluster.start()
import ray
ray.get(ray.remote(lambda: None).remote())
begun = time.monotonic()
dataset = prepare(settings, None)
print(json.dumps(dataset.n_events / (time.monotonic() - begun)))
shutil.rmtree(f"{folder}/root")
"""


def _events_a_second(folder: Path, checkout: Path) -> float:
    """Of one prepare by a checkout's code, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], env=environment_of(checkout), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RecrayError(f"prepare of {checkout} ended with {done.returncode}: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))


def _measure(folder: Path, millions: int, say: Say) -> dict[str, float]:
    """Of `recray prepare` as a person runs it."""
    world, memory, begun = folder / f"world-{millions}", MemoryPeak(), time.monotonic()
    command = [sys.executable, "-c", "from recray.cli import main; main()", "prepare", f"storage.root={folder / 'root'}"]
    command += [f"data.events=[{world / 'events'}]", f"data.items={world / 'items.parquet'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, said = job.communicate(timeout=PERIOD_S)
                break
            memory.look(job.pid)
    if job.returncode:
        raise RecrayError(f"prepare ended with {job.returncode}: {said[-2000:]}")
    seconds, events = time.monotonic() - begun, json.loads(out.splitlines()[-1])["metrics"]["events"]
    bound = BASE_BYTES + 100 * events
    say(
        f"{events} events: peak {memory.total / 1e6:.0f} MB (workers {memory.workers / 1e6:.0f}, object store "
        f"{memory.store / 1e6:.0f}), bound {bound / 1e6:.0f} MB, {seconds:.0f} s with Ray's start"
    )
    prefix = f"{millions}m_"
    return {
        f"{prefix}events": events,
        f"{prefix}peak_bytes": memory.total,
        f"{prefix}bound_bytes": bound,
        f"{prefix}peak_ratio": round(memory.total / bound, 4),
        f"{prefix}seconds": round(seconds, 1),
    }


def _below() -> dict[int, bytes]:
    """The processes below this one, and their command lines."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])

    def is_below(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == os.getpid():
                return True
        return False

    return {pid: title for pid, title in titles.items() if is_below(pid)}


def _is_worker(title: bytes) -> bool:
    """Whether a process is a worker of Ray's, which titles them `ray::…`."""
    return title.startswith(b"ray::") and not title.startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))


def _pss(pid: int) -> tuple[int, int]:
    """Bytes of a process that are its own, and its share of the shared ones."""
    try:
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    except (OSError, ValueError):
        return 0, 0
    shared = int(fields["Pss_Shmem"].split()[0]) * 1024
    return int(fields["Pss"].split()[0]) * 1024 - shared, shared
