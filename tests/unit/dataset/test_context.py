import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import synthetic_overrides

from recray.config import load_settings
from recray.dataset.context import encode_clock, encode_column, encode_request, encode_value
from recray.errors import DataError, RequestError, SettingsError
from recray.evaluation.protocol import EvaluationQueries
from recray.inference import Predictor
from recray.testing.published import prepare_here
from recray.training.batches import TrainingBatches
from recray.training.plan import training_settings
from recray.training.worker import build_loop

HALF = 20  # items of each device


@pytest.fixture(scope="module")
def by_device(tmp_path_factory):
    """A world in which the device of a request decides which half of the catalogue is met, and nothing else
    decides.
    """
    random = np.random.default_rng(0)
    n = 6000
    device = random.integers(0, 2, n)
    table = {
        "user_id": random.integers(0, 300, n),
        "item_id": random.integers(0, HALF, n) + HALF * device,
        "timestamp": pa.array(
            np.sort(random.integers(1_700_000_000, 1_705_000_000, n)) * 1_000_000, pa.timestamp("us")
        ),
        "device": pa.array(
            [[None, "phone", "desk"][d] for d in np.where(random.random(n) < 0.05, 0, device + 1)]
        ),
    }
    folder = tmp_path_factory.mktemp("devices")
    pq.write_table(pa.table(table), folder / "events.parquet")
    return folder


def settings_of(folder, root, *overrides):
    options = [
        f"data.events={folder / 'events.parquet'}",
        f"storage.root={root}",
        "data.context=[device, hour]",
        "split.kind=leave_one_out",
    ]
    small = [
        "model.dim=16",
        "model.history=16",
        "model.repeat_consumption=false",
        "train.batch_tokens=512",
        "train.learning_rate=0.01",
        "data.min_item_events=1",
    ]
    return load_settings(None, [*options, *small, *overrides])


@pytest.fixture(scope="module")
def dataset(by_device, tmp_path_factory):
    return prepare_here(settings_of(by_device, tmp_path_factory.mktemp("root")))


def test_codes():
    column = pa.chunked_array([["phone", None], ["desk", "phone"]])
    encoded = encode_column("device", column)
    assert encoded.tolist() == [
        encode_value("device", "phone"),
        0,
        encode_value("device", "desk"),
        encode_value("device", "phone"),
    ]
    assert encode_value("page", "phone") != encode_value("device", "phone")
    booleans = pa.chunked_array([[True, False]]).cast(pa.string())
    assert encode_column("new", booleans).tolist() == [
        encode_value("new", True),
        encode_value("new", False),
    ], "a request says true as the log does"
    assert encode_column("device", pa.chunked_array([pa.array([], pa.string())])).tolist() == []
    thursday_noon = np.array([12 * 3600])  # 1970-01-01 was a Thursday
    assert encode_clock("hour", thursday_noon).tolist() == [13]
    assert encode_clock("weekday", thursday_noon).tolist() == [4]


def test_a_request_names_declared_fields_alone():
    names = ["device", "hour"]
    assert encode_request(names, {"device": "phone"}, 3600).tolist() == [encode_value("device", "phone"), 2]
    assert encode_request(names, {}, None).tolist() == [0, 0]
    for wrong in ("page", "hour"):
        with pytest.raises(RequestError, match=f"unknown field '{wrong}'"):
            encode_request(names, {wrong: "x"}, None)


def test_training_knows_the_context_in_which_the_target_came(dataset):
    first_half = {encode_value("device", "phone"): True, encode_value("device", "desk"): False}
    ids = np.array([0, *dataset.items["item_id"].to_pylist()])
    n_targets = 0
    for batch, targets, _ in TrainingBatches(
        dataset, history=16, batch_tokens=512, sequences="all", popularity_prior_days=0, seed=0
    ).epoch(0):
        moments = batch.now_BT[batch.user_N, batch.position_N].numpy()
        assert (batch.context_NC[:, 1].numpy() == encode_clock("hour", moments)).all()
        for n, device in enumerate(batch.context_NC[:, 0].tolist()):
            target_ids = ids[targets.item[targets.offsets[n] : targets.offsets[n + 1]].numpy()]
            if device and len(target_ids) == 1:
                assert (target_ids[0] < HALF) == first_half[device]
                n_targets += 1
    assert n_targets > 1000


def test_what_the_context_decides_is_learned_and_the_unknown_stays_neutral(dataset, by_device, tmp_path):
    loop = build_loop(
        str(dataset.path), training_settings(settings_of(by_device, tmp_path)), torch.device("cpu")
    )
    for epoch in range(8):
        loop.train_epoch(epoch)
    predictor = Predictor.of(loop.model, dataset, 7)
    questions = next(EvaluationQueries(dataset, "test").batches(200))

    def first_half(context):
        answer = predictor.recommend(
            [q.history for q in questions], HALF, now=[q.now for q in questions], context=context
        )
        return (np.array([0, *dataset.items["item_id"].to_pylist()])[answer.item_index] < HALF).mean()

    assert first_half([encode_request(dataset.context, {"device": "phone"}, None)] * len(questions)) > 0.95
    assert first_half([encode_request(dataset.context, {"device": "desk"}, None)] * len(questions)) < 0.05
    assert 0.3 < first_half(None) < 0.7
    assert first_half(None) == first_half([encode_request(dataset.context, {}, None)] * len(questions))
    with_context = [q for q in questions if q.context[0]]
    assert len(with_context) > 100, "leave-one-out asks with the context of the target"


def test_a_time_split_queries_at_the_cutoff_where_no_context_is_known(by_device, tmp_path):
    dataset = prepare_here(settings_of(by_device, tmp_path, "split.kind=time"))
    assert not any(
        q.context.any() for batch in EvaluationQueries(dataset, "test").batches(100) for q in batch
    )


def test_invalid_declarations_are_named(by_device, synthetic_folder, tmp_path):
    with pytest.raises(DataError, match="no column 'page' for data.context"):
        prepare_here(settings_of(by_device, tmp_path, "data.context=[page]"))
    with pytest.raises(DataError, match="context value has type float"):
        prepare_here(
            load_settings(None, [*synthetic_overrides(synthetic_folder, tmp_path), "data.context=[value]"])
        )
    with pytest.raises(DataError, match="hour needs a timestamp"):
        prepare_here(settings_of(by_device, tmp_path, "data.columns={timestamp: null, position: user_id}"))
    with pytest.raises(SettingsError, match="a name occurs twice"):
        settings_of(by_device, tmp_path, "data.context=[device, device]")
