"""What a GPU does is what a CPU does, skipped without one, and what of it can be tested on a CPU. Needs no
Ray: `pytest --noconftest` on a machine with torch and pyarrow runs it.
"""

import threading

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray.dataset.popularity import Popularity
from recray.dataset.reader import History
from recray.errors import SettingsError
from recray.inference import Catalogue, Filters, Predictor, Vocabulary
from recray.inference.candidates import top_k
from recray.inference.graphs import allocate, fill, list_sizes, padded_size
from recray.model.controls import Controls
from recray.model.device import device
from recray.model.losses import Criterion, Targets
from recray.model.network import Network
from recray.model.packed import BLOCK, build_mask, is_packable, pack
from recray.model.shape import Batch, Shape
from recray.training.loop import Loop, LoopSettings, prefetch
from recray.training.worker import row_length

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

V, T, E, DAY = 200, 96, 3, 86_400
NOW = 300 * DAY


def model(seed=0, **parts) -> Network:
    torch.manual_seed(seed)
    random = np.random.default_rng(0)
    bags = {"brand": (random.integers(0, 64, 2 * V), np.concatenate([[0], np.arange(0, 2 * V, 2)]))}
    recommender = Network(
        Shape(event_types=E, dim=32, history=T, dropout=0.0, feature_buckets=64, **parts),
        np.arange(V + 1) > 0,
        bags,
    )
    with torch.no_grad():  # nothing at its neutral start
        for parameter in recommender.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return recommender


def histories(count: int, seed: int = 0) -> tuple[Batch, Targets]:
    """Histories of all lengths, every position asked."""
    random = torch.Generator().manual_seed(seed)
    length = torch.randint(1, T + 1, (count,), generator=random)
    length[0] = T
    real = torch.arange(T) < length[:, None]
    item = torch.randint(1, V + 1, (count, T), generator=random) * real
    event = torch.randint(0, E, (count, T), generator=random)
    time = torch.sort(torch.randint(0, 200 * DAY, (count, T), generator=random), 1).values
    now = torch.cat([time[:, 1:], torch.full((count, 1), 210 * DAY)], 1)
    user, position = real.nonzero(as_tuple=True)
    days, queries = torch.rand(2, V + 1, generator=random), len(user)
    fresh, day = torch.zeros(2, V + 1, dtype=torch.uint8), torch.randint(0, 2, (queries,), generator=random)
    batch = Batch(
        item,
        event,
        torch.ones(count, T),
        time,
        now,
        user,
        position,
        days,
        fresh,
        day,
        torch.zeros(queries, 0, dtype=torch.int64),
    )
    return batch, Targets(torch.arange(queries + 1), torch.randint(1, V + 1, (queries,), generator=random))


PARTS = [
    {},
    {"time_bias": False},
    {"relative": True, "positions": False},
    {"residual": "plain", "feed": "relu", "scores": "cosine"},
]


@pytest.mark.parametrize("parts", PARTS)
def test_in_one_row_each_history_sees_itself_alone(parts):
    network, (batch, _) = model(**parts).eval(), histories(7)
    cooler = Controls(0.3 * torch.randn(7, network.shape.heads))
    packing = pack(batch.item_BT, 2 * BLOCK)
    assert len(packing.row_P) % (2 * BLOCK) == 0 and (packing.row_P >= 0).sum() == (batch.item_BT > 0).sum()
    with torch.no_grad():
        table = network.items()
        for controls in (None, cooler):
            both = [each.to(torch.device("cpu")) for each in (batch, batch._replace(packing=packing))]
            padded, packed = (network.hidden(each, table, None, controls) for each in both)
            torch.testing.assert_close(packed, padded, atol=1e-5 * float(padded.abs().max()), rtol=0)


def test_a_row_of_nothing_and_one_that_is_full():
    assert pack(torch.zeros(2, 5, dtype=torch.int64), BLOCK).row_P.tolist() == [-1] * BLOCK
    full = pack(torch.ones(2, BLOCK, dtype=torch.int64), BLOCK)
    assert len(full.row_P) == 2 * BLOCK and full.block.tolist() == [0, 1]


def test_what_fills_a_row_costs_next_to_nothing():
    packing = pack(torch.ones(1, BLOCK, dtype=torch.int64), 64 * BLOCK)
    assert build_mask(packing).kv_num_blocks.tolist() == [[[1] * 64]]


def test_what_the_kernel_cannot_do_is_left_to_the_padded_way():
    assert is_packable(Shape(event_types=1, dim=64, heads=4)) and not is_packable(
        Shape(event_types=1, dim=64, heads=8)
    )
    assert not is_packable(Shape(event_types=1, attention="pointwise"))


class Given:
    """Batches as they are given."""

    def __init__(self, *batches):
        self.given = batches

    def epoch(self, epoch, rank=0, world_size=1):
        for batch, targets in self.given:
            yield batch, targets, max(len(batch.user_N), 1)

    def padding(self, epoch=0):
        return 0.0


