"""The cost of Ray Serve in front of the same application: nightly lists, one client, the model in batches.

The same ASGI application runs under plain uvicorn, under Serve as recray starts it (HAProxy, direct access to
replicas) and under Serve's default settings, one after the other on this machine, with the same load from
another process. A reference is measured before and after what is compared with it, so that a machine that
gets slower does not count. Only Serve's defaults are measured once, last: they are several times slower.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import uvicorn

from recray.benchmark import Result
from recray.benchmark.checkouts import compare_side_by_side, environment_of
from recray.cluster import free_ports
from recray.config import Settings
from recray.dataset.reader import Dataset, assign_buckets
from recray.errors import ClusterError
from recray.inference import Predictor
from recray.inference.memory import keep_freed_memory
from recray.serving.api import RecommendRequest
from recray.serving.http import create_app
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query, rank_inputs
from recray.serving.service import Service
from recray.serving.sources import look_up_complete_list
from recray.serving.state import ServingState
from recray.snapshot.reader import Snapshot
from recray.snapshot.writer import KIND, publish, snapshot_path, write_part
from recray.stages import ProgressLog
from recray.storage import Storage, immutable_directory, open_immutable
from recray.testing.load import Load, load, post
from recray.testing.published import publish_synthetic

CLIENTS = 16
SECONDS = 5.0
WARM_S = 2.0
USERS, ITEMS, EVENTS = 2000, 3700, 220
HISTORY = 200
DEFAULTS = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
START_S = 180.0
RATE = 100.0  # requests a second, where the load is not at saturation
CHECKOUT_ROUNDS = 5  # compared with another checkout
TURNS, TURN_S = 4, 2.0  # of each checkout in a round
STATE_ROUNDS = 6
USERS_A_CALL = 100
TIMES, CONNECTIONS = 3, 128  # of the overload
ROUNDS = 3  # of one client and the Predictor, alternating
PREDICTIONS, REST_S = 300, 0.002  # of the Predictor alone
LISTED, USERS_A_BUCKET, LOOK_UPS = 10, 50_000, 100_000  # of the large snapshot


def measure_serve(folder: Path, progress: ProgressLog) -> Result:
    """`rps` of each server at 16 clients; `ms_over_asgi` = 1000 / rps - 1000 / rps of uvicorn; ratios of
    recray's to that of Serve's defaults and of uvicorn.

    `one_client_over_predictor_ms`: the endpoint's overhead over the median of a real-time recommendation
    (median of `ROUNDS`). The Predictor is measured before and after each, and rests between two
    recommendations as long as behind one client, since that alone makes it slower.
    `batching_ratio`: real-time responses a second with batching over those without, before and after it.
    `p99_over_p50`: of the real-time responses at 16 clients.
    `users_ratio`, `users_ratio_realtime`: users a second in calls of `USERS_A_CALL` users, over those in
    calls of one.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",)
    )
    lists = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(USERS)]
    realtime = [
        post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)
    ]
    many = {
        mode: [
            post("/v1/recommend", {"users": list(range(first, first + USERS_A_CALL)), "k": 10, "mode": mode})
            for first in range(0, USERS - USERS_A_CALL, USERS_A_CALL)
        ]
        for mode in ("auto", "realtime")
    }
    metrics: Result = {}
    with running_serve(storage, {}, "serve.max_batch=1") as port:
        unbatched = [_load_fully(port, realtime, "recray serve, real time, one at a time", progress)]
    with _run_uvicorn(storage) as port:
        first = _load_fully(port, lists, "uvicorn, nightly lists", progress)
    with running_serve(storage, {}) as port:
        own = _load_fully(port, lists, "recray serve, nightly lists", progress)
        one_client = load(port, lists, 1, SECONDS)
        predictor_ms, one_ms = [_predictor_ms(storage)], list[float]()
        for _ in range(ROUNDS):
            one_ms.append(load(port, realtime, 1, WARM_S).ms(50))
            predictor_ms.append(_predictor_ms(storage))
        batched = _load_fully(port, realtime, "recray serve, real time", progress)
        calls = {
            mode: _load_fully(port, many[mode], f"{USERS_A_CALL} users a call, {mode}", progress)
            for mode in many
        }
    with _run_uvicorn(storage) as port:
        last = _load_fully(port, lists, "uvicorn, repeated", progress)
    with running_serve(storage, {}, "serve.max_batch=1") as port:
        unbatched.append(
            _load_fully(port, realtime, "recray serve, real time, one at a time, repeated", progress)
        )
    with running_serve(storage, DEFAULTS) as port:
        default = _load_fully(port, lists, "Serve's default settings, nightly lists", progress)
    unbatched_ms = float(np.mean([1000 / result.per_s for result in unbatched]))
    asgi_ms = (1000 / first.per_s + 1000 / last.per_s) / 2
    metrics |= {
        "rps": round(own.per_s, 1),
        "rps_uvicorn": [round(first.per_s, 1), round(last.per_s, 1)],
        "rps_default": round(default.per_s, 1),
        "ms_over_asgi": round(1000 / own.per_s - asgi_ms, 3),
        "rps_ratio_default": round(own.per_s / default.per_s, 2),
        "rps_ratio_uvicorn": round(own.per_s * asgi_ms / 1000, 3),
        "lookup_one_client_p50_ms": round(one_client.ms(50), 2),
        "realtime_one_client_p50_ms": [round(ms, 2) for ms in one_ms],
        "predictor_p50_ms": [round(ms, 2) for ms in predictor_ms],
        "one_client_over_predictor_ms": round(
            float(np.median(np.array(one_ms) - (np.array(predictor_ms[:-1]) + predictor_ms[1:]) / 2)), 2
        ),
        "realtime_rps": round(batched.per_s, 1),
        "realtime_rps_unbatched": [round(result.per_s, 1) for result in unbatched],
        "batching_ratio": round(batched.per_s * unbatched_ms / 1000, 2),
        "users_ratio": round(USERS_A_CALL * calls["auto"].per_s / own.per_s, 2),
        "users_ratio_realtime": round(USERS_A_CALL * calls["realtime"].per_s / batched.per_s, 2),
        "realtime_p50_ms": round(batched.ms(50), 2),
        "realtime_p99_ms": round(batched.ms(99), 2),
        "p99_over_p50": round(batched.ms(99) / batched.ms(50), 2),
        "others": {
            str(status): count
            for result in (own, batched, *calls.values(), *unbatched, default)
            for status, count in result.other_statuses.items()
        },
    }
    ratios = (
        f"{metrics['rps_ratio_default']} times Serve's defaults; batching {metrics['batching_ratio']} times"
    )
    progress(f"{metrics['ms_over_asgi']} ms over uvicorn, {ratios}")
    return metrics


