"""The recommender: history and moment in, a score for every item out.

score(user, item) = hidden · item vector  +  how often and how recently the user met the item  +  recent popularity  +  freshness
    +  the log of a fixed count,

all but the first optional. Hidden states come from causal attention over the history; each position may be asked what comes
next at a moment `now`. Shapes: B users, T events, N queries (user, position), V items and padding, D width, P days.
"""

from __future__ import annotations

import math
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recray.model.attention import AGE_BUCKETS, NORM_EPS, Attention, Run, Seen, age_bucket, causal_bias, control_bias, runs
from recray.model.blocks import Block
from recray.model.controls import Controls
from recray.model.dropout import Dropout
from recray.model.fused import Embedding, RMSNorm, lookup
from recray.model.items import ItemEncoder
from recray.model.packed import Row, mask_of, through
from recray.model.shape import Batch, Shape

VALUE_BUCKETS = 64
FRESHNESS_BUCKETS = 20  # as `recray.dataset.popularity.freshness` makes them
CODES = 1024  # of a field of the context, as `recray.dataset.context` makes them
UNKNOWN_SHARE = 0.25
COLDEST, HOTTEST = 0.01, 1.0  # bounds of the learned temperature of cosine scores


def value_bucket(value: Tensor) -> Tensor:
    """Bucket of a rating, a quantity, a price or a dwell time: quarter powers of two of 1 + value, int64 in [0, VALUE_BUCKETS)."""
    return (4.0 * torch.log2(1.0 + value.float().clamp(min=0))).round().clamp(max=VALUE_BUCKETS - 1).long()


