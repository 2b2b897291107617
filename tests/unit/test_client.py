"""The client is made from the OpenAPI document, and its methods do what the endpoint does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import re

import numpy as np
import pytest
from harness import served

from recray.client import AsyncClient, Client
from recray.client.generate import TARGET, generate
from recray.cluster import free_ports
from recray.config import ServeSettings
from recray.errors import RequestError, UnavailableError, UnknownItemError
from recray.serving.guard import draw_key
from recray.serving.service import Service
from recray.testing.published import publish_untrained

pytestmark = pytest.mark.second


def test_the_operations_are_those_of_the_openapi_document():
    assert TARGET.read_text() == generate(), "run: python -m recray.client.generate"


@pytest.fixture(scope="module")
def storage(synthetic_settings, synthetic_dataset, tmp_path_factory):
    return publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("client"))


@contextlib.contextmanager
def endpoint(storage, settings, **options):
    service = Service(storage, ServeSettings(outcomes={"click": 1.0}, **options), settings.score)
    with served(service) as url:
        yield url
    service.close()


@pytest.fixture(scope="module")
def address(storage, synthetic_settings):
    with endpoint(storage, synthetic_settings) as url:
        yield url


def test_each_operation(address):
    with Client(address) as client:
        assert client.health()["status"] == client.ready()["status"] == "ok"
        assert client.models()["items"] > 0
        response = client.recommend(user_id=7, k=3, filter_seen=True)
        items = [item["item_id"] for item in response["items"]]
        assert len(items) == 3
        assert [one["user_id"] for one in client.recommend(users=[7, 3], k=2)["responses"]] == [7, 3]
        assert client.recommend(user_id=7, k=2, where={"price": {"max": 20}})["items"]
        scores = client.score(user_id=7, items=[*items, "nothing"])["items"]
        assert scores[-1]["score"] is None and scores[0]["score"] is not None
        assert len(client.similar(item_id=items[0], k=4)["items"]) == 4
        assert client.events(user_id=7, events=[{"item_id": items[0], "event_id": "e1"}])["kept"] == 1
        assert client.history(user_id=7, last=1)["events"][0]["item_id"] == items[0]
        clicked = {"request_id": response["request_id"], "outcome": "click", "item_id": items[0]}
        assert client.feedback(**clicked)["kept"]
        assert client.forget("11")["new"]
        assert len(client.history(user_id=5, last=3)["events"]) > 0
        for odd in ("5#x", "5?x=1", "5/x", "a b%2F"):  # of nobody else
            with pytest.raises(RequestError, match=re.escape(repr(odd))):
                client.forget(odd)
        assert len(client.history(user_id=5, last=3)["events"]) > 0


def test_awaited_operations_give_the_same(address):
    async def ask():
        async with AsyncClient(address) as client:
            return await asyncio.gather(
                *(client.recommend(user_id=user, k=4) for user in (7, 3)), client.models()
            )

    first, second, models = asyncio.run(ask())
    with Client(address) as client:
        expected = [client.recommend(user_id=user, k=4)["items"] for user in (7, 3)]
    assert [first["items"], second["items"]] == expected and models["items"] > 0


def both(call):
    """Raise what a call raises, of either client."""

    def sync(address, **options):
        with Client(address, **options) as client:
            return call(client)

    def awaited(address, **options):
        async def ask():
            async with AsyncClient(address, **options) as client:
                return await call(client)

        return asyncio.run(ask())

    return sync, awaited


@pytest.mark.parametrize("number", [0, 1])
def test_what_the_endpoint_refuses_is_an_error_with_its_words(address, number):
    with pytest.raises(RequestError, match="k: ") as error:
        both(lambda client: client.recommend(user_id=7, k=0))[number](address)
    assert error.value.fix
    with pytest.raises(UnknownItemError, match="'nothing'"):
        both(lambda client: client.similar(item_id="nothing"))[number](address)


@pytest.mark.parametrize("number", [0, 1])
def test_an_endpoint_that_is_not_there_is_named(number, monkeypatch):
    monkeypatch.setattr("recray.client.PAUSE_S", 0.01)
    (port,) = free_ports(1)
    with pytest.raises(UnavailableError, match=f"127.0.0.1:{port} does not respond"):
        both(lambda client: client.models())[number](f"http://127.0.0.1:{port}", repeats=1)


def test_numbers_of_numpy_and_times_are_sent_and_what_is_no_json_is_named(address):
    with Client(address) as client:
        moment = dt.datetime(2024, 6, 1, tzinfo=dt.UTC)
        plain = client.recommend(user_id=7, k=3, now="2024-06-01T00:00:00Z")["items"]
        assert client.recommend(user_id=np.int64(7), k=3, now=moment)["items"] == plain
        for value, words in ((float("nan"), "JSON"), (object(), "object is not JSON")):
            with pytest.raises(RequestError, match=words):
                client.recommend(user_id=7, context={"device": value})
    with pytest.raises(RequestError, match="is no address"):
        Client("127.0.0.1:8000")
    with pytest.raises(RequestError, match="not open"):
        asyncio.run(_ask_closed(address))


async def _ask_closed(address):
    await AsyncClient(address).models()


def test_a_key_opens_what_it_may(storage, synthetic_settings, tmp_path):
    secret, entry = draw_key("shop", ["read"])
    (tmp_path / "keys.yaml").write_text(entry)
    with endpoint(storage, synthetic_settings, keys=str(tmp_path / "keys.yaml")) as url:
        with Client(url, secret) as client:
            assert client.recommend(user_id=7, k=2)["items"]
            with pytest.raises(RequestError, match="scope"):
                client.events(user_id=7, events=[{"item_id": "i0000001"}])
        with Client(url) as client, pytest.raises(RequestError):
            client.recommend(user_id=7)
