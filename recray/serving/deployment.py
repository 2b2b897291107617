"""The deployment: the published run and the challenger of an experiment. It is replaced as a whole when
another run or release is there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from recray.config import ScoreSettings
from recray.dataset.reader import is_holdout
from recray.errors import ArtifactError, DamagedArtifactError, RefusedError, StateError
from recray.events.log import Log
from recray.events.rewards import Rewards
from recray.inference.policy import Policy
from recray.release import Release, adopt_policy, end_experiment
from recray.serving.experiment import Experiment
from recray.serving.items import ItemChanges
from recray.serving.state import ServingState, load_without_lists
from recray.storage import Storage

if TYPE_CHECKING:
    import torch

RETRY_S = 30.0  # until a failed load is repeated
ENTRIES = 10_000  # of the event store in one read
READS = 5  # of the event store in one refresh
JUST_S = 30.0  # an experiment that is younger has no entries in the event store yet


@dataclass(frozen=True)
class Deployment:
    """States and experiment at one moment; a request reads it once. `challenger` serves from the same run."""

    state: ServingState
    experiment: Experiment | None = None
    challenger: ServingState | None = None


class Deployments:
    """Holds the current deployment; `refresh` and `refresh_items` replace it.

    Without a readable snapshot, it starts with the champion and the last dataset. Raises
    MissingArtifactError, DamagedArtifactError, RefusedError when it is constructed.
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
        self._published = _read_file(storage.latest)
        self._tried, self._retry_at = b"", 0.0
        self._released, self._released_retry_at = b"", 0.0
        self._last_entry = 0
        self._stale_run = ""
        self._items, self._publishing = ItemChanges(), threading.Lock()
        first = load_first_state(storage, score, self._log.error, private=private, bound=bound, device=device)
        self._loaded = self.current = Deployment(first)

    def refresh(self, log: Log | None) -> None:
        """Load a new run or release, replace the deployment at once, and end an experiment that failed.

        If a run cannot be loaded, the current one stays, and the load is repeated later.

        log : event store with the outcomes of an experiment, None where it is unavailable
        """
        now_s = time.monotonic()
        state = self._load_published(now_s)
        released = _read_file(self.storage.release)
        if (
            released != self._released and now_s >= self._released_retry_at
        ) or state is not self._loaded.state:
            self._publish(self._apply_release(state, released, now_s, log))
        self._log_staleness()
        try:
            self._watch_experiment(log)
        except Exception as error:
            self._log.error("the experiment cannot be checked: %s", error)

    def refresh_items(self, log: Log | None) -> None:
        """Take over changes of items from the event store, None where it is unavailable."""
        if log is not None:
            with contextlib.suppress(StateError):
                if self._items.read(log):
                    self._publish()

    def _publish(self, loaded: Deployment | None = None) -> None:
        """Make a deployment the current one, with the changes of items; None: the last one."""
        with self._publishing:
            self._loaded = loaded = loaded or self._loaded
            states = [state for state in (loaded.state, loaded.challenger) if state is not None]
            try:
                state, *challengers = self._items.apply(states)
            except Exception as error:  # the run must be served
                self._log.error("the changes of items cannot be applied: %s", error)
                state, *challengers = states
            self.current = Deployment(state, loaded.experiment, challengers[0] if challengers else None)

    def _load_published(self, now_s: float) -> ServingState:
        """The published run if it is new, else the current one."""
        state, published = self._loaded.state, _read_file(self.storage.latest)
        if (
            published
            and published != self._published
            and (published != self._tried or now_s >= self._retry_at)
        ):
            self._tried, self._retry_at = published, now_s + RETRY_S
            try:
                state = require_privacy(
                    ServingState.load(self.storage, self._device, self._bound), private=self._private
                )
                self._published = published
            except Exception as error:  # the watch must go on
                self._log.error("the published run cannot be loaded, the old one stays: %s", error)
        return state

    def _apply_release(
        self, state: ServingState, released: bytes, now_s: float, log: Log | None
    ) -> Deployment:
        """The deployment of a run with the policy and the experiment of the release."""
        try:
            release = Release.read(self.storage) if released else Release()
            state = require_privacy(self._with_released_policy(state, release), private=self._private)
            experiment, challenger = self._load_experiment(state, release, log)
        except Exception as error:
            self._released_retry_at = now_s + RETRY_S
            self._log.error("the release cannot be loaded: %s", error)
            return Deployment(state)
        if self._has_released_policy(state, release):
            self._released = released
        else:
            self._released_retry_at = now_s + RETRY_S
        return Deployment(state, experiment, challenger)

    def _log_staleness(self) -> None:
        """Log once per run that it is stale."""
        state = self._loaded.state
        if state.is_stale and self._stale_run != state.date:
            self._stale_run = state.date
            self._log.error(
                "no run since %s: no policy decides or explores, the unmodified model serves", state.date
            )

    def _with_released_policy(self, state: ServingState, release: Release) -> ServingState:
        """The run with the released policy of its bundle, which may be newer than its lists. A policy that
        cannot be used is left out.
        """
        champion = release.champion
        if champion is None or champion.digest != state.bundle_digest or champion.policy == state.policy:
            return state
        if state.policy is None and champion.policy is not None:
            policy, reason = Policy.load_usable(
                self.storage.policy(champion.policy), champion.digest, bound=self._bound
            )
            if policy is None:
                self._log.error(
                    "policy %s is not used, the unmodified model serves: %s", champion.policy, reason
                )
                return state
        return state.with_bundle(champion.open(self.storage), champion.policy)

    @staticmethod
    def _has_released_policy(state: ServingState, release: Release) -> bool:
        """Whether the released policy of the run's bundle is in use, where there is one."""
        champion = release.champion
        return champion is None or champion.digest != state.bundle_digest or champion.policy == state.policy

    def _load_experiment(
        self, state: ServingState, release: Release, log: Log | None
    ) -> tuple[Experiment | None, ServingState | None]:
        """The experiment of a release, and its challenger on a run. None without an experiment, and for a
        policy of the champion that waits for the first run of its bundle.
        """
        member, champion = release.challenger, release.champion
        if member is None or not release.has_experiment:
            return None, None
        if champion is not None and champion.digest == member.digest != state.bundle_digest:
            return None, None  # else its users alone would get the new bundle
        if member.policy is not None:
            policy, reason = Policy.load_usable(
                self.storage.policy(member.policy), member.digest, bound=self._bound
            )
            if policy is None:
                raise DamagedArtifactError(
                    f"policy {member.policy} of the experiment cannot be used: {reason}",
                    "recray serve rollback ends the experiment",
                )
        challenger = require_privacy(
            state.with_bundle(member.open(self.storage), member.policy), private=self._private
        )
        running = self._loaded.experiment
        fields = (member.name, release.share, release.shadow, release.since_s)
        if (
            running is not None
            and (running.challenger, running.share, running.shadow, running.since_s) == fields
        ):
            return running, challenger
        splits = [
            tested.open(self.storage).settings["split"]
            for tested in (member, champion)
            if tested is not None and self._private
        ]

        # a replica that starts during an experiment reads its earlier entries too
        is_new = log is not None and time.time() <= release.since_s + JUST_S
        self._last_entry = log.last() if log is not None and is_new else 0
        return Experiment(*fields, self._rewards, partial(_is_holdout, splits=splits)), challenger

    def _watch_experiment(self, log: Log | None) -> None:
        """Read the new entries of the experiment, and end it if the challenger failed or won."""
        loaded = self._loaded
        state, experiment, challenger = loaded.state, loaded.experiment, loaded.challenger
        if experiment is None:
            return
        if log is not None:
            with contextlib.suppress(StateError):
                for _ in range(READS):  # the rest at the next refresh
                    if not (entries := log.read(self._last_entry, ENTRIES)):
                        break
                    for number, entry in entries:
                        experiment.add_entry(entry)
                        self._last_entry = number
        if reason := experiment.find_reason_to_end():
            self._publish(Deployment(state))  # at once, even if the release cannot be written
            self._log.warning("the experiment of bundle %s ends: %s", experiment.challenger, reason)
            end_experiment(self.storage, reason, experiment.challenger)
        elif (
            experiment.has_won()
            and challenger is not None
            and challenger.bundle_digest == state.bundle_digest
        ):
            self._log.warning(
                "the policy of %s was significantly better: it decides for everybody", experiment.challenger
            )
            # the next refresh loads it
            adopt_policy(self.storage, experiment.challenger, experiment.since_s)


