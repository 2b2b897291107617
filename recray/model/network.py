"""The recommender scores every item, given a user's history and the query time.

score(user, item) = hidden · item vector
    + repeat consumption (how often and how recently the user interacted with the item)
    + item-to-item evidence (what the training events connect with the items of the history)
    + recent popularity + freshness + log of a fixed count

All terms but the first are optional. Hidden states come from causal attention over the history. Each position
can be queried for the next item at a time `now`. Shapes: B users, T events, N queries (user, position), V
items and padding, D width, P days.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.model.attention import (
    AGE_BUCKETS,
    NORM_EPS,
    Attention,
    AttentionInputs,
    QueryRange,
    age_bucket,
    causal_bias,
    control_bias,
    split_positions,
)
from recray.model.blocks import Block
from recray.model.controls import Controls
from recray.model.cooccurrence import CooccurrenceHead
from recray.model.dropout import Dropout
from recray.model.fused import Embedding, RMSNorm, lookup
from recray.model.items import ItemEncoder
from recray.model.packed import Row, build_mask, run_blocks
from recray.model.shape import Batch, Shape

VALUE_BUCKETS = 64
FRESHNESS_BUCKETS = 20  # of `recray.dataset.popularity.freshness`
CODES = 1024  # of a context field in `recray.dataset.context`
UNKNOWN_SHARE = 0.25  # of context codes that training treats as unknown
COLDEST, HOTTEST = 0.01, 1.0  # range of the learned temperature of cosine scores


def value_bucket(value: Tensor) -> Tensor:
    """Bucket of a rating, a quantity, a price or a dwell time, int64 in [0, VALUE_BUCKETS).

    The buckets are quarter powers of two of 1 + value.
    """
    return (4.0 * torch.log2(1.0 + value.float().clamp(min=0))).round().clamp(max=VALUE_BUCKETS - 1).long()


class Network(nn.Module):
    """See the module's docstring.

    `offset_V` float32 [V] is the fixed log count of each item; None for a model without counts.

    Parameters
    ----------
    seen, features : as for `ItemEncoder`
    """

    offset_V: Tensor | None

    def __init__(
        self, shape: Shape, seen: np.ndarray, features: dict[str, tuple[np.ndarray, np.ndarray]]
    ) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.dim
        self.items = ItemEncoder(
            seen, features, shape.feature_buckets, dim, shape.id_dropout, fixed=shape.fixed_items
        )
        self.events = nn.Embedding(shape.event_types, dim) if shape.event_types > 1 else None
        self.values = nn.Embedding(VALUE_BUCKETS, dim) if shape.values else None
        self.positions = nn.Embedding(shape.history, dim) if shape.positions else None
        self.gaps = nn.Embedding(AGE_BUCKETS, dim) if shape.time_bias else None
        for table in (self.events, self.values, self.positions, self.gaps):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self.dropout = Dropout(shape.dropout)
        self.blocks = nn.ModuleList(
            Block(dim, shape.dropout, residual=shape.residual, feed=shape.feed, attention=_attention(shape))
            for _ in range(shape.blocks)
        )
        self.context = nn.ModuleList(ContextModulation(dim) for _ in range(shape.context))
        self.norm = RMSNorm(dim, eps=NORM_EPS)
        self.temperature = nn.Parameter(torch.tensor(0.05)) if shape.scores == "cosine" else None
        self.repeat = (
            RepeatConsumptionHead(
                dim, shape.event_types, has_time=shape.time_bias, by_item=shape.repeat_by_item
            )
            if shape.repeat
            else None
        )
        self.cooccurrence = CooccurrenceHead(shape.cooccurrence) if shape.cooccurrence else None
        self.prior_scale = nn.Parameter(torch.tensor(0.5)) if shape.prior else None
        self.freshness = nn.Embedding(FRESHNESS_BUCKETS, 1) if shape.fresh else None
        if self.freshness is not None:
            nn.init.zeros_(self.freshness.weight)
        self.register_buffer("offset_V", torch.zeros(len(seen)) if shape.counts else None)

    @property
    def scale(self) -> float:
        """Size of one unit of similarity in the scores: 1, for cosine scores 1 / temperature."""
        return (
            1.0
            if self.temperature is None
            else 1.0 / float(self.temperature.detach().clamp(COLDEST, HOTTEST))
        )

    def hidden(
        self,
        batch: Batch,
        table_VD: Tensor,
        parts_MVD: Tensor | None,
        controls: Controls | None = None,
        *,
        masked: bool = False,
    ) -> Tensor:
        """Hidden states of the queries [N, D].

        parts_MVD : needed where the controls weigh modalities
        masked : inference, with one query per user in the order of the users; uses the explicit mask and runs
            the last block at the query position only
        """
        x_BTD = self.embed(batch, table_VD, parts_MVD, controls)
        if masked:
            return self.hidden_at_query(self.hidden_before_last(x_BTD, batch, controls), batch, controls)
        if batch.packing is not None:
            return self._queried(self._packed(x_BTD, batch, controls), batch)
        return self._queried(self.states(x_BTD, batch, controls)[batch.user_N, batch.position_N], batch)

    def states(self, x_BTD: Tensor, batch: Batch, controls: Controls | None = None) -> Tensor:
        """Output of the blocks for the embedded histories [B, T, D]."""
        x = self.dropout(x_BTD)
        inputs = self.attention_inputs(batch, None, controls, masked=False)
        for block in self.blocks:
            x = block(x, inputs, controls)
        result: Tensor = x
        return result

    def _packed(self, x_BTD: Tensor, batch: Batch, controls: Controls | None) -> Tensor:
        """States of the queries [N, D], as from `states`, computed on the packed row.

        Of the controls only temperatures apply.
        """
        packing = batch.packing
        assert packing is not None
        time_P, now_P = (
            moments.flatten()[packing.source_P] if self.shape.time_bias else None
            for moments in (batch.time_BT, batch.now_BT)
        )
        event_P = batch.event_BT.flatten()[packing.source_P] if self.shape.event_types > 1 else None
        cooling_PH = None
        if controls is not None and controls.log_temperature is not None:
            cooling_PH = torch.exp(-controls.log_temperature)[packing.row_P.clamp(min=0)]
        row = Row(build_mask(packing), time_P, now_P, event_P, cooling_PH)
        x_PD = run_blocks(
            self.blocks, self.dropout(x_BTD).flatten(0, 1).index_select(0, packing.source_P), row
        )
        return x_PD.index_select(0, packing.first_B[batch.user_N] + batch.position_N)

    def hidden_before_last(self, x_BTD: Tensor, batch: Batch, controls: Controls | None = None) -> Tensor:
        """Output of all blocks but the last for the embedded histories [B, T, D], for inference."""
        inputs = self.attention_inputs(batch, None, controls, masked=True)
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD, inputs, controls)
        return x_BTD

    def hidden_at_query(self, before_BTD: Tensor, batch: Batch, controls: Controls | None = None) -> Tensor:
        """Hidden states of one query per user [B, D], from `hidden_before_last`.

        Runs the last block at the query position only.
        """
        position = batch.position_N
        inputs = self.attention_inputs(batch, position, controls, masked=True)
        states = self.blocks[-1](before_BTD, inputs, controls, position)
        return self._queried(states[:, 0], batch)

    def entropy(self, before_BTD: Tensor, batch: Batch) -> Tensor:
        """Entropy in nats of each query position's attention in the last block [B], from
        `hidden_before_last`.
        """
        last, position = self.blocks[-1], batch.position_N
        assert isinstance(last, Block)
        inputs = self.attention_inputs(batch, position, None, masked=True)
        result: Tensor = torch.special.entr(
            last.attention.weights(last.attention_norm(before_BTD), inputs, position)
        ).sum((1, 2))
        return result

    def _queried(self, states_ND: Tensor, batch: Batch) -> Tensor:
        for field, modulation in enumerate(self.context):
            states_ND = modulation(states_ND, batch.context_NC[:, field])
        return self.finish(states_ND)

    def roll_out(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """Influence of each event on each user's query position through all blocks [B, T]; rows sum to one.

        Attention roll-out (Abnar and Zuidema, arXiv 2005.00928): the product of the blocks' weights, each
        averaged with the identity.
        """
        inputs = self.attention_inputs(batch, None, None, masked=True)
        own = torch.eye(x_BTD.shape[1], device=x_BTD.device)
        rollout, x = own[None], x_BTD
        for block in self.blocks:
            assert isinstance(block, Block)
            rollout = (0.5 * own + 0.5 * block.attention.weights(block.attention_norm(x), inputs)) @ rollout
            x = block(x, inputs, None)
        return rollout[torch.arange(len(x), device=x.device), batch.position_N]

    def finish(self, states: Tensor) -> Tensor:
        """Hidden states that `scores` compares with items, from states [..., D]."""
        hidden = self.norm(states)
        if self.temperature is not None:
            hidden = F.normalize(hidden, dim=-1) / self.temperature.clamp(COLDEST, HOTTEST)
        result: Tensor = hidden
        return result

    def attention_inputs(
        self, batch: Batch, position: Tensor | None, controls: Controls | None, *, masked: bool
    ) -> AttentionInputs:
        """Inputs of attention from all positions, or from one per user, `position` int64 [B]."""
        shape = self.shape
        event = batch.event_BT if shape.event_types > 1 else None
        if not (
            masked
            or controls is not None
            or shape.time_bias
            or shape.relative
            or shape.attention == "pointwise"
            or event is not None
        ):
            return AttentionInputs(None, ())
        T = batch.item_BT.shape[1]
        if position is not None:
            return AttentionInputs(event, (self._query_range(batch, position[:, None], T, controls),))
        positions = split_positions(T, batch.item_BT.device)
        ends = accumulate(len(position) for position in positions)
        return AttentionInputs(
            event,
            tuple(self._query_range(batch, *each, controls) for each in zip(positions, ends, strict=True)),
        )

    def _query_range(self, batch: Batch, position_Q: Tensor, K: int, controls: Controls | None) -> QueryRange:
        """Inputs of attention from positions [Q] or [B, 1] to the first K events."""
        bias, age, age_s = causal_bias(position_Q, K, torch.float32), None, None
        if self.shape.time_bias:
            now_BQ = (
                batch.now_BT[:, position_Q] if position_Q.dim() == 1 else batch.now_BT.gather(1, position_Q)
            )
            age_s = now_BQ[:, :, None] - batch.time_BT[:, None, :K]
            age = age_bucket(age_s)
        if controls is not None:
            control = control_bias(controls, batch.event_BT[:, :K], _recency(age_s, position_Q, K))
            bias = bias if control is None else bias + control
        return QueryRange(position_Q, age, bias)

    def output(self, table_VD: Tensor) -> Tensor:
        """The item vectors [V, D] that `scores` compares with; of length one for cosine scores."""
        return table_VD if self.temperature is None else F.normalize(table_VD, dim=-1)

    def scores(
        self, hidden_ND: Tensor, output_VD: Tensor, batch: Batch, queries: slice = slice(None), first: int = 0
    ) -> Tensor:
        """Scores [N, V] of the items first, first + 1, … for `queries` of the batch; padding gets -inf."""
        scores = hidden_ND @ output_VD.mT
        if self.offset_V is not None:
            scores = scores + self.offset_V[first : first + len(output_VD)]
        if first == 0:
            scores = scores.index_fill(1, torch.zeros(1, dtype=torch.int64, device=scores.device), -math.inf)
        extra = self.extra_scores(
            hidden_ND, batch, queries, len(output_VD), self.repeat_propensity(output_VD), first
        )
        return scores if extra is None else scores + extra

    def repeat_propensity(self, output_VD: Tensor) -> Tensor | None:
        """Learned tendency of each item to be repeated [V]; None for a model without it."""
        if self.repeat is None or self.repeat.again is None:
            return None
        with torch.autocast(output_VD.device.type, enabled=False):  # its gradient sums over all queries
            result: Tensor | None = self.repeat.again(output_VD.float()).squeeze(1)
            return result

    def extra_scores(
        self,
        hidden_ND: Tensor,
        batch: Batch,
        queries: slice,
        n_items: int,
        propensity_V: Tensor | None,
        first: int = 0,
    ) -> Tensor | None:
        """Scores [N, n_items] of repeat consumption, item-to-item evidence, recent popularity and freshness;
        None for a model without.

        They are the scores of items first : first + n_items.

        propensity_V : `repeat_propensity` of these items
        """
        extra: Tensor | None = None
        if self.repeat is not None:
            extra = self.repeat(hidden_ND, batch, queries, n_items, propensity_V, first)
        if self.cooccurrence is not None and self.cooccurrence.is_attached:
            evidence = self.cooccurrence(batch, queries, n_items, first)
            extra = evidence if extra is None else extra + evidence
        if self.prior_scale is not None:
            prior = self.prior_scale * batch.prior_PV[:, first : first + n_items][batch.day_N[queries]]
            extra = prior if extra is None else extra + prior
        if self.freshness is not None:
            by_day = self.freshness(batch.fresh_PV[:, first : first + n_items].long()).squeeze(-1)
            fresh = by_day[batch.day_N[queries]]
            extra = fresh if extra is None else extra + fresh
        return extra

    def embed(
        self,
        batch: Batch,
        table_VD: Tensor,
        parts_MVD: Tensor | None = None,
        controls: Controls | None = None,
    ) -> Tensor:
        """The events of the histories as vectors [B, T, D]."""
        if controls is None or controls.log_modality_weight is None:
            x = F.embedding(batch.item_BT, table_VD)
        else:
            assert parts_MVD is not None
            present_MBT = self.items.present()[:, batch.item_BT]
            x = self.items.fuse(
                parts_MVD[:, batch.item_BT], present_MBT, controls.log_modality_weight.mT[:, :, None]
            )
        x = x * math.sqrt(self.shape.dim)
        if self.events is not None:
            x = x + self.events(batch.event_BT)
        if self.values is not None:
            x = x + self.values(value_bucket(batch.value_BT))
        if self.positions is not None:
            x = x + self.positions.weight[: x.shape[1]]
        if self.gaps is not None:
            x = x + self.gaps(age_bucket(batch.now_BT - batch.time_BT))
        return x


def _attention(shape: Shape) -> Attention:
    return Attention(
        shape.dim,
        shape.heads,
        kind=shape.attention,
        history=shape.history,
        relative=shape.relative,
        time_bias=shape.time_bias,
        event_types=shape.event_types,
    )


def _recency(age_BQK: Tensor | None, position_Q: Tensor, K: int) -> Tensor:
    """-log(1 + age) [B or 1, Q, K]; age in days, or in events where times are unknown."""
    if age_BQK is not None:
        return -torch.log1p(age_BQK.clamp(min=0).float() / 86_400.0)
    distance = position_Q[..., None] - torch.arange(K, device=position_Q.device)
    recency = -torch.log1p(distance.clamp(min=0).float())
    return recency if recency.dim() == 3 else recency[None]


class ContextModulation(nn.Module):
    """Modulates hidden states by one context field: x * (1 + scale) + shift (FiLM, arXiv 1709.07871).

    Scale and shift are looked up. Code 0 (unknown) changes nothing. Training treats a share of the codes as
    unknown, so that the model also learns nightly lists, which have no context.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(CODES, 2 * dim, padding_idx=0)
        nn.init.zeros_(self.table.weight)

    def forward(self, x_ND: Tensor, code_N: Tensor) -> Tensor:
        if self.training:
            code_N = code_N * (torch.rand(code_N.shape, device=code_N.device) >= UNKNOWN_SHARE)
        scale, shift = self.table(code_N).chunk(2, -1)
        result: Tensor = x_ND * (1.0 + scale) + shift
        return result


