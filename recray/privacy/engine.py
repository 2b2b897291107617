"""One private step: clip every user's gradient to C, add noise to the sum, and update the weights.

Opacus computes the norms of the blocks' layers and runs the step. The noise is on a grid
(`recray.privacy.noise`). The tables, which histories look up and hidden states are scored against, have their
own norms (`recray.privacy.norms`). The loss of a user is its queries' mean cross-entropy over the whole
catalogue. Two backward passes compute the norms and the clipped sum.

Shapes as in `recray.model.network`; B users of a physical batch, Q maximal number of queries of a user.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from opacus.grad_sample import register_grad_sampler, register_norm_sampler
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.grad_sample.rms_norm import compute_rms_norm_grad_sample
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import DistributedDPOptimizerFastGradientClipping
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from recray.errors import SettingsError
from recray.model.fused import Linear, RMSNorm
from recray.model.losses import BLOCK_SCORES, Targets
from recray.model.network import Network
from recray.model.shape import Batch
from recray.privacy.audit import Canaries
from recray.privacy.noise import GridNoise
from recray.privacy.norms import ScoredTable, layer_norms, lookup_norms
from recray.privacy.watch import StepMonitor

TINY = 1e-6
TABLES = ("items.ids.weight", "items.adapter.weight", "positions.weight", "events.weight")
BIASES = ".event_bias.weight"

# of a table, whose inputs are row indices
warnings.filterwarnings("ignore", "Full backward hook is firing")

register_norm_sampler(Linear)(layer_norms)
register_grad_sampler(Linear)(compute_linear_grad_sample)
register_grad_sampler(RMSNorm)(compute_rms_norm_grad_sample)


class _Hooks(GradSampleHooksFastGradientClipping):  # type: ignore[misc]
    """Opacus' norms of all layers except the tables that histories look up.

    Opacus ignores the cross term of the item table's two uses; with it, a user could contribute 1.25 C.
    """

    def __init__(self, model: Network, clipping_norm: float) -> None:
        self._tables = [
            module for module in (model.items, model.positions, model.events) if module is not None
        ]
        super().__init__(model, loss_reduction="sum", strict=False, max_grad_norm=clipping_norm)

    def iterate_submodules(self, module: nn.Module) -> Iterator[nn.Module]:
        if not any(module is table for table in self._tables):
            yield from super().iterate_submodules(module)


class _LocalOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus' optimizer with the noise of `recray.privacy.noise`, which is always drawn on the host."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.noise = GridNoise(
            self.noise_multiplier, self.max_grad_norm, sum(parameter.numel() for parameter in self.params)
        )

    def add_noise(self) -> None:
        for parameter in self.params:
            multiples = self.noise.to_grid(parameter.summed_grad)
            parameter.grad = self.noise.from_grid(multiples + self.noise.draw_like(multiples))


class _DistributedOptimizer(DistributedDPOptimizerFastGradientClipping, _LocalOptimizer):  # type: ignore[misc]
    """Sums multiples of the grid over the ranks, which is exact in any order; rank 0 adds the noise."""

    def add_noise(self) -> None:
        for parameter in self.params:
            multiples = self.noise.to_grid(parameter.summed_grad)
            if self.rank == 0:
                multiples += self.noise.draw_like(multiples)
            dist.all_reduce(multiples)
            parameter.grad = self.noise.from_grid(multiples)

    def reduce_gradients(self) -> None:
        """Gradients are already sums over all ranks, divided by one rank's share of the expected users."""
        for parameter in self.params:
            parameter.grad /= self.world_size


