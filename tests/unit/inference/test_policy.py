"""A policy at run time: what it sees, what it decides, how likely, and that it keeps still where it knows
nothing.
"""

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm

from policies.baselines import TabulatedRewards
from policies.environment import DecisionEnvironment
from policies.held_out import HoldoutRewards
from recray.dataset.reader import History
from recray.errors import DamagedArtifactError, MissingArtifactError, SettingsError
from recray.evaluation.protocol import EvaluationQuery
from recray.inference import Predictor
from recray.inference.modulation import LOG_TEMPERATURE, explore, find_slots, log_density, to_controls
from recray.inference.policy import OBSERVED, ObservationNormalizer, Policy, observe, rank_popularity

DAY = 86_400


def history(*events):
    """Events (item, type, day)."""
    item, kind, day = (np.array(column) for column in zip(*events, strict=True))
    return History(item, kind, day * DAY, np.ones(len(item), np.float32))


def seen(*events, now_day=100, has_time=True, state=None, items=4):
    rank = rank_popularity(np.array([0.0, *range(items)]))
    return dict(
        zip(
            OBSERVED,
            observe(history(*events), now_day * DAY, rank, has_time=has_time, state=state).tolist(),
            strict=True,
        )
    )


def policy(seed=0, actions=("temperature", "recency"), digest="bundle"):
    random = np.random.default_rng(seed)
    normalizer = ObservationNormalizer.of(random.normal(0, 1, (500, len(OBSERVED))).astype(np.float32))
    sizes = [len(OBSERVED), 8, 8, len(actions)]
    torch.manual_seed(seed)
    weights = {
        f"weight_{n}": torch.randn(b, a) for n, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True))
    }
    weights |= {f"bias_{n}": torch.randn(b) for n, b in enumerate(sizes[1:])}
    return Policy(actions, normalizer, weights, digest, {"seed": seed})


def test_an_observation_says_what_its_names_say():
    assert 16 <= len(OBSERVED) <= 24
    observation = seen((1, 0, 90), (4, 1, 96), (4, 0, 98), state=[1.5, 0.25])
    assert observation["log_length"] == pytest.approx(np.log(4)) and observation[
        "log_distinct"
    ] == pytest.approx(np.log(3))
    assert observation["repeat_rate"] == pytest.approx(1 / 3) and observation[
        "distinct_of_last_20"
    ] == pytest.approx(2 / 3)
    assert observation["log_days_since_last"] == pytest.approx(np.log(3)) and observation[
        "log_days_known"
    ] == pytest.approx(np.log(11))
    assert observation["log_days_between"] == pytest.approx(np.mean([np.log(7), np.log(3)]))
    assert (
        observation["share_of_last_7_days"] == pytest.approx(2 / 3)
        and observation["share_of_last_30_days"] == 1.0
    )
    assert observation["popularity"] == pytest.approx(2 / 3) and observation["popularity_of_last"] == 1.0
    assert (
        observation["share_of_main_event"] == pytest.approx(2 / 3)
        and observation["last_is_main_event"] == 1.0
    )
    assert observation["entropy_of_events"] == pytest.approx(
        -(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3)
    )
    assert (observation["hour_sine"], observation["hour_cosine"]) == (0.0, 1.0)
    assert (observation["night_entropy"], observation["night_margin"], observation["night_known"]) == (
        1.5,
        0.25,
        1.0,
    )


def test_the_weekend_is_saturday_and_sunday():
    import datetime as dt

    for day in range(20_000, 20_014):
        moment = dt.datetime.fromtimestamp(day * DAY, dt.UTC)
        assert seen((1, 0, 1), now_day=day)["weekend"] == (moment.weekday() >= 5)


def test_what_is_not_known_is_zero():
    empty = observe(
        History(*(np.zeros(0, np.int64) for _ in range(4))), 5, np.zeros(3, np.float32), has_time=False
    )
    assert empty.tolist() == [0.0] * len(OBSERVED)
    timeless = seen((1, 0, 90), (2, 0, 95), has_time=False)
    assert [timeless[name] for name in OBSERVED[4:10] + OBSERVED[16:]] == [0.0] * 12
    unknown = seen((0, 0, 90), (2, 0, 95))
    assert unknown["log_length"] == pytest.approx(np.log(2)), (
        "events of items that the bundle does not know are not looked at"
    )


