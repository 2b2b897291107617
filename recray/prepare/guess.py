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
from recray.prepare.choose import MANY_REPEATS, Guess, choose_settings, measure_log
from recray.prepare.files import list_files
from recray.prepare.formats import NULL_IDS, NULL_WORDS, POINT_ZERO, open_file
from recray.prepare.sources import is_blank
from recray.prepare.texts import parse_list
from recray.prepare.times import MIN_SHARE, TimeRule, extract_numbers, infer_unit, parse_pattern

SAMPLE_ROWS = 200_000  # rows of a table that are looked at
MAX_CATEGORIES = 1_000  # text with more values is no category
MANY_LISTS = 0.2  # share of texts with a separator, above which they are lists
SHORT_PART = 20  # letters of a part of such a list
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
    schema.POSITION: "position ordernumber sequence sequencenumber seq step",
}
"""Our name of a column -> the names that logs give it, likeliest first, in small letters and digits."""

AVAILABLE_NAMES = (
    "availablefrom creationtimestamp createdat created launchdate released releasedate published "
    "publishedat publishdate publicationdate"
)
DISPLAY_NAMES = {
    "title": "title name producttitle productname itemname movietitle headline description",
    "image": "image imageurl imagelink img imgurl picture pictureurl thumbnail poster posterurl",
    "link": "link url producturl itemurl href",
    "price": "price unitprice saleprice",
}
RECBOLE_KINDS = {"token": "categorical", "token_seq": "text", "float": "numeric"}
"""Type in a column's name, as RecBole writes it -> kind of feature."""

REWARDS = {"purchase": 5.0, "buy": 5.0, "order": 5.0, "transaction": 5.0, "cart": 2.0, "addtocart": 2.0}
"""Reward of an event type in `serve.outcomes`; any other has 1."""

NO_INTEREST = (
    "impression impressions exposure exposed shown show display displayed noclick skip skipped hide hidden "
    "dislike thumbsdown downvote cancel cancelled canceled cancellation return returned refund refunded "
    "remove removed removefromcart removefromwishlist unlike unfollow unsubscribe report reported block"
)
"""Types of events that do not say that a user wants the item."""

_DATES = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y", "%d/%m/%y", "%m/%d/%y", "%d.%m.%y")
_WORDED_DATES = ("%d %b %Y", "%d-%b-%Y", "%b %d %Y", "%b %d, %Y", "%d%b%Y")
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", "T%H:%M:%S", ", %H:%M", ":%H:%M:%S")
WHOLE = r"^-?(0|[1-9]\d{0,17})(\.0+)?$"  # also as pandas writes whole numbers
DECIMAL = r"^[+-]?(0|[1-9]\d{0,14})?(\.\d+)?$"
PATTERNS = tuple(date + clock for date in (*_DATES, *_WORDED_DATES) for clock in _CLOCKS)
QUANTITIES = ("quantity", "qty")
"""Values below 0 of these are returns."""

_ID_FORMS = {schema.USER_ID: "users", schema.ITEM_ID: "items"}


@dataclass(frozen=True)
class Sample:
    """The first rows of a table, SAMPLE_ROWS at most."""

    uri: str
    rows: pa.Table


