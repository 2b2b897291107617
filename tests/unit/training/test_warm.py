import datetime as dt

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import private_overrides, synthetic_overrides

from recray.bundle import write_bundle
from recray.config import load_settings
from recray.errors import SettingsError
from recray.privacy.accounting import Mechanism
from recray.privacy.ledger import Ledger
from recray.release import Member, Release
from recray.storage import Storage
from recray.testing.published import prepare_here, untrained_bundle
from recray.training.plan import bundle_settings, parent_of, plan_training, training_settings
from recray.training.trainer import _origin
from recray.training.worker import build_loop, shape_of

EARLY = dt.datetime(2024, 3, 1, tzinfo=dt.UTC)


def settings_in(synthetic_folder, root, *overrides):
    return load_settings(
        None, [*synthetic_overrides(synthetic_folder, root), "train.warm_start=true", *overrides]
    )


def trained(settings, dataset, path, parent=None):
    loop = build_loop(str(dataset.path), training_settings(settings), torch.device("cpu"))
    for epoch in range(4):
        loop.train_epoch(epoch)
    if loop.model.repeat is not None:
        loop.model.repeat.log_scale.fill_(0.3)  # as calibration leaves it
    shape = shape_of(settings.model, dataset)
    rest = {"settings": bundle_settings(settings), "metrics": {}, "parent": parent}
    return write_bundle(path, path.name, dataset=dataset, shape=shape, state=loop.model.state_dict(), **rest)


def test_items_and_event_types_come_and_go_and_the_rest_goes_on(synthetic_folder, tmp_path):
    alone = ["data.items=null", "data.features={}"]
    early = settings_in(synthetic_folder, tmp_path / "a", *alone, "data.min_item_events=15")
    late = settings_in(synthetic_folder, tmp_path / "b", *alone, "data.min_item_events=30")
    before, after = prepare_here(early, EARLY), prepare_here(late)
    bundle = trained(early, before, tmp_path / "parent")
    old, new = before.items["item_id"].to_pylist(), after.items["item_id"].to_pylist()
    came, stayed = sorted(set(new) - set(old)), sorted(set(new) & set(old))
    assert came and stayed and set(old) - set(new), "the world must lose and gain items for this to be a test"
    train_settings = training_settings(late)
    cold, warm = (
        build_loop(str(after.path), train_settings, torch.device("cpu"), parent)
        for parent in (None, str(bundle.path))
    )
    theirs = bundle.model()
    assert cold.model.repeat.log_scale == 0 and torch.equal(
        warm.model.repeat.log_scale, theirs.repeat.log_scale
    )
    for item in stayed:
        assert torch.equal(
            warm.model.items.ids.weight[new.index(item) + 1], theirs.items.ids.weight[old.index(item) + 1]
        )
    for item in came:
        assert torch.equal(
            warm.model.items.ids.weight[new.index(item) + 1], cold.model.items.ids.weight[new.index(item) + 1]
        )
    for index, event in enumerate(after.event_types):
        assert torch.equal(
            warm.model.events.weight[index], theirs.events.weight[before.event_types.index(event)]
        )
    assert torch.equal(warm.model.blocks[0].attention.qkv.weight, theirs.blocks[0].attention.qkv.weight)
    assert warm.train_epoch(0) < cold.train_epoch(0) - 0.1


def test_the_parent_is_the_previous_champion_also_when_the_run_is_repeated(synthetic_folder, tmp_path):
    settings = settings_in(synthetic_folder, tmp_path)
    storage = Storage(settings.root())
    before, after = prepare_here(settings, EARLY), prepare_here(settings)
    assert parent_of(settings, after) is None
    anew = plan_training(settings, after).key
    yesterday = untrained_bundle(settings, before, storage.bundle("yesterday"), "yesterday")
    Release(champion=Member.of(yesterday)).write(storage)
    assert parent_of(settings, after).key == "yesterday"
    assert parent_of(settings, before) is None, "a champion of the same night"
    key = plan_training(settings, after).key
    assert key != anew
    tonight = trained(settings, after, storage.bundle("tonight"), parent="yesterday")
    Release(champion=Member.of(tonight), previous=Member.of(yesterday)).write(storage)
    assert parent_of(settings, after).key == "yesterday"
    assert plan_training(settings, after).key == key
    for other in ("model.blocks=1", "train.warm_start=false", "data.features={category: categorical}"):
        assert parent_of(settings_in(synthetic_folder, tmp_path, other), after) is None, other


def held_out(dataset):
    shards = list(dataset.shards())
    return {
        shard.user_ids[i].as_py()
        for shard in shards
        for i in range(len(shard))
        if shard.split[i, 0] < shard.split[i, 2]
    }


