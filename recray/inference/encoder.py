"""The network as inference uses it: histories to hidden states, and hidden states to scores of items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from recray.dataset.reader import History
from recray.inference.graphs import Graphs
from recray.inference.inputs import BatchBuilder
from recray.inference.modulation import controls_of
from recray.inference.vocabulary import Catalogue
from recray.model.controls import Controls
from recray.model.network import Network
from recray.model.shape import Batch

if TYPE_CHECKING:
    from torch import Tensor


class HistoryEncoder:
    """A model with its item vectors computed once.

    bfloat16 : on a CPU, computes products of histories in bfloat16, those with the items in float32; scores
        then agree to some 1e-2 of their scale alone
    """

    def __init__(
        self, model: Network, catalogue: Catalogue, *, popularity_prior_days: int, bfloat16: bool
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._event_types = catalogue.vocabulary.event_types
        self._bfloat16 = bfloat16 and self.device.type == "cpu"
        self._inputs = BatchBuilder(
            catalogue.popularity,
            popularity_prior_days=0 if model.prior_scale is None else popularity_prior_days,
            has_time=catalogue.has_time,
            event_types=model.shape.event_types,
            released_day=catalogue.available_from_day if model.shape.fresh else None,
        )
        self._graphs: Graphs | None = None
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's current weights, as in inference: without dropout, in whatever mode it is."""
        was_training = self.model.training
        self.model.eval()
        if self.model.cooccurrence is not None:
            self.model.cooccurrence.refresh()
        self._parts_MVD = self.model.items.parts()
        self.table_VD = self.model.items()
        self.output_VD = self.model.output(self.table_VD)
        has_vector_V = self.model.items.present().any(0)
        self.blank_items = (~has_vector_V[1:]).nonzero()[
            :, 0
        ] + 1  # without an id vector and without a feature

        if len(self.blank_items) and has_vector_V.any():  # such an item scores as all others do on average
            mean_D = self.output_VD[has_vector_V].mean(0)
            self.output_VD = self.output_VD.index_copy(
                0, self.blank_items, mean_D.expand(len(self.blank_items), -1)
            )
        self.model.train(was_training)
        self._graphs = None  # they read the item vectors where they were

    def capture_graphs(self, users: int, controls: Sequence[str] = ()) -> None:
        """On a GPU, capture CUDA graphs of the forward pass of up to `users` requests; on a CPU nothing.

        They hold until `refresh`. controls : names that requests may have
        """
        if self.device.type != "cuda":
            return
        event = History(*(np.ones(1, kind) for kind in (np.int64, np.int64, np.int64, np.float32)))
        batch = self.batch([event], np.zeros(1, np.int64), np.zeros((1, self.model.shape.context), np.int64))
        variants: list[Controls | None] = [None]
        if controls:
            neutral_controls = controls_of([dict.fromkeys(controls, 0.0)], self.model, self._event_types)
            variants.append(neutral_controls.map(lambda tensor: tensor.to(self.device)))
        self.model.eval()
        self._graphs = Graphs(self._hidden, (batch, variants), users, self.model.shape.history)

    def batch(self, histories: list[History], moments: np.ndarray, context_BC: np.ndarray) -> Batch:
        """Histories of known items at moments [B] in contexts [B, C], on the model's device."""
        return self._inputs.build(histories, moments, context_BC).to(self.device)

    def encode(
        self, batch: Batch, controls: Controls | None, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states [B, D], and the entropy of the unmodulated attention [B] in nats where it is
        wanted."""
        was_training = self.model.training
        if was_training:  # switching every module takes as long as a block of one history
            self.model.eval()
        entropy = None
        if with_entropy:
            hidden, entropy = self._hidden_and_entropy(batch, controls)
        else:
            graphs = None if torch.is_grad_enabled() else self._graphs
            graph_hidden = None if graphs is None else graphs(batch, controls)
            hidden = self._hidden(batch, controls) if graph_hidden is None else graph_hidden
        if was_training:
            self.model.train()
        return hidden, entropy

    def score_block(self, hidden: Tensor, batch: Batch, items: slice) -> Tensor:
        """Scores [B, n] of a block of items."""
        return self.model.scores(hidden, self.output_VD[items], batch, first=items.start)

    @torch.no_grad()
    def attention_rollout(self, batch: Batch) -> np.ndarray:
        """How much of each event reaches the hidden state through the attention (roll-out), float32 [T]."""
        was_training = self.model.training
        self.model.eval()
        rollout_T = self.model.roll_out(self.model.embed(batch, self.table_VD), batch)[0].cpu().numpy()
        self.model.train(was_training)
        return rollout_T

    def _hidden(self, batch: Batch, controls: Controls | None) -> Tensor:
        with self._precision():
            return self.model.hidden(batch, self.table_VD, self._parts_MVD, controls, masked=True).float()

    def _hidden_and_entropy(self, batch: Batch, controls: Controls | None) -> tuple[Tensor, Tensor]:
        with self._precision():
            embedded = self.model.embed(batch, self.table_VD, self._parts_MVD, controls)
            penultimate_BTD = self.model.hidden_before_last(embedded, batch, controls)
            hidden = self.model.hidden_at_query(penultimate_BTD, batch, controls).float()
        return hidden, self.model.entropy(penultimate_BTD.float(), batch)

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16)