class Recommender(nn.Module):
    """See the module's docstring.

    `offset_V` float32 [V] is the log of a count of each item, which nothing trains; None for a model without.

    Parameters
    ----------
    seen, features : as for `ItemEncoder`
    """

    offset_V: Tensor | None

    def __init__(self, shape: Shape, seen: np.ndarray, features: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__()
        self.shape = shape
        dim = shape.dim
        self.items = ItemEncoder(seen, features, shape.feature_buckets, dim, shape.id_dropout, fixed=shape.fixed_items)
        self.events = nn.Embedding(shape.event_types, dim) if shape.event_types > 1 else None
        self.values = nn.Embedding(VALUE_BUCKETS, dim) if shape.values else None
        self.positions = nn.Embedding(shape.history, dim) if shape.positions else None
        self.gaps = nn.Embedding(AGE_BUCKETS, dim) if shape.time_bias else None
        for table in (self.events, self.values, self.positions, self.gaps):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        self.dropout = Dropout(shape.dropout)
        self.blocks = nn.ModuleList(
            Block(dim, shape.dropout, residual=shape.residual, feed=shape.feed, attention=_attention(shape)) for _ in range(shape.blocks)
        )
        self.context = nn.ModuleList(Modulation(dim) for _ in range(shape.context))
        self.norm = RMSNorm(dim, eps=NORM_EPS)
        self.temperature = nn.Parameter(torch.tensor(0.05)) if shape.scores == "cosine" else None
        self.repeat = RepeatTerm(dim, shape.event_types, has_time=shape.time_bias, by_item=shape.repeat_by_item) if shape.repeat else None
        self.prior_scale = nn.Parameter(torch.tensor(0.5)) if shape.prior else None
        self.freshness = nn.Embedding(FRESHNESS_BUCKETS, 1) if shape.fresh else None
        if self.freshness is not None:
            nn.init.zeros_(self.freshness.weight)
        self.register_buffer("offset_V", torch.zeros(len(seen)) if shape.counts else None)

    @property
    def scale(self) -> float:
        """Size of one unit of similarity in the scores: 1, for cosine scores 1 / temperature."""
        return 1.0 if self.temperature is None else 1.0 / float(self.temperature.detach().clamp(COLDEST, HOTTEST))

    def hidden(self, batch: Batch, table_VD: Tensor, parts_MVD: Tensor | None, controls: Controls | None = None, *, masked: bool = False) -> Tensor:
        """Hidden states of the queries [N, D]; `parts_MVD` are needed where the controls weigh modalities.

        `masked` is the way of inference: one query a user, in the order of the users; always the explicit mask, and the last
        block at the asked position alone.
        """
        x_BTD = self.embed(batch, table_VD, parts_MVD, controls)
        if masked:
            return self.asked(self.before_last(x_BTD, batch, controls), batch, controls)
        if batch.packing is not None:
            return self._queried(self._packed(x_BTD, batch, controls), batch)
        return self._queried(self.states(x_BTD, batch, controls)[batch.user_N, batch.position_N], batch)

    def states(self, x_BTD: Tensor, batch: Batch, controls: Controls | None = None) -> Tensor:
        """What the blocks make of the embedded histories: [B, T, D]."""
        x = self.dropout(x_BTD)
        seen = self._seen(batch, None, controls, masked=False)
        for block in self.blocks:
            x = block(x, seen, controls)
        found: Tensor = x
        return found

    def _packed(self, x_BTD: Tensor, batch: Batch, controls: Controls | None) -> Tensor:
        """States of the queries [N, D] as `states` has them, gone through in one row. Controls may turn temperatures."""
        packing = batch.packing
        assert packing is not None
        time_P, now_P = (moments.flatten()[packing.place_P] if self.shape.time_bias else None for moments in (batch.time_BT, batch.now_BT))
        event_P = batch.event_BT.flatten()[packing.place_P] if self.shape.event_types > 1 else None
        cooling_PH = None
        if controls is not None and controls.log_temperature is not None:
            cooling_PH = torch.exp(-controls.log_temperature)[packing.row_P.clamp(min=0)]
        row = Row(mask_of(packing), time_P, now_P, event_P, cooling_PH)
        x_PD = through(self.blocks, self.dropout(x_BTD).flatten(0, 1).index_select(0, packing.place_P), row)
        return x_PD.index_select(0, packing.first_B[batch.user_N] + batch.position_N)

    def before_last(self, x_BTD: Tensor, batch: Batch, controls: Controls | None = None) -> Tensor:
        """What all blocks but the last make of the embedded histories, for inference: [B, T, D]."""
        seen = self._seen(batch, None, controls, masked=True)
        for block in self.blocks[:-1]:
            x_BTD = block(x_BTD, seen, controls)
        return x_BTD

    def asked(self, before_BTD: Tensor, batch: Batch, controls: Controls | None = None) -> Tensor:
        """Hidden states of one query a user [B, D], of `before_last`: the last block at the asked position alone."""
        position = batch.position_N
        seen = self._seen(batch, position, controls, masked=True)
        found: Tensor = self.blocks[-1](before_BTD, seen, controls, position)
        return self._queried(found[:, 0], batch)

    def entropy(self, before_BTD: Tensor, batch: Batch) -> Tensor:
        """Entropy in nats of how the asked position of each user attends to the history in the last block [B], of `before_last`."""
        last, position = self.blocks[-1], batch.position_N
        assert isinstance(last, Block)
        seen = self._seen(batch, position, None, masked=True)
        found: Tensor = torch.special.entr(last.attention.weights(last.attention_norm(before_BTD), seen, position)).sum((1, 2))
        return found

    def _queried(self, states_ND: Tensor, batch: Batch) -> Tensor:
        for field, modulation in enumerate(self.context):
            states_ND = modulation(states_ND, batch.context_NC[:, field])
        return self.finish(states_ND)

    def roll_out(self, x_BTD: Tensor, batch: Batch) -> Tensor:
        """How much each event reaches the asked position of each user through all blocks, [B, T], rows that sum to one.

        Attention roll-out (Abnar and Zuidema, arXiv 2005.00928): weights of the blocks multiplied, half of each state taken for its own.
        """
        seen = self._seen(batch, None, None, masked=True)
        own = torch.eye(x_BTD.shape[1], device=x_BTD.device)
        reach, x = own[None], x_BTD
        for block in self.blocks:
            assert isinstance(block, Block)
            reach = (0.5 * own + 0.5 * block.attention.weights(block.attention_norm(x), seen)) @ reach
            x = block(x, seen, None)
        return reach[torch.arange(len(x), device=x.device), batch.position_N]

    def finish(self, states: Tensor) -> Tensor:
        """Hidden states that `scores` compares with items, of states [..., D]."""
        found: Tensor = self.norm(states)
        if self.temperature is not None:
            found = F.normalize(found, dim=-1) / self.temperature.clamp(COLDEST, HOTTEST)
        return found

    def _seen(self, batch: Batch, asked: Tensor | None, controls: Controls | None, *, masked: bool) -> Seen:
        """What attention sees from all positions, or from one a user, `asked` int64 [B]."""
        shape = self.shape
        event = batch.event_BT if shape.event_types > 1 else None
        if not (masked or controls is not None or shape.time_bias or shape.relative or shape.attention == "pointwise" or event is not None):
            return Seen(None, ())
        T = batch.item_BT.shape[1]
        if asked is not None:
            return Seen(event, (self._run(batch, asked[:, None], T, controls),))
        positions = runs(T, batch.item_BT.device)
        ends = accumulate(len(position) for position in positions)
        return Seen(event, tuple(self._run(batch, *each, controls) for each in zip(positions, ends, strict=True)))

    def _run(self, batch: Batch, position_Q: Tensor, K: int, controls: Controls | None) -> Run:
        """What positions [Q] or [B, 1] see of the first K events."""
        bias, age, age_s = causal_bias(position_Q, K, torch.float32), None, None
        if self.shape.time_bias:
            now_BQ = batch.now_BT[:, position_Q] if position_Q.dim() == 1 else batch.now_BT.gather(1, position_Q)
            age_s = now_BQ[:, :, None] - batch.time_BT[:, None, :K]
            age = age_bucket(age_s)
        if controls is not None:
            moved = control_bias(controls, batch.event_BT[:, :K], _recency(age_s, position_Q, K))
            bias = bias if moved is None else bias + moved
        return Run(position_Q, age, bias)

    def output(self, table_VD: Tensor) -> Tensor:
        """The vectors [V, D] that `scores` compares with: those of the items, of length one for cosine scores."""
        return table_VD if self.temperature is None else F.normalize(table_VD, dim=-1)

    def scores(self, hidden_ND: Tensor, output_VD: Tensor, batch: Batch, queries: slice = slice(None), first: int = 0) -> Tensor:
        """Scores of the items first, first + 1, … for some of the batch's queries [N, V]; padding (item 0) gets -inf."""
        scores = hidden_ND @ output_VD.mT
        if self.offset_V is not None:
            scores = scores + self.offset_V[first : first + len(output_VD)]
        if first == 0:
            scores = scores.index_fill(1, torch.zeros(1, dtype=torch.int64, device=scores.device), -math.inf)
        extra = self.extra(hidden_ND, batch, queries, len(output_VD), self.again(output_VD), first)
        return scores if extra is None else scores + extra

    def again(self, output_VD: Tensor) -> Tensor | None:
        """How much more than others each item is met again by whom met it [V]; None where the model takes all for alike."""
        if self.repeat is None or self.repeat.again is None:
            return None
        with torch.autocast(output_VD.device.type, enabled=False):  # its gradient sums over all queries
            found: Tensor = self.repeat.again(output_VD.float()).squeeze(1)
        return found

    def extra(self, hidden_ND: Tensor, batch: Batch, queries: slice, n_items: int, again_V: Tensor | None, first: int = 0) -> Tensor | None:
        """What repetition, recent popularity and freshness add to the scores of items first : first + n_items [N, n_items]; None for
        a model with none of them. `again_V` is what `again` says of these items."""
        found: Tensor | None = None
        if self.repeat is not None:
            found = self.repeat(hidden_ND, batch, queries, n_items, again_V, first)
        if self.prior_scale is not None:
            prior = self.prior_scale * batch.prior_PV[:, first : first + n_items][batch.day_N[queries]]
            found = prior if found is None else found + prior
        if self.freshness is not None:
            fresh = self.freshness(batch.fresh_PV[:, first : first + n_items].long()).squeeze(-1)[batch.day_N[queries]]
            found = fresh if found is None else found + fresh
        return found

    def embed(self, batch: Batch, table_VD: Tensor, parts_MVD: Tensor | None = None, controls: Controls | None = None) -> Tensor:
        """The events of the histories as vectors [B, T, D]."""
        if controls is None or controls.log_modality_weight is None:
            x = F.embedding(batch.item_BT, table_VD)
        else:
            assert parts_MVD is not None
            present_MBT = self.items.present()[:, batch.item_BT]
            x = self.items.fuse(parts_MVD[:, batch.item_BT], present_MBT, controls.log_modality_weight.mT[:, :, None])
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
    """-log(1 + age) [B or 1, Q, K], age in days, or in events where no time is known."""
    if age_BQK is not None:
        return -torch.log1p(age_BQK.clamp(min=0).float() / 86_400.0)
    distance = position_Q[..., None] - torch.arange(K, device=position_Q.device)
    found = -torch.log1p(distance.clamp(min=0).float())
    return found if found.dim() == 3 else found[None]


class Modulation(nn.Module):
    """What one field of the context does to hidden states: x * (1 + scale) + shift, both looked up (FiLM, arXiv 1709.07871).

    Unknown (code 0) does nothing; in training a share of the known is taken for unknown, so that nightly lists are learned too.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(CODES, 2 * dim, padding_idx=0)
        nn.init.zeros_(self.table.weight)

    def forward(self, x_ND: Tensor, code_N: Tensor) -> Tensor:
        if self.training:
            code_N = code_N * (torch.rand(code_N.shape, device=code_N.device) >= UNKNOWN_SHARE)
        scale, shift = self.table(code_N).chunk(2, -1)
        found: Tensor = x_ND * (1.0 + scale) + shift
        return found


class RepeatTerm(nn.Module):
    """Score of items that are in the history: softplus(gate(hidden) + again(item)) · log(1 + Σ over the item's events of exp(age + event weight)).

    With `by_item`, `again` is read off the item's vector: some things are bought every week by who buys them at all (fuel), others
    once; without, it is 0.
    """

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

    def forward(self, hidden_ND: Tensor, batch: Batch, queries: slice, n_items: int, again_V: Tensor | None, first: int = 0) -> Tensor:
        """Scores of the items first : first + n_items [N, n_items], of which `again_V` tells how much they are met again."""
        user_N, position_N = batch.user_N[queries], batch.position_N[queries]
        item_NT = batch.item_BT[user_N]
        where_T = torch.arange(item_NT.shape[1], device=item_NT.device)
        if self.has_time:
            age_NT = age_bucket(batch.now_BT[user_N, position_N][:, None] - batch.time_BT[user_N])
        else:
            age_NT = (2.0 * torch.log2(1.0 + (position_N[:, None] - where_T).clamp(min=0).float())).long().clamp(max=AGE_BUCKETS - 1)
        weight_NT = torch.exp(self.age(age_NT) + self.event(batch.event_BT[user_N])).squeeze(-1)
        inside = (item_NT >= first) & (item_NT < first + n_items)
        weight_NT = weight_NT * (inside & (where_T <= position_N[:, None]))
        place_NT = (item_NT - first).clamp(0, n_items - 1)
        # an item's events are summed at one of its positions, and only sums are spread over the items: T is much smaller than V
        one_NV = torch.empty(len(item_NT), n_items, dtype=torch.int16, device=item_NT.device)
        one_NT = one_NV.scatter_(1, place_NT, where_T.short().expand_as(place_NT)).gather(1, place_NT).long()
        del one_NV
        mass_NT = torch.zeros_like(weight_NT).scatter_add_(1, one_NT, weight_NT)
        gate_NT = self.gate(hidden_ND)
        if again_V is not None:
            gate_NT = gate_NT + lookup(place_NT, again_V[:, None]).squeeze(-1)
        found_NT = F.softplus(gate_NT) * torch.log1p(mass_NT)
        return torch.zeros(len(item_NT), n_items, dtype=found_NT.dtype, device=found_NT.device).scatter_add_(1, place_NT, found_NT)
