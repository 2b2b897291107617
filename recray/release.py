"""RELEASE.json: which bundle is the champion, and who may become it. Changed in one step, read by everybody.

Storage decides and MLflow's aliases follow, so that a night needs no registry to know its champion.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from recray import lease
from recray.bundle import Bundle
from recray.errors import DamagedArtifactError, MissingArtifactError
from recray.storage import Storage, read_json, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Member:
    """A bundle in a role. `digest` is the sha256 of its manifest, `as_of_s` the last moment that it knows.

    policy : run key of the attention policy that decides for it; None: the trained model as it is
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
        """The bundle. Raises MissingArtifactError, DamagedArtifactError if it is not the one that got the role."""
        path = storage.bundle(self.run_key)
        if not path.exists():
            raise MissingArtifactError(
                f"RELEASE.json names bundle {self.run_key}, which is not in {path.parent}",
                "bring the folder back, or make another bundle the champion: recray models lists them, recray promote KEY takes one",
            )
        bundle = Bundle.open(path)
        if bundle.digest != self.digest:
            raise DamagedArtifactError(
                f"bundle {self.run_key} is not the one that RELEASE.json names: its manifest was replaced",
                "bring that folder back, or make another bundle the champion: recray models lists them, recray promote KEY takes one",
            )
        return bundle


@dataclass(frozen=True)
class Release:
    """The roles. `decision` is the promotion that made the champion; `rolled_back` lists run keys that may not come back by themselves.

    `share`: of the users whom the challenger answers while it is on trial; `shadow`: it answers all, and nobody sees it; `since_s`: when
    that trial began. `ended`: what ended the last trial, in words.
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
    def on_trial(self) -> bool:
        """Whether the challenger answers anybody."""
        return self.challenger is not None and (self.share > 0 or self.shadow)

    def begin(self, challenger: Member, share: float, *, shadow: bool = False) -> Release:
        """This, with a challenger on trial; the one that is on it already goes on."""
        on = replace(self, challenger=challenger, share=share, shadow=shadow, ended=None)
        return on if on == self else replace(on, since_s=time.time())

    @classmethod
    def read(cls, storage: Storage) -> Release:
        """The current release, an empty one if none was ever made. Raises DamagedArtifactError."""
        if not storage.release.exists():
            return cls()
        content = read_json(storage.release)
        try:
            if content.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format")
            roles = {role: content.pop(role) for role in ("champion", "challenger", "previous")}
            members: dict[str, Any] = {role: None if member is None else Member(**member) for role, member in roles.items()}
            known = ("share", "shadow", "ended", "since_s")  # releases of 0.1.0 have none
            trial: dict[str, Any] = {name: content[name] for name in known if name in content}
            trial.setdefault("since_s", storage.release.stat().st_mtime if trial.get("share") or trial.get("shadow") else 0.0)
            return cls(**members, decision=content.pop("decision"), rolled_back=tuple(content.pop("rolled_back")), **trial)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedArtifactError(f"{storage.release} is not a release: {error!r}", "bring the file back, or promote a bundle anew") from None

    @classmethod
    def change(cls, storage: Storage, how: Callable[[Release], Release]) -> tuple[Release, bool]:
        """Make what `how` says of the current release the current one; also returns whether anything changed.

        Nobody else changes it in between. Raises RefusedError in an attempt that was fenced off, and what `how` raises.
        """
        with lease.commit(storage.root):
            now = cls.read(storage)
            after = how(now)
            if after != now:
                write_json(storage.release, {**asdict(after), "rolled_back": sorted(after.rolled_back), "format_version": FORMAT_VERSION})
        return after, after != now

    def write(self, storage: Storage) -> None:
        """Make this the current release, whatever was. Raises RefusedError in an attempt that was fenced off."""
        self.change(storage, lambda _: self)

    def roles_of(self, run_key: str) -> list[str]:
        """The roles of a bundle, `rolled back` among them."""
        members = (("champion", self.champion), ("challenger", self.challenger), ("previous", self.previous))
        found = [role for role, member in members if member and member.run_key == run_key]
        if self.on_trial and "challenger" in found:
            found.append("shadow" if self.shadow else f"answers {self.share:.0%}")
        return [*found, "rolled back"] if run_key in self.rolled_back else found


def bundles(storage: Storage) -> list[Path]:
    """Folders of the bundles under a root, in the order of their names."""
    return sorted((storage.root / "bundles").glob("[!.]*"))
