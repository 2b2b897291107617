"""Shared fixtures: small worlds, datasets prepared without Ray, and the rule that a module leaves no process
behind.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import hypothesis
import pytest
from preflight import absent, problems
from processes import running

from recray.cluster import free_ports
from recray.config import Settings, load_settings
from recray.dataset.reader import Dataset
from recray.testing.published import prepare_here
from recray.testing.synthetic import SyntheticShop

SHARED = Path(os.environ.get("RECRAY_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

hypothesis.settings.register_profile(
    "any machine", hypothesis.settings(), deadline=None
)  # no test waits for the clock
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session")
def synthetic_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    SyntheticShop(users=300, items=120, events_per_user=15, seed=1).write(folder)
    return folder


def synthetic_overrides(folder: Path, root: Path) -> list[str]:
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
        "train.threads=1",
        "train.batch_tokens=512",
        "train.warmup_steps=5",
        "evaluate.bootstrap=100",
        "score.k=20",
        "score.actors=1",
        "split.validation_users=0.5",
    ]


def private_overrides(folder: Path, root: Path) -> list[str]:
    """The same world with user-level privacy; what cannot be trained privately gives way by itself."""
    return [
        *synthetic_overrides(folder, root),
        "data.context=[]",
        "privacy.enabled=true",
        "privacy.cap=1000",
        "privacy.sigma=0.5",
        "privacy.delta=1e-4",
        "privacy.steps=12",
        "privacy.report_every=5",
        "privacy.sampling_rate=0.2",
        "split.holdout_users=0.25",
        "model.blocks=2",
        "data.shards=4",
        "train.learning_rate=0.001",
        "train.ema_decay=0",
        "train.warm_start=false",
        "promotion.must_beat=[]",
    ]


@pytest.fixture(scope="session")
def synthetic_settings(synthetic_folder, tmp_path_factory) -> Settings:
    return load_settings(None, synthetic_overrides(synthetic_folder, tmp_path_factory.mktemp("root")))


@pytest.fixture(scope="session")
def synthetic_dataset(synthetic_settings) -> Dataset:
    return prepare_here(synthetic_settings)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the data sets of {SHARED} are absent (set RECRAY_DATA)")
    return SHARED


def pytest_sessionstart() -> None:
    """Say at once what would make tests fail for no fault of the code."""
    if messages := problems():
        pytest.exit("the tests cannot run here:\n  " + "\n  ".join(messages), returncode=1)


ORDER = ("alone", "", "jobs", "own", "ray")
"""What must meet Ray first in this process comes first, what keeps one running last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by what their fixtures start, for the lanes of infra/test.sh, and order them."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "ray_session" in fixtures:
            item.add_marker("ray")
        elif "workspace" in fixtures or ("head" in fixtures and "own_home" not in fixtures):
            item.add_marker("jobs")
        elif "own_home" in fixtures:
            item.add_marker("own")
    items.sort(
        key=lambda item: min(
            (ORDER.index(mark.name) for mark in item.iter_markers() if mark.name in ORDER),
            default=ORDER.index(""),
        )
    )


@pytest.fixture(scope="module")
def own_home(tmp_path_factory) -> Iterator[Path]:
    """A home (and so a Ray token) of the module's own; afterwards no process that was started with it may be
    left.
    """
    home = tmp_path_factory.mktemp("home")
    resource_tracker.ensure_running()  # it is the whole session's, with the session's home
    with pytest.MonkeyPatch.context() as patch:
        _at_home(patch, home)
        yield home
    assert_nothing_left(home)


@pytest.fixture(scope="session")
def _session_home(tmp_path_factory) -> Iterator[Path]:
    """The home of the Ray that this process keeps; afterwards nothing of it may be left."""
    import ray

    from recray import cluster

    home = tmp_path_factory.mktemp("home")
    resource_tracker.ensure_running()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        _at_home(patch, home)
        cluster.start(2)
        yield home
        ray.shutdown()
    assert_nothing_left(home)


@pytest.fixture(scope="module")
def ray_session(_session_home) -> Iterator[None]:
    """A local Ray of two CPUs, for all modules that ask for one; a module leaves nothing running in it."""
    before = _processes(_session_home)
    with pytest.MonkeyPatch.context() as patch:
        _at_home(patch, _session_home)
        yield
    assert_nothing_left(_session_home, before)


