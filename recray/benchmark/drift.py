"""A world that turns around under a running endpoint: does the policy follow, round by round, without a request lost?

Clients ask `recray serve` for users of a made-up shop, all of whom explore, and click with a probability that depends on the user and on how
the attention was turned (`policies.rewards.Planted`); after each round `recray adapt` learns, asks its gate and publishes. Halfway the sign
of what suits the users changes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.rewards import Planted
from recray.benchmark.serve import running_serve
from recray.follow import FILE
from recray.inference.policy import OBSERVED, Policy
from recray.promotion import policy_of
from recray.serving.api import RecommendRequest
from recray.serving.modulation import observed_by_the_run
from recray.serving.query import resolve_query
from recray.serving.ranking import bind
from recray.serving.state import ServingState
from recray.stages import Say
from recray.storage import Storage, read_json
from recray.testing.published import publish_synthetic

USERS, ITEMS, EVENTS = 4000, 500, 25
CLIENTS = 8
REQUESTS, BEFORE, AFTER = 8000, 3, 5  # a round; rounds before and after the drift
SIGMA = 1.0
EXPLORE = (
    "policy.actions=[temperature]",
    f"policy.sigma={SIGMA}",
    "policy.explore=1.0",
    "policy.share=1.0",
    "policy.latency=1",  # its model is so small that a decision takes a good part of its time
)
BY_HAND = ("policy.attribution_window_s=0", "policy.round_s=0", f"policy.round_decisions={REQUESTS}")
RATE, WINDOW_S = 100.0, 60.0  # of --follow: requests a second, and what a decision waits for its outcomes
BEFORE_S, AFTER_S, KILLED_AFTER_S, LOOK_S = 300.0, 1200.0, 45.0, 15.0  # the drift, its end, when the follower is killed, between two looks
FOLLOWED = (f"policy.attribution_window_s={WINDOW_S:g}", f"policy.round_s={WINDOW_S:g}", "policy.round_decisions=4000")


def measure_drift(folder: Path, say: Say) -> dict[str, Any]:
    """`lead`: share of the oracle's lead over the trained model after each round; `frozen`: of the policy as it was when the world changed;
    `regained_within`: rounds after the drift until 80 % of the lead were regained, None: never; `refused`: why a round published nothing, in
    words; `failed`: requests that were not answered."""
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=("model.history=50",))
    seen = _observed(storage)
    world = _planted(seen)
    leads: list[float] = []
    failed, frozen, promoted, refused = 0, None, [], []
    with running_serve(storage, {}, *EXPLORE, *BY_HAND) as port:
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


def measure_follow(folder: Path, say: Say) -> dict[str, Any]:
    """The same with `recray adapt --follow` and no operator, by the clock: `RATE` requests a second, outcomes within a few seconds.

    `lead`: by second, share of the oracle's lead over the trained model of what is live; `frozen`: of what was live when the world turned around;
    `regained_s`: seconds after it until 80 % of the new oracle's lead were there, None: never. The follower is killed once in between, and started
    again; `failed`: requests that were not answered.
    """
    storage = publish_synthetic(folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=("model.history=50",))
    seen = _observed(storage)
    state = Clients(_planted(seen), seen)
    leads: list[tuple[float, float]] = []
    regained_s, frozen, killed_s, turned_s = None, 0.0, None, math.inf
    with running_serve(storage, {}, *EXPLORE, *FOLLOWED) as port:
        with _following(storage) as follower, state.asking(port):
            begun = time.monotonic()
            while (now_s := time.monotonic() - begun) < min(turned_s, BEFORE_S) + AFTER_S and regained_s is None:
                lead = _lead(state.world, seen, _live(storage))
                leads.append((round(now_s, 1), round(lead, 3)))
                say(f"{now_s:.0f} s: {lead:.0%} of the oracle's lead, {state.failed} of {state.answered + state.failed} requests failed")
                if turned_s == math.inf and (now_s >= BEFORE_S or lead >= 0.8):
                    turned_s, state.world = now_s, replace(state.world, drift=-1.0)
                    frozen = _lead(state.world, seen, _live(storage))
                    say(f"the world turns around: {frozen:.0%} of the lead are left")
                elif lead >= 0.8 and turned_s < now_s:
                    regained_s = round(now_s - turned_s, 1)
                if killed_s is None and now_s >= turned_s + KILLED_AFTER_S:
                    killed_s = round(now_s - turned_s, 1)
                    follower.kill()
                    say("the follower is killed, and started again")
                time.sleep(LOOK_S)
        told = read_json(storage.root / FILE)
    return {
        "lead": leads,
        "turned_s": None if turned_s == math.inf else round(turned_s, 1),
        "frozen": round(frozen, 3),
        "regained_s": regained_s,
        "killed_s": killed_s,
        "answered": state.answered,
        "failed": state.failed,
        "follower": told,
    }


class Clients:
    """Users who ask `RATE` times a second, and click a little later with the probability that the world says.

    answered, failed : requests so far
    """

    def __init__(self, world: Planted, seen: np.ndarray) -> None:
        self.world, self.seen = world, seen
        self.answered = self.failed = 0
        self._lock, self._over = threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def asking(self, port: int) -> Iterator[None]:
        """While they ask."""
        threads = [threading.Thread(target=self._ask, args=(port, place)) for place in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()

    def _ask(self, port: int, place: int) -> None:
        random, connection = np.random.default_rng(place), http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        clicks: list[tuple[float, str]] = []
        next_s = time.monotonic()
        while not self._over.wait(max(next_s - time.monotonic(), 0.0)):
            next_s += CLIENTS / RATE
            user = int(random.integers(0, len(self.seen)))
            answer = _told(connection, "/v1/recommend", {"user_id": user, "k": 5})
            if answer is not None and "controls" in answer:
                chance = self.world.pay(self.seen[user : user + 1], np.array([[answer["controls"]["temperature"]]]))[0]
                if random.random() < chance:
                    clicks.append((time.monotonic() + random.exponential(5.0), answer["request_id"]))
            now_s = time.monotonic()
            due = [request for at_s, request in clicks if at_s <= now_s]
            clicks = [click for click in clicks if click[0] > now_s]
            lost = sum(_told(connection, "/v1/feedback", {"request_id": request, "outcome": "click"}) is None for request in due)
            with self._lock:
                self.answered += (answer is not None) + len(due) - lost
                self.failed += (answer is None) + lost
        connection.close()


class _Follower:
    """`recray adapt --follow`, which is started again when it was killed."""

    def __init__(self, storage: Storage) -> None:
        self._words = [sys.executable, "-m", "recray.cli", "adapt", "--follow", f"storage.root={storage.root}", *EXPLORE, *FOLLOWED]
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._start()


@contextlib.contextmanager
def _following(storage: Storage) -> Iterator[_Follower]:
    follower = _Follower(storage)
    try:
        yield follower
    finally:
        follower.process.terminate()
        follower.process.wait()


def _planted(seen: np.ndarray) -> Planted:
    """A world whose optima differ among these users."""
    length, stale = (float(np.median(seen[:, OBSERVED.index(name)])) for name in ("log_length", "log_days_since_last"))
    return Planted(length=length, stale=stale)


def _observed(storage: Storage) -> np.ndarray:
    """What the endpoint sees of each user, [USERS, D]."""
    state = ServingState.load(storage)
    queries = [resolve_query(RecommendRequest(user_id=user), state) for user in range(USERS)]
    inputs = [bind(query, state) for query in queries]
    pairs = zip(inputs, queries, strict=True)
    return np.stack([state.predictor.observe(one.history, one.now_s, observed_by_the_run(query, state)) for one, query in pairs])


def _live(storage: Storage) -> Policy | None:
    name = policy_of(storage)
    return None if name is None else Policy.load(storage.policy(name), ServingState.load(storage).bundle_digest)


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
    words = [sys.executable, "-m", "recray.cli", "adapt", f"storage.root={storage.root}", *EXPLORE, *BY_HAND]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
