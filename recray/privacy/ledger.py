"""What was spent of the privacy of a population, for the life of its data: an append-only list in a database.

A training reserves its steps and the release of its item counts before the first one, takes them piece by piece (a piece is on
disk before its first step), and commits. What a crash left is counted: the whole reservation until it is committed, then all
that was taken, released or not. A population is a set of users, known by salted hashes; it may grow, but nobody may be in two.

sqlite by default, where nodes share no file system Postgres (14 or later, `recray[postgres]`) by its URL. Nothing in it is secret but the salt.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from recray.config import sqlite_file
from recray.errors import MissingArtifactError, PrivacySpentError, RefusedError, StorageError
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, grouped, sigma_for

RESERVE, TAKE, COMMIT = "reserve", "take", "commit"
BATCH = 10_000
_CLOSE = "; recray privacy close frees what a training reserved that will not go on"

_schema = sa.MetaData()
_salt = sa.Table("salt", _schema, sa.Column("value", sa.LargeBinary, nullable=False))
_members = sa.Table(
    "members",
    _schema,
    sa.Column("user", sa.LargeBinary(16), primary_key=True),
    sa.Column("population", sa.String, nullable=False),
)
_entries = sa.Table(
    "entries",
    _schema,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.String, nullable=False),
    sa.Column("population", sa.String, nullable=False),
    sa.Column("run_key", sa.String, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("sigma", sa.Float, nullable=False),
    sa.Column("rate", sa.Float, nullable=False),
    sa.Column("clipping_norm", sa.Float, nullable=False),
    sa.Column("delta", sa.Float, nullable=False),
    sa.Column("users", sa.Integer, nullable=False),
    sa.Column("counts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("counts_sigma", sa.Float, nullable=False, server_default="0"),
    sa.Column("part", sa.Integer, nullable=False, server_default="0"),
    sa.Column("parts", sa.Integer, nullable=False, server_default="1"),
)
_LATER = ("counts", "counts_sigma", "part", "parts")  # columns of entries that a ledger of before does not have
_TABLES = ("entries", "members", "salt")
_REFUSE = "the ledger is append-only"
_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{action} BEFORE {action} ON {table} BEGIN SELECT RAISE(ABORT, '{_REFUSE}'); END"
        for table in _TABLES
        for action in ("update", "delete")
    ],
    "postgresql": [
        f"CREATE OR REPLACE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{_REFUSE}'; END $$",
        *(
            f"CREATE OR REPLACE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION append_only()"
            for table in _TABLES
        ),
    ],
}
_LOCK = 0x7265637261  # of Postgres, held while the tables are made


@dataclass(frozen=True)
class Run:
    """One training in the ledger: steps and releases of item counts, each reserved and taken, and whether it committed."""

    run_key: str
    mechanism: Mechanism
    reserved: int
    taken: int
    counts_reserved: int
    counts_taken: int
    committed: bool
    begun: str

    @property
    def counted(self) -> list[Steps]:
        """What is counted as spent."""
        steps, counts = (self.taken, self.counts_taken) if self.committed else (self.reserved, self.counts_reserved)
        return [Steps(self.mechanism.sigma, self.mechanism.rate, steps), *self.mechanism.releases(counts)]


class Ledger:
    """The ledger of one population in a database. Open it with `Ledger.open`."""

    def __init__(self, engine: Engine, population: str) -> None:
        self.engine, self.population = engine, population

    @classmethod
    def open(cls, url: str, population: str) -> Ledger:
        """Open a ledger, or begin it. Raises StorageError if the database cannot be used."""
        named: sa.URL | str = "(not a URL)"
        try:
            named = sa.engine.make_url(url)
            if named.drivername == "postgresql":
                named = named.set(drivername="postgresql+psycopg")
            engine = sa.create_engine(named)
            if engine.dialect.name not in _APPEND_ONLY:
                raise StorageError(f"privacy.ledger {named!r}: a ledger on {engine.dialect.name} is not known to last", "name sqlite or PostgreSQL")
            if engine.dialect.name == "sqlite":
                _durable(engine)
            with engine.begin() as connection:
                _begin(connection)
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            mend = 'pip install "recray[postgres]"' if getattr(error, "name", None) == "psycopg" else "mend the URL or the database"
            raise StorageError(f"privacy.ledger {named!r} cannot be opened: {error}", mend) from None
        return cls(engine, population)

    @classmethod
    def read(cls, url: str, population: str) -> Ledger:
        """Open one that is there. Raises MissingArtifactError if it is a file that is not."""
        file = sqlite_file(url)
        if file and not os.path.exists(file):
            raise MissingArtifactError(f"no ledger at {file}", "the first private training begins it")
        return cls.open(url, population)

    def admit(self, user_ids: Iterable[str]) -> int:
        """Note who is learned from; how many were not known. Raises RefusedError if one belongs to another population."""
        with self._alone() as connection:
            return self._admit(connection, user_ids)

    def reserve(self, run_key: str, mechanism: Mechanism, cap: float | None, done: int = 0, user_ids: Iterable[str] = ()) -> int:
        """Admit users, and make sure that the steps which `done` leaves of a training are reserved, and the counts that it begins
        with; how many steps were added. Refused, it leaves nothing behind.

        Raises PrivacySpentError, with what would fit, if all steps of the population together would pass ε `cap`; RefusedError if
        the run was begun with another mechanism, or in another ledger, or has ended, δ is larger than before, or one of the users belongs
        to another population.
        """
        with self._alone() as connection:
            self._admit(connection, user_ids)
            runs = self._runs(connection)
            mine = next((run for run in runs if run.run_key == run_key), None)
            if mechanism.delta > (pinned := min((run.mechanism.delta for run in runs), default=1.0)):
                raise RefusedError(
                    f"privacy.delta: {mechanism.delta:g}, but population {self.population} was promised {pinned:g}", f"set privacy.delta={pinned:g}"
                )
            if mine is not None and mine.mechanism != mechanism:
                raise RefusedError(
                    f"training {run_key} was begun with {mine.mechanism}, not with {mechanism}",
                    "go on as it was begun; other settings make another training",
                )
            if mine is None and done:
                raise RefusedError(
                    f"training {run_key} has taken {done} steps that this ledger does not know",
                    "name the ledger that it was begun with (privacy.ledger, privacy.population), or begin another training with another train.seed",
                )
            if mine is not None and mine.committed:
                raise RefusedError(
                    f"training {run_key} has committed, but what it made is gone", "train with another train.seed, which counts as another training"
                )
            reserved, taken = (mine.reserved, mine.taken) if mine else (0, 0)
            missing = max(taken + mechanism.steps - done - reserved, 0)
            counts = 0
            if mechanism.counts_sigma and not done:  # those of an attempt before went with it
                counts = max(1 + (mine.counts_taken - mine.counts_reserved if mine else 0), 0)
            if not (missing or counts):
                return 0
            wanted, released = Steps(mechanism.sigma, mechanism.rate, missing), mechanism.releases(counts)
            if cap is not None:
                theirs = [run for run in runs if run.mechanism.parts != mechanism.parts or run.mechanism.part == mechanism.part]
                before = _worst(theirs, mechanism.delta)
                if epsilon_of([*before, *released, wanted], mechanism.delta) > cap:
                    raise _over(cap, before, released, wanted, mechanism.delta)
            self._append(connection, run_key, RESERVE, missing, mechanism, counts)
            return missing

    def take(self, run_key: str, steps: int, counts: int = 0) -> None:
        """Note that steps are about to be taken, or counts to be released. Raises RefusedError if they were not reserved."""
        with self._alone() as connection:
            mine = self._one(connection, run_key)
            if mine.taken + steps > mine.reserved or mine.counts_taken + counts > mine.counts_reserved or mine.committed:
                ended = ", and committed" if mine.committed else ""
                what = f"training {run_key} took {mine.taken} of {mine.reserved} reserved steps{ended}; {steps} more are too many"
                if counts:
                    released = f"released its counts {mine.counts_taken} of {mine.counts_reserved} reserved times"
                    what = f"training {run_key} {released}{ended}; {counts} more is too many"
                raise RefusedError(what, "reserve them first")
            self._append(connection, run_key, TAKE, steps, mine.mechanism, counts)

    def commit(self, run_key: str) -> None:
        """End a training: what it took is spent, the rest of its reservation is free. A second time nothing happens."""
        with self._alone() as connection:
            mine = self._one(connection, run_key)
            if not mine.committed:
                self._append(connection, run_key, COMMIT, mine.taken, mine.mechanism)

    def runs(self) -> list[Run]:
        """The trainings of the population, as they began."""
        with self.engine.connect() as connection:
            return self._runs(connection)

    def spent(self) -> list[Steps]:
        """All steps that count, by mechanism: those of the user of whom most was learned, at the δ of the last training."""
        runs = self.runs()
        return _worst(runs, runs[-1].mechanism.delta) if runs else []

    def statement(self) -> dict[str, Any]:
        """What the population has spent, for a statement: trainings, and ε at the δ of the last one."""
        runs = self.runs()
        delta = runs[-1].mechanism.delta if runs else 0.0
        return {"population": self.population, "trainings": len(runs), "epsilon_of_all_trainings": round(epsilon_of(self.spent(), delta), 4)}

    def holds(self, run_key: str) -> bool:
        """Whether a training of this key was accounted for to its end."""
        return any(run.run_key == run_key and run.committed for run in self.runs())

    def members(self) -> int:
        """Users of the population."""
        with self.engine.connect() as connection:
            count = sa.select(sa.func.count()).select_from(_members).where(_members.c.population == self.population)
            return int(connection.execute(count).scalar_one())

    def _one(self, connection: Connection, run_key: str) -> Run:
        for run in self._runs(connection):
            if run.run_key == run_key:
                return run
        raise RefusedError(f"training {run_key} has reserved nothing", "reserve before the first step")

    def _runs(self, connection: Connection) -> list[Run]:
        rows = connection.execute(sa.select(_entries).where(_entries.c.population == self.population).order_by(_entries.c.number)).all()
        found: dict[str, list[Any]] = {}
        for row in rows:
            found.setdefault(row.run_key, []).append(row)
        return [_run(key, entries) for key, entries in found.items()]

    def _append(self, connection: Connection, run_key: str, kind: str, steps: int, mechanism: Mechanism, counts: int = 0) -> None:
        fields = {name: getattr(mechanism, name) for name in ("sigma", "rate", "clipping_norm", "delta", "users", "counts_sigma", "part", "parts")}
        at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        row = {"at": at, "population": self.population, "run_key": run_key, "kind": kind, "steps": steps, "counts": counts, **fields}
        connection.execute(sa.insert(_entries), row)

    def _admit(self, connection: Connection, user_ids: Iterable[str]) -> int:
        new = 0
        salt = self._salted(connection)
        for batch in _batches(user_ids):
            users = [hashlib.sha256(salt + user.encode()).digest()[:16] for user in batch]
            found: dict[bytes, str] = {}
            for first in range(0, len(users), 500):
                wanted = _members.c.user.in_(users[first : first + 500])
                found |= {bytes(row.user): row.population for row in connection.execute(sa.select(_members).where(wanted))}
            others = {population for population in found.values() if population != self.population}
            if others:
                raise RefusedError(
                    f"privacy.population {self.population}: users of it are in the ledger of {', '.join(sorted(others))}",
                    "what is spent of a user is kept in one place: name that population, or train on other users",
                )
            rows = [{"user": user, "population": self.population} for user in dict.fromkeys(users) if user not in found]
            new += len(rows)
            if rows:
                connection.execute(sa.insert(_members), rows)
        return new

    def _salted(self, connection: Connection) -> bytes:
        salt = connection.execute(sa.select(_salt.c.value)).scalar()
        if salt is None:
            salt = os.urandom(32)
            connection.execute(sa.insert(_salt), {"value": salt})
        return bytes(salt)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Connection]:
        """A transaction that no other writer overlaps, on disk when it ends."""
        with self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql("LOCK TABLE entries IN EXCLUSIVE MODE")
            yield connection


def _worst(runs: Sequence[Run], delta: float) -> list[Steps]:
    """What the user is part of who has spent most: a user may be in any part, in each way that the users were parted."""
    parted: dict[int, set[int]] = {}
    for run in runs:
        parted.setdefault(run.mechanism.parts, set()).add(run.mechanism.part)
    chosen = [dict(zip(parted, parts, strict=True)) for parts in itertools.product(*map(sorted, parted.values()))]
    users = [grouped([steps for run in runs if parts[run.mechanism.parts] == run.mechanism.part for steps in run.counted]) for parts in chosen]
    return max(users, key=lambda spent: epsilon_of(spent, delta))


def _run(key: str, entries: list[Any]) -> Run:
    first = entries[0]
    of = {kind: [row for row in entries if row.kind == kind] for kind in (RESERVE, TAKE, COMMIT)}
    steps = {kind: sum(row.steps for row in rows) for kind, rows in of.items()}
    counts = {kind: sum(row.counts for row in rows) for kind, rows in of.items()}
    mechanism = Mechanism(
        first.sigma, first.rate, first.steps, first.clipping_norm, first.delta, first.users, first.counts_sigma, first.part, first.parts
    )
    return Run(key, mechanism, steps[RESERVE], steps[TAKE], counts[RESERVE], counts[TAKE], bool(of[COMMIT]), first.at)


def _over(cap: float, before: Sequence[Steps], released: Sequence[Steps], wanted: Steps, delta: float) -> PrivacySpentError:
    """The refusal, with what would fit."""
    spent, counted = (epsilon_of(steps, delta) for steps in (before, [*before, *released]))
    before = [*before, *released]
    total = epsilon_of([*before, wanted], delta)
    counts = f" and item counts at σ {released[0].sigma:.3g}" if released else ""
    asked = f"{wanted.number} steps at σ {wanted.sigma:.3g}{counts}"
    what = f"privacy.cap: ε {cap:g} at δ {delta:g}; {spent:.2f} is spent, with {asked} it would be {total:.2f}"
    scored = "to score with the weights that are there costs nothing"
    if spent >= cap:
        return PrivacySpentError(what, f"nothing fits any more: raise the cap; {scored}{_CLOSE}")
    if counted >= cap:
        return PrivacySpentError(
            what, f"the item counts alone do not fit: lower privacy.epsilon (or raise privacy.sigma), or raise the cap; {scored}{_CLOSE}"
        )
    low, high = 0, wanted.number
    while high - low > 1:
        middle = (low + high) // 2
        within = epsilon_of([*before, wanted._replace(number=middle)], delta) <= cap
        low, high = (middle, high) if within else (low, middle)
    sigma = sigma_for(cap, delta, wanted.rate, wanted.number, before)
    return PrivacySpentError(what, f"what would fit: σ of {sigma:.3g} or more, or at most {low} steps; {scored}{_CLOSE}")


def _begin(connection: Connection) -> None:
    """The tables, the columns that came after a ledger was begun, and what keeps them append-only; nothing where all is there."""
    dialect = connection.engine.dialect
    if dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    known = sa.inspect(connection)
    there = {column["name"] for column in known.get_columns("entries")} if known.has_table("entries") else set()
    if dialect.name == "postgresql" and there.issuperset(_LATER):
        return  # who may only read and append has no right to more
    _schema.create_all(connection)
    for column in (_entries.c[name] for name in _LATER if there and name not in there):
        connection.exec_driver_sql(f"ALTER TABLE entries ADD COLUMN {sa.schema.CreateColumn(column).compile(dialect=dialect)}")
    for statement in _APPEND_ONLY[dialect.name]:
        connection.exec_driver_sql(statement)


def _durable(engine: Engine) -> None:
    """sqlite: a transaction is on disk when it ends, and writers come one after the other."""

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below
        connection.execute("PRAGMA busy_timeout=30000")
        connection.execute("PRAGMA journal_mode=DELETE")  # a write-ahead log would need the memory of one machine
        connection.execute("PRAGMA synchronous=EXTRA")  # the folder too: a journal that comes back would undo what was noted

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _batches(values: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for value in values:
        batch.append(value)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
