"""The errors that recray raises on purpose. Each names the problem and its fix.

RecrayError
├── SettingsError          settings that cannot be used (exit code 2)
├── RefusedError           a rule forbids it: nothing broke (exit code 3)
│   └── PrivacySpentError  a training would pass the cap on ε
└── (exit code 1)
    ├── DataError          input events or items that cannot be used
    │   ├── TooManyInvalidRowsError
    │   └── ImpossibleSplitError
    ├── ArtifactError      a dataset, bundle or snapshot that is missing, damaged or another run's
    │   ├── MissingArtifactError
    │   ├── DamagedArtifactError
    │   └── OutputExistsError
    ├── StorageError       the workspace cannot be written to
    ├── ClusterError       Ray cannot be reached or cannot place the work
    ├── TrackingError      MLflow cannot be reached, or does not fit this workspace
    ├── TrainingError      training stopped: a worker failed, a loss that is not finite
    ├── RequestError       a request that the predictor cannot respond to
    │   └── UnknownItemError
    ├── UnavailableError   temporarily unavailable; try again
    ├── PartUnavailableError  a part of the endpoint is unavailable; another part stands in
    └── StateError         the event store cannot be reached, or would lose what it acknowledged

An error survives pickling between Ray processes, since it consists of its `args`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

T = TypeVar("T")


class RecrayError(Exception):
    """Base of all errors of recray. `message` names the problem, `fix` the next step."""

    exit_code = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message, fix)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class SettingsError(RecrayError):
    """Settings that cannot be used: an unknown key, a wrong type, two fields that cannot both hold."""

    exit_code = 2


class RefusedError(RecrayError):
    """A rule forbids it; nothing broke and nothing was published."""

    exit_code = 3


class PrivacySpentError(RefusedError):
    """A private training would pass `privacy.cap`."""


class DataError(RecrayError):
    """Input that cannot be read or does not fit the schema."""


class TooManyInvalidRowsError(DataError):
    """More rows failed the checks than `data.max_invalid_fraction` allows. `invalid_rows`: number of them."""

    def __init__(self, message: str, fix: str = "", invalid_rows: int = 0) -> None:
        super().__init__(message, fix)
        self.invalid_rows = invalid_rows


class ImpossibleSplitError(DataError):
    """A part of the split has no events."""


class ArtifactError(RecrayError):
    """A directory that recray wrote, or should have written, cannot be used."""


class MissingArtifactError(ArtifactError):
    """The dataset, model bundle or snapshot does not exist."""


class DamagedArtifactError(ArtifactError):
    """A file differs from the digest in its manifest."""


class OutputExistsError(ArtifactError):
    """The output path is taken by something that this run did not write."""


class StorageError(RecrayError):
    """`storage.root` cannot be written to: no space, read-only, no permission."""


class ClusterError(RecrayError):
    """Ray cannot be reached, or has no room for the work."""


class TrackingError(RecrayError):
    """MLflow cannot be reached, or its content does not fit this workspace."""


class TrainingError(RecrayError):
    """Training stopped before its end."""


class RequestError(RecrayError):
    """A request that the predictor cannot serve."""


class UnknownItemError(RequestError):
    """An item that the model does not know."""


class UnavailableError(RecrayError):
    """The service is temporarily unavailable; the caller may try again."""


class PartUnavailableError(RecrayError):
    """A part of the endpoint is unavailable: `state`, `model` or `snapshot`. Another part stands in."""

    def __init__(self, part: Literal["state", "model", "snapshot"], fix: str = "") -> None:
        super().__init__(part, fix)
        self.part = part


class StateError(RecrayError):
    """The event store cannot be reached, does not write, or would lose what it acknowledged."""


class Problems:
    """Collects errors, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.errors: list[RecrayError] = []

    def collect(self, check: Callable[[], T]) -> T | None:
        """The result of `check`; None if it raised a RecrayError, which is collected."""
        try:
            return check()
        except RecrayError as error:
            self.errors.append(error)
            return None

    def raise_all(self) -> None:
        """Raise the collected errors as one of the class of the first, with a line each."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = dict.fromkeys(line for error in self.errors for line in error.message.split("\n"))
            fixes = dict.fromkeys(fix for error in self.errors if error.fix for fix in error.fix.split("; "))
            raise type(self.errors[0])("\n".join(lines), "; ".join(fixes))
