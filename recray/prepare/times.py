"""Reads times: timestamps, dates, ISO 8601 text or numbers of a unit become microseconds since 1970 UTC.

A time without a zone is in `data.timezone`. The unit of numbers, in a numeric or text column, is
`data.time_unit`, which may also be the pattern of times that are text (`%d/%m/%Y %H:%M`). With `auto` a unit
is inferred if exactly one puts the numbers between 1990 and 2100; otherwise they are refused, with the units
that would make sense. With an inferred unit, a number before 1990 is not a time either.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass, field
from typing import NamedTuple
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config.fields import TIME_DIRECTIVES
from recray.errors import DataError
from recray.prepare.formats import NULL_WORDS

DAY_US = 86_400_000_000
MIN_US, MAX_US = 0, 4_102_444_800_000_000  # 1970 to 2100: a time outside has a wrong unit
PLAUSIBLE_US = 631_152_000_000_000  # 1990: event logs are not older
OUT_OF_RANGE = -1  # in place of a number that is not a time between 1970 and 2100
MIN_SHARE = 0.9  # of the numbers must be plausible in a unit for it to be inferred
SAMPLE_SIZE = 10_000  # numbers of a file that are inspected

UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1, "minutes": 60_000_000, "hours": 3_600_000_000, "days": DAY_US}
"""Microseconds in a unit; `ns` and `date` (20240301, 202403011530, 20240301153000) are computed."""
INFERRED_UNITS = ("s", "ms", "us", "ns", "date")  # their ranges between 1990 and 2100 are disjoint
UNIT_WORDS = {
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
SUB_MICROSECOND = r"[.,]\d{6}(?P<digits>\d+)"  # digits of a text below the microsecond
NUMBER = r"^\s*-?\d{1,19}(\.\d+)?\s*$"


class Times(NamedTuple):
    """A column of times.

    us : microseconds since 1970 UTC, OUT_OF_RANGE outside 1970 to 2100, null where there is none
    unreadable : bool [n], where the file holds something that is not a time; None: nowhere
    clocked : bool [n], which have a time of day
    """

    us: pa.ChunkedArray
    unreadable: np.ndarray | None
    clocked: np.ndarray


@dataclass(frozen=True)
class TimeRule:
    """How times are read: the unit of numbers, and the zone of times without one.

    least_us : numbers below it are not times: 1990 where the unit was inferred
    """

    unit: str = "s"
    zone: str = "UTC"
    least_us: int = MIN_US
    _zone: ZoneInfo = field(init=False, repr=False, compare=False, default=ZoneInfo("UTC"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_zone", ZoneInfo(self.zone))

    @property
    def outside(self) -> str:
        """What is wrong with a time that is out of range, in words."""
        return "time is outside 1970 to 2100" + (
            f", or a number before 1990 ({self.unit}: see data.time_unit)" if self.least_us else ""
        )

    def read(self, column: pa.ChunkedArray) -> Times:
        """Read a column of timestamps, dates, numbers or text."""
        arrow_type = column.type
        if pa.types.is_null(arrow_type):
            return Times(
                pa.chunked_array([pa.nulls(len(column), pa.int64())]), None, np.zeros(len(column), bool)
            )
        if pa.types.is_integer(arrow_type):
            return self._to_times(self._integers_to_us(column))
        if pa.types.is_floating(arrow_type):
            return self._to_times(self._floats_to_us(column))
        if pa.types.is_date(arrow_type):
            return Times(self._localize(column.cast(pa.timestamp("s"))), None, np.zeros(len(column), bool))
        if pa.types.is_timestamp(arrow_type):
            if arrow_type.tz is None:
                return Times(self._localize(column), None, _has_time_of_day(_to_us(column)))
            us = _to_us(column)
            return Times(us, None, _has_time_of_day(us))
        return self._read_text(column.cast(pa.string()))

    def end_of_day(self, us: int) -> int:
        """The last second, in microseconds, of the day of a moment in the zone of this rule."""
        day = dt.datetime.fromtimestamp(us / 1e6, self._zone).date() + dt.timedelta(days=1)
        return int(dt.datetime.combine(day, dt.time(), self._zone).timestamp() - 1) * 1_000_000

    def day(self, us: np.ndarray) -> np.ndarray:
        """The day of each moment in the zone of this rule, int64 [n]."""
        local = pc.local_timestamp(pa.array(us, pa.timestamp("us", self.zone)))
        result: np.ndarray = local.cast(pa.int64()).to_numpy() // DAY_US
        return result

    def _to_times(self, us: pa.Array) -> Times:
        """Times of whole numbers. The digits of a date are in the zone of this rule."""
        times = pa.chunked_array([us])
        clocked = _has_time_of_day(times)
        if self.unit == "date" and self.zone != "UTC":
            is_valid = pc.fill_null(pc.greater(times, OUT_OF_RANGE), False)
            local = self._localize(
                pc.if_else(is_valid, times, pa.scalar(None, pa.int64())).cast(pa.timestamp("us"))
            )
            times = pc.if_else(is_valid, local, times)
        return Times(times, None, clocked)

    def _integers_to_us(self, column: pa.ChunkedArray) -> pa.Array:
        is_uint64 = pa.types.is_uint64(column.type)
        int64s = to_signed(column) if is_uint64 else column.cast(pa.int64(), safe=False)
        us = integers_to_us(pc.fill_null(int64s, 0).to_numpy(), self.unit)
        return pa.array(self._mask_too_early(us), mask=~int64s.is_valid().to_numpy())

    def _mask_too_early(self, us: np.ndarray) -> np.ndarray:
        return us if self.least_us <= MIN_US else np.where(us < self.least_us, OUT_OF_RANGE, us)

    def _floats_to_us(self, column: pa.ChunkedArray) -> pa.Array:
        """Numbers with a fraction, as pandas writes integers once one is missing. NaN becomes null."""
        values = column.cast(pa.float64()).to_numpy()
        is_number = ~np.isnan(values)
        return pa.array(self._mask_too_early(self._finite_to_us(values, is_number)), mask=~is_number)

    def _finite_to_us(self, values: np.ndarray, is_number: np.ndarray) -> np.ndarray:
        if self.unit in UNITS:
            us = np.where(is_number, values, -1) * UNITS[self.unit]
            is_inside = (us >= 0) & (us <= MAX_US)
            return np.where(is_inside, np.where(is_inside, us, 0).astype(np.int64), OUT_OF_RANGE)
        is_inside = is_number & (np.abs(np.where(is_number, values, 0)) < 2.0**63)
        integers = np.where(is_inside, np.where(is_inside, values, 0).astype(np.int64), OUT_OF_RANGE)
        return integers_to_us(integers, self.unit)

    def _localize(self, naive: pa.ChunkedArray) -> pa.ChunkedArray:
        """Times without a zone, interpreted in the zone of this rule."""
        if self.zone == "UTC":
            return _to_us(naive)
        us = naive.cast(pa.timestamp("us"), safe=False)
        return pc.assume_timezone(us, self.zone, ambiguous="earliest", nonexistent="earliest").cast(
            pa.int64()
        )

    def _read_text(self, column: pa.ChunkedArray) -> Times:
        text = column.combine_chunks()
        text = pc.if_else(
            pc.is_in(pc.utf8_trim_whitespace(text), pa.array(NULL_WORDS)), pa.scalar(None, pa.string()), text
        )
        has_text = text.is_valid().to_numpy(zero_copy_only=False)
        us, is_read, clocked = (
            np.zeros(len(text), np.int64),
            np.zeros(len(text), bool),
            np.zeros(len(text), bool),
        )
        is_number, is_iso = (
            pc.fill_null(pc.match_substring_regex(text, pattern), False).to_numpy(zero_copy_only=False)
            for pattern in (NUMBER, _ISO)
        )
        parsers = [(is_number & ~is_iso, self._read_numbers), (is_iso, self._read_dates)]
        if "%" in self.unit:
            parsers = [(has_text & ~is_iso, self._read_pattern), (is_iso, self._read_dates)]
        for rows, parse in parsers:
            if rows.any():
                times = parse(pc.utf8_trim_whitespace(text.filter(pa.array(rows))))
                us[rows] = pc.fill_null(times.us, 0).to_numpy()
                is_read[rows] = times.us.is_valid().to_numpy()
                clocked[rows] = times.clocked
        return Times(pa.chunked_array([pa.array(us, mask=~is_read)]), has_text & ~is_read, clocked)

    def _read_numbers(self, text: pa.Array) -> Times:
        integers = _parse_integers(text)
        return self._to_times(
            self._floats_to_us(text.cast(pa.float64()))
            if integers is None
            else self._integers_to_us(integers)
        )

    def _read_pattern(self, text: pa.Array) -> Times:
        """Text in the pattern that is the unit of this rule, null for a day that does not exist."""
        naive = parse_pattern(text, self.unit)
        times = pa.chunked_array([naive])
        return Times(self._localize(times), None, _has_time_of_day(_to_us(times)))

    def _read_dates(self, text: pa.Array) -> Times:
        """ISO 8601 text (also with / and a blank), null for a day that does not exist."""
        text = pc.replace_substring_regex(pc.replace_substring(text, "/", "-"), r"[.,](\d{1,6})\d*", r".\1")
        is_zoned = pc.match_substring_regex(text, _ZONED).to_numpy(zero_copy_only=False)
        us, is_valid, clocked = (
            np.zeros(len(text), np.int64),
            np.zeros(len(text), bool),
            np.zeros(len(text), bool),
        )
        for rows, has_zone in ((is_zoned, True), (~is_zoned, False)):
            if not rows.any():
                continue
            part = text.filter(pa.array(rows))
            if has_zone:
                part = pc.replace_substring_regex(part, r"\s*(Z|UTC)$", "+0000")
                part = pc.replace_substring_regex(part, r"\s+([+-])", r"\1")
                part = pc.replace_substring_regex(
                    part, r"\s*([+-]\d{2})$", r"\100"
                )  # hours alone: group 1 and two zeros
            naive = _parse_times(part, has_zone=has_zone)
            clocked[rows] = _has_time_of_day(_to_us(naive))
            part_us = _to_us(naive) if has_zone else self._localize(naive)
            us[rows], is_valid[rows] = pc.fill_null(part_us, 0).to_numpy(), part_us.is_valid().to_numpy()
        return Times(pa.chunked_array([pa.array(us, mask=~is_valid)]), None, clocked)


def parse_pattern(text: pa.Array, pattern: str) -> pa.Array:
    """Text in a pattern as timestamps, null where it does not have the pattern or names no day."""
    parts = re.split("(%.)", pattern)
    regex = "".join(
        f"(?P<day>{TIME_DIRECTIVES['d']})"
        if part == "%d"
        else TIME_DIRECTIVES[part[1]]
        if part[:1] == "%"
        else re.escape(part)
        for part in parts
    )
    text = pc.utf8_trim_whitespace(text)
    day = pc.struct_field(pc.extract_regex(text, f"^{regex}$"), "day").cast(pa.int64())
    times = pc.strptime(text, format=pattern, unit="us", error_is_null=True)
    # strptime reads the 30th of February as the 2nd of March
    return pc.if_else(pc.equal(pc.day(times), day), times, pa.scalar(None, times.type))


def integers_to_us(values: np.ndarray, unit: str) -> np.ndarray:
    """Whole numbers of a unit as microseconds since 1970, int64 [n]; OUT_OF_RANGE outside 1970 to 2100."""
    if unit == "date":
        return _digits_to_us(values)
    if unit == "ns":
        is_inside = (values >= 0) & (values <= (MAX_US + 1) * 1000 - 1)
        return np.where(is_inside, values // 1000, OUT_OF_RANGE)
    size = UNITS[unit]
    is_inside = (values >= 0) & (values <= MAX_US // size)
    return np.where(is_inside, np.where(is_inside, values, 0) * size, OUT_OF_RANGE)


def _digits_to_us(values: np.ndarray) -> np.ndarray:
    """20240301, 2024030115, 202403011530 or 20240301153000."""
    us = np.full(len(values), OUT_OF_RANGE, np.int64)
    for length, clock_digits in ((8, 1), (10, 100), (12, 10_000), (14, 1_000_000)):
        rows = (values >= 10 ** (length - 1)) & (values < 10**length)
        if not rows.any():
            continue
        date, clock = values[rows] // clock_digits, values[rows] % clock_digits
        year, month, day = date // 10_000, date // 100 % 100, date % 100
        clock *= 10 ** (14 - length) if length > 8 else 0
        hour, minute, second = clock // 10_000, clock // 100 % 100, clock % 100
        is_valid = (
            (year >= 1970)
            & (year < 2100)
            & (month >= 1)
            & (month <= 12)
            & (day >= 1)
            & (hour < 24)
            & (minute < 60)
            & (second < 60)
        )
        months = np.where(is_valid, year - 1970, 0) * 12 + np.where(is_valid, month - 1, 0)
        first_day = months.astype("datetime64[M]")
        moment = first_day.astype("datetime64[D]") + np.where(is_valid, day - 1, 0)
        is_valid &= moment.astype("datetime64[M]") == first_day  # no 31st of February
        moment_us = (
            moment.astype("datetime64[us]").astype(np.int64)
            + ((hour * 60 + minute) * 60 + second) * 1_000_000
        )
        us[rows] = np.where(is_valid, moment_us, OUT_OF_RANGE)
    return us


def to_signed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Unsigned 64-bit numbers as int64; numbers that do not fit become the largest."""
    return pc.min_element_wise(column, pa.scalar((1 << 63) - 1, pa.uint64()), skip_nulls=False).cast(
        pa.int64()
    )