def measure_against(folder: Path, other: Path, progress: ProgressLog) -> dict[str, float]:
    """Responses a second at `CLIENTS` clients, here and in another checkout: nightly lists, real time, and
    users with recent events. Both endpoints run, and get `TURNS` loads in turns, so that a machine whose
    speed changes does so for both; in each round they are started anew.

    Raises SettingsError for a folder that is not a checkout.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",)
    )
    lists = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(USERS)]
    kinds = {
        "lists": lists,
        "realtime": [
            post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)
        ],
    }
    events = [
        post("/v1/events", {"user_id": user, "events": [{"item_id": f"i{n:07d}"} for n in range(1, 4)]})
        for user in range(200)
    ]
    kinds["recent"] = lists[:200]

    def measure(order: Sequence[Path]) -> dict[Path, dict[str, float]]:
        per_s = {checkout: dict.fromkeys(kinds, 0.0) for checkout in order}
        with ExitStack() as stack:
            ports = {}
            for number, checkout in enumerate(order):
                root = folder / f"workspace {number}"
                shutil.rmtree(root, ignore_errors=True)
                shutil.copytree(storage.root, root)
                running = running_serve(Storage(root), environment_of(checkout))
                ports[checkout] = stack.enter_context(running)
                load(ports[checkout], events, 1, SECONDS)
                load(ports[checkout], lists, CLIENTS, WARM_S)
            for turn in range(TURNS):
                for checkout in order if turn % 2 else order[::-1]:
                    load(ports[checkout], lists, CLIENTS, WARM_S)  # it was idle
                    for name, requests in kinds.items():
                        per_s[checkout][name] += (
                            load(ports[checkout], requests, CLIENTS, TURN_S).per_s / TURNS
                        )
        return per_s

    return compare_side_by_side(other, "serving", CHECKOUT_ROUNDS, measure, "responses/s", progress)


def measure_state(folder: Path, progress: ProgressLog) -> Result:
    """The effect of a slow read of recent events on other users, at `RATE` of their requests a second.

    `others_p99_ratio`: their p99 while one client sends requests for a user with 1,000 recent events, over
    their p99 without it, of `STATE_ROUNDS` turns each. With Redis stopped (SIGSTOP): `hung_p99_ms`,
    `hung_max_ms`, and `hung_degraded`, the share of the responses that report it; these need redis-server.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",)
    )
    light = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(1, 500)]
    heavy = [post("/v1/recommend", {"user_id": 0, "k": 10})]
    events = [{"item_id": f"i{n % ITEMS + 1:07d}"} for n in range(100)]
    with running_serve(storage, {}) as port:
        load(port, [post("/v1/events", {"user_id": 0, "events": events})] * 10, 1, WARM_S)
        load(port, light, CLIENTS, WARM_S)
        alone, beside, heavy_per_s = [], [], []
        for _ in range(STATE_ROUNDS):
            alone.append(load(port, light, CLIENTS, SECONDS, rate=RATE))
            with ThreadPoolExecutor(1) as pool:
                heavy_load = pool.submit(load, port, heavy, 1, SECONDS + 1)
                time.sleep(0.5)
                beside.append(load(port, light, CLIENTS, SECONDS, rate=RATE))
                heavy_per_s.append(heavy_load.result().per_s)
    p99_ms, beside_ms = (
        float(np.percentile(np.concatenate([one.latency_s for one in loads]), 99) * 1000)
        for loads in (alone, beside)
    )
    progress(
        f"p99 of other users: {p99_ms:.1f} ms, {beside_ms:.1f} ms with a user of 1,000 events, who is "
        f"served {np.mean(heavy_per_s):.0f} times a second; {sum(len(one.latency_s) for one in alone):,} "
        "requests each"
    )
    metrics: Result = {
        "others_p99_ms": round(p99_ms, 1),
        "others_p99_beside_ms": round(beside_ms, 1),
        "others_p99_ratio": round(beside_ms / p99_ms, 3),
        "others_p99_by_round_ms": [
            [round(one.ms(99), 1) for one in pair] for pair in zip(alone, beside, strict=True)
        ],
        "heavy_per_s": round(float(np.mean(heavy_per_s)), 1),
    }
    return metrics | _measure_hung_redis(storage, light, folder, progress)


