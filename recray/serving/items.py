"""Changes of items (`PUT /v1/items`) on top of the published run."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.dataset.features import VECTORS
from recray.dataset.reader import Dataset
from recray.dataset.schema import DISPLAY, ITEM_ID
from recray.errors import RequestError, UnknownItemError
from recray.events.items import ItemChange
from recray.events.log import Log
from recray.serving.api import ItemUpdate
from recray.serving.state import ServingState, rebuild_state

_LOG = logging.getLogger("ray.serve")


class ItemChanges:
    """The changes of items that a replica knows. `read` adds the new ones of the event store, and `apply`
    puts them on a run.
    """

    def __init__(self) -> None:
        self._changes: dict[str, ItemChange] = {}
        self._number = 0
        self._identity = ""
        self._reading = threading.Lock()
        # runs with the items that their models know by changes alone
        self._extended: dict[int, tuple[ServingState, tuple[str, ...], ServingState]] = {}

    def read(self, log: Log) -> bool:
        """Whether there were new changes. Raises StateError."""
        with self._reading:
            if log.identity != self._identity:
                self._number = sys.maxsize  # another store is read as an emptied one: from its beginning
            number, changes = log.read_items(self._number)
            if number < self._number:
                number, changes = log.read_items(0)
                was_changed, self._changes = bool(self._changes or changes), {}
            else:
                was_changed = bool(changes)
            self._changes = self._changes | {change.key: change for change in changes}
            self._changes = {key: change for key, change in self._changes.items() if not change.is_removed}
            self._number, self._identity = number, log.identity
            return was_changed

    def apply(self, states: Sequence[ServingState]) -> list[ServingState]:
        """Runs with the changes. What a run cannot hold is left out: a column that it lacks, or a value or an
        id that its types exclude, which the log names.
        """
        changes = list(self._changes.values())
        applied, extended = [], {}
        for state in states:
            if not changes:
                applied.append(state)
                continue
            table = change_table(state.dataset, changes)
            # only their vectors depend on the changes: those of other items come from the training
            by_features = [
                json.dumps([change.key, change.attributes], sort_keys=True)
                for change in changes
                if change.attributes and not _was_trained(change, state)
            ]
            base, key = state, tuple(sorted(by_features))
            if key:
                known = self._extended.get(id(state))
                if known is None or known[0] is not state or known[1] != key:
                    known = (state, key, rebuild_state(state, state.dataset.with_items(table)))
                extended[id(state)] = known
                base = known[2]
            applied.append(_with_changes(base, table, changes))
        self._extended = extended
        return applied


def _was_trained(change: ItemChange, state: ServingState) -> bool:
    """Whether the item was in the training of a run's model."""
    index = int(state.predictor.vocabulary.index_of([change.item_id])[0])
    return 0 < index <= len(state.artifact.item_ids)


def _with_changes(state: ServingState, table: pa.Table, changes: Sequence[ItemChange]) -> ServingState:
    """A run with another item table, without the items that are not available."""
    sold_out = [change.item_id for change in changes if change.available is False]
    index = np.unique(state.predictor.vocabulary.index_of(sold_out))
    return state.with_items(state.dataset.with_items(table), index[index > 0])


def change_table(dataset: Dataset, changes: Sequence[ItemChange]) -> pa.Table:
    """A dataset's item table with changed attributes, and rows for new items at its end."""
    table = dataset.items
    changed = [change for change in changes if change.attributes]
    if not changed:
        return table
    id_type = table[ITEM_ID].type
    changed = [change for change in changed if _fits([change.key], id_type, change, is_id=True)]
    item_ids = pa.array([change.key for change in changed], pa.string())
    own_ids = table[ITEM_ID].combine_chunks().cast(pa.string())
    position = pc.fill_null(pc.index_in(item_ids, value_set=own_ids), -1).to_pylist()
    new = [change for change, row in zip(changed, position, strict=True) if row < 0]
    rows = {id(change): row for change, row in zip(changed, position, strict=True) if row >= 0}
    rows |= {id(change): len(table) + number for number, change in enumerate(new)}
    columns = []
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name == ITEM_ID:
            added = pa.array([change.key for change in new], pa.string()).cast(column.type)
            columns.append(pa.concat_arrays([column, added]))
            continue
        if new:
            fill = (
                pa.array([0] * len(new), column.type) if name == "events" else pa.nulls(len(new), column.type)
            )
            column = pa.concat_arrays([column, fill])
        attribute = _attribute_of(dataset, name)
        named = [change for change in changed if attribute in change.attributes]
        if attribute is not None and named:
            if name.startswith(DISPLAY):
                values = [
                    None if (value := change.attributes[attribute]) is None else str(value)
                    for change in named
                ]
            else:
                named = [
                    change for change in named if _fits([change.attributes[attribute]], column.type, change)
                ]
                values = [change.attributes[attribute] for change in named]
            order = np.arange(len(column))
            order[[rows[id(change)] for change in named]] = len(column) + np.arange(len(named))
            column = pa.concat_arrays([column, to_cells(values, column.type)]).take(pa.array(order))
        columns.append(column)
    return pa.table(columns, names=table.column_names)


