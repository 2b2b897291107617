"""Surfaces (`serve.surfaces`): each place of the product has lists of its own."""

import asyncio
import re

import pytest

from recray.config import load_settings
from recray.errors import RequestError, SettingsError
from recray.release import Member, Release
from recray.serving.api import RecommendRequest
from recray.serving.service import Service, check_surfaces
from recray.testing.published import prepare_here, publish_untrained, untrained_bundle

EVENTS = """\
user_id,item_id,event,timestamp
ann,tea,view,2024-05-01
ann,cup,purchase,2024-05-02
ann,pot,view,2024-05-03
bob,tea,view,2024-05-01
bob,cup,view,2024-05-03
cat,tea,view,2024-05-02
cat,cup,view,2024-05-02
cat,pot,view,2024-05-04
dan,tea,view,2024-05-04
dan,milk,view,2024-05-04
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
SURFACES = """{
  home: {k: 3},
  cart: {k: 4, filter_seen: true, seen_events: [purchase], where: {price: {max: 6}}},
  bell: {boosts: {brand=bell: 20}, exclude: [brand=dairy]},
  one: {caps: {brand: 1}, k: 6},
  quiet: {experiment: false},
  campaign: {k: 4, where: {brand: [acme, bell]}, pins: [
    {item_id: jam, position: 2},
    {item_id: cake, position: 1, since: 2024-06-01, until: 2024-07-01},
    {item_id: milk},
    {item_id: nothing},
    {item_id: pot, position: 9, since: 2024-07-01}]}
}"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("surfaces")
    (folder / "events.csv").write_text(EVENTS)
    (folder / "items.csv").write_text(ITEMS)
    words = [
        f"data.events=[{folder / 'events.csv'}]",
        f"data.items={folder / 'items.csv'}",
        "data.features={brand: categorical, price: numeric}",
        "split.kind=leave_one_out",
        f"storage.root={folder / 'workspace'}",
        "model.dim=8",
        "score.k=6",
        f"serve.surfaces={SURFACES}",
    ]
    settings = load_settings(None, words)
    storage = publish_untrained(settings, prepare_here(settings), settings.root())
    service = Service(storage, settings.serve, settings.score)
    yield settings, storage, service
    service.close()


def recommend(service, user="eve", **request):
    response = asyncio.run(service.recommend(RecommendRequest(user_id=user, **request)))
    return [item.item_id for item in response.items]


POPULAR = ["tea", "cup", "pot", "milk", "cake", "jam"]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, POPULAR),
        ({"surface": "home"}, POPULAR[:3]),
        ({"surface": "home", "k": 2}, POPULAR[:2]),
        ({"surface": "cart"}, ["tea", "cup", "milk", "cake"]),
        ({"surface": "cart", "where": {"price": {"max": 3}}}, ["tea", "milk", "jam"]),
        ({"surface": "bell", "k": 6}, ["pot", "cake", "tea", "cup", "jam"]),
        ({"surface": "one"}, ["tea", "pot", "milk"]),
    ],
    ids=str,
)
def test_a_surface_fills_in_what_the_request_lacks(shop, request_, expected):
    assert recommend(shop[2], **request_) == expected


@pytest.mark.parametrize(
    ("moment", "request_", "expected"),
    [
        ("2024-05-20", {}, ["tea", "jam", "cup", "pot"]),  # milk is of another brand, nothing is unknown
        ("2024-06-10", {}, ["cake", "jam", "tea", "cup"]),
        ("2024-07-10", {}, ["tea", "jam", "cup", "pot"]),  # the cake is over, there is no ninth place
        ("2024-06-10", {"k": 1}, ["cake"]),
        ("2024-06-10", {"deny": ["jam"]}, ["cake", "tea", "cup", "pot"]),
        ("2024-06-10", {"filter_seen": True, "user_id": "ann"}, ["cake", "jam"]),
        ("2024-07-10", {"deny": ["tea", "cup"], "k": 6}, ["pot", "jam", "cake"]),
    ],
)
def test_pinned_items_have_their_places_between_their_dates(shop, moment, request_, expected):
    service, request_ = shop[2], dict(request_)
    user = request_.pop("user_id", "eve")
    assert recommend(service, user, surface="campaign", now=f"{moment}T00:00:00Z", **request_) == expected
    response = asyncio.run(
        service.recommend(RecommendRequest(user_id=user, surface="campaign", now=f"{moment}T00:00:00Z"))
    )
    scores = [item.score for item in response.items]
    assert scores == sorted(scores, reverse=True)