def _measure_hung_redis(
    storage: Storage, requests: Sequence[bytes], folder: Path, progress: ProgressLog
) -> Result:
    """The load while Redis does not respond."""
    binary = shutil.which("redis-server")
    if binary is None:
        progress("redis-server is not installed: the hanging store is not measured")
        return {}
    (port,) = free_ports(1)
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
    ]
    redis = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    try:
        with running_serve(storage, {}, f"serve.state=redis://127.0.0.1:{port}/0") as endpoint:
            load(endpoint, requests, CLIENTS, WARM_S)
            redis.send_signal(signal.SIGSTOP)
            hung = load(endpoint, requests, CLIENTS, SECONDS, rate=RATE, keep=True)
            redis.send_signal(signal.SIGCONT)
    finally:
        redis.send_signal(signal.SIGCONT)
        redis.terminate()
        redis.wait()
    degraded = float(np.mean([b'"state"' in body for body in hung.bodies]))
    progress(
        f"Redis hangs: p99 {hung.ms(99):.0f} ms, maximum {hung.ms(100):.0f} ms, {degraded:.0%} report it"
    )
    return {
        "hung_p99_ms": round(hung.ms(99), 1),
        "hung_max_ms": round(hung.ms(100), 1),
        "hung_degraded": round(degraded, 4),
    }


