"""A world that turns around under a running endpoint: does the policy follow, round by round, without a request lost?

Clients ask `recray serve` for users of a made-up shop, all of whom explore, and click with a probability that depends on the user and on how
the attention was turned (`policies.rewards.Planted`); after each round `recray adapt` learns, asks its gate and publishes. Halfway the sign
of what suits the users changes.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.rewards import Planted
from recray.benchmark.nights import world_night
from recray.benchmark.serve import running_serve
from recray.inference.policy import OBSERVED, Policy
from recray.promotion import policy_of
from recray.serving.api import RecommendRequest
from recray.serving.night import Night
from recray.stages import Say
from recray.storage import Storage

USERS, ITEMS, EVENTS = 4000, 500, 25
CLIENTS = 8
REQUESTS, BEFORE, AFTER = 8000, 3, 5  # a round; rounds before and after the drift
SIGMA = 1.0
EXPLORE = (
    "policy.actions=[temperature]",
    f"policy.sigma={SIGMA}",
    "policy.explore=1.0",
    "policy.share=1.0",
    "policy.wait_s=0",
    "policy.latency=1",  # its model is so small that a decision takes a good part of its time
)


def measure_drift(folder: Path, say: Say) -> dict[str, Any]:
    """`lead`: share of the oracle's lead over the trained model after each round; `frozen`: of the policy as it was when the world changed;
    `regained_within`: rounds after the drift until 80 % of the lead were regained, None: never; `refused`: why a round published nothing, in
    words; `failed`: requests that were not answered."""
    storage = world_night(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=("model.history=50",))
    seen = _observed(storage)
    length, stale = (float(np.median(seen[:, OBSERVED.index(name)])) for name in ("log_length", "log_days_since_last"))
    world = Planted(length=length, stale=stale)
    leads: list[float] = []
    failed, frozen, promoted, refused = 0, None, [], []
    with running_serve(storage, {}, *EXPLORE) as port:
        for number in range(BEFORE + AFTER):
            if number == BEFORE:
                world, frozen = replace(world, drift=-1.0), _live(storage)
                say(f"the world turns around: {_lead(world, seen, frozen):.0%} of the lead are left")
            failed += _round(port, world, seen, number)
            told = _adapt(storage)
            promoted.append(bool(told["metrics"]["promoted"]))
            refused.append(told["reason"])
            leads.append(round(_lead(world, seen, _live(storage)), 3))
            say(f"round {number + 1}: {leads[-1]:.0%} of the oracle's lead, {failed} requests failed")
    regained = [place + 1 for place, lead in enumerate(leads[BEFORE:]) if lead >= 0.8]
    return {
        "lead": leads,
        "frozen": round(_lead(world, seen, frozen), 3),
        "regained_within": regained[0] if regained else None,
        "promoted": promoted,
        "refused": refused,
        "failed": failed,
        "requests_a_round": REQUESTS,
        "sigma": SIGMA,
    }


def _observed(storage: Storage) -> np.ndarray:
    """What the endpoint sees of each user, [USERS, D]."""
    night = Night.load(storage)
    asked = [RecommendRequest(user_id=user) for user in range(USERS)]
    questions = [night.question(request) for request in asked]
    return np.stack([night.predictor.observe(q.history, q.now, night.state(request)) for q, request in zip(questions, asked, strict=True)])


def _live(storage: Storage) -> Policy | None:
    name = policy_of(storage)
    return None if name is None else Policy.load(storage.policy(name), Night.load(storage).bundle_digest)


def _lead(world: Planted, seen: np.ndarray, policy: Policy | None) -> float:
    none, best = world.pay(seen, np.zeros((len(seen), 1))).mean(), world.pay(seen, world.best(seen)).mean()
    mine = none if policy is None else world.pay(seen, policy.act(seen)).mean()
    return float((mine - none) / (best - none))


def _round(port: int, world: Planted, seen: np.ndarray, number: int) -> int:
    """Ask, and click; how many requests failed."""
    failed = [0] * CLIENTS

    def client(place: int) -> None:
        random = np.random.default_rng([number, place])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        failed[place] = REQUESTS // CLIENTS  # until it was answered
        for _ in range(REQUESTS // CLIENTS):
            user = int(random.integers(0, USERS))
            answer = _told(connection, "/v1/recommend", {"user_id": user, "k": 5})
            if answer is None or "controls" not in answer:
                continue
            chance = world.pay(seen[user : user + 1], np.array([[answer["controls"]["temperature"]]]))[0]
            clicks = random.random() < chance
            if not clicks or _told(connection, "/v1/feedback", {"request_id": answer["request_id"], "outcome": "click"}) is not None:
                failed[place] -= 1
        connection.close()

    threads = [threading.Thread(target=client, args=(place,)) for place in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(failed)


def _told(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
    """The answer; None where there was none, or an error."""
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException):
        connection.close()  # it is opened anew for the next request
        return None
    found: dict[str, Any] | None = json.loads(content) if response.status == 200 else None
    return found


def _adapt(storage: Storage) -> dict[str, Any]:
    """What `recray adapt` says."""
    words = [sys.executable, "-m", "recray.cli", "adapt", f"storage.root={storage.root}", *EXPLORE]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
