"""What Ray Serve costs before the same application: nightly look-ups, one client, and the model in batches.

The same ASGI application runs under plain uvicorn, under Serve as recray starts it (HAProxy, replicas reached directly) and under Serve's
default settings, one after the other on this machine, each asked by the same load from one other process. Every run is bracketed by
uvicorn's, so that a machine that gets slower in between does not count.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.benchmark.load import Load, load, post
from recray.benchmark.nights import world_night
from recray.cluster import free_ports
from recray.errors import ClusterError
from recray.inference import Predictor
from recray.serving.api import RecommendRequest
from recray.serving.night import Night
from recray.stages import Say
from recray.storage import Storage

CLIENTS = 16
SECONDS = 5.0
WARM_S = 2.0
USERS, ITEMS, EVENTS = 2000, 3700, 220
HISTORY = 200
DEFAULTS = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
START_S = 180.0


def measure_serve(folder: Path, say: Say) -> dict[str, Any]:
    """`rps` of each way at 16 clients; `ms_over_asgi` = 1000 / rps - 1000 / rps of uvicorn; ratios of ours over Serve's defaults and uvicorn's.

    `one_client_over_predictor_ms`: what HTTP adds to the median of a real-time answer. `batching_ratio`: real-time answers a second with
    batching over those without. `p99_over_p50`: of the real-time answers at 16 clients.
    """
    storage = world_night(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",))
    lists = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(USERS)]
    live = [post("/v1/recommend", {"user_id": user, "k": 10, "mode": "realtime"}) for user in range(USERS)]
    metrics: dict[str, Any] = {}
    with _uvicorn(storage) as port:
        first = _at_saturation(port, lists, "uvicorn, nightly lists", say)
    with _serve(storage, {}) as port:
        ours = _at_saturation(port, lists, "recray serve, nightly lists", say)
        alone = load(port, lists, 1, SECONDS)
        one = load(port, live, 1, SECONDS)
        batched = _at_saturation(port, live, "recray serve, real time", say)
    with _uvicorn(storage) as port:
        last = _at_saturation(port, lists, "uvicorn again", say)
    with _serve(storage, {}, "serve.max_batch=1") as port:
        unbatched = _at_saturation(port, live, "recray serve, real time, one at a time", say)
    with _serve(storage, DEFAULTS) as port:
        default = _at_saturation(port, lists, "Serve's default settings, nightly lists", say)
    asgi_ms = (1000 / first.per_s + 1000 / last.per_s) / 2
    predictor_ms = _predictor_ms(storage)
    metrics |= {
        "rps": round(ours.per_s, 1),
        "rps_uvicorn": [round(first.per_s, 1), round(last.per_s, 1)],
        "rps_default": round(default.per_s, 1),
        "ms_over_asgi": round(1000 / ours.per_s - asgi_ms, 3),
        "rps_ratio_default": round(ours.per_s / default.per_s, 2),
        "rps_ratio_uvicorn": round(ours.per_s * asgi_ms / 1000, 3),
        "lookup_one_client_p50_ms": round(alone.ms(50), 2),
        "realtime_one_client_p50_ms": round(one.ms(50), 2),
        "predictor_p50_ms": round(predictor_ms, 2),
        "one_client_over_predictor_ms": round(one.ms(50) - predictor_ms, 2),
        "realtime_rps": round(batched.per_s, 1),
        "realtime_rps_unbatched": round(unbatched.per_s, 1),
        "batching_ratio": round(batched.per_s / unbatched.per_s, 2),
        "realtime_p50_ms": round(batched.ms(50), 2),
        "realtime_p99_ms": round(batched.ms(99), 2),
        "p99_over_p50": round(batched.ms(99) / batched.ms(50), 2),
        "others": {str(status): count for found in (ours, batched, unbatched, default) for status, count in found.others.items()},
    }
    ratios = f"{metrics['rps_ratio_default']} times Serve's defaults; batching {metrics['batching_ratio']} times"
    say(f"{metrics['ms_over_asgi']} ms over uvicorn, {ratios}")
    return metrics


def _at_saturation(port: int, requests: Sequence[bytes], named: str, say: Say) -> Load:
    load(port, requests, CLIENTS, WARM_S)
    found = load(port, requests, CLIENTS, SECONDS)
    say(f"{named}: {found.per_s:.0f} a second, p50 {found.ms(50):.1f} ms, p99 {found.ms(99):.1f} ms")
    return found


def _predictor_ms(storage: Storage) -> float:
    """Median milliseconds of the model's answer to one user, without a server."""
    torch.set_num_threads(1)
    night = Night.load(storage)
    questions = [night.question(RecommendRequest(user_id=user, k=10)) for user in range(300)]
    took = []
    for question in questions:
        begun = time.perf_counter()
        _answer(night.predictor, question.history, question.now, question.context)
        took.append(time.perf_counter() - begun)
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
    from recray.serving.handler import Handler
    from recray.serving.http import create_app

    torch.set_num_threads(1)
    settings = Settings()
    handler = Handler(Storage(root), settings.serve, settings.score)
    uvicorn.run(create_app(handler), host="127.0.0.1", port=port, log_level="error", access_log=False)
    handler.close()


@contextmanager
def _serve(storage: Storage, environment: dict[str, str], *overrides: str) -> Iterator[int]:
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
        server.send_signal(signal.SIGINT)
        server.communicate()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False