def loop_of(batches, row: int, **settings) -> Loop:
    share = torch.full((V + 1,), 1.0 / V).index_fill(0, torch.tensor([0]), 0.0)
    network = model(repeat=False, prior=False).requires_grad_(False)  # the kernel has no backward on a CPU
    return Loop(
        network,
        batches,
        lambda *_: (0.0, 1.0),
        Criterion("softmax", share),
        LoopSettings(1, 1, 1e-3, 1, 0.0, 0, row=row, **settings),
    )


def test_batches_are_packed_but_a_part_without_users(monkeypatch):
    whole, (few, _) = histories(5), histories(3, 1)
    none = few._replace(
        **{
            name: getattr(few, name)[:0]
            for name in few._fields
            if name not in ("prior_PV", "fresh_PV", "packing")
        }
    )
    loop = loop_of(
        Given(whole, (none, Targets(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)))),
        2 * BLOCK,
    )
    packings = []

    def train_step(batch, targets, count):
        packings.append(batch.packing)
        return torch.zeros(())

    monkeypatch.setattr(loop, "train_step", train_step)
    loop.train_epoch(0)
    packed, empty = packings
    assert len(packed.row_P) % (2 * BLOCK) == 0 and empty is None


def test_batches_made_prefetch_come_in_order_and_with_their_errors():
    def some():
        yield from ("a", "b")
        raise ValueError("no third")

    coming = prefetch(some())
    assert [next(coming), next(coming)] == ["a", "b"]
    with pytest.raises(ValueError, match="no third"):
        next(coming)
    closed = prefetch(iter("abc"))
    assert next(closed) == "a"
    closed.close()
    assert "batches" not in " ".join(thread.name for thread in threading.enumerate())


def test_a_row_holds_any_part_of_a_batch(monkeypatch):
    assert row_length(5000, 200) == 5120
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    assert row_length(5000, 200) == 1536  # 1,250 and a history


def test_sizes_of_graphs_hold_the_batch():
    for B in (1, 2, 3, 33, 64):
        for events in (1, 32, 33, 200):
            users, filled = padded_size(B, events, 200)
            assert B <= users < 2 * B and events <= filled <= 200
    assert list_sizes(3, 40) == [(1, 32), (1, 40), (2, 32), (2, 40), (4, 32), (4, 40)]


def test_in_the_room_of_a_graph_a_batch_is_what_it_was():
    network, (batch, _) = model(prior=False, repeat=False).eval(), histories(3)
    last = (batch.item_BT > 0).sum(1) - 1
    no_day, no_context = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 0, dtype=torch.int64)
    queries = batch._replace(user_N=torch.arange(3), position_N=last, day_N=no_day, context_NC=no_context)
    modulation = Controls(0.3 * torch.randn(3, 2), None, torch.rand(3), None)
    static_batch, controls = allocate(queries, modulation, 4, T)
    with torch.no_grad():
        table, parts = network.items(), network.items.parts()
        for controls_of_turn in (
            modulation,
            Controls(-modulation.log_temperature, None, modulation.recency_slope, None),
        ):
            fill(static_batch, controls, queries, controls_of_turn)
            hidden = network.hidden(static_batch, table, parts, controls, masked=True)
            torch.testing.assert_close(
                hidden[:3],
                network.hidden(queries, table, parts, controls_of_turn, masked=True),
                atol=1e-5,
                rtol=1e-5,
            )
            assert hidden.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named_with_what_asks_for_it():
    assert device("train.use_gpu", gpu=False).type == "cpu"
    with pytest.raises(SettingsError, match="train.use_gpu asks for a GPU"):
        device("train.use_gpu", gpu=True)


@gpu
@pytest.mark.parametrize("parts", PARTS)
def test_a_gpu_learns_from_one_row_what_a_cpu_learns_from_padded_histories(parts):
    batch, targets = histories(24)
    share = torch.full((V + 1,), 1.0 / V).index_fill(0, torch.tensor([0]), 0.0)
    losses = {}
    for dev in ("cpu", "cuda"):
        network = model(**parts).to(dev).train()
        criterion = Criterion("softmax", share.to(dev))
        here = batch._replace(packing=pack(batch.item_BT, 4 * BLOCK)) if dev == "cuda" else batch
        cooler = Controls(0.3 * torch.randn(24, 2, generator=torch.Generator().manual_seed(1)).to(dev))
        loss = criterion.backward(
            network,
            here.to(torch.device(dev)),
            Targets(*(t.to(dev) for t in targets)),
            1.0 / len(batch.user_N),
            cooler,
        )
        losses[dev] = (
            loss.cpu(),
            {
                name: parameter.grad.cpu()
                for name, parameter in network.named_parameters()
                if parameter.grad is not None
            },
        )
    torch.testing.assert_close(losses["cuda"][0], losses["cpu"][0], rtol=1e-5, atol=0)
    assert losses["cuda"][1].keys() == losses["cpu"][1].keys()
    for name, gradient in losses["cpu"][1].items():
        error = (losses["cuda"][1][name] - gradient).norm() / gradient.norm().clamp(min=1e-9)
        assert error < 1e-4, (name, float(error))


