"""What serves: the published run, and an experiment's challenger beside it, exchanged as a whole when something else is published or released."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from recray.config import ScoreSettings
from recray.dataset.reader import nothing_learned_of
from recray.errors import ArtifactError, DamagedArtifactError, RefusedError, StateError
from recray.inference.policy import Policy
from recray.promotion import adopt_policy, end_trial
from recray.release import Release
from recray.serving.experiment import Experiment
from recray.serving.state import ServingState
from recray.state.log import Log
from recray.state.rewards import Rewards
from recray.storage import Storage

if TYPE_CHECKING:
    import torch

AGAIN_S = 30.0  # after which what could not be loaded is tried again
ENTRIES = 10_000  # of the event store, read at once
READS = 5  # in a look
JUST_S = 30.0  # an experiment that began less long ago has nothing in the event store yet


@dataclass(frozen=True)
class Deployment:
    """What serves at one moment; a request reads it once. `challenger` serves from the same run."""

    state: ServingState
    experiment: Experiment | None = None
    challenger: ServingState | None = None


class Deployments:
    """The deployment of now; `look` exchanges it.

    Where no snapshot can be read but there is a champion and a dataset, it begins with those.
    Raises MissingArtifactError, DamagedArtifactError, RefusedError when it is made.
    """

    def __init__(
        self,
        storage: Storage,
        score: ScoreSettings,
        rewards: Rewards,
        *,
        private: bool = False,
        bound: float = 1.0,
        device: str | torch.device = "cpu",
    ) -> None:
        self.storage = storage
        self._log = logging.getLogger("ray.serve")
        self._rewards, self._private, self._bound, self._device = rewards, private, bound, device
        self._published = _content(storage.latest)
        self._tried, self._again_at = b"", 0.0
        self._released, self._released_again_at = b"", 0.0
        self._read = 0
        self._stale_run = ""
        self.current = Deployment(first_state(storage, score, self._log.error, private=private, bound=bound, device=device))

    def look(self, log: Log | None) -> None:
        """Load what was published or released since the last look, aside, and swap the references at once; end an experiment that failed.

        A run that cannot be loaded leaves the old one in place, and is tried again after a while.

        log : where the outcomes of an experiment are read, None where it is unavailable
        """
        now_s = time.monotonic()
        state = self._newest(now_s)
        released = _content(self.storage.release)
        if (released != self._released and now_s >= self._released_again_at) or state is not self.current.state:
            self.current = self._released_behind(state, released, now_s, log)
        self._say_once_if_stale()
        try:
            self._watch_experiment(log)
        except Exception as error:
            self._log.error("the challenger cannot be looked after: %s", error)

    def _newest(self, now_s: float) -> ServingState:
        """The published run if it is another one than what serves, else what serves."""
        state, published = self.current.state, _content(self.storage.latest)
        if published and published != self._published and (published != self._tried or now_s >= self._again_at):
            self._tried, self._again_at = published, now_s + AGAIN_S
            try:
                state = require_privacy(ServingState.load(self.storage, self._device, self._bound), private=self._private)
                self._published = published
            except Exception as error:  # whatever it is, the watch must go on
                self._log.error("the published night cannot be loaded, the old one stays: %s", error)
        return state

    def _released_behind(self, state: ServingState, released: bytes, now_s: float, log: Log | None) -> Deployment:
        """A run with the policy and the experiment of the release."""
        try:
            release = Release.read(self.storage) if released else Release()
            state = require_privacy(self._with_released_policy(state, release), private=self._private)
            experiment, challenger = self._experiment_of(state, release, log)
        except Exception as error:
            self._released_again_at = now_s + AGAIN_S
            self._log.error("what is released cannot be loaded: %s", error)
            return Deployment(state)
        if self._has_released_policy(state, release):
            self._released = released
        else:
            self._released_again_at = now_s + AGAIN_S
        return Deployment(state, experiment, challenger)

    def _say_once_if_stale(self) -> None:
        state = self.current.state
        if state.is_stale and self._stale_run != state.date:
            self._stale_run = state.date
            self._log.error("no night since %s: nothing is decided or explored, the trained model answers as it is", state.date)

    def _with_released_policy(self, state: ServingState, release: Release) -> ServingState:
        """The run with the policy that is released for its bundle, which may be newer than its lists; without one that cannot be read."""
        champion = release.champion
        if champion is None or champion.digest != state.bundle_digest or champion.policy == state.policy:
            return state
        if state.policy is None and champion.policy is not None:
            policy, reason = Policy.sound(self.storage.policy(champion.policy), champion.digest, bound=self._bound)
            if policy is None:
                self._log.error("policy %s does not decide, the trained model answers as it is: %s", champion.policy, reason)
                return state
        return state.with_bundle(champion.open(self.storage), champion.policy)

    @staticmethod
    def _has_released_policy(state: ServingState, release: Release) -> bool:
        """Whether the policy that is released for the run's bundle decides, where there is one."""
        champion = release.champion
        return champion is None or champion.digest != state.bundle_digest or champion.policy == state.policy

    def _experiment_of(self, state: ServingState, release: Release, log: Log | None) -> tuple[Experiment | None, ServingState | None]:
        """The experiment of a release, and its challenger behind a run; None where there is none, or a champion's policy waits for its first run."""
        member, champion = release.challenger, release.champion
        if member is None or not release.on_trial:
            return None, None
        if champion is not None and champion.digest == member.digest != state.bundle_digest:
            return None, None  # else the bundle, which the others do not have yet, would be tried with it
        if member.policy is not None:
            policy, reason = Policy.sound(self.storage.policy(member.policy), member.digest, bound=self._bound)
            if policy is None:
                what = f"policy {member.policy} is on trial and does not decide: {reason}"
                raise DamagedArtifactError(what, "recray serve rollback ends the trial")
        challenger = require_privacy(state.with_bundle(member.open(self.storage), member.policy), private=self._private)
        running, experiment = self.current.experiment, (member.name, release.share, release.shadow, release.since_s)
        if running is not None and (running.challenger, running.share, running.shadow, running.since_s) == experiment:
            return running, challenger
        splits = [one.open(self.storage).settings["split"] for one in (member, champion) if one is not None and self._private]
        began_before = log is None or time.time() > release.since_s + JUST_S
        self._read = 0 if log is None or began_before else log.last()  # a replica that is started anew learns what came before
        return Experiment(*experiment, self._rewards, partial(_nothing_learned_of, splits=splits)), challenger

    def _watch_experiment(self, log: Log | None) -> None:
        """Read what came of the experiment so far, and end it where the challenger failed or won."""
        state, experiment, challenger = self.current.state, self.current.experiment, self.current.challenger
        if experiment is None:
            return
        if log is not None:
            with contextlib.suppress(StateError):
                for _ in range(READS):  # the rest at the next look
                    if not (entries := log.read(self._read, ENTRIES)):
                        break
                    for number, entry in entries:
                        experiment.read(entry)
                        self._read = number
        if reason := experiment.reason_to_end():
            self.current = Deployment(state)  # here at once, whether or not it can be written down
            self._log.warning("the trial of bundle %s ends: %s", experiment.challenger, reason)
            end_trial(self.storage, reason, experiment.challenger)
        elif experiment.has_won() and challenger is not None and challenger.bundle_digest == state.bundle_digest:
            self._log.warning("the policy of %s was better on trial: it decides for everybody", experiment.challenger)
            adopt_policy(self.storage, experiment.challenger, experiment.since_s)  # which the next look takes up


