import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from recray.bundle import OPTIONAL_WEIGHTS, Bundle, find_latest_bundle, settings_key
from recray.errors import DamagedArtifactError, DataError, TrainingError
from recray.inference import Catalogue, Predictor, Vocabulary
from recray.testing.published import untrained_bundle
from recray.training.batches import TrainingBatches
from recray.training.plan import bundle_settings, plan_training
from recray.training.worker import build_loop, last_checkpoint, load_checkpoint, save_checkpoint


def loop(settings, dataset, **train):
    return build_loop(str(dataset.path), settings.replace("train", **train), torch.device("cpu"))


def test_training_learns(synthetic_settings, synthetic_dataset):
    run = loop(synthetic_settings, synthetic_dataset, epochs=4, patience=4)
    lines = list(run.run())
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert run.progress.best_ndcg == max(line["validation_ndcg"] for line in lines)


def test_early_stop_counts_from_the_best_epoch(synthetic_settings, synthetic_dataset):
    run = loop(synthetic_settings, synthetic_dataset, epochs=20, patience=2)
    scores = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    run.validate = lambda model, rank, world_size: (next(scores), 1.0)
    assert [line["epoch"] for line in run.run()] == [1, 2, 3, 4]
    assert run.progress.best_epoch == 2


def test_resumed_equals_uninterrupted_to_the_bit(synthetic_settings, synthetic_dataset, tmp_path):
    whole = loop(synthetic_settings, synthetic_dataset, epochs=3, patience=3)
    list(whole.run())
    first = loop(synthetic_settings, synthetic_dataset, epochs=3, patience=3)
    next(first.run())
    save_checkpoint(first, tmp_path)
    second = loop(synthetic_settings, synthetic_dataset, epochs=3, patience=3)
    load_checkpoint(second, tmp_path)
    list(second.run())
    assert second.progress == whole.progress
    for part in ("model", "best"):
        a, b = whole.state_dict()[part], second.state_dict()[part]
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_bundle_round_trip_and_choice(synthetic_settings, synthetic_dataset, tmp_path):
    settings, key = (
        bundle_settings(synthetic_settings),
        plan_training(synthetic_settings, synthetic_dataset).key,
    )
    bundle = untrained_bundle(synthetic_settings, synthetic_dataset, tmp_path / "bundles" / key, key)
    repeated = untrained_bundle(synthetic_settings, synthetic_dataset, tmp_path / "again" / key, key)
    assert bundle.digest == repeated.digest
    predictor = Predictor.load(bundle.path)
    shard = synthetic_dataset.shard(0)
    histories = [shard.history(row) for row in range(5)]
    run = loop(synthetic_settings, synthetic_dataset)
    live = Predictor(
        run.model,
        Catalogue(
            Vocabulary(bundle.item_ids, synthetic_dataset.event_types),
            synthetic_dataset.popularity,
            has_time=True,
        ),
        popularity_prior_days=7,
    )
    now = synthetic_dataset.now_s
    assert (
        predictor.recommend(histories, 10, now=now).scores == live.recommend(histories, 10, now=now).scores
    ).all()
    folder = tmp_path / "bundles"
    assert find_latest_bundle(folder, settings_key(settings), synthetic_dataset.as_of_s).key == bundle.key
    assert find_latest_bundle(folder, settings_key(settings), synthetic_dataset.as_of_s - 1) is None
    assert find_latest_bundle(folder, "another", synthetic_dataset.as_of_s) is None
    resplit = synthetic_settings.model_copy(
        update={"split": synthetic_settings.split.model_copy(update={"test_fraction": 0.3})}
    )
    assert settings_key(bundle_settings(resplit)) != settings_key(settings), (
        "a bundle of another split may know the answers"
    )
    bundle.path.rename(folder / f".{key}.scratch")
    assert find_latest_bundle(folder, settings_key(settings), synthetic_dataset.as_of_s) is None
    (folder / f".{key}.scratch").rename(bundle.path)
    assert Bundle.open(bundle.path).manifest["dataset"] == synthetic_dataset.key


def test_a_bundle_from_before_a_part_came_is_the_same_model_and_a_foreign_one_is_refused(
    synthetic_settings, synthetic_dataset, tmp_path
):
    bundle = untrained_bundle(synthetic_settings, synthetic_dataset, tmp_path / "b", "b")
    whole = bundle.model().state_dict()
    older = {name: tensor for name, tensor in whole.items() if not name.endswith(OPTIONAL_WEIGHTS)}
    assert len(older) < len(whole)
    save_file(older, bundle.path / "model.safetensors")
    weights = bundle.model().state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    save_file(
        {name: tensor for name, tensor in whole.items() if "norm" not in name},
        bundle.path / "model.safetensors",
    )
    with pytest.raises(DamagedArtifactError, match="do not fit.*norm.weight"):
        bundle.model()


def test_keys_follow_what_changes_the_result(synthetic_settings, synthetic_dataset):
    key = plan_training(synthetic_settings, synthetic_dataset).key

    def other(*overrides):
        section, value = overrides[0].split("=")
        name, field = section.split(".")
        updated = getattr(synthetic_settings, name).model_copy(update={field: int(value)})
        return plan_training(synthetic_settings.model_copy(update={name: updated}), synthetic_dataset).key

    assert other("train.threads=3") == key
    assert other("train.every_days=9") == key
    assert other("score.k=3") == key
    assert other("train.seed=3") != key
    assert other("model.blocks=1") != key


