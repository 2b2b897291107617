"""Which events carried the scores of items: attention roll-out, and occlusion of what it points at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recray.dataset.reader import History
from recray.inference.predictor import Predictor
from recray.model.controls import Controls

EVENTS = 32  # of a history that are looked at more closely


@dataclass(frozen=True)
class Explanation:
    """What carried the scores of k items of one user.

    position : int64 [n], the events that were looked at, as positions in the history, latest last
    attention : float32 [n], how much of each reached the hidden state through the attention (roll-out); the
        whole history adds up to one
    drop : float32 [k, n], how much lower the score of each item is without the event (occlusion)
    """

    position: np.ndarray
    attention: np.ndarray
    drop: np.ndarray


def explain(
    predictor: Predictor,
    history: History,
    items: np.ndarray,
    *,
    now: int,
    context: np.ndarray | None = None,
    controls: Controls | None = None,
    events: int = EVENTS,
) -> Explanation:
    """Which events of a history carried the scores of some items (indices), at the moment `now` (seconds).

    The attention selects the `events` that are looked at. Each is then left out, and the items are scored
    again. A history of one event has no score without it: the drop is then how far an item's score lies above
    the mean of all items.
    """
    encoder, limit = predictor.encoder, predictor.model.shape.history
    positions = np.flatnonzero(np.asarray(history.item_index) > 0)[-limit:]
    readable = predictor.readable(history)
    if not len(readable.item_index):
        return Explanation(positions[:0], np.zeros(0, np.float32), np.zeros((len(items), 0), np.float32))
    codes = np.zeros(predictor.model.shape.context, np.int64) if context is None else context
    rollout_T = encoder.attention_rollout(encoder.batch([readable], np.array([now], np.int64), codes[None]))

    if len(positions) == 1:
        every_item = np.arange(predictor.n_items + 1)
        contexts = None if context is None else [context]
        scores = predictor.score([readable], [every_item], now=now, controls=controls, context=contexts)[0]
        return Explanation(positions, rollout_T, (scores[items] - scores[1:].mean())[:, None])

    # repeat consumption and item-to-item evidence read these without attention
    is_read = np.isin(readable.item_index, items) | predictor.has_neighbours(readable.item_index, items)
    selected = np.sort(np.lexsort((rollout_T, is_read))[-events:])
    occluded = [History(*(np.delete(values, position) for values in readable)) for position in selected]
    histories = [readable, *occluded]
    expanded = None if controls is None else controls.map(lambda t: t.expand(len(histories), *t.shape[1:]))
    contexts = None if context is None else [context] * len(histories)
    scores = np.stack(
        predictor.score(histories, [items] * len(histories), now=now, controls=expanded, context=contexts)
    )
    return Explanation(positions[selected], rollout_T[selected], (scores[:1] - scores[1:]).T)