@gpu
@pytest.mark.parametrize("loss", ["softmax", "sampled", "gbce"])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"attention": "pointwise", "residual": "plain", "feed": "none", "scores": "cosine", "relative": True},
    ],
)
def test_a_gpu_trains_in_bfloat16(loss, parts):
    batch, targets = histories(24)
    share = torch.full((V + 1,), 1.0 / V).index_fill(0, torch.tensor([0]), 0.0).cuda()
    settings = LoopSettings(
        2, 2, 1e-2, 1, 0.0, 0, 0.9, temperature_jitter=0.1, autocast=True, row=0 if parts else 4 * BLOCK
    )
    batches = Given(*[(batch, targets)] * 20)
    loop = Loop(
        model(**parts).cuda(),
        batches,
        lambda *_: (0.0, 1.0),
        Criterion(loss, share, negatives=64, half=True),
        settings,
    )
    first, second = (line["loss"] for line in loop.run())
    assert np.isfinite(first) and second < first


@pytest.fixture(scope="module")
def predictors() -> tuple[Predictor, Predictor]:
    random = np.random.default_rng(0)
    popularity = Popularity.count_events(
        random.integers(1, V + 1, 500), random.integers(280, 300, 500) * DAY, V
    )
    ids = pa.array([f"i{n:03d}" for n in range(V)])
    events = ["buy", "cart", "view"]
    catalogue = Catalogue(Vocabulary(ids, events), popularity, has_time=True)
    cpu, cuda = (
        Predictor(model().to(device), catalogue, popularity_prior_days=7) for device in ("cpu", "cuda")
    )
    for each in (cpu, cuda):
        each.encoder.capture_graphs(8)
    return cpu, cuda


def history(length: int, seed: int = 0) -> History:
    random = np.random.default_rng([seed, length])
    times = np.sort(random.integers(0, 299, length)) * DAY
    return History(
        random.integers(1, V + 1, length), random.integers(0, E, length), times, np.ones(length, np.float32)
    )


@gpu
@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
def test_a_gpu_answers_as_a_cpu_does(predictors, count):
    cpu, cuda = predictors
    histories = [history(1 + (7 * n) % (T + 20), n) for n in range(count)]
    modulation = Controls(
        0.3 * torch.randn(count, 2), torch.randn(count, E), torch.rand(count), 0.2 * torch.randn(count, 2)
    )
    for controls in (None, modulation, Controls(recency_slope=modulation.recency_slope)):
        theirs = cuda.recommend(histories, 20, now=NOW, filters=Filters(filter_seen=True), controls=controls)
        ours = cpu.recommend(histories, 20, now=NOW, filters=Filters(filter_seen=True), controls=controls)
        np.testing.assert_allclose(theirs.scores, ours.scores, rtol=1e-4, atol=1e-4)
        assert (theirs.item_index[:, 0] == ours.item_index[:, 0]).mean() > 0.98
    state = [each.recommend(histories, 5, now=NOW, with_state=True).state for each in (cpu, cuda)]
    np.testing.assert_allclose(*state, atol=1e-3)


@gpu
def test_graphs_are_for_the_weights_that_they_were_made_with(predictors, monkeypatch):
    _, cuda = predictors
    passes, hidden = [], cuda.model.hidden  # a graph that is replayed does without

    def counted(*args, **options):
        passes.append(1)
        return hidden(*args, **options)

    monkeypatch.setattr(cuda.model, "hidden", counted)
    before = cuda.recommend([history(9)], 5, now=NOW).scores
    assert not passes
    with torch.no_grad():
        for parameter in cuda.model.parameters():
            parameter.mul_(1.1)
    cuda.refresh()
    plain = cuda.recommend([history(9)], 5, now=NOW).scores
    assert len(passes) == 1
    cuda.encoder.capture_graphs(8)
    passes.clear()
    replayed = cuda.recommend([history(9)], 5, now=NOW).scores
    assert not passes
    np.testing.assert_allclose(replayed, plain, atol=1e-5)
    assert abs(replayed - before).max() > 1e-3


@gpu
def test_ties_on_a_gpu_go_by_index():
    scores = torch.zeros(3, 500, device="cuda")
    scores[1, 400] = 1.0
    index, values = top_k(scores, 4)
    assert index.tolist() == [[0, 1, 2, 3], [400, 0, 1, 2], [0, 1, 2, 3]] and values[1].tolist() == [
        1.0,
        0.0,
        0.0,
        0.0,
    ]
