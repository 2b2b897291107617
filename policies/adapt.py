"""From what answers that explored were worth to the next policy: MARWIL (RLlib) on logged decisions, from the live policy on; or PPO, paid
what outcomes say by propensity.

A click says little, so MARWIL is not shown the outcomes but what a model of them says of each logged action, learned on other users
(gradient boosting, cross-fitted). Rounds that the newest one contradicts are left out: the world has changed since.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import torch
from sklearn.ensemble import HistGradientBoostingRegressor

from policies import gate
from policies.held_out import HeldOut
from policies.learner import Ppo, beginning, learn, module_config, plain, restore
from policies.logs import Aside, Logged, checked, usable
from policies.rewards import Outcomes
from policies.tune import TIMED, deciding_share, rules_of
from recray.bundle import Bundle
from recray.config import Settings
from recray.dataset.reader import Dataset, draw_of, nothing_learned_of
from recray.errors import RefusedError
from recray.evaluation.gates import Check
from recray.evaluation.protocol import Question
from recray.inference import Predictor, Rules
from recray.inference.policy import OBSERVED, Frozen, Policy

FOLDS = 3
LEAST = 500  # decisions to learn from that can speak against older ones
SURE = 2.0  # standard errors
JUDGES = 1 / 3  # of the users
LEAST_USERS = 50
NUMBER = re.compile(r"-?\d{1,18}")
LISTED = 300  # judges for whom lists are made
MODULE = "default_policy"


@dataclass(frozen=True)
class Marwil:
    """How MARWIL learns from a log; beta as in Wang et al. 2018, the others as RLlib names them.

    sigma : width of the distribution whose mean is learned, where it begins
    """

    beta: float = 20.0
    epochs: int = 30
    minibatch: int = 512
    lr: float = 1e-3
    hidden: int = 64
    sigma: float = 0.3


def adapt(
    settings: Settings,
    rounds: list[Logged],
    aside: Aside,
    dataset: Dataset,
    bundle: Bundle,
    live: Policy | None,
    policies: set[str],
    level: float,
) -> tuple[Policy, gate.Verdict, Aside]:
    """The next policy of a bundle from rounds of decisions, the gate's verdict, and how many decisions were set aside, by reason.

    A third of the users, the same in every round, judge; nothing of theirs is ever learned from. They judge by what the live policy
    decided in the rounds that are learned from: those since the world changed.

    rounds, aside : of `policies.logs.read`
    level : of the gate letting a policy pass that gains nothing
    dataset : with the histories of the judges, for whom lists are made
    policies : run keys of those that may have decided, "" for none
    Raises RefusedError where the newest round can say too little, or where privacy is on and nobody is held out.
    """
    options = settings.policy
    bound = options.bound if live is None else live.bound
    if live is not None and live.actions != options.actions:
        what = f"the policy that decides turns {', '.join(live.actions)}, policy.actions says {', '.join(options.actions)}"
        raise RefusedError(what, "say what it turns, or let recray tune make one for the others")
    if not rounds:
        what = "".join(f"; {count} {reason}" for reason, count in aside.items())
        raise RefusedError(f"no collected decision turned {', '.join(options.actions)}{what}", "explore: policy.sigma=0.3 policy.explore=0.1")
    if settings.privacy.enabled:
        held_out = _held_out(settings, bundle)
        told = sum(map(len, rounds))
        rounds = [found.rows(held_out(found)) for found in rounds]
        aside["of users who were not held out"] = told - sum(map(len, rounds))
    sound, also = _sound(rounds, bundle.key, policies)
    log, judged, left = _since_the_change(sound, live.about["key"] if live else "")
    aside = +(aside + also + left)
    policy = LEARNERS[options.learner](log, live, settings, bundle.digest)
    policy.about["bound"] = bound
    diversity, latency, listed = _lists(settings, dataset, bundle, policy, judged)
    verdict = gate.judge(judged, policy, replace(rules_of(settings), level=level), diversity=diversity, latency=latency)
    if listed < LEAST_USERS:
        text = f"the dataset knows {listed} of the judges, {LEAST_USERS} are needed to see how varied their lists are and what they take"
        verdict = replace(verdict, checks=[*verdict.checks, Check("lists", passed=False, text=text)])
    policy.about |= {"bundle": bundle.key, "promoted": verdict.passed, "reason": verdict.reason, "set_aside": aside}
    policy.about |= {"checks": [asdict(check) for check in verdict.checks], "figures": verdict.figures}
    return policy, verdict, aside


def _sound(rounds: Sequence[Logged], bundle: str, policies: set[str]) -> tuple[list[Logged], Aside]:
    """What can be used of the rounds, the newest last, small ones together, and what cannot. Raises RefusedError where the newest says nothing."""
    found = [usable(one, bundle, policies) for one in rounds]
    parts = _together([int((~_judges(one)).sum()) for one, _ in found])
    checked(rounds[-1] if not len(found[-1][0]) else Logged.joined(rounds[parts[-1]]), bundle, policies)
    return [Logged.joined([one for one, _ in found[part]]) for part in parts], sum((aside for _, aside in found), Aside())


def _since_the_change(rounds: Sequence[Logged], deciding: str) -> tuple[Logged, Logged, Aside]:
    """What to learn from and what to be judged by, of the rounds since the world changed, and what is neither.

    deciding : run key of the policy whose decisions judge
    Raises RefusedError where the newest round has too few users for either.
    """
    teaching = [found.rows(~_judges(found)) for found in rounds]
    judging = [found.rows(_judges(found) & (found.policy == deciding)) for found in rounds]
    for found, what in ((teaching[-1], "learn from"), (judging[-1], "be judged by")):
        if _users(found) < LEAST_USERS:
            raise RefusedError(
                f"{_users(found)} users of the newest round to {what}, {LEAST_USERS} are needed", "wait for more, or raise policy.explore"
            )
    enough = [place for place, found in enumerate(teaching) if _users(found) >= LEAST_USERS]
    kept = enough[-since_the_change([teaching[place] for place in enough]) :]
    aside = Aside()
    for place, found in enumerate(rounds):
        if place not in kept:
            aside["before the world changed" if place in enough else "of a round with too few users"] += len(found)
    return Logged.joined([teaching[place] for place in kept]), Logged.joined([judging[place] for place in kept]), aside


def _users(log: Logged) -> int:
    return len(set(log.user.tolist()))


def _together(counts: Sequence[int]) -> list[slice]:
    """The rounds, oldest first, as many together as have `LEAST` decisions to learn from, if all have so many; the newest are no more than that
    takes."""
    found, end, n = [], len(counts), 0
    for place in reversed(range(len(counts))):
        n += counts[place]
        if n >= LEAST:
            found.append(slice(place, end))
            end, n = place, 0
    oldest = slice(0, found.pop().stop if found else end)
    return [oldest, *reversed(found)]


def _judges(log: Logged) -> np.ndarray:
    return draw_of(pa.array(log.user), "judges") < JUDGES


def _held_out(settings: Settings, bundle: Bundle) -> Callable[[Logged], np.ndarray]:
    """Which decisions are of users of whom the bundle learned nothing. Raises RefusedError where there are none."""
    split = bundle.settings["split"]
    if not split.get("held_out"):
        raise RefusedError("adapt with privacy.enabled: the trained on are not asked", "hold users out: split.held_out=0.2, and train anew")
    return lambda log: nothing_learned_of(pa.array(log.user), split)


def _lists(settings: Settings, dataset: Dataset, bundle: Bundle, policy: Policy, judged: Logged) -> tuple[float | None, float | None, int]:
    """How varied the judges' lists are under the policy, as a share of the trained model's, how much of an answer's time it takes, and of how
    many judges this is; None where the dataset knows nobody of them."""
    predictor = Predictor.load(bundle.path, dataset=dataset)
    translation = predictor.translation(dataset)
    users = np.random.default_rng(0).permutation(np.unique(judged.user)).tolist()
    if pa.types.is_integer(dataset.user_type):
        users = [int(user) for user in users if NUMBER.fullmatch(user)]  # whoever is called otherwise is none of the dataset's
    found = (dataset.user_history(user) for user in users[:LISTED])
    histories = [translation.history(history) for history in found if history is not None]
    unknown, nobody = np.zeros(len(predictor.context), np.int64), np.zeros(0, np.int64)
    asked = [Question(0, 0, history, nobody, dataset.now_s, unknown) for history in histories if (history.item_index > 0).any()]
    if not asked:
        return None, None, 0
    new_only = settings.score.new_only
    rules = Rules.declared(settings.score.rules(), dataset, translation.to_bundle, predictor.unseen)
    some = HeldOut(
        predictor, asked, policy.actions, k=settings.evaluate.k[0], new_only=new_only, listed_new_only=new_only, rules=rules, bound=policy.bound
    )
    places = np.arange(len(asked))
    mine, none = (some.lists(places, action) for action in (policy.act(some.observation), np.zeros((len(asked), len(policy.actions)))))
    return some.variety(mine, none), deciding_share(predictor, asked[:TIMED], policy), len(asked)


def since_the_change(rounds: Sequence[Logged]) -> int:
    """How many rounds there are since the world changed: the newest and those before it that foretell it as well as it foretells itself,
    back to the first that does not."""
    newest, kept = rounds[-1], 1
    own = (smoothed(newest) - newest.reward) ** 2
    for older in reversed(rounds[:-1]):
        worse = (_model(older).predict(_columns(newest)) - newest.reward) ** 2 - own
        if worse.mean() > SURE * worse.std() / np.sqrt(len(worse)) + 1e-12:
            break
        kept += 1
    return kept


def smoothed(log: Logged, seed: int = 0) -> np.ndarray:
    """What the logged actions are worth by a model that never saw the user, float64 [n]."""
    codes = log.codes
    fold = np.random.default_rng(seed).integers(0, FOLDS, int(codes.max()) + 1)[codes]
    found = np.zeros(len(log))
    for place in range(FOLDS):
        found[fold == place] = _model(log.rows(fold != place)).predict(_columns(log.rows(fold == place)))
    return found


def learn_from(
    log: Logged, live: Policy | None, actions: tuple[str, ...], bundle_digest: str, options: Marwil = Marwil(), *, seed: int = 0
) -> Policy:
    """The next policy. live : to begin with; None: action 0 for everybody."""
    frozen = Frozen.of(log.observation)
    frozen = frozen if live is None else live.frozen.widened(frozen)
    state = frozen.normalise(log.observation)
    worth = smoothed(log, seed)
    target = ((worth - worth.mean()) / max(worth.std(), 1e-9)).astype(np.float32)
    learner, module = _learner(len(actions), options)
    restore(module, beginning(module, options.sigma, live), None)
    random = np.random.default_rng(seed)
    size = min(options.minibatch, len(log))
    for _ in range(options.epochs):
        order = random.permutation(len(log))
        for first in range(0, len(order) - size + 1, size):
            some = order[first : first + size]
            _update(learner, state[some], log.action[some].astype(np.float32), target[some])
    about = {"decisions": len(log), "learner": "marwil", "seed": seed}
    return Policy(actions, frozen, plain(module.state_dict()), bundle_digest, about)


def _by_marwil(log: Logged, live: Policy | None, settings: Settings, bundle_digest: str) -> Policy:
    return learn_from(log, live, settings.policy.actions, bundle_digest)


def by_propensity(log: Logged, live: Policy | None, settings: Settings, bundle_digest: str) -> Policy:
    """The next policy by PPO, paid what logged outcomes say by propensity; half of the users teach the model that helps. Needs a Ray session."""
    options = settings.policy
    taught = np.random.default_rng(0).random(int(log.codes.max()) + 1)[log.codes] < 0.5
    model = _model(log.rows(taught))
    paid = Outcomes(log.rows(~taught), options.actions, lambda seen, action: model.predict(np.concatenate([seen, action], 1)))
    start = live if live is not None and live.actions == options.actions else None
    return learn(paid, Ppo(decisions=options.decisions, penalty=options.penalty), bundle_digest, seed=settings.split.seed, start=start)


LEARNERS = {"marwil": _by_marwil, "ppo": by_propensity}


def _learner(K: int, options: Marwil) -> tuple[Any, Any]:
    from ray.rllib.algorithms.marwil import MARWILConfig

    spaces = gymnasium.spaces.Box(-5.0, 5.0, (len(OBSERVED),), np.float32), gymnasium.spaces.Box(-1.0, 1.0, (K,), np.float32)
    config = (
        MARWILConfig()  # type: ignore[no-untyped-call]
        .environment(observation_space=spaces[0], action_space=spaces[1])
        .training(beta=options.beta, lr=options.lr, vf_coeff=1.0, grad_clip=1.0)
        .rl_module(model_config=module_config(options.hidden))
    )
    learner = config.build_learner(spaces={"__env__": spaces, MODULE: spaces})
    learner.build()
    module = learner.module[MODULE]
    module.get_train_action_dist_cls = truncated_normal  # type: ignore[method-assign]
    return learner, module


def truncated_normal() -> type:
    """RLlib's distribution of the actions that were logged: normal, cut off at -1 and 1, as `recray.inference.policy.explore` draws them.

    Fitted by the density of one that is not cut off, a mean near an end walks away from it, since no action lies beyond.
    """
    from ray.rllib.core.distribution.torch.torch_distribution import TorchDiagGaussian

    class TruncatedNormal(TorchDiagGaussian):
        def logp(self, value: Any, **_: Any) -> Any:
            mean, scale = self._dist.loc, self._dist.scale
            upper = mean.abs()  # by symmetry; the tails of a mean above 0 keep their digits
            low, high = (torch.special.log_ndtr((upper + end) / scale) for end in (-1.0, 1.0))
            return super().logp(value) - (high + torch.log1p(-torch.exp(low - high))).sum(-1)

    return TruncatedNormal


def _update(learner: Any, state: np.ndarray, action: np.ndarray, target: np.ndarray) -> None:
    """One step on decisions that each were an episode: what they were worth is their value target."""
    from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch

    columns = {"obs": state, "actions": action, "value_targets": target}
    batch = SampleBatch({name: torch.from_numpy(value) for name, value in columns.items()})  # type: ignore[no-untyped-call]
    learner.update(batch=MultiAgentBatch({MODULE: batch}, len(state)))


def _model(log: Logged) -> HistGradientBoostingRegressor:
    options = {"max_iter": 150, "max_depth": 4, "learning_rate": 0.05, "min_samples_leaf": 100, "random_state": 0}
    return HistGradientBoostingRegressor(**options).fit(_columns(log), log.reward)


def _columns(log: Logged) -> np.ndarray:
    return np.concatenate([log.observation, log.action], 1)
