"""Neighbours of items by the training events, and calibration of the terms of the scores."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.evaluation.protocol import PROTOCOLS, EvaluationQueries
from recray.inference import Predictor
from recray.model.cooccurrence import SEEN, SMALL, SOURCES, CooccurrenceHead, Neighbours, to_log
from recray.model.shape import Batch
from recray.training.calibration import (
    BEST,
    DRAWN,
    LOGARITHM,
    SHARES,
    Scored,
    _choose,
    choose_share,
    fit_factors,
    scale_terms,
    term_scores,
)
from recray.training.neighbours import FADE_S, SHRINKAGE, WINDOW, _Counts, fit_neighbours
from recray.training.plan import training_settings
from recray.training.worker import build_loop


def counted(histories, n_items, *, has_time=True):
    """The matrices of histories of (item, time in seconds, whether a target)."""
    counts = _Counts(n_items + 1, 10**6)
    owner = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    columns = [np.array([event[i] for history in histories for event in history]) for i in range(3)]
    counts.add_pairs(owner, *columns, has_time=has_time)
    counts.add_users(owner, columns[0])
    return [np.asarray(getattr(matrix, "todense", lambda m=matrix: m)()) for matrix in counts.matrices(1.0)]


HISTORIES = st.lists(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 10**7), st.booleans()), min_size=1, max_size=15).map(
        lambda events: sorted(events, key=lambda event: event[1])
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(HISTORIES, st.booleans())
def test_counts_are_those_of_plain_loops(histories, has_time):
    together, following = np.zeros((2, 6, 6))
    for history in histories:
        for a, (first, early, _) in enumerate(history):
            for b in range(a + 1, min(a + WINDOW, len(history) - 1) + 1):
                second, late, is_target = history[b]
                weight = (np.exp(-(late - early) / FADE_S) if has_time else 1.0) / (b - a)
                if first != second:
                    together[first, second] += weight
                    together[second, first] += weight
                    is_next = is_target and (late > early or not has_time)
                    following[first, second] += weight if is_next else 0.0
    norm = np.sqrt(np.maximum(together.sum(1), 1e-9))
    ours = counted(histories, 5, has_time=has_time)
    np.testing.assert_allclose(ours[0], together / norm[:, None] / norm[None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        ours[1], following / (following.sum(1)[:, None] + SHRINKAGE), rtol=1e-4, atol=1e-6
    )


def test_users_of_many_items_count_by_their_latest_ones(monkeypatch):
    """Two users of ten items each: with at most two pairs a user, only the last item counts."""
    monkeypatch.setattr("recray.training.neighbours.MOST_USER_PAIRS", 8)
    counts = _Counts(11, 10**6)
    owner, item = np.repeat([0, 1], 10), np.tile(np.arange(1, 11), 2)
    counts.add_users(owner, item)
    assert counts._latest().nnz == 4
    assert counts._latest()[:, [9, 10]].nnz == 4, "the latest two of each"


def test_neighbours_are_the_strongest_and_no_item_is_its_own(synthetic_dataset):
    few = fit_neighbours(synthetic_dataset, neighbours=3, l2=10.0, memory_bytes=2**30)
    many = fit_neighbours(synthetic_dataset, neighbours=50, l2=10.0, memory_bytes=2**30)
    n_rows = synthetic_dataset.n_items + 1
    assert few.item.shape == (n_rows, 3) and many.value.shape == (n_rows, 50, len(SOURCES))
    assert not few.item[0].any() and not (many.item == np.arange(n_rows)[:, None])[1:].any()
    strength = many.value.max(2)
    assert (np.diff(strength, axis=1) <= 0).all() and (few.item == many.item[:, :3]).all()
    assert ((many.item == 0) == (strength == 0)).all()


def test_of_too_many_pairs_the_strongest_stay():
    random = np.random.default_rng(0)
    owner, item = np.repeat(np.arange(200), 20), random.integers(1, 300, 4000)
    few, all_of_them = _Counts(301, 1000), _Counts(301, 10**6)
    for counts in (few, all_of_them):
        counts.add_pairs(owner, item, np.zeros(4000), np.ones(4000, bool), has_time=False)
        for _ in range(3):  # one pair again and again
            counts.add_pairs(np.zeros(2), np.array([7, 8]), np.zeros(2), np.ones(2, bool), has_time=False)
    assert few.together.nnz <= 1000 < all_of_them.together.nnz
    assert few.together[7, 8] >= 3.0


def test_the_cosine_of_items_users_replaces_a_linear_model_that_does_not_fit(synthetic_dataset):
    n_rows = synthetic_dataset.n_items + 1
    fitted = fit_neighbours(synthetic_dataset, neighbours=5, l2=10.0, memory_bytes=n_rows**2 * 19)
    histories = [
        shard.history(row, int(end)).item_index
        for shard in synthetic_dataset.shards()
        for row, end in enumerate(shard.train_lengths)
    ]
    seen = np.zeros((len(histories), n_rows))
    for row, items in enumerate(histories):
        seen[row, items] = 1.0
    cosine = seen.T @ seen / np.maximum(np.sqrt(np.outer(seen.sum(0), seen.sum(0))), 1e-9)
    np.fill_diagonal(cosine, 0.0)
    highest = cosine.max(1)
    scale = highest[highest > 0].mean()
    values = fitted.value[..., 2].astype(float)
    for row, place in np.argwhere(values > 0):
        assert values[row, place] == pytest.approx(cosine[row, fitted.item[row, place]] / scale, rel=1e-2)
    assert (values.max(1)[1:] > 0).mean() > 0.9
    with pytest.raises(SettingsError, match="train.cooccurrence_memory: 5 neighbours of 120 items"):
        fit_neighbours(synthetic_dataset, neighbours=5, l2=10.0, memory_bytes=1000)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scores_are_those_of_plain_loops(data):
    n_items, neighbours = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    item = random.integers(0, n_items + 1, (n_items + 1, neighbours)).astype(np.int32)
    item[0] = 0
    value = random.random((n_items + 1, neighbours, len(SOURCES))).astype(np.float16)
    value[item == 0] = 0
    history = data.draw(st.lists(st.integers(1, n_items), min_size=1, max_size=30))
    position, events = data.draw(st.integers(0, len(history) - 1)), data.draw(st.integers(1, 30))
    head = CooccurrenceHead(events)
    head.attach(Neighbours(item, value))
    head.scale.copy_(torch.rand(head.scale.shape))
    head.log_scale.copy_(torch.rand(()))
    head.refresh()

    expected, before = np.zeros(n_items + 1), history[: position + 1]
    for recency, event in enumerate(dict.fromkeys(before[::-1][:events])):
        column = int(np.searchsorted([1, 5, 20], recency, side="right"))
        for m in range(neighbours):
            candidate = item[event, m]
            scale = head.scale[:, SEEN if candidate in before else column].numpy()
            expected[candidate] += float(scale @ value[event, m].astype(np.float32)) if candidate else 0.0
    zeros = torch.zeros(1, len(history), dtype=torch.int64)
    queries = torch.tensor([0]), torch.tensor([position])
    batch = Batch(torch.tensor([history]), *[zeros] * 4, *queries, *[zeros] * 4)
    evidence = head.evidence(batch, slice(None), n_items + 1)[0]
    np.testing.assert_allclose(evidence[1:], expected[1:], rtol=1e-3, atol=1e-3)
    expected += float(head.log_scale) * np.log(1 + expected / SMALL)
    ours = head(batch, slice(None), n_items + 1)[0]
    np.testing.assert_allclose(ours[1:], expected[1:], rtol=1e-3, atol=1e-3)
    first = data.draw(st.integers(1, n_items))
    block = head(batch, slice(None), n_items + 1 - first, first)[0]
    np.testing.assert_allclose(block, ours[first:], rtol=1e-6, atol=1e-6)
    terms = sum(head.evidence(batch, slice(None), n_items + 1, scale_SR=only) for _, only in head.terms())
    np.testing.assert_allclose(terms[0, 1:], evidence[1:], rtol=1e-4, atol=1e-5)


def drawn(random, factors, queries=3000, candidates=30):
    """Queries whose targets are drawn by the softmax of the terms times factors."""
    score_SQC = torch.from_numpy(random.normal(size=(len(factors), queries, candidates)).astype(np.float32))
    chances = torch.einsum("sqc,s->qc", score_SQC, torch.tensor(factors)).softmax(1).numpy()
    target = (chances.cumsum(1) < random.random((queries, 1))).sum(1).clip(max=candidates - 1)
    is_target_QC = torch.zeros(queries, candidates, dtype=torch.bool)
    is_target_QC[torch.arange(queries), torch.from_numpy(target)] = True
    return Scored(score_SQC, is_target_QC, torch.zeros_like(is_target_QC), torch.zeros(queries, candidates))


def test_factors_are_those_by_which_the_targets_came_about():
    factors = fit_factors(drawn(np.random.default_rng(0), [0.5, 2.0, 1.0]), PROTOCOLS)
    np.testing.assert_allclose(factors, [0.5, 2.0, 1.0], rtol=0.1)


def test_a_term_that_says_nothing_ends_near_zero():
    factors = fit_factors(drawn(np.random.default_rng(1), [1.0, 0.0]), PROTOCOLS)
    assert factors[0] == pytest.approx(1.0, rel=0.1) and factors[1] < 0.1


def test_the_factor_of_the_logarithm_is_that_by_which_the_targets_came_about():
    random = np.random.default_rng(3)
    scored, is_evidence = drawn(random, [1.0, 0.0, 0.0]), torch.tensor([False, True, True])
    evidence_EQC = torch.from_numpy(random.exponential(0.1, (2, 3000, 30)).astype(np.float32))
    scored.score_SQC[1:] = evidence_EQC
    chances = (scored.score_SQC[0] + 0.6 * to_log(0.5 * evidence_EQC[0] + 2 * evidence_EQC[1])).softmax(1)
    target = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(0))
    scored = scored._replace(is_target_QC=torch.zeros(3000, 30, dtype=torch.bool).scatter_(1, target, True))
    similarity, *factors, logarithm = fit_factors(scored, PROTOCOLS, is_evidence, 0.3).tolist()
    assert similarity == pytest.approx(1.0, rel=0.1) and logarithm == pytest.approx(2.0, rel=0.15)
    assert factors[1] > 2 * factors[0]


def ndcg_of_one_target(scored, score_QC, k=10):
    target = scored.is_target_QC.int().argmax(1)
    rank = 1 + (score_QC > score_QC.gather(1, target[:, None])).sum(1)
    return torch.where(rank <= k, 1 / (1 + rank).log2(), 0.0).mean()


def test_a_network_that_spoils_the_first_places_gets_a_smaller_share():
    """The network knows nothing, and its noise drowns what evidence knows."""
    random = np.random.default_rng(4)
    is_evidence = torch.tensor([False, True])
    scored = drawn(random, [0.0, 0.0], queries=1000, candidates=200)
    evidence = torch.where(scored.is_target_QC, 0.5, 0.0) * torch.from_numpy(random.random((1000, 1)) < 0.5)
    scored.score_SQC[1] = evidence + 0.4 * torch.from_numpy(random.random((1000, 200)))
    factors = torch.ones(3)
    share = choose_share(scored, factors, PROTOCOLS, is_evidence, 0.3)
    assert share == SHARES[-1]

    def ndcg(share):
        score_QC = share * scored.score_SQC[0] + scored.score_SQC[1] + 0.3 * to_log(scored.score_SQC[1])
        return ndcg_of_one_target(scored, score_QC)

    assert ndcg(share) == max(ndcg(each) for each in (1.0, *SHARES)) > 1.5 * ndcg(1.0)


def test_a_network_that_orders_the_first_places_keeps_its_share():
    is_evidence = torch.tensor([False, True])
    for seed in range(5):
        scored = drawn(np.random.default_rng(seed), [2.0, 0.0], queries=300, candidates=100)
        scored.score_SQC[1].abs_()
        assert choose_share(scored, torch.ones(3), PROTOCOLS, is_evidence, 0.1) == 1.0


def test_drawn_candidates_stand_for_all_others():
    score_QV = torch.from_numpy(np.random.default_rng(2).normal(size=(50, 20_000)).astype(np.float32))
    score_QV[:, 0] = -1e9
    index_QC, log_weight_QC = _choose(score_QV)
    assert index_QC.shape == (50, BEST + DRAWN) and (index_QC[:, :BEST] > 0).all()
    is_dropped = log_weight_QC == -np.inf
    assert is_dropped[:, BEST:].any() and not is_dropped[:, :BEST].any()
    for factor in (0.0, 0.5, 1.0, 1.5):
        estimate = (factor * score_QV.gather(1, index_QC) + log_weight_QC).logsumexp(1)
        np.testing.assert_allclose(estimate, (factor * score_QV[:, 1:]).logsumexp(1), atol=0.03)
    small, weights = _choose(score_QV[:, :1000])
    assert (small == torch.arange(1000)).all() and not weights.any()


def trained_here(dataset, settings, **model):
    changed = settings.replace("model", **model) if model else settings
    loop = build_loop(dataset, training_settings(changed), torch.device("cpu"))
    for _ in loop.run():
        pass
    return loop


@pytest.mark.parametrize("scores", ["dot", "cosine"])
def test_scaled_terms_are_the_scores_of_the_scaled_model(synthetic_dataset, synthetic_settings, scores):
    loop = trained_here(synthetic_dataset, synthetic_settings, scores=scores, cooccurrence=True)
    model = loop.ema_model.eval()
    model.cooccurrence.attach(fit_neighbours(synthetic_dataset, neighbours=9, l2=10.0, memory_bytes=2**30))
    (queries,) = EvaluationQueries(synthetic_dataset, "validation").batches(1000)

    def terms():
        encoder = Predictor.of(model, synthetic_dataset, 7).encoder
        contexts = np.stack([query.context for query in queries])
        moments = np.array([query.now for query in queries])
        batch = encoder.batch([query.history.last(32) for query in queries], moments, contexts)
        with torch.no_grad():
            hidden, _ = encoder.encode(batch, None, with_entropy=False)
            whole = encoder.score_block(hidden, batch, slice(0, None))
            return term_scores(model, hidden, encoder.output_VD, batch), whole

    def total(scores):
        evidence = sum(values for name, values in scores.items() if name.startswith("evidence."))
        return (sum(scores.values()) + model.cooccurrence.log_scale * to_log(evidence))[:, 1:]

    before, whole = terms()
    assert len(before) > 15
    np.testing.assert_allclose(total(before), whole[:, 1:], rtol=1e-4, atol=1e-4)
    random = np.random.default_rng(0)
    factors = {
        name: float(factor) for name, factor in zip(before, random.uniform(0.5, 1.5, 99), strict=False)
    }
    scale_terms(model, {**factors, LOGARITHM: 3.0})
    assert float(model.cooccurrence.log_scale) == pytest.approx(0.3)
    after, whole = terms()
    for name, factor in factors.items():
        np.testing.assert_allclose(after[name], factor * before[name], rtol=1e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(total(after), whole[:, 1:], rtol=1e-4, atol=1e-4)


def test_a_calibration_that_does_validation_users_no_good_is_taken_back(
    synthetic_dataset, synthetic_settings
):
    loop = trained_here(synthetic_dataset, synthetic_settings, cooccurrence=True)
    uncalibrated = {name: tensor.clone() for name, tensor in loop.best.items()}
    before, _ = loop.validate(loop.finish(), 0, 1)
    assert loop.progress.factors["similarity"] != 1.0
    assert loop.finish() is loop.ema_model, "a second time changes nothing"
    assert loop.validate(loop.ema_model, 0, 1)[0] == before

    def spoil(model):
        with torch.no_grad():
            for tensor in (*model.parameters(), model.cooccurrence.scale, model.cooccurrence.log_scale):
                tensor.zero_()
        return {"similarity": 0.0}

    loop.best, loop.progress.factors, loop.calibrate = uncalibrated, None, spoil
    model = loop.finish()
    assert loop.progress.factors == {}, "validation users are worse off"
    assert not model.cooccurrence.scale.any() and not model.cooccurrence.log_scale
    for name, tensor in model.state_dict().items():
        assert name.startswith("cooccurrence.") or torch.equal(tensor, uncalibrated[name]), name


def test_the_finished_model_knows_what_happened_before_the_test(synthetic_dataset, synthetic_settings):
    """Calibration must not see its own targets in the counts; what is served knows the latest."""
    loop = trained_here(synthetic_dataset, synthetic_settings, cooccurrence=True)
    seen, calibrate = [], loop.calibrate

    def look(model):
        seen.append(model.cooccurrence.value.clone())
        return calibrate(model)

    loop.calibrate = look
    model = loop.finish()
    options = {"neighbours": 32, "l2": synthetic_settings.evaluate.ease_l2, "memory_bytes": 2**31}
    in_training = fit_neighbours(synthetic_dataset, **options)
    before_test = fit_neighbours(synthetic_dataset, **options, with_validation=True)
    np.testing.assert_array_equal(seen[0], in_training.value)
    np.testing.assert_array_equal(model.cooccurrence.value, before_test.value)
    np.testing.assert_array_equal(model.cooccurrence.item, before_test.item)
    assert (before_test.value != in_training.value).any()


def test_counts_before_the_test_are_those_of_a_training_that_ends_there(
    synthetic_dataset, synthetic_settings, monkeypatch
):
    options = {"neighbours": 9, "l2": 10.0, "memory_bytes": 2**30}
    before_test = fit_neighbours(synthetic_dataset, **options, with_validation=True)
    moved = Dataset.open(synthetic_dataset.path)
    shards = list(moved.shards())
    for shard in shards:
        shard.__dict__["train_lengths"] = shard.split[:, 2]
    monkeypatch.setattr(moved, "shards", lambda: shards)
    for ours, expected in zip(before_test, fit_neighbours(moved, **options), strict=True):
        np.testing.assert_array_equal(ours, expected)
