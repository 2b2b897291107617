"""The privacy ledger: an append-only record of the ε that a population has spent, kept as long as its data.

A training reserves its steps and the release of its item counts before the first step. It then takes them in
chunks (each is on disk before its first step) and commits. Until the commit, the whole reservation counts as
spent; afterwards, all steps taken, including those that a crash wasted. A population is a set of users,
stored as salted hashes. It may grow, but no user may be in two populations.

The database is sqlite by default, or PostgreSQL (14 or later, `recray[postgres]`) by URL where nodes share no
file system. Only the salt is secret.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from recray.config import sqlite_file
from recray.errors import MissingArtifactError, PrivacySpentError, RefusedError, StorageError
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, group_steps, sigma_for

RESERVE, TAKE, COMMIT = "reserve", "take", "commit"
BATCH = 10_000
_CLOSE = "; recray privacy close releases the reservation of an abandoned training"

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
# columns of entries that older ledgers lack
_ADDED_COLUMNS = ("counts", "counts_sigma", "part", "parts")
_TABLES = ("entries", "members", "salt")
_REFUSE = "the ledger is append-only"
_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{action} BEFORE {action} ON {table} BEGIN SELECT "
        f"RAISE(ABORT, '{_REFUSE}'); END"
        for table in _TABLES
        for action in ("update", "delete")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION append_only() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE "
        f"EXCEPTION '{_REFUSE}'; END $$",
        *(
            f"CREATE OR REPLACE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION append_only()"
            for table in _TABLES
        ),
    ],
}
_LOCK = 0x7265637261  # advisory lock of PostgreSQL, held while the tables are created


@dataclass(frozen=True)
class Run:
    """One training in the ledger: its reserved and taken steps and item counts, and whether it committed."""

    run_key: str
    mechanism: Mechanism
    steps_reserved: int
    steps_taken: int
    counts_reserved: int
    counts_taken: int
    committed: bool
    started_at: str

    @property
    def counted(self) -> list[Steps]:
        """The steps that count as spent."""
        steps, counts = (
            (self.steps_taken, self.counts_taken)
            if self.committed
            else (self.steps_reserved, self.counts_reserved)
        )
        return [Steps(self.mechanism.sigma, self.mechanism.rate, steps), *self.mechanism.releases(counts)]


class TotalSpent(TypedDict):
    """Spent privacy of a population, as a privacy statement has it; ε at the δ of the last training."""

    population: str
    trainings: int
    epsilon_of_all_trainings: float


class Ledger:
    """The ledger of one population in a database. Open it with `Ledger.open`."""

    def __init__(self, engine: Engine, population: str) -> None:
        self.engine, self.population = engine, population

    @classmethod
    def open(cls, url: str, population: str) -> Ledger:
        """Open or create a ledger. Raises StorageError if the database cannot be used."""
        shown_url: sa.URL | str = "(not a URL)"
        try:
            shown_url = sa.engine.make_url(url)
            if shown_url.drivername == "postgresql":
                shown_url = shown_url.set(drivername="postgresql+psycopg")
            engine = sa.create_engine(shown_url)
            if engine.dialect.name not in _APPEND_ONLY:
                raise StorageError(
                    f"privacy.ledger {shown_url!r}: {engine.dialect.name} is not supported",
                    "use sqlite or PostgreSQL",
                )
            if engine.dialect.name == "sqlite":
                _durable(engine)
            with engine.begin() as connection:
                _create_tables(connection)
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            fix = (
                'pip install "recray[postgres]"'
                if getattr(error, "name", None) == "psycopg"
                else "fix the URL or the database"
            )
            raise StorageError(f"privacy.ledger {shown_url!r} cannot be opened: {error}", fix) from None
        return cls(engine, population)

    @classmethod
    def read(cls, url: str, population: str) -> Ledger:
        """Open an existing ledger. Raises MissingArtifactError if its file does not exist."""
        file = sqlite_file(url)
        if file and not os.path.exists(file):
            raise MissingArtifactError(f"no ledger at {file}", "the first private training creates it")
        return cls.open(url, population)

    def admit(self, user_ids: Iterable[str]) -> int:
        """Record users of the population; returns the number of new ones.

        Raises RefusedError if one belongs to another population.
        """
        with self._exclusive() as connection:
            return self._admit(connection, user_ids)

    def reserve(
        self,
        run_key: str,
        mechanism: Mechanism,
        cap: float | None,
        done_steps: int = 0,
        user_ids: Iterable[str] = (),
    ) -> int:
        """Admit users and reserve the remaining steps of a training and its item counts.

        Returns the number of added steps. A refusal changes nothing.

        done_steps : steps that the training has completed
        cap : largest ε of all steps of the population; None: no cap

        Raises PrivacySpentError, with a proposal that fits, if the cap would be exceeded. Raises RefusedError
        if the training began with another mechanism, began in another ledger, or has ended; if δ is larger
        than before; or if a user belongs to another population.
        """
        with self._exclusive() as connection:
            self._admit(connection, user_ids)
            runs = self._runs(connection)
            run = next((other for other in runs if other.run_key == run_key), None)
            if mechanism.delta > (promised := min((other.mechanism.delta for other in runs), default=1.0)):
                raise RefusedError(
                    f"privacy.delta: {mechanism.delta:g}, but population {self.population} was promised "
                    f"{promised:g}",
                    f"set privacy.delta={promised:g}",
                )
            _check_resumable(run_key, run, mechanism, done_steps)

            steps_reserved, steps_taken = (run.steps_reserved, run.steps_taken) if run else (0, 0)
            missing = max(steps_taken + mechanism.steps - done_steps - steps_reserved, 0)
            counts = 0
            if mechanism.counts_sigma and not done_steps:  # counts of an earlier attempt were lost with it
                counts = max(1 + (run.counts_taken - run.counts_reserved if run else 0), 0)
            if not (missing or counts):
                return 0
            requested, released = Steps(mechanism.sigma, mechanism.rate, missing), mechanism.releases(counts)
            if cap is not None:
                same_users = [
                    other
                    for other in runs
                    if other.mechanism.parts != mechanism.parts or other.mechanism.part == mechanism.part
                ]
                before = _most_spent(same_users, mechanism.delta)
                if epsilon_of([*before, *released, requested], mechanism.delta) > cap:
                    raise _cap_exceeded(cap, before, released, requested, mechanism.delta)
            self._append(connection, run_key, RESERVE, missing, mechanism, counts)
            return missing

    def take_steps(self, run_key: str, steps: int, counts: int = 0) -> None:
        """Record steps and releases of counts before they happen.

        Raises RefusedError if they were not reserved.
        """
        with self._exclusive() as connection:
            run = self._run_of(connection, run_key)
            if (
                run.steps_taken + steps > run.steps_reserved
                or run.counts_taken + counts > run.counts_reserved
                or run.committed
            ):
                ended = ", and committed" if run.committed else ""
                problem = (
                    f"training {run_key} took {run.steps_taken} of {run.steps_reserved} reserved steps"
                    f"{ended}; {steps} more exceed the reservation"
                )
                if counts:
                    released = (
                        f"released its counts {run.counts_taken} of {run.counts_reserved} reserved times"
                    )
                    problem = f"training {run_key} {released}{ended}; {counts} more exceeds the reservation"
                raise RefusedError(problem, "reserve them first")
            self._append(connection, run_key, TAKE, steps, run.mechanism, counts)

    def commit(self, run_key: str) -> None:
        """End a training: its steps taken are spent, and the rest of its reservation is released.

        A repeated commit changes nothing.
        """
        with self._exclusive() as connection:
            run = self._run_of(connection, run_key)
            if not run.committed:
                self._append(connection, run_key, COMMIT, run.steps_taken, run.mechanism)

    def runs(self) -> list[Run]:
        """The trainings of the population, in the order of their start."""
        with self.engine.connect() as connection:
            return self._runs(connection)

    def spent(self) -> list[Steps]:
        """Spent steps by mechanism, of the user with the largest ε at the δ of the last training."""
        runs = self.runs()
        return _most_spent(runs, runs[-1].mechanism.delta) if runs else []

    def statement(self) -> TotalSpent:
        """The spent privacy of the population."""
        runs = self.runs()
        delta = runs[-1].mechanism.delta if runs else 0.0
        return {
            "population": self.population,
            "trainings": len(runs),
            "epsilon_of_all_trainings": round(epsilon_of(self.spent(), delta), 4),
        }

    def has_committed(self, run_key: str) -> bool:
        """Whether a training of this key has committed."""
        return any(run.run_key == run_key and run.committed for run in self.runs())

    def members(self) -> int:
        """Number of users of the population."""
        with self.engine.connect() as connection:
            count = (
                sa.select(sa.func.count())
                .select_from(_members)
                .where(_members.c.population == self.population)
            )
            return int(connection.execute(count).scalar_one())

    def _run_of(self, connection: Connection, run_key: str) -> Run:
        for run in self._runs(connection):
            if run.run_key == run_key:
                return run
        raise RefusedError(f"training {run_key} has reserved nothing", "reserve before the first step")

    def _runs(self, connection: Connection) -> list[Run]:
        rows = connection.execute(
            sa.select(_entries).where(_entries.c.population == self.population).order_by(_entries.c.number)
        ).all()
        entries_of: dict[str, list[Any]] = {}
        for row in rows:
            entries_of.setdefault(row.run_key, []).append(row)
        return [_run(key, entries) for key, entries in entries_of.items()]

    def _append(
        self,
        connection: Connection,
        run_key: str,
        kind: str,
        steps: int,
        mechanism: Mechanism,
        counts: int = 0,
    ) -> None:
        fields = {
            name: getattr(mechanism, name)
            for name in ("sigma", "rate", "clipping_norm", "delta", "users", "counts_sigma", "part", "parts")
        }
        at = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        row = {
            "at": at,
            "population": self.population,
            "run_key": run_key,
            "kind": kind,
            "steps": steps,
            "counts": counts,
            **fields,
        }
        connection.execute(sa.insert(_entries), row)

    def _admit(self, connection: Connection, user_ids: Iterable[str]) -> int:
        new = 0
        salt = self._read_salt(connection)
        for batch in _batches(user_ids):
            users = [hashlib.sha256(salt + user.encode()).digest()[:16] for user in batch]
            population_of: dict[bytes, str] = {}
            for first in range(0, len(users), 500):
                is_in_batch = _members.c.user.in_(users[first : first + 500])
                population_of |= {
                    bytes(row.user): row.population
                    for row in connection.execute(sa.select(_members).where(is_in_batch))
                }
            other_populations = {
                population for population in population_of.values() if population != self.population
            }
            if other_populations:
                raise RefusedError(
                    f"privacy.population {self.population}: some of its users belong to population "
                    f"{', '.join(sorted(other_populations))}",
                    "the ε of a user is counted in one population: set that population, or train on other "
                    "users",
                )
            rows = [
                {"user": user, "population": self.population}
                for user in dict.fromkeys(users)
                if user not in population_of
            ]
            new += len(rows)
            if rows:
                connection.execute(sa.insert(_members), rows)
        return new

    def _read_salt(self, connection: Connection) -> bytes:
        salt = connection.execute(sa.select(_salt.c.value)).scalar()
        if salt is None:
            salt = os.urandom(32)
            connection.execute(sa.insert(_salt), {"value": salt})
        return bytes(salt)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[Connection]:
        """An exclusive write transaction, which is on disk when it ends."""
        with self.engine.begin() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.exec_driver_sql("LOCK TABLE entries IN EXCLUSIVE MODE")
            yield connection


def _check_resumable(run_key: str, run: Run | None, mechanism: Mechanism, done_steps: int) -> None:
    """Raises RefusedError if a training cannot start or resume, given its entries in the ledger."""
    if run is not None and run.mechanism != mechanism:
        raise RefusedError(
            f"training {run_key} began with {run.mechanism}, not with {mechanism}",
            "resume it with its own settings; other settings are another training",
        )
    if run is None and done_steps:
        raise RefusedError(
            f"training {run_key} has taken {done_steps} steps that are not in this ledger",
            "set the ledger that it began with (privacy.ledger, privacy.population), or start a new training "
            "with another train.seed",
        )
    if run is not None and run.committed:
        raise RefusedError(
            f"training {run_key} has committed, but its bundle is missing",
            "train with another train.seed, which counts as another training",
        )


def _most_spent(runs: Sequence[Run], delta: float) -> list[Steps]:
    """Steps of the user with the largest spent ε.

    A user may be in any part of each split of the population.
    """
    parts_by_split: dict[int, set[int]] = {}
    for run in runs:
        parts_by_split.setdefault(run.mechanism.parts, set()).add(run.mechanism.part)
    combinations = [
        dict(zip(parts_by_split, parts, strict=True))
        for parts in itertools.product(*map(sorted, parts_by_split.values()))
    ]
    users = [
        group_steps(
            [
                steps
                for run in runs
                if parts[run.mechanism.parts] == run.mechanism.part
                for steps in run.counted
            ]
        )
        for parts in combinations
    ]
    return max(users, key=lambda spent: epsilon_of(spent, delta))


def _run(key: str, entries: list[Any]) -> Run:
    first = entries[0]
    rows_of = {kind: [row for row in entries if row.kind == kind] for kind in (RESERVE, TAKE, COMMIT)}
    steps = {kind: sum(row.steps for row in rows) for kind, rows in rows_of.items()}
    counts = {kind: sum(row.counts for row in rows) for kind, rows in rows_of.items()}
    mechanism = Mechanism(
        first.sigma,
        first.rate,
        first.steps,
        first.clipping_norm,
        first.delta,
        first.users,
        first.counts_sigma,
        first.part,
        first.parts,
    )
    return Run(
        key,
        mechanism,
        steps[RESERVE],
        steps[TAKE],
        counts[RESERVE],
        counts[TAKE],
        bool(rows_of[COMMIT]),
        first.at,
    )


def _cap_exceeded(
    cap: float, before: Sequence[Steps], released: Sequence[Steps], requested: Steps, delta: float
) -> PrivacySpentError:
    """The error of an exceeded cap, with a proposal that fits."""
    spent, counted = (epsilon_of(steps, delta) for steps in (before, [*before, *released]))
    before = [*before, *released]
    total = epsilon_of([*before, requested], delta)
    counts = f" and item counts at σ {released[0].sigma:.3g}" if released else ""
    request = f"{requested.number} steps at σ {requested.sigma:.3g}{counts}"
    problem = (
        f"privacy.cap: ε {cap:g} at δ {delta:g}; {spent:.2f} is spent, with {request} it would be {total:.2f}"
    )
    scoring = "scoring with existing weights costs nothing"
    if spent >= cap:
        return PrivacySpentError(problem, f"nothing fits: raise the cap; {scoring}{_CLOSE}")
    if counted >= cap:
        return PrivacySpentError(
            problem,
            "the item counts alone do not fit: lower privacy.epsilon (or raise privacy.sigma), or raise "
            f"the cap; {scoring}{_CLOSE}",
        )
    low, high = 0, requested.number
    while high - low > 1:
        middle = (low + high) // 2
        within = epsilon_of([*before, requested._replace(number=middle)], delta) <= cap
        low, high = (middle, high) if within else (low, middle)
    sigma = sigma_for(cap, delta, requested.rate, requested.number, before)
    return PrivacySpentError(
        problem, f"these fit: σ of {sigma:.3g} or more, or at most {low} steps; {scoring}{_CLOSE}"
    )


def _create_tables(connection: Connection) -> None:
    """Create missing tables and columns, and the triggers that keep them append-only."""
    dialect = connection.engine.dialect
    if dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
    inspector = sa.inspect(connection)
    columns = (
        {column["name"] for column in inspector.get_columns("entries")}
        if inspector.has_table("entries")
        else set()
    )
    if dialect.name == "postgresql" and columns.issuperset(_ADDED_COLUMNS):
        return  # a role that may only read and append cannot create tables
    _schema.create_all(connection)
    for column in (_entries.c[name] for name in _ADDED_COLUMNS if columns and name not in columns):
        connection.exec_driver_sql(
            f"ALTER TABLE entries ADD COLUMN {sa.schema.CreateColumn(column).compile(dialect=dialect)}"
        )
    for statement in _APPEND_ONLY[dialect.name]:
        connection.exec_driver_sql(statement)


def _durable(engine: Engine) -> None:
    """sqlite: transactions are on disk when they end, and writers run one at a time."""

    @sa.event.listens_for(engine, "connect")
    def _set_pragmas(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # `_begin_immediate` begins transactions
        connection.execute("PRAGMA busy_timeout=30000")
        # a write-ahead log would need the shared memory of one machine
        connection.execute("PRAGMA journal_mode=DELETE")
        # the folder is synced too: a journal that reappears would undo a transaction
        connection.execute("PRAGMA synchronous=EXTRA")

    @sa.event.listens_for(engine, "begin")
    def _begin_immediate(connection: Connection) -> None:
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
