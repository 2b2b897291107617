"""What a column says about when: timestamps, dates, ISO 8601 text or whole numbers of a unit, as microseconds since 1970 UTC.

A time without a zone is one of `data.timezone`. The unit of numbers, in a column of their own or as text, is `data.time_unit`, or seen in
their size where only one unit puts them between 1990 and 2100 beyond doubt; else they are refused, with the units that would make sense. A
number that the unit that was seen puts before 1990 is no time either.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.errors import DataError
from recray.prepare.formats import NULL_WORDS

DAY_US = 86_400_000_000
MIN_US, MAX_US = 0, 4_102_444_800_000_000  # 1970 to 2100: outside lies a wrong unit
PLAUSIBLE_US = 631_152_000_000_000  # 1990: before it there was no log to learn from
OUTSIDE = -1  # stands for a number that is no time between 1970 and 2100
ENOUGH = 0.9  # of the numbers, to say what they are
SAMPLE = 10_000  # numbers of a file that are looked at

UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1, "minutes": 60_000_000, "hours": 3_600_000_000, "days": DAY_US}
"""Microseconds in a unit; `ns` and `date` (20240301, 202403011530, 20240301153000) are computed."""
SEEN = ("s", "ms", "us", "ns", "date")  # whose ranges between 1990 and 2100 do not meet
WORDS = {
    "s": "seconds since 1970",
    "ms": "milliseconds since 1970",
    "us": "microseconds since 1970",
    "ns": "nanoseconds since 1970",
    "minutes": "minutes since 1970",
    "hours": "hours since 1970",
    "days": "days since 1970",
    "date": "the digits of a date",
}

_ISO = r"^\s*\d{4}[-/]\d{2}[-/]\d{2}([T ]\d{2}:\d{2}(:\d{2}([.,]\d+)?)?)?\s*(Z|UTC|[+-]\d{2}(:?\d{2})?)?\s*$"
_ZONED = r"(Z|UTC|:\d{2}\s*[+-]\d{2}(:?\d{2})?|[.,]\d+\s*[+-]\d{2}(:?\d{2})?)\s*$"
UNDER_US = r"[.,]\d{6}(?P<more>\d+)"  # what a text says below the microsecond
NUMBER = r"^\s*-?\d{1,19}(\.\d+)?\s*$"


class Times(NamedTuple):
    """A column of times: microseconds since 1970 UTC, OUTSIDE for what lies beyond 1970 to 2100, null where there is none; where the file
    says something that is no time; and which have a time of day."""

    us: pa.ChunkedArray
    unreadable: np.ndarray | None
    clocked: np.ndarray


@dataclass(frozen=True)
class TimeRule:
    """How times are read: the unit of numbers, and the zone of what has none.

    least_us : a number below it is no time: where the unit was seen, 1990
    """

    unit: str = "s"
    zone: str = "UTC"
    least_us: int = MIN_US
    _zone: ZoneInfo = field(init=False, repr=False, compare=False, default=ZoneInfo("UTC"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_zone", ZoneInfo(self.zone))

    @property
    def outside(self) -> str:
        """What is wrong with a time that is none, in words."""
        return "time is outside 1970 to 2100" + (f", or a number before 1990 ({self.unit}: see data.time_unit)" if self.least_us else "")

    def read(self, column: pa.ChunkedArray) -> Times:
        """A column of timestamps, dates, numbers or text."""
        kind = column.type
        if pa.types.is_null(kind):
            return Times(pa.chunked_array([pa.nulls(len(column), pa.int64())]), None, np.zeros(len(column), bool))
        if pa.types.is_integer(kind):
            return self._of_numbers(self._whole(column))
        if pa.types.is_floating(kind):
            return self._of_numbers(self._fractions(column))
        if pa.types.is_date(kind):
            return Times(self._placed(column.cast(pa.timestamp("s"))), None, np.zeros(len(column), bool))
        if pa.types.is_timestamp(kind):
            if kind.tz is None:
                return Times(self._placed(column), None, _has_clock(_plain(column)))
            found = _plain(column)
            return Times(found, None, _has_clock(found))
        return self._text(column.cast(pa.string()))

    def end_of_day(self, us: int) -> int:
        """The last second, in microseconds, of the day of a moment in the zone of the times."""
        day = dt.datetime.fromtimestamp(us / 1e6, self._zone).date() + dt.timedelta(days=1)
        return int(dt.datetime.combine(day, dt.time(), self._zone).timestamp() - 1) * 1_000_000

    def day(self, us: np.ndarray) -> np.ndarray:
        """The day of each moment in the zone of the times, int64 [n]."""
        local = pc.local_timestamp(pa.array(us, pa.timestamp("us", self.zone)))
        found: np.ndarray = local.cast(pa.int64()).to_numpy() // DAY_US
        return found

    def _of_numbers(self, us: pa.Array) -> Times:
        """Times of whole numbers; the digits of a date are of the zone of the rule."""
        found = pa.chunked_array([us])
        clocked = _has_clock(found)
        if self.unit == "date" and self.zone != "UTC":
            there = pc.fill_null(pc.greater(found, OUTSIDE), False)
            placed = self._placed(pc.if_else(there, found, pa.scalar(None, pa.int64())).cast(pa.timestamp("us")))
            found = pc.if_else(there, placed, found)
        return Times(found, None, clocked)

    def _whole(self, column: pa.ChunkedArray) -> pa.Array:
        wide = column.cast(pa.int64(), safe=False) if not pa.types.is_uint64(column.type) else signed(column)
        valid = wide.is_valid().to_numpy()
        return pa.array(self._late_enough(whole_us(pc.fill_null(wide, 0).to_numpy(), self.unit)), mask=~valid)

    def _late_enough(self, us: np.ndarray) -> np.ndarray:
        return us if self.least_us <= MIN_US else np.where(us < self.least_us, OUTSIDE, us)

    def _fractions(self, column: pa.ChunkedArray) -> pa.Array:
        """Numbers with a fraction, as pandas writes whole ones as soon as one is missing; NaN is null."""
        values = column.cast(pa.float64()).to_numpy()
        known = ~np.isnan(values)
        return pa.array(self._late_enough(self._of_fractions(values, known)), mask=~known)

    def _of_fractions(self, values: np.ndarray, known: np.ndarray) -> np.ndarray:
        if self.unit in UNITS:
            us = np.where(known, values, -1) * UNITS[self.unit]
            inside = (us >= 0) & (us <= MAX_US)
            return np.where(inside, np.where(inside, us, 0).astype(np.int64), OUTSIDE)
        inside = known & (np.abs(np.where(known, values, 0)) < 2.0**63)
        return whole_us(np.where(inside, np.where(inside, values, 0).astype(np.int64), OUTSIDE), self.unit)

    def _placed(self, naive: pa.ChunkedArray) -> pa.ChunkedArray:
        """Times without a zone, in the zone of the rule."""
        if self.zone == "UTC":
            return _plain(naive)
        us = naive.cast(pa.timestamp("us"), safe=False)
        return pc.assume_timezone(us, self.zone, ambiguous="earliest", nonexistent="earliest").cast(pa.int64())

    def _text(self, column: pa.ChunkedArray) -> Times:
        text = column.combine_chunks()
        text = pc.if_else(pc.is_in(pc.utf8_trim_whitespace(text), pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text)
        said = text.is_valid().to_numpy(zero_copy_only=False)
        us, read, clocked = np.zeros(len(text), np.int64), np.zeros(len(text), bool), np.zeros(len(text), bool)
        whole, iso = (pc.fill_null(pc.match_substring_regex(text, pattern), False).to_numpy(zero_copy_only=False) for pattern in (NUMBER, _ISO))
        for rows, parse in ((whole & ~iso, self._numbers), (iso, self._dates)):
            if rows.any():
                found = parse(pc.utf8_trim_whitespace(text.filter(pa.array(rows))))
                us[rows] = pc.fill_null(found.us, 0).to_numpy()
                read[rows] = found.us.is_valid().to_numpy()
                clocked[rows] = found.clocked
        return Times(pa.chunked_array([pa.array(us, mask=~read)]), said & ~read, clocked)

    def _numbers(self, text: pa.Array) -> Times:
        whole = _integers(text)
        return self._of_numbers(self._fractions(text.cast(pa.float64())) if whole is None else self._whole(whole))

    def _dates(self, text: pa.Array) -> Times:
        """ISO 8601 (also with / and a blank), null for a day that no calendar has."""
        text = pc.replace_substring_regex(pc.replace_substring(text, "/", "-"), r"[.,](\d{1,6})\d*", r".\1")
        zoned = pc.match_substring_regex(text, _ZONED)
        where = zoned.to_numpy(zero_copy_only=False)
        us, there, clocked = np.zeros(len(text), np.int64), np.zeros(len(text), bool), np.zeros(len(text), bool)
        for rows, has_zone in ((where, True), (~where, False)):
            if not rows.any():
                continue
            some = text.filter(pa.array(rows))
            if has_zone:
                some = pc.replace_substring_regex(some, r"\s*(Z|UTC)$", "+0000")
                some = pc.replace_substring_regex(some, r"\s+([+-])", r"\1")
                some = pc.replace_substring_regex(some, r"\s*([+-]\d{2})$", r"\100")  # hours alone: group 1, then two zeros
            naive = _parsed(some, has_zone=has_zone)
            clocked[rows] = _has_clock(_plain(naive))
            placed = _plain(naive) if has_zone else self._placed(naive)
            us[rows], there[rows] = pc.fill_null(placed, 0).to_numpy(), placed.is_valid().to_numpy()
        return Times(pa.chunked_array([pa.array(us, mask=~there)]), None, clocked)


def whole_us(values: np.ndarray, unit: str) -> np.ndarray:
    """Whole numbers of a unit as microseconds since 1970, int64 [n]; OUTSIDE where they are no time between 1970 and 2100."""
    if unit == "date":
        return _digits(values)
    if unit == "ns":
        inside = (values >= 0) & (values <= (MAX_US + 1) * 1000 - 1)
        return np.where(inside, values // 1000, OUTSIDE)
    size = UNITS[unit]
    inside = (values >= 0) & (values <= MAX_US // size)
    return np.where(inside, np.where(inside, values, 0) * size, OUTSIDE)


def _digits(values: np.ndarray) -> np.ndarray:
    """20240301, 2024030115, 202403011530 or 20240301153000."""
    found = np.full(len(values), OUTSIDE, np.int64)
    for length, rest in ((8, 1), (10, 100), (12, 10_000), (14, 1_000_000)):
        rows = (values >= 10 ** (length - 1)) & (values < 10**length)
        if not rows.any():
            continue
        date, clock = values[rows] // rest, values[rows] % rest
        year, month, day = date // 10_000, date // 100 % 100, date % 100
        clock *= 10 ** (14 - length) if length > 8 else 0
        hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
        good = (year >= 1970) & (year < 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (hour < 24) & (minute < 60) & (second < 60)
        first = (np.where(good, year - 1970, 0) * 12 + np.where(good, month - 1, 0)).astype("datetime64[M]")
        moment = first.astype("datetime64[D]") + np.where(good, day - 1, 0)
        good &= moment.astype("datetime64[M]") == first  # no 31st of February
        us = moment.astype("datetime64[us]").astype(np.int64) + ((hour * 60 + minute) * 60 + second) * 1_000_000
        found[rows] = np.where(good, us, OUTSIDE)
    return found


def signed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Unsigned numbers of 64 bits; what has no sign's room is the largest."""
    return pc.min_element_wise(column, pa.scalar((1 << 63) - 1, pa.uint64()), skip_nulls=False).cast(pa.int64())


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Timestamps as int64 microseconds; what they cannot hold is before or after all that they are to hold."""
    seconds = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[column.type.unit]
    whole = column.cast(pa.int64())
    if seconds >= 1_000_000:
        return whole if seconds == 1_000_000 else pc.divide(pc.subtract(whole, pc.if_else(pc.less(whole, 0), 999, 0)), 1000)
    most = MAX_US * seconds // 1_000_000 + 1
    return pc.multiply(pc.max_element_wise(pc.min_element_wise(whole, most, skip_nulls=False), -most, skip_nulls=False), 1_000_000 // seconds)


def _has_clock(us: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = pc.fill_null(us, 0).to_numpy() % DAY_US != 0
    return found


def _integers(text: pa.Array) -> pa.ChunkedArray | None:
    """Whole numbers as they are written, the largest for more than 64 bits; None where one has a fraction."""
    text = pc.replace_substring_regex(text, r"\.0*$", "")
    try:
        return pa.chunked_array([text.cast(pa.int64())])
    except pa.ArrowInvalid:
        pass
    try:
        return pa.chunked_array([pa.array([min(max(int(one), -(1 << 63)), (1 << 63) - 1) for one in text.to_pylist()], pa.int64())])
    except ValueError:
        return None


def numbers_in(column: pa.ChunkedArray) -> np.ndarray:
    """The whole numbers in a column of numbers, or of text, int64 [n]; fractions are cut off, what is none is left out."""
    kind = column.type
    if pa.types.is_string(kind):
        column = column.filter(pc.fill_null(pc.match_substring_regex(column, NUMBER), False))
        column = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"\..*$", "")
        return np.array([min(max(int(one), -(1 << 63)), (1 << 63) - 1) for one in column.to_pylist()], np.int64)
    column = pc.drop_null(column)
    if pa.types.is_floating(kind):
        numbers = column.to_numpy().astype(np.float64)
        found: np.ndarray = numbers[np.abs(numbers) < 2.0**63].astype(np.int64)
        return found
    whole: np.ndarray = (signed(column) if pa.types.is_uint64(kind) else column.cast(pa.int64())).to_numpy()
    return whole


def has_zone(text: pa.ChunkedArray) -> np.ndarray:
    """Which texts are ISO 8601 with a zone (1), without one (0), or no such time (-1)."""
    iso, zoned = (pc.fill_null(pc.match_substring_regex(text, pattern), False).to_numpy() for pattern in (_ISO, _ZONED))
    return np.where(iso, zoned.astype(np.int8), np.int8(-1))


def _parsed(text: pa.Array, *, has_zone: bool) -> pa.ChunkedArray:
    kind = pa.timestamp("us", "UTC" if has_zone else None)
    try:
        return pa.chunked_array([text.cast(kind)])
    except pa.ArrowInvalid:
        return pa.chunked_array([pa.array([_one(value, kind) for value in text.to_pylist()], pa.int64()).cast(kind)])


def _one(value: str, kind: pa.DataType) -> int | None:
    try:
        return int(pa.scalar(value).cast(kind).cast(pa.int64()).as_py())
    except pa.ArrowInvalid:
        return None


def see_unit(values: np.ndarray) -> str | None:
    """The unit that alone puts these whole numbers between 1990 and 2100, None where none does."""
    for unit in SEEN:
        us = whole_us(values, unit)
        if len(us) and np.mean(us >= PLAUSIBLE_US) >= ENOUGH:
            return unit
    return None


def refuse_unit(values: np.ndarray, where: str, setting: str = "data.time_unit") -> DataError:
    """Why whole numbers are no times, and what they may be."""
    low, high = int(values.min()), int(values.max())
    could = [unit for unit in (*SEEN, "days", "hours", "minutes") if np.mean(whole_us(values, unit) >= PLAUSIBLE_US) >= ENOUGH / 2]
    fix = "; ".join(f"{setting}={unit} if they are {WORDS[unit]} ({_span(values, unit)})" for unit in could)
    fix = fix or f"{setting}=s takes them as seconds since 1970 all the same"
    return DataError(
        f"{where} holds whole numbers from {low} to {high}, which as seconds since 1970 are {_span(values, 's')}",
        f"{fix}; data.columns.position=YOUR_COLUMN and data.columns.timestamp=null if they only say the order",
    )


def _span(values: np.ndarray, unit: str) -> str:
    us = whole_us(values, unit)
    us = us[us >= 0]
    if not len(us):
        return "no time between 1970 and 2100"

    def show(moment: int) -> str:
        return str(np.datetime64(int(moment), "us").astype("datetime64[s]")).replace("T", " ")

    return f"{show(us.min())} to {show(us.max())}"
