"""The console and what it asks for: items by text, what people see of them, users, variants side by side."""

import asyncio
import json
import shutil

import pytest
from browser import dump_dom, read_axe, with_axe
from conftest import synthetic_overrides
from harness import served

from recray.config import ServeSettings, load_settings
from recray.errors import RequestError
from recray.evaluation.evaluate import evaluate, evaluate_key
from recray.release import Member, Release
from recray.report.page import write_report
from recray.serving import http as http_module
from recray.serving.api import ItemsRequest, RecommendRequest, SearchRequest, SimilarRequest
from recray.serving.service import Service
from recray.testing.published import prepare_here, publish_untrained, untrained_bundle

PICTURE = "https://pictures.example/i.png"


@pytest.fixture(scope="module")
def shop(synthetic_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("console")
    words = [
        *synthetic_overrides(synthetic_folder, root),
        "data.display={title: title, price: price, image: brand}",
    ]
    settings = load_settings(None, words)
    return settings, publish_untrained(settings, prepare_here(settings), root)


@pytest.fixture
def service(shop):
    settings, storage = shop
    made = Service(storage, ServeSettings(timeout_s=30), settings.score)
    yield made
    made.close()
    for file in (storage.root / "state").glob("*"):
        file.unlink()


def search(service, text, k=100):
    return asyncio.run(service.catalogue.search(SearchRequest(text=text, k=k))).items


def test_items_are_found_by_a_part_of_their_title_or_id_in_any_case(service):
    table = service.state.dataset.items
    titles = dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))
    words = {word for title in titles.values() for word in title.lower().split()}
    word = max(words, key=lambda word: (sum(word in title.lower() for title in titles.values()) < 50, word))
    for text in (word.upper(), f"  {word.lower()} "):
        item_ids = [item.item_id for item in search(service, text)]
        assert set(item_ids) == {item for item, title in titles.items() if word.lower() in title.lower()}
    counts = dict(zip(table["item_id"].to_pylist(), table["events"].to_pylist(), strict=True))
    assert [counts[item] for item in item_ids] == sorted((counts[item] for item in item_ids), reverse=True)
    assert [item.item_id for item in search(service, "I0000003")] == ["i0000003"]
    assert search(service, titles["i0000005"])[0].item_id == "i0000005", "the whole title comes first"
    assert search(service, "no such thing") == [] and len(search(service, "i0", k=7)) == 7


def test_an_item_is_described_as_declared_and_as_it_changed(service):
    item = search(service, "i0000003")[0]
    row = service.state.dataset.items.filter(service.state.dataset.items["item_id"].to_numpy() == "i0000003")
    assert (item.title, item.available) == (row["title"][0].as_py(), True)
    assert float(item.price) == row["price"][0].as_py() and item.image == row["brand"][0].as_py()
    change = {"item_id": "i0000003", "available": False, "attributes": {"price": 12.5, "brand": PICTURE}}
    asyncio.run(service.catalogue.change_items(ItemsRequest.model_validate({"items": [change]})))
    item = search(service, "i0000003")[0]
    assert (item.price, item.image, item.available) == ("12.5", PICTURE, False)
    response = asyncio.run(service.recommend(RecommendRequest(user_id=7, k=5, describe=True)))
    assert all(item.title and item.price for item in response.items)
    plain = asyncio.run(service.recommend(RecommendRequest(user_id=7, k=5)))
    assert all(item.title is None and item.price is None for item in plain.items)
    similar = asyncio.run(service.catalogue.similar(SimilarRequest(item_id="i0000004", k=3, describe=True)))
    assert all(item.title for item in similar.items)
    asyncio.run(service.catalogue.restore_item("i0000003"))


def test_variants_respond_side_by_side_and_count_nowhere(service, shop):
    settings, storage = shop
    champion = Release.read(storage).champion
    with pytest.raises(RequestError, match="no challenger"):
        asyncio.run(service.recommend(RecommendRequest(user_id=7, variant="challenger")))
    changed = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 9})})
    other = untrained_bundle(changed, prepare_here(settings), storage.bundle("other"), "other")
    Release(champion=champion, challenger=Member.of(other), share=0.5, since_s=1.0).write(storage)
    service.refresh()
    bundles = {}
    for variant in ("champion", "challenger", "popular"):
        response = asyncio.run(service.recommend(RecommendRequest(user_id=7, variant=variant)))
        bundles[variant] = (response.bundle, response.source)
    assert bundles == {
        "champion": ("untrained", "snapshot"),
        "challenger": ("other", "realtime"),
        "popular": ("untrained", "popular"),
    }
    asyncio.run(service.recorder.write(lambda writer: writer.append([])))  # all that is queued
    bodies = [entry.body for _, entry in service.recorder.log.read(0, 100) if entry.kind == "decision"]
    assert [body["asked"] for body in bodies] == ["preview"] * 3
    assert not any("arm" in body or "decision" in body for body in bodies), (
        "neither test nor policy reads them"
    )
    users = asyncio.run(service.catalogue.sample_users()).users
    service.opt_out_list.add(users[0])
    others = asyncio.run(service.catalogue.sample_users()).users
    assert users[0] not in others and len(others) == len(users)
    (storage.root / "forgotten.json").unlink()
    Release(champion=champion).write(storage)
    shutil.rmtree(storage.bundle("other"))


def test_the_console_is_a_page_for_everybody(service, monkeypatch, tmp_path):
    """Axe-core finds no serious fault, at a desk and on a phone."""
    folder = tmp_path / "serving"
    folder.mkdir()
    page = (http_module.Path(http_module.__file__).parent / "console.html").read_text()
    (folder / "console.html").write_text(with_axe(page))
    monkeypatch.setattr(http_module, "CONSOLE", folder / "console.html")
    with served(service) as address:
        for width in (1280, 390):
            dom = dump_dom(f"{address}/console?user=7", width)
            assert "items similar to" in dom and ">ready<" in dom and 'class="chip"' in dom
            assert "temperature" in dom and "Find an item" in dom
            serious = [fault for fault in read_axe(dom) if fault[0] in ("serious", "critical")]
            assert not serious, json.dumps(serious, indent=1)[:3000]
        assert "recray console" in dump_dom(f"{address}/"), "the start page"


def test_the_report_is_a_page_for_everybody(shop, tmp_path):
    settings, storage = shop
    dataset = prepare_here(settings)
    bundle = Release.read(storage).champion.open(storage)
    evaluate(settings, evaluate_key(settings, dataset, bundle), dataset, bundle)
    _, path, _ = write_report(settings, dataset, bundle)
    page = (path / "report.html").read_text()
    assert "Sample lists" in page and "Segments" in page
    titles = set(dataset.items["title"].to_pylist())
    assert sum(title in page for title in titles) > 5, "titles, not ids"
    (tmp_path / "report.html").write_text(with_axe(page))
    serious = [
        fault
        for fault in read_axe(dump_dom(f"file://{tmp_path / 'report.html'}"))
        if fault[0] in ("serious", "critical")
    ]
    assert not serious, json.dumps(serious, indent=1)[:3000]
