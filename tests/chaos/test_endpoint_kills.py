"""The endpoint under load while nights come, break and go back, replicas die, and everything is killed: no
wrong answer, nothing lost.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import start_redis, synthetic_overrides
from harness import DEADLINE_S, kill, replica_logs, wait_for
from preflight import absent
from processes import titled

from recray import pipeline
from recray.cli.demo import post as ask
from recray.client import Client
from recray.cluster import free_ports
from recray.config import Settings, load_settings
from recray.prepare.files import list_collected_files
from recray.release import Member, Release
from recray.serving.api import RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query, rank_inputs
from recray.serving.state import ServingState
from recray.snapshot.reader import Snapshot
from recray.snapshot.score import ScoringModel, write_snapshot
from recray.storage import Storage, manifest_digest, write_json
from recray.testing.load import Driver, post
from recray.testing.published import publish_untrained, score_buckets, untrained_bundle

USERS = 300
CLIENTS = 8


@pytest.fixture(scope="module")
def shop(synthetic_folder, synthetic_dataset, tmp_path_factory):
    """Settings of a root whose night is published, and another bundle."""
    root = tmp_path_factory.mktemp("endpoint")
    settings = load_settings(None, [*synthetic_overrides(synthetic_folder, root)])
    storage = publish_untrained(settings, synthetic_dataset, root)
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 7})})
    return settings, storage, untrained_bundle(other, synthetic_dataset, storage.bundle("other"), "other")


class Served:
    """`recray serve` in a process of its own, from when all its replicas are there and it has answered."""

    def __init__(self, root: Path, *overrides: str, replicas: int = 1) -> None:
        self.replicas = replicas
        (self.port,) = free_ports(1)
        self.address = f"http://127.0.0.1:{self.port}"
        self._words = [
            sys.executable,
            "-m",
            "recray.cli",
            "serve",
            f"storage.root={root}",
            f"serve.port={self.port}",
        ]
        self._words += ["serve.poll_s=0.2", "serve.timeout_s=30", f"serve.replicas={replicas}", *overrides]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            wait_for(
                "the endpoint's first answer",
                lambda: self.get("/healthz")["status"] == "ok",
                ended=self.process.poll,
            )
        except AssertionError as error:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(self.process.communicate()[1][-2000:]) from error
        wait_for("its replicas", lambda: len(titled(Path.home(), "ray::ServeReplica")) >= self.replicas)

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(f"{self.address}{path}", timeout=5) as response:
            return json.load(response)

    def night(self) -> str:
        return self.get("/v1/models")["snapshot"]

    def becomes(self, snapshot: str) -> None:
        """Wait until every replica serves a snapshot."""
        wait_for(
            f"20 answers of {snapshot} one after the other",
            lambda: {self.night() for _ in range(20)} == {snapshot},
            last_seen=self.night,
        )

    def stop(self, number: int = signal.SIGINT) -> dict:
        """End it by a signal; its last line."""
        self.process.send_signal(number)
        out, _ = self.process.communicate(timeout=DEADLINE_S)  # Serve itself waits a minute for its replicas
        return json.loads((out.splitlines() or ["{}"])[-1])  # nothing of one that was killed


@pytest.fixture(scope="module")
def served(own_home, shop):
    _, storage, _ = shop
    endpoint = Served(storage.root, replicas=2)
    yield endpoint
    ended = endpoint.stop(signal.SIGTERM)  # as systemd, Docker and Kubernetes end a service
    assert ended["status"] == "ok", ended["reason"]


def test_haproxy_listens_on_loopback_alone(served, own_home):
    sockets = set()
    for pid in titled(own_home, "haproxy"):
        with contextlib.suppress(OSError):  # one that a newer one replaced
            sockets |= {os.readlink(fd) for fd in list(Path(f"/proc/{pid}/fd").iterdir()) if fd.exists()}
    listening = [
        line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    hosts = Counter(line[1].split(":")[0] for line in listening if f"socket:[{line[9]}]" in sockets)
    assert hosts.total() >= 3 and set(hosts) == {"0100007F"}, "HTTP, metrics and statistics, on 127.0.0.1"


def test_requests_that_never_end_make_nobody_wait(served):
    open_requests = (
        b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        b"application/json\r\nContent-Length: 50\r\n\r\n{"
    )
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(200)]
        for client in slow:
            client.sendall(open_requests)
        for user in range(50):
            assert ask(f"{served.address}/v1/recommend", {"user_id": user})["items"]
        slow[0].settimeout(DEADLINE_S)
        assert b" 408 " in slow[0].recv(1000)


def test_a_burst_is_served_up_to_the_queue_size_and_the_rest_gets_retry_after(served):
    places = 2 * Settings().serve.request_limit
    wait_for(
        "HAProxy to know of both replicas",
        lambda: {status for status, _ in _burst(served.port, places)} == {200},
    )
    statuses = _burst(served.port, 4 * places)
    refused = [head for status, head in statuses if status == 503]
    assert (
        Counter(status for status, _ in statuses)[200] == len(statuses) - len(refused) >= places and refused
    )
    for head in refused:  # by HAProxy, before any replica
        assert b"all replicas are at their limit" in head
        assert b"retry-after: 1\r\n" in head and b"content-type: application/problem+json\r\n" in head
        assert json.loads(head.partition(b"\r\n\r\n")[2])["status"] == 503


def test_connections_that_are_idle_take_no_place(served):
    places = 2 * Settings().serve.request_limit
    with contextlib.ExitStack() as stack:
        for user in range(64):
            idle = stack.enter_context(
                contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=DEADLINE_S))
            )
            idle.request(
                "POST", "/v1/recommend", json.dumps({"user_id": user}), {"Content-Type": "application/json"}
            )
            assert idle.getresponse().read(), "kept open from here on"
        for _ in range(5):
            assert {status for status, _ in _burst(served.port, places // 2)} == {200}


def _burst(port: int, count: int) -> list[tuple[int, bytes]]:
    """So many questions to the model at once; status and bytes of the answers, in lower case."""
    statuses = []
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(count)
        ]
        for user, client in enumerate(clients):
            client.sendall(post("/v1/recommend", {"user_id": user, "mode": "realtime"}))
        for client in clients:
            got = b""
            while b"\r\n\r\n" not in got or not got.endswith((b"}", b"0\r\n\r\n")):
                assert (chunk := client.recv(1 << 16)), "the connection was closed"
                got += chunk
            statuses.append((int(got[9:12]), got.lower()))
    return statuses


def test_an_event_is_heard_by_every_replica(served, shop):
    _, storage, _ = shop
    item = ask(f"{served.address}/v1/recommend", {"user_id": 7, "k": 100, "mode": "realtime"})["items"][-1][
        "item_id"
    ]
    assert ask(f"{served.address}/v1/recommend", {"user_id": 7})["source"] == "snapshot"
    ask(f"{served.address}/v1/events", {"user_id": 7, "events": [{"item_id": item}]})
    assert {ask(f"{served.address}/v1/recommend", {"user_id": 7})["source"] for _ in range(20)} == {
        "realtime"
    }


def test_a_change_of_an_item_is_served_by_every_replica_and_nobody_waits(served):
    requests = [post("/v1/recommend", {"user_id": user, "k": 5}) for user in range(USERS)]
    client = Client(served.address)
    item = _popular(client)[0]
    with Continuous(served.port, requests, rate=50.0) as running:
        running.has_seen_more()
        client.change_items(items=[{"item_id": item, "available": False}])
        _become(client, lambda items: item not in items)
        client.change_items(items=[{"item_id": item, "available": True}])
        _become(client, lambda items: items[0] == item)
        running.has_seen_more()
    assert all(traffic.other_statuses == {} and len(traffic.refused_s) == 0 for traffic in running.seen)


def _popular(client: Client) -> list[str]:
    return [item["item_id"] for item in client.recommend(user_id="nobody", k=20)["items"]]


def _become(client: Client, condition: Callable[[list[str]], bool]) -> None:
    """Wait until every replica's list of an unknown user is so."""
    wait_for(
        "20 lists one after the other",
        lambda: all(condition(_popular(client)) for _ in range(20)),
        last_seen=lambda: _popular(client),
    )


