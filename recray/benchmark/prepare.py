"""Peak memory of prepare, and its events a second compared with another checkout of recray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from recray.benchmark.checkouts import compare_checkouts, environment_of
from recray.errors import RecrayError
from recray.stages import ProgressLog
from recray.testing.synthetic import SyntheticShop

MILLIONS = (1, 10)
ROUNDS = 9
PERIOD_S = 0.2
BASE_BYTES = 1_000_000_000  # the bound is this and 100 bytes an event


class MemoryPeak:
    """Peak memory of a job: of its own processes and Ray's workers, and of its object store.

    Memory is PSS: private pages of the job and the workers (without Ray's daemons), and shared pages of all
    descendants of this process, so that other users of /dev/shm do not count.
    """

    def __init__(self) -> None:
        self.total = 0
        self.workers = 0
        self.store = 0

    def sample(self, job: int) -> None:
        """Measure once; `job` is the process id of the job, which may have forked itself."""
        titles = _find_descendants()
        memory = {pid: _read_pss(pid) for pid in titles}
        workers = sum(
            memory[pid][0] for pid, title in titles.items() if title == titles.get(job) or _is_worker(title)
        )
        store = sum(shared for _, shared in memory.values())
        self.total = max(self.total, workers + store)
        self.workers, self.store = max(self.workers, workers), max(self.store, store)


def measure_prepare(folder: Path, progress: ProgressLog) -> dict[str, float]:
    """Peak memory of prepare at 1 and 10 million synthetic events, and the bound of 1 GB + 100 B an event."""
    metrics: dict[str, float] = {}
    for millions in MILLIONS:
        progress(f"writing a synthetic data set of {millions} million events")
        shop = SyntheticShop(users=50_000 * millions, items=20_000, events_per_user=20.0)
        shop.write(folder / f"shop-{millions}")
        metrics.update(_measure_memory(folder, millions, progress))
    return metrics


def measure_against(folder: Path, other: Path, progress: ProgressLog) -> dict[str, float]:
    """Events a second of prepare at 1 million synthetic events, here and in another checkout, alternating,
    without the start of Ray and imports.

    Raises SettingsError for a folder that is not a checkout.
    """
    SyntheticShop(users=50_000, items=20_000, events_per_user=20.0).write(folder / "shop")
    return compare_checkouts(
        other, "prepare", ROUNDS, lambda checkout: {"": _measure_rate(folder, checkout)}, "events/s", progress
    )


_CHILD = """
import json, shutil, sys, time
from recray import cluster
from recray.config import load_settings
from recray.prepare.prepare import prepare
folder = sys.argv[1]
settings = load_settings(None,
[f"data.events=[{folder}/shop/events]", f"data.items={folder}/shop/items.parquet",
f"storage.root={folder}/root"])
cluster.start()
import ray
ray.get(ray.remote(lambda: None).remote())
started = time.monotonic()
dataset = prepare(settings, None)
print(json.dumps(dataset.n_events / (time.monotonic() - started)))
shutil.rmtree(f"{folder}/root")
"""


def _measure_rate(folder: Path, checkout: Path) -> float:
    """Events a second of one prepare by a checkout's code, in a separate process."""
    process = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder)],
        env=environment_of(checkout),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RecrayError(
            f"prepare of {checkout} ended with exit code {process.returncode}: {process.stderr[-2000:]}"
        )
    return float(json.loads(process.stdout.splitlines()[-1]))


def _measure_memory(folder: Path, millions: int, progress: ProgressLog) -> dict[str, float]:
    """Memory and seconds of `recray prepare` as a person runs it."""
    data, memory, started = folder / f"shop-{millions}", MemoryPeak(), time.monotonic()
    command = [
        sys.executable,
        "-c",
        "from recray.cli import main; main()",
        "prepare",
        f"storage.root={folder / 'root'}",
    ]
    command += [f"data.events=[{data / 'events'}]", f"data.items={data / 'items.parquet'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, errors = job.communicate(timeout=PERIOD_S)
                break
            memory.sample(job.pid)
    if job.returncode:
        raise RecrayError(f"prepare ended with exit code {job.returncode}: {errors[-2000:]}")
    seconds, events = time.monotonic() - started, json.loads(output.splitlines()[-1])["metrics"]["events"]
    bound = BASE_BYTES + 100 * events
    progress(
        f"{events} events: peak {memory.total / 1e6:.0f} MB (workers {memory.workers / 1e6:.0f}, object "
        f"store {memory.store / 1e6:.0f}), bound {bound / 1e6:.0f} MB, {seconds:.0f} s with Ray's start"
    )
    prefix = f"{millions}m_"
    return {
        f"{prefix}events": events,
        f"{prefix}peak_bytes": memory.total,
        f"{prefix}bound_bytes": bound,
        f"{prefix}peak_ratio": round(memory.total / bound, 4),
        f"{prefix}seconds": round(seconds, 1),
    }


def _find_descendants() -> dict[int, bytes]:
    """The descendants of this process, and their command lines."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])

    def is_descendant(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == os.getpid():
                return True
        return False

    return {pid: title for pid, title in titles.items() if is_descendant(pid)}


def _is_worker(title: bytes) -> bool:
    """Whether a process is a worker of Ray's, which titles them `ray::…`."""
    return title.startswith(b"ray::") and not title.startswith(
        (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
    )


def _read_pss(pid: int) -> tuple[int, int]:
    """Private bytes of a process, and its share of shared bytes."""
    try:
        fields = dict(
            line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        )
    except (OSError, ValueError):
        return 0, 0
    shared = int(fields["Pss_Shmem"].split()[0]) * 1024
    return int(fields["Pss"].split()[0]) * 1024 - shared, shared
