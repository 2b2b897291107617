"""Ids that people write: one text is one user, one item and one event, and no two are the same."""

import asyncio
import re

import pytest
from conftest import synthetic_overrides
from hypothesis import given
from hypothesis import strategies as st

from recray.config import load_settings
from recray.dataset.ids import to_canonical_integer, to_typed_id
from recray.errors import RequestError
from recray.events.log import Entry, make_key
from recray.events.store import open_log
from recray.serving.api import Event, EventsRequest, HistoryRequest, RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query
from recray.serving.service import Service
from recray.testing.published import publish_untrained

STRANGE = ["007", "1_0", " 12 ", "٣", "+5", "7.0", "7 ", "-0", "0x7", "1e3", "", " ", str(2**63), "7\n", "７"]


@given(
    st.one_of(
        st.integers(-(2**70), 2**70),
        st.text(max_size=24),
        st.integers().map(str),
        st.integers(0, 99).map(lambda n: f"{n:03d}"),
    )
)
def test_an_integer_has_one_text(value):
    text = to_canonical_integer(value)
    if isinstance(value, int):
        assert text == (value if -(2**63) <= value < 2**63 else None)
    elif text is not None:
        assert str(text) == value
    else:
        assert not re.fullmatch("0|-?[1-9][0-9]{0,17}", value, re.ASCII)


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_keys_of_pairs_do_not_collide_and_say_what_was_named(whose, named, other, also):
    assert (make_key(whose, named) == make_key(other, also)) == ((whose, named) == (other, also))
    assert Entry("event", make_key(whose, named), whose, 0.0, {}).external_id == named


def test_a_drawn_key_names_nothing():
    assert Entry("event", "0192f0c1", "7", 0.0, {}).external_id is None and make_key("7", "e1") == "7\0e1", (
        "as stores of 0.1.0 have it"
    )


@pytest.fixture(scope="module")
def handler(synthetic_folder, synthetic_dataset, tmp_path_factory):
    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path_factory.mktemp("ids")))
    service = Service(
        publish_untrained(settings, synthetic_dataset, settings.root()), settings.serve, settings.score
    )
    yield service
    service.close()


@pytest.mark.parametrize("text", STRANGE)
def test_text_that_is_no_integer_is_nobody_and_nothing_is_written_to_somebody(handler, text):
    answer = asyncio.run(handler.recommend(RecommendRequest(user_id=text, k=3)))
    assert answer.source == "popular"
    assert asyncio.run(handler.history(HistoryRequest(user_id=text))).events == []
    with pytest.raises(RequestError, match="user_id"):
        asyncio.run(handler.intake.events(EventsRequest(user_id=text, events=[{"item_id": "i0000001"}])))
    assert "event" not in {entry.kind for _, entry in handler.recorder.writer.log.read(0, 10_000)}


def test_the_integer_and_its_text_are_one_user(handler):
    one, other = (asyncio.run(handler.recommend(RecommendRequest(user_id=user, k=3))) for user in (7, "7"))
    assert one.source == other.source == "snapshot" and one.items == other.items


def test_a_blank_is_no_id_of_a_service_whose_ids_are_text(handler):
    assert (
        to_typed_id("", is_integral=False) is to_typed_id(" \t", is_integral=False) is None
        and to_typed_id(7, is_integral=False) == "7"
    )
    with pytest.raises(RequestError, match=r"events.0.item_id: ' ' is blank"):
        asyncio.run(handler.intake.events(EventsRequest(user_id=7, events=[{"item_id": " "}])))


def test_what_comes_after_the_query_time_is_not_known(handler):
    ids = handler.state.predictor.vocabulary.item_ids.to_pylist()
    started, expired = (
        Event(item_id=ids[0], timestamp="2024-02-01T00:00:00"),
        Event(item_id=ids[1], timestamp="2024-02-03T00:00:00"),
    )
    body = {"now": "2024-02-02T00:00:00", "k": 10}
    answers = [
        asyncio.run(handler.recommend(RecommendRequest(history=events, **body)))
        for events in ([started], [started, expired], [expired, started])
    ]
    assert answers[0].items == answers[1].items == answers[2].items
    alone = asyncio.run(handler.recommend(RecommendRequest(history=[expired], **body)))
    assert alone.source == "popular"
    stored = bind_query(
        resolve_query(RecommendRequest(user_id=7, now="1990-01-01T00:00:00"), handler.state), handler.state
    )
    assert len(stored.history.item_index) == 0


def test_one_event_id_says_one_thing(tmp_path):
    log = open_log("sqlite", tmp_path)
    first = Entry("event", make_key("7", "e1"), "7", 1.0, {"item_id": "a", "value": 1.0})
    other = Entry("event", make_key("7", "e1"), "7", 1.0, {"item_id": "b", "value": 1.0})
    assert log.append([first, first, other]) == [1, 0, -1]
    log.close()