def test_no_response_is_wrong_while_snapshots_are_swapped(served, own_home, shop, synthetic_dataset):
    """A good night, a damaged one and `recray rollback`, under a load of nightly lists and of the model's
    answers.
    """
    settings, storage, other = shop
    first = Snapshot.latest(storage)
    expected = {"untrained": _answers(storage)}
    requests = [
        post("/v1/recommend", {"user_id": user, "k": 5, "mode": "realtime" if user % 3 == 0 else "batch"})
        for user in range(10, USERS)
    ]
    with Continuous(served.port, requests, rate=50.0) as running:
        running.has_seen_more()
        second_path, _, _ = write_snapshot(
            storage, "second", synthetic_dataset, ScoringModel(other), settings.score, score_buckets
        )
        Release(champion=Member.of(other), previous=Release.read(storage).champion).write(storage)
        published = storage.latest.read_bytes()
        served.becomes(manifest_digest(second_path))
        broken = second_path.with_name("run=broken")
        shutil.copytree(second_path, broken)
        index = next(broken.glob("index-*.arrow"))
        index.write_bytes(index.read_bytes()[:-9] + b"123456789")
        write_json(
            storage.latest, {**json.loads(published), "snapshot": broken.relative_to(storage.root).as_posix()}
        )
        wait_for(
            "both replicas to refuse it",
            lambda: (
                len(logs := replica_logs(own_home)) == 2 and all("the old one stays" in log for log in logs)
            ),
        )
        assert served.night() == manifest_digest(second_path), (
            "a damaged night is refused and the old one stays"
        )
        storage.latest.write_bytes(published)
        expected["other"] = _answers(storage)
        words = [sys.executable, "-m", "recray.cli", "rollback", f"storage.root={storage.root}", "score.k=20"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        back = Snapshot.latest(storage)
        served.becomes(manifest_digest(back.path))
    assert back.path not in (first.path, second_path)
    assert all(traffic.other_statuses == {} and len(traffic.refused_s) == 0 for traffic in running.seen)
    bundles = Counter()
    for body in (body for traffic in running.seen for body in traffic.bodies):
        answer = json.loads(body)
        bundles[answer["bundle"], answer["source"]] += 1
        assert (
            tuple(item["item_id"] for item in answer["items"]) in expected[answer["bundle"]][answer["source"]]
        ), "an answer that no night gives"
    assert set(bundles) == {(bundle, source) for bundle in expected for source in ("snapshot", "realtime")}


class Continuous(threading.Thread):
    """A load without an end, until it is left; what it saw, a second at a time."""

    def __init__(self, port: int, requests: list[bytes], rate: float) -> None:
        super().__init__()
        self.port, self.requests, self.rate, self.seen, self.stopped = (
            port,
            requests,
            rate,
            [],
            threading.Event(),
        )

    def run(self) -> None:
        while not self.stopped.is_set():
            self.seen.append(Driver(self.port, self.requests, CLIENTS, 1.0, self.rate, True).drive())

    def has_seen_more(self) -> None:
        """Wait until more was answered."""
        before = len(self.seen)
        wait_for(
            "more answers",
            lambda: any(len(traffic.latency_s) for traffic in self.seen[before:]),
            last_seen=lambda: self.seen[before:],
        )

    def __enter__(self) -> Continuous:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()


def _answers(storage: Storage) -> dict[str, set[tuple[str, ...]]]:
    """The first five of every list of the published night, and of everything that its model says."""
    state = ServingState.load(storage)
    live = rank_inputs(
        [
            bind_query(resolve_query(RecommendRequest(user_id=user, k=5), state), state)
            for user in range(USERS)
        ]
    )
    return {
        "snapshot": {tuple(state.snapshot.find(user).item_ids[:5]) for user in range(USERS)},
        "realtime": {tuple(item for item, _ in ranked.items) for ranked in live},
    }


def test_a_killed_replica_costs_at_most_the_answer_that_it_was_writing(served, own_home):
    requests = [post("/v1/recommend", {"user_id": user, "k": 5}) for user in range(USERS)]
    before = titled(own_home, "ray::ServeReplica")
    with Continuous(served.port, requests, rate=200.0) as running:
        running.has_seen_more()
        kill(before[0])
        wait_for(
            "another replica",
            lambda: len(now := titled(own_home, "ray::ServeReplica")) == 2 and before[0] not in now,
        )
        running.has_seen_more()
    others = sum((Counter(by_replica.other_statuses) for by_replica in running.seen), Counter())
    assert others in ({}, {0: 1}), "what it is at is asked again of the other one"
    assert sum(len(by_replica.refused_s) for by_replica in running.seen) == 0


class Teller(threading.Thread):
    """Posts events, each by a user of its own, and remembers which were acknowledged."""

    def __init__(self, address: str, first_user: int) -> None:
        super().__init__(daemon=True)
        self.address, self.user, self.acknowledged, self.stopped = address, first_user, [], threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.user += 1
            body = {"user_id": self.user, "events": [{"item_id": "i0000001", "event_id": f"e{self.user}"}]}
            try:
                if ask(f"{self.address}/v1/events", body)["kept"] == 1:
                    self.acknowledged.append(self.user)
            except (OSError, ValueError):
                time.sleep(0.05)


def _told(address: str, then) -> list[int]:
    """Users whose event was acknowledged, of four who tell all the time; `then` happens when there are
    some."""
    tellers = [Teller(address, 1_000_000 * (n + 1)) for n in range(4)]
    for teller in tellers:
        teller.start()
    try:
        wait_for("60 acknowledged events", lambda: sum(len(teller.acknowledged) for teller in tellers) >= 60)
        then(tellers)
    finally:
        for teller in tellers:
            teller.stopped.set()
    for teller in tellers:
        teller.join(DEADLINE_S)
        assert not teller.is_alive()
    return [user for teller in tellers for user in teller.acknowledged]


def _collected(root: Path) -> Counter:
    entries = [
        int(user)
        for file in list_collected_files(root)
        for user in pq.read_table(file.uri)["user_id"].to_pylist()
    ]
    return Counter(user for user in entries if user > 1000)


@pytest.mark.slow
def test_more_replicas_are_started_under_load(own_home, shop, tmp_path):
    _, storage, _ = shop
    root = tmp_path / "root"
    shutil.copytree(storage.root, root, ignore=shutil.ignore_patterns("state"))
    before = len(titled(own_home, "ray::ServeReplica"))
    endpoint = Served(root, "serve.max_replicas=2")
    try:
        requests = [post("/v1/recommend", {"user_id": user, "mode": "realtime"}) for user in range(USERS)]
        with Continuous(endpoint.port, requests, rate=10_000.0) as running:
            wait_for(
                "another replica",
                lambda: len(titled(own_home, "ray::ServeReplica")) == before + 2,
                last_seen=lambda: titled(own_home, "ray::ServeReplica"),
            )
            running.has_seen_more()
        assert all(traffic.other_statuses == {} for traffic in running.seen)
    finally:
        endpoint.stop()


def test_nothing_acknowledged_is_lost_or_kept_twice_when_everything_is_killed(served, own_home, shop):
    settings, storage, _ = shop
    client = Client(served.address)
    sold_out = _popular(client)[0]
    client.change_items(items=[{"item_id": sold_out, "available": False}])
    acknowledged = _told(served.address, lambda _: kill(*titled(own_home, "")))
    served.process.communicate()
    assert len(acknowledged) > 50
    pipeline.run("collect", settings, None)
    served.start()
    ask(
        f"{served.address}/v1/events",
        {"user_id": acknowledged[0], "events": [{"item_id": "i0000001", "event_id": f"e{acknowledged[0]}"}]},
    )
    assert any("serving on" in line for line in served.process.stderr)
    assert all(sold_out not in _popular(client) for _ in range(20))
    client.restore_item(sold_out)
    pipeline.run("collect", settings, None)
    collected = _collected(storage.root)
    assert set(acknowledged) <= set(collected) and max(collected.values()) == 1


def test_nothing_acknowledged_is_lost_when_redis_is_killed(own_home, shop, tmp_path, synthetic_dataset):
    binary = shutil.which("redis-server")
    if binary is None:
        absent("Redis is not installed (Debian's package redis-server)")
    settings, _, _ = shop
    storage = publish_untrained(settings, synthetic_dataset, tmp_path / "root")
    (port,) = free_ports(1)
    (tmp_path / "redis").mkdir()
    state = f"redis://127.0.0.1:{port}/0"
    where = settings.model_copy(
        update={
            "storage": settings.storage.model_copy(update={"root": str(storage.root)}),
            "serve": settings.serve.model_copy(update={"state": state}),
        }
    )
    with contextlib.ExitStack() as stack:
        server = start_redis(binary, str(tmp_path / "redis"), port)
        stack.callback(lambda: (server.kill(), server.wait()))  # the one of then
        endpoint = Served(storage.root, f"serve.state={state}")
        stack.callback(endpoint.stop)

        def restart(tellers):
            nonlocal server
            server.kill()
            server.wait()
            answer = ask(f"{endpoint.address}/v1/recommend", {"user_id": 7})
            assert answer["source"] == "snapshot" and answer["degraded"] == ["state"]
            server = start_redis(binary, str(tmp_path / "redis"), port)
            heard = len(tellers[0].acknowledged)
            wait_for("the endpoint to find its log again", lambda: len(tellers[0].acknowledged) >= heard + 5)

        acknowledged = _told(endpoint.address, restart)
        assert len(acknowledged) > 50
        pipeline.run("collect", where, None)
    collected = _collected(storage.root)
    assert set(acknowledged) <= set(collected) and max(collected.values()) == 1
