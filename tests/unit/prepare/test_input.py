"""Other people's logs: which rows are read, what a time is, what comes first, what is a basket, and what
nobody may learn from.
"""

from __future__ import annotations

import csv
import datetime as dt
import gzip
import json
import os
import re
import shutil
import string

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.config import load_settings
from recray.dataset.context import encode_value
from recray.dataset.reader import assign_buckets
from recray.errors import DataError, RefusedError, SettingsError, TooManyInvalidRowsError
from recray.events import collect as collecting
from recray.events.log import Entry, make_key
from recray.events.store import open_log
from recray.prepare.files import list_files, natural_key
from recray.prepare.prepare import find_input, inspect_input
from recray.prepare.times import (
    INFERRED_UNITS,
    MAX_US,
    OUT_OF_RANGE,
    UNITS,
    TimeRule,
    infer_unit,
    integers_to_us,
)
from recray.storage import Storage
from recray.testing.published import prepare_here

T, DAY = 1_709_251_200, 86_400  # 2024-03-01


def rows(users=20, each=10, first=T, step=DAY):
    return pa.table(
        {
            "user_id": [u for u in range(users) for _ in range(each)],
            "item_id": [f"i{(u * 3 + n) % 7}" for u in range(users) for n in range(each)],
            "timestamp": [first + step * n + u for u in range(users) for n in range(each)],
        }
    )


def prepared(tmp_path, *overrides, as_of=None, events=None):
    where = [] if events is None else [f"data.events={json.dumps([str(path) for path in events])}"]
    settings = load_settings(None, [*where, f"storage.root={tmp_path / 'root'}", "data.shards=2", *overrides])
    data = prepare_here(settings, as_of)
    data.said = [*find_input(settings).notes, *data.manifest["notes"]]
    return data


def written(tmp_path, table, *overrides, as_of=None):
    pq.write_table(table, tmp_path / "events.parquet")
    return prepared(tmp_path, *overrides, events=[tmp_path / "events.parquet"], as_of=as_of)


def histories(data):
    ids = [None, *data.items["item_id"].to_pylist()]
    by_user = {}
    for shard in data.shards():
        for row, user in enumerate(shard.user_ids.to_pylist()):
            history = shard.history(row)
            by_user[user] = [
                (ids[i], t, data.event_types[e])
                for i, t, e in zip(
                    history.item_index, history.timestamp_s.tolist(), history.event_index, strict=True
                )
            ]
    return by_user


def baskets(data, user):
    shard = data.shard(int(assign_buckets([user], data.n_shards)[0]))
    row = shard.find(user)
    return shard.basket[shard.offsets[row] : shard.offsets[row + 1]].tolist()


# which rows are read


def test_what_a_writer_hides_is_passed_by_at_every_depth(tmp_path):
    folder = tmp_path / "log"
    for name in (
        "a",
        "2024/b",
        "_temporary/0/part-0",
        ".ipynb_checkpoints/a",
        "2024/.hive-staging_1/b",
        "_SUCCESS",
        "2024/_b",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows(), folder / f"{name}.parquet")
    assert [os.path.relpath(file.uri, folder) for file in list_files((str(folder),)).files] == [
        "2024/b.parquet",
        "a.parquet",
    ]


def test_a_file_is_known_by_its_name_or_its_first_bytes_and_what_is_left_out_is_named(tmp_path):
    folder, linked = tmp_path / "log", tmp_path / "elsewhere"
    folder.mkdir(), linked.mkdir()
    for path in (
        folder / "b.parquet.gzip",
        folder / "c.PARQUET",
        folder / "d.parq",
        folder / "000000_0",
        linked / "e.pq",
    ):
        pq.write_table(rows(users=2), path)
    (folder / "link").symlink_to(linked)
    (linked / "round").symlink_to(folder)
    (folder / "gone.parquet_").symlink_to(tmp_path / "nowhere")
    (folder / "notes.txt").write_text("of the log")
    (folder / "schema.json").write_text('{\n  "fields": []\n}')
    (folder / "empty").touch()
    data = prepared(tmp_path, events=[folder])
    assert data.manifest["rows"] == 5 * 20
    notes = "; ".join(data.said)
    for name, why in (
        ("notes.txt", "neither Parquet, CSV nor JSON lines"),
        ("schema.json", "neither"),
        ("empty", "empty"),
        ("gone.parquet_", "a broken link"),
    ):
        assert name in notes and why in notes


def test_a_name_that_is_no_text_is_left_out_by_name(tmp_path):
    folder = tmp_path / "F"
    folder.mkdir()
    pq.write_table(rows(), folder / "a.parquet")
    odd = os.fsencode(folder) + b"/b\xff.parquet"
    with open(odd, "wb") as file:
        file.write((folder / "a.parquet").read_bytes())
    data = prepared(tmp_path, events=[folder])
    assert data.n_events == 200 and any(
        "b\ufffd.parquet" in note and "not UTF-8" in note for note in data.said
    )
    os.rename(os.fsencode(folder), os.fsencode(tmp_path) + b"/F\xfe")
    with pytest.raises(DataError, match="not valid UTF-8"):
        list_files((os.fsdecode(os.fsencode(tmp_path) + b"/F\xfe"),))


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    folder = tmp_path / "log"
    (folder / "2024").mkdir(parents=True)
    pq.write_table(rows(), folder / "2024" / "a.parquet")
    (tmp_path / "other").symlink_to(folder)
    data = prepared(tmp_path, events=[folder, folder / "2024" / "a.parquet", tmp_path / "other"])
    assert data.n_events == 200 and any("2 files" in note and "read once" in note for note in data.said)


def test_what_folders_say_are_columns(tmp_path):
    folder = tmp_path / "log"
    for event in ("view", "purchase", "__HIVE_DEFAULT_PARTITION__"):
        for day in ("2024-03-01", "2024-03-02"):
            part = folder / f"event={event}" / f"dt={day}"
            part.mkdir(parents=True)
            pq.write_table(rows(each=2, step=1).drop_columns(["timestamp"]), part / "part-0.parquet")
    data = prepared(tmp_path, "data.columns={timestamp: dt}", "split.kind=leave_one_out", events=[folder])
    assert set(data.event_types) == {"view", "purchase", "interaction"} and data.n_events == 240
    assert {t for history in histories(data).values() for _, t, _ in history} == {T, T + DAY}
    assert (
        prepared(
            tmp_path,
            "data.columns={timestamp: dt, event: event}",
            "split.kind=leave_one_out",
            events=[folder],
        ).n_events
        == 240
    )


