"""The seen-item filter by event type and by days: alike in lists, by the model, and in plain Python."""

import asyncio
import datetime as dt

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recray.config import load_settings
from recray.errors import RequestError, SettingsError
from recray.serving.api import RecommendRequest
from recray.serving.service import Service
from recray.snapshot.reader import Snapshot
from recray.testing.published import prepare_here, publish_untrained

ITEMS = [f"i{number}" for number in range(12)]
AS_OF = dt.datetime(2024, 5, 31, tzinfo=dt.UTC)
# user, item, event, days before the as-of
EVENTS = [
    *(("ann", ITEMS[n], "view", 2 * n + 0.5) for n in range(8)),
    *(("ann", ITEMS[n], "purchase", 2 * n + 0.5) for n in (1, 5)),
    ("ann", "i5", "purchase", 40.5),
    ("ann", "i9", "purchase", 50.5),
    *(("bob", item, "view", 0) for item in ITEMS),
]


@pytest.fixture(scope="module")
def open_shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    lines = [
        f"{user},{item},{event},{(AS_OF - dt.timedelta(days=days)).isoformat()}"
        for user, item, event, days in EVENTS
    ]
    (folder / "events.csv").write_text("\n".join(["user_id,item_id,event,timestamp", *lines]))
    services: dict[tuple[str, ...], Service] = {}

    def open_with(*overrides: str) -> Service:
        if overrides not in services:
            root = f"storage.root={folder / f'workspace {len(services)}'}"
            words = [
                f"data.events=[{folder / 'events.csv'}]",
                root,
                "model.dim=8",
                "split.kind=leave_one_out",
                "score.k=12",
            ]
            words += overrides
            made = load_settings(None, words)
            storage = publish_untrained(made, prepare_here(made), made.root())
            services[overrides] = Service(storage, made.serve, made.score)
        return services[overrides]

    yield open_with
    for service in services.values():
        service.close()


def seen_items(events=(), days=None, user="ann"):
    return {
        item
        for who, item, event, ago in EVENTS
        if who == user and (not events or event in events) and (days is None or ago <= days)
    }


def recommend(service, **request):
    response = asyncio.run(service.recommend(RecommendRequest(**{"user_id": "ann", "k": 12, **request})))
    return response.source, [item.item_id for item in response.items]


RULES = [((), None), (("purchase",), None), ((), 5), (("purchase",), 20), (("view", "purchase"), 45)]


@pytest.mark.parametrize(("events", "days"), RULES)
def test_lists_and_requests_leave_out_the_same(open_shop, events, days):
    overrides = ["score.filter_seen=true"]
    overrides += [f"score.seen_events=[{','.join(events)}]"] if events else []
    overrides += [f"score.seen_days={days}"] if days else []
    listed, plain = open_shop(*overrides), open_shop()
    rule = {"filter_seen": True, "seen_events": list(events), **({"seen_days": days} if days else {})}
    everything = recommend(plain, mode="realtime")[1]
    expected = [item for item in everything if item not in seen_items(events, days)]
    assert len(everything) == 12
    assert recommend(listed, mode="batch") == ("snapshot", expected), "the lists"
    assert recommend(listed, k=3, **rule) == ("snapshot", expected[:3]), "the same rule needs no model"
    assert recommend(listed, mode="realtime") == ("realtime", expected)
    assert recommend(plain, **rule) == ("realtime", expected)
    assert recommend(plain, mode="batch", **rule)[1] == expected


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    events=st.lists(st.sampled_from(["view", "purchase"]), unique=True),
    days=st.none() | st.integers(1, 60),
    deny=st.sets(st.sampled_from(ITEMS)),
)
def test_the_model_leaves_out_what_plain_python_does(open_shop, events, days, deny):
    service = open_shop()
    everything = recommend(service, mode="realtime")[1]
    rule = {"filter_seen": True, "seen_events": events, "seen_days": days, "deny": sorted(deny)}
    without = seen_items(events, days) | deny
    assert recommend(service, **rule)[1] == [item for item in everything if item not in without]


def test_a_new_purchase_is_left_out_and_a_new_view_is_not(open_shop):
    service = open_shop("score.filter_seen=true", "score.seen_events=[purchase]")
    for mode in ("auto", "realtime"):
        events = [{"item_id": "i0", "event": "purchase"}, {"item_id": "i2", "event": "view"}]
        items = recommend(service, mode=mode, events=events)[1]
        assert "i0" not in items and "i2" in items


def test_what_cannot_be_is_named(open_shop, tmp_path):
    service = open_shop()
    for wrong, words in (
        ({"filter_seen": True, "seen_events": ["buy"]}, "seen_events: no event type 'buy'"),
        ({"seen_events": ["purchase"]}, "seen_events: the seen-item filter is off"),
        ({"seen_days": 3}, "seen_days: the seen-item filter is off"),
    ):
        with pytest.raises(RequestError, match=words):
            recommend(service, **wrong)
    with pytest.raises(SettingsError, match=r"seen_days: the seen-item filter is off"):
        load_settings(None, ["data.events=[x.csv]", f"storage.root={tmp_path}", "score.seen_days=3"])


def test_a_snapshot_says_its_rule_only_where_it_has_one(open_shop):
    with_rule = open_shop("score.filter_seen=true", "score.seen_events=[purchase]").state.snapshot
    assert isinstance(with_rule, Snapshot)
    assert with_rule.manifest["seen"] == {"events": ["purchase"], "days": None}
    assert "seen" not in open_shop().state.snapshot.manifest
