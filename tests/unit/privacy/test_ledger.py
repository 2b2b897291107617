import contextlib
import dataclasses
import multiprocessing
import uuid

import pytest
import sqlalchemy as sa

from recray.cli import main
from recray.config import PrivacySettings
from recray.errors import MissingArtifactError, PrivacySpentError, RefusedError, StorageError
from recray.privacy import plan
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, mechanism_of, sigma_for
from recray.privacy.ledger import Ledger

DELTA = 1e-5
ONE = Mechanism(sigma=2.0, rate=0.1, steps=100, clipping_norm=1.0, delta=DELTA, users=50)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """Of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/ledger.sqlite"
        return
    server, name = request.getfixturevalue("postgres"), f"ledger{uuid.uuid4().hex}"
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield f"{server}/{name}"


def epsilon(ledger):
    return epsilon_of(ledger.spent(), DELTA)


def test_the_cap_pays_for_the_trainings_that_it_was_planned_for(tmp_path):
    """And for no more; whatever comes after the δ of the first one."""
    options = PrivacySettings(enabled=True, cap=8.0, trainings=12, delta=DELTA, steps=100, sampling_rate=0.1)
    mechanism, ledger = (
        mechanism_of(options, 1000),
        Ledger.open(f"sqlite:///{tmp_path}/ledger.sqlite", "shop"),
    )
    assert mechanism.epsilon < 8.0 / 2
    for number in range(12):
        ledger.reserve(f"{number}", mechanism, options.cap)
        ledger.take_steps(f"{number}", 0, 1)
        ledger.take_steps(f"{number}", 100)
        ledger.commit(f"{number}")
    assert 7.9 < ledger.statement()["epsilon_of_all_trainings"] <= 8.0
    with pytest.raises(PrivacySpentError) as error:
        ledger.reserve("12", mechanism, options.cap)
    assert error.value.exit_code == 3


def test_a_reservation_counts_until_it_is_committed(url):
    ledger = Ledger.open(url, "shop")
    assert ledger.reserve("a", ONE, None) == 100
    assert ledger.spent() == [Steps(2.0, 0.1, 100)]
    ledger.take_steps("a", 40)
    assert ledger.spent() == [Steps(2.0, 0.1, 100)]
    ledger.commit("a")
    ledger.commit("a")
    assert ledger.spent() == [Steps(2.0, 0.1, 40)]
    with pytest.raises(RefusedError, match="committed"):
        ledger.take_steps("a", 1)
    assert [run.committed for run in Ledger.read(url, "shop").runs()] == [True]


def test_a_larger_delta_is_no_way_around_the_cap(url):
    """At δ 1e-4 a second training would fit."""
    ledger = Ledger.open(url, "shop")
    cap = epsilon_of([Steps(ONE.sigma, ONE.rate, 150)], DELTA)
    ledger.reserve("a", ONE, cap)
    with pytest.raises(PrivacySpentError):
        ledger.reserve("b", ONE, cap)
    assert epsilon_of([Steps(ONE.sigma, ONE.rate, 200)], 1e-3) < cap
    with pytest.raises(RefusedError, match="promised 1e-05"):
        ledger.reserve("b", dataclasses.replace(ONE, delta=1e-3), cap)
    ledger.reserve("b", dataclasses.replace(ONE, delta=1e-6, sigma=20.0), None)
    with pytest.raises(RefusedError, match="promised 1e-06"):
        ledger.reserve("c", ONE, None)


def test_steps_that_a_crash_took_are_counted_and_taken_again(url):
    ledger = Ledger.open(url, "shop")
    ledger.reserve("a", ONE, None)
    ledger.take_steps("a", 40)  # a checkpoint follows
    ledger.take_steps("a", 40)  # a crash follows
    assert ledger.reserve("a", ONE, None, done_steps=40) == 40
    ledger.take_steps("a", 60)
    ledger.commit("a")
    assert ledger.spent() == [Steps(2.0, 0.1, 140)]
    with pytest.raises(RefusedError, match="has committed"):
        ledger.reserve("a", ONE, None, done_steps=100)


def test_a_checkpoint_of_another_ledger_is_refused_and_leaves_nothing(url):
    ledger = Ledger.open(url, "shop")
    with pytest.raises(RefusedError, match="has taken 40 steps that are not in this ledger"):
        ledger.reserve("a", ONE, None, done_steps=40)
    assert ledger.runs() == [] and ledger.reserve("a", ONE, None) == 100


def test_counts_are_reserved_with_the_steps_and_counted_as_often_as_they_were_drawn(url):
    counted = dataclasses.replace(ONE, counts_sigma=5.0)
    ledger = Ledger.open(url, "shop")
    assert [ledger.reserve("a", counted, None) for _ in range(2)] == [100, 0]
    assert ledger.spent() == [Steps(2.0, 0.1, 100), Steps(5.0, 1.0, 1)]
    ledger.take_steps("a", 0, 1)
    with pytest.raises(RefusedError, match="released its counts 1 of 1 reserved times"):
        ledger.take_steps("a", 0, 1)
    ledger.take_steps("a", 40)  # a crash follows, before the first checkpoint
    assert ledger.reserve("a", counted, None) == 40
    ledger.take_steps("a", 0, 1)
    ledger.take_steps("a", 60)  # a checkpoint follows, then a crash
    assert ledger.reserve("a", counted, None, done_steps=60) == 0
    ledger.take_steps("a", 40)
    ledger.commit("a")
    assert ledger.spent() == [Steps(2.0, 0.1, 140), Steps(5.0, 1.0, 2)]
    ledger.reserve("b", counted, None)
    ledger.commit("b")  # it took nothing
    assert ledger.spent() == [Steps(2.0, 0.1, 140), Steps(5.0, 1.0, 2)]
    cap = epsilon_of([*ledger.spent(), Steps(2.0, 0.1, 100)], DELTA)
    with pytest.raises(
        RefusedError, match="item counts at σ 0.5 it would be [^_]*the item counts alone do not fit"
    ):
        ledger.reserve("c", dataclasses.replace(counted, counts_sigma=0.5), cap)
    assert ledger.reserve("c", ONE, cap + 1e-9) == 100


def test_who_is_in_another_part_has_spent_nothing_by_it(url):
    ledger = Ledger.open(url, "shop")
    half = [dataclasses.replace(ONE, part=part, parts=2) for part in range(2)]
    one, two = (epsilon_of([Steps(2.0, 0.1, count)], DELTA) for count in (100, 200))
    cap = (one + two) / 2
    for number in range(2):
        assert ledger.reserve(f"half{number}", half[number], cap) == 100
    assert ledger.spent() == [Steps(2.0, 0.1, 100)] and epsilon(ledger) == one
    for mechanism in (half[0], half[1], ONE, dataclasses.replace(ONE, part=1, parts=3)):
        with pytest.raises(RefusedError, match=f"{one:.2f} is spent"):
            ledger.reserve("more", mechanism, cap)
    ledger.reserve("stronger", dataclasses.replace(half[1], sigma=2.1, steps=40), None)
    assert ledger.spent() == [Steps(2.0, 0.1, 100), Steps(2.1, 0.1, 40)], "nobody is in both halves"
    ledger.reserve("whole", dataclasses.replace(ONE, steps=30), None)
    ledger.reserve("third", dataclasses.replace(ONE, steps=7, part=2, parts=3), None)
    ledger.reserve("again", dataclasses.replace(half[1], steps=50), None)
    assert ledger.spent() == [Steps(2.0, 0.1, 100 + 50 + 30 + 7), Steps(2.1, 0.1, 40)]
    assert [run.mechanism.part for run in ledger.runs()] == [0, 1, 1, 0, 2, 1]


def test_a_ledger_of_before_the_counts_goes_on(url):
    ledger = Ledger.open(url, "shop")
    ledger.reserve("a", ONE, None)
    with ledger.engine.begin() as connection:
        for column in ("counts", "counts_sigma", "part", "parts"):
            connection.exec_driver_sql(f"ALTER TABLE entries DROP COLUMN {column}")
    for _ in range(2):
        ledger = Ledger.open(url, "shop")
        assert ledger.spent() == [Steps(2.0, 0.1, 100)] and ledger.reserve("a", ONE, None) == 0


def test_repeated_it_reserves_nothing_more(url):
    ledger = Ledger.open(url, "shop")
    assert [ledger.reserve("a", ONE, None) for _ in range(3)] == [100, 0, 0]
    with pytest.raises(RefusedError, match="exceed the reservation"):
        ledger.take_steps("a", 101)


def test_steps_without_a_reservation_are_refused(url):
    with pytest.raises(RefusedError, match="reserved nothing"):
        Ledger.open(url, "shop").take_steps("a", 1)


def test_trainings_compose_and_the_cap_holds(url):
    ledger = Ledger.open(url, "shop")
    one = epsilon_of([Steps(2.0, 0.1, 100)], DELTA)
    cap = 1.6 * one
    ledger.reserve("a", ONE, cap)
    with pytest.raises(RefusedError, match="these fit") as refused:
        for name in "bcdef":
            ledger.reserve(name, ONE, cap)
    assert epsilon(ledger) <= cap < epsilon_of([*ledger.spent(), Steps(2.0, 0.1, 100)], DELTA)
    sigma, steps = (
        sigma_for(cap, DELTA, 0.1, 100, ledger.spent()),
        int(str(refused.value).split("at most ")[1].split(" ")[0]),
    )
    assert f"{sigma:.3g}" in str(refused.value)
    fits, too_many = (epsilon_of([*ledger.spent(), Steps(2.0, 0.1, n)], DELTA) for n in (steps, steps + 1))
    assert fits <= cap < too_many
    with pytest.raises(RefusedError, match="nothing fits"):
        ledger.reserve("z", ONE, 0.5 * one)


def test_a_resume_with_another_mechanism_is_refused(url):
    ledger = Ledger.open(url, "shop")
    ledger.reserve("a", ONE, None)
    for change in ({"sigma": 1.0}, {"rate": 0.2}, {"clipping_norm": 2.0}):
        with pytest.raises(RefusedError, match="began with"):
            ledger.reserve("a", Mechanism(**{**vars(ONE), **change}), None)


def test_a_population_grows_and_shares_nobody(url):
    shop, news = Ledger.open(url, "shop"), Ledger.open(url, "news")
    assert shop.admit(map(str, range(20_500))) == 20_500
    assert shop.admit(map(str, range(20_600))) == 100
    assert news.admit(["n1", "n2"]) == 2
    with pytest.raises(RefusedError, match="belong to population shop"):
        news.admit(["n3", "7"])
    assert (shop.members(), news.members()) == (20_600, 2)
    assert (shop.spent(), news.spent()) == ([], [])


def test_who_was_refused_is_no_member(url):
    ledger = Ledger.open(url, "shop")
    with pytest.raises(PrivacySpentError):
        ledger.reserve("a", ONE, 0.01, user_ids=["1", "2"])
    assert ledger.members() == 0
    ledger.reserve("a", ONE, None, user_ids=["1", "2"])
    assert ledger.members() == 2


def test_users_are_not_written_down(url, tmp_path):
    Ledger.open(url, "shop").admit(["somebody@example.com"])
    with Ledger.open(url, "shop").engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM members")).all()
    assert len(rows) == 1 and "somebody" not in str(rows)
    assert b"somebody" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_nothing_is_changed_or_removed(url):
    ledger = Ledger.open(url, "shop")
    ledger.reserve("a", ONE, None)
    ledger.admit(["1"])
    statements = [
        "UPDATE entries SET steps = 1",
        "DELETE FROM entries",
        "DELETE FROM members",
        "UPDATE salt SET value = NULL",
    ]
    if url.startswith("postgresql"):
        statements.append("TRUNCATE entries")
    for statement in statements:
        with pytest.raises(sa.exc.DatabaseError, match="append-only"), ledger.engine.begin() as connection:
            connection.exec_driver_sql(statement)


def _reserve(url: str, key: str, cap: float) -> None:
    with contextlib.suppress(RefusedError):
        Ledger.open(url, "shop").reserve(key, ONE, cap)


def test_two_trainings_cannot_both_take_what_is_left_for_one(url):
    cap = 1.2 * epsilon_of([Steps(2.0, 0.1, 100)], DELTA)
    Ledger.open(url, "shop")
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_reserve, args=(url, f"run{i}", cap)) for i in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(Ledger.open(url, "shop").runs()) == 1


def test_a_ledger_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingArtifactError, match=r"ledger\.sqlite"):
        Ledger.read(f"sqlite:///{tmp_path}/ledger.sqlite", "shop")
    with pytest.raises(StorageError, match="cannot be opened"):
        Ledger.open(f"sqlite:///{tmp_path}/no/such/folder/ledger.sqlite", "shop")


def test_a_database_that_is_not_known_to_last_is_refused(tmp_path):
    with pytest.raises(StorageError, match="cannot be opened|is not supported"):
        Ledger.open("mysql+pymysql://root@localhost/ledger", "shop")
    with pytest.raises(StorageError, match="cannot be opened"):
        Ledger.open("postgresql://nobody@127.0.0.1:1/ledger?connect_timeout=2", "shop")


def test_a_plan_says_what_cadence_and_shards_would_cost():
    plans = {
        (option.every_days, option.shards): option
        for option in plan.options(0.5, DELTA, 0.02, 50, (2.0, 0.0), 14)
    }
    assert [plans[1, 1].trainings, plans[1, 7].trainings, plans[7, 1].trainings, plans[30, 7].trainings] == [
        14,
        2,
        2,
        1,
    ]
    assert plans[1, 1].epsilon == pytest.approx(epsilon_of([Steps(2.0, 0.02, 700)], DELTA))
    assert plans[1, 1].sigma > plans[7, 1].sigma == plans[1, 7].sigma > plans[30, 1].sigma
    assert epsilon_of([Steps(plans[1, 1].sigma, 0.02, 700)], DELTA) <= 0.5
    spent = plan.options(0.5, DELTA, 0.02, 50, (2.0, 0.0), 1, before=[Steps(0.5, 0.1, 500)])
    assert spent[0].sigma is None and spent[0].epsilon > 0.5
    counted = plan.options(0.5, DELTA, 0.02, 50, (2.0, 1.5), 14, counts_share=0.1)[0]
    assert plans[1, 1].sigma < counted.sigma < 1.2 * plans[1, 1].sigma and counted.epsilon > 0.5
    assert counted.epsilon == pytest.approx(epsilon_of([Steps(2.0, 0.02, 700), Steps(1.5, 1.0, 14)], DELTA))


def test_a_training_that_will_not_go_on_is_closed_by_hand(tmp_path, capsys):
    where = [f"storage.root={tmp_path}"]
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'privacy.sqlite'}", "users")
    ledger.reserve("crashed", ONE, None)
    ledger.take_steps("crashed", 30)
    assert ledger.runs()[0].counted[0].number == ONE.steps
    assert main(["privacy", "close", *where]) == 2 and "--training" in capsys.readouterr().err
    assert (
        main(["privacy", "close", "--training", "other", *where]) == 3 and "other" in capsys.readouterr().err
    )
    assert main(["privacy", "close", "--training", "crashed", *where]) == 0
    assert "crashed" in capsys.readouterr().err
    assert ledger.runs()[0].counted[0].number == 30
    with pytest.raises(RefusedError, match="committed"):
        ledger.take_steps("crashed", 1)
    with pytest.raises(RefusedError, match="train.seed"):
        ledger.reserve("crashed", ONE, None, 30)
