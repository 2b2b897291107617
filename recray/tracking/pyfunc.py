"""A model bundle as an MLflow model: `mlflow.pyfunc.load_model("models:/recray@champion").predict(frame)`.

The files of the bundle stay as they are. `MLmodel`, requirements, an example and the code that reads a bundle
lie beside them, so that the model loads where recray is not installed. Nothing is pickled.
"""

from __future__ import annotations

import ast
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import yaml

from recray.bundle import Bundle
from recray.dataset.reader import History
from recray.errors import RequestError
from recray.inference import Filters, Predictor

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

PACKAGE = Path(__file__).resolve().parent.parent
REQUIREMENTS = (
    "mlflow", "numpy", "pandas", "pyarrow", "pydantic", "pyyaml", "safetensors", "scikit-learn", "scipy",
    "torch", "xxhash",
)  # fmt: skip
PARAMS = {"k": 10, "filter_seen": False}
LAST_S = 7_258_118_400  # the year 2200: larger numbers are milliseconds
COLUMNS = ("history", "timestamps", "events", "values", "now")


class HistoryModel:
    """Ranks items for histories: what MLflow calls. As the endpoint does for a request with a `history`."""

    def __init__(self, bundle: Bundle) -> None:
        self.predictor, self.as_of_s = Predictor.load(bundle), bundle.as_of_s

    def predict(self, frame: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The best items of each row.

        frame : `history`, the ids of the items that a user interacted with, oldest first; optional, in the
            same order: `timestamps` (seconds since 1970), `events` (types), `values`; and `now`, the query
            time
        params : `k` items, and `filter_seen`: without those of the history

        Returns item_ids, scores and source (`model`, or `popular` for a history without a known item). Raises
        RequestError for rows that contradict themselves.
        """
        import pandas as pd

        options = {**PARAMS, **(params or {})}
        if "history" not in frame.columns:
            raise RequestError(
                f"there is no column history, but {', '.join(map(str, frame.columns))}", "name it history"
            )
        if not isinstance(options["filter_seen"], bool | np.bool_):
            raise RequestError(f"filter_seen: {options['filter_seen']!r} is not true or false", "send one")
        rows = [self._to_history(row, number) for number, row in enumerate(frame.to_dict("records"))]
        best = self.predictor.recommend(
            [history for history, _ in rows],
            int(options["k"]),
            now=[now_s for _, now_s in rows],
            filters=Filters(filter_seen=bool(options["filter_seen"])),
        )
        filled = [index > 0 for index in best.item_index]
        return pd.DataFrame(
            {
                "item_ids": [
                    self.predictor.vocabulary.ids_of(index[mask])
                    for index, mask in zip(best.item_index, filled, strict=True)
                ],
                "scores": [
                    scores[mask].astype(float).tolist()
                    for scores, mask in zip(best.scores, filled, strict=True)
                ],
                "source": best.source,
            }
        )

    def _to_history(self, row: Mapping[str, Any], number: int) -> tuple[History, int]:
        """The history of a row, in order of time, and its query time."""
        cells = {name: row[name] for name in COLUMNS if name in row and not _is_missing(row[name])}
        for name in set(cells) - {"now"}:
            if isinstance(cells[name], str | bytes) or not hasattr(cells[name], "__len__"):
                raise RequestError(f"row {number}: {name} is {cells[name]!r}, not a list", "send a list")
        items = list(cells.get("history", ()))
        for name in ("timestamps", "events", "values"):
            if name in cells and len(cells[name]) != len(items):
                raise RequestError(
                    f"row {number}: {name} has {len(cells[name])} entries, history {len(items)}",
                    "send one for each item",
                )
        vocabulary, has_time = self.predictor.vocabulary, self.predictor.catalogue.has_time
        for name in cells.get("events", ()):
            if name is not None and name not in vocabulary.event_types:
                known = ", ".join(vocabulary.event_types)
                raise RequestError(f"row {number}: events: unknown type {name!r}", f"known: {known}")
        latest = int(_to_seconds([cells["now"]], number, "now")[0]) if "now" in cells else self.as_of_s + 1
        times = _to_seconds(cells.get("timestamps", [latest] * len(items)), number, "timestamps")
        now_s = latest if "now" in cells else max([latest, *(times + 1)])
        if not has_time:
            times = np.arange(len(items))
        history = History(
            vocabulary.index_of(items),
            vocabulary.event_index(cells.get("events", [None] * len(items))),
            times,
            np.asarray(cells.get("values", np.ones(len(items))), np.float32),
        )
        order = np.argsort(times, kind="stable")
        if has_time:
            order = order[times[order] <= now_s]
        return History(*(values[order] for values in history)), now_s


def _to_seconds(values: Any, number: int, name: str) -> np.ndarray:
    """Times in seconds since 1970, int64 [n]. Raises RequestError for what is no time of 1970 to 2200."""
    try:
        seconds = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        seconds = np.array([np.nan])
    if not (np.isfinite(seconds) & (seconds >= 0) & (seconds < LAST_S)).all():
        raise RequestError(f"row {number}: {name}: {values!r} are not seconds since 1970", "send seconds")
    return np.asarray(seconds.astype(np.int64))


def _load_pyfunc(path: str) -> HistoryModel:
    """What MLflow calls to load the model; `path` is the folder of its files."""
    return HistoryModel(Bundle.open(path))


def write_model_files(bundle: Bundle, folder: Path) -> None:
    """Write the files that make a bundle an MLflow model into an empty folder."""
    import pandas as pd
    from mlflow import pyfunc
    from mlflow.models import Model

    is_integral = pa.types.is_integer(bundle.item_ids.type)
    model = Model(signature=_signature(is_integral=is_integral))
    pyfunc.add_to_model(
        model, loader_module=__name__, data=".", code="code", python_env="python_env.yaml", conda_env=None
    )
    example = pd.DataFrame({"history": [bundle.item_ids[:2].to_pylist(), []]})
    (folder / "input_example.json").write_text(example.to_json(orient="split"))
    model.saved_input_example_info = {
        "artifact_path": "input_example.json", "type": "dataframe", "pandas_orient": "split"
    }  # fmt: skip
    model.metadata = {"recray": bundle.manifest["recray"], "run_key": bundle.key, "as_of_s": bundle.as_of_s}
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in REQUIREMENTS}
    pins = "".join(f"{name}=={version}\n" for name, version in versions.items())
    (folder / "requirements.txt").write_text(pins)
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    (folder / "python_env.yaml").write_text(yaml.safe_dump(environment))
    for source in sorted(find_sources(__name__)):
        target = folder / "code" / "recray" / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    model.save(str(folder / "MLmodel"))


def _signature(*, is_integral: bool) -> ModelSignature:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array

    ids = Array(DataType.long if is_integral else DataType.string)
    optional = [("timestamps", Array(DataType.double)), ("events", Array(DataType.string))]
    optional += [("values", Array(DataType.double))]
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(ids, "history"),
                *(ColSpec(kind, name, required=False) for name, kind in optional),
                ColSpec(DataType.double, "now", required=False),
            ]
        ),
        outputs=Schema(
            [ColSpec(ids, "item_ids"), ColSpec(Array(DataType.double), "scores"), ColSpec("string", "source")]
        ),
        params=ParamSchema(
            [
                ParamSpec("k", DataType.long, PARAMS["k"]),
                ParamSpec("filter_seen", DataType.boolean, PARAMS["filter_seen"]),
            ]
        ),
    )


def find_sources(module: str) -> set[Path]:
    """The files of recray that a module needs, with those of its packages, which may be imported by name."""
    sources: set[Path] = set()
    pending = [PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py"), PACKAGE / "__init__.py"]
    while pending:
        path = pending.pop()
        if path in sources:
            continue
        sources.add(path)
        if path.name == "__init__.py" and path.parent != PACKAGE:
            pending += path.parent.glob("*.py")
        for name in _find_imports(ast.parse(path.read_text())):
            parts = PACKAGE.joinpath(*name.split(".")[1:])
            candidates = (parts / "__init__.py", parts.with_suffix(".py"))
            pending += [candidate for candidate in candidates if candidate.exists()]
            pending += [parent for parent in [parts.parent / "__init__.py"] if parent.exists()]
    return sources


def _find_imports(tree: ast.Module) -> Iterator[str]:
    """Names of recray's modules that a module imports where it is imported."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "recray":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "recray")


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