def test_where_no_time_is_known_runs_differ_by_their_data(synthetic_folder, tmp_path):
    nights = []
    for number, length in enumerate((8, 9)):
        rows = [
            (f"u{user}", f"i{(user + position) % 7}", position)
            for user in range(30)
            for position in range(length)
        ]
        pq.write_table(
            pa.table(
                dict(zip(("user_id", "item_id", "position"), map(list, zip(*rows, strict=True)), strict=True))
            ),
            tmp_path / f"{number}.parquet",
        )
        events = [
            "data.items=null",
            "data.features={}",
            "data.context=[]",
            "data.columns={event: null}",
            "split.kind=leave_one_out",
            f"data.events={tmp_path / f'{number}.parquet'}",
        ]
        settings = settings_in(synthetic_folder, tmp_path / "root", *events)
        nights.append((settings, prepare_here(settings)))
    (first, before), (second, after) = nights
    assert before.clock == "position" and before.as_of_s == after.as_of_s and before.digest != after.digest
    storage = Storage(first.root())
    champion = untrained_bundle(first, before, storage.bundle("before"), "before")
    Release(champion=Member.of(champion)).write(storage)
    assert parent_of(first, before) is None, "its own night's"
    assert parent_of(second, after).key == "before"


def test_who_is_held_out_stays_held_out_as_the_log_grows(synthetic_folder, tmp_path):
    """Else a warm start would know the events that it is selected by."""
    half, everybody = (
        settings_in(synthetic_folder, tmp_path),
        settings_in(synthetic_folder, tmp_path, "split.validation_users=1.0"),
    )
    yesterday, tonight = (
        held_out(prepare_here(half, as_of)) for as_of in (dt.datetime(2024, 4, 10, tzinfo=dt.UTC), None)
    )
    could = held_out(prepare_here(everybody))
    assert 20 < len(tonight) < 0.7 * len(could)
    assert len(yesterday & could) > 20
    assert yesterday & could <= tonight


def test_a_private_training_begins_with_what_is_private_or_public_alone(synthetic_folder, tmp_path):
    private = load_settings(None, [*private_overrides(synthetic_folder, tmp_path), "train.warm_start=true"])
    storage = Storage(private.root())
    before, after = prepare_here(private, EARLY), prepare_here(private)
    statements = {"public": None, "other": {"differential_privacy": True, "population": "others"}}
    statements["mine"] = {"differential_privacy": True, "population": private.privacy.population}
    statements["unaccounted"] = statements["mine"]
    bundles = {
        name: untrained_bundle(private, before, storage.bundle(name), name, said)
        for name, said in statements.items()
    }
    mechanism = Mechanism(1.0, 0.2, 12, 1.0, 1e-4, 200)
    ledger = Ledger.open(private.ledger_url(), private.privacy.population)
    ledger.reserve("mine", mechanism, None, 0)
    ledger.take_steps("mine", 12)
    ledger.commit("mine")
    starts = {}
    for name, bundle in bundles.items():
        Release(champion=Member.of(bundle)).write(storage)
        parent = parent_of(private, after)
        starts[name] = parent and parent.key
    assert starts == {"public": None, "other": None, "mine": "mine", "unaccounted": None}


def test_a_private_training_begins_with_a_bundle_of_public_data(synthetic_folder, tmp_path):
    private = load_settings(
        None, [*private_overrides(synthetic_folder, tmp_path / "root"), "data.features={}"]
    )
    plain = private.model_copy(update={"privacy": private.privacy.model_copy(update={"enabled": False})})
    dataset = prepare_here(plain)
    public = untrained_bundle(plain, dataset, tmp_path / "public", "public")
    other = untrained_bundle(
        plain, dataset, tmp_path / "other", "other", {"differential_privacy": True, "population": "others"}
    )
    within = untrained_bundle(plain, dataset, Storage(plain.root()).bundle("within"), "within")

    def begin(bundle, *overrides):
        parents = [
            *private_overrides(synthetic_folder, tmp_path / "root"),
            f"privacy.public_start={bundle.path}",
            "privacy.counts_share=0",
            *overrides,
        ]
        return parent_of(load_settings(None, parents), dataset)

    assert begin(public).key == "public"
    assert "public data" in _origin(public) and "same ledger, which began with random weights" in _origin(
        other
    )
    for bundle, overrides, words in (
        (public, ["model.blocks=1"], "another network"),
        (other, [], "trained privately"),
        (within, [], "must be protected"),
    ):
        with pytest.raises(SettingsError, match=words):
            begin(bundle, *overrides)
    with pytest.raises(SettingsError, match="set counts_share to 0"):
        begin(public, "privacy.counts_share=0.1")
