"""The event store in a sqlite file, for one machine and several processes: write-ahead log, synchronous
FULL.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recray.errors import StateError
from recray.events.items import ItemChange, merge_changes
from recray.events.log import CONFLICT, DUPLICATE, MAX_RECENT, Entry, Kind, Log

BUSY_S = 10.0

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
    number INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, key TEXT NOT NULL, user TEXT,
    at_s REAL NOT NULL, body TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS log_key ON log (key, kind);
CREATE INDEX IF NOT EXISTS log_user ON log (user, number) WHERE kind = 'event';
CREATE TABLE IF NOT EXISTS items (item TEXT PRIMARY KEY, number INTEGER NOT NULL, change TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS items_number ON items (number);
CREATE TABLE IF NOT EXISTS identity (name TEXT NOT NULL, one INTEGER PRIMARY KEY CHECK (one = 1));
"""
_INSERT = (
    "INSERT INTO log (kind, key, user, at_s, body) VALUES (?, ?, ?, ?, ?) ON CONFLICT (key, kind) DO NOTHING"
)
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_RECENT_OF = """
SELECT kind, key, user, at_s, body FROM (
    SELECT *, row_number() OVER (PARTITION BY user ORDER BY number DESC) AS place FROM log
    WHERE kind = 'event' AND user IN ({}) AND (number > ? OR at_s >= ?)
) WHERE place <= ? ORDER BY number
"""
_OUTCOMES_OF = """
DELETE FROM log WHERE kind IN ('outcome', 'set_aside') AND json_extract(body, '$.request_id') IN
    (SELECT key FROM log WHERE kind = 'decision' AND user = ?)
"""


class SqliteLog(Log):
    """`Log` in one file. One connection per thread; SQLite orders the writers, readers never wait for
    them.
    """

    is_fast = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        with self._wrap_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connection()
            connection.executescript(_SCHEMA)
            connection.execute("INSERT OR IGNORE INTO identity VALUES (?, 1)", (uuid.uuid4().hex,))
            self._identity = str(connection.execute("SELECT name FROM identity").fetchone()[0])

    @property
    def identity(self) -> str:
        return self._identity

    def append(self, entries: Sequence[Entry]) -> list[int]:
        rows = [(entry.kind, entry.key, entry.user, entry.at_s, _encode(entry.body)) for entry in entries]
        with self._transaction() as connection:
            before = connection.total_changes
            connection.execute("SAVEPOINT entries")
            connection.executemany(_INSERT, rows)
            if connection.total_changes - before == len(rows):  # all are new: their numbers follow each other
                (last,) = connection.execute("SELECT last_insert_rowid()").fetchone()
                return list(range(last - len(rows) + 1, last + 1))
            connection.execute("ROLLBACK TO entries")
            numbers: list[int] = []
            for entry, row in zip(entries, rows, strict=True):
                new = connection.execute(f"{_INSERT} RETURNING number", row).fetchone()
                numbers.append(new[0] if new else self._compare_stored(connection, entry))
        return numbers

    @staticmethod
    def _compare_stored(connection: sqlite3.Connection, entry: Entry) -> int:
        """Whether the stored entry of this key has the same body (DUPLICATE) or another one (CONFLICT)."""
        (body,) = connection.execute(
            "SELECT body FROM log WHERE key = ? AND kind = ?", (entry.key, entry.kind)
        ).fetchone()
        return DUPLICATE if json.loads(body) == json.loads(json.dumps(entry.body)) else CONFLICT

    def recent(self, user: str, after: int, from_s: float, limit: int = MAX_RECENT) -> list[Entry]:
        with self._wrap_errors():
            rows = self._connection().execute(
                "SELECT kind, key, user, at_s, body FROM log WHERE kind = 'event' AND user = ? AND (number "
                "> ? OR at_s >= ?) "
                "ORDER BY number DESC LIMIT ?",
                (user, after, from_s, min(limit, MAX_RECENT)),
            )
            return [_to_entry(row) for row in rows][::-1]

    def recent_of(
        self, users: Sequence[str], after: int, from_s: float, limit: int = MAX_RECENT
    ) -> dict[str, list[Entry]]:
        with self._wrap_errors():
            rows = self._connection().execute(
                _RECENT_OF.format(",".join("?" * len(users))), (*users, after, from_s, min(limit, MAX_RECENT))
            )
            entries: dict[str, list[Entry]] = {}
            for row in rows:
                entries.setdefault(row[2], []).append(_to_entry(row))
            return entries

    def has(self, kind: Kind, key: str) -> bool:
        with self._wrap_errors():
            return (
                self._connection()
                .execute("SELECT 1 FROM log WHERE key = ? AND kind = ?", (key, kind))
                .fetchone()
                is not None
            )

    def read(self, after: int, limit: int) -> list[tuple[int, Entry]]:
        with self._wrap_errors():
            rows = self._connection().execute(
                "SELECT number, kind, key, user, at_s, body FROM log WHERE number > ? ORDER BY number "
                "LIMIT ?",
                (after, limit),
            )
            return [(row[0], _to_entry(row[1:])) for row in rows]

    def last(self) -> int:
        with self._wrap_errors():
            row = self._connection().execute("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetchone()
            return int(row[0]) if row else 0

    def drop_through(self, through: int) -> None:
        with self._wrap_errors():
            self._connection().execute("DELETE FROM log WHERE number <= ?", (through,))

    def forget_user(self, user: str) -> int:
        with self._wrap_errors():
            self._connection().execute("PRAGMA secure_delete = ON")  # overwrite what is deleted
        with self._transaction() as connection:
            deleted = (
                connection.execute(_OUTCOMES_OF, (user,)).rowcount
                + connection.execute("DELETE FROM log WHERE user = ?", (user,)).rowcount
            )
        with self._wrap_errors():
            connection.execute("PRAGMA secure_delete = OFF")
            connection.execute(
                "PRAGMA wal_checkpoint(TRUNCATE)"
            )  # waits for readers, then empties the write-ahead log
        return int(deleted)

    def change_items(self, changes: Sequence[ItemChange]) -> None:
        with self._transaction() as connection:
            stored = {
                item: ItemChange.from_json(text)
                for key in {change.key for change in changes}
                for item, text in connection.execute("SELECT item, change FROM items WHERE item = ?", (key,))
            }
            number = self._last_change(connection) + 1
            rows = [(key, number, change.to_json()) for key, change in merge_changes(changes, stored).items()]
            connection.executemany("INSERT OR REPLACE INTO items VALUES (?, ?, ?)", rows)

    def read_items(self, after: int) -> tuple[int, list[ItemChange]]:
        with self._wrap_errors():
            connection = self._connection()
            rows = connection.execute(
                "SELECT number, change FROM items WHERE number > ?", (after,)
            ).fetchall()
            last = max(row[0] for row in rows) if rows else self._last_change(connection)
            return last, [ItemChange.from_json(text) for _, text in rows]

    @staticmethod
    def _last_change(connection: sqlite3.Connection) -> int:
        return int(connection.execute("SELECT ifnull(max(number), 0) FROM items").fetchone()[0])

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._local.connection = connection
            self._connections.append(connection)
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction, on disk when it ends, rolled back if it fails."""
        with self._wrap_errors():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _wrap_errors(self) -> Iterator[None]:
        """Raise StateError in place of errors of sqlite and the file system."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StateError(
                f"{self.path}: {error}", "free disk space and make it writable, or set serve.state"
            ) from error


def _to_entry(row: Sequence[object]) -> Entry:
    kind, key, user, at_s, body = row
    return Entry(kind, key, user, at_s, json.loads(str(body)))  # type: ignore[arg-type]