def test_a_fresh_model_is_drawn_from_its_seed(synthetic_settings, synthetic_dataset):
    a, b, c = (
        loop(synthetic_settings, synthetic_dataset, seed=seed).model.items.ids.weight for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert np.isfinite(a.detach().numpy()).all()


def test_bfloat16_learns_what_float32_learns(synthetic_settings, synthetic_dataset):
    full, half = (
        next(loop(synthetic_settings, synthetic_dataset, precision=p).run()) for p in ("float32", "bfloat16")
    )
    assert half["loss"] != full["loss"]
    np.testing.assert_allclose(half["loss"], full["loss"], rtol=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_rank_that_gets_no_sequence_of_a_batch_takes_part(precision, synthetic_settings, synthetic_dataset):
    run = loop(synthetic_settings, synthetic_dataset, precision=precision)
    batch, targets, count = next(run.batches.epoch(0, 9_999, 10_000))
    assert len(batch.item_BT) == 0 < count
    assert float(run.train_step(run.criterion.complete(batch), targets, count)) == 0


def test_validation_users_without_a_target_that_counts_are_named(
    synthetic_settings, synthetic_dataset, monkeypatch
):
    monkeypatch.setattr("recray.training.worker.targets_of", lambda query, filter_seen: query.target[:0])
    with pytest.raises(DataError, match="no validation user has a target under the protocol with_repeats"):
        loop(synthetic_settings, synthetic_dataset)


def test_a_loss_that_is_not_finite_stops_training(synthetic_settings, synthetic_dataset):
    run = loop(synthetic_settings, synthetic_dataset)
    with torch.no_grad():
        run.model.items.ids.weight[3] = torch.nan
    with pytest.raises(TrainingError, match="loss of epoch 1 is nan"):
        next(run.run())


@pytest.mark.parametrize(
    ("breaks", "message"),
    [("first", "loss of epoch 2 is nan"), ("last", "after epoch 2 a weight is not finite")],
)
def test_what_broke_in_a_later_epoch_leaves_the_checkpoint_before_it(
    breaks, message, synthetic_settings, synthetic_dataset, tmp_path
):
    run = loop(synthetic_settings, synthetic_dataset)
    epochs, folder = run.run(), tmp_path / "attempt" / "checkpoint_1"
    next(epochs)
    folder.mkdir(parents=True)
    save_checkpoint(run, folder)
    steps, step = sum(1 for _ in run.batches.epoch(1)), run.train_step
    breaks_at = run.progress.step + (1 if breaks == "first" else steps)

    def broken(*args):
        loss = step(*args)
        if run.progress.step == breaks_at:
            with torch.no_grad():
                run.model.items.ids.weight[3] = torch.nan
        return loss

    run.train_step = broken
    with pytest.raises(TrainingError, match=message):
        next(epochs)
    repeated = loop(synthetic_settings, synthetic_dataset)
    load_checkpoint(repeated, last_checkpoint(tmp_path))
    assert repeated.progress.epoch == 1 and next(repeated.run())["epoch"] == 2


def test_validation_measures_the_weights_that_it_is_given(synthetic_settings, synthetic_dataset):
    run = loop(synthetic_settings, synthetic_dataset, ema_decay=0.9)
    other = copy.deepcopy(run.ema_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    first, zero, again = (run.validate(model, 0, 1)[0] for model in (run.ema_model, other, run.ema_model))
    assert first == again != zero


def test_the_average_follows_the_weights(synthetic_settings, synthetic_dataset):
    run = loop(synthetic_settings, synthetic_dataset, ema_decay=0.9)
    next(run.run())
    distance = [
        (a - b).abs().max() for a, b in zip(run.ema_model.parameters(), run.model.parameters(), strict=True)
    ]
    assert 0 < max(distance) < 0.1
    plain = loop(synthetic_settings, synthetic_dataset, ema_decay=0.0)
    assert plain.ema_model is plain.model


def test_both_settings_may_select(synthetic_settings, synthetic_dataset):
    best_epochs = {}
    for name, primary, select_by in (
        ("with_repeats", "with_repeats", "protocol"),
        ("filter_seen", "filter_seen", "protocol"),
        ("both", "with_repeats", "both"),
    ):
        settings = synthetic_settings.replace("evaluate", protocol=primary).replace(
            "train", select_by=select_by
        )
        run = build_loop(str(synthetic_dataset.path), settings, torch.device("cpu"))
        run.train_epoch(0)
        total, users = run.validate(run.model, 0, 1)
        best_epochs[name] = total / users
    assert best_epochs["both"] == pytest.approx(
        (best_epochs["with_repeats"] + best_epochs["filter_seen"]) / 2
    )


def test_more_target_baskets_mean_more_targets(synthetic_dataset):
    one, three = (
        next(
            iter(
                TrainingBatches(
                    synthetic_dataset,
                    history=1000,
                    batch_tokens=2000,
                    sequences="all",
                    popularity_prior_days=0,
                    seed=0,
                    target_baskets=h,
                ).epoch(0)
            )
        )
        for h in (1, 3)
    )
    assert torch.equal(one[0].item_BT, three[0].item_BT) and torch.equal(
        one[0].position_N, three[0].position_N
    )
    some, many = one[1].offsets.diff(), three[1].offsets.diff()
    assert (many >= some).all() and many.sum() > 2 * some.sum()
    first = [
        three[1].item[start : start + size]
        for start, size in zip(three[1].offsets.tolist(), some.tolist(), strict=False)
    ]
    assert torch.equal(torch.cat(first), one[1].item), "the next basket comes first"
    trained = set(
        np.concatenate([shard.trained_item_index() for shard in synthetic_dataset.shards()]).tolist()
    )
    assert set(three[1].item.tolist()) <= trained, "what is held out is never a target"