def test_a_column_that_is_null_in_a_whole_file_is_null_there(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    extra_rows = (
        rows()
        .append_column("value", pa.array([2.0] * 200))
        .append_column("basket", pa.array(["b"] * 200))
        .append_column("event", pa.array(["buy"] * 200))
    )
    pq.write_table(extra_rows, folder / "a.parquet")
    for name, column in (("value", 3), ("basket", 4), ("event", 5)):
        pq.write_table(extra_rows.set_column(column, name, pa.nulls(200)), folder / f"without {name}.parquet")
    data = prepared(tmp_path, events=[folder])
    assert data.n_events == 800 and data.event_types == ["buy", "interaction"]
    assert sorted({value for shard in data.shards() for value in shard.value.tolist()}) == [1.0, 2.0]


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tsv", "semicolons.csv", "jsonl", "json", "ndjson.gz"])
def test_text_is_read_as_parquet_is(tmp_path, form):
    table = (
        rows()
        .append_column("event", pa.array(["view", "buy"] * 100))
        .append_column("value", pa.array([0.5, None] * 100))
    )
    expected = written(tmp_path, table)
    if "json" in form:
        text = "".join(
            json.dumps({name: value for name, value in row.items() if value is not None}) + "\n"
            for row in table.to_pylist()
        ).encode()
    else:
        between = "\t" if form == "tsv" else ";" if "semi" in form else ","
        pacsv.write_csv(table, tmp_path / "plain", pacsv.WriteOptions(delimiter=between))
        text = (tmp_path / "plain").read_bytes()
    path = tmp_path / f"log.{form}"
    path.write_bytes(gzip.compress(text) if form.endswith("gz") else text)
    data = prepared(tmp_path, events=[path])
    assert histories(data) == histories(expected) and data.user_type == pa.int64()
    assert [shard.value.tolist() for shard in data.shards()] == [
        shard.value.tolist() for shard in expected.shards()
    ]


def test_text_that_is_no_row_goes_to_quarantine_and_too_much_of_it_is_refused(tmp_path):
    lines = [
        "user_id,item_id,timestamp,value",
        *(f"u{n % 5},i{n % 3},2024-03-{1 + n % 28:02d} 10:00:00,1" for n in range(300)),
    ]
    lines += [
        "u1,i1",
        "u1,i1,2024-02-31,1",
        "u1,i1,12/1/2010 8:26,1",
        "u1,i1,2024-03-01,many",
        ",i1,2024-03-01,1",
        "u1, ,2024-03-01,1",
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    with pytest.raises(
        TooManyInvalidRowsError, match="6 of 306 rows are invalid.*line is no row.*time is no ISO 8601"
    ):
        prepared(tmp_path, events=[tmp_path / "log.csv"])
    data = prepared(tmp_path, "data.max_invalid_fraction=0.02", events=[tmp_path / "log.csv"])
    quarantined = pq.read_table(tmp_path / "root" / "quarantine" / data.key).to_pylist()
    assert {row["reason"].partition(" (")[0] for row in quarantined} == {
        "line is no row", "time is no ISO 8601", "value is not a number", "user_id is blank",
        "item_id is blank",
    }  # fmt: skip
    assert {row["given_timestamp"] for row in quarantined} >= {
        "2024-02-31",
        "12/1/2010 8:26",
    } and "u1,i1" in {row["line"] for row in quarantined}
    assert data.n_events == 300 and any("6 of 306 rows are invalid" in note for note in data.said)


def test_ids_are_whole_numbers_where_every_file_has_such_and_text_else(tmp_path):
    (tmp_path / "a.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{n % 5},{n % 3},{T + n * DAY}\n" for n in range(100))
    )
    (tmp_path / "b.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"00{n % 5},{n % 3},{T + n * DAY}\n" for n in range(100))
    )
    assert prepared(tmp_path, events=[tmp_path / "a.csv"]).user_type == pa.int64()
    both = prepared(tmp_path, events=[tmp_path / "a.csv", tmp_path / "b.csv"])
    assert (
        set(histories(both)) == {*map(str, range(5)), *(f"00{n}" for n in range(5))}
        and both.items["item_id"].type == pa.int64()
    )
    pq.write_table(pa.table({"item_id": ["0", "1", "2"]}), tmp_path / "items.parquet")
    dataset_with_items = prepared(
        tmp_path, f"data.items={tmp_path / 'items.parquet'}", events=[tmp_path / "a.csv"]
    )
    assert dataset_with_items.items["item_id"].to_pylist() == ["0", "1", "2"] and any(
        "read as text" in note for note in dataset_with_items.said
    )


@pytest.mark.parametrize(
    ("ends", "before", "after", "message"),
    [
        (",", '"i3', "", "unexpected end"),
        (",", '"i3', '"i4', "expected after"),
        ("\t", '"best pipe', 'the 5"', "look like rows"),
    ],
)
def test_a_stray_quote_does_not_make_one_row_of_many(tmp_path, ends, before, after, message):
    lines = [
        ["user_id", "item_id", "timestamp", "note"],
        *([str(n % 20), f"i{n % 7}", str(T + n), "x"] for n in range(200)),
    ]
    lines[50][3] = before
    lines[150][3] = after or "x"
    (tmp_path / "e.csv").write_text("\n".join(map(ends.join, lines)) + "\n")
    with pytest.raises(DataError, match=f"e.csv: a quote in line 51 opens a text of .*{message}"):
        prepared(tmp_path, events=[tmp_path / "e.csv"])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_one_row_that_a_stray_quote_takes_is_missed_too(tmp_path, end, last):
    lines = ["user_id,item_id,timestamp", *(f"{n % 20},i{n % 7},{T + n}" for n in range(200))]
    lines[50], lines[51] = f'7,"i3,{T}', f'8,"i4,{T}'
    (tmp_path / "e.csv").write_bytes((end.join(lines) + (end if last else "")).encode())
    with pytest.raises(DataError, match="a quote in line 51 opens a text of 2 lines"):
        prepared(tmp_path, events=[tmp_path / "e.csv"])


def test_quotes_that_end_in_their_line_cost_no_second_reading(tmp_path, monkeypatch):
    readings, reader = [], csv.reader

    def remembered(lines, *args, strict=False, **options):
        readings.extend([1] * strict)
        return reader(lines, *args, strict=strict, **options)

    monkeypatch.setattr(csv, "reader", remembered)
    for end in ("\n", ""):
        text = "\n".join(
            ["user_id,item_id,timestamp", *(f'{n % 20},"i{n % 7}",{T + n * DAY // 20}' for n in range(200))]
        )
        (tmp_path / "e.csv").write_text(text + end)
        assert prepared(tmp_path, events=[tmp_path / "e.csv"]).n_events == 200
    assert not readings
    (tmp_path / "e.csv").write_text(text.replace('"i3"', '"i\n3"', 1))
    prepared(tmp_path, events=[tmp_path / "e.csv"])
    assert readings, "a text of two lines is checked"


def test_texts_of_several_lines_are_texts(tmp_path):
    head, plain = (
        "user_id,item_id,timestamp,note",
        [f"{n % 20},i{n % 7},{T + n * DAY // 20},x" for n in range(200)],
    )
    for odd in (
        '"one, ""two""\n\nthree, four, five, six\n"',
        '"a\nb, c, d, e"',
        '"Tom" Hanks',
        '"say \\"hi\\""',
        '"abc" ',
    ):
        lines = [head, *plain[:150], plain[150][:-1] + odd, *plain[151:], "", ""]
        (tmp_path / "e.csv").write_text("\n".join(lines) + "\n\n")
        data = prepared(tmp_path, events=[tmp_path / "e.csv"])
        assert (data.n_events, data.said) == (200, []), odd
    (tmp_path / "e.csv").write_text("\n".join([head, *plain, plain[0][:-1] + '"' + "a\n" * 30 + '"', ""]))
    assert (
        sum(
            "the row in line 202 spans 31 lines" in note
            for note in prepared(tmp_path, events=[tmp_path / "e.csv"]).said
        )
        == 1
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "user_id,item_id\n1,a\n".encode("utf-16"), "is UTF-16"),
        ("a.csv", "user_id,item_id,na\u00efve\n1,a,b\n".encode("latin-1"), "is not UTF-8: its first line"),
        ("a.jsonl", b'[{"user_id": 1, "item_id": "a"}]', "one JSON array.*jq"),
        ("a.jsonl", b"user_id,item_id\n1,a\n", "no JSON object per line, but 'user_id,item_id'"),
    ],
)
def test_text_that_is_none_of_ours_says_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"(?s){message}"):
        prepared(tmp_path, events=[tmp_path / name])


