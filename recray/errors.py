"""The errors that recray raises on purpose. Each says what is wrong and what to do next.

RecrayError
├── SettingsError          settings that cannot be used (exit code 2)
├── RefusedError           a rule said no: nothing broke (exit code 3)
│   └── PrivacySpentError  a training would pass the cap on ε
└── (exit code 1)
    ├── DataError          input events or items that cannot be used
    │   ├── TooManyBadRowsError
    │   └── ImpossibleSplitError
    ├── ArtifactError      a dataset, bundle or snapshot that is missing, damaged or another run's
    │   ├── MissingArtifactError
    │   ├── DamagedArtifactError
    │   └── OutputExistsError
    ├── StorageError       the workspace cannot be written to
    ├── ClusterError       Ray cannot be reached or cannot place the work
    ├── TrackingError      MLflow cannot be reached, or holds what does not fit
    ├── TrainingError      training stopped: a worker failed, a loss that is not finite
    ├── RequestError       a request that the predictor cannot respond to
    │   └── UnknownItemError
    ├── UnavailableError   nobody can respond now
    ├── PartUnavailableError  one part of the endpoint cannot; another one stands in
    └── StateError         the event store cannot be reached, or does not keep what it acknowledges

An error survives pickling between Ray processes, because `args` is all it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

T = TypeVar("T")


class RecrayError(Exception):
    """Base of all errors of recray. `what` names the thing, `fix` the next step to take."""

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}" if self.fix else self.what


class SettingsError(RecrayError):
    """Settings that cannot be used: an unknown key, a wrong type, two fields that cannot both hold."""

    exit_code = 2


class RefusedError(RecrayError):
    """A rule said no; nothing broke and nothing was published."""

    exit_code = 3


class PrivacySpentError(RefusedError):
    """A private training would pass `privacy.cap`."""


class DataError(RecrayError):
    """Input that cannot be read or does not fit the schema."""


class TooManyBadRowsError(DataError):
    """More rows failed the checks than `data.max_bad_fraction` allows. `bad`: how many."""

    def __init__(self, what: str, fix: str = "", bad: int = 0) -> None:
        super().__init__(what, fix)
        self.bad = bad


class ImpossibleSplitError(DataError):
    """No event lies where the settings of the split want some."""


class ArtifactError(RecrayError):
    """A directory that recray wrote, or should have written, cannot be used."""


class MissingArtifactError(ArtifactError):
    """The dataset, bundle or snapshot is not there."""


class DamagedArtifactError(ArtifactError):
    """A file differs from the digest in its manifest."""


class OutputExistsError(ArtifactError):
    """The place for the output is taken by something that this run did not write."""


class StorageError(RecrayError):
    """`storage.root` cannot be written to: no space, read-only, no permission."""


class ClusterError(RecrayError):
    """Ray cannot be reached, or has no room for the work."""


class TrackingError(RecrayError):
    """MLflow cannot be reached, or what it holds does not fit this storage."""


class TrainingError(RecrayError):
    """Training stopped before its end."""


class RequestError(RecrayError):
    """A request that the predictor cannot answer."""


class UnknownItemError(RequestError):
    """An item that the model does not know."""


class UnavailableError(RecrayError):
    """Nobody can answer now; the caller may come again."""


class PartUnavailableError(RecrayError):
    """A part of the endpoint does not respond: `state`, `model` or `snapshot`. Another one stands in."""

    def __init__(self, part: Literal["state", "model", "snapshot"], fix: str = "") -> None:
        super().__init__(part, fix)
        self.part = part


class StateError(RecrayError):
    """The log of events and outcomes cannot be reached, takes nothing, or would lose what it acknowledges."""


class Problems:
    """Gathers errors, so that a person hears of all of them at once."""

    def __init__(self) -> None:
        self.found: list[RecrayError] = []

    def of(self, look: Callable[[], T]) -> T | None:
        """What `look` returns; None where it raised a RecrayError, which is gathered."""
        try:
            return look()
        except RecrayError as error:
            self.found.append(error)
            return None

    def raise_all(self) -> None:
        """Raises what was gathered as one error of the first one's kind, a line each."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            lines = dict.fromkeys(error.what for error in self.found)
            fixes = dict.fromkeys(error.fix for error in self.found if error.fix)
            raise type(self.found[0])("\n".join(lines), "; ".join(fixes))