@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0])
def test_densities_are_those_of_the_truncated_normal(sigma):
    random = np.random.default_rng(0)
    mean = np.concatenate([random.uniform(-1, 1, (500, 2)), [[1.0, -1.0], [0.0, 1.0]]])
    action, density = explore(mean, sigma, random)
    expected = truncnorm.logpdf(action, (-1 - mean) / sigma, (1 - mean) / sigma, loc=mean, scale=sigma).sum(1)
    np.testing.assert_allclose(density, expected, rtol=1e-6)
    assert np.abs(action).max() <= 1.0
    np.testing.assert_allclose(log_density(action, mean, np.full((len(mean), 1), sigma)), density)
    grid = np.linspace(-1, 1, 20_001)
    one = np.exp(log_density(grid[:, None], np.full((len(grid), 1), 0.7), sigma))
    assert np.trapezoid(one, grid) == pytest.approx(1.0, abs=1e-4)


def test_exploration_has_the_mean_and_spread_of_its_distribution():
    action, _ = explore(np.full((100_000, 1), 0.5), 0.4, np.random.default_rng(1))
    truth = truncnorm((-1 - 0.5) / 0.4, (1 - 0.5) / 0.4, loc=0.5, scale=0.4)
    assert action.mean() == pytest.approx(truth.mean(), abs=0.005) and action.std() == pytest.approx(
        truth.std(), abs=0.005
    )


def test_a_policy_is_written_and_read_and_belongs_to_one_bundle(tmp_path):
    ours = policy()
    ours.save(tmp_path / "p", "p")
    assert {path.suffix for path in (tmp_path / "p").iterdir()} == {".json", ".safetensors"}, (
        "nothing that runs code when it is read"
    )
    loaded = Policy.load(tmp_path / "p", "bundle")
    x = np.random.default_rng(2).normal(0, 1, (50, len(OBSERVED))).astype(np.float32)
    assert (
        np.array_equal(ours.act(x), loaded.act(x))
        and loaded.actions == ("temperature", "recency")
        and loaded.about == {"seed": 0}
    )
    with pytest.raises(DamagedArtifactError, match="another bundle"):
        Policy.load(tmp_path / "p", "other")
    with pytest.raises(MissingArtifactError, match="recray tune"):
        Policy.load(tmp_path / "none", "bundle")
    (tmp_path / "p" / "policy.safetensors").write_bytes(
        (tmp_path / "p" / "policy.safetensors").read_bytes()[:-4] + b"0000"
    )
    with pytest.raises(DamagedArtifactError):
        Policy.load(tmp_path / "p", "bundle")


def test_what_a_policy_does_not_know_it_leaves_alone():
    ours, x = policy(), np.random.default_rng(3).normal(0, 0.5, (4, len(OBSERVED))).astype(np.float32)
    x[1, 0], x[2, 3] = np.nan, 100.0
    actions = ours.act(x)
    assert actions[1].tolist() == actions[2].tolist() == [0.0, 0.0]
    assert np.abs(actions[[0, 3]]).min() > 0 and np.abs(actions).max() <= 1.0
    broken = Policy(
        ours.actions, ours.normalizer, {**ours.weights, "bias_2": torch.tensor([np.nan, 0.0])}, "bundle", {}
    )
    assert not broken.act(x).any()
    with pytest.raises(SettingsError, match="1 to 8"):
        policy(actions=[f"temperature.{n}" for n in range(9)])