def _to_us(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Timestamps as int64 microseconds. Times that do not fit become a value below or above the valid
    range.
    """
    units_per_second = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[column.type.unit]
    values = column.cast(pa.int64())
    if units_per_second >= 1_000_000:
        return (
            values
            if units_per_second == 1_000_000
            else pc.divide(pc.subtract(values, pc.if_else(pc.less(values, 0), 999, 0)), 1000)
        )
    limit = MAX_US * units_per_second // 1_000_000 + 1
    return pc.multiply(
        pc.max_element_wise(pc.min_element_wise(values, limit, skip_nulls=False), -limit, skip_nulls=False),
        1_000_000 // units_per_second,
    )


def _has_time_of_day(us: pa.ChunkedArray) -> np.ndarray:
    result: np.ndarray = pc.fill_null(us, 0).to_numpy() % DAY_US != 0
    return result


def _parse_integers(text: pa.Array) -> pa.ChunkedArray | None:
    """Whole numbers written as text, clipped to 64 bits; None if one has a fraction."""
    text = pc.replace_substring_regex(text, r"\.0*$", "")
    try:
        return pa.chunked_array([text.cast(pa.int64())])
    except pa.ArrowInvalid:
        pass
    try:
        return pa.chunked_array(
            [
                pa.array(
                    [min(max(int(number), -(1 << 63)), (1 << 63) - 1) for number in text.to_pylist()],
                    pa.int64(),
                )
            ]
        )
    except ValueError:
        return None


def extract_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """The whole numbers in a column of numbers or text, int64 [n]. Fractions are cut off, other values are
    left out.
    """
    arrow_type = column.type
    if pa.types.is_string(arrow_type):
        column = column.filter(pc.fill_null(pc.match_substring_regex(column, NUMBER), False))
        column = pc.replace_substring_regex(pc.utf8_trim_whitespace(column), r"\..*$", "")
        return np.array(
            [min(max(int(number), -(1 << 63)), (1 << 63) - 1) for number in column.to_pylist()], np.int64
        )
    column = pc.drop_null(column)
    if pa.types.is_floating(arrow_type):
        numbers = column.to_numpy().astype(np.float64)
        return np.asarray(numbers[np.abs(numbers) < 2.0**63].astype(np.int64))
    integers = to_signed(column) if pa.types.is_uint64(arrow_type) else column.cast(pa.int64())
    return np.asarray(integers.to_numpy())


def detect_zones(text: pa.ChunkedArray) -> np.ndarray:
    """Which texts are ISO 8601 with a zone (1), without one (0), or neither (-1), int8 [n]."""
    is_iso, is_zoned = (
        pc.fill_null(pc.match_substring_regex(text, pattern), False).to_numpy() for pattern in (_ISO, _ZONED)
    )
    return np.where(is_iso, is_zoned.astype(np.int8), np.int8(-1))


def _parse_times(text: pa.Array, *, has_zone: bool) -> pa.ChunkedArray:
    arrow_type = pa.timestamp("us", "UTC" if has_zone else None)
    try:
        return pa.chunked_array([text.cast(arrow_type)])
    except pa.ArrowInvalid:
        return pa.chunked_array(
            [
                pa.array([_parse_time(value, arrow_type) for value in text.to_pylist()], pa.int64()).cast(
                    arrow_type
                )
            ]
        )


def _parse_time(value: str, arrow_type: pa.DataType) -> int | None:
    try:
        return int(pa.scalar(value).cast(arrow_type).cast(pa.int64()).as_py())
    except pa.ArrowInvalid:
        return None


def infer_unit(values: np.ndarray) -> str | None:
    """The only unit that puts these whole numbers between 1990 and 2100, None if there is none."""
    for unit in INFERRED_UNITS:
        us = integers_to_us(values, unit)
        if len(us) and np.mean(us >= PLAUSIBLE_US) >= MIN_SHARE:
            return unit
    return None


def unit_error(values: np.ndarray, where: str, setting: str = "data.time_unit") -> DataError:
    """The error for whole numbers of unknown unit, with the units that would make sense."""
    low, high = int(values.min()), int(values.max())
    candidates = [
        unit
        for unit in (*INFERRED_UNITS, "days", "hours", "minutes")
        if np.mean(integers_to_us(values, unit) >= PLAUSIBLE_US) >= MIN_SHARE / 2
    ]
    fix = "; ".join(
        f"{setting}={unit} if they are {UNIT_WORDS[unit]} ({_describe_range(values, unit)})"
        for unit in candidates
    )
    fix = fix or f"{setting}=s reads them as seconds since 1970 anyway"
    return DataError(
        f"{where} holds whole numbers from {low} to {high}, which as seconds since 1970 are "
        f"{_describe_range(values, 's')}",
        f"{fix}; data.columns.position=YOUR_COLUMN and data.columns.timestamp=null if they only give an "
        "order",
    )


def _describe_range(values: np.ndarray, unit: str) -> str:
    us = integers_to_us(values, unit)
    us = us[us >= 0]
    if not len(us):
        return "not a time between 1970 and 2100"

    def show(moment: int) -> str:
        return str(np.datetime64(int(moment), "us").astype("datetime64[s]")).replace("T", " ")

    return f"{show(us.min())} to {show(us.max())}"