def test_parts_may_be_empty_pipes_or_without_a_value(tmp_path):
    folder = tmp_path / "F"
    folder.mkdir()
    pq.write_table(rows(), folder / "a.parquet")
    for name in ("b.parquet", "c.csv", "d.jsonl"):
        (folder / name).touch()
    os.mkfifo(folder / "e.csv")
    os.symlink("f.csv", folder / "f.csv")
    (folder / "g.json").write_text('[{"user_id": 1}]')
    data = prepared(tmp_path, events=[folder])
    assert data.n_events == 200
    for words in ("3 files", "empty", "not a regular file", "a broken link", "one JSON document"):
        assert any(words in note for note in data.said), words
    shutil.rmtree(folder)
    folder.mkdir()
    for name, with_value in (("a", True), ("b", False)):
        lines = [{**row, **({"value": 3} if with_value else {})} for row in rows().to_pylist()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepared(tmp_path, events=[folder]).n_events == 400, "what a line lacks is null"


def test_folders_above_the_one_that_is_named_say_nothing(tmp_path):
    for above in ("value=5/event=sale/run", "run/event=sale"):
        folder = tmp_path / above
        folder.mkdir(parents=True)
        pq.write_table(rows(), folder / "a.parquet")
        data = prepared(tmp_path / above.partition("/")[0], events=[folder])
        assert data.event_types == (["interaction"] if above.endswith("run") else ["sale"])
        assert {float(value) for shard in data.shards() for value in shard.value} == {1.0}


def test_words_for_nothing_are_nothing_in_text_files_and_a_note_elsewhere(tmp_path):
    text = [f"{u},i{n % 7},{T + n * DAY}" for u in range(20) for n in range(10)]
    (tmp_path / "e.csv").write_text(
        "\n".join(["user_id,item_id,timestamp", *text, f"NULL,i1,{T}", f"\\N,i1,{T}", "3,i1,NULL", ""])
    )
    data = prepared(tmp_path, "data.max_invalid_fraction=0.1", events=[tmp_path / "e.csv"])
    assert data.manifest["reasons"] == {"user_id is null": 2, "time is null": 1} and data.n_users == 20
    assert pa.types.is_integer(data.user_type)
    table = rows().set_column(
        0, "user_id", pa.array(["nan" if n % 20 == 0 else str(n % 20) for n in range(200)])
    )
    assert any(
        note.startswith("10 events have an id such as 'nan'") for note in written(tmp_path, table).said
    )


def test_whole_numbers_that_pandas_wrote_with_a_point_are_the_same_ids(tmp_path):
    for name, point in (("a", ""), ("b", ".0")):
        text = [f"{u}{point},{n % 7}{point},{T + n * DAY}{point}" for u in range(20) for n in range(10)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["user_id,item_id,timestamp", *text, ""]))
    data = prepared(tmp_path, events=[tmp_path / "a.csv", tmp_path / "b.csv"])
    assert (data.n_users, data.n_items, data.n_events, data.manifest["duplicates"]) == (20, 7, 400, 200)
    assert any("values such as 7.0" in note for note in data.said)


def test_one_odd_id_makes_all_text_and_is_said(tmp_path):
    for name, point in (("a", ""), ("b", ".0")):
        text = [f"{u}{point},{n % 7},{T + n * DAY}" for u in range(20) for n in range(10)]
        (tmp_path / f"{name}.csv").write_text(
            "\n".join(["user_id,item_id,timestamp", *text, *(["abc,1,1709251200"] if point else []), ""])
        )
    data = prepared(tmp_path, events=[tmp_path / "a.csv", tmp_path / "b.csv"])
    assert data.n_users == 21 and str(data.user_type) == "string"
    assert any("user_id: 1 of 401 ids are not whole numbers, for example 'abc'" in note for note in data.said)


