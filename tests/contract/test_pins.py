"""What a change of words or rooms must not move: responses, what is logged of them, artifacts, losses and
weights.

`RECRAY_RECORD=1 pytest tests/contract/test_pins.py` writes them down anew; a change of behaviour is then seen
in the records' diff. Scores and losses are compared to five digits, as machines add in different orders.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import synthetic_overrides
from starlette.testclient import TestClient
from test_surface import recorded

from recray.bundle import Bundle
from recray.config import ServeSettings, load_settings
from recray.config.formats import to_first_names
from recray.inference import Predictor
from recray.inference.observer import Observer
from recray.inference.policy import OBSERVED, ObservationNormalizer, Policy
from recray.release import begin_experiment, release_policy
from recray.serving.http import create_app
from recray.serving.service import Service
from recray.storage import Storage, key_of
from recray.testing.published import prepare_here, publish_untrained, untrained_bundle
from recray.testing.synthetic import SyntheticShop
from recray.training.plan import bundle_settings, training_settings
from recray.training.worker import build_loop

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
NOW = "2024-05-20T12:00:00Z"
KNOWN_USER, OTHER, NOBODY = 3, 11, 10**9
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "without seen items": {"filter_seen": True},
    "allow": {"allow": ["i0000001", "i0000005", "i0000009", "i0000010", "nothing of the sort"]},
    "deny": {"deny": ["i0000000", "i0000002"]},
    "where": {"where": {"category": ["kind 1", "kind 2"], "price": {"max": 20}}},
    "nothing left": {"allow": []},
}
SENT: dict[str, dict[str, Any]] = {
    "history": {
        "history": [
            {"item_id": "i0000004", "timestamp": "2024-03-01T10:00:00Z"},
            {"item_id": "i0000007", "timestamp": "2024-04-01T10:00:00Z"},
        ]
    },
    "events": {"events": [{"item_id": "i0000004", "timestamp": NOW, "value": 2.0}]},
    "empty history": {"history": []},
    "controls": {"controls": {"temperature": 0.5, "recency": -0.5}},
    "no controls": {"controls": {}},
    "explanation": {"explain": True},
    "moment": {"now": NOW},
    "all of the catalogue": {"k": 30},
}
WRONG: dict[str, dict[str, Any]] = {
    "unknown field": {"user": 3},
    "unknown column": {"user_id": KNOWN_USER, "where": {"colour": ["red"]}},
    "unknown control": {"user_id": KNOWN_USER, "controls": {"heat": 1.0}},
    "history in batch": {"user_id": KNOWN_USER, "mode": "batch", "history": []},
    "unknown context": {"user_id": KNOWN_USER, "context": {"weather": "rain"}},
    "too many": {"user_id": KNOWN_USER, "k": 10_000},
}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/score", {"user_id": KNOWN_USER, "items": ["i0000001", "i0000002", "i0000003"]}),
    ("/v1/score", {"history": [], "items": ["i0000001"]}),
    ("/v1/score", {"user_id": KNOWN_USER, "items": ["nothing of the sort"]}),
    ("/v1/similar", {"item_id": "i0000001", "k": 3}),
    ("/v1/similar", {"item_id": "nothing of the sort"}),
    ("/v1/history", {"user_id": KNOWN_USER, "last": 4}),
    ("/v1/history", {"user_id": NOBODY}),
]
DRAWN = {"request_id", "ms", "model_ms", "loaded_at"}  # another one each time
DIGESTS = {"snapshot", "bundle_digest"}  # of numbers whose last bits are the machine's


def requests_of(*users: int, filters: bool, sent: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests with what they are about: modes by filters, and what may be sent along."""
    requests = []
    for user in users:
        for mode in ("auto", "batch", "realtime"):
            for name, settings in FILTERS.items() if filters else [("none", {})]:
                requests.append(
                    (
                        f"{user}, {mode}, {name}",
                        "/v1/recommend",
                        {"user_id": user, "k": 4, "mode": mode, **settings},
                    )
                )
        for name, settings in SENT.items() if sent else ():
            requests.append((f"{user}, auto, {name}", "/v1/recommend", {"user_id": user, "k": 4, **settings}))
    return requests


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A workspace with a published run, a challenger and a policy; its files of release and publication as
    they were.
    """
    folder = tmp_path_factory.mktemp("pins")
    SyntheticShop(users=40, items=30, events_per_user=8, seed=1).write(folder)
    settings = load_settings(
        None, [*synthetic_overrides(folder, folder / "root"), "data.shards=2", "score.k=10"]
    )
    dataset = prepare_here(settings)
    storage = publish_untrained(settings, dataset, folder / "root")
    other = load_settings(
        None, [*synthetic_overrides(folder, folder / "root"), "data.shards=2", "train.seed=5"]
    )
    untrained_bundle(other, dataset, storage.bundle("challenger"), "challenger")
    bundle = Bundle.open(storage.bundle("untrained"))
    predictor = Predictor.load(bundle.path, dataset=dataset)
    histories = [
        predictor.vocabulary.translation(dataset).history(dataset.user_history(user)) for user in range(40)
    ]
    state = predictor.recommend(histories, 2, now=dataset.now_s, with_state=True).state
    observer = Observer(predictor)
    observations = np.stack(
        [
            observer.observe(history, dataset.now_s, night_state)
            for history, night_state in zip(histories, state, strict=True)
        ]
    )
    weights = {"weight_0": torch.full((2, len(OBSERVED)), 0.05), "bias_0": torch.tensor([0.5, -0.5])}
    policy = Policy(
        ("temperature", "recency"),
        ObservationNormalizer.of(observations),
        weights,
        bundle.digest,
        {"promoted": True, "reason": ""},
    )
    policy.save(storage.policy("policy"), "policy")
    return settings, storage, bundle, storage.release.read_bytes()


def plain(storage: Storage, bundle: Bundle) -> None:
    """The champion alone."""


def with_policy(storage: Storage, bundle: Bundle) -> None:
    release_policy(storage, bundle, "policy", 1.0)


def with_experiment(storage: Storage, bundle: Bundle) -> None:
    begin_experiment(storage, Bundle.open(storage.bundle("challenger")), 0.5)


def with_shadow(storage: Storage, bundle: Bundle) -> None:
    begin_experiment(storage, Bundle.open(storage.bundle("challenger")), 0.5, shadow=True)


EVENTS = {
    "user_id": KNOWN_USER,
    "events": [
        {"item_id": "i0000006", "timestamp": "2024-05-01T09:00:00Z", "event_id": "one"},
        {"item_id": "i0000008", "timestamp": "2024-05-02T09:00:00Z", "event_id": "two"},
    ],
}
CASES = {
    "plain": (
        plain,
        None,
        [*requests_of(KNOWN_USER, filters=True, sent=True), *requests_of(NOBODY, filters=True, sent=False)],
    ),
    "state": (
        plain,
        EVENTS,
        [*requests_of(KNOWN_USER, filters=True, sent=True), *requests_of(OTHER, filters=False, sent=False)],
    ),
    "policy": (
        with_policy,
        EVENTS,
        [*requests_of(KNOWN_USER, filters=False, sent=True), *requests_of(OTHER, filters=False, sent=True)],
    ),
    "experiment": (
        with_experiment,
        None,
        [
            *requests_of(*range(6), filters=False, sent=False),
            *requests_of(KNOWN_USER, filters=True, sent=True),
        ],
    ),
    "shadow": (with_shadow, None, requests_of(*range(4), filters=False, sent=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_responses_and_what_is_logged_of_them_are_those_recorded(published, case):
    settings, storage, bundle, release = published
    release_as, events, requests = CASES[case]
    storage.release.write_bytes(release)
    for file in (storage.root / "state").glob("*"):
        file.unlink()
    release_as(storage, bundle)
    handler = Service(storage, ServeSettings(timeout_s=60.0), settings.score, policy=settings.policy)
    responses: dict[str, Any] = {}

    async def tasks() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks()

    async def shadowed() -> None:
        await asyncio.gather(*(asyncio.all_tasks() - lasting - {asyncio.current_task()}))

    with TestClient(create_app(handler), base_url="http://localhost") as client:
        lasting = client.portal.call(tasks)  # the application's own

        def post(name: str, path: str, body: dict[str, Any]) -> None:
            response = client.post(path, json=body)
            responses[f"{path}: {name}"] = {"status": response.status_code, **response.json()}
            client.portal.call(shadowed)

        if events is not None:
            post("two events", "/v1/events", events)
        for one in requests:
            post(*one)
        if case == "plain":
            for name, body in WRONG.items():
                post(name, "/v1/recommend", body)
        for path, body in OTHERS:
            post(json.dumps(body), path, body)
        client.portal.call(handler.recorder.writer.append, [])
        logged = [entry for _, entry in handler.recorder.writer.log.read(0, 1000)]
        responses["models"] = client.get("/v1/models").json()
    bodies = [{"kind": entry.kind, "user": entry.user, **without_drawn(entry.body)} for entry in logged]
    assert_same(f"responses_{case}.json", {"responses": without_drawn(responses), "logged": bodies})


def test_bytes_of_a_run_are_those_recorded(published):
    """All but manifests, which name settings, and lists, whose scores are a matter of rounding."""
    _, storage, _, _ = published
    (dataset,) = (storage.root / "datasets").iterdir()
    digests = {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(dataset.rglob("*"))
        if path.suffix in (".arrow", ".npy")
    }
    tables = {path.stem: pq.read_table(path).to_pydict() for path in sorted(dataset.glob("*.parquet"))}
    (snapshot,) = storage.scores.glob("dt=*/*")
    rows = sorted(
        (row for part in snapshot.glob("part-*.parquet") for row in pq.read_table(part).to_pylist()),
        key=lambda row: row["user_id"],
    )
    assert digests and tables and len(rows) == 40
    assert_same("run.json", {"digests": digests, "tables": tables, "lists": rows[:10]})


@pytest.mark.parametrize(
    "parts",
    [["model.preset=ligr"], ["model.preset=sasrec"], ["model.preset=hstu"]],
    ids=lambda parts: parts[0],
)
def test_losses_and_weights_of_a_training_are_those_recorded(published, parts):
    settings, storage, _, _ = published
    (dataset,) = (storage.root / "datasets").iterdir()
    overrides = [*synthetic_overrides(storage.root.parent, storage.root), "data.shards=2", *parts]

    def trained() -> tuple[list[float], dict[str, torch.Tensor]]:
        loop = build_loop(
            str(dataset), training_settings(load_settings(None, overrides)), torch.device("cpu")
        )
        losses = [epoch["loss"] for epoch in loop.run()]
        return losses, loop.best

    losses, weights = trained()
    repeated, same = trained()
    assert losses == repeated and all(torch.equal(weight, same[name]) for name, weight in weights.items()), (
        "to the bit, of one seed"
    )
    sums = {
        name: [float(weight.double().sum()), float(weight.double().square().sum())]
        for name, weight in weights.items()
    }
    assert_same(f"training_{parts[0].partition('=')[2]}.json", {"losses": losses, "weights": sums})


def without_drawn(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: without_drawn(value) for name, value in content.items() if name not in DRAWN | DIGESTS}
    return [without_drawn(value) for value in content] if isinstance(content, list) else content


def assert_same(name: str, content: Any) -> None:
    """As recorded, but for the rounding of numbers."""
    content = json.loads(json.dumps(content))
    differences = list(differ(content, recorded(f"pins/{name}", content), ""))
    assert not differences, "\n".join([f"{name} changed in {len(differences)} places:", *differences[:20]])


def differ(now: Any, then: Any, where: str) -> Any:
    if isinstance(now, dict) and isinstance(then, dict):
        for name in sorted(now.keys() | then.keys()):
            if name not in now or name not in then:
                yield f"{where}/{name}: {'new' if name in now else 'gone'}"
            else:
                yield from differ(now[name], then[name], f"{where}/{name}")
    elif isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        for number, (one, other) in enumerate(zip(now, then, strict=True)):
            yield from differ(one, other, f"{where}/{number}")
    elif isinstance(now, float) and isinstance(then, float):
        if not math.isclose(now, then, rel_tol=1e-4, abs_tol=1e-5):
            yield f"{where}: {now} was {then}"
    elif now != then:
        yield f"{where}: {now!r} was {then!r}"


def test_a_pin_notices_what_moves():
    then = {"items": [{"item_id": "a", "score": 1.0}], "source": "model"}
    assert not list(differ({"items": [{"item_id": "a", "score": 1.000001}], "source": "model"}, then, ""))
    for moved in (
        {"items": [{"item_id": "b", "score": 1.0}], "source": "model"},
        {"items": [], "source": "model"},
        {"items": [{"item_id": "a", "score": 1.01}], "source": "model"},
        {"items": [{"item_id": "a", "score": 1.0}], "from": "model"},
    ):
        assert list(differ(moved, then, ""))


def test_there_are_as_many_requests_as_promised():
    assert sum(len(requests) for *_, requests in CASES.values()) >= 60
    assert Path(__file__).parent.joinpath("records", "pins", "run.json").exists()


@pytest.mark.parametrize(
    "overrides",
    [["train.calibrate=false", "model.cooccurrence=false"], ["privacy.enabled=true", "privacy.cap=8"]],
    ids=["demo", "private"],
)
def test_run_keys_outlive_new_names_of_settings(overrides):
    """They were recorded under the names of 0.1.0: what a run wrote then is found, and paid for once. Only
    what 0.1.0 had not makes another bundle.
    """
    settings = load_settings(CONFIGS / "demo.yaml", overrides)
    keys = {
        "data and split": key_of(settings.key_settings("data", "split")),
        "bundle": key_of(to_first_names(bundle_settings(settings))),
        "promotion": key_of(settings.key_settings("promotion", "evaluate", "score")),
    }
    assert_same(f"keys_{'private' if 'privacy.enabled=true' in overrides else 'demo'}.json", keys)
