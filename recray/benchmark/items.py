"""How soon a change of an item is served by every replica, under load and after a restart."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from recray.benchmark import Result
from recray.benchmark.serve import CLIENTS, EVENTS, HISTORY, ITEMS, RATE, USERS, running_serve
from recray.stages import ProgressLog
from recray.testing.load import load, post
from recray.testing.published import publish_synthetic

REPLICAS = 2
TURNS = 20
WATCH_S = 3.0  # after a change
ASKED = {"user_id": "nobody", "k": 20}  # the most popular items, which change with nothing else


def measure_items(folder: Path, progress: ProgressLog) -> Result:
    """`TURNS` times, the most popular item is sold out while `RATE` other requests a second are served.

    `gone_s`, `gone_max_s`: from the response to the change to the last response of any of the `REPLICAS`
    replicas with the item, median and maximum; `asked_per_turn`: how many responses were looked at.
    `failed`: requests of the load that failed. `wrong_after_restart`: items that were sold out and are
    recommended after the endpoint was stopped and started again.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=(f"model.history={HISTORY}",)
    )
    lists = [post("/v1/recommend", {"user_id": user, "k": 10}) for user in range(USERS)]
    sold_out, gone_s, asked = list[str](), list[float](), list[int]()
    with running_serve(storage, {}, f"serve.replicas={REPLICAS}") as port, ThreadPoolExecutor(1) as pool:
        load(port, lists, CLIENTS, 2.0)
        seconds = TURNS * (WATCH_S + 0.5)
        others = pool.submit(load, port, lists, CLIENTS, seconds, rate=RATE)
        while len(sold_out) < TURNS:
            item = _recommended(port)[0]
            _sell_out(port, item)
            changed = last_seen = time.monotonic()
            count = 0
            while (now := time.monotonic()) < changed + WATCH_S:
                items = _recommended(port)
                count += 1
                if item in items:
                    last_seen = now
                assert not set(sold_out) & set(items), "an item came back"
            sold_out.append(item)
            gone_s.append(last_seen - changed)
            asked.append(count)
        result = others.result()
    with running_serve(storage, {}, f"serve.replicas={REPLICAS}") as port:
        after = {item for _ in range(200) for item in _recommended(port)}
    failed = len(result.refused_s) + sum(result.other_statuses.values())
    metrics = {
        "gone_s": round(float(np.median(gone_s)), 3),
        "gone_max_s": round(max(gone_s), 3),
        "asked_per_turn": int(np.median(asked)),
        "failed": failed,
        "statuses": {"503": len(result.refused_s)} | {str(k): v for k, v in result.other_statuses.items()},
        "requests": len(result.latency_s) + failed,
        "wrong_after_restart": len(after & set(sold_out)),
    }
    progress(
        f"gone from {REPLICAS} replicas after {metrics['gone_max_s']} s at most, {failed} of "
        f"{metrics['requests']:,} other requests failed, {metrics['wrong_after_restart']} of {TURNS} are "
        "recommended after a restart"
    )
    return metrics


def _recommended(port: int) -> Sequence[str]:
    content = _send(port, "POST", "/v1/recommend", ASKED)
    return [item["item_id"] for item in content["items"]]


def _sell_out(port: int, item: str) -> None:
    _send(port, "PUT", "/v1/items", {"items": [{"item_id": item, "available": False}]})


def _send(port: int, method: str, path: str, body: dict[str, object]) -> dict[str, list[dict[str, str]]]:
    """A request over a connection of its own, which any replica may serve."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        content: dict[str, list[dict[str, str]]] = json.load(response)
    return content
