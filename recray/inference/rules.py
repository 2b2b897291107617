"""What a shop declares about its lists, beside what the model finds: boosts, exclusions, caps, and dials for diversity and for
what training never saw.

Boosts and exclusions change scores before the best items are looked for. Caps and diversity choose among the best: greedily,
maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998). The scores of an answer stay those of the model plus boosts.
Shapes: B lists, P candidates, k places, V items and padding, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recray.dataset.features import elements
from recray.dataset.reader import Dataset
from recray.errors import RefusedError

MOST = 60.0  # boost of a count; e to it, times any count, is a number still
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", re.ASCII)
POOL = 500  # candidates that lists are made diverse of, always as many, so that no list depends on how long another is; then by score


@dataclass(frozen=True)
class Rules:
    """Rules in item indices.

    diversity : 0 (by score alone) to 1 (as unlike one another as can be)
    boost_V : float32 [V], added to scores; -inf for what is never answered
    caps : for each capped column the number of an item's value, int64 [V] (-1: it has none), and how many of one value a list may hold
    unseen_V : float32 [V], added to what the model finds alone: how popular an item is that nobody met is no matter of features
    """

    diversity: float
    boost_V: Tensor
    caps: tuple[tuple[Tensor, int], ...]
    unseen_V: Tensor | None = None

    @classmethod
    def declared(cls, declared: dict[str, Any], dataset: Dataset, to_bundle: np.ndarray, unseen: np.ndarray) -> Rules | None:
        """The `diversity`, `boosts`, `exclude`, `caps` and `unseen` of `ScoreSettings`, by a dataset's item table; None for none.

        to_bundle : index of each of the dataset's items in a bundle (`Translation.to_bundle`)
        unseen : bool [V], which of the bundle's items the dial of that name lifts (`Predictor.unseen`)
        Raises RefusedError for a column that the dataset does not have.
        """
        lifted = declared.get("unseen", 0.0) * torch.from_numpy(unseen).float()  # snapshots of before the dial have none
        boost = torch.zeros(len(unseen))
        to = torch.from_numpy(to_bundle)
        for name, value in declared["boosts"].items():
            boost[to[1:][_matches(dataset, name)]] += value
        for name in declared["exclude"]:
            boost[to[1:][_matches(dataset, name)]] = -torch.inf
        boost[0] = 0.0
        caps = tuple((_groups(dataset, column, to, len(unseen) - 1), limit) for column, limit in declared["caps"].items())
        if not (declared["diversity"] or boost.any() or lifted.any() or caps):
            return None
        return cls(declared["diversity"], boost, caps, lifted if lifted.any() else None)

    def boosted(self, scores: Tensor, first: int) -> Tensor:
        """Scores [..., n] of the items from `first` on, with boosts."""
        return scores + self.boost_V[first : first + scores.shape[-1]].to(scores.device)

    def of_scores(self, scores: Tensor, first: int) -> Tensor:
        """What a model finds [..., n] of the items from `first` on, with boosts and the dial."""
        found = self.boosted(scores, first)
        return found if self.unseen_V is None else found + self.unseen_V[first : first + scores.shape[-1]].to(scores.device)

    def of_counts(self, counts: Tensor, first: int) -> Tensor:
        """Counts [..., n] of the items from `first` on, boosted as if their score were log(1 + count), which they become below zero."""
        boost = self.boost_V[first : first + counts.shape[-1]].to(counts.device)
        score, most = counts.log1p() + boost, boost.clamp(max=MOST)
        return torch.where(score < 0, score, counts * most.exp() + most.expm1())

    def pool(self, k: int) -> int:
        """How many of the best items to choose k from."""
        return max(k, POOL) if self.diversity or self.caps else k

    @cached_property
    def room(self) -> int:
        """How many places a list can have: more than the caps leave are never filled."""
        allowed = self.boost_V[1:] > -torch.inf
        found = [int(allowed.sum())]
        for group_V, limit in self.caps:
            group = group_V[1:][allowed]
            found.append(int((group < 0).sum() + group[group >= 0].bincount().clamp(max=limit).sum()))
        return min(found)

    def choose(self, index_BP: Tensor, scores_BP: Tensor, vectors_VD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """k of P items in a new order, and their scores [B, k]; index 0 and -inf where a cap leaves a place empty.

        index_BP : items by descending score, 0 with score -inf where there are fewer
        vectors_VD : item vectors, whose cosine is likeness
        """
        if not (self.diversity or self.caps):
            return index_BP[:, :k], scores_BP[:, :k]
        rows = torch.arange(len(index_BP), device=index_BP.device)
        free = scores_BP > -torch.inf
        worth, unit_BPD = scores_BP, None
        if self.diversity:
            first = min(POOL, index_BP.shape[1])
            relevance = _relevance(scores_BP[:, :first], free[:, :first])
            unit_BPD = torch.nn.functional.normalize(vectors_VD[index_BP[:, :first]], dim=-1)
            likeness = torch.zeros_like(relevance)
            behind = -2.0 - torch.arange(index_BP.shape[1] - first, device=index_BP.device) / index_BP.shape[1]  # below every other, in their order
            worth = torch.cat([relevance, behind.expand(len(index_BP), -1)], 1)
        values = [group_V.to(index_BP.device)[index_BP] for group_V, _ in self.caps]
        picks: list[Tensor] = []
        for _ in range(min(k, index_BP.shape[1])):
            if unit_BPD is not None:
                worth[:, :first] = (1 - self.diversity) * relevance - self.diversity * likeness
            pick = worth.masked_fill(~free, -torch.inf).argmax(1)
            picks.append(torch.where(free.any(1), pick, -1))
            if unit_BPD is not None:
                likeness = torch.maximum(likeness, (unit_BPD @ unit_BPD[rows, pick.clamp(max=first - 1)][:, :, None]).squeeze(2))
            free[rows, pick] = False
            chosen = torch.stack(picks, 1)
            for (_, limit), value_BP in zip(self.caps, values, strict=True):
                taken = torch.where(chosen >= 0, value_BP.gather(1, chosen.clamp(min=0)), -1)
                mine = value_BP[rows, pick]
                full = ((taken == mine[:, None]).sum(1) >= limit) & (mine >= 0)
                free &= ~(full[:, None] & (value_BP == mine[:, None]))
        place = torch.stack(picks, 1)
        there = place >= 0
        return (
            torch.where(there, index_BP.gather(1, place.clamp(min=0)), 0),
            torch.where(there, scores_BP.gather(1, place.clamp(min=0)), -torch.inf),
        )


def unmatched(declared: dict[str, Any], dataset: Dataset) -> list[str]:
    """The `feature=value` of boosts and exclusions that no item of the dataset has. Raises RefusedError as `Rules.declared`."""
    return [name for name in (*declared["boosts"], *declared["exclude"]) if not _matches(dataset, name).any()]


def leaves_nothing(declared: dict[str, Any], dataset: Dataset) -> bool:
    """Whether the exclusions leave no item of the dataset. Raises RefusedError as `Rules.declared`."""
    return bool(declared["exclude"]) and bool(torch.stack([_matches(dataset, name) for name in declared["exclude"]]).any(0).all())


def _relevance(scores_BP: Tensor, free: Tensor) -> Tensor:
    """Scores from 1 (the best) to 0 (the last that is free)."""
    worst = torch.where(free, scores_BP, torch.inf).amin(1, keepdim=True)
    span = (scores_BP[:, :1] - worst).clamp(min=1e-9)
    return torch.where(free, (scores_BP - worst) / span, 0.0)


def _column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    if column not in dataset.items.column_names:
        raise RefusedError(
            f"a rule of section score is about {column!r}, which dataset {dataset.key} does not have",
            "name it in data.features and prepare the dataset again, or take the rule out",
        )
    return dataset.items[column]


def _matches(dataset: Dataset, name: str) -> Tensor:
    """Which items have the value of `column=value`, bool [items]."""
    column, _, value = name.partition("=")
    _column(dataset, column)
    return torch.from_numpy(having(dataset, column, [value]))


def having(dataset: Dataset, column: str, values: Sequence[Any]) -> np.ndarray:
    """Which items have one of the values in a column, bool [items]: a list if one of its elements is it, a number if it is equal in the
    precision of the column (0.85 in float32, 1 in decimal(10, 2))."""
    found = dataset.items[column].combine_chunks()
    multi = dataset.manifest["settings"]["data"]["features"].get(column) == "multi"
    texts = {str(value).lower() if isinstance(value, bool) else str(value) for value in values}
    kind = found.type.value_type if pa.types.is_nested(found.type) or pa.types.is_dictionary(found.type) else found.type
    numbers = {in_precision(number, kind) for text in texts if (number := _number(text)) is not None}

    def is_one(here: Any) -> bool:
        if here is None or isinstance(here, bool):
            return here is not None and str(here).lower() in {text.lower() for text in texts}
        return here in numbers if isinstance(here, int | float | Decimal) else str(here) in texts

    def has(here: Any) -> bool:
        parts = here.split("|") if multi and isinstance(here, str) else here
        return any(is_one(part) for part in parts if part != "") if multi and isinstance(parts, list) else is_one(here)

    if pa.types.is_nested(found.type):
        return np.fromiter((has(here) for here in found.to_pylist()), bool, len(found))
    if pa.types.is_float16(found.type):  # which Arrow does not encode
        found = found.cast(pa.float32())
    encoded = found if pa.types.is_dictionary(found.type) else found.dictionary_encode()
    known = np.array([*(has(here) for here in encoded.dictionary.to_pylist()), False])
    chosen: np.ndarray = known[pc.fill_null(encoded.indices.cast(pa.int64()), len(known) - 1).to_numpy()]
    return chosen


def between(column: pa.ChunkedArray, low: int | float | None, high: int | float | None) -> np.ndarray:
    """Which numbers of a column lie between two bounds, both included, in the precision of the column, bool [n]; none that is null."""
    known = column.is_valid().to_numpy()
    if pa.types.is_decimal(column.type):
        values = np.array([number if number is None else Fraction(number) for number in column.to_pylist()], object)[known]
    else:
        values = pc.drop_null(column).to_numpy()
    chosen = np.ones(len(values), bool)
    if low is not None:
        chosen &= values >= in_precision(Fraction(str(low)), column.type)
    if high is not None:
        chosen &= values <= in_precision(Fraction(str(high)), column.type)
    found = np.zeros(len(column), bool)
    found[known] = chosen
    return found


def in_precision(number: Fraction, kind: pa.DataType) -> Any:
    """A number as a column of that type holds it; whole ones are exact, whatever their size."""
    if pa.types.is_decimal(kind):
        return number
    if pa.types.is_integer(kind) and number.denominator == 1:
        return int(number)
    precision = np.float32 if pa.types.is_float32(kind) else np.float16 if pa.types.is_float16(kind) else np.float64
    try:
        return float(precision(float(number)))
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _number(text: str) -> Fraction | None:
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def _groups(dataset: Dataset, column: str, to: Tensor, n_items: int) -> Tensor:
    """Number of each of the bundle's items' value, int64 [V]; -1 for none, which an empty one is."""
    encoded = _column(dataset, column).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    found = torch.full((n_items + 1,), -1)
    number = np.array([*(place if elements([value]) else -1 for place, value in enumerate(encoded.dictionary.to_pylist())), -1])
    found[to[1:]] = torch.from_numpy(number[pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()])
    found[0] = -1
    return found