RAYS_OWN = (
    "ray::ActorLocationTracker",
    "ray::IDLE",
    "ray::_AutoscalingCoordinatorActor",
    "ray::_StatsActor",
    "_private/workers/default_worker.py",
    "_private/workers/setup_worker.py",
)
"""Workers that Ray keeps for the next task, and actors of Ray Data's that live as long as Ray."""


QUICK_RAY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""Ray Train looks every two seconds whether a worker has something to say, and watches for machines that are
taken away: here, not.
"""


def _at_home(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name, value in QUICK_RAY.items():
        patch.setenv(name, value)
    patch.setenv("HOME", str(home))
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)


def assert_nothing_left(home: Path, before: dict[int, str] | None = None) -> None:
    """No process of a home is left; with `before`, none but those, and what Ray keeps for the next one."""
    from harness import wait_for

    def left() -> list[str]:
        # an actor lives as long as somebody has its handle, and the errors of a test are cycles that hold
        # some
        gc.collect()
        leftovers = {
            pid: title
            for pid, title in _processes(home).items()
            if before is None or (pid not in before and not any(own in title for own in RAYS_OWN))
        }
        return sorted(f"{pid} {title}" for pid, title in leftovers.items())

    wait_for("the processes that a module started to end", lambda: not left(), last_seen=left)


def _processes(home: Path) -> dict[int, str]:
    """Processes other than this one that have this home, with the beginning of their titles."""
    return {
        process.pid: title[:160]
        for process, other, title in running()
        if other == home and process.pid != os.getpid()
    }


@pytest.fixture(scope="session")
def head(tmp_path_factory):
    """A real cluster for the jobs of many modules; its drivers give up a lost head after 10 s instead of
    60."""
    from forked import begin_forks
    from harness import Cluster

    with Cluster(tmp_path_factory.mktemp("home"), dashboard=False) as head:
        head.environment.update(QUICK_RAY, RAY_gcs_rpc_server_reconnect_timeout_s="10")
        begin_forks(head.environment)
        yield head


@pytest.fixture(scope="session")
def workspace(head, synthetic_folder, tmp_path_factory):
    """A workspace where a nightly run ended, to be cut back to before any stage of it."""
    from harness import Workspace

    return Workspace(tmp_path_factory.mktemp("workspace"), synthetic_folder, head.environment)


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """A test leaves no job behind, which would hold the next one up, and no more threads of torch, which
    would get in each other's way.
    """
    torch = sys.modules.get("torch")
    threads = torch and torch.get_num_threads()
    yield
    if threads:
        torch.set_num_threads(threads)
    if "harness" in sys.modules:
        sys.modules["harness"].Job.end_all()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, without a database."""
    from harness import wait_for

    programs = [
        *sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
        *(Path(path) for path in [shutil.which("initdb")] if path),
    ]
    if not programs:
        absent("PostgreSQL is not installed (Debian's package postgresql, or its bin folder in PATH)")
    binaries = programs[-1].resolve().parent
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
            ready = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", port]
            wait_for(
                "PostgreSQL",
                lambda: not subprocess.run(ready).returncode,
                last_seen=log.read_text,
                ended=server.poll,
            )
            yield f"postgresql://recray@127.0.0.1:{port}"
        finally:
            server.send_signal(signal.SIGINT)  # it ends the connections, then stops
            server.wait()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """URL of a Redis server of our own that acknowledges what is on disk."""
    binary = shutil.which("redis-server")
    if binary is None:
        absent("Redis is not installed (Debian's package redis-server)")
    with tempfile.TemporaryDirectory(prefix="recray-redis-") as folder:
        (port,) = free_ports(1)
        server = start_redis(binary, folder, port)
        yield f"redis://127.0.0.1:{port}/0"
        server.terminate()
        server.wait()


def start_redis(binary: str, folder: str, port: int) -> subprocess.Popen:
    """A Redis server with its files in a folder, once it takes connections."""
    from harness import wait_for

    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        folder,
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
    ]
    server = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    with contextlib.closing(
        wait_for("Redis", lambda: socket.create_connection(("127.0.0.1", port), timeout=1), ended=server.poll)
    ):
        return server


@pytest.fixture(params=["sqlite", "redis"])
def log(request, tmp_path):
    """An empty log of the endpoint, in sqlite and in a real Redis."""
    from recray.events.store import open_log

    if request.param == "sqlite":
        event_log = open_log("sqlite", tmp_path)
    else:
        pytest.importorskip("redis").Redis.from_url(url := request.getfixturevalue("redis_server")).flushall()
        event_log = open_log(url, tmp_path)
    yield event_log
    event_log.close()
