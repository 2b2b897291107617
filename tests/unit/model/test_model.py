import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recray.model import attention
from recray.model.attention import causal_bias
from recray.model.controls import Controls
from recray.model.dropout import Dropout
from recray.model.fused import Columns, Embedding, Linear, RMSNorm, swiglu
from recray.model.losses import Criterion, Targets, backward_in_blocks, draw_mixed, gbce, gbce_beta, softmax
from recray.model.network import FRESHNESS_BUCKETS, Network, value_bucket
from recray.model.shape import PRESETS, Batch, Shape

V, B, T, E = 31, 3, 9, 3
DAY = 86_400


def make(features=True, seed=0, **kwargs) -> Network:
    torch.manual_seed(seed)
    random = np.random.default_rng(0)
    bags = (
        {
            name: (random.integers(0, 64, 2 * V), np.concatenate([[0], np.arange(0, 2 * V, 2)]))
            for name in ("brand", "title")
        }
        if features
        else {}
    )
    is_learned = np.arange(V + 1) > 0
    model = Network(
        Shape(event_types=E, dim=16, history=T, dropout=0.0, feature_buckets=64, **{"fresh": True, **kwargs}),
        is_learned,
        bags,
    )
    with torch.no_grad():  # nothing at its neutral start
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def make_batch(seed=1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    item = torch.randint(1, V + 1, (B, T), generator=random)
    event = torch.randint(0, E, (B, T), generator=random)
    time = torch.sort(torch.randint(0, 200 * DAY, (B, T), generator=random), 1).values
    now = torch.cat([time[:, 1:], torch.full((B, 1), 210 * DAY)], 1)
    prior = torch.rand(2, V + 1, generator=random)
    fresh = torch.randint(0, FRESHNESS_BUCKETS, (2, V + 1), generator=random)
    value = torch.randint(0, 6, (B, T), generator=random).float()
    is_query, day, context = (
        torch.full((B,), T - 1),
        torch.tensor([0, 1, 1]),
        torch.zeros(B, 0, dtype=torch.int64),
    )
    return Batch(item, event, value, time, now, torch.arange(B), is_query, prior, fresh, day, context)


def run(model, batch, controls=None, masked=True):
    table, parts = model.items(), model.items.parts()
    hidden = model.hidden(batch, table, parts, controls, masked=masked)
    return model.scores(hidden, model.output(table), batch)


def controls(model, **changes) -> Controls:
    zeros = Controls.zeros(B, model.shape.heads, E, model.items.modalities)
    return zeros._replace(**changes)


@pytest.mark.parametrize("time_bias", [True, False])
def test_zero_controls_change_nothing(time_bias):
    model, batch = make(time_bias=time_bias), make_batch()
    assert torch.equal(run(model, batch), run(model, batch, controls(model)))


@pytest.mark.parametrize(
    "change",
    [
        {"log_temperature": torch.full((B, 2), 0.5)},
        {"event_bias": torch.tensor([[1.0, 0, 0]] * B)},
        {"recency_slope": torch.full((B,), 0.7)},
        {"log_modality_weight": torch.tensor([[0.5, 0, 0]] * B)},
    ],
)
def test_each_control_moves_the_scores_of_its_own_request_only(change):
    model, batch = make(), make_batch()
    ((name, value),) = change.items()
    alone = torch.zeros_like(value)
    alone[1] = value[1]
    base, moved = run(model, batch), run(model, batch, controls(model, **{name: alone}))
    assert torch.equal(base[[0, 2]], moved[[0, 2]])
    assert (base[1] - moved[1]).abs()[1:].max() > 1e-4


ANY = [pytest.param({**parts, "values": True}, id=name) for name, parts in PRESETS.items()]


@pytest.mark.parametrize("parts", ANY)
def test_every_preset_reads_its_inputs_and_nothing_of_the_future(parts):
    model, batch = make(**parts), make_batch()
    base = run(model, batch)
    assert torch.isfinite(base[:, 1:]).all() and (base[:, 0] == -torch.inf).all()
    for name, change in (("item_BT", 1), ("event_BT", -1), ("value_BT", 3.0), ("now_BT", 90 * DAY)):
        moved = batch._replace(
            **{
                name: torch.where(getattr(batch, name) + change < 0, 1, (getattr(batch, name) + change)).to(
                    getattr(batch, name).dtype
                )
            }
        )
        moved = moved._replace(item_BT=(moved.item_BT - 1) % V + 1)
        assert (run(model, moved) - base)[:, 1:].abs().max() > 1e-4, name
    early = batch._replace(position_N=torch.full((B,), 4))
    changed = early._replace(item_BT=early.item_BT.clone().index_fill_(1, torch.arange(5, T), 7))
    assert torch.equal(run(model, early), run(model, changed))
    torch.testing.assert_close(
        run(model, batch, masked=True), run(model, batch, masked=False), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(base, run(model, batch, controls(model)))


@pytest.mark.parametrize("parts", ANY)
def test_a_temperature_moves_only_its_own_request_in_every_preset(parts):
    model, batch = make(**parts), make_batch()
    warm = torch.zeros(B, 2)
    warm[1] = 0.7
    base, moved = run(model, batch), run(model, batch, controls(model, log_temperature=warm))
    assert torch.equal(base[[0, 2]], moved[[0, 2]]) and (base[1] - moved[1])[1:].abs().max() > 1e-4


def test_cosine_scores_lie_between_bounds_of_the_temperature():
    model, batch = make(scores="cosine", repeat=False, prior=False), make_batch()
    model.temperature.data.fill_(1e-9)
    assert run(model, batch)[:, 1:].abs().max() <= 100 * (1 + 1e-5)
    model.temperature.data.fill_(0.5)
    assert run(model, batch)[:, 1:].abs().max() <= 2 * (1 + 1e-5)


def test_value_buckets_tell_ratings_apart_and_take_anything():
    assert len(set(value_bucket(torch.arange(1.0, 6.0)).tolist())) == 5
    assert value_bucket(torch.tensor([-3.0, 0.0, 1e30, math.inf])).tolist() == [0, 0, 63, 63]


def test_chosen_rows_are_the_rows_of_the_whole_table():
    model = make()
    with torch.no_grad():
        model.items.seen_V[[3, 9]] = False
    index = torch.tensor([0, 3, 5, 9, 30])
    torch.testing.assert_close(model.items(index), model.items()[index])
    assert torch.equal(model.items.parts(index), model.items.parts()[:, index])


def test_a_modality_that_is_missing_takes_no_part():
    model = make()
    model.items.seen_V[4] = False
    parts = model.items.parts()
    with torch.no_grad():
        model.items.fusion[0] += 5.0  # of the ids
    alone = model.items.fuse(parts[:, 4], model.items.present()[:, 4])
    with torch.no_grad():
        model.items.fusion[0] -= 9.0
    torch.testing.assert_close(model.items.fuse(parts[:, 4], model.items.present()[:, 4]), alone)
    one = torch.ones(3, 1, 16) * torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    with torch.no_grad():
        model.items.fusion[0] = -20.0  # a logit of -320, beside nothing
    torch.testing.assert_close(model.items.fuse(one, torch.tensor([[True], [False], [False]])), one[0])
    assert torch.isfinite(model.items.fuse(one, torch.zeros(3, 1, dtype=torch.bool))).all()


def attention_weights(model, batch, kept_inputs):
    """The attention distribution of the last position in block 0, head 0, recovered from the real layer."""
    captured = {}

    def spy(q, k, v, attn_mask=None, is_causal=False):
        logits = q @ k.mT / math.sqrt(q.shape[-1]) + attn_mask
        captured.setdefault("weights", torch.softmax(logits, -1))
        return torch.softmax(logits, -1) @ v

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = spy
    try:
        run(model, batch, kept_inputs)
    finally:
        F.scaled_dot_product_attention = original
    return captured["weights"][:, :, -1]


def entropy(weights):
    return -(weights * weights.clamp(min=1e-12).log()).sum(-1)


@pytest.mark.parametrize("parts", ANY)
def test_attention_weights_are_those_that_the_layer_mixes_with(parts):
    model, batch = make(**{**parts, "heads": 1}), make_batch()
    x = model.embed(batch, model.items())
    inputs = model.attention_inputs(batch, None, None, masked=True)
    layer = model.blocks[0].attention
    weights = layer.weights(x, inputs)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, T))
    one = model.attention_inputs(batch, batch.position_N, None, masked=True)
    torch.testing.assert_close(
        layer.weights(x, one, batch.position_N)[:, 0], weights[torch.arange(B), batch.position_N]
    )
    last = model.blocks[-1]
    expected = last.attention.weights(last.attention_norm(x), inputs)[torch.arange(B), batch.position_N]
    torch.testing.assert_close(model.entropy(x, batch), entropy(expected), atol=1e-5, rtol=1e-4)
    assert (weights.triu(1) == 0).all()
    if layer.kind == "softmax":
        mixed = layer.out(weights @ F.linear(x, layer.qkv.weight[2 * 16 :]))
        torch.testing.assert_close(mixed, layer(x, inputs, None), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parts", ANY)
@pytest.mark.parametrize("time_bias", [True, False])
def test_how_many_positions_are_scored_together_changes_nothing(parts, time_bias, monkeypatch):
    model, batch = make(**parts, time_bias=time_bias), make_batch()
    modulation = controls(
        model,
        recency_slope=torch.tensor([0.5, 0.0, -1.0]),
        event_bias=torch.randn(B, E),
        log_temperature=torch.randn(B, 2),
    )

    def scores_of_chunks():
        model.zero_grad()
        x = model.embed(batch, model.items())
        states, steered = model.states(x, batch), run(model, batch, modulation)
        states.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return [
            states,
            steered,
            run(model, batch),
            model.roll_out(x, batch),
            model.entropy(x, batch),
            *gradients,
        ]

    together = scores_of_chunks()
    monkeypatch.setattr(attention, "RANGE_SIZE", 4)
    assert len(model.attention_inputs(batch, None, None, masked=True).ranges) == 3
    for whole, parted in zip(together, scores_of_chunks(), strict=True):
        torch.testing.assert_close(whole, parted, atol=1e-3, rtol=1e-3)


def test_rollout_is_what_reaches_the_query_position():
    model, batch = make(), make_batch()
    early = batch._replace(position_N=torch.tensor([T - 1, 4, 0]))
    reach = model.roll_out(model.embed(early, model.items()), early)
    torch.testing.assert_close(reach.sum(1), torch.ones(B))
    assert (reach[1, 5:] == 0).all() and (reach[1, :5] > 0).all() and reach[2, 0] == 1


def test_temperature_flattens_or_sharpens_its_own_heads():
    model, batch = make(time_bias=False), make_batch()
    base = attention_weights(model, batch, controls(model))
    warm = torch.zeros(B, 2)
    warm[:, 0] = 1.0
    hot = attention_weights(model, batch, controls(model, log_temperature=warm))
    cold = attention_weights(model, batch, controls(model, log_temperature=-warm))
    assert (entropy(hot)[:, 0] > entropy(base)[:, 0]).all() and (
        entropy(cold)[:, 0] < entropy(base)[:, 0]
    ).all()
    assert torch.equal(hot[:, 1], base[:, 1])
    # exactly the base distribution to the power 1 / temperature
    powered = base[:, 0] ** math.exp(-1.0)
    torch.testing.assert_close(hot[:, 0], powered / powered.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_event_bias_multiplies_the_weight_of_its_events():
    model, batch = make(), make_batch()
    base = attention_weights(model, batch, controls(model))
    bias = torch.zeros(B, E)
    bias[:, 2] = 1.5
    moved = attention_weights(model, batch, controls(model, event_bias=bias))
    factor = torch.where(batch.event_BT == 2, math.exp(1.5), 1.0)[:, None]
    torch.testing.assert_close(
        moved, base * factor / (base * factor).sum(-1, keepdim=True), atol=1e-5, rtol=1e-4
    )


def test_recency_slope_multiplies_by_a_power_of_the_age():
    model, batch = make(), make_batch()
    base = attention_weights(model, batch, controls(model))
    moved = attention_weights(model, batch, controls(model, recency_slope=torch.full((B,), 2.0)))
    age_days = (batch.now_BT[:, -1:] - batch.time_BT).float() / DAY
    factor = ((1 + age_days) ** -2.0)[:, None]
    torch.testing.assert_close(
        moved, base * factor / (base * factor).sum(-1, keepdim=True), atol=1e-5, rtol=1e-3
    )


def test_modality_weight_zero_is_the_item_without_it():
    model, batch = make(), make_batch()
    off = torch.zeros(B, 3)
    off[:, 1] = -100.0
    table, parts = model.items(), model.items.parts()
    with torch.no_grad():
        model.items.fusion.zero_()  # the plain sum
    table = model.items()
    expected = model.hidden(batch, parts[0] + parts[2], parts, None, masked=True)
    torch.testing.assert_close(
        model.hidden(batch, table, parts, controls(model, log_modality_weight=off)), expected
    )


def test_the_future_is_never_read():
    model, batch = make(), make_batch()
    table, parts = model.items(), model.items.parts()
    early = batch._replace(position_N=torch.full((B,), 4))
    changed = early._replace(item_BT=early.item_BT.clone().index_fill_(1, torch.arange(5, T), 7))
    for masked in (True, False):
        a, b = (model.hidden(x, table, parts, masked=masked) for x in (early, changed))
        assert torch.equal(a, b)
        torch.testing.assert_close(model.scores(a, table, early), model.scores(b, table, changed))


@pytest.mark.parametrize("time_bias", [True, False])
def test_masked_and_causal_paths_agree(time_bias):
    model, batch = make(time_bias=time_bias), make_batch()
    torch.testing.assert_close(
        run(model, batch, masked=True), run(model, batch, masked=False), atol=1e-5, rtol=1e-5
    )


def test_padding_is_never_scored_and_unseen_items_have_no_id_vector():
    model = make()
    assert (run(model, make_batch())[:, 0] == -torch.inf).all()
    model.items.seen_V[5] = False
    assert torch.equal(model.items.parts()[0, 5], torch.zeros(16))
    assert model.items()[5].abs().sum() > 0


def test_repeats_count_and_recent_ones_count_by_their_age():
    model, batch = make(features=False), make_batch()
    batch = batch._replace(item_BT=torch.tensor([[1, 2, 2, 3, 4, 5, 6, 7, 8]] * B))
    hidden, no_bias = torch.zeros(B, 16), torch.zeros(V + 1)
    mass = model.repeat(hidden, batch, slice(None), V + 1, None)
    assert (mass[:, 9:] == 0).all() and (mass[:, 1:9] > 0).all()
    age = model.repeat.age.weight.squeeze(-1)
    with torch.no_grad():
        age.zero_()
        model.repeat.event.weight.zero_()
    no_bias[3] = 0.5
    mass = model.repeat(hidden, batch, slice(None), V + 1, no_bias)
    bias = model.repeat.gate.bias
    torch.testing.assert_close(mass[:, 2], (F.softplus(bias) * math.log(3)).expand(B))
    torch.testing.assert_close(mass[:, 3], (F.softplus(bias + 0.5) * math.log(2)).expand(B))
    torch.testing.assert_close(
        mass[:, 3:5], model.repeat(hidden, batch, slice(None), 2, no_bias[3:5], first=3)
    )


@pytest.mark.parametrize("scores", ["dot", "cosine"])
@pytest.mark.parametrize("by_item", [False, True])
@pytest.mark.parametrize("sizes", [[1] * 6, [1, 3, 2, 1, 4, 2]])
def test_cross_entropy_in_blocks_equals_the_whole(sizes, scores, by_item):
    model, batch = make(scores=scores, repeat_by_item=by_item), make_batch()
    batch = batch._replace(
        user_N=torch.arange(6) % B,
        position_N=torch.tensor([8, 7, 6, 5, 4, 3]),
        day_N=torch.tensor([0, 1, 0, 1, 0, 1]),
    )
    random = np.random.default_rng(0)
    items = [random.choice(np.arange(1, V + 1), size, replace=False) for size in sizes]
    targets = Targets(torch.tensor([0, *np.cumsum(sizes)]), torch.from_numpy(np.concatenate(items)))

    def gradients(block):
        model.zero_grad()
        table, parts = model.items(), model.items.parts()
        loss = backward_in_blocks(
            model, model.hidden(batch, table, parts), model.output(table), batch, targets, 0.5, block=block
        )
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    log_p = F.log_softmax(run(model, batch, masked=False), -1)
    direct = -sum(log_p[n, torch.from_numpy(basket)].mean() for n, basket in enumerate(items))
    (0.5 * direct).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for block in (1, 4, 100):
        loss, gradient = gradients(block)
        torch.testing.assert_close(loss, direct.detach(), rtol=1e-5, atol=1e-5)
        assert gradient.keys() == plain.keys()
        for name in plain:
            largest = float(plain[name].abs().max())
            torch.testing.assert_close(
                gradient[name], plain[name], rtol=1e-4, atol=1e-5 * max(1.0, largest), msg=name
            )


def test_an_item_twice_in_a_basket_counts_twice():
    model, batch = make(), make_batch()
    targets = Targets(torch.tensor([0, 3, 4, 5]), torch.tensor([1, 1, 2, 5, 6]))
    table, parts = model.items(), model.items.parts()
    log_p = F.log_softmax(run(model, batch, masked=False), -1)
    expected = -(2 / 3 * log_p[0, 1] + 1 / 3 * log_p[0, 2] + log_p[1, 5] + log_p[2, 6])
    loss = backward_in_blocks(model, model.hidden(batch, table, parts), table, batch, targets, 1.0)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)


def test_causal_bias_is_zero_on_and_below_the_diagonal():
    bias = causal_bias(torch.arange(3), 3, torch.float32)[0, 0]
    assert (bias == 0).tolist() == [[True, False, False], [True, True, False], [True, True, True]]


def queries(n=6):
    batch = make_batch()
    batch = batch._replace(
        user_N=torch.arange(n) % B,
        position_N=torch.tensor([8, 7, 6, 5, 4, 3]),
        day_N=torch.tensor([0, 1, 0, 1, 0, 1]),
    )
    return batch, Targets(torch.arange(n + 1), torch.tensor([4, 9, 11, 2, 30, 17]))


def test_gbce_is_its_formula_and_its_gradient_autograds():
    scores = torch.randn(3, 8).index_fill_(1, torch.tensor([0, 5]), -math.inf)
    item, row, share = (
        torch.tensor([1, 6, 2, 3]),
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([1.0, 0.5, 0.5, 1.0]),
    )
    beta = gbce_beta(negatives=3, items=8, calibration=0.75)
    assert beta == pytest.approx((3 / 7) * (0.75 * (1 - 7 / 3) + 7 / 3))
    assert gbce_beta(5, 8, 0.0) == pytest.approx(1.0)
    twice = torch.zeros(1, 4)
    assert gbce(1.0)(twice, torch.tensor([1, 1]), torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))[
        0
    ].item() == pytest.approx(4 * math.log(2))
    variable = scores.clone().requires_grad_()
    others = torch.isfinite(scores).index_put((row, item), torch.tensor(False))
    direct = -(beta * share * F.logsigmoid(variable[row, item])).sum() - F.logsigmoid(-variable[others]).sum()
    direct.backward()
    gradient = scores.clone()
    loss, gradient = gbce(beta)(gradient, item, row, share)
    torch.testing.assert_close(loss, direct.detach())
    torch.testing.assert_close(gradient, variable.grad.nan_to_num(0.0))


