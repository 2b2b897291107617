"""What Ray Serve costs before the same application: nightly look-ups, one client, and the model in batches.

The same ASGI application runs under plain uvicorn, under Serve as recray starts it (HAProxy, replicas reached directly) and under Serve's
default settings, one after the other on this machine, each asked by the same load from one other process. What another way is held
against is measured before and after it, so that a machine that gets slower in between does not count; but for Serve's defaults, which are
asked last: they are several times slower.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recray.benchmark.checkouts import beside, environment_of
from recray.cluster import free_ports
from recray.dataset.reader import Dataset, bucket_of
from recray.errors import ClusterError
from recray.inference import Predictor
from recray.inference.memory import keep_freed_memory
from recray.serving.api import RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind, rank_inputs
from recray.serving.sources import look_up_complete_list
from recray.serving.state import ServingState
from recray.snapshot.reader import Snapshot
from recray.snapshot.writer import KIND, publish, snapshot_path, write_part
from recray.stages import Say
from recray.storage import Storage, open_sealed, sealed_directory
from recray.testing.load import Load, load, post
from recray.testing.published import publish_synthetic

CLIENTS = 16
SECONDS = 5.0
WARM_S = 2.0
USERS, ITEMS, EVENTS = 2000, 3700, 220
HISTORY = 200
DEFAULTS = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
START_S = 180.0
RATE = 100.0  # requests a second, where it is not as many as can be
AGAINST = 5  # rounds beside another checkout
TIMES, CONNECTIONS = 3, 128  # of the overload
ROUNDS = 3  # of one client and the Predictor, in turns
TURNS, REST_S = 300, 0.002  # of the Predictor alone
LISTED, USERS_A_BUCKET, LOOK_UPS = 10, 50_000, 100_000  # of the large snapshot


def measure_serve(folder: Path, say: Say) -> dict[str, Any]:
    """`rps` of each way at 16 clients; `ms_over_asgi` = 1000 / rps - 1000 / rps of uvicorn; ratios of ours over Serve's defaults and uvicorn's.

    `one_client_over_predictor_ms`: what the endpoint adds to the median of a real-time answer (median of `ROUNDS`); the Predictor is asked
    before and after each, and rests as long between two answers as behind one client, since that alone makes it slower.
    `batching_ratio`: real-time answers a second with batching over those without, before and afterwards. `p99_over_p50`: of the real-time
    answers at 16 clients.
    """
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",))
    lists = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(USERS)]
    live = [post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)]
    metrics: dict[str, Any] = {}
    with running_serve(storage, {}, "serve.max_batch=1") as port:
        one_by_one = [_at_saturation(port, live, "recray serve, real time, one at a time", say)]
    with _uvicorn(storage) as port:
        first = _at_saturation(port, lists, "uvicorn, nightly lists", say)
    with running_serve(storage, {}) as port:
        ours = _at_saturation(port, lists, "recray serve, nightly lists", say)
        alone = load(port, lists, 1, SECONDS)
        predictor_ms, one_ms = [_predictor_ms(storage)], list[float]()
        for _ in range(ROUNDS):
            one_ms.append(load(port, live, 1, WARM_S).ms(50))
            predictor_ms.append(_predictor_ms(storage))
        batched = _at_saturation(port, live, "recray serve, real time", say)
    with _uvicorn(storage) as port:
        last = _at_saturation(port, lists, "uvicorn again", say)
    with running_serve(storage, {}, "serve.max_batch=1") as port:
        one_by_one.append(_at_saturation(port, live, "recray serve, real time, one at a time again", say))
    with running_serve(storage, DEFAULTS) as port:
        default = _at_saturation(port, lists, "Serve's default settings, nightly lists", say)
    unbatched_ms = float(np.mean([1000 / found.per_s for found in one_by_one]))
    asgi_ms = (1000 / first.per_s + 1000 / last.per_s) / 2
    metrics |= {
        "rps": round(ours.per_s, 1),
        "rps_uvicorn": [round(first.per_s, 1), round(last.per_s, 1)],
        "rps_default": round(default.per_s, 1),
        "ms_over_asgi": round(1000 / ours.per_s - asgi_ms, 3),
        "rps_ratio_default": round(ours.per_s / default.per_s, 2),
        "rps_ratio_uvicorn": round(ours.per_s * asgi_ms / 1000, 3),
        "lookup_one_client_p50_ms": round(alone.ms(50), 2),
        "realtime_one_client_p50_ms": [round(ms, 2) for ms in one_ms],
        "predictor_p50_ms": [round(ms, 2) for ms in predictor_ms],
        "one_client_over_predictor_ms": round(float(np.median(np.array(one_ms) - (np.array(predictor_ms[:-1]) + predictor_ms[1:]) / 2)), 2),
        "realtime_rps": round(batched.per_s, 1),
        "realtime_rps_unbatched": [round(found.per_s, 1) for found in one_by_one],
        "batching_ratio": round(batched.per_s * unbatched_ms / 1000, 2),
        "realtime_p50_ms": round(batched.ms(50), 2),
        "realtime_p99_ms": round(batched.ms(99), 2),
        "p99_over_p50": round(batched.ms(99) / batched.ms(50), 2),
        "others": {str(status): count for found in (ours, batched, *one_by_one, default) for status, count in found.others.items()},
    }
    ratios = f"{metrics['rps_ratio_default']} times Serve's defaults; batching {metrics['batching_ratio']} times"
    say(f"{metrics['ms_over_asgi']} ms over uvicorn, {ratios}")
    return metrics


def measure_against(folder: Path, other: Path, say: Say) -> dict[str, float]:
    """Responses a second at `CLIENTS` clients here and of another checkout, in turns: nightly lists, real time, and users with recent events.

    Raises SettingsError for a folder that is no checkout.
    """
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",))
    lists = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(USERS)]
    kinds = {"lists": lists, "realtime": [post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)]}
    told = [post("/v1/events", {"user_id": user, "events": [{"item_id": f"i{n:07d}"} for n in range(1, 4)]}) for user in range(200)]
    kinds["recent"] = lists[:200]

    def measure(checkout: Path) -> dict[str, float]:
        for file in (storage.root / "state").glob("log.sqlite*"):
            file.unlink()
        with running_serve(storage, environment_of(checkout)) as port:
            load(port, told, 1, SECONDS)
            load(port, lists, CLIENTS, WARM_S)
            return {name: load(port, requests, CLIENTS, SECONDS).per_s for name, requests in kinds.items()}

    return beside(other, "serving", AGAINST, measure, "responses/s", say)


def measure_state(folder: Path, say: Say) -> dict[str, Any]:
    """What a slow read of recent events does to everybody else, at `RATE` requests a second of other users.

    `others_p99_ratio`: their p99 while one client asks again and again for a user with 1,000 recent events, over their p99 before and after it.
    With Redis stopped (SIGSTOP) while they ask: `hung_p99_ms`, `hung_max_ms`, and `hung_degraded`, the share of the responses that say so; without
    redis-server these are left out.
    """
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",))
    others = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(1, 500)]
    heavy = [post("/v1/recommend", {"user_id": 0, "k": 10})]
    events = [{"item_id": f"i{n % ITEMS + 1:07d}"} for n in range(100)]
    with running_serve(storage, {}) as port:
        load(port, [post("/v1/events", {"user_id": 0, "events": events})] * 10, 1, WARM_S)
        load(port, others, CLIENTS, WARM_S)
        before = load(port, others, CLIENTS, SECONDS, rate=RATE)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(load, port, heavy, 1, SECONDS + 1)
            time.sleep(0.5)
            beside = load(port, others, CLIENTS, SECONDS, rate=RATE)
            mine = asking.result()
        after = load(port, others, CLIENTS, SECONDS, rate=RATE)
    alone = (before.ms(99) + after.ms(99)) / 2
    say(f"others' p99: {alone:.1f} ms, {beside.ms(99):.1f} ms beside a user of 1,000 events, who is served {mine.per_s:.0f} times a second")
    metrics: dict[str, Any] = {
        "others_p99_ms": [round(before.ms(99), 1), round(after.ms(99), 1)],
        "others_p99_beside_ms": round(beside.ms(99), 1),
        "others_p99_ratio": round(beside.ms(99) / alone, 3),
        "heavy_per_s": round(mine.per_s, 1),
    }
    return metrics | _hung(storage, others, folder, say)


def _hung(storage: Storage, others: Sequence[bytes], folder: Path, say: Say) -> dict[str, Any]:
    """The load while Redis does not answer."""
    binary = shutil.which("redis-server")
    if binary is None:
        say("without redis-server: a store that hangs is left out")
        return {}
    (port,) = free_ports(1)
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
    redis = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
    try:
        with running_serve(storage, {}, f"serve.state=redis://127.0.0.1:{port}/0") as endpoint:
            load(endpoint, others, CLIENTS, WARM_S)
            redis.send_signal(signal.SIGSTOP)
            hung = load(endpoint, others, CLIENTS, SECONDS, rate=RATE, keep=True)
            redis.send_signal(signal.SIGCONT)
    finally:
        redis.send_signal(signal.SIGCONT)
        redis.terminate()
        redis.wait()
    degraded = float(np.mean([b'"state"' in body for body in hung.bodies]))
    say(f"Redis hangs: p99 {hung.ms(99):.0f} ms, at most {hung.ms(100):.0f} ms, {degraded:.0%} say so")
    return {"hung_p99_ms": round(hung.ms(99), 1), "hung_max_ms": round(hung.ms(100), 1), "hung_degraded": round(degraded, 4)}


def measure_overload(folder: Path, say: Say) -> dict[str, Any]:
    """Real-time answers at `TIMES` the capacity, offered whatever the answers are: `p99_ratio` of those accepted over that at capacity
    (mean of before and afterwards).

    `wrong`: answers other than 200, 503 with Retry-After, or with items that the model does not give that user.
    """
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",))
    live = [post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)]
    with running_serve(storage, {}) as port:
        capacity = _at_saturation(port, live, "at capacity", say)
        over = load(port, live, CONNECTIONS, SECONDS, rate=TIMES * capacity.per_s, keep=True)
        after = _at_saturation(port, live, "afterwards", say)
    calm_ms = (capacity.ms(99) + after.ms(99)) / 2
    wrong = sum(over.others.values()) + len(over.refused_s) - over.told + _strange(storage, over.bodies)
    metrics = {
        "capacity_rps": round(capacity.per_s, 1),
        "capacity_p99_ms": [round(capacity.ms(99), 1), round(after.ms(99), 1)],
        "offered_rps": round(TIMES * capacity.per_s, 1),
        "accepted_rps": round(over.per_s, 1),
        "accepted_p50_ms": round(over.ms(50), 1),
        "accepted_p99_ms": round(over.ms(99), 1),
        "p99_ratio": round(over.ms(99) / calm_ms, 2),
        "refused": len(over.refused_s),
        "refused_p50_ms": round(float(np.median(over.refused_s) * 1000), 2) if len(over.refused_s) else None,
        "wrong": wrong,
        "afterwards_rps": round(after.per_s, 1),
    }
    told = f"{metrics['accepted_rps']} a second accepted, {metrics['refused']} told to come again, p99 {metrics['p99_ratio']} times, {wrong} wrong"
    say(f"at {TIMES} times the capacity: {told}")
    return metrics


def _strange(storage: Storage, bodies: Sequence[bytes]) -> int:
    """How many answers are none that the model gives to any user."""
    state = ServingState.load(storage)
    lists = rank_inputs([bind(resolve_query(RecommendRequest(user_id=user, k=10), state), state) for user in range(USERS)])
    known = {tuple(sorted(item for item, _ in ranked.items)) for ranked in lists}
    shown = (tuple(sorted(item["item_id"] for item in json.loads(body)["items"])) for body in bodies)
    return sum(items not in known for items in shown)


def measure_users(folder: Path, users: int, say: Say) -> dict[str, Any]:
    """A snapshot of so many users: seconds to load it, private memory beside that of a small one, and milliseconds of a look-up."""
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=20)
    small = _loaded(storage, USERS)
    begun = time.perf_counter()
    _grow(storage, users)
    say(f"a snapshot of {users:,} users in {time.perf_counter() - begun:.0f} s")
    large = _loaded(storage, users)
    metrics = {
        "users": users,
        "snapshot_bytes": sum(file.stat().st_size for file in Snapshot.latest(storage).path.iterdir()),
        "load_s": round(large["load_s"], 2),
        "private_bytes": round(large["private_bytes"] - small["private_bytes"]),
        "lookup_p50_ms": round(large["p50_ms"], 4),
        "lookup_p99_ms": round(large["p99_ms"], 4),
    }
    say(f"loaded in {metrics['load_s']} s, {metrics['private_bytes'] / 1e6:+.0f} MB private, a look-up {metrics['lookup_p99_ms']} ms (p99)")
    return metrics


def _grow(storage: Storage, users: int) -> None:
    """Publish a night in which so many users have a list."""
    before = Snapshot.latest(storage)
    buckets = max(before.buckets, users // USERS_A_BUCKET)
    fields = {name: value for name, value in before.manifest.items() if name not in ("files", "sha256", "kind", "format_version", "run_key")}
    fields |= {"buckets": buckets, "users": users, "k": LISTED, "as_of_s": before.as_of_s + 1}
    ids = np.arange(users)
    place = bucket_of(ids.tolist(), buckets)
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(buckets + 1))
    items = pa.array(Dataset.open(storage.root / before.manifest["dataset"]).items["item_id"].to_pylist())
    path = snapshot_path(storage, before.as_of_s + 1, "grown")
    with sealed_directory(path, KIND, "grown", fields) as folder:
        for bucket in range(buckets):
            mine = ids[order[ends[bucket] : ends[bucket + 1]]]
            shown = items.take(pa.array(((mine[:, None] * 7 + np.arange(LISTED)) % len(items)).ravel()))
            offsets = pa.array(np.arange(len(mine) + 1, dtype=np.int32) * LISTED)
            scores = pa.array(np.tile(np.linspace(1, 0, LISTED, dtype=np.float32), len(mine)))
            write_part(folder, bucket, pa.array(mine), shown, offsets, scores, ["model"] * len(mine))
    publish(storage, path, open_sealed(path, KIND, verify=False))


def _loaded(storage: Storage, users: int) -> dict[str, float]:
    """What a process of its own says of the published night."""
    code = f"from recray.benchmark.serve import look_up; look_up({str(storage.root)!r}, {users})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def look_up(root: str, users: int) -> None:
    """Load the published night, look up users at random, and print what it took."""
    begun = time.perf_counter()
    state = ServingState.load(Storage(root))
    load_s = time.perf_counter() - begun
    took = []
    for user in np.random.default_rng(0).integers(0, users, LOOK_UPS).tolist():
        request = RecommendRequest(user_id=user, k=10)
        begun = time.perf_counter()
        assert look_up_complete_list(resolve_query(request, state), state) is not None
        took.append(time.perf_counter() - begun)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    private = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous"))  # mapped files belong to all
    p50, p99 = np.percentile(took, [50, 99]) * 1000
    print(json.dumps({"load_s": load_s, "private_bytes": private, "p50_ms": p50, "p99_ms": p99}))


def _at_saturation(port: int, requests: Sequence[bytes], named: str, say: Say) -> Load:
    load(port, requests, CLIENTS, WARM_S)
    found = load(port, requests, CLIENTS, SECONDS)
    say(f"{named}: {found.per_s:.0f} a second, p50 {found.ms(50):.1f} ms, p99 {found.ms(99):.1f} ms")
    return found


def _predictor_ms(storage: Storage) -> float:
    """Median milliseconds of the model's answer to one user, without a server."""
    torch.set_num_threads(1)
    keep_freed_memory()
    state, took = ServingState.load(storage), []
    for user in range(TURNS):
        one = bind(resolve_query(RecommendRequest(user_id=user, k=10), state), state)
        begun = time.perf_counter()
        _answer(state.predictor, one.history, one.now_s, one.context)
        took.append(time.perf_counter() - begun)
        time.sleep(REST_S)
    return float(np.median(took[50:]) * 1000)


