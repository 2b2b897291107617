"""Items like an item, by the cosine of their vectors."""

from __future__ import annotations

import numpy as np
import torch

from recray.dataset.popularity import DAY_S
from recray.errors import RequestError
from recray.inference.candidates import item_blocks, merge, top_k
from recray.inference.predictor import Predictor


@torch.no_grad()
def find_similar(
    predictor: Predictor, item: int, k: int, now: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The items whose vectors are most like that of an item, int64 [up to k], and their cosines, float32.

    An item without an id vector and without features is like no other. With `now` (seconds), items that are
    not available at that moment are left out. Raises RequestError for an index outside the vocabulary.
    """
    if not 0 < item <= predictor.n_items:
        raise RequestError(
            f"item index {item} lies outside 1 to {predictor.n_items}", "use Vocabulary.index_of"
        )
    encoder, best = predictor.encoder, None
    if torch.isin(item, encoder.blank_items):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    vector = torch.nn.functional.normalize(encoder.table_VD[item], dim=0)
    excluded = [predictor.retired, encoder.blank_items, torch.tensor([0, item], device=encoder.device)]
    if predictor.availability is not None and now is not None:
        excluded.append(predictor.availability.select_unavailable(now // DAY_S).items)
    excluded_items = torch.cat(excluded)

    for items in item_blocks(predictor.n_items):
        cosines = torch.nn.functional.normalize(encoder.table_VD[items], dim=1) @ vector
        index = torch.arange(items.start, items.stop, device=encoder.device)
        cosines[torch.isin(index, excluded_items)] = -torch.inf
        positions, values = top_k(cosines[None], min(k, predictor.n_items))
        best = merge(best, (positions + items.start, values), k)
    assert best is not None
    item_index, values_k = (tensor[0].cpu().numpy() for tensor in best)
    is_item = np.isfinite(values_k)
    return item_index[is_item], values_k[is_item]
