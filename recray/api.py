"""recray from Python: recommendations, scores, similar items, explanations and evaluation.

It runs what the jobs and the endpoint run. Tables go in as pandas, polars or Arrow tables, as Ray Datasets,
or as anything else with the Arrow PyCapsule interface. They come out as pyarrow Tables: `table.to_pandas()`,
`polars.from_arrow(table)`.
"""

from __future__ import annotations

import datetime as dt
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from recray import pipeline
from recray.bundle import Bundle
from recray.config import Settings, load_settings, parse_as_of
from recray.dataset import schema
from recray.dataset.reader import Dataset
from recray.errors import DataError, MissingArtifactError, RefusedError, RequestError, SettingsError
from recray.evaluation.criteria import explain_incomparable
from recray.evaluation.evaluate import Table, compare, order_rankers
from recray.inference import Predictor
from recray.pipeline import discard
from recray.prepare.formats import to_plain_type
from recray.prepare.prepare import prepare, run_in_process
from recray.prepare.times import (
    MIN_US,
    OUT_OF_RANGE,
    PLAUSIBLE_US,
    TimeRule,
    extract_numbers,
    infer_unit,
    unit_error,
)
from recray.serving.api import Event, Range, RecommendRequest, ScoreRequest, SimilarRequest
from recray.serving.query import has_opted_out, resolve_query
from recray.serving.ranking import ModelInput, RankedItems, bind_query, rank_inputs, rank_similar_items
from recray.serving.state import ServingState, load_without_lists
from recray.stages import JobResult, ProgressLog
from recray.storage import Storage
from recray.storage.opt_out import OptOut

BATCH = 256  # users of one pass of the model
Split = Literal["time", "leave_one_out", "random"]
P = ParamSpec("P")
R = TypeVar("R")


