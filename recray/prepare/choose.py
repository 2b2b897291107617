"""Settings of model and training for a log, by its size and kind: a first run that needs no search.

The rules were found on logs of shops, films and music (`recray benchmark adopt`). `recray search` tries
further settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.prepare.files import list_files
from recray.prepare.formats import NULL_WORDS, open_file

MOST_ROWS = 20_000_000  # of a log that are counted
READ_ROWS = 1_000_000
FEW_USERS = 5_000
MANY_REPEATS = 0.1  # share of events that repeat an item, above which lists repeat items too
EPOCH_EVENTS = 8_000_000  # events that a first training sees at most, in all its epochs
FEW_EPOCHS = 20
HISTORIES = (50, 100, 200, 400)


class Guess(NamedTuple):
    """A setting such as `data.columns.user_id`, its value, and why it has this value."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class LogSize:
    """Events, users and items of a log, and the events of its users (90th percentile)."""

    events: int
    users: int
    items: int
    history: int


def measure_log(uri: str, user_column: str, item_column: str) -> LogSize:
    """The size of the first `MOST_ROWS` rows. Raises DataError for what cannot be read."""
    users = items = None
    rows = 0
    for file in list_files((uri,), "data.events").files:
        with open_file(file) as table:
            for part in range(len(table.sizes())):
                for batch in table.batches(part, READ_ROWS, [user_column, item_column]):
                    rows += len(batch.rows)
                    users = _count(users, batch.rows[user_column])
                    items = _count(items, batch.rows[item_column])
                    if rows >= MOST_ROWS:
                        break
                if rows >= MOST_ROWS:
                    break
        if rows >= MOST_ROWS:
            break
    if users is None or items is None or not len(users):
        return LogSize(0, 0, 0, 0)
    events = users["count"].to_numpy()
    return LogSize(int(events.sum()), len(users), len(items), int(np.quantile(events, 0.9)))


def _count(counts: pa.Table | None, values: pa.ChunkedArray) -> pa.Table:
    """Counts of values, added to earlier ones. Null and blank are none, and neither is a list or a record."""
    if pa.types.is_nested(values.type):
        values = pa.chunked_array([], pa.string())
    table = pa.table({"value": values.cast(pa.string()), "count": pa.repeat(1, len(values))})
    is_missing = pc.or_(pc.is_null(table["value"]), pc.is_in(table["value"], pa.array(NULL_WORDS)))
    table = table.filter(pc.invert(is_missing))
    if counts is not None:
        table = pa.concat_tables([counts, table])
    return table.group_by("value").aggregate([("count", "sum")]).rename_columns(["value", "count"])


def choose_settings(
    size: LogSize, *, repeats: float, has_baskets: bool, has_time: bool, has_order: bool = True
) -> Iterator[Guess]:
    """The settings for a log of this size that differ from the defaults.

    repeats : share of its events that repeat an item of the user
    has_order : whether times or positions order the events
    """
    yield Guess(
        "model.cooccurrence", True, "candidates gain that the log connects with what a user had before"
    )
    if not has_order:
        yield Guess("model.cooccurrence_neighbours", 100, "without an order, who shares items says most")
    if size.users < FEW_USERS:
        few = f"{size.users:,} users are few"
        yield Guess("model.dropout", 0.4, f"{few}: more regularisation")
        if has_time:
            yield Guess("split.validation_users", 0.4, f"{few}: more of them select the epoch")
    history = next((length for length in HISTORIES if length >= size.history), HISTORIES[-1])
    if history != 200:
        yield Guess("model.history", history, f"nine of ten users have at most {size.history:,} events")
    if has_baskets:
        yield Guess("train.target_baskets", 4, "one of the next baskets says more than the very next alone")
    if repeats >= MANY_REPEATS:
        yield Guess("model.repeat_by_item", True, "items differ in how often users come back to them")
        yield Guess("train.select_by", "both", "lists of known and of new items both count")
    epochs = int(np.clip(EPOCH_EVENTS // max(size.events, 1), 5, 50))
    if epochs < 50:
        yield Guess(
            "train.epochs", epochs, f"{size.events:,} events: a first run of minutes; more may be better"
        )
    if epochs < FEW_EPOCHS and size.users >= FEW_USERS:
        yield Guess("train.learning_rate", 0.003, "few epochs: larger steps")
