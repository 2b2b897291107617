"""What answers: the published night, and the challenger on trial beside it, exchanged as a whole when something else is published or released."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
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
from recray.serving.night import Night
from recray.serving.trial import Trial
from recray.state.log import Log
from recray.state.rewards import Rewards
from recray.storage import Storage

if TYPE_CHECKING:
    import torch

AGAIN_S = 30.0  # after which what could not be loaded is tried again
ENTRIES = 10_000  # of the log, read at once
READS = 5  # in a look
JUST_S = 30.0  # a trial that began less long ago has nothing in the log yet


class Arms:
    """The night that answers, and the trial with its challenger; `look` exchanges them.

    Where no snapshot can be read but there is a champion and a dataset, it begins with those.
    Raises MissingArtifactError, DamagedArtifactError, RefusedError when it is made.

    now : night, trial, challenger; read all three at once, since they change together
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
        first = first_night(storage, score, self._log.error, private=private, bound=bound, device=device)
        self.now: tuple[Night, Trial | None, Night | None] = (first, None, None)

    @property
    def night(self) -> Night:
        """What answers."""
        return self.now[0]

    @property
    def trial(self) -> Trial | None:
        """Whether a challenger is on trial, and whom it answers."""
        return self.now[1]

    @property
    def challenger(self) -> Night | None:
        """The challenger, behind the same night."""
        return self.now[2]

    def look(self, log: Log | None) -> None:
        """Load what was published or released since the last look, aside, and swap the references at once; end a trial that failed.

        A night that cannot be loaded leaves the old one in place, and is tried again after a while.

        log : where the outcomes of a trial are read, None where it is away
        """
        night, trial, challenger = self.now
        found, now = _content(self.storage.latest), time.monotonic()
        if found and found != self._published and (found != self._tried or now >= self._again_at):
            self._tried, self._again_at = found, now + AGAIN_S
            try:
                night = kept_private(Night.load(self.storage, self._device, self._bound), private=self._private)
                self._published = found
            except Exception as error:  # whatever it is, the watch must go on
                self._log.error("the published night cannot be loaded, the old one stays: %s", error)
        released = _content(self.storage.release)
        if (released != self._released and now >= self._released_again_at) or night is not self.night:
            try:
                release = Release.read(self.storage) if released else Release()
                night = kept_private(self._steered(night, release), private=self._private)
                trial, challenger = self._on_trial(night, release, log)
                if self._decides(night, release):
                    self._released = released
                else:
                    self._released_again_at = now + AGAIN_S
            except Exception as error:
                trial = challenger = None
                self._released_again_at = now + AGAIN_S
                self._log.error("what is released cannot be loaded: %s", error)
        self.now = (night, trial, challenger)
        try:
            self._watch_trial(log)
        except Exception as error:
            self._log.error("the challenger cannot be looked after: %s", error)

    def _steered(self, night: Night, release: Release) -> Night:
        """The night with the policy that is released for its bundle, which may be newer than its lists; without one that cannot be read."""
        champion = release.champion
        if champion is None or champion.digest != night.bundle_digest or champion.policy == night.policy:
            return night
        if night.policy is None and champion.policy is not None:
            found, why = Policy.sound(self.storage.policy(champion.policy), champion.digest, bound=self._bound)
            if found is None:
                self._log.error("policy %s does not decide, the trained model answers as it is: %s", champion.policy, why)
                return night
        return night.with_bundle(champion.open(self.storage), champion.policy)

    @staticmethod
    def _decides(night: Night, release: Release) -> bool:
        """Whether the policy that is released for the night's bundle decides, where there is one."""
        champion = release.champion
        return champion is None or champion.digest != night.bundle_digest or champion.policy == night.policy

    def _on_trial(self, night: Night, release: Release, log: Log | None) -> tuple[Trial | None, Night | None]:
        """The trial of a release, and its challenger behind a night; None where there is none, or a champion's policy waits for its first night."""
        wanted, champion = release.challenger, release.champion
        if wanted is None or not release.on_trial:
            return None, None
        if champion is not None and champion.digest == wanted.digest != night.bundle_digest:
            return None, None  # else the bundle, which the others do not have yet, would be on trial with it
        if wanted.policy is not None:
            found, why = Policy.sound(self.storage.policy(wanted.policy), wanted.digest, bound=self._bound)
            if found is None:
                raise DamagedArtifactError(f"policy {wanted.policy} is on trial and does not decide: {why}", "recray serve rollback ends the trial")
        opened, name = wanted.open(self.storage), wanted.name
        challenger = kept_private(night.with_bundle(opened, wanted.policy), private=self._private)
        trial = self.trial
        if trial is None or (trial.challenger, trial.share, trial.shadow, trial.since_s) != (name, release.share, release.shadow, release.since_s):
            splits = [member.open(self.storage).settings["split"] for member in (wanted, champion) if member is not None and self._private]
            counted = partial(_nothing_learned_of, splits=splits)
            trial = Trial(name, release.share, release.shadow, release.since_s, self._rewards, counted)
            begun_before = log is None or time.time() > release.since_s + JUST_S
            self._read = 0 if log is None or begun_before else log.last()  # a replica that is started anew learns what came before
        return trial, challenger

    def _watch_trial(self, log: Log | None) -> None:
        """Read what came of the trial so far, and end it where it failed."""
        trial = self.trial
        if trial is None:
            return
        if log is not None:
            with contextlib.suppress(StateError):
                for _ in range(READS):  # the rest at the next look
                    if not (entries := log.read(self._read, ENTRIES)):
                        break
                    for number, entry in entries:
                        trial.read(entry)
                        self._read = number
        if reason := trial.ended():
            self.now = (self.night, None, None)  # here at once, whether or not it can be written down
            self._log.warning("the trial of bundle %s ends: %s", trial.challenger, reason)
            end_trial(self.storage, reason, trial.challenger)
        elif trial.won() and self.challenger is not None and self.challenger.bundle_digest == self.night.bundle_digest:
            self._log.warning("the policy of %s was better on trial: it decides for everybody", trial.challenger)
            adopt_policy(self.storage, trial.challenger, trial.since_s)  # which the next look takes up


