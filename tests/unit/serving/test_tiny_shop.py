"""The example to read first: a shop of 4 users and 6 items whose right lists anybody can write down.

Its model is untrained, so these are the lists that need none: the popularity fallback, filters and rules.
"""

import asyncio

import pytest

from recray.config import load_settings
from recray.errors import RequestError
from recray.serving.api import RecommendRequest
from recray.serving.service import Service
from recray.snapshot.reader import Snapshot
from recray.testing.published import prepare_here, publish_untrained

EVENTS = """\
user_id,item_id,timestamp
ann,tea,2024-05-01
ann,cup,2024-05-02
ann,pot,2024-05-03
bob,tea,2024-05-01
bob,cup,2024-05-03
cat,tea,2024-05-02
cat,cup,2024-05-02
cat,pot,2024-05-04
dan,tea,2024-05-04
dan,milk,2024-05-04
"""
ITEMS = """\
item_id,brand,price
tea,acme,3.0
cup,acme,5.0
pot,bell,12.0
milk,dairy,1.0
cake,bell,4.0
jam,acme,2.5
"""
POPULAR = {"tea": 4, "cup": 3, "pot": 2, "milk": 1, "cake": 0, "jam": 0}
"""How often users interacted with each item; equal ones by their ids."""


@pytest.fixture(scope="module")
def open_shop(tmp_path_factory):
    """A function that publishes the shop by some settings and returns its endpoint."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "events.csv").write_text(EVENTS)
    (folder / "items.csv").write_text(ITEMS)
    services: dict[tuple[str, ...], Service] = {}

    def open_with(*overrides: str) -> Service:
        if overrides in services:
            return services[overrides]
        paths = [f"data.events=[{folder / 'events.csv'}]", f"data.items={folder / 'items.csv'}"]
        features = ["data.features={brand: categorical, price: numeric}", "split.kind=leave_one_out"]
        root = f"storage.root={folder / f'workspace {len(services)}'}"
        settings = load_settings(None, [*paths, *features, root, "model.dim=8", *overrides])
        storage = publish_untrained(settings, prepare_here(settings), settings.root())
        services[overrides] = Service(storage, settings.serve, settings.score, policy=settings.policy)
        return services[overrides]

    yield open_with
    for service in services.values():
        service.close()


def recommend(service: Service, **request: object) -> list[str]:
    response = asyncio.run(service.recommend(RecommendRequest(**request)))
    return [item.item_id for item in response.items]


def test_an_unknown_user_gets_the_popularity_fallback(open_shop):
    response = asyncio.run(open_shop().recommend(RecommendRequest(user_id="eve", k=6)))
    assert response.source == "popular" and response.as_of == "2024-05-04"
    scores = {item.item_id: item.score for item in response.items}
    assert {item: 4 * score / scores["tea"] for item, score in scores.items()} == pytest.approx(POPULAR)
    assert [item.item_id for item in response.items] == ["tea", "cup", "pot", "milk", "cake", "jam"]


@pytest.mark.parametrize(
    ("request_filters", "expected"),
    [
        ({"k": 2}, ["tea", "cup"]),
        ({"deny": ["tea", "pot"]}, ["cup", "milk", "cake", "jam"]),
        ({"allow": ["jam", "pot", "nothing of ours"]}, ["pot", "jam"]),
        ({"where": {"price": {"max": 4}}}, ["tea", "milk", "cake", "jam"]),
        ({"where": {"brand": ["bell", "dairy"]}}, ["pot", "milk", "cake"]),
        ({"where": {"brand": ["bell"]}, "deny": ["pot"]}, ["cake"]),
        ({"allow": []}, []),
    ],
)
def test_a_request_says_what_may_be_recommended(open_shop, request_filters, expected):
    assert recommend(open_shop(), user_id="eve", **request_filters) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("score.exclude=[brand=acme]", ["pot", "milk", "cake"]),
        ("score.caps={brand: 1}", ["tea", "pot", "milk"]),
        # a boost of 2 makes e² (1 + count) - 1 of a count: pot 21.2, cake 6.4, between them tea 4
        ("score.boosts={brand=bell: 2}", ["pot", "cake", "tea", "cup", "milk", "jam"]),
    ],
)
def test_the_settings_say_it_for_everybody(open_shop, rule, expected):
    assert recommend(open_shop(rule), user_id="eve", k=6) == expected


def test_batch_recommendations_hold_every_item_once_and_with_the_filter_no_seen_one(open_shop):
    service = open_shop("score.filter_seen=true", "score.k=6")
    lists = Snapshot.latest(service.deployments.storage)
    for user, cold_items in (
        ("ann", {"milk", "cake", "jam"}),
        ("bob", {"pot", "milk", "cake", "jam"}),
        ("cat", {"milk", "cake", "jam"}),
        ("dan", {"cup", "pot", "cake", "jam"}),
    ):
        assert sorted(lists.find(user).item_ids) == sorted(cold_items)
        assert set(recommend(service, user_id=user, k=6)) == cold_items


def test_a_column_that_the_shop_does_not_have_is_named(open_shop):
    with pytest.raises(RequestError, match="colour"):
        recommend(open_shop(), user_id="eve", where={"colour": ["red"]})
