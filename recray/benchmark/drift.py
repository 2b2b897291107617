"""Rewards that change under a running endpoint: how fast the policy adapts, and whether requests are lost.

Clients send requests to `recray serve` for users of a synthetic shop, all of whom explore. They click with a
probability that depends on the user and on the attention modulation (`policies.rewards.SyntheticRewards`).
After each round `recray adapt` learns a policy, checks the promotion criteria and publishes. Halfway the sign
of the users' best action changes.
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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.rewards import SyntheticRewards
from recray.benchmark import Result
from recray.benchmark.serve import running_serve
from recray.inference.policy import OBSERVED, Policy
from recray.release import read_policy_key
from recray.serving.api import RecommendRequest
from recray.serving.modulation import read_run_observation
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query
from recray.serving.state import ServingState
from recray.stages import ProgressLog
from recray.storage import Storage, read_json
from recray.testing.published import publish_synthetic

USERS, ITEMS, EVENTS = 4000, 500, 25
CLIENTS = 8
REQUESTS, BEFORE, AFTER = 8000, 3, 5  # a round; rounds before and after the drift
SIGMA = 1.0
EXPLORE = (
    "policy.actions=[temperature]",
    f"policy.exploration_scale={SIGMA}",
    "policy.exploration_share=1.0",
    "policy.experiment_share=1.0",
    "policy.latency=1",  # the model is so small that a decision takes a large share of its time
)
MANUAL = ("policy.attribution_window_s=0", "policy.round_s=0", f"policy.round_decisions={REQUESTS}")
RATE, WINDOW_S = 100.0, 60.0  # of --follow: requests a second, and the attribution window
# before the drift, after it, until the follower is killed, and between two measurements
BEFORE_S, AFTER_S, KILLED_AFTER_S, POLL_S = (300.0, 1200.0, 45.0, 15.0)
FOLLOW = (
    f"policy.attribution_window_s={WINDOW_S:g}",
    f"policy.round_s={WINDOW_S:g}",
    "policy.round_decisions=4000",
)


def measure_drift(folder: Path, progress: ProgressLog) -> Result:
    """`lead`: share of the oracle's gain over the trained model after each round; `frozen`: the same of the
    policy that was live at the drift, after it; `regained_within`: rounds after the drift until 80 % of the
    gain were regained, None: never; `refused`: the reason why a round published nothing; `failed`: failed
    requests.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=("model.history=50",)
    )
    observation = _observe_users(storage)
    rewards = _make_rewards(observation)
    gains: list[float] = []
    failed, frozen, promoted, refused = 0, None, [], []

    with running_serve(storage, {}, *EXPLORE, *MANUAL) as port:
        for number in range(BEFORE + AFTER):
            if number == BEFORE:
                rewards, frozen = replace(rewards, drift=-1.0), _load_live_policy(storage)
                progress(
                    f"drift: {_gain_share(rewards, observation, frozen):.0%} of the oracle's gain are left"
                )
            failed += _run_round(port, rewards, observation, number)
            result = _adapt(storage)
            promoted.append(bool(result["metrics"]["promoted"]))
            refused.append(result["reason"])
            gains.append(round(_gain_share(rewards, observation, _load_live_policy(storage)), 3))
            progress(f"round {number + 1}: {gains[-1]:.0%} of the oracle's gain, {failed} failed requests")

    regained = [number for number, share in enumerate(gains[BEFORE:], 1) if share >= 0.8]
    return {
        "lead": gains,
        "frozen": round(_gain_share(rewards, observation, frozen), 3),
        "regained_within": regained[0] if regained else None,
        "promoted": promoted,
        "refused": refused,
        "failed": failed,
        "requests_a_round": REQUESTS,
        "sigma": SIGMA,
    }


def measure_follow(folder: Path, progress: ProgressLog) -> Result:
    """The same with `recray adapt --follow` and no operator: `RATE` requests a second, outcomes within
    seconds.

    `lead`: by second, share of the oracle's gain over the trained model that the live policy reaches;
    `frozen`: the same of the policy that was live at the drift, after it; `regained_s`: seconds after the
    drift until 80 % of the new oracle's gain were reached, None: never; `failed`: failed requests. The
    follower is killed and restarted once.
    """
    storage = publish_synthetic(
        folder, users=USERS, items=ITEMS, events_per_user=EVENTS, overrides=("model.history=50",)
    )
    observation = _observe_users(storage)
    clients = Clients(_make_rewards(observation), observation)
    gains: list[tuple[float, float]] = []
    regained_s, frozen, killed_s, drift_s = None, 0.0, None, math.inf

    with running_serve(storage, {}, *EXPLORE, *FOLLOW) as port:
        with _following(storage) as follower, clients.running(port):
            started = time.monotonic()
            while (now_s := time.monotonic() - started) < min(
                drift_s, BEFORE_S
            ) + AFTER_S and regained_s is None:
                share = _gain_share(clients.rewards, observation, _load_live_policy(storage))
                gains.append((round(now_s, 1), round(share, 3)))
                progress(
                    f"{now_s:.0f} s: {share:.0%} of the oracle's gain, {clients.failed} of "
                    f"{clients.answered + clients.failed} requests failed"
                )
                if drift_s == math.inf and (now_s >= BEFORE_S or share >= 0.8):
                    drift_s, clients.rewards = now_s, replace(clients.rewards, drift=-1.0)
                    frozen = _gain_share(clients.rewards, observation, _load_live_policy(storage))
                    progress(f"drift: {frozen:.0%} of the oracle's gain are left")
                elif share >= 0.8 and drift_s < now_s:
                    regained_s = round(now_s - drift_s, 1)
                if killed_s is None and now_s >= drift_s + KILLED_AFTER_S:
                    killed_s = round(now_s - drift_s, 1)
                    follower.restart()
                    progress("the follower was killed and restarted")
                time.sleep(POLL_S)
        status = read_json(storage.follow)

    return {
        "lead": gains,
        "turned_s": None if drift_s == math.inf else round(drift_s, 1),
        "frozen": round(frozen, 3),
        "regained_s": regained_s,
        "killed_s": killed_s,
        "answered": clients.answered,
        "failed": clients.failed,
        "follower": status,
    }


