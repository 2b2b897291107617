"""recray: an attention recommender that runs on Ray, from an event log to a served recommendation list.

Importing this package loads neither ray nor torch nor mlflow: a public name is looked up when it is first
used. What is not in `__all__` may change in any release; besides these names, the commands, the settings and
the endpoint's OpenAPI document are what others build on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recray.version import __version__

if TYPE_CHECKING:
    from recray.api import Recommender, evaluate, open_recommender, run
    from recray.bundle import Bundle
    from recray.config import Settings, load_settings
    from recray.dataset.reader import Dataset
    from recray.errors import (
        ArtifactError,
        ClusterError,
        DamagedArtifactError,
        DataError,
        ImpossibleSplitError,
        MissingArtifactError,
        OutputExistsError,
        PrivacySpentError,
        RecrayError,
        RefusedError,
        RequestError,
        SettingsError,
        StateError,
        StorageError,
        TooManyInvalidRowsError,
        TrackingError,
        TrainingError,
        UnavailableError,
        UnknownItemError,
    )
    from recray.inference.predictor import Predictor

__all__ = [
    "ArtifactError",
    "Bundle",
    "ClusterError",
    "DamagedArtifactError",
    "DataError",
    "Dataset",
    "ImpossibleSplitError",
    "MissingArtifactError",
    "OutputExistsError",
    "Predictor",
    "PrivacySpentError",
    "Recommender",
    "RecrayError",
    "RefusedError",
    "RequestError",
    "Settings",
    "SettingsError",
    "StateError",
    "StorageError",
    "TooManyInvalidRowsError",
    "TrackingError",
    "TrainingError",
    "UnavailableError",
    "UnknownItemError",
    "__version__",
    "evaluate",
    "load_settings",
    "open_recommender",
    "run",
]

_MODULES = {
    "Bundle": "recray.bundle",
    "Dataset": "recray.dataset.reader",
    "Predictor": "recray.inference.predictor",
    **dict.fromkeys(("Recommender", "evaluate", "open_recommender", "run"), "recray.api"),
    "Settings": "recray.config",
    "load_settings": "recray.config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'recray' has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "recray.errors")), name)