class PrivateStep:
    """Takes differentially private steps of one model, on one rank or on several that share a process group.

    Parameters
    ----------
    clipping_norm : C, the maximal norm of one user's gradient
    noise_multiplier : σ; the sum over the users gets Gaussian noise of standard deviation σ C, once for all
        ranks
    expected_users : mean number of users of a step over all ranks; divides the noised sum

    Raises SettingsError for a model with a parameter whose exact norm is unknown.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        *,
        clipping_norm: float,
        noise_multiplier: float,
        expected_users: float,
    ) -> None:
        self.model, self.clipping_norm = model, clipping_norm
        self.device = next(model.parameters()).device
        if model.temperature is not None:
            model.temperature.requires_grad_(False)  # a public constant
        self.layers = _layers(model)
        self.hooks = _Hooks(model, clipping_norm)
        # the backward pass to x does not pass through them
        self.roots = [parameter for name, parameter in model.named_parameters() if name.endswith(BIASES)]
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.optimizer = (_DistributedOptimizer if dist.is_initialized() else _LocalOptimizer)(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            expected_batch_size=expected_users / world_size,
        )
        self.canaries: Canaries | None = None
        """Canaries of an audit, observed in every step; None: no audit."""
        self.monitor: StepMonitor | None = None
        """Monitor of an audit; None: no audit."""
        self.optimizer.attach_step_hook(self._observe)

    def step(self, physical: Iterable[tuple[Batch, Targets]]) -> None:
        """One update from this rank's users, one per row of a batch, in physical batches that fit the memory.

        There may be no users.
        """
        self.optimizer.zero_grad()
        for parameter in self.optimizer.params:
            parameter.grad = torch.zeros_like(parameter)
        for batch, targets in physical:
            self.clipped_sum(batch.to(self.device), targets.to(self.device))
        if self.canaries is not None:
            self.canaries.plant([_grad(parameter) for parameter in self.optimizer.params])
        if self.monitor is not None:
            self.monitor.record_sum(_over_ranks([_grad(parameter) for parameter in self.optimizer.params]))
        self.optimizer.step()
        if self.model.items.ids is not None:
            with torch.no_grad():  # padding has only noise, which could reveal the state of its generator
                self.model.items.ids.weight[0] = 0.0

    def _observe(self, optimizer: DPOptimizerFastGradientClipping) -> None:
        if self.canaries is not None:
            self.canaries.observe(
                [_grad(parameter) for parameter in optimizer.params], optimizer.expected_batch_size
            )
        if self.monitor is not None:
            self.monitor.record_release(
                [_grad(parameter) for parameter in optimizer.params], optimizer.expected_batch_size
            )

    def contribution_of(self, batch: Batch, targets: Targets) -> tuple[list[Tensor], float]:
        """Contribution of a batch's users to the sum of a step, and their largest norm before clipping.

        An audit calls it with one user.
        """
        saved = [parameter.grad for parameter in self.optimizer.params]
        for parameter in self.optimizer.params:
            parameter.grad = torch.zeros_like(parameter)
        norm = self.clipped_sum(batch.to(self.device), targets.to(self.device))
        contribution = [_grad(parameter) for parameter in self.optimizer.params]
        for parameter, gradient in zip(self.optimizer.params, saved, strict=True):
            parameter.grad = gradient
        return contribution, float(norm.max())

    def clipped_sum(self, batch: Batch, targets: Targets) -> Tensor:
        """Add the users' clipped gradients to every `.grad`; returns their norms before clipping [B].

        These norms are not private.
        """
        model = self.model.train()
        with torch.no_grad():
            table = model.items()
            output = model.output(table)
            x = model.embed(batch, table)
        x.requires_grad_()
        hidden = model.finish(model.states(x, batch))
        self.hooks.enable_hooks()
        catalogue = _CatalogueLoss(model, batch, targets, hidden.detach(), table, output)
        fixed = model.items.adapter is not None
        query_states = hidden[batch.user_N, batch.position_N]
        by_x, *_ = torch.autograd.grad(
            query_states, [x, *self.roots], catalogue.gradient_ND, retain_graph=True
        )
        by_items = by_x * math.sqrt(model.shape.dim) * (batch.item_BT > 0)[:, :, None]
        by_adapter = catalogue.adapter_gradients(by_items, model.items.codes()) if fixed else None
        norm = self._norms(
            batch, by_x, catalogue.norms(by_items) if by_adapter is None else by_adapter.square().sum((1, 2))
        )
        factor = (self.clipping_norm / (norm + TINY)).clamp(max=1.0)
        self.hooks.disable_hooks()
        torch.autograd.backward(query_states, catalogue.gradient_ND * factor[batch.user_N, None])
        self.hooks.enable_hooks()
        assert x.grad is not None
        self._add_tables(batch, x.grad)
        if by_adapter is not None and model.items.adapter is not None:
            _grad(model.items.adapter.weight).add_(torch.tensordot(factor, by_adapter, 1))
        elif model.items.ids is not None:
            ids = catalogue.table_gradient(factor)
            ids.index_add_(0, batch.item_BT.flatten(), x.grad.flatten(0, 1), alpha=math.sqrt(model.shape.dim))
            ids[0] = 0.0
            _grad(model.items.ids.weight).add_(ids)
        return norm

    def _norms(self, batch: Batch, by_x: Tensor, squared: Tensor) -> Tensor:
        """Norm of each user's whole gradient [B].

        squared : squared norm of its part for the parameters of the item vectors
        """
        if self.model.positions is not None:
            squared = squared + by_x.square().sum((1, 2))
        if self.model.events is not None:
            squared = squared + lookup_norms(batch.event_BT, by_x)
        for parameter in self.layers:
            squared = squared + parameter._norm_sample.square()  # type: ignore[attr-defined]
            del parameter._norm_sample  # type: ignore[attr-defined]
        return squared.sqrt()

    @torch.no_grad()
    def _add_tables(self, batch: Batch, by_x: Tensor) -> None:
        """Add the clipped sums of the other tables that the histories look up."""
        model = self.model
        if model.positions is not None:
            _grad(model.positions.weight)[: by_x.shape[1]] += by_x.sum(0)
        if model.events is not None:
            _grad(model.events.weight).index_add_(0, batch.event_BT.flatten(), by_x.flatten(0, 1))


class _CatalogueLoss:
    """Catalogue loss of a physical batch: gradients by hidden states, norms and clipped sum of the item
    table.
    """

    def __init__(
        self,
        model: Network,
        batch: Batch,
        targets: Targets,
        hidden_BTD: Tensor,
        table_VD: Tensor,
        output_VD: Tensor,
    ) -> None:
        B, V = len(batch.item_BT), len(output_VD)
        self.item_BT, self.output_VD = batch.item_BT, output_VD
        self.length_V = None if model.temperature is None else table_VD.norm(dim=1).clamp(min=1e-12)
        count = torch.bincount(batch.user_N, minlength=B)
        order = torch.argsort(batch.user_N, stable=True)
        slot_N = torch.empty_like(order)
        slot_N[order] = (
            torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[batch.user_N[order]]
        )
        Q = int(count.max()) if len(count) else 0
        self.hidden_BQD = hidden_BTD.new_zeros(B, Q, hidden_BTD.shape[2])
        self.hidden_BQD[batch.user_N, slot_N] = hidden_BTD[batch.user_N, batch.position_N]
        weight_BQ = hidden_BTD.new_zeros(B, Q)
        weight_BQ[batch.user_N, slot_N] = 1.0 / count[batch.user_N].to(weight_BQ.dtype)
        target_count = targets.offsets.diff()
        query = torch.repeat_interleave(
            torch.arange(len(target_count), device=target_count.device), target_count
        )
        share = weight_BQ[batch.user_N, slot_N][query] / target_count[query]
        self.gradient_BQV = hidden_BTD.new_empty(B, Q, V)
        by_hidden = torch.zeros_like(self.hidden_BQD)
        self.blocks: list[tuple[slice, ScoredTable]] = []
        size = max(BLOCK_SCORES[hidden_BTD.device.type] // max(Q * V, 1), 1)
        for first in range(0, B if Q else 0, size):
            users = slice(first, min(first + size, B))
            in_block = (batch.user_N[query] >= users.start) & (batch.user_N[query] < users.stop)
            target_index = (
                batch.user_N[query[in_block]] - first,
                slot_N[query[in_block]],
                targets.item[in_block],
            )
            scores = self.gradient_BQV[users]
            torch.mm(self.hidden_BQD[users].flatten(0, 1), output_VD.mT, out=scores.flatten(0, 1))
            scores[:, :, 0] = -math.inf
            raw_scores = (
                None
                if self.length_V is None
                else scores.clone().index_fill_(2, target_index[2].new_zeros(1), 0.0)
            )
            if model.offset_V is not None:
                scores += model.offset_V
            gradient = torch.softmax(scores, 2, out=scores).mul_(weight_BQ[users, :, None])
            gradient.index_put_(target_index, -share[in_block], accumulate=True)
            by_hidden[users] = gradient @ output_VD
            self.blocks.append(
                (
                    users,
                    ScoredTable(
                        self.item_BT[users], self.hidden_BQD[users], gradient, raw_scores, self.length_V
                    ),
                )
            )
        self.gradient_ND = by_hidden[batch.user_N, slot_N]

    def norms(self, gradient_BTD: Tensor) -> Tensor:
        """Squared norm of each user's gradient of the table [B].

        gradient_BTD : gradients by the looked-up rows; zero for padding
        """
        along_BT = None if self.length_V is None else (gradient_BTD * self.output_VD[self.item_BT]).sum(2)
        squared = (
            lookup_norms(self.item_BT, gradient_BTD)
            if not self.blocks
            else torch.empty_like(gradient_BTD[:, 0, 0])
        )
        for users, scored in self.blocks:
            squared[users] = scored.table_norms(
                gradient_BTD[users], None if along_BT is None else along_BT[users]
            )
        return squared

    def adapter_gradients(self, gradient_BTD: Tensor, codes_VF: Tensor) -> Tensor:
        """Each user's gradient of the map from fixed codes to item vectors [B, D, F].

        It is Σ_t d_t f(x_t)ᵀ + Σ_s h_s (Σ_v p_sv f_v)ᵀ.

        gradient_BTD : gradients d_t by the looked-up vectors
        """
        read = torch.bmm(gradient_BTD.mT, codes_VF[self.item_BT])
        return read + torch.bmm(self.hidden_BQD.mT, self.gradient_BQV @ codes_VF)

    def table_gradient(self, factor_B: Tensor) -> Tensor:
        """Sum over the users of factor times their gradient of the table by its scores [V, D]."""
        weighted = (self.hidden_BQD * factor_B[:, None, None]).flatten(0, 1)
        gradient = self.gradient_BQV.flatten(0, 1).mT @ weighted
        if self.length_V is None:
            return gradient
        radial = (gradient * self.output_VD).sum(1, keepdim=True)
        result: Tensor = (gradient - radial * self.output_VD) / self.length_V[:, None]
        return result


def _over_ranks(gradients: list[Tensor]) -> list[Tensor]:
    """Sums over all ranks, in new tensors."""
    sums = [gradient.double() for gradient in gradients]
    for gradient in sums if dist.is_initialized() else ():
        dist.all_reduce(gradient)
    return sums


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _layers(model: Network) -> list[nn.Parameter]:
    """The parameters whose norms Opacus computes.

    Raises SettingsError unless every trainable parameter has exactly one source of its norm.
    """
    sources = {name: 0 for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name in TABLES:
        if name in sources:
            sources[name] += 1
    layers = []
    for where, module in model.named_modules():
        for name, parameter in module.named_parameters(where, recurse=False):
            if parameter.requires_grad and (type(module) in (Linear, RMSNorm) or name.endswith(BIASES)):
                sources[name] += 1
                layers.append(parameter)
    if model.temperature is not None and model.items.adapter is not None:
        sources["items.adapter.weight"] = 0  # its norm is exact only for dot-product scores
    wrong = sorted(name for name, count in sources.items() if count != 1)
    if wrong:
        raise SettingsError(
            f"privacy: the exact contribution of one user to {', '.join(wrong)} is unknown",
            "use model.preset=dp or sasrec without time_bias, values, repeat_consumption, "
            "popularity_prior_days, context and learned features (model.items=features with dot-product "
            "scores "
            "keeps features fixed)",
        )
    return layers