def guess_settings(events: str, items: str | None, decided: Mapping[str, Any]) -> list[Guess]:
    """Guess the settings that a log and its item table need: what they hold, and a model for their size.

    decided : settings that the user decided, `data.columns.user_id` -> a column; they are not guessed

    Raises DataError for what cannot be read, and for what cannot be guessed, with the candidates.
    """
    log = read_sample(events, "data.events")
    guesses = [Guess("data.events", [str(_absolute(events))], "")]
    columns = {
        name.removeprefix("data.columns."): value
        for name, value in decided.items()
        if name.startswith("data.columns.")
    }
    for guess in _guess_columns(log, columns, has_unit="data.time_unit" in decided):
        columns[guess.setting.removeprefix("data.columns.")] = guess.value
        guesses.append(guess)
    guesses += _guess_times(log, columns, decided)
    guesses += _guess_rows(log, columns)
    if not decided.get("privacy.enabled"):  # which takes all events alike
        guesses += _guess_targets(log, columns)
    if items is not None:
        table = read_sample(items, "data.items")
        features = list(_guess_features(table, columns[schema.ITEM_ID]))
        used = {guess.setting.removeprefix("data.features.") for guess in features}
        used |= {columns[schema.ITEM_ID], schema.ITEM_ID, *(str(guess.value) for guess in features)}
        left = [name for name in table.rows.column_names if name not in used]
        note = f"not used: {', '.join(left)}" if left else ""
        guesses += [Guess("data.items", str(_absolute(items)), note), *features]
    repeats = _measure_repeats(log, columns)
    guesses += _guess_protocol(repeats)
    guesses += _guess_outcomes(log, columns)
    if not decided.get("privacy.enabled"):  # it has settings of its own
        size = measure_log(events, columns[schema.USER_ID], columns[schema.ITEM_ID])
        has_baskets = columns.get(schema.BASKET) in log.rows.column_names
        has_time = columns.get(schema.TIMESTAMP) is not None
        kind = {"has_baskets": has_baskets, "has_time": has_time}
        has_order = has_time or columns.get(schema.POSITION) is not None
        guesses += choose_settings(size, repeats=repeats, has_order=has_order, **kind)
    prefixes = tuple(decided)
    return [
        guess
        for guess in guesses
        if guess.setting not in decided
        and not guess.setting.startswith(tuple(f"{name}." for name in prefixes))
    ]


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
    rows = _concat(tables)
    return Sample(uri, rows if files[0].format == "parquet" else _parse_text(rows))


