"""What one user can add to a step, shown against autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recray.errors import SettingsError
from recray.model.losses import Targets
from recray.model.network import Network
from recray.model.shape import PRESETS, Batch, Shape
from recray.privacy.engine import PrivateStep
from recray.privacy.norms import layer_norms

V, B, T, D = 23, 5, 8, 12
OFF = {"time_bias": False, "repeat": False, "prior": False, "dropout": 0.0}
NETWORKS = {
    "dp": PRESETS["dp"],
    "dp, cosine": {**PRESETS["dp"], "scores": "cosine"},
    "sasrec": PRESETS["sasrec"],
    "sasrec, cosine": {**PRESETS["sasrec"], "scores": "cosine"},
    "ligr": PRESETS["ligr"],
    "event types": {**PRESETS["dp"], "event_types": 3},
    "fixed features": {**PRESETS["dp"], "fixed_items": True},
    "counts": {**PRESETS["dp"], "counts": True},
    "counts, cosine": {**PRESETS["dp"], "counts": True, "scores": "cosine"},
}
BAGS = {
    "brand": (np.arange(V + 1) % 7, np.arange(V + 1)),
    "tags": (np.arange(2 * V) % 5, np.maximum(2 * np.arange(V + 1) - 2, 0)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def make(name: str, seed: int = 0, **options) -> Network:
    torch.manual_seed(seed)
    shape = Shape(**{"event_types": 1, "dim": D, "history": T, **OFF, **NETWORKS[name], **options})
    model = Network(shape, np.arange(V + 1) > 0, BAGS if shape.fixed_items else {})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        if model.items.ids is not None:
            model.items.ids.weight[0] = 0.0  # padding, as a step leaves it
        if model.offset_V is not None:
            model.offset_V.normal_()
    if model.temperature is not None:
        model.temperature.requires_grad_(False).fill_(0.2)
    return model.train()


def make_batch(users: int = B, seed: int = 1, events: int = 3) -> tuple[Batch, Targets]:
    """Histories with repeated items, of different lengths, each asked at some positions; the last user is
    asked nothing.
    """
    random = torch.Generator().manual_seed(seed)
    length = torch.randint(2, T + 1, (users,), generator=random)
    item = torch.randint(1, 6, (users, T), generator=random) * (torch.arange(T) < length[:, None])
    event = torch.randint(0, events, (users, T), generator=random)
    is_query = (torch.rand(users, T, generator=random) < 0.7) & (torch.arange(T) < length[:, None])
    is_query[:, 0] = True
    is_query[-1] = False
    user, position = is_query.nonzero(as_tuple=True)
    count = torch.randint(1, 3, (len(user),), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    targets = torch.randint(1, V + 1, (int(count.sum()),), generator=random)
    nothing = torch.zeros(1, 1)
    zeros = torch.zeros(users, T, dtype=torch.int64)
    batch = Batch(
        item,
        event,
        zeros.float(),
        zeros,
        zeros,
        user,
        position,
        nothing,
        nothing,
        torch.zeros_like(user),
        torch.zeros(len(user), 0),
    )
    return batch, Targets(offsets, targets)


def alone(batch: Batch, targets: Targets, user: int) -> tuple[Batch, Targets]:
    """The row of one user as a batch of its own."""
    own_rows = (batch.user_N == user).nonzero()[:, 0]
    rows = {
        name: getattr(batch, name)[user : user + 1]
        for name in ("item_BT", "event_BT", "value_BT", "time_BT", "now_BT")
    }
    queries = {
        "user_N": torch.zeros_like(own_rows),
        "position_N": batch.position_N[own_rows],
        "day_N": batch.day_N[own_rows],
        "context_NC": batch.context_NC[own_rows],
    }
    parts = [targets.item[targets.offsets[n] : targets.offsets[n + 1]] for n in own_rows.tolist()]
    offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts])], dtype=torch.int64)
    return batch._replace(**rows, **queries), Targets(
        offsets, torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    )


def by_autograd(model: Network, batch: Batch, targets: Targets) -> dict[str, torch.Tensor]:
    """Gradient of the mean cross-entropy of one user's queries."""
    table = model.items()
    scores = model.scores(model.hidden(batch, table, None), model.output(table), batch)
    count = targets.offsets.diff()
    query = torch.repeat_interleave(torch.arange(len(count)), count)
    loss = -(F.log_softmax(scores, 1)[query, targets.item] / count[query]).sum() / max(len(count), 1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(trained.items(), gradients, strict=True)
    }


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))


def private(
    model: Network, clipping_norm: float, noise: float = 0.0, users: float = 1.0, rate: float = 1.0
) -> PrivateStep:
    trained = [parameter for name, parameter in model.named_parameters() if name != "temperature"]
    return PrivateStep(
        model,
        torch.optim.SGD(trained, lr=rate),
        clipping_norm=clipping_norm,
        noise_multiplier=noise,
        expected_users=users,
    )


@networks
def test_the_ghost_norm_is_that_of_autograd(name):
    batch, targets = make_batch()
    expected = [norm_of(by_autograd(make(name), *alone(batch, targets, user))) for user in range(B)]
    assert expected[-1] == 0.0
    step = private(make(name), 1.0)
    for block, run in (
        (1 << 20, T),
        (1, T),
        (1 << 20, 3),
    ):  # all users at once, one at a time, positions in several runs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recray.privacy.engine.BLOCK_SCORES", {"cpu": block})
            patch.setattr("recray.model.attention.RANGE_SIZE", run)
            np.testing.assert_allclose(step.clipped_sum(batch, targets).numpy(), expected, rtol=1e-4)


