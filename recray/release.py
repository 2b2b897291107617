"""RELEASE.json: which bundle is the champion, and who may become it. Changed in one step, read by everybody.

Storage decides and MLflow's aliases follow, so that a night needs no registry to know its champion.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recray import lease
from recray.bundle import Bundle
from recray.errors import DamagedArtifactError, MissingArtifactError
from recray.storage import Storage, read_json, write_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Member:
    """A bundle in a role. `digest` is the sha256 of its manifest, `as_of_s` the last moment that it knows."""

    run_key: str
    digest: str
    as_of_s: int

    @classmethod
    def of(cls, bundle: Bundle) -> Member:
        return cls(bundle.key, bundle.digest, bundle.as_of_s)

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
    """The roles. `decision` is the promotion that made the champion; `rolled_back` lists run keys that may not come back by themselves."""

    champion: Member | None = None
    challenger: Member | None = None
    previous: Member | None = None
    decision: str | None = None
    rolled_back: tuple[str, ...] = field(default=())

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
            members = {role: None if member is None else Member(**member) for role, member in roles.items()}
            return cls(**members, decision=content.pop("decision"), rolled_back=tuple(content.pop("rolled_back")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedArtifactError(f"{storage.release} is not a release: {error!r}", "bring the file back, or promote a bundle anew") from None

    def write(self, storage: Storage) -> None:
        """Make this the current release. Raises RefusedError in an attempt that was fenced off."""
        content: dict[str, Any] = {**asdict(self), "rolled_back": sorted(self.rolled_back), "format_version": FORMAT_VERSION}
        with lease.commit(storage.root):
            write_json(storage.release, content)

    def roles_of(self, run_key: str) -> list[str]:
        """The roles of a bundle, `rolled back` among them."""
        members = (("champion", self.champion), ("challenger", self.challenger), ("previous", self.previous))
        found = [role for role, member in members if member and member.run_key == run_key]
        return [*found, "rolled back"] if run_key in self.rolled_back else found


def bundles(storage: Storage) -> list[Path]:
    """Folders of the bundles under a root, in the order of their names."""
    return sorted((storage.root / "bundles").glob("[!.]*"))
