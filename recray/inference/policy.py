"""The attention policy at run time: its observation of a request, and its action.

Plain numpy, without the code that learns it (see `policies`). Out of distribution the action is zero, which
is the trained model.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import le, mul, sub
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from recray.dataset.popularity import DAY_S
from recray.dataset.reader import History
from recray.errors import ArtifactError, DamagedArtifactError, MissingArtifactError, SettingsError
from recray.inference.modulation import find_slots, to_controls
from recray.model.controls import Controls
from recray.storage import immutable_directory, open_immutable

if TYPE_CHECKING:
    from torch import Tensor

    from recray.model.network import Network

KIND = "policy"
OBSERVED = (
    "log_length", "log_distinct", "repeat_rate", "distinct_of_last_20",
    "log_days_since_last", "log_days_known", "log_days_between", "spread_of_days_between",
    "share_of_last_7_days", "share_of_last_30_days",
    "popularity", "spread_of_popularity", "popularity_of_last",
    "share_of_main_event", "entropy_of_events", "last_is_main_event",
    "hour_sine", "hour_cosine", "weekend",
    "night_entropy", "night_margin", "night_known",
)  # fmt: skip
CLOCK = [OBSERVED.index(name) for name in ("hour_sine", "hour_cosine", "weekend")]
OBSERVED_EVENTS = 400  # last events of a history that an observation is computed from
_EMPTY_HISTORY, _NO_TIMES = (0.0,) * 16, (0.0,) * 6  # features of an empty history, and without times
MAX_ACTIONS = 8
CLIP = 5.0  # standard deviations from the mean at which observations are clipped
UNBOUNDED = float(np.finfo(np.float32).max)
TOLERANCE = 0.5  # share of the training range by which an observation may lie outside it


def rank_popularity(counts: np.ndarray) -> np.ndarray:
    """Rank of each item by its events, from 0 (the rarest) to 1, float32 [n_items + 1]; 0 for padding."""
    order = np.argsort(counts[1:], kind="stable")
    rank_V = np.zeros(len(counts), np.float32)
    rank_V[1 + order] = np.linspace(0.0, 1.0, len(order), dtype=np.float32)
    return rank_V


def observe(
    history: History,
    now_s: int,
    rank_V: np.ndarray,
    *,
    has_time: bool,
    state: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """A policy's observation of a request, float32 [len(OBSERVED)], without a forward pass of the request.

    rank_V : `rank_popularity` of the items
    state : attention entropy and score margin of the trained model in the last nightly run; None or not
        finite: unknown
    """
    # plain lists and few calls: this runs for every request with a cold CPU cache
    item = history.item_index[-OBSERVED_EVENTS:]
    event = history.event_index[-OBSERVED_EVENTS:]
    time_s = history.timestamp_s[-OBSERVED_EVENTS:]
    items = item.tolist()
    if 0 in items:
        is_known = item > 0
        item, event, time_s = item[is_known], event[is_known], time_s[is_known]
        items = item.tolist()
    n = len(items)
    summary, clock, last_run = _EMPTY_HISTORY, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)
    if n:
        distinct, last, times = len(set(items)), items[-20:], _NO_TIMES
        if has_time:
            moments = time_s.tolist()
            gaps = [math.log1p(gap / DAY_S) for gap in map(sub, moments[1:], moments) if gap > 0]
            since_last = math.log1p(max(now_s - moments[-1], 0) / DAY_S)
            since_first = math.log1p(max(now_s - moments[0], 0) / DAY_S)
            week, month = bisect_left(moments, now_s - 7 * DAY_S), bisect_left(moments, now_s - 30 * DAY_S)
            spread = _mean_and_deviation(gaps, max(n - 1, 1))
            times = (since_last, since_first, *spread, (n - week) / n, (n - month) / n)
        rank, events = rank_V[item].tolist(), event.tolist()
        main_share, entropy = events.count(0) / n, 0.0
        if main_share < 1.0:
            shares = [events.count(kind) / n for kind in set(events)]
            entropy = -sum([share * math.log(share) for share in shares])
        lengths = (math.log1p(n), math.log1p(distinct), 1.0 - distinct / n, len(set(last)) / len(last))
        ranks = (*_mean_and_deviation(rank, n), rank[-1])
        summary = (*lengths, *times, *ranks, main_share, entropy, events[-1] == 0)
    if has_time:
        angle = 2 * math.pi * (now_s % DAY_S) / DAY_S
        clock = (math.sin(angle), math.cos(angle), (now_s // DAY_S + 3) % 7 >= 5)
    if state is not None and math.isfinite(state[0]) and math.isfinite(state[1]):
        last_run = (state[0], state[1], 1.0)
    return np.array((*summary, *clock, *last_run), np.float32)


def _mean_and_deviation(values: list[float], n: int) -> tuple[float, float]:
    """Mean and standard deviation of n values, of which the missing ones are 0."""
    mean = sum(values) / n
    return mean, math.sqrt(max(sum(map(mul, values, values)) / n - mean * mean, 0.0))


@dataclass(frozen=True)
class ObservationNormalizer:
    """Statistics of the training observations, float32 [D] each, by which observations are normalised.

    A policy may be learned at a single query time and then decide at others. So a clock feature that was
    constant in training has an infinite scale and no effect, and all its values are in range.
    """

    mean: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, observation_ND: np.ndarray) -> ObservationNormalizer:
        """From observations. A column that never varies keeps a scale of 1."""
        low, high = observation_ND.min(0).astype(np.float64), observation_ND.max(0).astype(np.float64)
        mean, spread = observation_ND.mean(0, np.float64), observation_ND.std(0, np.float64)
        tolerance, varies = TOLERANCE * np.maximum(high - low, 1e-3), (high > low) & (spread > 1e-6)
        scale, low, high = np.where(varies, spread, 1.0), low - tolerance, high + tolerance
        constant = [column for column in CLOCK if not varies[column]]
        scale[constant], low[constant], high[constant] = np.inf, -UNBOUNDED, UNBOUNDED
        return cls(*(statistic.astype(np.float32) for statistic in (mean, scale, low, high)))

    def widen(self, other: ObservationNormalizer) -> ObservationNormalizer:
        """These statistics with the range extended to the other's.

        A clock feature that was constant in either takes the mean and the scale of the other.
        """
        is_constant = np.isinf(self.scale) | np.isinf(other.scale)
        mean = np.where(is_constant, other.mean, self.mean)
        scale = np.where(is_constant, other.scale, self.scale)
        return ObservationNormalizer(
            mean, scale, np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        )

    def normalise(self, observation_ND: np.ndarray) -> np.ndarray:
        """Normalised and clipped observations, float32 [N, D]."""
        normalised = (observation_ND - self.mean) / self.scale
        result: np.ndarray = np.minimum(np.maximum(normalised, -CLIP), CLIP).astype(np.float32)
        return result

    def is_in_range(self, observation_ND: np.ndarray) -> list[bool]:
        """Which rows lie in the range of training; a row that is not finite never does."""
        low, high = self.low.tolist(), self.high.tolist()
        return [_is_inside(low, row, high) for row in observation_ND.tolist()]


def _is_inside(low: list[float], row: list[float], high: list[float]) -> bool:
    return all(map(le, low, row)) and all(map(le, row, high))


class CheckRecord(TypedDict):
    """A `recray.evaluation.criteria.Check` as JSON."""

    name: str
    passed: bool
    text: str


class PolicyAbout(TypedDict, total=False):
    """How and when a policy was learned.

    key : run key
    asked : key of the request that it was learned for
    against : run key of the policy that it had to improve on; None: the unmodified model
    decisions, learner, seed : how many decisions it was learned from, by which algorithm
    bound : effect of an action of 1, as a share of the full effect of its control
    private : whether it was learned from holdout users alone
    bundle, dataset, as_of_s : run keys, and the end of the data
    round, made_s, newest_s : of `adapt`: number of the round against the same policy, from 1; its time, and
        that of the newest decision, seconds since 1970
    promoted, reason, checks, figures : the verdict of the promotion criteria
    set_aside : number of excluded decisions by reason
    """

    key: str
    asked: str
    against: str | None
    decisions: int
    learner: str
    seed: int
    bound: float
    private: bool
    bundle: str
    dataset: str
    as_of_s: int
    round: int
    made_s: float
    newest_s: float
    promoted: bool
    reason: str
    checks: list[CheckRecord]
    figures: dict[str, float]
    set_aside: Mapping[str, int]


class Policy:
    """A learned policy: a small network from an observation to the mean action.

    Parameters
    ----------
    actions : names of the controls that it sets, see `recray.inference.modulation.find_slots`
    normalizer : statistics of the observations that it was learned on
    weights : `weight_0 [h, D]`, `bias_0 [h]`, … in order; tanh between the layers
    bundle_digest : digest of the bundle that it belongs to
    """

    def __init__(
        self,
        actions: Sequence[str],
        normalizer: ObservationNormalizer,
        weights: dict[str, Tensor],
        bundle_digest: str,
        about: PolicyAbout,
    ) -> None:
        if not 0 < len(actions) <= MAX_ACTIONS:
            raise SettingsError(f"policy.actions names {len(actions)} controls", f"name 1 to {MAX_ACTIONS}")
        self.actions, self.normalizer = tuple(actions), normalizer
        # a training that starts from these weights must not start from weights of a constant feature
        is_constant = torch.from_numpy(np.isinf(normalizer.scale))
        self.weights = {**weights, "weight_0": weights["weight_0"].masked_fill(is_constant, 0.0)}
        self.bundle_digest, self.about = bundle_digest, about

        arrays = {name: value.detach().float().numpy() for name, value in self.weights.items()}
        self._layers = [
            (arrays[f"weight_{n}"].T.copy(), arrays[f"bias_{n}"]) for n in range(len(weights) // 2)
        ]
        self._is_finite = all(np.isfinite(part).all() for layer in self._layers for part in layer)
        # the first layer divides by the scale, which saves a step for every request
        self._layers[0] = self._layers[0][0] / normalizer.scale[:, None], self._layers[0][1]
        self._low, self._high = -CLIP * normalizer.scale, CLIP * normalizer.scale
        # within this range nothing is clipped and nothing is out of distribution
        self._unclipped_range = (
            np.maximum(normalizer.low, normalizer.mean + self._low).tolist(),
            np.minimum(normalizer.high, normalizer.mean + self._high).tolist(),
        )

    @property
    def bound(self) -> float:
        """Effect of an action of 1, as a share of the full effect of its control."""
        return float(self.about.get("bound", 1.0))

    def act(self, observation_ND: np.ndarray) -> np.ndarray:
        """The mean action of each row, float32 [N, K]; zeros for a row that is not finite or out of
        distribution.
        """
        if len(observation_ND) == 1:  # a request, for which every further step is slow
            row = observation_ND[0]
            low, high = self._unclipped_range
            if self._is_finite and _is_inside(low, row.tolist(), high):
                action: np.ndarray = self._forward(row - self.normalizer.mean)
                values = action.tolist()
                if min(values) >= -1.0 and max(values) <= 1.0:
                    return action[None]

        centred = np.minimum(np.maximum(observation_ND - self.normalizer.mean, self._low), self._high)
        actions = np.minimum(np.maximum(self._forward(centred), -1.0), 1.0)
        in_range = np.array(self.normalizer.is_in_range(observation_ND), bool)
        actions[~(in_range & self._is_finite)] = 0.0
        result: np.ndarray = actions
        return result

    def controls(self, observation_ND: np.ndarray, model: Network, event_types: Sequence[str]) -> Controls:
        """The action for each observation as controls of a model. Raises SettingsError for a control that the
        model does not have.
        """
        return to_controls(
            self.bound * self.act(observation_ND),
            find_slots(self.actions, model, event_types),
            model,
            event_types,
        )

    def _forward(self, x: np.ndarray) -> Any:
        """Output of the network, [..., D] to [..., K]."""
        for number, (weight, bias) in enumerate(self._layers):
            x = (np.tanh(x) if number else x).dot(weight) + bias
        return x

    def save(self, path: Path, key: str) -> None:
        """Write an immutable artifact of JSON and safetensors. Raises OutputExistsError."""
        with immutable_directory(path, KIND, key, {"bundle_digest": self.bundle_digest}) as folder:
            fields = {
                "actions": self.actions,
                "observed": OBSERVED,
                "bundle_digest": self.bundle_digest,
                "about": self.about,
            }
            (folder / "policy.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            statistics = {
                f"frozen_{name}": torch.from_numpy(np.ascontiguousarray(value))
                for name, value in asdict(self.normalizer).items()
            }
            weights = {name: value.contiguous() for name, value in self.weights.items()}
            save_file({**weights, **statistics}, folder / "policy.safetensors")

    @classmethod
    def load_usable(
        cls, path: Path, bundle_digest: str, *, private: bool = False, bound: float = 1.0
    ) -> tuple[Policy | None, str]:
        """The policy of a folder if a bundle may use it, else None and the reason.

        private : refuse a policy that was learned from users who were promised privacy
        bound : refuse a policy with a larger bound
        """
        try:
            policy = cls.load(path, bundle_digest)
        except ArtifactError as error:
            return None, f"{error.message}; {error.fix}"
        if private and not policy.about.get("private"):
            return None, "it was learned from all users, and privacy.enabled is on; run `recray tune`"
        if policy.bound > bound:
            return None, f"its bound is {policy.bound:g}, and policy.bound is {bound:g}; run `recray tune`"
        return policy, ""

    @classmethod
    def load(cls, path: Path, bundle_digest: str) -> Policy:
        """Open a policy of a bundle. Raises MissingArtifactError, DamagedArtifactError."""
        if not path.exists():
            raise MissingArtifactError(f"no policy {path}", "run `recray tune`")
        open_immutable(path, KIND)
        fields = json.loads((path / "policy.json").read_text())
        if fields["bundle_digest"] != bundle_digest:
            raise DamagedArtifactError(
                f"policy {path.name} belongs to another bundle", "run `recray tune` for this one"
            )
        if tuple(fields["observed"]) != OBSERVED:
            raise DamagedArtifactError(
                f"policy {path.name} uses other observations than this version of recray",
                "run `recray tune` again",
            )
        tensors = load_file(path / "policy.safetensors")
        statistics = {
            name.removeprefix("frozen_"): value.numpy()
            for name, value in tensors.items()
            if name.startswith("frozen_")
        }
        weights = {name: value for name, value in tensors.items() if not name.startswith("frozen_")}
        return cls(
            fields["actions"], ObservationNormalizer(**statistics), weights, bundle_digest, fields["about"]
        )
