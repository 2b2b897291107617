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
  quiet: {experiment: false}
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
    assert "home, cart, bell, one, quiet" in caught.value.fix
    words = ["data.events=[x.csv]", f"storage.root={tmp_path}"]
    for surface, message in (
        ("{home: {boost: 1}}", "boost"),
        ("{home: {seen_days: 3}}", "seen-item filter is off"),
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