def test_items_are_pinned_in_calls_of_many_users_and_in_whole_lists_too(shop):
    service = shop[2]
    now = asyncio.run(service.recommend(RecommendRequest(user_id="ann", surface="campaign")))
    assert now.items[1].item_id == "jam" and len(now.items) == 4
    many = asyncio.run(service.recommend_users(RecommendRequest(users=["ann", "bob"], surface="campaign")))
    assert [each.items[1].item_id for each in many.responses] == ["jam", "jam"]
    first = asyncio.run(
        service.recommend(RecommendRequest(user_id="ann", surface="campaign", cursor="", k=2))
    )
    rest = asyncio.run(
        service.recommend(RecommendRequest(user_id="ann", surface="campaign", cursor=first.cursor, k=2))
    )
    pages = [item.item_id for page in (first, rest) for item in page.items]
    assert len(set(pages)) == 4, "no repeats"


def test_an_unknown_pinned_item_is_named_when_the_endpoint_starts(shop, caplog):
    check_surfaces(shop[0].serve.surfaces, shop[2].state)
    assert "serve.surfaces.campaign.pins: no item 'nothing'" in caplog.text


def test_lists_of_a_user_follow_the_surface_too(shop):
    service = shop[2]
    plain = recommend(service, "ann")
    assert set(plain) == set(POPULAR)
    cart = recommend(service, "ann", surface="cart")
    assert "cup" not in cart and "pot" not in cart and "tea" in cart, "bought, too dear, only seen"
    assert recommend(service, "ann", surface="cart", filter_seen=False).count("cup") == 1
    bell = recommend(service, "ann", surface="bell", k=6)
    assert set(bell[:2]) == {"pot", "cake"} and "milk" not in bell
    together = [recommend(service, user, surface=name) for user in ("ann", "bob") for name in ("bell", "one")]
    assert together == [
        recommend(service, user, surface=name) for user in ("ann", "bob") for name in ("bell", "one")
    ]


def test_a_surface_without_experiments_gets_the_champion_and_counts_in_none(shop):
    settings, storage, service = shop
    champion = Release.read(storage).champion
    changed = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 3})})
    other = untrained_bundle(changed, prepare_here(settings), storage.bundle("other"), "other")
    Release(champion=champion, challenger=Member.of(other), share=1.0, since_s=1.0).write(storage)
    service.refresh()
    bundles = [
        asyncio.run(service.recommend(RecommendRequest(user_id="ann", surface=name))).bundle
        for name in ("home", "quiet")
    ]
    assert bundles == ["other", "untrained"]
    asyncio.run(service.recorder.write(lambda writer: writer.append([])))
    bodies = [entry.body for _, entry in service.recorder.log.read(0, 1000)][-2:]
    assert [(body["surface"], "arm" in body) for body in bodies] == [("home", True), ("quiet", False)]
    Release(champion=champion).write(storage)
    service.refresh()


def test_what_cannot_be_is_named(shop, tmp_path):
    with pytest.raises(RequestError, match="no surface 'card'") as caught:
        recommend(shop[2], surface="card")
    assert "home, cart, bell, one, quiet, campaign" in caught.value.fix
    words = ["data.events=[x.csv]", f"storage.root={tmp_path}"]
    for surface, message in (
        ("{home: {boost: 1}}", "boost"),
        ("{home: {seen_days: 3}}", "seen-item filter is off"),
        ("{home: {pins: [{item_id: a, since: 2024-02-01, until: 2024-01-01}]}}", "not later than since"),
        ("{home: {pins: [{item_id: a, position: 0}]}}", "pins: .*greater"),
        ("{home: {k: 0}}", r"serve\.surfaces\.home\.k: .*greater"),
        ("{home: {filter_sen: true}}", "did you mean filter_seen"),
    ):
        with pytest.raises(SettingsError) as wrong:
            load_settings(None, [*words, f"serve.surfaces={surface}"])
        assert re.search(message, f"{wrong.value.message} {wrong.value.fix}"), wrong.value
    service = Service(
        shop[1],
        shop[0].serve.model_copy(
            update={
                "surfaces": load_settings(
                    None, [*words, "serve.surfaces={x: {boosts: {colour=red: 1}}}"]
                ).serve.surfaces
            }
        ),
        shop[0].score,
    )
    with pytest.raises(RequestError, match="'colour'"):
        recommend(service, surface="x")
    with pytest.raises(SettingsError, match=r"serve\.surfaces\.x: .*'colour'"):  # before the endpoint starts
        check_surfaces(service.options.surfaces, service.state)
    check_surfaces(shop[0].serve.surfaces, service.state)
    service.close()
