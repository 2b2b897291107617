"""Shared fixtures: small worlds, datasets prepared without Ray, and the rule that a module leaves no process behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from recray.cluster import free_ports
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.dataset.worlds import World

SHARED = Path(os.environ.get("RECRAY_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def prepare_here(settings: Settings, as_of=None) -> Dataset:
    from recray.benchmark.data import one_by_one
    from recray.prepare.prepare import prepare

    return prepare(settings, as_of, each=one_by_one)


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    World(users=300, items=120, events_per_user=15, seed=1).write(folder)
    return folder


def world_overrides(folder: Path, root: Path) -> list[str]:
    return [
        f"data.events=[{folder / 'events'}]",
        f"data.items={folder / 'items.parquet'}",
        "data.context=[hour]",
        "data.features={category: categorical, brand: categorical, price: numeric, tags: multi, title: text}",
        f"storage.root={root}",
        "model.dim=16",
        "model.history=32",
        "model.feature_buckets=256",
        "train.epochs=2",
        "train.batch_positions=512",
        "train.warmup_steps=5",
        "evaluate.bootstrap=100",
        "score.k=20",
        "split.validation_users=0.5",
    ]


def private_overrides(folder: Path, root: Path) -> list[str]:
    """The same world with user-level privacy, its parts restricted to those whose norms are known."""
    return [
        *world_overrides(folder, root),
        "privacy.enabled=true",
        "privacy.epsilon=null",
        "privacy.sigma=0.5",
        "privacy.delta=1e-4",
        "privacy.steps=12",
        "privacy.report_every=5",
        "privacy.sampling_rate=0.2",
        "split.held_out=0.25",
        "model.preset=dp",
        "model.time_bias=false",
        "model.repeat=false",
        "model.prior_days=0",
        "train.average_decay=0",
        "data.features={}",
        "data.context=[]",
        "gates.must_beat=[]",
    ]


@pytest.fixture(scope="session")
def world_settings(world_folder, tmp_path_factory) -> Settings:
    return load_settings(None, world_overrides(world_folder, tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="session")
def world_dataset(world_settings) -> Dataset:
    return prepare_here(world_settings)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the data sets of {SHARED} are absent (set RECRAY_DATA)")
    return SHARED


@pytest.fixture(scope="module")
def own_home(tmp_path_factory) -> Iterator[Path]:
    """A home (and so a Ray token) of the module's own; afterwards no process that was started with it may be left."""
    home = tmp_path_factory.mktemp("home")
    resource_tracker.ensure_running()  # it is the whole session's, with the session's home
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        yield home
    deadline = time.monotonic() + 30
    while (left := _processes(home)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, f"processes left behind: {sorted(left)}"


@pytest.fixture(scope="session")
def ray_token() -> str:
    """The token of every Ray that this process starts: it keeps the first one that it saw, whatever lies in a later home."""
    return secrets.token_hex(32)


@pytest.fixture(scope="module")
def ray_session(own_home, ray_token) -> Iterator[None]:
    import ray

    from recray import cluster

    (own_home / ".ray").mkdir()
    (own_home / ".ray" / "auth_token").write_text(ray_token)
    cluster.start(2)
    yield
    ray.shutdown()


def _processes(home: Path) -> list[str]:
    """Processes other than this one that have this home."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            if f"HOME={home}".encode() in environment and command:
                found.append(f"{entry.name} {command[:80]}")
    return found


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """A real cluster for the nights of the chaos tests; its drivers give up a lost head after 10 s instead of 60."""
    from recray.benchmark.submit import Head

    with Head(tmp_path_factory.mktemp("home")) as head:
        head.environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"
        yield head


@pytest.fixture(scope="session")
def reference(head, world_folder, tmp_path_factory) -> dict[str, bytes]:
    """Every file of a night that nothing disturbed."""
    from harness import Night, assert_right, content

    root = tmp_path_factory.mktemp("reference")
    code, result = Night(world_folder, root, head.environment).end()
    assert (code, result["status"]) == (0, "ok"), result
    found = content(root)
    assert_right(root, found)
    return found


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, without a database."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")), *(Path(path) for path in [shutil.which("initdb")] if path)]
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql, or its bin folder in PATH)")
    binaries = found[-1].resolve().parent
    user = "nobody" if os.getuid() == 0 else None  # it does not run as root
    with tempfile.TemporaryDirectory(prefix="recray-postgres-") as folder:
        if user:
            shutil.chown(folder, user)
        port = str(free_ports(1)[0])
        data, log = f"{folder}/data", Path(folder, "log")
        made = [binaries / "initdb", "-D", data, "-U", "recray", "--auth=trust", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, user=user, cwd=folder)
        with open(log, "w") as file:
            serve = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", folder]
            server = subprocess.Popen(serve, stdout=file, stderr=file, user=user, cwd=folder)
        try:
            while subprocess.run([binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", port]).returncode:
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"postgresql://recray@127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)  # it ends the connections, then stops
            server.wait()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a Redis server of our own that acknowledges what is on disk."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("Redis is not installed (Debian's package redis-server)")
    with tempfile.TemporaryDirectory(prefix="recray-redis-") as folder:
        (port,) = free_ports(1)
        server = start_redis(binary, folder, port)
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()
        server.wait()


def start_redis(binary: str, folder: str, port: int) -> subprocess.Popen:
    """A Redis server with its files in a folder, once it takes connections."""
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    server = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while True:
        assert server.poll() is None and time.monotonic() < deadline
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            time.sleep(0.05)


@pytest.fixture(params=["sqlite", "redis"])
def log(request, tmp_path):
    """An empty log of the endpoint, in sqlite and in a real Redis."""
    from recray.state.log import open_log

    if request.param == "sqlite":
        found = open_log("sqlite", tmp_path)
    else:
        pytest.importorskip("redis").Redis.from_url(url := request.getfixturevalue("redis_server")).flushall()
        found = open_log(url, tmp_path)
    yield found
    found.close()