def test_the_sampled_sum_over_items_is_unbiased():
    """Averaged over draws, corrected candidates stand for all items."""
    batch, targets = queries()
    share = torch.zeros(V + 1)
    share[1:] = torch.softmax(torch.randn(V), 0)
    scores = torch.randn(V + 1).exp()
    torch.manual_seed(0)
    sums = []
    for _ in range(4000):
        popular = Targets(targets.offsets, torch.multinomial(share, 6, replacement=True))
        candidates = draw_mixed(batch, popular, share, negatives=4)
        sums.append((scores[candidates.item_U] * candidates.correction_U.exp()).sum())
    estimates = torch.stack(sums)
    assert abs(estimates.mean() - scores[1:].sum()) < 4 * estimates.std() / math.sqrt(len(sums))
    uncorrected = scores[1:].sum() * 10 / V
    assert abs(estimates.mean() - uncorrected) > 20 * estimates.std() / math.sqrt(len(sums))


@pytest.mark.parametrize("loss", ["sampled", "gbce"])
def test_with_every_item_drawn_a_sampled_loss_is_the_whole_one(loss):
    batch, targets = queries()
    share = torch.full((V + 1,), 1 / V)
    model = make()

    def gradients(criterion):
        model.zero_grad()
        torch.manual_seed(0)
        sampled_loss = criterion.backward(model, batch, targets, 1.0)
        return sampled_loss, {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    sampled, sampled_gradient = gradients(Criterion(loss, share, negatives=100 * V, calibration=0.75))
    if loss == "sampled":
        whole, plain = gradients(Criterion("softmax", share))
    else:
        model.zero_grad()
        table = model.items()
        judge = gbce(gbce_beta(V, V, 0.75))
        whole = backward_in_blocks(
            model, model.hidden(batch, table, None), model.output(table), batch, targets, 1.0, judge=judge
        )
        plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(sampled, whole, rtol=1e-4, atol=1e-4)
    for name in plain:
        torch.testing.assert_close(sampled_gradient[name], plain[name], rtol=1e-3, atol=1e-4, msg=name)


def test_sampling_from_one_item():
    batch, targets = queries()
    drawn = draw_mixed(batch._replace(item_BT=torch.ones_like(batch.item_BT)),
    targets._replace(item=torch.ones(6, dtype=torch.int64)),
                       torch.tensor([0.0, 1.0]), negatives=3)  # fmt: skip
    assert drawn.item_U.tolist() == [0, 1] and drawn.correction_U.tolist() == [-math.inf, 0.0]


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_dropout_keeps_the_mean_and_nothing_but_multiples(p):
    torch.manual_seed(0)
    drop = Dropout(p)
    dropped = drop(torch.ones(1000, 1001))
    assert len(dropped.unique()) <= 2 and abs(dropped.mean().item() - 1.0) < 0.1
    assert abs((dropped == 0).float().mean().item() - p) < 1 / 256 + 0.002
    assert torch.equal(drop.eval()(torch.ones(3)), torch.ones(3))


def test_the_loss_is_chosen_by_the_size_of_the_catalogue():
    assert Criterion("auto", torch.zeros(100), full_items=99).loss == "softmax"
    assert Criterion("auto", torch.zeros(101), full_items=99).loss == "sampled"
    assert Criterion("gbce", torch.zeros(100), full_items=99).loss == "gbce"


def test_softmax_of_an_impossible_target_is_exact():
    scores = torch.tensor([[-math.inf, 0.0, 300.0]])
    loss, gradient = softmax(scores, torch.tensor([1]), torch.tensor([0]), torch.tensor([1.0]))
    assert loss.item() == 300.0 and torch.equal(gradient, torch.tensor([[0.0, -1.0, 1.0]]))


def test_parts_with_a_backward_by_hand_are_what_autograd_says():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 12)
    own, theirs = RMSNorm(12, eps=1e-6), torch.nn.RMSNorm(12, eps=1e-6)
    weight = torch.randn(12)
    for ours, reference, parameters in (
        (own, theirs, (own.weight, theirs.weight)),
        (swiglu, lambda t: torch.nn.functional.silu(t[..., :6]) * t[..., 6:], None),
    ):
        if parameters:
            for parameter in parameters:
                parameter.data.copy_(weight)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        up, down = ours(a), reference(b)
        torch.testing.assert_close(up, down)
        gradient = torch.randn_like(up)
        up.backward(gradient)
        down.backward(gradient)
        torch.testing.assert_close(a.grad, b.grad)
        if parameters:
            torch.testing.assert_close(parameters[0].grad, parameters[1].grad)
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(own(half), theirs(half))