def _concat(tables: list[pa.Table]) -> pa.Table:
    """Tables of several files as one; a column is text where its types do not fit together."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        for name in {name for table in tables for name in table.column_names}:
            for number, table in enumerate(tables):
                position = table.schema.get_field_index(name)
                if position >= 0 and not pa.types.is_nested(table[name].type):
                    text = table[name].cast(pa.string())
                    tables[number] = table.set_column(position, name, text)
        return pa.concat_tables(tables, promote_options="permissive")


def _parse_text(rows: pa.Table) -> pa.Table:
    """Rows of a text file: null words become null, and columns of numbers become numbers."""
    for position, name in enumerate(rows.column_names):
        if not pa.types.is_string(rows[name].type):
            continue
        text = pc.utf8_trim_whitespace(rows[name])
        text = pc.if_else(pc.is_in(text, pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text)
        known = pc.drop_null(text)
        if len(known) and pc.all(pc.match_substring_regex(known, WHOLE)).as_py():
            text = pc.replace_substring_regex(text, POINT_ZERO, "").cast(pa.int64())
        elif len(known) and pc.all(pc.match_substring_regex(known, DECIMAL)).as_py():
            text = text.cast(pa.float64())
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


def _guess_columns(log: Sample, known: Mapping[str, Any], *, has_unit: bool) -> Iterator[Guess]:
    """The mapping `data.columns`. A column serves once.

    has_unit : whether the user said how times are written
    """
    used = set(known.values())
    for name, names in NAMES.items():
        if name in known:
            continue
        named = [column for column in _find_named(log, names) if column not in used]
        fit = [column for column in named if _is_fit(log, column, name)]
        if name == schema.TIMESTAMP and named and has_unit:
            fit = named
        if not fit and name == schema.TIMESTAMP:
            only = _find_time(log, named, used)
            fit = [only] if only else []
        if not fit and name in _ID_FORMS:
            raise _unknown_column(log, name, used)
        if not fit:
            continue
        column = fit[0]
        used.add(column)
        others = [other for other in named if other != column]
        yield Guess(f"data.columns.{name}", column, _describe_column(log, column, others))


def _find_time(log: Sample, named: list[str], used: set[Any]) -> str | None:
    """The one column of times, whatever its name; None where there is none. Raises DataError where the choice
    is not clear, or where a column that is named like a time is none.
    """
    times = [name for name in log.rows.column_names if name not in used and _is_time(log.rows[name])]
    if len(times) > 1:
        raise DataError(
            f"{log.uri}: several columns hold times: {', '.join(times)}",
            f"name the time of the event: data.columns.timestamp={times[0]}",
        )
    values = [pc.drop_null(log.rows[name]) for name in named]
    if not times and (filled := [name for name, known in zip(named, values, strict=True) if len(known)]):
        example = pc.drop_null(log.rows[filled[0]])[0].as_py()
        raise DataError(
            f"{log.uri}: {filled[0]} is named like a time, but {example!r} is not one that recray reads",
            "say how it is written, data.time_unit=days or data.time_unit='%d.%m.%Y'; or leave it out: "
            "data.columns.timestamp=null",
        )
    return times[0] if times else None


def _is_time(values: pa.ChunkedArray) -> bool:
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return False  # numbers may be anything
    return _is_filled(values) and (_time_unit(values) is not None or bool(_find_patterns(values)))


def _is_filled(values: pa.ChunkedArray) -> bool:
    return values.null_count < len(values) and not pa.types.is_nested(values.type)


def _is_fit(log: Sample, column: str, name: str) -> bool:
    """Whether the values of a column can be what its name says."""
    values = log.rows[column]
    if not _is_filled(values):
        return False
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
    text = pc.drop_null(values).combine_chunks()
    if not len(text):
        return []
    few = text.slice(0, 20)
    possible = [pattern for pattern in PATTERNS if parse_pattern(few, pattern).null_count < len(few)]
    shares = {pattern: 1 - parse_pattern(text, pattern).null_count / len(text) for pattern in possible}
    best = max(shares.values(), default=0.0)
    return [pattern for pattern, share in shares.items() if share == best and best >= MIN_SHARE]


def _guess_times(log: Sample, columns: Mapping[str, Any], decided: Mapping[str, Any]) -> Iterator[Guess]:
    column = columns.get(schema.TIMESTAMP)
    if column is None:
        if columns.get(schema.POSITION):
            yield Guess("split.kind", "leave_one_out", "there are no times, but an order")
        else:
            yield Guess("split.kind", "random", "there are neither times nor an order")
        yield Guess("model.time_bias", False, "needs times")
        yield Guess("model.popularity_prior_days", 0, "needs times")
        return
    if column not in log.rows.column_names:
        raise DataError(f"{log.uri} has no column {column!r}", "correct data.columns.timestamp")
    if "data.time_unit" in decided:
        return
    values = log.rows[column]
    if not _is_filled(values):
        raise DataError(f"{log.uri}: {column} is empty", "correct data.columns.timestamp")
    example = pc.drop_null(values)[0].as_py()
    if (unit := _time_unit(values)) is not None:
        if unit not in ("iso", "s"):
            yield Guess("data.time_unit", unit, f"{example} is a time so")
        return
    patterns = _find_patterns(values)
    if not patterns:
        raise DataError(
            f"{log.uri}: {column} holds {example!r}, which is not a time that recray reads",
            "say how it is written: data.time_unit=days, or data.time_unit='%d.%m.%Y'",
        )
    if len(patterns) > 1:
        raise DataError(
            f"{log.uri}: {column} holds times such as {example!r}, which may be {' or '.join(patterns)}",
            "; ".join(f"add data.time_unit='{pattern}'" for pattern in patterns),
        )
    yield Guess("data.time_unit", patterns[0], f"how {example!r} is written")


def _guess_rows(log: Sample, columns: Mapping[str, Any]) -> Iterator[Guess]:
    """Returns, and rows without a user or an item."""
    value = columns.get(schema.VALUE)
    if value in log.rows.column_names and _normalize(str(value)) in QUANTITIES:
        numbers = log.rows[value]
        if pc.any(pc.less(numbers, 0)).as_py():
            least = 1 if pa.types.is_integer(numbers.type) else 0.0
            dropped = (pc.sum(pc.less(numbers, least)).as_py() or 0) / len(numbers)
            reason = (
                f"{dropped:.1%} of the rows have a {value} below {least}: taken for returns, and left out"
            )
            yield Guess("data.min_value", least, reason)
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
        kind, reason = _guess_kind(name, items.rows[name])
        if kind is not None:
            yield Guess(f"data.features.{name}", kind, reason)
    if available is not None:
        yield Guess("data.available_from", available, "an item is not recommended before")
    for use, candidates in DISPLAY_NAMES.items():
        if named := [name for name in _find_named(items, candidates) if name != item_column]:
            yield Guess(f"data.display.{use}", named[0], "what people see of an item")


def _guess_kind(name: str, values: pa.ChunkedArray) -> tuple[str | None, str]:
    """The kind of a feature with a reason; None for a column without meaning: links, ids, constants."""
    arrow_type, known = values.type, pc.drop_null(values)
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        is_number = pa.types.is_floating(arrow_type.value_type)
        is_vector = is_number and len(pc.list_value_length(known).unique()) == 1
        return ("vector", "lists of numbers") if is_vector else (None if is_number else "multi", "lists")
    if pa.types.is_nested(arrow_type):
        return None, "a record"
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
    if not pa.types.is_string(arrow_type):
        return None, reason
    if (recbole := RECBOLE_KINDS.get(name.partition(":")[2])) is not None:
        return recbole, reason
    return _guess_text_kind(known.to_pylist(), distinct), reason


def _guess_text_kind(texts: list[str], distinct: int) -> str | None:
    if sum(text.startswith(("http://", "https://", "www.")) for text in texts) > 0.5 * len(texts):
        return None
    lists = [values for text in texts if (values := parse_list(text.strip())) is not None]
    if len(lists) > 0.5 * len(texts):
        is_number = all(isinstance(value, float | int) for values in lists for value in values)
        return "vector" if is_number and len({len(values) for values in lists}) == 1 else "multi"
    if any(_are_lists(texts, separator) for separator in "|;,"):
        return "multi"
    words = sum(len(text.split()) for text in texts) / len(texts)
    is_category = distinct <= MAX_CATEGORIES and distinct <= 0.5 * len(texts)
    return "categorical" if is_category else "text" if words >= 1.5 else None


def _are_lists(texts: list[str], separator: str) -> bool:
    """Whether many texts have a separator, and short parts that occur again and again."""
    if sum(separator in text for text in texts) < MANY_LISTS * len(texts):
        return False
    parts = [part.strip() for text in texts for part in text.split(separator)]
    is_short = sum(map(len, parts)) <= SHORT_PART * len(parts)
    return is_short and len(set(parts)) <= 0.5 * len(parts)


def _is_of_interest(event_type: Any) -> bool:
    return _normalize(str(event_type)) not in NO_INTEREST.split()


def _guess_targets(log: Sample, columns: Mapping[str, Any]) -> Iterator[Guess]:
    """Targets, where the log has types of events that are none."""
    if (column := columns.get(schema.EVENT)) not in log.rows.column_names:
        return
    types = pc.drop_null(log.rows[column]).unique().to_pylist()
    targets = sorted(str(name) for name in types if _is_of_interest(name))
    others = sorted(str(name) for name in types if not _is_of_interest(name))
    if targets and others:
        reason = f"{', '.join(others)}: no interest in the item, so history alone"
        yield Guess("data.targets", dict.fromkeys(targets, 1.0), reason)


def _measure_repeats(log: Sample, columns: Mapping[str, Any]) -> float:
    """Share of the events of an item that the user had before."""
    rows = log.rows
    if (event := columns.get(schema.EVENT)) in rows.column_names:
        types = rows[event].unique()
        targets = [name for name in types.to_pylist() if name is None or _is_of_interest(name)]
        if targets:
            rows = rows.filter(pc.is_in(rows[event], pa.array(targets, types.type)))
    pairs = rows.select([columns[schema.USER_ID], columns[schema.ITEM_ID]]).rename_columns(["user", "item"])
    if (basket := columns.get(schema.BASKET)) in log.rows.column_names:
        # an item twice in a basket is one event; an event without a basket is one of its own
        own = pa.array([f"row {number}" for number in range(len(pairs))])
        pairs = pairs.append_column("basket", pc.coalesce(rows[basket].cast(pa.string()), own))
        pairs = pairs.group_by(["user", "item", "basket"]).aggregate([]).select(["user", "item"])
    pairs = pairs.drop_null()
    return 1 - len(pairs.group_by(pairs.column_names).aggregate([])) / max(1, len(pairs))


def _guess_protocol(repeats: float) -> Iterator[Guess]:
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
    types = {
        str(count["values"]): REWARDS.get(_normalize(str(count["values"])), 1.0)
        for count in counts
        if _is_of_interest(count["values"])
    }
    yield Guess("serve.outcomes", types, "reward of each type of event, as you value it")
