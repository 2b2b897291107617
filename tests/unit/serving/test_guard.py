"""API keys, scopes and rates in front of an endpoint."""

import asyncio
import json
import os
import socket
from types import SimpleNamespace

import pytest

from recray.config import ServeSettings
from recray.errors import SettingsError
from recray.serving.guard import KEYS_VARIABLE, Guard, draw_key


async def _app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(guard, path="/v1/recommend", headers=None, times=1):
    """Answers with `status_code`, `headers` and `json`, one after the other."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
    }

    async def one():
        sent = []

        async def send(message):
            sent.append(message)

        await guard(scope, None, send)
        headers_sent = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return SimpleNamespace(
            status_code=sent[0]["status"], headers=headers_sent, json=lambda: json.loads(sent[1]["body"])
        )

    async def run():
        return [await one() for _ in range(times)]

    return asyncio.run(run())


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.yaml"
    shop, first = draw_key("shop", ["read"])
    log, second = draw_key("log", ["write"])
    chief, third = draw_key("chief", ["admin"])
    path.write_text(first + second + third)
    return path, shop, log, chief


def test_without_keys_everything_is_open(monkeypatch):
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert ask(Guard(_app, ServeSettings()))[0].status_code == 200


def test_keys_open_what_their_scopes_say(keys):
    path, shop, log, chief = keys
    guard = Guard(_app, ServeSettings(keys=str(path)))
    bearer = {"Authorization": f"Bearer {shop}"}
    assert ask(guard, headers=bearer)[0].status_code == 200
    assert ask(guard, headers={"X-API-Key": shop})[0].status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {shop}"}):
        (refused,) = ask(guard, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert (
            refused.headers["content-type"] == "application/problem+json" and refused.json()["status"] == 401
        )
    (refused,) = ask(guard, "/v1/events", bearer)
    assert refused.status_code == 403 and "write" in refused.json()["detail"]
    assert ask(guard, "/v1/events", {"X-API-Key": log})[0].status_code == 200
    assert ask(guard, headers={"X-API-Key": log})[0].status_code == 403
    assert ask(guard, "/v1/anything", bearer)[0].status_code == 403
    assert ask(guard, "/v1/history", bearer)[0].status_code == 403, "what users did is no part of reading"
    assert {
        ask(guard, at, {"X-API-Key": chief})[0].status_code
        for at in ("/v1/recommend", "/v1/events", "/v1/anything")
    } == {200}
    assert ask(guard, "/healthz")[0].status_code == 200


def test_the_file_holds_no_key_and_is_read_again(keys, monkeypatch):
    path, shop, _, _ = keys
    assert shop not in path.read_text()
    guard = Guard(_app, ServeSettings(keys=str(path)))
    monkeypatch.setattr("recray.serving.guard.RELOAD_S", -1.0)
    other, entry = draw_key("other", ["read"])
    path.write_text(entry)
    os.utime(path, ns=(1, 1))
    assert ask(guard, headers={"X-API-Key": other})[0].status_code == 200
    assert ask(guard, headers={"X-API-Key": shop})[0].status_code == 401
    path.write_text("what is this: [")
    assert ask(guard, headers={"X-API-Key": other})[0].status_code == 200


def test_keys_come_from_the_environment(monkeypatch):
    secret, entry = draw_key("shop", ["read"])
    monkeypatch.setenv(KEYS_VARIABLE, entry)
    guard = Guard(_app, ServeSettings())
    assert (
        ask(guard)[0].status_code == 401 and ask(guard, headers={"X-API-Key": secret})[0].status_code == 200
    )


@pytest.mark.parametrize(
    "text", ["- {name: a}", "name: a", "- {name: a, sha256: short, scopes: [read]}", "[", "", "- {}"]
)
def test_a_keys_file_that_cannot_be_used_is_refused(tmp_path, text):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match="keys.yaml"):
        Guard(_app, ServeSettings(keys=str(path)))


def test_settings_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        Guard(_app, ServeSettings(keys=str(tmp_path / "absent.yaml")))
    with pytest.raises(SettingsError, match="serve.rate"):
        Guard(_app, ServeSettings(rate="often"))
    with pytest.raises(SettingsError, match="scopes"):
        draw_key("shop", ["everything"])


@pytest.mark.parametrize("store", ["memory", "redis_server"])
def test_a_rate_is_held_for_each_key(keys, request, store):
    path, shop, _, chief = keys
    state = "sqlite" if store == "memory" else request.getfixturevalue(store)
    if state != "sqlite":
        pytest.importorskip("redis").Redis.from_url(state).flushall()
    options = ServeSettings(keys=str(path), rate="3/hour", state=state)
    first = [answer.status_code for answer in ask(Guard(_app, options), headers={"X-API-Key": shop}, times=2)]
    answers = ask(
        Guard(_app, options) if store != "memory" else (guard := Guard(_app, options)),
        headers={"X-API-Key": shop},
        times=4,
    )
    assert first == [200, 200]
    expected = [200, 200, 200, 429] if store == "memory" else [200, 429, 429, 429]
    assert [answer.status_code for answer in answers] == expected, (
        "replicas share a rate where they share a store"
    )
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 3600
    if store == "memory":
        assert ask(guard, headers={"X-API-Key": chief})[0].status_code == 200
        assert ask(guard, "/healthz", times=9)[-1].status_code == 200


def test_an_unavailable_store_of_rates_refuses_nobody(keys):
    path, shop, _, _ = keys
    guard = Guard(_app, ServeSettings(keys=str(path), rate="1/hour", state="redis://127.0.0.1:1/0"))
    assert ask(guard, headers={"X-API-Key": shop})[0].status_code == 200


def test_a_store_of_rates_that_hangs_is_not_waited_for(keys, monkeypatch):
    monkeypatch.setattr("recray.serving.guard.RETRY_S", 1e6)
    path, shop, _, _ = keys
    with socket.create_server(("127.0.0.1", 0)) as mute:
        guard = Guard(
            _app,
            ServeSettings(
                keys=str(path), rate="1/hour", state=f"redis://127.0.0.1:{mute.getsockname()[1]}/0"
            ),
        )
        assert ask(guard, headers={"X-API-Key": shop})[0].status_code == 200
        mute.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                mute.accept()[0].close()
        assert [answer.status_code for answer in ask(guard, headers={"X-API-Key": shop}, times=5)] == [
            200
        ] * 5
        with pytest.raises(BlockingIOError):  # after the first it is left alone for a while
            mute.accept()
