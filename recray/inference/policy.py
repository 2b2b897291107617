"""The attention policy at run time: what it sees of a request, what it decides, and how likely it was to decide so.

Plain numpy; whoever learned it (see `policies`) is not needed. For whatever the policy does not know it decides zeros, the trained model as it is.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import le, mul, sub
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from recray.dataset.popularity import DAY_S
from recray.dataset.reader import History
from recray.errors import ArtifactError, DamagedArtifactError, MissingArtifactError, SettingsError
from recray.inference.modulation import find_slots, to_controls
from recray.model.controls import Controls
from recray.storage import open_sealed, sealed_directory

if TYPE_CHECKING:
    from torch import Tensor

    from recray.model.recommender import Recommender

KIND = "policy"
OBSERVED = (
    "log_length", "log_distinct", "repeat_rate", "distinct_of_last_20",
    "log_days_since_last", "log_days_known", "log_days_between", "spread_of_days_between", "share_of_last_7_days", "share_of_last_30_days",
    "popularity", "spread_of_popularity", "popularity_of_last",
    "share_of_main_event", "entropy_of_events", "last_is_main_event",
    "hour_sine", "hour_cosine", "weekend",
    "night_entropy", "night_margin", "night_known",
)  # fmt: skip
CLOCK = [OBSERVED.index(name) for name in ("hour_sine", "hour_cosine", "weekend")]
LOOKED_AT = 400  # last events that an observation is made of
_NOTHING, _NO_TIMES = (0.0,) * 16, (0.0,) * 6  # of an empty history, and where no time is known
MOST = 8  # actions
FAR = 5.0  # standard deviations from the mean, beyond which it does not matter how far
ANY = float(np.finfo(np.float32).max)
EDGE = 0.5  # of what was seen when the policy was learned, an observation may lie beyond it


def popularity_rank(counts: np.ndarray) -> np.ndarray:
    """Place of each item among all by its events, 0 the rarest to 1, float32 [n_items + 1]; 0 for none."""
    order = np.argsort(counts[1:], kind="stable")
    found = np.zeros(len(counts), np.float32)
    found[1 + order] = np.linspace(0.0, 1.0, len(order), dtype=np.float32)
    return found


def observe(history: History, now_s: int, rank_V: np.ndarray, *, has_time: bool, state: Sequence[float] | np.ndarray | None = None) -> np.ndarray:
    """What a policy sees of a request, float32 [len(OBSERVED)]: the history at a moment, and no forward pass of the request.

    rank_V : `popularity_rank` of the items
    state : attention entropy and score margin as the last nightly run had them, of the trained model as it is; None or not finite: not known
    """
    # straight on, by lists: it is done for every request, and of numpy's and Python's parts few are in the cache when one comes
    item, event, time_s = history.item_index[-LOOKED_AT:], history.event_index[-LOOKED_AT:], history.timestamp_s[-LOOKED_AT:]
    items = item.tolist()
    if 0 in items:
        kept = item > 0
        item, event, time_s = item[kept], event[kept], time_s[kept]
        items = item.tolist()
    n = len(items)
    known, clock, night = _NOTHING, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)
    if n:
        distinct, last, times = len(set(items)), items[-20:], _NO_TIMES
        if has_time:
            moments = time_s.tolist()
            between = [math.log1p(gap / DAY_S) for gap in map(sub, moments[1:], moments) if gap > 0]
            latest, first = math.log1p(max(now_s - moments[-1], 0) / DAY_S), math.log1p(max(now_s - moments[0], 0) / DAY_S)
            week, month = bisect_left(moments, now_s - 7 * DAY_S), bisect_left(moments, now_s - 30 * DAY_S)
            times = (latest, first, *_moments(between, max(n - 1, 1)), (n - week) / n, (n - month) / n)
        rank, events = rank_V[item].tolist(), event.tolist()
        main, mixed = events.count(0) / n, 0.0
        if main < 1.0:
            share = [events.count(kind) / n for kind in set(events)]
            mixed = -sum([part * math.log(part) for part in share])
        lengths = (math.log1p(n), math.log1p(distinct), 1.0 - distinct / n, len(set(last)) / len(last))
        known = (*lengths, *times, *_moments(rank, n), rank[-1], main, mixed, events[-1] == 0)
    if has_time:
        angle = 2 * math.pi * (now_s % DAY_S) / DAY_S
        clock = (math.sin(angle), math.cos(angle), (now_s // DAY_S + 3) % 7 >= 5)
    if state is not None and math.isfinite(state[0]) and math.isfinite(state[1]):
        night = (state[0], state[1], 1.0)
    return np.array((*known, *clock, *night), np.float32)


def _moments(values: list[float], n: int) -> tuple[float, float]:
    """Mean and standard deviation of n values; those that are not among them are 0."""
    mean = sum(values) / n
    return mean, math.sqrt(max(sum(map(mul, values, values)) / n - mean * mean, 0.0))


@dataclass(frozen=True)
class Frozen:
    """Statistics that observations are normalised by, float32 [D] each, as they were when a policy was learned.

    A policy may be learned at one moment alone, as where all are asked at the end of what is known, and decides at others: a clock
    that stood still says nothing. Its scale is infinite, so it counts for nothing, and whatever it shows is known.
    """

    mean: np.ndarray
    scale: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, observation_ND: np.ndarray) -> Frozen:
        """Of observations; a column that never varies is left where it is."""
        low, high = observation_ND.min(0).astype(np.float64), observation_ND.max(0).astype(np.float64)
        mean, spread = observation_ND.mean(0, np.float64), observation_ND.std(0, np.float64)
        room, varies = EDGE * np.maximum(high - low, 1e-3), (high > low) & (spread > 1e-6)
        scale, low, high = np.where(varies, spread, 1.0), low - room, high + room
        still = [place for place in CLOCK if not varies[place]]
        scale[still], low[still], high[still] = np.inf, -ANY, ANY
        return cls(*(x.astype(np.float32) for x in (mean, scale, low, high)))

    def widened(self, other: Frozen) -> Frozen:
        """These, which know what another's knew, too; a clock that stood still in these goes as in the other, and stands where it does there."""
        again = np.isinf(self.scale) | np.isinf(other.scale)
        mean, scale = np.where(again, other.mean, self.mean), np.where(again, other.scale, self.scale)
        return Frozen(mean, scale, np.minimum(self.low, other.low), np.maximum(self.high, other.high))

    def normalise(self, observation_ND: np.ndarray) -> np.ndarray:
        """Float32 [N, D]."""
        found: np.ndarray = np.minimum(np.maximum((observation_ND - self.mean) / self.scale, -FAR), FAR).astype(np.float32)
        return found

    def knows(self, observation_ND: np.ndarray) -> list[bool]:
        """Which rows are like those that the policy was learned on; none that is not finite."""
        low, high = self.low.tolist(), self.high.tolist()
        return [_between(low, row, high) for row in observation_ND.tolist()]