@pytest.mark.parametrize(("kind", "item_dim"), [(Embedding, -1), (Columns, 0)])
def test_a_small_table_that_is_looked_up_often_learns_what_autograd_says(kind, item_dim):
    torch.manual_seed(0)
    ours = kind(5, 3)
    theirs = torch.nn.Embedding.from_pretrained(ours.weight.detach().clone(), freeze=False)
    index = torch.randint(0, 4, (6, 7, 8))  # row 4 is never met
    gradient = torch.randn(6, 7, 8, 3)
    ours(index).backward(gradient.movedim(-1, item_dim))
    theirs(index).backward(gradient)
    assert torch.equal(ours(index).movedim(item_dim, -1), theirs(index))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    ours.zero_grad()
    ours(index[:0]).backward(gradient[:0].movedim(-1, item_dim))
    assert torch.equal(ours.weight.grad, torch.zeros(5, 3))


def test_a_halved_layer_trains_close_to_the_whole_one_and_answers_like_it():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 12)
    layer, whole = Linear(12, 7), torch.nn.Linear(12, 7)
    whole.load_state_dict(layer.state_dict())
    layer.halved = True
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    up, down = layer(a), whole(b)
    assert up.dtype == torch.float32 and not torch.equal(up, down)
    gradient = torch.randn_like(up)
    up.backward(gradient)
    down.backward(gradient)
    for parameter, theirs in (
        (up, down),
        (a.grad, b.grad),
        (layer.weight.grad, whole.weight.grad),
        (layer.bias.grad, whole.bias.grad),
    ):
        torch.testing.assert_close(parameter, theirs, rtol=0.02, atol=0.02)
    layer.eval()
    assert torch.equal(layer(x), whole(x))