def _is_holdout(user: str, splits: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the user is a holdout user of all these splits, so that no bundle's privacy is concerned."""
    return all(is_holdout(pa.array([user]), split)[0] for split in splits)


def _read_file(path: Path) -> bytes:
    """Content of a small file, empty without a file."""
    return path.read_bytes() if path.exists() else b""


def require_privacy(state: ServingState, *, private: bool) -> ServingState:
    """The state. Raises RefusedError with `private` for a bundle or policy without privacy."""
    policy = state.policy_network
    if private and policy is not None and not policy.about.get("private"):
        raise RefusedError(
            f"privacy.enabled, but policy {state.policy} was learned from all users",
            "recray tune with privacy.enabled makes another one",
        )
    if private and not state.is_private:
        raise RefusedError(
            f"privacy.enabled, but bundle {state.bundle} was trained without privacy; it serves nobody",
            "use another storage.root, or promote a private bundle first",
        )
    return state


def load_first_state(
    storage: Storage,
    score: ScoreSettings,
    progress: Callable[[str], None],
    *,
    private: bool = False,
    bound: float = 1.0,
    device: str | torch.device = "cpu",
) -> ServingState:
    """The published run, or the champion on the last dataset.

    Raises MissingArtifactError, DamagedArtifactError of the run if neither is there, RefusedError as
    `require_privacy`.
    """
    try:
        return require_privacy(ServingState.load(storage, device, bound), private=private)
    except ArtifactError as error:
        try:
            state = require_privacy(load_without_lists(storage, score, device, bound), private=private)
        except ArtifactError:
            raise error from None
        progress(f"no batch recommendations, the champion serves all requests: {error}")
        return state