def _between(low: list[float], row: list[float], high: list[float]) -> bool:
    return all(map(le, low, row)) and all(map(le, row, high))


class Policy:
    """A learned policy: a small network from an observation to the mean action.

    Parameters
    ----------
    actions : names of the controls that it moves, see `recray.inference.modulation.find_slots`
    frozen : of the observations that it was learned on
    weights : `weight_0 [h, D]`, `bias_0 [h]`, … in order; tanh between the layers
    bundle_digest : of the bundle that it belongs to
    about : what else is known of it: when and how it was learned
    """

    def __init__(self, actions: Sequence[str], frozen: Frozen, weights: dict[str, Tensor], bundle_digest: str, about: dict[str, Any]) -> None:
        if not 0 < len(actions) <= MOST:
            raise SettingsError(f"policy.actions names {len(actions)} controls", f"name 1 to {MOST}")
        still = torch.from_numpy(np.isinf(frozen.scale))  # whoever begins with these weights does not begin with what was never learned
        self.actions, self.frozen, self.weights = tuple(actions), frozen, {**weights, "weight_0": weights["weight_0"].masked_fill(still, 0.0)}
        self.bundle_digest, self.about = bundle_digest, about
        plain = {name: value.detach().float().numpy() for name, value in self.weights.items()}
        self._layers = [(plain[f"weight_{n}"].T.copy(), plain[f"bias_{n}"]) for n in range(len(weights) // 2)]
        self._sound = all(np.isfinite(part).all() for layer in self._layers for part in layer)
        # the first layer divides by the scale, so that little is left to do for a request
        self._layers[0] = self._layers[0][0] / frozen.scale[:, None], self._layers[0][1]
        self._low, self._high = -FAR * frozen.scale, FAR * frozen.scale
        # within these nothing is cut and nothing is unknown
        self._near = np.maximum(frozen.low, frozen.mean + self._low).tolist(), np.minimum(frozen.high, frozen.mean + self._high).tolist()

    @property
    def bound(self) -> float:
        """What an action of one turns, as a share of what it can."""
        return float(self.about.get("bound", 1.0))

    def act(self, observation_ND: np.ndarray) -> np.ndarray:
        """The mean action of each row, float32 [N, K]; zeros for a row that is not finite or unlike those that it was learned on."""
        if len(observation_ND) == 1:  # a request: it mostly needs no more than this, and each step more is dear there
            row = observation_ND[0]
            low, high = self._near
            if self._sound and _between(low, row.tolist(), high):
                found: np.ndarray = self._through(row - self.frozen.mean)
                action = found.tolist()
                if min(action) >= -1.0 and max(action) <= 1.0:
                    return found[None]
        x = np.minimum(np.maximum(observation_ND - self.frozen.mean, self._low), self._high)
        found = np.minimum(np.maximum(self._through(x), -1.0), 1.0)
        found[~(np.array(self.frozen.knows(observation_ND), bool) & self._sound)] = 0.0
        return found

    def controls(self, observation_ND: np.ndarray, model: Recommender, event_types: Sequence[str]) -> Controls:
        """What it decides for each observation, as a model takes it. Raises SettingsError for a control that the model does not have."""
        return to_controls(self.bound * self.act(observation_ND), find_slots(self.actions, model, event_types), model, event_types)

    def _through(self, x: np.ndarray) -> Any:
        """Of the network: [..., D] to [..., K]."""
        for place, (weight, bias) in enumerate(self._layers):
            x = (np.tanh(x) if place else x).dot(weight) + bias
        return x

    def save(self, path: Path, key: str) -> None:
        """As a sealed directory of JSON and safetensors. Raises OutputExistsError."""
        with sealed_directory(path, KIND, key, {"bundle_digest": self.bundle_digest}) as folder:
            fields = {"actions": self.actions, "observed": OBSERVED, "bundle_digest": self.bundle_digest, "about": self.about}
            (folder / "policy.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            frozen = {f"frozen_{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in asdict(self.frozen).items()}
            save_file({**{name: value.contiguous() for name, value in self.weights.items()}, **frozen}, folder / "policy.safetensors")

    @classmethod
    def sound(cls, path: Path, bundle_digest: str, *, private: bool = False, bound: float = 1.0) -> tuple[Policy | None, str]:
        """The policy in a folder where it can decide for a bundle, else None and why not: none that cannot be read stops what answers.

        private : nor does one decide that was learned from users who were promised privacy
        bound : nor one that turns further
        """
        try:
            found = cls.load(path, bundle_digest)
        except ArtifactError as error:
            return None, f"{error.what}; {error.fix}"
        if private and not found.about.get("private"):
            return None, "it was learned from all users, and privacy.enabled is on; `recray tune` makes another"
        if found.bound > bound:
            return None, f"it turns up to {found.bound:g}, and policy.bound is {bound:g}; `recray tune` makes another"
        return found, ""

    @classmethod
    def load(cls, path: Path, bundle_digest: str) -> Policy:
        """Raises MissingArtifactError, DamagedArtifactError, also for one that belongs to another bundle."""
        if not path.exists():
            raise MissingArtifactError(f"no policy {path}", "run `recray tune`")
        open_sealed(path, KIND)
        fields = json.loads((path / "policy.json").read_text())
        if fields["bundle_digest"] != bundle_digest:
            raise DamagedArtifactError(f"policy {path.name} belongs to another bundle", "run `recray tune` for this one")
        if tuple(fields["observed"]) != OBSERVED:
            raise DamagedArtifactError(f"policy {path.name} sees other things than this version of recray shows", "run `recray tune` again")
        tensors = load_file(path / "policy.safetensors")
        frozen = Frozen(**{name.removeprefix("frozen_"): value.numpy() for name, value in tensors.items() if name.startswith("frozen_")})
        weights = {name: value for name, value in tensors.items() if not name.startswith("frozen_")}
        return cls(fields["actions"], frozen, weights, bundle_digest, fields["about"])
