"""RELEASE.json: the champion and the challenger, and every way in which they change; and what LATEST.json
publishes.

The file is replaced atomically. MLflow's aliases follow it, so a nightly run needs no registry to find its
champion.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recray.bundle import Bundle
from recray.config import Settings
from recray.errors import DamagedArtifactError, MissingArtifactError, RefusedError
from recray.storage import SNAPSHOT, Storage, lease, read_json, read_manifest, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Member:
    """A bundle in a role. `digest` is the sha256 of its manifest, `as_of_s` the end of its data.

    policy : run key of its attention policy; None: the unmodified model
    """

    run_key: str
    digest: str
    as_of_s: int
    policy: str | None = None

    @classmethod
    def of(cls, bundle: Bundle, policy: str | None = None) -> Member:
        return cls(bundle.key, bundle.digest, bundle.as_of_s, policy)

    @property
    def name(self) -> str:
        """The bundle, and the policy behind a plus sign where there is one."""
        return self.run_key if self.policy is None else f"{self.run_key}+{self.policy}"

    def open(self, storage: Storage) -> Bundle:
        """The bundle. Raises MissingArtifactError, DamagedArtifactError if it is not the one that got the
        role.
        """
        path = storage.bundle(self.run_key)
        if not path.exists():
            raise MissingArtifactError(
                f"RELEASE.json names bundle {self.run_key}, which is not in {path.parent}",
                "restore the folder, or make another bundle the champion: recray models lists them, "
                "recray promote KEY promotes one",
            )
        bundle = Bundle.open(path)
        if bundle.digest != self.digest:
            raise DamagedArtifactError(
                f"bundle {self.run_key} is not the one that RELEASE.json names: its manifest was replaced",
                "restore that folder, or make another bundle the champion: recray models lists them, "
                "recray promote KEY promotes one",
            )
        return bundle


@dataclass(frozen=True)
class Published:
    """The published snapshot: who scored which dataset.

    bundle_digest : sha256 of the manifest of the bundle that scored it
    dataset : its folder
    policy : run key of the attention policy; None: the unmodified model
    manifest : the whole manifest
    """

    run_key: str
    bundle_digest: str
    dataset: Path
    dataset_digest: str
    policy: str | None
    popular_only: bool
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, storage: Storage) -> Published | None:
        """The published snapshot; None before the first one. Raises MissingArtifactError,
        DamagedArtifactError.
        """
        if not storage.latest.exists():
            return None
        manifest = read_manifest(storage.read_latest()[0], SNAPSHOT)
        return cls(
            manifest["run_key"],
            manifest["bundle_digest"],
            storage.root / manifest["dataset"],
            manifest["dataset_digest"],
            manifest.get("policy"),
            bool(manifest.get("popular_only")),
            manifest,
        )


@dataclass(frozen=True)
class Release:
    """The roles of bundles, and the running experiment.

    decision : run key of the promotion of the champion
    rolled_back : names of members that are not promoted again automatically
    share : of the users whom the challenger serves
    shadow : the challenger gets shadow traffic of all users
    ended : why the last experiment ended
    since_s : start of the running experiment
    """

    champion: Member | None = None
    challenger: Member | None = None
    previous: Member | None = None
    decision: str | None = None
    rolled_back: tuple[str, ...] = field(default=())
    share: float = 0.0
    shadow: bool = False
    ended: str | None = None
    since_s: float = 0.0

    @property
    def has_experiment(self) -> bool:
        """Whether the challenger gets traffic."""
        return self.challenger is not None and (self.share > 0 or self.shadow)

    def begin_experiment(self, challenger: Member, share: float, *, shadow: bool = False) -> Release:
        """This release with an experiment; the same experiment keeps its start."""
        release = replace(self, challenger=challenger, share=share, shadow=shadow, ended=None)
        return release if release == self else replace(release, since_s=time.time())

    @classmethod
    def read(cls, storage: Storage) -> Release:
        """The current release, an empty one without a file. Raises DamagedArtifactError."""
        if not storage.release.exists():
            return cls()
        content = read_json(storage.release)
        try:
            if content.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format")
            roles = {role: content.pop(role) for role in ("champion", "challenger", "previous")}
            champion, challenger, previous = (
                None if member is None else Member(**member) for member in roles.values()
            )
            names = ("share", "shadow", "ended", "since_s")  # releases of 0.1.0 have none
            experiment: dict[str, Any] = {name: content[name] for name in names if name in content}
            is_running = experiment.get("share") or experiment.get("shadow")
            experiment.setdefault("since_s", storage.release.stat().st_mtime if is_running else 0.0)
            return cls(
                champion=champion,
                challenger=challenger,
                previous=previous,
                decision=content.pop("decision"),
                rolled_back=tuple(content.pop("rolled_back")),
                **experiment,
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedArtifactError(
                f"{storage.release} is not a release: {error!r}",
                "restore the file, or promote a bundle again",
            ) from None

    @classmethod
    def update(cls, storage: Storage, transform: Callable[[Release], Release]) -> tuple[Release, bool]:
        """Replace the current release by its transform, under a lock. Returns it and whether it changed.

        Raises RefusedError in an attempt that was fenced off, and what `transform` raises.
        """
        with lease.commit(storage.root):
            current = cls.read(storage)
            updated = transform(current)
            if updated != current:
                content = {**asdict(updated), "rolled_back": sorted(updated.rolled_back)}
                write_json(storage.release, {**content, "format_version": FORMAT_VERSION})
        return updated, updated != current

    def write(self, storage: Storage) -> None:
        """Make this the current release. Raises RefusedError in an attempt that was fenced off."""
        self.update(storage, lambda _: self)

    def list_roles(self, run_key: str) -> list[str]:
        """The roles of a bundle, `rolled back` among them."""
        members = (("champion", self.champion), ("challenger", self.challenger), ("previous", self.previous))
        roles = [role for role, member in members if member and member.run_key == run_key]
        if self.has_experiment and "challenger" in roles:
            roles.append("shadow" if self.shadow else f"serves {self.share:.0%}")
        return [*roles, "rolled back"] if run_key in self.rolled_back else roles


def list_bundles(storage: Storage) -> list[Path]:
    """Folders of the bundles of a workspace, by name."""
    return sorted((storage.root / "bundles").glob("[!.]*"))


def require_private(settings: Settings, bundle: Bundle) -> None:
    """Raises RefusedError if privacy is enabled but a bundle was trained without it, because its scores would
    be published.
    """
    if settings.privacy.enabled and not bundle.privacy["differential_privacy"]:
        raise RefusedError(
            f"privacy.enabled, but bundle {bundle.key} was trained without privacy; its scores are not "
            "published",
            "start with a separate storage.root, or promote a private bundle first",
        )


def roll_back(storage: Storage) -> Release:
    """Withdraw the champion's policy, or, if it has none, make the previous champion the champion again.
    Raises RefusedError if there is no previous one.
    """

    def transform(release: Release) -> Release:
        if release.champion is not None and release.champion.policy is not None:
            rolled_back = {*release.rolled_back, release.champion.name}
            return replace(
                release,
                champion=replace(release.champion, policy=None),
                challenger=None,
                share=0.0,
                shadow=False,
                rolled_back=tuple(sorted(rolled_back)),
            )
        if release.champion is None or release.previous is None:
            raise RefusedError(
                f"{storage.release} has no previous champion",
                "recray models lists the bundles; recray promote KEY promotes one",
            )
        release.previous.open(storage)
        rolled_back = {*release.rolled_back, release.champion.name} - {release.previous.name}
        return Release(champion=release.previous, rolled_back=tuple(sorted(rolled_back)))

    return Release.update(storage, transform)[0]


def begin_experiment(
    storage: Storage, challenger: Bundle, share: float, *, shadow: bool = False, policy: str | None = None
) -> Release:
    """Let a challenger serve a share of the users, or all of them as shadow traffic whose responses are not
    returned.

    policy : run key of the challenger's attention policy

    Raises RefusedError without a champion, or if the challenger is the champion.
    """

    def transform(release: Release) -> Release:
        if release.champion is None:
            raise RefusedError(
                f"no bundle of {storage.root} was promoted yet", "run `recray promote`, or `recray nightly`"
            )
        member = Member.of(challenger, policy)
        if release.champion.name == member.name:
            raise RefusedError(f"bundle {member.name} is the champion", "recray models lists the others")
        rolled_back = tuple(sorted(set(release.rolled_back) - {member.name}))
        return replace(
            release.begin_experiment(member, 0.0 if shadow else share, shadow=shadow), rolled_back=rolled_back
        )

    return Release.update(storage, transform)[0]


def release_policy(
    storage: Storage, bundle: Bundle, policy: str, share: float, *, experiment_s: float = math.inf
) -> tuple[Release, str]:
    """Let a policy that passed its criteria decide for the champion: for all users at a share of 1, else in
    an experiment.

    experiment_s : after this time an undecided experiment of another policy of the bundle is replaced

    Returns the release, and the reason if the policy is not released, else "". A policy whose experiment
    ended is not released again automatically.
    """
    reason = ""

    def transform(release: Release) -> Release:
        nonlocal reason
        member = Member.of(bundle, policy)
        champion, challenger = release.champion, release.challenger if release.has_experiment else None
        if champion is None or champion.digest != bundle.digest:
            reason = f"bundle {bundle.key} is not the champion any more"
        elif member.name in release.rolled_back:
            reason = f"an experiment with policy {policy} has ended: {release.ended or 'rolled back'}"
        elif (
            challenger is not None
            and challenger != member
            and (challenger.digest != bundle.digest or time.time() < release.since_s + experiment_s)
        ):
            reason = f"an experiment with {challenger.name} is running"
        elif champion.policy != policy and (challenger != member or share >= 1):
            if share < 1:
                return release.begin_experiment(member, share)
            return replace(release, champion=member, challenger=None, share=0.0, shadow=False, ended=None)
        return release

    return Release.update(storage, transform)[0], reason


def adopt_policy(storage: Storage, challenger: str, since_s: float) -> Release:
    """Let the policy of an experiment decide for all users, if that experiment still runs and its bundle is
    the champion.
    """

    def transform(release: Release) -> Release:
        champion, member = release.champion, release.challenger if release.has_experiment else None
        if (
            champion is None
            or member is None
            or (member.name, release.since_s) != (challenger, since_s)
            or member.digest != champion.digest
        ):
            return release
        return replace(release, champion=member, challenger=None, share=0.0, shadow=False, ended=None)

    return Release.update(storage, transform)[0]


def end_experiment(storage: Storage, reason: str, challenger: str | None = None) -> Release:
    """Let the champion serve all users again, and roll the challenger back.

    challenger : end only the experiment of this challenger; None: the running one, whichever it is

    Raises RefusedError without a running experiment if `challenger` is None.
    """

    def transform(release: Release) -> Release:
        if (
            release.challenger is None
            or not release.has_experiment
            or challenger not in (None, release.challenger.name)
        ):
            if challenger is not None:
                return release
            raise RefusedError(
                f"{storage.release} has no running experiment", "recray serve canary KEY begins an experiment"
            )
        rolled_back = tuple(sorted({*release.rolled_back, release.challenger.name}))
        return replace(
            release,
            share=0.0,
            shadow=False,
            ended=f"bundle {release.challenger.name}: {reason}",
            rolled_back=rolled_back,
        )

    return Release.update(storage, transform)[0]


def load_champion(storage: Storage) -> Bundle:
    """The champion. Raises RefusedError without a champion, MissingArtifactError if its bundle is missing."""
    release = Release.read(storage)
    if release.champion is None:
        raise RefusedError(
            f"no bundle of {storage.root} was promoted yet", "run `recray promote`, or `recray nightly`"
        )
    return release.champion.open(storage)


def read_policy_key(storage: Storage) -> str | None:
    """Run key of the champion's policy, None without one."""
    champion = Release.read(storage).champion
    return None if champion is None else champion.policy