def test_a_clock_that_stood_still_when_a_policy_was_learned_says_nothing():
    random, clock = (
        np.random.default_rng(5),
        [OBSERVED.index(name) for name in ("hour_sine", "hour_cosine", "weekend")],
    )
    x = random.normal(0, 1, (500, len(OBSERVED))).astype(np.float32)
    x[:, clock] = 0.5, 0.87, 1.0
    x[:, 2] = 0.25  # nobody repeated anything: that is no clock
    ours = Policy(("temperature", "recency"), ObservationNormalizer.of(x), policy().weights, "bundle", {})
    shifted = x[:50].copy()
    shifted[:, clock] = -1.0, 0.0, 0.0
    assert np.array_equal(ours.act(shifted), ours.act(x[:50])) and np.abs(ours.act(shifted)).min() > 0
    for strange in (np.nan, np.inf, -np.inf):
        shifted[:, clock[0]] = strange
        assert not ours.act(shifted).any() and not ours.act(shifted[:1]).any()
    shifted[:, clock[0]], shifted[:, 2] = 0.0, 0.5
    assert not ours.act(shifted).any()

    moved = random.normal(0, 1, (500, len(OBSERVED))).astype(np.float32)
    on = ours.normalizer.widen(ObservationNormalizer.of(moved))
    assert (
        np.isfinite(on.scale).all()
        and on.mean[0] == ours.normalizer.mean[0]
        and on.mean[clock[0]] == ObservationNormalizer.of(moved).mean[clock[0]]
    )
    running = Policy(ours.actions, on, ours.weights, "bundle", {})
    assert np.array_equal(running.act(x[:50]), ours.act(x[:50])), (
        "what begins with it does not begin with what it never learned"
    )
    back = on.widen(ours.normalizer)
    assert np.isinf(back.scale[clock]).all() and back.is_in_range(shifted[:1] * 0) == [True], (
        "what is learned at one moment again forgets the clock"
    )


def test_a_request_alone_is_decided_as_it_is_among_others():
    ours, x = policy(), np.random.default_rng(4).normal(0, 1.5, (300, len(OBSERVED))).astype(np.float32)
    x[:2, 0] = np.nan, np.inf
    x[2:20, 1] = np.linspace(-9, 9, 18)
    strong = Policy(
        ours.actions, ours.normalizer, {name: 5 * value for name, value in ours.weights.items()}, "bundle", {}
    )
    together = strong.act(x)
    assert (
        (together == 0).any()
        and (np.abs(together) == 1).any()
        and ((np.abs(together) < 1) & (together != 0)).any()
    )
    for row, expected in zip(x, together, strict=True):
        np.testing.assert_allclose(strong.act(row[None])[0], expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def predictor(synthetic_settings, synthetic_dataset, tmp_path_factory):
    from recray.testing.published import publish_untrained

    storage = publish_untrained(synthetic_settings, synthetic_dataset, tmp_path_factory.mktemp("policy"))
    return Predictor.load(storage.bundle("untrained"), dataset=synthetic_dataset)


def test_action_zero_is_the_model_and_every_control_changes_it(predictor, synthetic_dataset):
    model, kinds = predictor.model, predictor.vocabulary.event_types
    names = ["temperature", "temperature.1", "recency", f"event.{kinds[0]}", "weight.id", "weight.brand"]
    slots = find_slots(names, model, kinds)
    users = [synthetic_dataset.user_history(user) for user in range(8)]
    histories = [predictor.vocabulary.translation(synthetic_dataset).history(one) for one in users]

    def scores(action):
        controls = to_controls(np.repeat(np.array([action]), len(users), 0), slots, model, kinds)
        items = [np.arange(1, predictor.n_items + 1)] * len(users)
        return np.stack(predictor.score(histories, items, now=synthetic_dataset.now_s, controls=controls))

    plain = np.stack(
        predictor.score(
            histories, [np.arange(1, predictor.n_items + 1)] * len(users), now=synthetic_dataset.now_s
        )
    )
    np.testing.assert_allclose(scores(np.zeros(len(names))), plain, atol=1e-6)
    for slot in range(len(names)):
        action = np.zeros(len(names))
        action[slot] = 1.0
        assert np.abs(scores(action) - plain).max() > 1e-6, names[slot]
    controls = to_controls(np.array([[1.0, -1.0, 0, 0, 0, 0]]), slots, model, kinds)
    assert controls.log_temperature.tolist() == [
        [pytest.approx(LOG_TEMPERATURE), pytest.approx(0.0, abs=1e-6)]
    ]
    with pytest.raises(SettingsError, match=r"(?s)policy.actions: event.none.*known: temperature"):
        find_slots(["event.none"], model, kinds)


def test_requests_with_actions_of_their_own_are_answered_together_as_alone(predictor, synthetic_dataset):
    slots = find_slots(["temperature", "recency"], predictor.model, predictor.vocabulary.event_types)
    histories = [
        predictor.vocabulary.translation(synthetic_dataset).history(synthetic_dataset.user_history(user))
        for user in range(6)
    ]
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 2))
    steer = lambda rows: to_controls(rows, slots, predictor.model, predictor.vocabulary.event_types)  # noqa: E731
    together = predictor.recommend(histories, 10, now=synthetic_dataset.now_s, controls=steer(actions))
    for row, one in enumerate(histories):
        alone = predictor.recommend(
            [one], 10, now=synthetic_dataset.now_s, controls=steer(actions[row : row + 1])
        )
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def held_out(predictor, synthetic_dataset):
    questions = []
    for user in range(60):
        history = predictor.vocabulary.translation(synthetic_dataset).history(
            synthetic_dataset.user_history(user)
        )
        target = np.unique(history.item_index[-2:])
        before = History(*(values[:-2] for values in history))
        questions.append(
            EvaluationQuery(
                0,
                user,
                before,
                target,
                synthetic_dataset.now_s,
                np.zeros(len(predictor.vocabulary.context), np.int64),
            )
        )
    return HoldoutRewards(predictor, questions, ["temperature", "recency"])