def measure_overload(folder: Path, progress: ProgressLog) -> Result:
    """Real-time requests at `TIMES` the capacity, in an open loop: `p99_ratio` of the accepted ones over that
    at capacity (mean of before and after).

    `wrong`: responses other than 200 and 503 with Retry-After, or with a list that is no user's.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",)
    )
    realtime = [
        post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)
    ]
    with running_serve(storage, {}) as port:
        capacity = _load_fully(port, realtime, "at capacity", progress)
        overload = load(port, realtime, CONNECTIONS, SECONDS, rate=TIMES * capacity.per_s, keep=True)
        after = _load_fully(port, realtime, "after the overload", progress)
    calm_ms = (capacity.ms(99) + after.ms(99)) / 2
    wrong = (
        sum(overload.other_statuses.values())
        + len(overload.refused_s)
        - overload.retry_after
        + _count_wrong_lists(storage, overload.bodies)
    )
    metrics = {
        "capacity_rps": round(capacity.per_s, 1),
        "capacity_p99_ms": [round(capacity.ms(99), 1), round(after.ms(99), 1)],
        "offered_rps": round(TIMES * capacity.per_s, 1),
        "accepted_rps": round(overload.per_s, 1),
        "accepted_p50_ms": round(overload.ms(50), 1),
        "accepted_p99_ms": round(overload.ms(99), 1),
        "p99_ratio": round(overload.ms(99) / calm_ms, 2),
        "refused": len(overload.refused_s),
        "refused_p50_ms": round(float(np.median(overload.refused_s) * 1000), 2)
        if len(overload.refused_s)
        else None,
        "wrong": wrong,
        "afterwards_rps": round(after.per_s, 1),
    }
    progress(
        f"at {TIMES} times the capacity: {metrics['accepted_rps']} a second accepted, {metrics['refused']} "
        f"refused with Retry-After, p99 ratio {metrics['p99_ratio']}, {wrong} wrong responses"
    )
    return metrics


def _count_wrong_lists(storage: Storage, bodies: Sequence[bytes]) -> int:
    """Number of responses whose list is not the model's for any user."""
    state = ServingState.load(storage)
    lists = rank_inputs(
        [
            bind_query(resolve_query(RecommendRequest(user_id=user, k=10), state), state)
            for user in range(USERS)
        ]
    )
    expected = {tuple(sorted(item for item, _ in ranked.items)) for ranked in lists}
    served = (tuple(sorted(item["item_id"] for item in json.loads(body)["items"])) for body in bodies)
    return sum(items not in expected for items in served)


def measure_users(folder: Path, users: int, progress: ProgressLog) -> Result:
    """A snapshot of `users` users: seconds to load it, private memory above that of a small one, and
    milliseconds of a look-up.
    """
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=20)
    small = _measure_loading(storage, USERS)
    started = time.perf_counter()
    _publish_large_snapshot(storage, users)
    progress(f"a snapshot of {users:,} users in {time.perf_counter() - started:.0f} s")
    large = _measure_loading(storage, users)
    metrics = {
        "users": users,
        "snapshot_bytes": sum(file.stat().st_size for file in Snapshot.latest(storage).path.iterdir()),
        "load_s": round(large["load_s"], 2),
        "private_bytes": round(large["private_bytes"] - small["private_bytes"]),
        "lookup_p50_ms": round(large["p50_ms"], 4),
        "lookup_p99_ms": round(large["p99_ms"], 4),
    }
    progress(
        f"loaded in {metrics['load_s']} s, {metrics['private_bytes'] / 1e6:+.0f} MB private, a look-up "
        f"{metrics['lookup_p99_ms']} ms (p99)"
    )
    return metrics