@networks
def test_the_contribution_of_each_user_is_at_most_the_clipping_norm(name):
    batch, targets = make_batch()
    norms = [norm_of(by_autograd(make(name), *alone(batch, targets, user))) for user in range(B)]
    clipping_norm = 0.7 * sorted(norms)[2]
    for user in range(B):
        model = make(name)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        private(model, clipping_norm).step([alone(batch, targets, user)])
        moved = norm_of(
            {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
        )
        assert moved <= clipping_norm * (1 + 1e-4)
        np.testing.assert_allclose(moved, min(norms[user], clipping_norm), rtol=1e-3)


@networks
def test_the_step_is_the_sum_of_the_clipped_gradients(name):
    batch, targets = make_batch()
    model = make(name)
    each = [by_autograd(model, *alone(batch, targets, user)) for user in range(B)]
    clipping_norm = sorted(norm_of(gradients) for gradients in each)[2]
    factors = [min(1.0, clipping_norm / (norm_of(gradients) + 1e-12)) for gradients in each]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parts = [alone(batch, targets, user) for user in range(B - 1)] + [alone(batch, targets, B - 1)]
    for physical in ([(batch, targets)], parts):  # physical batches are not seen in the result
        model = make(name)
        private(model, clipping_norm, users=4.0).step(physical)
        for parameter, value in model.named_parameters():
            if not value.requires_grad:
                assert torch.equal(before[parameter], value)
                continue
            expected = sum(f * gradients[parameter] for f, gradients in zip(factors, each, strict=True)) / 4.0
            torch.testing.assert_close(before[parameter] - value.detach(), expected, rtol=1e-3, atol=1e-6)


def test_noise_has_the_stated_deviation_also_in_an_empty_step():
    model = make("dp", dim=64)
    sigma, clipping_norm, users = 1.7, 0.3, 20.0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = private(model, clipping_norm, noise=sigma, users=users)
    step.step([])
    assert not model.items.ids.weight[0].any()  # padding, which would be noise alone
    moved = torch.cat(
        [
            (parameter.detach() - before[name]).flatten()
            for name, parameter in model.named_parameters()
            if "ids" not in name
        ]
    )
    moved = torch.cat([moved, (model.items.ids.weight.detach() - before["items.ids.weight"])[1:].flatten()])
    assert len(moved) > 50_000
    np.testing.assert_allclose(moved.std().item(), sigma * clipping_norm / users, rtol=0.02)
    assert abs(moved.mean().item()) < 4 * sigma * clipping_norm / users / math.sqrt(len(moved))


def test_noise_is_another_in_every_step_and_training_whatever_torch_is_seeded_with():
    moved = []
    for _ in range(2):
        model = make("dp")
        step = private(model, 1.0, noise=1.0)
        for _ in range(2):
            before = model.items.ids.weight.detach().clone()
            torch.manual_seed(0)
            step.step([])
            moved.append((model.items.ids.weight.detach() - before)[1:].flatten())
    together = np.corrcoef(torch.stack(moved).numpy()) - np.eye(4)
    assert np.abs(together).max() < 5 / math.sqrt(len(moved[0]))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"time_bias": True}, "age_bias"),
        ({"repeat": True}, "repeat"),
        ({"prior": True}, "prior_scale"),
        ({"fresh": True}, "freshness"),
        ({"values": True}, "values"),
        ({"context": 1}, "context"),
        ({"relative": True}, "distance_bias"),
    ],
)
def test_a_part_whose_norm_is_not_known_is_refused_by_name(options, part):
    with pytest.raises(SettingsError, match=part):
        private(make("dp", **options), 1.0)


def test_features_that_are_learned_are_refused_by_name():
    bags = {"brand": (np.zeros(V + 1, np.int64), np.arange(V + 1))}
    model = Network(
        Shape(event_types=1, dim=D, history=T, **OFF, **PRESETS["dp"]), np.arange(V + 1) > 0, bags
    )
    with pytest.raises(SettingsError, match="items.features"):
        private(model, 1.0)


def test_fixed_codes_are_made_once_and_anew_for_other_tables():
    items, other = make("fixed features").items, make("fixed features", seed=1).items
    first = items.codes()
    assert items.codes() is first and torch.equal(items.codes(torch.tensor([4, 2])), first[[4, 2]])
    assert not torch.equal(other.codes(), first)
    other.load_state_dict(items.state_dict())
    assert torch.equal(other.codes(), first)


@pytest.mark.parametrize("T", [3, 40])
def test_both_ways_to_the_norm_of_a_layer_find_it(T):
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 8)
    x, gradient = torch.randn(4, T, 6), torch.randn(4, T, 8)
    norms = layer_norms(layer, [x], gradient)
    torch.testing.assert_close(
        norms[layer.weight], torch.einsum("bti,bto->boi", x, gradient).flatten(1).norm(dim=1)
    )
    torch.testing.assert_close(norms[layer.bias], gradient.sum(1).norm(dim=1))