def test_held_out_users_have_a_state_but_for_a_share_of_them(held_out, predictor):
    is_known = held_out.observation[:, OBSERVED.index("night_known")]
    assert 0.6 <= is_known.mean() < 1 and not held_out.observation[is_known == 0, -3:].any()
    position = int(np.flatnonzero(is_known)[0])
    query = held_out.queries[position]
    answer = predictor.recommend([query.history], 2, now=query.now, with_state=True)
    np.testing.assert_allclose(held_out.observation[position, -3:-1], answer.state[0], rtol=1e-4, atol=1e-5)


def test_an_action_is_paid_what_it_brings_more_than_none(held_out, monkeypatch):
    draws, draw = [], held_out.draw

    def remembered(n, random):
        draws.append(draw(n, random))
        return draws[-1]

    monkeypatch.setattr(held_out, "draw", remembered)
    environment = DecisionEnvironment(held_out, ObservationNormalizer.of(held_out.observation), 32)
    environment.reset()
    assert not environment.step(np.zeros((32, 2)))[1].any()
    environment.reset()
    (_, cases), action = draws[-1], np.full((32, 2), -1.0)
    brings = held_out.pay(cases, action) - held_out.pay(cases, np.zeros((32, 2)))
    assert np.abs(brings).max() > 0
    np.testing.assert_allclose(environment.step(action)[1], brings, atol=1e-6)


def test_what_stands_in_for_the_metric_has_its_gradient(held_out):
    places, action = np.arange(8), torch.full((8, 2), 0.2, dtype=torch.float64, requires_grad=True)
    value = held_out.value(places, action)
    (gradient,) = torch.autograd.grad(value.sum(), action)
    step = 1e-2
    for k in range(2):
        moved = torch.zeros(8, 2, dtype=torch.float64)
        moved[:, k] = step
        with torch.no_grad():
            slope = (held_out.value(places, action + moved) - held_out.value(places, action - moved)) / (
                2 * step
            )
        np.testing.assert_allclose(gradient[:, k].numpy(), slope.numpy(), rtol=0.05, atol=2e-4)
    assert gradient.abs().max() > 1e-3 and all(p.grad is None for p in held_out.predictor.model.parameters())


def test_a_bound_is_a_share_of_the_range_of_an_action(held_out):
    places, one = np.arange(20), np.tile([1.0, -1.0], (20, 1))
    half = held_out.with_controls(held_out.actions, 0.5)
    assert np.array_equal(half.recommend(places, one), held_out.recommend(places, 0.5 * one))
    assert not np.array_equal(half.recommend(places, one), held_out.recommend(places, one))


def test_actions_that_were_played_are_looked_up(held_out):
    table, random = TabulatedRewards(held_out), np.random.default_rng(0)
    actions = np.array([[0.0, 0.5], [1.0, 0.0], [0.0, 0.0]])[random.integers(0, 3, 40)]
    _, cases = table.draw(40, random)
    np.testing.assert_allclose(table.pay(cases, actions), held_out.pay(cases, actions), atol=1e-9)