def _fits(values: list[Any], kind: pa.DataType, change: ItemChange, *, is_id: bool = False) -> bool:
    """Whether a run can hold a value of a change, which another run took; else the log names the item.

    is_id : the value is the id, as text
    """
    try:
        if is_id:
            pa.array(values, pa.string()).cast(kind)
        else:
            to_cells(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        _LOG.error("a change of item %s is left out: this run holds %s there", change.key, kind)
        return False
    return True


def _attribute_of(dataset: Dataset, column: str) -> str | None:
    """The attribute that a column of the item table holds; None for one that cannot be changed: vectors, and
    texts that became vectors.
    """
    if column.startswith(DISPLAY):
        return dataset.display.get(column.removeprefix(DISPLAY))
    return column if dataset.features.get(column, VECTORS[0]) not in VECTORS else None


def to_cells(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values of JSON as cells of a column. Raises pa.ArrowException, TypeError or ValueError for a value that
    the column cannot hold.
    """
    if pa.types.is_dictionary(kind):
        return to_cells(values, kind.value_type).dictionary_encode().cast(kind)
    if any(isinstance(value, bool) for value in values) and not pa.types.is_boolean(kind):
        raise TypeError("true and false are no value of this column")
    if pa.types.is_decimal(kind) or pa.types.is_float16(kind):
        return pa.array(values, pa.float64()).cast(kind)
    return pa.array(values, kind)


def resolve_changes(updates: Sequence[ItemUpdate], state: ServingState) -> list[ItemChange]:
    """The updates of a request in the types of the item table.

    Raises RequestError for a column that the item table lacks or a value that it cannot hold,
    UnknownItemError for an unknown item without attributes, or one that the model cannot know by them.
    """
    changes = list[ItemChange]()
    for number, update in enumerate(updates):
        field = f"items.{number}"
        item_id = state.require_item(update.item_id, f"{field}.item_id")
        for column, value in update.attributes.items():
            _check_value(f"{field}.attributes.{column}", column, value, state.dataset)
        change = ItemChange(item_id, update.available, update.attributes)
        if not state.knows_item(item_id) and item_id not in {earlier.item_id for earlier in changes}:
            _check_new_item(field, change, state)
        changes.append(change)
    return changes


def _check_value(field: str, column: str, value: Any, dataset: Dataset) -> None:
    columns: dict[str, str] = {}
    for table_column in dataset.items.column_names:  # features come before what is only shown
        if (name := _attribute_of(dataset, table_column)) is not None:
            columns.setdefault(name, table_column)
    known = sorted(columns)
    if column not in (*dataset.features, *known):
        raise RequestError(f"{field}: no column {column!r}", f"known: {', '.join(known) or 'none'}")
    if column not in known:
        raise RequestError(
            f"{field}: {column!r} holds vectors, which the next nightly run makes",
            f"can be changed: {', '.join(known) or 'none'}",
        )
    if columns[column].startswith(DISPLAY) and not isinstance(value, list):
        return  # as text
    kind = dataset.items[columns[column]].type
    try:
        to_cells([value], kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        raise RequestError(f"{field}: {value!r} does not fit the column", f"send {_describe(kind)}") from None


def _describe(kind: pa.DataType) -> str:
    """What a column of this type holds, in the words of JSON."""
    if pa.types.is_dictionary(kind):
        return _describe(kind.value_type)
    if pa.types.is_nested(kind):
        return f"a list, each element {_describe(kind.value_type)}"
    if pa.types.is_integer(kind):
        return f"an integer of {kind}"
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return f"a number of {kind}"
    return "text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else f"a value of {kind}"


def _check_new_item(field: str, change: ItemChange, state: ServingState) -> None:
    if not change.attributes:
        raise UnknownItemError(
            f"{field}.item_id: no item {change.item_id!r}", "send its attributes too, and it is a new item"
        )
    table = change_table(state.dataset, [change])
    row = table.filter(pc.equal(table[ITEM_ID], pa.scalar(change.item_id, table[ITEM_ID].type)))
    if not len(state.artifact.cold_items(state.dataset.with_items(row))):
        features = ", ".join(state.artifact.manifest["features"]) or "none"
        raise UnknownItemError(
            f"{field}.item_id: the model cannot know {change.item_id!r} by these attributes",
            f"its features: {features}; else the next nightly run can learn it from events",
        )