class Clients:
    """Users who send `RATE` requests a second, and click seconds later with the probability of the rewards.

    answered, failed : requests so far
    """

    def __init__(self, rewards: SyntheticRewards, observation: np.ndarray) -> None:
        self.rewards, self.observation = rewards, observation
        self.answered = self.failed = 0
        self._lock, self._stop = threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def running(self, port: int) -> Iterator[None]:
        """Send requests until the end of the context."""
        threads = [threading.Thread(target=self._run, args=(port, number)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _run(self, port: int, number: int) -> None:
        random = np.random.default_rng(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        clicks: list[tuple[float, str]] = []
        next_s = time.monotonic()
        while not self._stop.wait(max(next_s - time.monotonic(), 0.0)):
            next_s += CLIENTS / RATE
            user = int(random.integers(0, len(self.observation)))
            response = _post(connection, "/v1/recommend", {"user_id": user, "k": 5})
            if response is not None and "controls" in response:
                click_probability = self.rewards.pay(
                    self.observation[user : user + 1], np.array([[response["controls"]["temperature"]]])
                )[0]
                if random.random() < click_probability:
                    clicks.append((time.monotonic() + random.exponential(5.0), response["request_id"]))
            now_s = time.monotonic()
            due = [request for at_s, request in clicks if at_s <= now_s]
            clicks = [click for click in clicks if click[0] > now_s]
            lost = sum(
                _post(connection, "/v1/feedback", {"request_id": request, "outcome": "click"}) is None
                for request in due
            )
            with self._lock:
                self.answered += (response is not None) + len(due) - lost
                self.failed += (response is None) + lost
        connection.close()


class _Follower:
    """`recray adapt --follow` in a process."""

    def __init__(self, storage: Storage) -> None:
        self._command = [
            sys.executable,
            "-m",
            "recray.cli",
            "adapt",
            "--follow",
            f"storage.root={storage.root}",
            *EXPLORE,
            *FOLLOW,
        ]
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def restart(self) -> None:
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


def _make_rewards(observation: np.ndarray) -> SyntheticRewards:
    """Rewards whose optima differ among these users."""
    length, stale = (
        float(np.median(observation[:, OBSERVED.index(name)]))
        for name in ("log_length", "log_days_since_last")
    )
    return SyntheticRewards(length=length, stale=stale)


def _observe_users(storage: Storage) -> np.ndarray:
    """The endpoint's observation of each user, [USERS, D]."""
    state = ServingState.load(storage)
    queries = [resolve_query(RecommendRequest(user_id=user), state) for user in range(USERS)]
    inputs = [bind_query(query, state) for query in queries]
    pairs = zip(inputs, queries, strict=True)
    return np.stack(
        [
            state.observer.observe(
                query_inputs.history, query_inputs.now_s, read_run_observation(query, state)
            )
            for query_inputs, query in pairs
        ]
    )


def _load_live_policy(storage: Storage) -> Policy | None:
    name = read_policy_key(storage)
    return (
        None if name is None else Policy.load(storage.policy(name), ServingState.load(storage).bundle_digest)
    )


def _gain_share(rewards: SyntheticRewards, observation: np.ndarray, policy: Policy | None) -> float:
    """Gain of a policy over action 0, as a share of the oracle's."""
    none = rewards.pay(observation, np.zeros((len(observation), 1))).mean()
    best = rewards.pay(observation, rewards.best(observation)).mean()
    paid = none if policy is None else rewards.pay(observation, policy.act(observation)).mean()
    return float((paid - none) / (best - none))


def _run_round(port: int, rewards: SyntheticRewards, observation: np.ndarray, number: int) -> int:
    """Send requests and clicks; the number of failed requests."""
    failed = [0] * CLIENTS

    def run_client(index: int) -> None:
        random = np.random.default_rng([number, index])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        failed[index] = REQUESTS // CLIENTS  # less those that succeed
        for _ in range(REQUESTS // CLIENTS):
            user = int(random.integers(0, USERS))
            response = _post(connection, "/v1/recommend", {"user_id": user, "k": 5})
            if response is None or "controls" not in response:
                continue
            click_probability = rewards.pay(
                observation[user : user + 1], np.array([[response["controls"]["temperature"]]])
            )[0]
            is_click = random.random() < click_probability
            feedback = {"request_id": response["request_id"], "outcome": "click"}
            if not is_click or _post(connection, "/v1/feedback", feedback) is not None:
                failed[index] -= 1
        connection.close()

    threads = [threading.Thread(target=run_client, args=(index,)) for index in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(failed)


def _post(
    connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """The JSON of the response; None if there was none, or an error."""
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException):
        connection.close()  # the next request opens it again
        return None
    return json.loads(content) if response.status == 200 else None


def _adapt(storage: Storage) -> Mapping[str, Any]:
    """The result of `recray adapt`."""
    command = [sys.executable, "-m", "recray.cli", "adapt", f"storage.root={storage.root}", *EXPLORE, *MANUAL]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    result: Mapping[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result