def test_words_for_nothing_are_no_events_names_or_categories(tmp_path):
    text = [
        f"{u},i{n % 3},{T + n * DAY},{['NULL', 'view'][n % 2]},{['None', f'e{u}-{n}'][n % 2]}"
        for u in range(20)
        for n in range(10)
    ]
    (tmp_path / "e.csv").write_text("\n".join(["user_id,item_id,timestamp,event,event_id", *text, ""]))
    (tmp_path / "i.csv").write_text("item_id,brand\ni0,NULL\ni1,\\N\ni2,acme\n")
    data = prepared(
        tmp_path,
        f"data.items={tmp_path / 'i.csv'}",
        "data.features={brand: categorical}",
        events=[tmp_path / "e.csv"],
    )
    assert set(data.event_types) == {"view", "interaction"} and data.items["brand"].to_pylist() == [
        None,
        None,
        "acme",
    ]


def test_an_invalid_row_gives_dates_no_time_of_day(tmp_path):
    text = [f"{u},i{n % 7},2024-03-{1 + n:02}" for u in range(20) for n in range(9)]
    (tmp_path / "e.csv").write_text(
        "\n".join(["user_id,item_id,timestamp", *text, "3,,2024-03-05 12:00:00", ""])
    )
    data = prepared(tmp_path, events=[tmp_path / "e.csv"])
    assert data.manifest["bad_rows"] == 1 and data.as_of_s == T + 9 * DAY - 1