def _publish_large_snapshot(storage: Storage, users: int) -> None:
    """Publish batch recommendations with lists of `users` users."""
    previous = Snapshot.latest(storage)
    buckets = max(previous.buckets, users // USERS_A_BUCKET)
    fields = {
        name: value
        for name, value in previous.manifest.items()
        if name not in ("files", "sha256", "kind", "format_version", "run_key")
    }
    fields |= {"buckets": buckets, "users": users, "k": LISTED, "as_of_s": previous.as_of_s + 1}
    ids = np.arange(users)
    bucket_of_user = assign_buckets(ids.tolist(), buckets)
    order = np.argsort(bucket_of_user, kind="stable")
    ends = np.searchsorted(bucket_of_user[order], np.arange(buckets + 1))
    items = pa.array(Dataset.open(storage.root / previous.manifest["dataset"]).items["item_id"].to_pylist())
    path = snapshot_path(storage, previous.as_of_s + 1, "grown")
    with immutable_directory(path, KIND, "grown", fields) as folder:
        for bucket in range(buckets):
            bucket_ids = ids[order[ends[bucket] : ends[bucket + 1]]]
            shown = items.take(pa.array(((bucket_ids[:, None] * 7 + np.arange(LISTED)) % len(items)).ravel()))
            offsets = pa.array(np.arange(len(bucket_ids) + 1, dtype=np.int32) * LISTED)
            scores = pa.array(np.tile(np.linspace(1, 0, LISTED, dtype=np.float32), len(bucket_ids)))
            write_part(
                folder, bucket, pa.array(bucket_ids), shown, offsets, scores, ["model"] * len(bucket_ids)
            )
    publish(storage, path, open_immutable(path, KIND, verify=False))


def _measure_loading(storage: Storage, users: int) -> dict[str, float]:
    """Times and memory of a separate process that loads the published snapshot."""
    code = f"from recray.benchmark.serve import look_up; look_up({str(storage.root)!r}, {users})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return result


def look_up(root: str, users: int) -> None:
    """Load the published snapshot, look up users at random, and print times and memory."""
    started = time.perf_counter()
    state = ServingState.load(Storage(root))
    load_s = time.perf_counter() - started
    elapsed_s = []
    for user in np.random.default_rng(0).integers(0, users, LOOK_UPS).tolist():
        request = RecommendRequest(user_id=user, k=10)
        started = time.perf_counter()
        assert look_up_complete_list(resolve_query(request, state), state) is not None
        elapsed_s.append(time.perf_counter() - started)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = sum(
        int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous")
    )  # without mapped files, which are shared
    p50, p99 = np.percentile(elapsed_s, [50, 99]) * 1000
    print(json.dumps({"load_s": load_s, "private_bytes": private, "p50_ms": p50, "p99_ms": p99}))


def _load_fully(port: int, requests: Sequence[bytes], name: str, progress: ProgressLog) -> Load:
    """The load at saturation, after a warm-up."""
    load(port, requests, CLIENTS, WARM_S)
    result = load(port, requests, CLIENTS, SECONDS)
    progress(f"{name}: {result.per_s:.0f} a second, p50 {result.ms(50):.1f} ms, p99 {result.ms(99):.1f} ms")
    return result


def _predictor_ms(storage: Storage) -> float:
    """Median milliseconds of a recommendation by the model, without a server."""
    torch.set_num_threads(1)
    keep_freed_memory()
    state, elapsed_s = ServingState.load(storage), []
    for user in range(PREDICTIONS):
        inputs = bind_query(resolve_query(RecommendRequest(user_id=user, k=10), state), state)
        started = time.perf_counter()
        _recommend(state.predictor, inputs.history, inputs.now_s, inputs.context)
        elapsed_s.append(time.perf_counter() - started)
        time.sleep(REST_S)
    return float(np.median(elapsed_s[50:]) * 1000)


def _recommend(predictor: Predictor, history: Any, now: int, context: Any) -> None:
    predictor.recommend([history], 10, now=now, context=[context])


@contextmanager
def _run_uvicorn(storage: Storage) -> Iterator[int]:
    (port,) = free_ports(1)
    code = f"from recray.benchmark.serve import serve_plainly; serve_plainly({str(storage.root)!r}, {port})"
    with _running([sys.executable, "-c", code], dict(os.environ), port):
        yield port


def serve_plainly(root: str, port: int) -> None:
    """The application under uvicorn alone, until interrupted."""
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = Settings()
    service = Service(Storage(root), settings.serve, settings.score)
    uvicorn.run(create_app(service), host="127.0.0.1", port=port, log_level="error", access_log=False)
    service.close()


@contextmanager
def running_serve(storage: Storage, environment: dict[str, str], *overrides: str) -> Iterator[int]:
    """`recray serve` on a published snapshot, from its first response on; its port."""
    (port,) = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "recray.cli",
        "serve",
        f"storage.root={storage.root}",
        f"serve.port={port}",
        *overrides,
    ]
    with _running(command, {**os.environ, **environment}, port):
        yield port


@contextmanager
def _running(command: list[str], environment: dict[str, str], port: int) -> Iterator[None]:
    """A server process, from its first response to the end of the context. Raises ClusterError."""
    server = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_S
        while not _is_healthy(port):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise ClusterError(
                    f"the endpoint did not start: {server.communicate()[1][-600:]}",
                    "run `recray serve` manually to see why",
                )
            time.sleep(0.2)
        yield
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.communicate()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