class RepeatConsumptionHead(nn.Module):
    """Scores items of the history: s · softplus(gate(hidden) + again(item)) · log(1 + Σ exp(age + event)).

    The sum runs over the item's events; calibration sets the scale s. With `by_item`, `again` is a linear map
    of the item's vector: some items are bought every week (fuel), others once. Without, it is 0.
    """

    log_scale: Tensor

    def __init__(self, dim: int, event_types: int, *, has_time: bool, by_item: bool) -> None:
        super().__init__()
        self.has_time = has_time
        self.age = Embedding(AGE_BUCKETS, 1)
        self.event = Embedding(event_types, 1)
        self.gate = nn.Linear(dim, 1)
        self.again = nn.Linear(dim, 1, bias=False) if by_item else None
        for table in (self.age, self.event, self.gate, self.again):
            if table is not None:
                nn.init.zeros_(table.weight)
        nn.init.ones_(self.gate.bias)
        self.register_buffer("log_scale", torch.zeros(()))

    def forward(
        self,
        hidden_ND: Tensor,
        batch: Batch,
        queries: slice,
        n_items: int,
        propensity_V: Tensor | None,
        first: int = 0,
    ) -> Tensor:
        """Scores of the items first : first + n_items [N, n_items].

        propensity_V : `Network.repeat_propensity` of these items
        """
        user_N, position_N = batch.user_N[queries], batch.position_N[queries]
        item_NT = batch.item_BT[user_N]
        where_T = torch.arange(item_NT.shape[1], device=item_NT.device)
        if self.has_time:
            age_NT = age_bucket(batch.now_BT[user_N, position_N][:, None] - batch.time_BT[user_N])
        else:
            age_NT = (
                (2.0 * torch.log2(1.0 + (position_N[:, None] - where_T).clamp(min=0).float()))
                .long()
                .clamp(max=AGE_BUCKETS - 1)
            )
        weight_NT = torch.exp(self.age(age_NT) + self.event(batch.event_BT[user_N])).squeeze(-1)
        inside = (item_NT >= first) & (item_NT < first + n_items)
        weight_NT = weight_NT * (inside & (where_T <= position_N[:, None]))
        index_NT = (item_NT - first).clamp(0, n_items - 1)
        # an item's events are summed at one of its positions; only the sums are scattered over the items,
        # because T is much smaller than V
        event_of_item = torch.empty(len(item_NT), n_items, dtype=torch.int16, device=item_NT.device)
        representative_NT = (
            event_of_item.scatter_(1, index_NT, where_T.short().expand_as(index_NT))
            .gather(1, index_NT)
            .long()
        )
        del event_of_item
        mass_NT = torch.zeros_like(weight_NT).scatter_add_(1, representative_NT, weight_NT)
        gate_NT = self.gate(hidden_ND)
        if propensity_V is not None:
            gate_NT = gate_NT + lookup(index_NT, propensity_V[:, None]).squeeze(-1)
        score_NT = self.log_scale.exp() * F.softplus(gate_NT) * torch.log1p(mass_NT)
        return torch.zeros(len(item_NT), n_items, dtype=score_NT.dtype, device=score_NT.device).scatter_add_(
            1, index_NT, score_NT
        )