def _nothing_learned_of(user: str, splits: Sequence[dict[str, Any]]) -> bool:
    """Whether no bundle of these splits learned of the user, who is none that privacy was promised to."""
    return all(nothing_learned_of(pa.array([user]), split)[0] for split in splits)


def _content(path: Path) -> bytes:
    """Of a small file, empty where there is none."""
    return path.read_bytes() if path.exists() else b""


def require_privacy(state: ServingState, *, private: bool) -> ServingState:
    """The state. Raises RefusedError if only privately trained bundles may serve and its bundle is none."""
    policy = state.policy_network
    if private and policy is not None and not policy.about.get("private"):
        raise RefusedError(f"privacy.enabled, but policy {state.policy} was learned from all users", "recray tune with privacy.enabled makes another")
    if private and not state.is_private:
        raise RefusedError(
            f"privacy.enabled, but bundle {state.bundle} was trained without privacy; it answers nobody",
            "begin with a storage.root of its own, or promote a private bundle first",
        )
    return state


def first_state(
    storage: Storage,
    score: ScoreSettings,
    say: Callable[[str], None],
    *,
    private: bool = False,
    bound: float = 1.0,
    device: str | torch.device = "cpu",
) -> ServingState:
    """The published run, or what can stand in for it.

    Raises MissingArtifactError, DamagedArtifactError of the run if neither is there, RefusedError as `require_privacy`.
    """
    try:
        return require_privacy(ServingState.load(storage, device, bound), private=private)
    except ArtifactError as error:
        try:
            state = require_privacy(ServingState.without_lists(storage, score, device, bound), private=private)
        except ArtifactError:
            raise error from None
        say(f"no nightly lists, the champion answers all: {error}")
        return state
