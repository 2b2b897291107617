"""`PUT /v1/items`: what changes of items is served at once, by all replicas, and after a restart."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recray.config import ServeSettings
from recray.errors import RequestError, UnknownItemError
from recray.events.items import ItemChange
from recray.serving.api import ItemsRequest, RecommendRequest, SimilarRequest
from recray.serving.service import Service
from recray.testing.published import publish_untrained

ALL, KNOWN, UNKNOWN = 120, 7, "nobody"


@pytest.fixture(scope="module")
def storage(synthetic_settings, synthetic_dataset, tmp_path_factory):
    return publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("items"))


@pytest.fixture
def start(storage, synthetic_settings):
    """Starts a replica."""
    replicas = []

    def start() -> Service:
        replicas.append(Service(storage, ServeSettings(timeout_s=30), synthetic_settings.score))
        return replicas[-1]

    yield start
    for replica in replicas:
        replica.close()
    for file in (storage.root / "state").glob("*"):
        file.unlink()


def change(service, *items):
    return asyncio.run(service.catalogue.change_items(ItemsRequest.model_validate({"items": list(items)})))


def ids(service, **request):
    response = asyncio.run(service.recommend(RecommendRequest.model_validate({"k": ALL, **request})))
    return [item.item_id for item in response.items]


WAYS = [
    {"user_id": KNOWN, "k": 5},
    {"user_id": KNOWN, "mode": "realtime"},
    {"user_id": KNOWN, "mode": "batch", "k": 20},
    {"user_id": UNKNOWN},
    {"user_id": KNOWN, "where": {"price": {"min": 0}}, "k": 5},
]


@pytest.mark.parametrize("request_", WAYS, ids=str)
def test_what_is_sold_out_is_gone_everywhere_and_comes_back(start, request_):
    first, second = start(), start()
    before = ids(first, **request_)
    gone = before[:2]
    made = change(first, *({"item_id": item, "available": False} for item in gone))
    assert (made.changed, made.added) == (2, 0)
    second.catalogue.refresh()
    for service in (first, second, start()):
        after = ids(service, **request_)
        assert not set(gone) & set(after)
        assert [item for item in before if item not in gone] == after[: len(before) - 2]
        assert len(after) == len(before) or request_.get("k", ALL) != 5
        similar = asyncio.run(service.catalogue.similar(SimilarRequest(item_id=before[3], k=ALL))).items
        assert not set(gone) & {item.item_id for item in similar}
    change(second, *({"item_id": item, "available": True} for item in gone))
    assert ids(second, **request_) == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_lists_are_those_of_before_without_what_is_not_available(start, data):
    service = start()
    way = data.draw(st.sampled_from(WAYS[1:4:2]))
    before = ids(start(), **way) if service.state.unavailable.size == 0 else None
    items = sorted(ids(service, user_id=UNKNOWN) if before is None else before)
    steps = data.draw(st.lists(st.tuples(st.sampled_from(items), st.booleans()), min_size=1, max_size=20))
    for item, available in steps:
        change(service, {"item_id": item, "available": available})
    last = dict(steps)
    if before is not None:
        assert ids(service, **way) == [item for item in before if last.get(item, True)]
    change(service, *({"item_id": item, "available": True} for item in last))


def test_filters_rules_and_titles_have_the_new_attributes(start, storage, synthetic_settings):
    service, other = start(), start()
    item = ids(service, user_id=KNOWN)[0]
    assert item not in ids(service, user_id=KNOWN, where={"price": {"min": 5000}})
    change(
        service, {"item_id": item, "attributes": {"price": 9999.5, "title": "A new name", "tags": ["a", "b"]}}
    )
    other.catalogue.refresh()
    for each in (service, other):
        assert ids(each, user_id=KNOWN, where={"price": {"min": 5000}}) == [item]
        assert ids(each, user_id=UNKNOWN, where={"tags": ["b"], "price": {"min": 5000}}) == [item]
        assert each.state.find_title(item) == "A new name"
    change(service, {"item_id": item, "attributes": {"price": None}})
    assert ids(service, user_id=KNOWN, where={"price": {"min": 5000}}) == []
    assert service.state.find_title(item) == "A new name", "what is not named stays"

    asyncio.run(service.catalogue.restore_item(str(item)))
    assert service.state.find_title(item) != "A new name"
    assert start().state.find_title(item) == service.state.find_title(item)


def test_a_new_item_is_recommended_by_its_features(start):
    service = start()
    table = service.state.dataset.items
    like = table.slice(0, 1).to_pylist()[0]
    new = "new"
    attributes = {name: like[name] for name in service.state.dataset.features}
    made = change(service, {"item_id": new, "attributes": attributes})
    assert (made.changed, made.added) == (0, 1)
    for each in (service, start()):
        assert ids(each, user_id=KNOWN, allow=[new, like["item_id"]], mode="realtime").count(new) == 1
        assert new in ids(each, user_id=UNKNOWN, k=1000)
        assert asyncio.run(each.catalogue.similar(SimilarRequest(item_id=new, k=3))).items
        assert each.state.find_title(new) == like["title"] and each.models().items == ALL + 1
    before = service.state.predictor.encoder
    change(service, {"item_id": new, "available": False})
    assert new not in ids(service, user_id=UNKNOWN, k=1000)
    assert service.state.predictor.encoder is before, "its features are as they were"
    change(service, {"item_id": like["item_id"], "attributes": {"price": 1.0}})
    assert service.state.predictor.encoder is before, "nothing is computed again for it"


@pytest.mark.parametrize(
    ("items", "error", "words"),
    [
        (
            [{"item_id": "i0000001", "attributes": {"colour": "red"}}],
            RequestError,
            ["no column 'colour'", "price"],
        ),
        (
            [{"item_id": "i0000001", "attributes": {"price": "cheap"}}],
            RequestError,
            ["items.1.attributes.price", "send a number"],
        ),
        (
            [{"item_id": "i0000001", "attributes": {"price": True}}],
            RequestError,
            ["items.1.attributes.price"],
        ),
        (
            [{"item_id": "i0000001", "attributes": {"tags": 3}}],
            RequestError,
            ["items.1.attributes.tags", "a list, each element text"],
        ),
        ([{"item_id": " ", "available": False}], RequestError, ["items.1.item_id", "blank"]),
        ([{"item_id": "shoe", "available": False}], UnknownItemError, ["no item 'shoe'", "attributes"]),
        ([{"item_id": "shoe", "attributes": {"price": None}}], UnknownItemError, ["cannot know", "brand"]),
    ],
)
def test_what_cannot_be_changed_is_named_and_nothing_is_stored(start, items, error, words):
    service = start()
    item = ids(service, user_id=KNOWN)[0]
    with pytest.raises(error) as caught:
        change(service, {"item_id": item, "available": False}, *items)
    message = f"{caught.value.message} {caught.value.fix}"
    assert all(word in message for word in words), message
    assert service.recorder.log.read_items(0) == (0, []) and ids(service, user_id=KNOWN)[0] == item


def test_what_a_run_cannot_hold_is_left_out_and_the_rest_is_applied(start, caplog):
    """Changes outlive runs, and the next run's columns may have other types."""
    service = start()
    first, second, third = ids(service, user_id=UNKNOWN)[:3]
    service.recorder.log.change_items(
        [
            ItemChange(first, available=False),
            ItemChange(second, attributes={"price": "cheap", "title": "kept", "gone": 1}),
            ItemChange(17, attributes={"price": 2.0}),
            ItemChange(third, attributes={"price": 7777.0}),
        ]
    )
    service.catalogue.refresh()
    assert first not in ids(service, user_id=UNKNOWN)
    assert service.state.find_title(second) == "kept" and f"item {second} is left out" in caplog.text
    assert ids(service, user_id=UNKNOWN, where={"price": {"min": 5000}}) == [third]


def test_changes_stay_with_the_next_run_and_the_challenger(start, storage):
    service = start()
    item = ids(service, user_id=UNKNOWN)[0]
    change(service, {"item_id": item, "available": False, "attributes": {"price": 7777.0}})
    (storage.latest).write_bytes(storage.latest.read_bytes() + b"\n")  # the same run, published again
    loaded = service.deployments._loaded.state
    service.refresh()
    assert service.deployments._loaded.state is not loaded
    assert item not in ids(service, user_id=UNKNOWN)
    assert ids(service, user_id=UNKNOWN, where={"price": {"min": 5000}}) == []
