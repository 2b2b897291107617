"""`recray benchmark`: what recray costs, measured on this machine and kept as one JSON file a run."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recray import cluster
from recray.config import load_settings
from recray.dataset.worlds import World
from recray.errors import ClusterError
from recray.prepare.prepare import prepare, prepare_key
from recray.stages import JobResult, Say

MILLIONS = (1, 10)
SUBMITTED_EPOCHS = 3  # of both nights: enough to be a night, few enough to be quick
BASE_BYTES = 1_000_000_000  # the bound is this and 100 bytes an event


class MemoryPeak:
    """Samples, while it is entered, the memory of this process and Ray's workers below it, and the object store in use.

    Memory is PSS without shared memory (which holds the object store's pages, counted once by the store itself). Ray's
    daemons are left out.
    """

    def __init__(self, period_s: float = 0.2) -> None:
        self.period_s = period_s
        self.peak = 0
        self.peak_workers = 0
        self.peak_store = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryPeak:
        self._empty = _shared_memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(self.period_s):
            workers = sum(_private_pss(pid) for pid in [os.getpid(), *_ray_workers()])
            store = max(_shared_memory() - self._empty, 0)
            self.peak = max(self.peak, workers + store)
            self.peak_workers, self.peak_store = max(self.peak_workers, workers), max(self.peak_store, store)


def run(what: str, out: Path, say: Say) -> JobResult:
    """Run one benchmark and keep its figures as a JSON file in `out`."""
    started = time.monotonic()
    measure = {"prepare": measure_prepare, "submit": measure_submit}[what]
    with tempfile.TemporaryDirectory(prefix="recray-benchmark-") as folder:
        metrics = measure(Path(folder), say)
    result = JobResult(f"benchmark {what}", "ok", metrics=metrics, seconds=round(time.monotonic() - started, 2))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{what}-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({"benchmark": what, "metrics": metrics, **machine()}, indent=2, sort_keys=True) + "\n")
    result.outputs["result"] = str(path)
    return result


def measure_prepare(folder: Path, say: Say) -> dict[str, float]:
    """Peak memory of prepare at 1 and 10 million synthetic events, against 1 GB + 100 B an event.

    Needs a machine on which nothing else uses /dev/shm meanwhile.
    """
    metrics: dict[str, float] = {}
    for millions in MILLIONS:
        say(f"writing a world of {millions} million events")
        world = World(users=50_000 * millions, items=20_000, events_per_user=20.0)
        world.write(folder / f"world-{millions}")
        metrics.update(_measure(folder, millions, say))
    return metrics


def measure_submit(folder: Path, say: Say) -> dict[str, float]:
    """Seconds of the same night on the data that ships: by `recray nightly` on a local Ray, and by `recray submit nightly`
    on a cluster that runs already. Run in a checkout of recray."""
    overrides = ["--config", "jobs/configs/demo.yaml", f"train.epochs={SUBMITTED_EPOCHS}"]
    recray = [sys.executable, "-m", "recray.cli"]
    metrics: dict[str, float] = {}
    with Head(folder / "home") as head:
        for name, command, environment in (("local", "nightly", dict(os.environ)), ("submitted", "submit nightly", head.environment)):
            say(f"the night, {name}")
            begun = time.monotonic()
            words = [*recray, *command.split(), *overrides, f"storage.root={folder / name}"]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ClusterError(f"the {name} night ended {done.returncode}: {done.stderr[-600:]}", "run it by hand to see why")
            metrics[f"{name}_s"] = round(time.monotonic() - begun, 1)
    metrics["overhead_s"] = round(metrics["submitted_s"] - metrics["local_s"], 1)
    say(f"local {metrics['local_s']} s, submitted {metrics['submitted_s']} s: {metrics['overhead_s']:+} s")
    return metrics


class Head:
    """A Ray cluster of one node on this machine, with token authentication, up while it is entered.

    Parameters
    ----------
    home : its HOME, where its token lies
    cpus : logical CPUs of the node

    `environment` is what a process needs to reach it.
    """

    def __init__(self, home: Path, cpus: int = 2) -> None:
        self.home, self.cpus = home, cpus
        self.port, self.dashboard = free_port(), free_port()
        base = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        self._own = {**base, **quiet, "HOME": str(home), "RAY_AUTH_MODE": "token", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        reach = {"RAY_ADDRESS": f"127.0.0.1:{self.port}", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"}
        self.environment = {**self._own, **reach}

    def __enter__(self) -> Head:
        token = self.home / ".ray" / "auth_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        if not token.exists():
            token.write_text(secrets.token_hex(32))
            token.chmod(0o600)
        self.start()
        return self

    def start(self) -> None:
        """Bring it up. Raises ClusterError."""
        words = [f"--port={self.port}", f"--dashboard-port={self.dashboard}", f"--num-cpus={self.cpus}", "--node-ip-address=127.0.0.1"]
        words += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]  # other clusters may be here
        words += ["--object-store-memory", str(cluster.LOCAL_OBJECT_STORE_BYTES), "--disable-usage-stats", "--block"]
        with open(self.home / "head.log", "a") as log:
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *words]
            self.process = subprocess.Popen(command, env=self._own, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (_listens(self.dashboard) and _listens(self.port)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"the cluster did not start: {(self.home / 'head.log').read_text()[-400:]}", "look at that log")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its daemons do not heed SIGTERM
        self.process.wait()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _measure(folder: Path, millions: int, say: Say) -> dict[str, float]:
    import ray

    world = folder / f"world-{millions}"
    settings = load_settings(None, [f"data.events=[{world / 'events'}]", f"data.items={world / 'items.parquet'}", f"storage.root={folder / 'root'}"])
    with MemoryPeak() as memory:
        begun = time.monotonic()
        cluster.start()
        dataset = prepare(settings, prepare_key(settings, None), None)
        seconds = time.monotonic() - begun
        ray.shutdown()
    bound = BASE_BYTES + 100 * dataset.n_events
    say(
        f"{dataset.n_events} events: peak {memory.peak / 1e6:.0f} MB (workers {memory.peak_workers / 1e6:.0f}, object store "
        f"{memory.peak_store / 1e6:.0f}), bound {bound / 1e6:.0f} MB, {seconds:.0f} s with Ray's start"
    )
    prefix = f"{millions}m_"
    return {
        f"{prefix}events": dataset.n_events,
        f"{prefix}peak_bytes": memory.peak,
        f"{prefix}bound_bytes": bound,
        f"{prefix}peak_ratio": round(memory.peak / bound, 4),
        f"{prefix}seconds": round(seconds, 1),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("recray", "ray", "torch", "pyarrow", "numpy")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": {"cpus": os.cpu_count(), "memory_bytes": memory, "platform": platform.platform()},
        "versions": {name: version(name) for name in packages},
    }


def _ray_workers() -> list[int]:
    """Processes of Ray's workers below this process: Ray titles them `ray::…`."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue

    def below(pid: int) -> bool:
        while pid > 1:
            pid = parents.get(pid, 0)
            if pid == os.getpid():
                return True
        return False

    return [pid for pid, title in titles.items() if title.startswith(b"ray::") and not title.startswith(_DAEMONS) and below(pid)]


_DAEMONS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")


def _private_pss(pid: int) -> int:
    try:
        fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    except (OSError, ValueError):
        return 0
    return (int(fields["Pss"].split()[0]) - int(fields["Pss_Shmem"].split()[0])) * 1024


def _shared_memory() -> int:
    status = os.statvfs("/dev/shm")
    return (status.f_blocks - status.f_bfree) * status.f_frsize