def _answer(predictor: Predictor, history: Any, now: int, context: Any) -> None:
    predictor.recommend([history], 10, now=now, context=[context])


@contextmanager
def _uvicorn(storage: Storage) -> Iterator[int]:
    (port,) = free_ports(1)
    code = f"from recray.benchmark.serve import plain; plain({str(storage.root)!r}, {port})"
    with _running([sys.executable, "-c", code], dict(os.environ), port):
        yield port


def plain(root: str, port: int) -> None:
    """The application under uvicorn alone, until interrupted."""
    import uvicorn

    from recray.config import Settings
    from recray.serving.http import create_app
    from recray.serving.service import Service

    torch.set_num_threads(1)
    keep_freed_memory()
    settings = Settings()
    service = Service(Storage(root), settings.serve, settings.score)
    uvicorn.run(create_app(service), host="127.0.0.1", port=port, log_level="error", access_log=False)
    service.close()


@contextmanager
def running_serve(storage: Storage, environment: dict[str, str], *overrides: str) -> Iterator[int]:
    """`recray serve` on a published night, from its first answer on; its port."""
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "recray.cli", "serve", f"storage.root={storage.root}", f"serve.port={port}", *overrides]
    with _running(words, {**os.environ, **environment}, port):
        yield port


@contextmanager
def _running(words: list[str], environment: dict[str, str], port: int) -> Iterator[None]:
    """A server, from its first answer until it is left. Raises ClusterError."""
    server = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                raise ClusterError(f"the endpoint did not start: {server.communicate()[1][-600:]}", "run `recray serve` by hand to see why")
            time.sleep(0.2)
        yield
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
            server.communicate()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