def _refusing(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments raise RequestError where they do not fit a request."""

    @functools.wraps(function)
    def call(*arguments: P.args, **named: P.kwargs) -> R:
        try:
            return function(*arguments, **named)
        except ValidationError as error:
            problems = {
                ".".join(str(part) for part in details["loc"]): details["msg"].removeprefix("Value error, ")
                for details in error.errors(include_url=False)
            }
            text = "; ".join(f"{name}: {problem}" if name else problem for name, problem in problems.items())
            raise RequestError(text, "see the docstring of the function") from None

    return call


class Recommender:
    """The model bundle that a workspace serves, with the histories of its last run. Open it with
    `open_recommender`. It never changes: a later nightly run needs another one. Users who opted out
    (`recray forget`) are unknown users.
    """

    def __init__(self, state: ServingState) -> None:
        self._state = state
        self._opt_out_list = OptOut.of(state.dataset.path.parent.parent, None)

    def __repr__(self) -> str:
        return f"<recray.Recommender {self.name}, {self.as_of}, {len(self.items):,} items>"

    @property
    def name(self) -> str:
        """Run key of the bundle, with the attention policy where one decides: BUNDLE+POLICY."""
        return self._state.name

    @property
    def as_of(self) -> dt.date:
        """The last day of the data."""
        return dt.date.fromisoformat(self._state.date)

    @property
    def items(self) -> pa.Table:
        """The item table: item_id, the features, and the number of events."""
        return self._state.dataset.items

    @_refusing
    def recommend(
        self,
        users: Any = None,
        *,
        events: Any = None,
        k: int = 10,
        filter_seen: bool = False,
        seen_events: Iterable[str] | None = None,
        seen_days: float | None = None,
        where: Mapping[str, Any] | None = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        controls: Mapping[str, float] | None = None,
        context: Mapping[str, Any] | None = None,
        now: dt.datetime | None = None,
    ) -> pa.Table:
        """The best items of each user, by the model.

        users : ids, as in the event log; None: the users of `events`
        events : table of events after the stored histories, with the log's columns; also of new users
        filter_seen : leave out items that the user interacted with
        seen_events, seen_days : by events of these types, and of so many days, alone; None: as in section
            score
        where : column of the item table -> values, or `{"min": …, "max": …}`
        allow, deny : ids of items that alone, or never, are recommended
        controls : attention controls, -1 to 1 each; None: the policy decides
        now : query time; None: just after the last event

        Returns user_id, rank (from 1), item_id, score and source: `realtime`, or `popular` for a user without
        history.

        Raises RequestError for an argument that the model cannot serve, DataError for events that it cannot
        read.
        """
        sent = {} if events is None else self._to_events(events)
        ids = list(sent) if users is None else _to_ids(users, "users")
        shared = {
            "k": k,
            "mode": "realtime",
            "filter_seen": filter_seen,
            "seen_events": None if seen_events is None else list(seen_events),
            "seen_days": seen_days,
            "where": {
                name: Range(**value) if isinstance(value, Mapping) else _to_values(value)
                for name, value in _to_mapping(where, "where").items()
            },
            "allow": None if allow is None else _to_ids(allow, "allow"),
            "deny": _to_ids(deny, "deny"),
            "controls": controls,
            "context": dict(_to_mapping(context, "context")),
            "now": now,
        }
        requests = (RecommendRequest(user_id=user, events=[], **shared) for user in ids)
        return self._to_table(ids, self._rank(requests, ids, sent))

    @_refusing
    def score(self, users: Any, items: Any, *, events: Any = None) -> pa.Table:
        """The score of each item for each user: user_id, item_id, score; null for an item that is not known.

        Raises RequestError, DataError.
        """
        sent = {} if events is None else self._to_events(events)
        ids, candidates = _to_ids(users, "users"), self._to_items(items)
        requests = (ScoreRequest(user_id=user, items=candidates) for user in ids)
        ranked = [score for each in self._rank(requests, ids, sent) for _, score in each.items]
        return pa.table(
            {
                "user_id": _to_id_array([user for user in ids for _ in candidates], ids),
                "item_id": pa.array(candidates * len(ids), self._item_type),
                "score": pa.array(ranked, pa.float64()),
            }
        )

    @_refusing
    def similar(self, items: Any, k: int = 10) -> pa.Table:
        """The most similar items by the cosine of their vectors: item_id, rank, similar_item_id, score.

        Raises UnknownItemError.
        """
        SimilarRequest(item_id="", k=k)  # checks k
        rows = [
            (item, rank, other, score)
            for item in self._to_items(items)
            for rank, (other, score) in enumerate(rank_similar_items(item, k, self._state).items, start=1)
        ]
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        types = (self._item_type, pa.int32(), self._item_type, pa.float64())
        names = ("item_id", "rank", "similar_item_id", "score")
        return pa.table(
            {name: pa.array(column, type_) for name, column, type_ in zip(names, columns, types, strict=True)}
        )

    @_refusing
    def explain(self, users: Any, items: Any, *, events: Any = None) -> pa.Table:
        """The past events that carried each item for each user: user_id, item_id, because_of (an item),
        event, timestamp, share (of the contributions of all events) and attention.

        Raises RequestError, DataError.
        """
        sent = {} if events is None else self._to_events(events)
        ids = _to_ids(users, "users")
        candidates = [item for item in self._to_items(items) if self._state.knows_item(item)]
        if not candidates:
            raise RequestError("items: the model knows none of them", "send ids of the item table")
        requests = (ScoreRequest(user_id=user, items=candidates) for user in ids)
        names = ("user_id", "item_id", "because_of", "event", "timestamp", "share", "attention")
        rows: dict[str, list[Any]] = {name: [] for name in names}
        for user, ranked in zip(ids, self._rank(requests, ids, sent, explain=True), strict=True):
            for item, reasons in zip(candidates, ranked.reasons or [], strict=False):
                for reason in reasons:
                    values = (user, item, reason.item_id, reason.event, reason.timestamp)
                    for name, value in zip(names, (*values, reason.share, reason.attention), strict=True):
                        rows[name].append(value)
        types = (
            self._item_type,
            self._item_type,
            pa.string(),
            pa.timestamp("s", "UTC"),
            pa.float64(),
            pa.float64(),
        )
        user_column = {"user_id": _to_id_array(rows["user_id"], ids)}
        others = zip(names[1:], types, strict=True)
        return pa.table(user_column | {name: pa.array(rows[name], type_) for name, type_ in others})

    def _to_table(self, ids: Sequence[Any], rankings: Iterable[RankedItems]) -> pa.Table:
        """The rankings of users as a table, see `recommend`."""
        rows: dict[str, list[Any]] = {name: [] for name in ("user_id", "rank", "item_id", "score", "source")}
        for user, ranked in zip(ids, rankings, strict=True):
            rows["user_id"] += [user] * len(ranked.items)
            rows["rank"] += range(1, len(ranked.items) + 1)
            rows["item_id"] += [item for item, _ in ranked.items]
            rows["score"] += [score for _, score in ranked.items]
            rows["source"] += [ranked.source] * len(ranked.items)
        types = (pa.int32(), self._item_type, pa.float64(), pa.string())
        user_column = {"user_id": _to_id_array(rows.pop("user_id"), ids)}
        return pa.table(
            user_column
            | {
                name: pa.array(values, type_)
                for (name, values), type_ in zip(rows.items(), types, strict=True)
            }
        )

    def _rank(
        self,
        requests: Iterable[RecommendRequest | ScoreRequest],
        users: Sequence[Any],
        sent: Mapping[Any, list[Event]],
        *,
        explain: bool = False,
    ) -> Iterable[Any]:
        """The ranked items of each request."""
        pairs = zip(requests, users, strict=True)
        while batch := list(itertools.islice(pairs, BATCH)):
            inputs: list[ModelInput] = []
            for request, user in batch:
                changes: dict[str, Any] = {"events": sent.get(self._state.to_user_name(user), [])}
                if has_opted_out(user, self._state, self._opt_out_list):
                    changes["user_id"] = None
                request = request.model_copy(update=changes)
                model_input = bind_query(resolve_query(request, self._state), self._state)
                if explain:
                    model_input = model_input.explaining(model_input.candidates or ())
                inputs.append(model_input)
            yield from rank_inputs(inputs)

    def _to_events(self, frame: Any) -> dict[Any, list[Event]]:
        """The events of a table by user, oldest first."""
        data = self._state.dataset.manifest["settings"]["data"]
        columns = {name: data["columns"].get(name) or name for name in schema.EVENT_COLUMNS}
        table = to_table(frame, "events", list(columns.values()))
        for name in (schema.USER_ID, schema.ITEM_ID):
            if columns[name] not in table.column_names:
                raise DataError(
                    f"events have no column {columns[name]!r}; they have {', '.join(table.column_names)}",
                    "name the columns as in the event log (data.columns)",
                )
            ids = table[columns[name]]
            if pa.types.is_floating(ids.type):  # as pandas writes whole numbers once one is missing
                ids = ids.cast(pa.int64(), safe=False)
            if ids.null_count:
                raise DataError(f"events: {ids.null_count} rows have no {name}", "leave them out")
            table = table.set_column(table.schema.get_field_index(columns[name]), columns[name], ids)
        times: list[dt.datetime | None] = [None] * len(table)
        if columns[schema.TIMESTAMP] in table.column_names:
            times = _to_times(table[columns[schema.TIMESTAMP]], data)

        def values_of(name: str, default: Any) -> list[Any]:
            if columns[name] not in table.column_names:
                return [default] * len(table)
            return [default if value is None else value for value in table[columns[name]].to_pylist()]

        by_user: dict[Any, list[Event]] = {}
        for user, item, event, value, time in zip(
            table[columns[schema.USER_ID]].to_pylist(),
            table[columns[schema.ITEM_ID]].to_pylist(),
            values_of(schema.EVENT, None),
            values_of(schema.VALUE, 1.0),
            times,
            strict=True,
        ):
            by_user.setdefault(self._state.to_user_name(user), []).append(
                Event(item_id=item, event=None if event is None else str(event), value=value, timestamp=time)
            )
        return by_user

    def _open_bundle(self) -> Bundle:
        return Bundle.open(self._state.dataset.path.parent.parent / "bundles" / self._state.bundle)

    def _to_items(self, values: Any) -> list[Any]:
        """Ids of items in the type of the item table."""
        ids = _to_ids(values, "items")
        if pa.types.is_string(self._item_type):
            return [str(item) for item in ids]
        return [self._state.require_item(item, "items") for item in ids]

    @property
    def _item_type(self) -> pa.DataType:
        return self._state.predictor.vocabulary.item_ids.type


def open_recommender(path: str | Path, *, device: str = "cpu") -> Recommender:
    """Open the model of a workspace (`storage.root`), or of a bundle's folder in it.

    device : cpu, or cuda

    Raises MissingArtifactError where nothing was trained, DamagedArtifactError.
    """
    folder = Path(path).expanduser().absolute()
    if (folder / "manifest.json").exists() and folder.parent.name == "bundles":
        state = ServingState.load(Storage(folder.parent.parent), device)
        return Recommender(state.with_bundle(Bundle.open(folder)))
    storage = Storage(folder)
    try:
        return Recommender(ServingState.load(storage, device))
    except MissingArtifactError:  # trained and promoted, but not scored
        return Recommender(load_without_lists(storage, Settings().score, device))


def run(
    job: str,
    config: str | Path | Settings | None = None,
    *overrides: str,
    as_of: str | dt.datetime | None = None,
    progress: ProgressLog = discard,
    **options: Any,
) -> JobResult:
    """Run a job of the command line: nightly, validate, prepare, train, evaluate, promote, score …

    config : a settings file; None: the defaults
    overrides : settings such as `"train.epochs=3"`
    progress : takes each line of the job, for example `print`
    options : of the job, for example `restart=True`

    Returns the result, with `status`, `outputs` and `metrics`. Raises subclasses of RecrayError.
    """
    if isinstance(config, Settings) and overrides:
        raise SettingsError("overrides change a settings file, not Settings", "use Settings.replace")
    if job not in (jobs := [*pipeline.JOBS, *pipeline.STAGE_JOBS]):
        raise SettingsError(f"there is no job {job!r}", f"known: {', '.join(sorted(jobs))}")
    settings = config if isinstance(config, Settings) else load_settings(config, overrides)
    moment = parse_as_of(as_of, settings.data.timezone) if isinstance(as_of, str) else as_of
    return pipeline.run(job, settings, moment, lambda message, **_: progress(message), **options)


@_refusing
def evaluate(
    model: Recommender,
    events: Any,
    *,
    split: Split | None = None,
    k: int | Sequence[int] = (10, 20),
    progress: ProgressLog = discard,
) -> pa.Table:
    """Compare a model with the baselines on a table of events, with 95 % confidence intervals.

    events : table with the columns of the event log; items that the model does not know count as cold
    split : leave_one_out, time or random, as `split.kind`; None: as the model's own run
    k : lengths of the lists; the first is the headline's

    Returns one row for each protocol, ranker and metric: protocol, ranker, users, metric, value, low, high.
    For a baseline, metric `model_lead` is the model's NDCG minus its own, paired by user.

    Raises RefusedError where the model may have learned from the targets, DataError for events that cannot be
    evaluated.
    """
    table, known = to_table(events, "events"), model._state.dataset
    with tempfile.TemporaryDirectory(prefix="recray-evaluate-") as folder:
        pq.write_table(table, f"{folder}/events.parquet")
        data = dict(known.manifest["settings"]["data"]) | {"events": [f"{folder}/events.parquet"]}
        data |= {"catalogue": "all", "min_user_events": 1, "min_item_events": 0}
        data |= _write_items(known, data, folder)
        content = {
            "storage": {"root": f"{folder}/root"},
            "data": data,
            "split": {"kind": split or known.split_kind},
            "evaluate": {"k": [k] if isinstance(k, int) else list(k)},
        }
        settings = Settings.model_validate(content)
        dataset = prepare(settings, None, None, run_in_process)
        bundle = model._open_bundle()
        if reason := explain_incomparable(dataset, bundle):
            raise RefusedError(
                f"bundle {bundle.key} {reason}", "evaluate it on events after its training, with split='time'"
            )
        rows, _ = compare(settings, dataset, Predictor.load(bundle.path, dataset=dataset))
    return _to_metrics_table(rows)


def _write_items(dataset: Dataset, data: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Write a dataset's item table again as an input; the settings that read it."""
    table = dataset.items
    features = {name: kind for name, kind in data["features"].items() if name in table.column_names}
    available = data["available_from"] if data["available_from"] in table.column_names else None
    column = data["columns"].get(schema.ITEM_ID) or schema.ITEM_ID
    table = table.select(
        list(dict.fromkeys([schema.ITEM_ID, *features, *([available] if available else [])]))
    )
    pq.write_table(table.rename_columns([column, *table.column_names[1:]]), f"{folder}/items.parquet")
    return {
        "items": f"{folder}/items.parquet",
        "features": {name: "vector" if kind == "sentence" else kind for name, kind in features.items()},
        "available_from": available,
    }


def to_table(frame: Any, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A pandas, polars or Arrow table, a Ray Dataset, or anything with the Arrow PyCapsule interface, in the
    types of input files.

    columns : those to read, where they exist; None: all

    Raises DataError for anything else, and for a pandas table with data in its index.
    """
    if columns is not None and hasattr(frame, "reset_index") and hasattr(frame, "columns"):
        _refuse_index(frame, name)
        frame = frame[[column for column in frame.columns if column in columns]]
    try:
        table = _to_arrow(frame, name)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{name}: a column has values of several types: {error}", "convert it") from None
    if columns is not None:
        table = table.select([column for column in table.column_names if column in columns])
    types = [to_plain_type(arrow_type) for arrow_type in table.schema.types]
    return table.cast(pa.schema(zip(table.schema.names, types, strict=True)))


def _to_arrow(frame: Any, name: str) -> pa.Table:
    if isinstance(frame, pa.Table):
        return frame
    if hasattr(frame, "to_arrow_refs"):
        import ray

        return pa.concat_tables(ray.get(frame.to_arrow_refs()), promote_options="default")
    if hasattr(frame, "reset_index") and hasattr(frame, "columns"):
        _refuse_index(frame, name)
        return pa.Table.from_pandas(frame, preserve_index=False)
    if hasattr(frame, "__arrow_c_stream__"):
        return pa.table(frame)
    fix = "pass a pandas, polars or Arrow table, or a Ray Dataset"
    raise DataError(f"{name}: {type(frame).__name__} is no table", fix)


def _refuse_index(frame: Any, name: str) -> None:
    """Raises DataError for a pandas table with data in its index."""
    if any(level is not None for level in frame.index.names):
        levels = ", ".join(map(str, frame.index.names))
        raise DataError(f"{name}: {levels} is in the index of the table", "pass frame.reset_index()")


def _to_mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise RequestError(f"{name}: {value!r} is no dict", "pass a dict with the names of columns")
    return value or {}


def _to_values(value: Any) -> list[Any]:
    """One value or several, as a list."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return [value.item() if isinstance(value, np.generic) else value]
    return [each.item() if isinstance(each, np.generic) else each for each in value]


def _to_id_array(values: Sequence[Any], users: Sequence[Any]) -> pa.Array:
    """A column of user ids: whole numbers if all users that were passed are, else text."""
    if users and all(isinstance(user, int) for user in users):
        return pa.array(values, pa.int64())
    return pa.array([str(value) for value in values], pa.string())


def _to_ids(values: Any, name: str) -> list[Any]:
    """Ids as Python values. Raises RequestError for what is no collection of ids."""
    if isinstance(values, str | bytes | int) or not isinstance(values, Iterable):
        raise RequestError(f"{name}: {values!r} is not a list of ids", f"pass [{values!r}]")
    if isinstance(values, Mapping | pa.Table) or hasattr(values, "columns"):
        raise RequestError(f"{name}: a {type(values).__name__} is not a list of ids", "pass one column")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        ids: list[Any] = values.to_pylist()
    else:
        ids = [value.item() if isinstance(value, np.generic) else value for value in values]
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise RequestError(f"{name}: {value!r} is not an id", "pass text or whole numbers")
    return ids


def _to_times(column: pa.ChunkedArray, data: Mapping[str, Any]) -> list[dt.datetime | None]:
    """Times of a column, read as `data.time_unit` and `data.timezone` say. Raises DataError."""
    unit, least_us = data["time_unit"], MIN_US
    if unit == "auto":
        unit = "s"
        if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
            numbers = extract_numbers(column)
            if len(numbers):
                least_us, inferred = PLAUSIBLE_US, infer_unit(numbers)
                if inferred is None:
                    raise unit_error(numbers, "events: the column of times")
                unit = inferred
    times = TimeRule(unit, data["timezone"] or "UTC", least_us).read(column)
    is_unreadable = times.unreadable is not None and times.unreadable.any()
    if is_unreadable or pc.any(pc.equal(times.us, OUT_OF_RANGE)).as_py():
        raise DataError("events: some times cannot be read, or lie outside 1970 to 2100", "correct them")
    return [
        None if us is None else dt.datetime.fromtimestamp(us / 1e6, dt.UTC) for us in times.us.to_pylist()
    ]


def _to_metrics_table(table: Table) -> pa.Table:
    rows: dict[str, list[Any]] = {
        name: [] for name in ("protocol", "ranker", "users", "metric", "value", "low", "high")
    }
    for protocol, by_ranker in table.items():
        for ranker in order_rankers(by_ranker):
            row = by_ranker[ranker]
            for metric in (name for name in row if f"{name}_low" in row):
                values = (protocol, ranker, row["users"], metric, row[metric])
                for name, value in zip(
                    rows, (*values, row[f"{metric}_low"], row[f"{metric}_high"]), strict=True
                ):
                    rows[name].append(value)
    return pa.table(rows)