def test_rows_that_differ_in_what_is_kept_less_exactly_are_not_the_same(tmp_path):
    one = {
        "user_id": [1] * 400,
        "item_id": ["a"] * 400,
        "timestamp": [T + n // 100 * DAY for n in range(400)],
    }
    for overrides in (
        {"page": [f"p{n}" for n in range(400)]},
        {"value": [16_777_216.0 + n for n in range(400)]},
        {"position": list(range(400))},
        {"timestamp": pa.array([(T + n // 100 * DAY) * 10**9 + n for n in range(400)], pa.timestamp("ns"))},
    ):
        context = ["data.context=[page]"] if "page" in overrides else []
        data = written(
            tmp_path,
            pa.table({**one, **overrides}),
            "data.duplicates=drop",
            "split.kind=leave_one_out",
            *context,
        )
        assert (data.n_events, data.manifest["duplicates"]) == (400, 0), overrides.keys()
    assert written(tmp_path, pa.table(one), "data.duplicates=drop", "split.kind=leave_one_out").n_events == 4


def test_the_least_value_is_compared_as_values_are_kept(tmp_path):
    table = rows().append_column("value", pa.array([0.7, 0.6] * 100))
    assert written(tmp_path, table, "data.min_value=0.7").n_events == 100


def test_what_is_no_text_table_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("")
    (tmp_path / "b.csv").write_text("user_id,user_id,item_id\n1,1,1\n")
    (tmp_path / "c.csv").write_bytes("user_id,item_id,timestamp\ncafé,1,2024-03-01\n".encode("latin-1"))
    (tmp_path / "d.parquet").write_bytes(gzip.compress(b"PAR1"))
    for name, message in (
        ("a.csv", "is empty"),
        ("b.csv", "names 'user_id' twice"),
        ("c.csv", "not UTF-8"),
        ("d.parquet", "compressed by gzip"),
    ):
        with pytest.raises(DataError, match=message):
            prepared(tmp_path, events=[tmp_path / name])


def test_rows_that_say_the_same_are_counted_and_dropped_where_asked(tmp_path):
    table = pa.concat_tables([rows(), rows().slice(10, 30), rows().slice(12, 3)])
    kept = written(tmp_path, table)
    assert (kept.n_events, kept.manifest["duplicates"]) == (233, 33) and any(
        "33 events equal another" in note for note in kept.said
    )
    dropped = written(tmp_path, table, "data.duplicates=drop")
    assert (dropped.n_events, dropped.manifest["duplicates"]) == (200, 33) and histories(
        dropped
    ) == histories(written(tmp_path, rows()))
    other = pa.concat_tables(
        [
            rows().append_column("value", pa.array([1.0] * 200)),
            rows().append_column("value", pa.array([2.0] * 200)),
        ]
    )
    assert written(tmp_path, other, "data.duplicates=drop").n_events == 400


def test_worth_less_than_asked_is_left_out_and_what_is_worth_nothing_is_said(tmp_path):
    table = rows().append_column("value", pa.array([-1.0, 0.0, 1.0, 2.0] * 50))
    notes = "\n".join(written(tmp_path, table).said)
    assert "50 events have a value below 0 (returns?) and are history, but no targets" in notes
    assert "50 events have a value of 0 and count like all others" in notes
    data = written(tmp_path, table, "data.min_value=1")
    assert (data.n_events, data.manifest["low_rows"], data.said) == (100, 100, [])


@pytest.mark.parametrize("mapped", [True, False])
def test_what_the_endpoint_received_and_the_log_has_too_counts_once(tmp_path, mapped):
    """Thirteen events, five of them in both."""
    events = [{"user_id": 7, "item_id": f"i{n}", "event": "view", "value": 1.0} for n in range(13)]
    log = open_log("sqlite", tmp_path / "root")
    for n in range(8, 13):  # the endpoint names them all; their times are a little off where they have names
        log.append(
            [
                Entry(
                    "event",
                    make_key("7", f"e{n}"),
                    "7",
                    T + n * 60 + (0.25 if not mapped else 3.0),
                    {k: v for k, v in events[n].items() if k != "user_id"},
                )
            ]
        )
    log.append([Entry("event", "drawn", "7", T + 10_000, {"item_id": "i12", "event": "view", "value": 1.0})])
    collecting.collect(Storage(tmp_path / "root"), log)
    log.close()
    table = pa.Table.from_pylist(
        [{**event, "timestamp": T + n * 60, "event_id": f"e{n}"} for n, event in enumerate(events)]
    )
    data = written(
        tmp_path, table if mapped else table.drop_columns(["event_id"]), "split.kind=leave_one_out"
    )
    assert (data.n_events, data.manifest["told_twice"]) == (14, 5), (
        "thirteen, and one that the log does not have"
    )
    assert [t for _, t, _ in histories(data)[7]] == [*(T + n * 60 for n in range(13)), T + 10_000], (
        "the log's word counts"
    )


def test_a_return_of_the_log_is_one_though_the_endpoint_received_a_purchase(tmp_path):
    log = open_log("sqlite", tmp_path / "root")
    for n in range(3):
        log.append(
            [
                Entry(
                    "event",
                    f"drawn{n}",
                    "7",
                    T + n * 60,
                    {"item_id": f"i{n}", "event": " " if n == 2 else "view", "value": 1.0},
                )
            ]
        )
    collecting.collect(Storage(tmp_path / "root"), log)
    log.close()
    table = pa.table(
        {
            "user_id": [7] * 3,
            "item_id": ["i0", "i1", "i9"],
            "timestamp": [T, T + 60, T],
            "event": ["view"] * 3,
            "value": [0.0, 2, 2],
        }
    )
    data = written(tmp_path, table, "split.kind=leave_one_out", "data.min_value=1")
    assert (data.n_events, data.manifest["told_twice"], data.manifest["low_rows"]) == (3, 2, 1)
    assert data.event_types == ["view", "interaction"] and data.items["events"].to_pylist() == [0, 1, 1, 1], (
        "i0 was sent back"
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_of_events_and_contexts_are_whole_numbers_however_pandas_wrote_them(tmp_path, kind):
    log = open_log("sqlite", tmp_path / "root")
    log.append([Entry("event", make_key("7", "1003"), "7", T, {"item_id": "i3", "event": "1", "value": 1.0})])
    collecting.collect(Storage(tmp_path / "root"), log)
    log.close()
    table = pa.table(
        {
            "user_id": [7] * 5,
            "item_id": [f"i{n}" for n in range(5)],
            "timestamp": [T + 100 + n for n in range(5)],
            "event": [1.0, 1.0, 2.0, 1.0, 1.0],
            "event_id": pa.array([1000.0, None, 1002.0, 1003.0, 1004.0]),
            "device": pa.array([3.0, None, 3.0, 4.0, 4.0]),
        }
    )
    if kind == "csv":
        pacsv.write_csv(
            table.set_column(3, "event", pa.array(["1.0", "1.0", "2.0", "1.0", "1.0"])), tmp_path / "e.csv"
        )
        text = (tmp_path / "e.csv").read_text()
        (tmp_path / "e.csv").write_text(
            re.sub(
                r"(?<=,)(\d+)(?=,|\n)", lambda match: match[1] if len(match[1]) > 6 else f"{match[1]}.0", text
            )
        )
    else:
        (tmp_path / "e.jsonl").write_text("".join(json.dumps(one) + "\n" for one in table.to_pylist()))
    data = prepared(
        tmp_path, "split.kind=leave_one_out", "data.context=[device]", events=[tmp_path / f"e.{kind}"]
    )
    assert (data.n_events, data.manifest["told_twice"], data.event_types) == (5, 1, ["1", "2"])
    assert {int(one) for shard in data.shards() for one in shard.context["device"]} == {
        0,
        encode_value("device", 3),
        encode_value("device", 4),
    }


def test_a_log_of_dates_includes_the_events_that_the_endpoint_received_that_day(tmp_path):
    log = open_log("sqlite", tmp_path / "root")
    for n, hour in ((0, 9), (1, 23), (2, 25)):  # Tokyo's day begins at 15 UTC
        log.append(
            [
                Entry(
                    "event",
                    f"drawn{n}",
                    "7",
                    T + hour * 3600,
                    {"item_id": f"i{n}", "event": "view", "value": 1.0},
                )
            ]
        )
    collecting.collect(Storage(tmp_path / "root"), log)
    log.close()
    days = [dt.date(2024, 3, 1), dt.date(2024, 3, 2), dt.date(2024, 3, 3)]
    table = pa.table(
        {"user_id": [7] * 3, "item_id": ["i0", "i1", "i2"], "timestamp": days, "event": ["view"] * 3}
    )
    data = written(tmp_path, table, "split.kind=leave_one_out", "data.timezone=Asia/Tokyo")
    assert (data.n_events, data.manifest["told_twice"]) == (4, 2), (
        "i2 was told on the second, the log has it on the third"
    )


@pytest.mark.parametrize(
    ("texts", "setting", "expected", "noted"),
    [
        (["a|b", "c, d", None], None, [["a", "b"], ["c, d"], None], True),
        (["a, b,c", "d", ""], None, [["a", "b", "c"], ["d"], None], True),
        (["a;b", "c", "d"], None, [["a", "b"], ["c"], ["d"]], True),
        (["Smith, J.", "b", "c"], "|", [["Smith, J."], ["b"], ["c"]], False),
        (["a / b", "c", "d"], " / ", [["a", "b"], ["c"], ["d"]], False),
        (['["a", "b, c"]', "[]", '["d"]'], None, [["a", "b, c"], [], ["d"]], False),
        (["['a', 'b, c']", "[]", "['d']"], None, [["a", "b, c"], [], ["d"]], False),
        (["a, b", "c, d", "x|y"], None, [["a", "b"], ["c", "d"], ["x|y"]], True),
    ],
)
def test_values_of_a_multi_feature_are_lists(tmp_path, texts, setting, expected, noted):
    pq.write_table(
        pa.table({"item_id": ["i0", "i1", "i2"], "tags": pa.array(texts, pa.string())}),
        tmp_path / "items.parquet",
    )
    overrides = [
        f"data.items={tmp_path / 'items.parquet'}",
        "data.features={tags: multi}",
        *([f"data.separator={setting}"] if setting else []),
    ]
    data = written(tmp_path, rows(), *overrides)
    assert data.items["tags"].to_pylist()[:3] == expected
    assert any("taken as the separator" in note for note in data.said) == noted


# what a time is


@pytest.mark.parametrize(
    ("unit", "of"),
    [
        ("s", lambda t: t), ("ms", lambda t: t * 1000), ("us", lambda t: t * 10**6),
        ("ns", lambda t: t * 10**9),
        ("date", lambda t: int(dt.datetime.fromtimestamp(t, dt.UTC).strftime("%Y%m%d%H%M%S"))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_unit_of_whole_numbers_is_seen_and_said(tmp_path, unit, of, kind):
    table = rows()
    table = table.set_column(
        2, "timestamp", pa.array([of(t) for t in table["timestamp"].to_pylist()], pa.int64())
    )
    if kind == "csv":
        pacsv.write_csv(table, tmp_path / "log.csv")
        data = prepared(tmp_path, events=[tmp_path / "log.csv"])
    else:
        data = written(tmp_path, table)
    assert histories(data) == histories(written(tmp_path, rows()))
    assert any(f"data.time_unit={unit}" in note for note in data.said) == (unit != "s")
    assert written(tmp_path, table, f"data.time_unit={unit}").said == []


def test_numbers_are_the_same_times_in_a_column_of_text(tmp_path):
    days = [f"2024030{1 + n % 9}" for n in range(200)]
    digits = written(tmp_path, rows().set_column(2, "timestamp", pa.array(days)))
    assert digits.as_of_s == T + 9 * DAY - 1 and any("digits of a date" in note for note in digits.said)
    mixed = pa.array([day if n % 4 else f"{day[:4]}-{day[4:6]}-{day[6:]}" for n, day in enumerate(days)])
    assert histories(written(tmp_path, rows().set_column(2, "timestamp", mixed))) == histories(digits)
    milli = [str((T + n * DAY // 20) * 1000) for n in range(199)] + [""]
    data = written(tmp_path, rows().set_column(2, "timestamp", pa.array(milli)))
    assert data.as_of_s == T + 198 * DAY // 20 and data.manifest["reasons"] == {"time is null": 1}
    with pytest.raises(DataError, match="data.time_unit=days"):
        written(
            tmp_path, rows().set_column(2, "timestamp", pa.array([str(19_783 + n % 9) for n in range(200)]))
        )


@pytest.mark.parametrize("of", [1, 1000])
def test_a_number_that_its_unit_puts_long_ago_is_no_time(tmp_path, of):
    times = [(T + n * DAY // 20) * of for n in range(200)]
    times[7] = T if of > 1 else 0
    data = written(tmp_path, rows().set_column(2, "timestamp", pa.array(times)))
    assert data.manifest["bad_rows"] == 1 and "before 1990" in next(iter(data.manifest["reasons"]))
    times[:20] = [times[7]] * 20
    with pytest.raises(TooManyInvalidRowsError, match="for example user_id"):
        written(tmp_path, rows().set_column(2, "timestamp", pa.array(times)))


@pytest.mark.parametrize("odd", [0, 1_709_251_200])
def test_an_invalid_time_gives_dates_no_time_of_day(tmp_path, odd):
    days = [20240301 + n % 10 for n in range(199)] + [odd]
    assert written(tmp_path, rows().set_column(2, "timestamp", pa.array(days))).as_of_s == T + 10 * DAY - 1


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([dt.date(9999, 12, 31), dt.date(1950, 1, 1), None]), ["late", -631_152_000, None]),
        (pa.array(["20290101", "2024-03-01", ""]), [1_861_920_000, T, None]),
        (pa.array(["1709251200000", "1709251201000", None]), [T, T + 1, None]),
        (pa.array([float(T), float("nan"), -86_400.0]), [T, None, -86_400]),
        (pa.array([5_680_281_600_000, 0, None], pa.timestamp("ms")), ["late", 0, None]),
        (pa.array(["2020", "2021", "2022"]), None),
    ],
)
def test_what_is_released_far_away_is_not_released_long_ago(tmp_path, column, expected):
    pq.write_table(pa.table({"item_id": ["i0", "i1", "i2"], "born": column}), tmp_path / "items.parquet")
    overrides = (f"data.items={tmp_path / 'items.parquet'}", "data.available_from=born")
    if expected is None:
        with pytest.raises(DataError, match="years alone are not enough"):
            written(tmp_path, rows(), *overrides)
        return
    released_s = written(tmp_path, rows(), *overrides).items["released_s"].to_pylist()[:3]
    assert [
        ("late" if said is not None and said >= MAX_US // 10**6 else said) for said in released_s
    ] == expected


@pytest.mark.parametrize(("unit", "size"), [("days", DAY), ("hours", 3600), ("minutes", 60)])
def test_a_unit_that_is_in_doubt_is_refused_with_what_would_make_sense(tmp_path, unit, size):
    table = rows().set_column(2, "timestamp", pa.array([t // size for t in rows()["timestamp"].to_pylist()]))
    with pytest.raises(DataError, match=f"data.time_unit={unit} if they are {unit}"):
        written(tmp_path, table)
    data = written(tmp_path, table, f"data.time_unit={unit}")
    assert {t for history in histories(data).values() for _, t, _ in history} == {
        t // size * size for t in rows()["timestamp"].to_pylist()
    }


def test_numbers_that_are_no_time_are_refused_but_for_who_says_so(tmp_path):
    table = rows().set_column(2, "timestamp", pa.array(range(200)))
    with pytest.raises(DataError, match="(?s)whole numbers from 0 to 199.*1970-01-01.*data.columns.position"):
        written(tmp_path, table)
    assert written(tmp_path, table, "data.time_unit=s").as_of_s == 199
    seconds_as_ns = rows().set_column(
        2, "timestamp", pa.array(rows()["timestamp"].to_pylist(), pa.timestamp("ns"))
    )
    with pytest.raises(DataError, match="the newest event is of 1970-01-01"):
        written(tmp_path, seconds_as_ns)
    folder = tmp_path / "log"
    folder.mkdir()
    pq.write_table(rows(), folder / "a.parquet")
    pq.write_table(rows(first=T * 1000), folder / "b.parquet")
    with pytest.raises(
        DataError, match="b.parquet: timestamp holds milliseconds since 1970, .*a.parquet seconds"
    ):
        prepared(tmp_path, events=[folder])


def test_a_few_times_of_the_future_are_invalid_rows_and_many_refuse_the_run(tmp_path):
    late = int(dt.datetime.now(dt.UTC).timestamp()) + 5 * 365 * DAY
    times = rows()["timestamp"].to_pylist()
    data = written(tmp_path, rows().set_column(2, "timestamp", pa.array([late, late, *times[2:]])))
    assert (data.n_events, data.as_of_s) == (198, max(times)) and any(
        "2 × time is in the future" in note for note in data.said
    )
    with pytest.raises(RefusedError, match="20 of 200 events have times in the future"):
        written(tmp_path, rows().set_column(2, "timestamp", pa.array([late] * 20 + times[20:])))
    assert (
        written(
            tmp_path,
            rows().set_column(2, "timestamp", pa.array([late] * 20 + times[20:])),
            as_of=dt.datetime(2024, 12, 1, tzinfo=dt.UTC),
        ).n_events
        == 180
    )


@pytest.mark.parametrize("span", [1, 3600])
def test_what_is_popular_in_a_log_of_one_day_goes_by_counts(tmp_path, span):
    item = [f"i{n % 10}" for n in range(50)] + ["i7"] * 50
    table = pa.table(
        {
            "user_id": [n % 25 for n in range(100)],
            "item_id": item,
            "timestamp": [T + 5 * 3600 + n % span for n in range(100)],
        }
    )
    data = written(tmp_path, table, "split.kind=leave_one_out")
    popular = data.popularity.fallback_counts(data.now_s, 7)
    assert popular[1:].tolist() == data.items["events"].to_pylist() and popular.argmax() == 8


@pytest.mark.parametrize(
    ("times", "zone", "ends"),
    [
        (pa.array([dt.date(2024, 3, 1 + n % 9) for n in range(200)]), None, "2024-03-10T00:00:00+00:00"),
        (pa.array([f"2024-03-{1 + n % 9:02d}" for n in range(200)]), None, "2024-03-10T00:00:00+00:00"),
        (pa.array([20240301 + n % 9 for n in range(200)]), None, "2024-03-10T00:00:00+00:00"),
        (pa.array([dt.datetime(2024, 3, 1 + n % 9) for n in range(200)]), None, "2024-03-10T00:00:00+00:00"),
        (
            pa.array([dt.date(2024, 3, 1 + n % 9) for n in range(200)]),
            "Europe/Berlin",
            "2024-03-10T00:00:00+01:00",
        ),
    ],
)
def test_a_log_of_dates_ends_with_its_last_day(tmp_path, times, zone, ends):
    data = written(
        tmp_path, rows().set_column(2, "timestamp", times), *([f"data.timezone={zone}"] if zone else [])
    )
    assert data.now_s == int(dt.datetime.fromisoformat(ends).timestamp())
    if zone is None:
        assert data.popularity.window(data.now_s, 1).sum() == sum(
            t == times[8].as_py() for t in times.to_pylist()
        ), "its last day counts"


def test_times_without_a_zone_have_one_rule(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    naive = [dt.datetime(2024, 7, 1 + n % 9, 12) for n in range(200)]
    pq.write_table(rows().set_column(2, "timestamp", pa.array(naive)), folder / "a.parquet")
    pq.write_table(
        rows().set_column(
            2, "timestamp", pa.array([t.replace(tzinfo=dt.UTC) for t in naive], pa.timestamp("us", "UTC"))
        ),
        folder / "b.parquet",
    )
    mixed = prepared(tmp_path, events=[folder])
    assert any("without a zone" in note and "data.timezone" in note for note in mixed.said)
    said = prepared(tmp_path, "data.timezone=America/New_York", events=[folder])
    assert said.said == [] and {t % DAY for history in histories(said).values() for _, t, _ in history} == {
        12 * 3600,
        16 * 3600,
    }
    with pytest.raises(SettingsError, match="Europe/Berlin"):
        load_settings(None, ["data.timezone=Europe/Berlim"])


def test_an_as_of_needs_times(tmp_path):
    with pytest.raises(SettingsError, match="--as-of"):
        written(
            tmp_path,
            rows().rename_columns(["user_id", "item_id", "position"]),
            "split.kind=leave_one_out",
            as_of=dt.datetime.now(dt.UTC),
        )


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40),
    st.sampled_from([*UNITS, "ns", "date"]),
)
def test_any_whole_number_is_a_time_in_range_or_outside(values, unit):
    us = integers_to_us(np.array(values, np.int64), unit)
    for value, parsed in zip(values, us.tolist(), strict=True):
        if unit in UNITS:
            assert parsed == (value * UNITS[unit] if 0 <= value * UNITS[unit] <= MAX_US else OUT_OF_RANGE)
        else:
            assert parsed == OUT_OF_RANGE or 0 <= parsed <= MAX_US


@given(
    st.lists(st.datetimes(dt.datetime(1990, 1, 2), dt.datetime(2099, 12, 30)), min_size=1, max_size=30),
    st.sampled_from(INFERRED_UNITS),
)
def test_the_unit_that_is_seen_is_the_one_that_was_meant(moments, unit):
    seconds = [int(moment.replace(tzinfo=dt.UTC).timestamp()) for moment in moments]
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    meant = [
        int(m.strftime("%Y%m%d%H%M%S")) if unit == "date" else s * factor[unit]
        for m, s in zip(moments, seconds, strict=True)
    ]
    assert infer_unit(np.array(meant, np.int64)) == unit
    assert (integers_to_us(np.array(meant, np.int64), unit) // 10**6).tolist() == seconds


@given(
    st.lists(
        st.one_of(
            st.none(), st.datetimes(dt.datetime(1971, 1, 1), dt.datetime(2099, 1, 1)), st.text(max_size=12)
        ),
        min_size=1,
        max_size=20,
    ),
    st.data(),
)
def test_text_is_the_time_that_it_writes_or_none(values, data):
    said, expected = [], []
    for value in values:
        if isinstance(value, dt.datetime):
            hours = data.draw(st.integers(-12, 14))
            form = data.draw(st.sampled_from(["iso", "blank", "Z", "offset", "date"]))
            moment = value.replace(microsecond=value.microsecond if form == "iso" else 0)
            expected.append(moment.replace(tzinfo=dt.UTC))
            if form == "date":
                expected[-1] = dt.datetime(value.year, value.month, value.day, tzinfo=dt.UTC)
            text = {
                "iso": moment.isoformat(),
                "blank": str(moment),
                "Z": moment.isoformat() + "Z",
                "date": str(moment.date()),
            }
            text["offset"] = (
                moment.replace(tzinfo=dt.UTC).astimezone(dt.timezone(dt.timedelta(hours=hours))).isoformat()
            )
            said.append(text[form])
        else:
            said.append(value)
            expected.append(None)
    times = TimeRule().read(pa.chunked_array([pa.array(said, pa.string())]))
    for text, want, us in zip(said, expected, times.us.to_pylist(), strict=True):
        if want is not None:
            assert us == round(want.timestamp() * 10**6), text


# order, baskets and what is learned


def test_parts_are_read_in_natural_order(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    for number in range(12):
        pq.write_table(
            pa.table({"user_id": [1], "item_id": [f"i{number}"], "timestamp": [T]}),
            folder / f"part-{number}.parquet",
        )
    data = prepared(tmp_path, "split.kind=leave_one_out", events=[folder])
    assert [item for item, *_ in histories(data)[1]] == [f"i{number}" for number in range(12)]


@given(
    st.lists(
        st.text(string.ascii_letters + string.digits + "-_./ =%é", min_size=1, max_size=12),
        unique=True,
        max_size=30,
    ),
    st.randoms(),
)
def test_the_order_of_names_is_one_whatever_they_are(names, random):
    shuffled = random.sample(names, len(names))
    assert sorted(shuffled, key=natural_key) == sorted(names, key=natural_key)
    numbers = [f"x{n}" for n in range(12)]
    assert sorted(numbers, key=natural_key) == numbers


def test_position_orders_what_has_one_time(tmp_path):
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "user_id": np.repeat(np.arange(40), 20),
            "item_id": [f"i{n % 20}" for n in range(800)],
            "timestamp": [dt.date(2024, 3, 1 + n % 20 // 5) for n in range(800)],
            "position": [n % 5 for n in range(800)],
        }
    )
    data = written(tmp_path, table.take(random.permutation(800)), "split.kind=leave_one_out")
    for history in histories(data).values():
        assert [item for item, *_ in history] == [f"i{n}" for n in range(20)]


def test_a_basket_id_that_begins_anew_every_day_is_another_basket(tmp_path):
    users, days = 40, 8
    user, day, number = (
        a.ravel() for a in np.meshgrid(np.arange(users), np.arange(days), np.arange(3), indexing="ij")
    )
    table = pa.table(
        {
            "user_id": user,
            "item_id": [f"i{n % 11}" for n in range(len(user))],
            "timestamp": T + day * DAY + number * 60 + user,
            "basket": [f"b{n}" for n in number % 2],
        }
    )
    data = written(tmp_path, table)
    cut = data.cut_s("test")
    for shard in data.shards():
        for row in range(len(shard)):
            times = shard.history(row).timestamp_s
            assert (np.diff(times) >= 0).all()
            assert (times[: shard.train_lengths[row]] < cut).all()
    assert baskets(data, 3) == [n for n in range(3 * days)], "b0, b1, b0 of a day are three"


@pytest.mark.parametrize("seed", range(200))
def test_nothing_at_or_after_a_cut_is_learned_whatever_the_baskets(tmp_path, seed):
    random = np.random.default_rng(seed)
    count, step = 400, int(random.choice([1, 3600, DAY]))
    table = pa.table(
        {
            "user_id": random.integers(0, 30, count),
            "item_id": [f"i{n}" for n in random.integers(0, 20, count)],
            "timestamp": T + random.integers(0, 20 * DAY, count) // step * step,
            "basket": pa.array(
                random.integers(0, random.choice([2, 10, 100]), count),
                mask=random.random(count) < random.choice([0, 0.3]),
            ),
            "position": random.integers(0, 50, count),
        }
    )
    if random.random() < 0.5:
        table = table.drop_columns(["position"])
    data = written(
        tmp_path,
        table,
        f"data.basket_gap={random.choice([0, 600, 21_600, 10**7])}",
        f"split.seed={seed}",
        "split.validation_users=0.5",
        f"data.shards={1 + seed % 2}",
    )
    validation, test = data.cut_s("validation"), data.cut_s("test")
    users = learned = 0
    for shard in data.shards():
        for row, (train_end, validation_end, test_start, test_end) in enumerate(shard.split.tolist()):
            times = shard.history(row).timestamp_s
            assert (np.diff(times) >= 0).all()
            assert (times[:train_end] < (validation if validation_end > train_end else test)).all()
            assert (times[train_end:validation_end] >= validation).all() and (
                times[train_end:validation_end] < test
            ).all()
            assert (times[:test_start] < test).all() and (times[test_start:test_end] >= test).all()
            users, learned = users + 1, learned + train_end
    assert users == len(set(table["user_id"].to_pylist())) and learned > 0


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2), st.sampled_from(["a", "b", None])),
        min_size=4,
        max_size=40,
    ),
    st.permutations(range(4)),
)
def test_the_parts_of_a_log_may_be_cut_anywhere(tmp_path_factory, events, cut):
    """The same rows in one file and in several, in the order of their names, are the same histories."""
    tmp_path = tmp_path_factory.mktemp("parts")
    table = pa.table(
        {
            "user_id": [e[0] for e in events],
            "item_id": [f"i{e[1]}" for e in events],
            "timestamp": [T + DAY * e[2] for e in events],
        }
    )
    table = table.append_column("basket", pa.array([e[3] for e in events], pa.string()))
    whole = written(tmp_path, table, "split.kind=leave_one_out")
    folder = tmp_path / "log"
    folder.mkdir()
    edges = [0, *sorted({1 + c * len(events) // 5 for c in cut}), len(events)]
    for number, (first, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if end > first:
            pq.write_table(table.slice(first, end - first), folder / f"part-{number}.parquet")
    parts = prepared(tmp_path, "split.kind=leave_one_out", events=[folder])
    assert histories(parts) == histories(whole)
    assert [shard.basket.tolist() for shard in parts.shards()] == [
        shard.basket.tolist() for shard in whole.shards()
    ]


def test_inspect_is_what_validate_sees(tmp_path):
    (tmp_path / "log.csv").write_text("who,what,when\n1,a,yesterday\n2,b,today\n")
    with pytest.raises(DataError, match="'yesterday', which is not a time"):
        inspect_input(
            load_settings(
                None,
                [
                    f"data.events=[{tmp_path / 'log.csv'}]",
                    "data.columns={user_id: who, item_id: what, timestamp: when}",
                ],
            )
        )