def _nothing_learned_of(user: str, splits: Sequence[dict[str, Any]]) -> bool:
    """Whether no bundle of these splits learned of the user, who is none that privacy was promised to."""
    return all(nothing_learned_of(pa.array([user]), split)[0] for split in splits)


def _content(path: Path) -> bytes:
    """Of a small file, empty where there is none."""
    return path.read_bytes() if path.exists() else b""


def kept_private(night: Night, *, private: bool) -> Night:
    """The night. Raises RefusedError if only privately trained bundles may answer and its bundle is none."""
    policy = night.predictor.policy
    if private and policy is not None and not policy.about.get("private"):
        raise RefusedError(f"privacy.enabled, but policy {night.policy} was learned from all users", "recray tune with privacy.enabled makes another")
    if private and not night.private:
        raise RefusedError(
            f"privacy.enabled, but bundle {night.bundle} was trained without privacy; it answers nobody",
            "begin with a storage.root of its own, or promote a private bundle first",
        )
    return night


def first_night(
    storage: Storage,
    score: ScoreSettings,
    say: Callable[[str], None],
    *,
    private: bool = False,
    bound: float = 1.0,
    device: str | torch.device = "cpu",
) -> Night:
    """The published night, or what can stand in for it.

    Raises MissingArtifactError, DamagedArtifactError of the night if neither is there, RefusedError as `kept_private`.
    """
    try:
        return kept_private(Night.load(storage, device, bound), private=private)
    except ArtifactError as error:
        try:
            night = kept_private(Night.stand_in(storage, score, device, bound), private=private)
        except ArtifactError:
            raise error from None
        say(f"no nightly lists, the champion answers all: {error}")
        return night
