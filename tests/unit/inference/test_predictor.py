import numpy as np
import pyarrow as pa
import pytest
import torch

from recray.dataset.popularity import UNKNOWN_DAY, Popularity
from recray.dataset.reader import History
from recray.errors import RequestError
from recray.inference import Catalogue, Filters, Predictor, Rules, Vocabulary
from recray.inference.candidates import top_k
from recray.inference.explain import explain
from recray.inference.similar import find_similar
from recray.model.controls import Controls
from recray.model.network import Network
from recray.model.shape import Shape

V, DAY = 40, 86_400
NOW = 300 * DAY


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    model = Network(Shape(event_types=2, dim=16, history=12), np.arange(V + 1) > 0, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    random = np.random.default_rng(0)
    popularity = Popularity.count_events(
        random.integers(1, V + 1, 500), random.integers(280, 300, 500) * DAY, V
    )
    return Predictor(
        model,
        Catalogue(
            Vocabulary(pa.array([f"i{n:02d}" for n in range(V)]), ["buy", "view"]), popularity, has_time=True
        ),
        popularity_prior_days=7,
    )


def history(length: int, seed: int = 0) -> History:
    random = np.random.default_rng([seed, length])
    times = np.sort(random.integers(0, 299, length)) * DAY
    return History(
        random.integers(1, V + 1, length), random.integers(0, 2, length), times, np.ones(length, np.float32)
    )


def test_alone_equals_in_a_batch(predictor):
    histories = [history(n) for n in (1, 3, 7, 12, 30)]
    together = predictor.recommend(histories, V, now=NOW)
    for row, single in enumerate(histories):
        alone = predictor.recommend([single], V, now=NOW)
        np.testing.assert_allclose(alone.scores[0], together.scores[row], atol=1e-5)
        assert alone.item_index[0, 0] == together.item_index[row, 0]
    repeated = predictor.recommend(histories, V, now=NOW)
    assert (repeated.scores == together.scores).all() and (repeated.item_index == together.item_index).all()


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"time_bias": False, "relative": True},
        {"attention": "pointwise", "residual": "plain", "feed": "none"},
    ],
)
def test_in_bfloat16_scores_differ_a_little(parts):
    torch.manual_seed(0)
    model = Network(Shape(event_types=2, dim=32, heads=2, history=150, **parts), np.arange(V + 1) > 0, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    popularity = Popularity.count_events(np.arange(1, V + 1), np.full(V, 290 * DAY), V)
    ids = pa.array([f"i{n:02d}" for n in range(V)])
    catalogue = Catalogue(Vocabulary(ids, ["buy", "view"]), popularity, has_time=True)
    whole, half = (
        Predictor(model, catalogue, popularity_prior_days=7, bfloat16=half) for half in (False, True)
    )
    histories = [history(n) for n in (1, 9, 70, 150)]
    controls = Controls(log_temperature=torch.full((4, 2), 0.3), recency_slope=torch.full((4,), 0.5))
    for modulation in (None, controls):
        exact, near = (
            each.recommend(histories, V, now=NOW, controls=modulation, with_state=True)
            for each in (whole, half)
        )
        scores = [np.sort(answer.scores, 1) for answer in (exact, near)]
        assert 0 < abs(scores[0] - scores[1]).max() < 0.03 * scores[0].std()
        np.testing.assert_allclose(near.state, exact.state, atol=0.05)
    assert half.recommend(histories, 5, now=NOW).scores.dtype == np.float32


def test_a_model_in_training_is_evaluated_as_it_will_serve():
    torch.manual_seed(0)
    brand = (np.arange(V, dtype=np.int64), np.maximum(np.arange(V + 1) - 1, 0))
    model = Network(
        Shape(event_types=2, dim=16, history=12, id_dropout=0.5), np.arange(V + 1) > 0, {"brand": brand}
    ).eval()
    nothing = Popularity.count_events(np.zeros(0, np.int64), None, V)
    catalogue = Catalogue(Vocabulary(pa.array(np.arange(V)), ["buy", "view"]), nothing, has_time=True)
    predictor = Predictor(model, catalogue, popularity_prior_days=0)
    answer = predictor.recommend([history(5)], 10, now=NOW)
    model.train()
    predictor.refresh()
    assert model.training and (predictor.recommend([history(5)], 10, now=NOW).scores == answer.scores).all()


def test_scores_are_the_recommended_scores(predictor):
    answer = predictor.recommend([history(5), history(9)], 10, now=[NOW, NOW - DAY])
    scores = predictor.score([history(5), history(9)], list(answer.item_index), now=[NOW, NOW - DAY])
    np.testing.assert_allclose(np.stack(scores), answer.scores, atol=1e-6)


def test_an_explanation_is_what_leaving_each_event_out_costs(predictor):
    plain_history = history(9)
    history_with_unknown = History(
        *(np.insert(values, 4, 0) for values in plain_history)
    )  # an unknown item among them
    items = predictor.recommend([plain_history], 3, now=NOW).item_index[0]
    reasons = explain(predictor, history_with_unknown, items, now=NOW)
    assert reasons.position.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert reasons.drop.shape == (3, 9) and reasons.attention.sum() == pytest.approx(1.0, abs=1e-5)
    (whole,) = predictor.score([plain_history], [items], now=NOW)
    for position in range(9):
        (less,) = predictor.score(
            [History(*(np.delete(values, position) for values in plain_history))], [items], now=NOW
        )
        np.testing.assert_allclose(reasons.drop[:, position], whole - less, atol=1e-5)


def test_the_only_event_carries_what_is_above_the_mean(predictor):
    one = history(1)
    items = predictor.recommend([one], 3, now=NOW).item_index[0]
    reasons = explain(predictor, History(*(np.insert(values, 0, 0) for values in one)), items, now=NOW)
    (every,) = predictor.score([one], [np.arange(1, V + 1)], now=NOW)
    assert reasons.position.tolist() == [1] and reasons.attention.tolist() == [1.0]
    np.testing.assert_allclose(reasons.drop, (every[items - 1] - every.mean())[:, None], atol=1e-5)
    assert (reasons.drop > 0).all()


def test_a_long_history_is_explained_by_what_the_attention_saw_most(predictor):
    long = history(40)
    items = predictor.recommend([long], 2, now=NOW).item_index[0]
    reasons = explain(predictor, long, items, now=NOW, events=5)
    assert (
        len(reasons.position) == 5
        and (reasons.position >= 28).all()
        and (np.diff(reasons.position) > 0).all()
    )
    everything = explain(predictor, long, items, now=NOW)
    rest = np.setdiff1d(everything.position, reasons.position)
    places = {position: rank for rank, position in enumerate(everything.position)}
    top_positions = {position for position in everything.position if long.item_index[position] in items}
    least_attention = min(
        reasons.attention[[position not in top_positions for position in reasons.position]], default=1.0
    )
    assert all(
        everything.attention[places[position]] <= least_attention + 1e-6
        for position in rest
        if position not in top_positions
    )
    nobody = explain(predictor, history(0), items, now=NOW)
    assert nobody.drop.shape == (2, 0) and len(nobody.position) == 0


def test_only_the_last_events_of_known_items_count(predictor):
    long = history(30)
    assert (
        predictor.recommend([long], 5, now=NOW).scores
        == predictor.recommend([long.last(12)], 5, now=NOW).scores
    ).all()
    unknown = History(*(np.insert(a, 2, 0) for a in long.last(5)))
    assert (
        predictor.recommend([unknown], 5, now=NOW).scores
        == predictor.recommend([long.last(5)], 5, now=NOW).scores
    ).all()


def test_without_history_the_popular_list_is_marked(predictor):
    empty = History(*(np.zeros(0, np.int64) for _ in range(4)))
    answer = predictor.recommend([history(3), empty], 5, now=NOW)
    assert answer.source == ["model", "popular"]
    recent = predictor.catalogue.popularity.window(NOW, 7)
    assert recent[answer.item_index[1]].tolist() == sorted(recent, reverse=True)[:5]


def test_filters(predictor):
    h = history(6)
    new = predictor.recommend([h], V, now=NOW, filters=Filters(filter_seen=True)).item_index[0]
    assert not set(new[new > 0]) & set(h.item_index)
    assert (new == 0).sum() == len(set(h.item_index))
    allowed = predictor.recommend(
        [h], 5, now=NOW, filters=Filters(allow=np.array([3, 9]), deny=np.array([9]))
    ).item_index[0]
    assert allowed.tolist() == [3, 0, 0, 0, 0]


def test_what_the_request_says_of_now_matters(predictor):
    a, b = (predictor.recommend([history(8)], V, now=now).scores for now in (NOW, NOW + 40 * DAY))
    assert np.abs(a - b).max() > 1e-3


def test_controls_of_one_request_in_a_batch(predictor):
    zeros = Controls.zeros(2, 2, 2, 1)
    hot = zeros._replace(log_temperature=torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    histories = [history(8), history(9)]
    base, moved = (predictor.recommend(histories, V, now=NOW, controls=c) for c in (zeros, hot))
    none = predictor.recommend(histories, V, now=NOW)
    assert (base.scores == none.scores).all()
    assert (base.scores[0] == moved.scores[0]).all() and np.abs(base.scores[1] - moved.scores[1]).max() > 1e-4


def test_queries_that_make_no_sense_are_refused(predictor):
    with pytest.raises(RequestError, match="k is 0"):
        predictor.recommend([history(3)], 0, now=NOW)
    with pytest.raises(RequestError, match="outside 0 to 40"):
        predictor.recommend([history(3)._replace(item_index=np.array([1, 2, 99]))], 5, now=NOW)
    with pytest.raises(RequestError, match="item index -3 or 99 lies outside 0 to 40"):
        predictor.score([history(3)], [np.array([5, 99, -3])], now=NOW)
    with pytest.raises(RequestError, match="event index 0 or 2 lies outside 0 to 1"):
        predictor.recommend([history(3)._replace(event_index=np.array([0, 2, 1]))], 5, now=NOW)
    with pytest.raises(RequestError, match="value is not finite"):
        predictor.recommend([history(3)._replace(value=np.array([1.0, np.nan, 1.0]))], 5, now=NOW)


@pytest.mark.parametrize("block", [1, 7, 40])
def test_the_answer_does_not_depend_on_how_many_items_or_histories_are_scored_at_once(
    predictor, monkeypatch, block
):
    histories = [history(n) for n in (0, 1, 3, 7, 12, 30)]
    filters = [
        Filters(filter_seen=n % 2 == 0, deny=np.array([3, 9 + n]), allow=np.arange(1, 30) if n > 3 else None)
        for n in range(6)
    ]
    whole = predictor.recommend(histories, 25, now=NOW, filters=filters)
    candidates = [np.array([1, 40, 7])] * 6
    scores = predictor.score(histories, candidates, now=NOW)
    monkeypatch.setattr("recray.inference.candidates.ITEM_BLOCK", block)
    monkeypatch.setattr("recray.inference.predictor.TOKENS", 13)
    parts = predictor.recommend(histories, 25, now=NOW, filters=filters)
    np.testing.assert_allclose(parts.scores, whole.scores, atol=1e-5)
    assert (parts.item_index == whole.item_index).mean() > 0.99 and parts.source == whole.source
    assert (parts.item_index[parts.scores == -np.inf] == 0).all() and (whole.item_index > 0).sum() == (
        parts.item_index > 0
    ).sum()
    np.testing.assert_allclose(
        np.stack(predictor.score(histories, candidates, now=NOW)), np.stack(scores), atol=1e-5
    )


def test_rules_apply_to_answers_of_model_and_popularity_alike(predictor):
    group = torch.arange(V + 1) % 2
    group[0] = -1
    boost = torch.zeros(V + 1)
    boost[7], boost[8] = 1000.0, -torch.inf
    rules = Rules(0.0, boost, ((group, 3),))
    answer = predictor.recommend([history(0), history(5)], 6, now=NOW, rules=rules)
    assert answer.item_index[0, 0] == answer.item_index[1, 0] == 7
    for row in answer.item_index:
        assert 8 not in row and (group[row].bincount() == 3).all()
    plain = predictor.recommend([history(5)], 40, now=NOW)
    scores = dict(zip(plain.item_index[0].tolist(), plain.scores[0].tolist(), strict=True))
    np.testing.assert_allclose(
        answer.scores[1, 1:], [scores[item] for item in answer.item_index[1, 1:].tolist()], atol=1e-5
    )


def test_what_the_popular_list_is_made_of_is_counts_with_boosts(predictor):
    """A dial for what features say is none of counts: nobody met is not popular."""
    empty = History(*(np.zeros(0, np.int64) for _ in range(4)))
    boost, cold = torch.zeros(V + 1), torch.zeros(V + 1)
    boost[7], boost[8], cold[9] = 1.0, -torch.inf, 1000.0
    plain = predictor.recommend([empty], V, now=NOW)
    scores = dict(zip(plain.item_index[0].tolist(), plain.scores[0].tolist(), strict=True))
    answer = predictor.recommend([empty, history(5)], V, now=NOW, rules=Rules(0.0, boost, (), cold))
    score_of = dict(zip(answer.item_index[0].tolist(), answer.scores[0].tolist(), strict=True))
    assert answer.item_index[1, 0] == 9 and 8 not in answer.item_index
    for one in (score_of, scores):
        for item in (0, 8):
            one.pop(item, None)
    np.testing.assert_allclose(np.log1p(score_of.pop(7)), np.log1p(scores.pop(7)) + 1.0, rtol=1e-6)
    assert score_of == scores


def test_an_item_of_which_nothing_is_known_is_as_good_as_any_on_average():
    torch.manual_seed(0)
    is_learned = np.arange(V + 1) > 0
    is_learned[[4, 9]] = False
    model = Network(Shape(event_types=1, dim=16, history=12, repeat=False, prior=False), is_learned, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    popularity = Popularity.count_events(np.arange(1, V + 1), np.full(V, 290 * DAY), V)
    predictor = Predictor(
        model,
        Catalogue(Vocabulary(pa.array(range(V)), ["buy"]), popularity, has_time=True),
        popularity_prior_days=0,
    )
    h = History(np.array([1, 2, 3]), np.zeros(3, np.int64), np.array([1, 2, 3]) * DAY, np.ones(3, np.float32))
    (scores,) = predictor.score([h], [np.arange(1, V + 1)], now=NOW)
    others = np.delete(scores, [3, 8])
    np.testing.assert_allclose(scores[[3, 8]], others.mean(), atol=1e-4)
    assert np.abs(others.mean()) > 0.01, "which is not zero"
    assert (
        not np.isin([4, 9], find_similar(predictor, 1, V)[0]).any()
        and len(find_similar(predictor, 4, V)[0]) == 0
    )


def test_what_is_not_released_is_not_answered():
    torch.manual_seed(0)
    model = Network(Shape(event_types=1, dim=16, history=12), np.arange(V + 1) > 0, {})
    released = np.full(V + 1, UNKNOWN_DAY)
    released[[5, 6, 7]] = 301, 300, 400
    popularity = Popularity.count_events(np.array([1, 7]), np.array([290, 299]) * DAY, V)
    vocabulary = Vocabulary(pa.array(range(V)), ["buy"])
    catalogue = Catalogue(vocabulary, popularity, has_time=True, available_from=released)
    predictor = Predictor(model, catalogue, popularity_prior_days=7)
    empty = History(*(np.zeros(0, np.int64) for _ in range(4)))
    one = History(np.array([1]), np.zeros(1, np.int64), np.array([290 * DAY]), np.ones(1, np.float32))
    for rows, moments in (
        ([one, empty], NOW),
        ([one, empty], [NOW, NOW + DAY]),
        ([empty, one], [NOW + DAY, NOW + 5 * DAY]),
    ):
        answer = predictor.recommend(rows, V, now=moments)
        for row, moment in enumerate(np.broadcast_to(moments, 2)):
            there = set(answer.item_index[row].tolist())
            assert (5 in there) == (moment >= NOW + DAY) and 6 in there
            assert 7 in there, "it was met before the day that is said"
    assert 5 not in find_similar(predictor, 1, V, NOW)[0] and 5 in find_similar(predictor, 1, V, NOW + DAY)[0]


def test_a_longer_diverse_list_begins_like_a_shorter_one(predictor, monkeypatch):
    monkeypatch.setattr("recray.inference.rules.POOL", 25)
    rules = Rules(0.4, torch.zeros(V + 1), ())
    short, long = (predictor.recommend([history(5)], k, now=NOW, rules=rules).item_index[0] for k in (2, 5))
    assert (
        short.tolist()
        == long[:2].tolist()
        != predictor.recommend([history(5)], 2, now=NOW).item_index[0].tolist()
    )


def test_a_list_under_rules_depends_on_nobody_beside_it(predictor, monkeypatch):
    monkeypatch.setattr("recray.inference.rules.POOL", 8)
    ours, theirs = history(5), history(9, 3)
    group = torch.full((V + 1,), -1)
    group[torch.from_numpy(predictor.recommend([theirs], 16, now=NOW).item_index[0])] = 0
    for caps in ((), ((group, 2),)):
        rules = Rules(0.8, torch.zeros(V + 1), caps)
        alone = predictor.recommend([ours], 6, now=NOW, rules=rules).item_index[0]
        assert (
            alone.tolist()
            == predictor.recommend([ours, theirs], 6, now=NOW, rules=rules).item_index[0].tolist()
        )
        long = predictor.recommend([ours, theirs], 30, now=NOW, rules=rules)
        assert alone.tolist() == long.item_index[0, :6].tolist()
        if not caps:
            assert (np.diff(long.scores[0, 8:]) <= 0).all() and len(set(long.item_index[0].tolist())) == 30
        else:
            assert (long.item_index[1, :20] > 0).all(), (
                "the first eight leave two places, what is behind them the rest"
            )


def test_places_that_no_cap_leaves_are_not_looked_for(predictor, monkeypatch):
    looked: list[int] = []
    rerank = Rules.rerank
    monkeypatch.setattr(Rules, "rerank", lambda *args: looked.append(args[1].shape[1]) or rerank(*args))
    monkeypatch.setattr("recray.inference.rules.POOL", 20)
    group = torch.arange(V + 1) % 3
    boost = torch.zeros(V + 1)
    boost[group == 0] = -torch.inf
    rules = Rules(0.0, boost, ((group, 2),))
    answer = predictor.recommend([history(5)], 10, now=NOW, rules=rules).item_index[0]
    assert rules.max_length == 4 and (answer > 0).sum() == 4 and looked == [20]


def test_a_cap_looks_as_far_as_it_must(predictor, monkeypatch):
    monkeypatch.setattr("recray.inference.rules.POOL", 5)
    best = predictor.recommend([history(5)], V, now=NOW).item_index[0]
    group = torch.full((V + 1,), -1)
    group[torch.from_numpy(best[:20].copy())] = 0
    answer = predictor.recommend(
        [history(5)], 4, now=NOW, rules=Rules(0.0, torch.zeros(V + 1), ((group, 1),))
    ).item_index[0]
    assert answer.tolist() == [best[0], *best[20:23]]
    alone = torch.zeros(V + 1, dtype=torch.int64)
    answer = predictor.recommend(
        [history(5)], 4, now=NOW, rules=Rules(0.0, torch.zeros(V + 1), ((alone, 1),))
    )
    assert answer.item_index[0].tolist() == [best[0], 0, 0, 0] and np.isinf(answer.scores[0, 1:]).all()


def test_ids_and_indices(predictor):
    assert predictor.vocabulary.index_of(["i00", "nothing", "i39"]).tolist() == [1, 0, 40]
    assert predictor.vocabulary.ids_of(np.array([1, 40])) == ["i00", "i39"]


def test_top_k_breaks_ties_by_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, -2.0, 3.0, -torch.inf, 0.0, -0.5]])
    index, values = top_k(scores, 8)
    assert index[0].tolist() == [1, 2, 4, 0, 6, 7, 3, 0]
    assert values[0, :7].tolist() == [3, 3, 3, 1, 0, -0.5, -2]
    random = torch.randn(50, 200).round(decimals=1)
    index, _ = top_k(random, 20)
    expected = torch.argsort(-random, dim=1, stable=True)[:, :20]
    assert torch.equal(index, expected)


def test_popularity_by_day_and_in_another_vocabulary():
    counts = Popularity.count_events(np.array([1, 1, 2, 3]), np.array([5, 6, 6, 9]) * DAY + 100, 3)
    assert counts.window(9 * DAY, 3).tolist() == [0, 1, 1, 0]
    assert counts.window(9 * DAY, 4).tolist() == [0, 2, 1, 0]
    assert counts.total().tolist() == [0, 2, 1, 1]
    moved = counts.remap(np.array([0, 2, 0, 1]), 2)
    assert moved.total().tolist() == [0, 1, 2]
    assert counts.fallback_counts(8 * DAY, 7).argsort()[::-1][:3].tolist() == [1, 2, 3]
    assert counts.fallback_counts(8 * DAY, 7)[3] == 0, "what comes later is not known"
    both = counts + counts
    assert both.total().tolist() == [0, 4, 2, 2] and len(both.day) == 4
