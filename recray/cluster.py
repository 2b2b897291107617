"""The Ray session: connect to the cluster or start a small local one, and refuse to wait for room forever."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from recray.errors import ClusterError, RecrayError

LOCAL_OBJECT_STORE_BYTES = 400 << 20


def start(cpus: int | None = None) -> None:
    """Connect to the cluster of `RAY_ADDRESS` (in a submitted job Ray sets it); else start a Ray of our own on this machine.

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
    try:
        if address := os.environ.get("RAY_ADDRESS"):
            ray.init(address=address, **options)
        else:
            ray.init(
                address="local",
                num_cpus=cpus or max(2, len(os.sched_getaffinity(0))),
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **options,
            )
    except Exception as error:  # ray raises many kinds here
        raise ClusterError(f"Ray cannot be reached or started: {error}", "check RAY_ADDRESS, or unset it to start a local Ray") from error


def require(cpus: float, gpus: float, what: str, timeout_s: float) -> None:
    """Wait until the cluster has the resources free; raises ClusterError naming what holds the CPUs."""
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        if total.get("CPU", 0) < cpus or total.get("GPU", 0) < gpus:
            raise ClusterError(
                f"{what} needs {cpus:g} CPUs and {gpus:g} GPUs; the cluster has {total.get('CPU', 0):g} and {total.get('GPU', 0):g}",
                "add nodes, or lower train.workers, train.cpus_per_worker or score.actors",
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
    """Raise recray's own errors from Ray tasks as themselves, and Ray's as ClusterError."""
    from ray.exceptions import RayError

    try:
        yield
    except RecrayError:
        raise
    except Exception as error:
        if found := _own(error):
            raise found from None
        if isinstance(error, RayError):
            raise ClusterError(f"Ray lost the work: {error}", "repeat the job; it goes on where it stopped") from error
        raise


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
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None


def _holders() -> str:
    from ray.util.state import list_actors

    try:
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=5)
    except Exception:
        return "unknown (the state API did not answer)"
    held = [f"{a.class_name} ({cpus:g})" for a in actors if (cpus := (a.required_resources or {}).get("CPU", 0))]
    return ", ".join(held) or "tasks"


def _configure_data() -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else the cause of a failed task is lost on its way here
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its errors reach us as exceptions
