"""Off-policy estimates where the truth is known: closed forms, planted worlds, and a real log beside another
one.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest

from policies import ope
from policies.rewards import SyntheticRewards, draw_clicks
from recray.inference.modulation import explore, log_density

pytestmark = pytest.mark.second

P = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # who logged: actions by state
NEW = np.array([[0.1, 0.1, 0.8], [0.5, 0.25, 0.25]])
PAYS = np.array([[0.2, 0.5, 0.6], [0.1, 0.4, 0.3]])
TRUTH = float((NEW * PAYS).sum(1).mean())


def logged(n, seed):
    random = np.random.default_rng(seed)
    state = random.integers(0, 2, n)
    action = (random.random((n, 1)) > P[state].cumsum(1)).sum(1)
    reward = (random.random(n) < PAYS[state, action]).astype(float)
    return state, action, reward, NEW[state, action] / P[state, action]


def test_with_a_reward_in_closed_form_every_estimator_is_right():
    state, action, r, w = logged(200_000, 0)
    wrong = np.full(len(r), 0.3)
    estimates = {
        "ips": ope.ips(r, w), "snips": ope.snips(r, w), "dm": ope.dm((NEW * PAYS).sum(1)[state]),
        "dr, true model": ope.dr(r, w, PAYS[state, action], (NEW * PAYS).sum(1)[state]),
        "dr, wrong model": ope.dr(r, w, wrong, wrong),
        "switch": ope.switch_dr(r, w, PAYS[state, action], (NEW * PAYS).sum(1)[state], 2.0),
    }  # fmt: skip
    for name, terms in estimates.items():
        assert terms.mean() == pytest.approx(TRUTH, abs=0.01), name
    assert estimates["dr, true model"].var() < estimates["ips"].var(), "a good model takes variance away"
    everything = ope.switch_dr(r, w, wrong, wrong, np.inf)
    np.testing.assert_allclose(everything, ope.dr(r, w, wrong, wrong))
    np.testing.assert_allclose(ope.switch_dr(r, w, wrong, wrong, 0.0), wrong)


def test_intervals_hold_the_truth_as_often_as_they_say():
    inside = {"ips": 0, "snips": 0, "dr": 0}
    for seed in range(200):
        _, _, r, w = logged(400, seed)
        flat = np.full(len(r), r.mean())
        intervals = ope.bootstrap_intervals(
            [ope.ips(r, w), ope.snips(r, w), ope.dr(r, w, flat, flat)], resamples=200, seed=seed
        )
        for name, interval in zip(inside, intervals, strict=True):
            inside[name] += interval.low <= TRUTH <= interval.high
    assert all(180 <= count <= 199 for count in inside.values()), inside


def test_users_come_and_go_together():
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(100), 20)
    terms = random.normal(0, 1, 100)[user]
    apart, together = ope.bootstrap_intervals([terms])[0], ope.bootstrap_intervals([terms], user)[0]
    assert together.high - together.low > 3.5 * (apart.high - apart.low)
    mask = user < 50
    (part,) = ope.bootstrap_intervals([terms], user, [mask])
    alone = ope.bootstrap_intervals([terms[mask]], user[mask])[0]
    assert part.value == pytest.approx(alone.value) and part.high - part.low == pytest.approx(
        alone.high - alone.low, rel=0.15
    )


def test_the_effective_sample_size_is_that_of_kish():
    assert ope.effective_sample_size(np.ones(50)) == pytest.approx(50) and ope.effective_sample_size(
        np.array([1.0, 0, 0, 0])
    ) == pytest.approx(1)


def test_a_model_of_the_reward_never_saw_the_user_that_it_speaks_of():
    random = np.random.default_rng(0)
    state, action, user = np.zeros((300, 2)), random.uniform(-1, 1, (300, 1)), np.arange(300) // 3
    luck = random.normal(0, 1, 100)[user]
    (q,) = ope.predict_rewards(state, action, luck, user)
    assert abs(np.corrcoef(q, luck)[0, 1]) < 0.25


def test_continuous_actions_with_planted_rewards():
    rewards, random = SyntheticRewards(), np.random.default_rng(5)
    observation, cases = rewards.draw(20_000, random)
    action, density = explore(np.zeros((20_000, 1)), 0.5, random)
    mean = 0.5 * rewards.best(observation)
    w = np.exp(log_density(action, mean, 0.5) - density)
    r = draw_clicks(rewards.pay(cases, action), random)
    truth = np.mean([rewards.pay(cases, explore(mean, 0.5, random)[0]).mean() for _ in range(20)])
    q, v = ope.predict_rewards(
        observation, action, r, np.arange(20_000), np.stack([explore(mean, 0.5, random)[0] for _ in range(8)])
    )
    for terms in (ope.ips(r, w), ope.snips(r, w), ope.dr(r, w, q, v), ope.switch_dr(r, w, q, v, 20.0)):
        interval = ope.bootstrap_intervals([terms])[0]
        assert interval.low <= truth <= interval.high
        assert interval.low > r.mean(), "it is better than what logged it"


@pytest.mark.parametrize(("campaign", "items"), [("all", 80), ("men", 34), ("women", 46)])
def test_on_a_real_log_the_uniform_policy_is_worth_what_its_own_log_says(shared_data, campaign, items):
    table = pq.read_table(shared_data / "open-bandit-sample" / "interactions.parquet").to_pandas()
    table = table[table.campaign == campaign]
    learned, uniform = table[table.policy == "bts"], table[table.policy == "random"]
    w, r = 1 / items / learned.propensity.to_numpy(), learned.value.to_numpy(float)
    flat, truth = np.full(len(r), r.mean()), uniform.value.mean()
    for terms in (
        ope.ips(r, w),
        ope.snips(r, w),
        ope.dr(r, w, flat, flat),
        ope.switch_dr(r, w, flat, flat, 20.0),
    ):
        interval = ope.bootstrap_intervals([terms])[0]
        assert interval.low <= truth <= interval.high
