"""Guesses the settings of a log and an item table from their names and a sample of their rows.

`recray init --from-data` writes each guess with its reason. Nothing is guessed where two answers are about as
likely and a wrong one would train a wrong model: the user, the item, and the order of day and month.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.dataset import schema
from recray.errors import DataError
from recray.prepare.files import list_files
from recray.prepare.formats import INTEGER, NULL_IDS, NULL_WORDS, open_file
from recray.prepare.sources import is_blank
from recray.prepare.texts import parse_list
from recray.prepare.times import MIN_SHARE, TimeRule, extract_numbers, infer_unit, parse_pattern

SAMPLE_ROWS = 200_000  # rows of a table that are looked at
MAX_CATEGORIES = 1_000  # text with more values is no category
MANY_REPEATS = 0.1  # share of events that repeat an item, above which lists repeat items too
FEW_CHOICES = 50  # event types are fewer
FEW_NUMBERS = 20  # whole numbers with so few values are codes

NAMES = {
    schema.USER_ID: (
        "userid user customerid customer custid visitorid memberid accountid profileid clientid viewerid "
        "readerid listenerid householdid householdkey household personid uid deviceid cookieid sessionid "
        "session"
    ),
    schema.ITEM_ID: (
        "itemid item productid product sku stockcode articleid article movieid videoid contentid trackid "
        "songid bookid newsid listingid gameid artistid documentid docid offerid goodsid asin isbn iid"
    ),
    schema.TIMESTAMP: (
        "timestamp time ts eventtime eventtimestamp datetime createdat occurredat invoicedate orderdate "
        "purchasedate transactiondate servertime viewtime unixtime unixreviewtime date day dt"
    ),
    schema.EVENT: (
        "event eventtype type action actiontype behavior behaviour behaviortype interaction interactiontype "
        "activity eventname"
    ),
    schema.VALUE: "value eventvalue rating score stars quantity qty count playcount watchtime dwelltime",
    schema.BASKET: (
        "basket basketid orderid order invoiceno invoice invoiceid transactionid receiptid receipt cartid"
    ),
    schema.EVENT_ID: "eventid",
}
"""Our name of a column -> the names that logs give it, likeliest first, in small letters and digits."""

AVAILABLE_NAMES = (
    "availablefrom released releasedate released published publishedat publishdate publicationdate"
)
REWARDS = {"purchase": 5.0, "buy": 5.0, "order": 5.0, "transaction": 5.0, "cart": 2.0, "addtocart": 2.0}
"""Reward of an event type in `serve.outcomes`; any other has 1."""

_DATES = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%y", "%m/%d/%y", "%d.%m.%y")
_WORDED_DATES = ("%d %b %Y", "%d-%b-%Y", "%b %d %Y", "%b %d, %Y", "%d%b%Y")
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", "T%H:%M:%S", ", %H:%M", ":%H:%M:%S")
DECIMAL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
DECIMAL_COMMA = r"^[+-]?\d+,\d+$"
PATTERNS = tuple(date + clock for date in (*_DATES, *_WORDED_DATES) for clock in _CLOCKS)
_ID_FORMS = {schema.USER_ID: "users", schema.ITEM_ID: "items"}


@dataclass(frozen=True)
class Guess:
    """A setting such as `data.columns.user_id`, its value, and why it has this value."""

    setting: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Sample:
    """The first rows of a table, SAMPLE_ROWS at most."""

    uri: str
    rows: pa.Table


def guess_settings(events: str, items: str | None, given: Mapping[str, Any]) -> list[Guess]:
    """Guess the settings of section data, evaluate, score and serve that a log and its item table need.

    given : settings that the user decided, `data.columns.user_id` -> a column; they are not guessed

    Raises DataError for what cannot be read, and for what cannot be guessed, with the candidates.
    """
    log = read_sample(events, "data.events")
    guesses = [Guess("data.events", [str(_absolute(events))], "")]
    columns = {
        name.removeprefix("data.columns."): value
        for name, value in given.items()
        if name.startswith("data.columns.")
    }
    for guess in _guess_columns(log, columns):
        columns[guess.setting.removeprefix("data.columns.")] = guess.value
        guesses.append(guess)
    guesses += _guess_times(log, columns, given)
    guesses += _guess_rows(log, columns)
    if items is not None:
        guesses.append(Guess("data.items", str(_absolute(items)), ""))
        guesses += _guess_features(read_sample(items, "data.items"), columns[schema.ITEM_ID])
    guesses += _guess_repeats(log, columns)
    guesses += _guess_outcomes(log, columns)
    return [guess for guess in guesses if guess.setting not in given]


def read_sample(uri: str, setting: str) -> Sample:
    """The first rows of the files of a path. Raises DataError where there is nothing to read."""
    tables, count = [], 0
    files = list_files((uri,), setting).files
    for number, file in enumerate(files):
        with open_file(file) as table:
            for part in range(len(table.sizes())):
                for batch in table.batches(part, SAMPLE_ROWS):
                    tables.append(batch.rows.slice(0, SAMPLE_ROWS - count))
                    count += len(tables[-1])
                    if count >= SAMPLE_ROWS:
                        break
                if count >= SAMPLE_ROWS:
                    break
        if count >= SAMPLE_ROWS or number == 9:
            break
    if not count:
        raise DataError(f"{uri} has no rows", "name a file with rows")
    rows = pa.concat_tables(tables, promote_options="permissive")
    return Sample(uri, rows if files[0].format == "parquet" else _parse_text(rows, uri))


def _parse_text(rows: pa.Table, uri: str) -> pa.Table:
    """Rows of a text file: null words become null, and columns of numbers become numbers.

    Raises DataError for numbers with decimal commas.
    """
    for position, name in enumerate(rows.column_names):
        if not pa.types.is_string(rows[name].type):
            continue
        text = pc.utf8_trim_whitespace(rows[name])
        text = pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text)
        known = pc.drop_null(text)
        if len(known) and pc.all(pc.match_substring_regex(known, DECIMAL_COMMA)).as_py():
            raise DataError(
                f"{uri}: {name} has numbers with decimal commas, for example {known[0].as_py()!r}",
                "write them with decimal points",
            )
        for pattern, arrow_type in ((INTEGER, pa.int64()), (DECIMAL, pa.float64())):
            if len(known) and pc.all(pc.match_substring_regex(known, pattern)).as_py():
                text = text.cast(arrow_type)
                break
        rows = rows.set_column(position, name, text)
    return rows


def _absolute(path: str) -> str | Path:
    return path if "://" in path else Path(path).expanduser().absolute()


def _normalize(name: str) -> str:
    """`Customer ID` and `user_id:token` as customerid and userid."""
    return re.sub(r"[^a-z0-9]", "", name.split(":")[0].casefold())


def _find_named(sample: Sample, names: str) -> list[str]:
    """The columns of a sample with one of these names, likeliest first."""
    order = {name: rank for rank, name in enumerate(names.split())}
    named = [name for name in sample.rows.column_names if _normalize(name) in order]
    return sorted(named, key=lambda name: order[_normalize(name)])


def _guess_columns(log: Sample, known: Mapping[str, Any]) -> Iterator[Guess]:
    """The mapping `data.columns`. A column serves once."""
    used = set(known.values())
    for name, names in NAMES.items():
        if name in known:
            continue
        candidates = [column for column in _find_named(log, names) if column not in used]
        candidates = [column for column in candidates if _is_fit(log, column, name)]
        if not candidates:
            if name in _ID_FORMS:
                raise _unknown_column(log, name, used)
            continue
        column, *others = candidates
        used.add(column)
        yield Guess(f"data.columns.{name}", column, _describe_column(log, column, others))
    if schema.TIMESTAMP not in known and not any(
        _is_fit(log, column, schema.TIMESTAMP) for column in _find_named(log, NAMES[schema.TIMESTAMP])
    ):
        times = [c for c in log.rows.column_names if c not in used and _is_fit(log, c, schema.TIMESTAMP)]
        if times:
            yield Guess(f"data.columns.{schema.TIMESTAMP}", times[0], "the only column of times")


def _is_fit(log: Sample, column: str, name: str) -> bool:
    """Whether the values of a column can be what its name says."""
    values = log.rows[column]
    is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    if name == schema.TIMESTAMP:
        return _time_unit(values) is not None or bool(_find_patterns(values))
    if name == schema.VALUE:
        return bool(is_number)
    if name == schema.EVENT:
        return 0 < len(values.unique()) <= FEW_CHOICES
    return bool(is_number or pa.types.is_string(values.type))


def _unknown_column(log: Sample, name: str, used: set[Any]) -> DataError:
    """The error for a user or item column that no name gives away, with candidates by their values."""
    rows = log.rows
    if any(re.fullmatch(r"[\d.,:-]+", column) for column in rows.column_names):
        return DataError(
            f"{log.uri}: its first line looks like data, not like names: {', '.join(rows.column_names)}",
            "write the names of the columns there, with a comma, semicolon, tab or | between them",
        )
    candidates = []
    for column in rows.column_names:
        arrow_type = rows[column].type
        if column in used or not (pa.types.is_integer(arrow_type) or pa.types.is_string(arrow_type)):
            continue
        distinct = len(rows[column].unique())
        if 1 < distinct < 0.9 * len(rows):
            candidates.append(f"{column} ({distinct:,} values)")
    listed = ", ".join(candidates) or f"none; it has {', '.join(rows.column_names)}"
    return DataError(
        f"{log.uri}: no column is named like {_ID_FORMS[name]}; candidates are {listed}",
        f"name the column: recray init --from-data {log.uri} data.columns.{name}=COLUMN",
    )


def _describe_column(log: Sample, column: str, others: list[str]) -> str:
    values = pc.drop_null(log.rows[column])
    examples = ", ".join(str(value) for value in values.unique()[:3].to_pylist())
    also = f"; also possible: {', '.join(others)}" if others else ""
    return f"{len(values.unique()):,} values, for example {examples}{also}"


def _time_unit(values: pa.ChunkedArray) -> str | None:
    """How recray reads a column as times without being told: its unit, or iso; None if it does not."""
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return "iso"
    numbers = extract_numbers(values) if not pa.types.is_list(values.type) else np.zeros(0)
    if len(numbers) > MIN_SHARE * (len(values) - values.null_count) > 0:
        return infer_unit(numbers)
    if not pa.types.is_string(values.type):
        return None
    times = TimeRule().read(values)
    unreadable = 0 if times.unreadable is None else int(times.unreadable.sum())
    return "iso" if unreadable < (1 - MIN_SHARE) * len(values) else None


def _find_patterns(values: pa.ChunkedArray) -> list[str]:
    """The patterns that text is written in, those that read most of it."""
    if not pa.types.is_string(values.type):
        return []
    text = pc.drop_null(values).slice(0, 20_000).combine_chunks()
    if not len(text):
        return []
    few = text.slice(0, 20)
    possible = [pattern for pattern in PATTERNS if parse_pattern(few, pattern).null_count < len(few)]
    shares = {pattern: 1 - parse_pattern(text, pattern).null_count / len(text) for pattern in possible}
    best = max(shares.values(), default=0.0)
    return [pattern for pattern, share in shares.items() if share == best and best >= MIN_SHARE]


def _guess_times(log: Sample, columns: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Guess]:
    column = columns.get(schema.TIMESTAMP)
    if column is None:
        yield Guess("split.kind", "leave_one_out", "there are no times: the rows are taken to be in order")
        yield Guess("model.time_bias", False, "needs times")
        yield Guess("model.popularity_prior_days", 0, "needs times")
        return
    if column not in log.rows.column_names:
        raise DataError(f"{log.uri} has no column {column!r}", "correct data.columns.timestamp")
    values = log.rows[column]
    example = pc.drop_null(values)[0].as_py()
    if (unit := _time_unit(values)) is not None:
        if unit not in ("iso", "s"):
            yield Guess("data.time_unit", unit, f"{example} is a time so")
        return
    if "data.time_unit" in given:
        return
    patterns = _find_patterns(values)
    if len(patterns) > 1:
        raise DataError(
            f"{log.uri}: {column} holds times such as {example!r}, which may be {' or '.join(patterns)}",
            "; ".join(f"add data.time_unit='{pattern}'" for pattern in patterns),
        )
    yield Guess("data.time_unit", patterns[0], f"how {example!r} is written")


def _guess_rows(log: Sample, columns: Mapping[str, Any]) -> Iterator[Guess]:
    """Returns, and rows without a user or an item."""
    value = columns.get(schema.VALUE)
    if value in log.rows.column_names:
        numbers = log.rows[value]
        negative = pc.sum(pc.less(numbers, 0)).as_py() or 0
        if negative:
            smallest = 1 if pa.types.is_integer(numbers.type) else 0.0
            yield Guess(
                "data.min_value",
                smallest,
                f"{negative / len(numbers):.1%} of the rows have a {value} below 0: taken for returns",
            )
    is_missing = np.zeros(len(log.rows), bool)
    for name in (schema.USER_ID, schema.ITEM_ID):
        if columns[name] not in log.rows.column_names:
            raise DataError(
                f"{log.uri} has no column {columns[name]!r}; it has {', '.join(log.rows.column_names)}",
                f"correct data.columns.{name}",
            )
        ids = log.rows[columns[name]]
        is_missing |= pc.is_null(ids).to_numpy()
        if pa.types.is_string(ids.type):
            is_missing |= (
                is_blank(ids).to_numpy() | pc.fill_null(pc.is_in(ids, pa.array(NULL_IDS)), False).to_numpy()
            )
    share = float(is_missing.mean())
    if share > 0.008:
        yield Guess(
            "data.max_invalid_fraction",
            min(1.0, round(1.2 * share + 0.01, 2)),
            f"{share:.1%} of the rows have no user or no item; they are left out and counted",
        )


def _guess_features(items: Sample, item_column: str) -> Iterator[Guess]:
    """Kind of each column of the item table that says something about an item."""
    names = items.rows.column_names
    if item_column not in names and schema.ITEM_ID not in names:
        raise DataError(
            f"{items.uri} has no column {item_column!r}; it has {', '.join(names)}",
            f"name the column of ids as in the log: {item_column}",
        )
    available = next(
        (name for name in _find_named(items, AVAILABLE_NAMES) if _time_unit(items.rows[name]) is not None),
        None,
    )
    for name in names:
        if name in (item_column, schema.ITEM_ID, available, "events", schema.AVAILABLE_FROM):
            continue
        kind, reason = _guess_kind(items.rows[name])
        if kind is not None:
            yield Guess(f"data.features.{name}", kind, reason)
    if available is not None:
        yield Guess("data.available_from", available, "an item is not recommended before")


def _guess_kind(values: pa.ChunkedArray) -> tuple[str | None, str]:
    """The kind of a feature with a reason; None for a column without meaning: links, ids, constants."""
    arrow_type, known = values.type, pc.drop_null(values)
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        is_vector = pa.types.is_floating(arrow_type.value_type)
        return ("vector", "lists of numbers") if is_vector else ("multi", "lists")
    distinct = len(known.unique())
    reason = f"{distinct:,} values" + (f", for example {known[0].as_py()}" if distinct else "")
    if distinct < 2:
        return None, reason
    if pa.types.is_boolean(arrow_type):
        return "categorical", reason
    if pa.types.is_integer(arrow_type):
        is_id = distinct > 0.95 * len(known)
        return ("categorical" if distinct <= FEW_NUMBERS else None if is_id else "numeric"), reason
    if pa.types.is_floating(arrow_type) or pa.types.is_decimal(arrow_type):
        return "numeric", reason
    return (_guess_text_kind(known.to_pylist(), distinct) if pa.types.is_string(arrow_type) else None), reason


def _guess_text_kind(texts: list[str], distinct: int) -> str | None:
    if sum(text.startswith(("http://", "https://", "www.")) for text in texts) > 0.5 * len(texts):
        return None
    lists = sum(parse_list(text.strip()) is not None for text in texts)
    if lists > 0.5 * len(texts) or sum("|" in text for text in texts) > 0.2 * len(texts):
        return "multi"
    words = sum(len(text.split()) for text in texts) / len(texts)
    is_category = distinct <= MAX_CATEGORIES and distinct <= 0.5 * len(texts)
    return "categorical" if is_category else "text" if words >= 1.5 else None


def _guess_repeats(log: Sample, columns: Mapping[str, Any]) -> Iterator[Guess]:
    pairs = log.rows.select([columns[schema.USER_ID], columns[schema.ITEM_ID]]).drop_null()
    if basket := columns.get(schema.BASKET):  # an item twice in a basket is one event of interest
        pairs = log.rows.select([columns[schema.USER_ID], columns[schema.ITEM_ID], basket]).drop_null()
        pairs = pairs.group_by(pairs.column_names).aggregate([]).select(pairs.column_names[:2])
    repeats = 1 - len(pairs.group_by(pairs.column_names).aggregate([])) / max(1, len(pairs))
    reason = f"{repeats:.0%} of the events are of an item that the user had before"
    if repeats >= MANY_REPEATS:
        yield Guess("evaluate.protocol", "with_repeats", reason)
        yield Guess("score.filter_seen", False, reason)
    else:
        yield Guess("evaluate.protocol", "filter_seen", reason)
        yield Guess("score.filter_seen", True, reason)


def _guess_outcomes(log: Sample, columns: Mapping[str, Any]) -> Iterator[Guess]:
    if (column := columns.get(schema.EVENT)) not in log.rows.column_names:
        return
    counts = sorted(
        pc.drop_null(log.rows[column]).value_counts().to_pylist(), key=lambda count: -count["counts"]
    )
    types = {str(count["values"]): REWARDS.get(_normalize(str(count["values"])), 1.0) for count in counts}
    yield Guess("serve.outcomes", types, "reward of each type of event, as you value it")
