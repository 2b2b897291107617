"""Business rules of recommendation lists: boosts, exclusions, caps, diversity, and places for cold items.

Boosts and exclusions change the scores before the best items are selected. Caps and diversity then select
among the best, greedily by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998). The scores in a
list stay those of the model plus boosts.
Shapes: B lists, P candidates, k positions, V items and padding, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from recray.dataset.features import to_elements
from recray.dataset.reader import Dataset
from recray.errors import RefusedError

MAX_COUNT_BOOST = 60.0  # exp of it, times any count, is still finite in float32
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", re.ASCII)
# candidates among which diversity selects, before the rest follow by score; a fixed number, so that no list
# depends on the length of another
POOL = 500
LEAST_LIST = 5  # places of the shortest list whose last one may go to a cold item


@dataclass(frozen=True)
class Rules:
    """Rules in item indices.

    diversity : 0 (by score alone) to 1 (as unlike one another as possible)
    boost_V : float32 [V], added to scores; -inf for excluded items
    caps : for each capped column the code of an item's value, int64 [V] (-1: no value), and how many items of
        one value a list may hold
    cold_boost_V : float32 [V], added only to scores of the model, because no cold item is popular
    last_boost : the last place of a list goes to the best cold item if its score and this reach the score
        there; None: by score alone
    is_cold_V : bool [V]
    """

    diversity: float
    boost_V: Tensor
    caps: tuple[tuple[Tensor, int], ...]
    cold_boost_V: Tensor | None = None
    last_boost: float | None = None
    is_cold_V: Tensor | None = None

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any],
        dataset: Dataset,
        to_bundle: np.ndarray,
        cold_V: np.ndarray,
        cold_gaps: Sequence[float] = (),
    ) -> Rules | None:
        """The `RuleSettings` of `ScoreSettings`, applied to a dataset's item table; None where they change
        nothing.

        to_bundle : index of each of the dataset's items in a bundle (`Translation.to_bundle`)
        cold_V : bool [V], which of the bundle's items are cold (`Predictor.cold_V`)
        cold_gaps : see `Predictor`

        Raises RefusedError for a column that the dataset does not have.
        """
        cold_boost = settings.get("cold_item_boost", 0.0) * torch.from_numpy(cold_V).float()
        boost = torch.zeros(len(cold_V))
        bundle_index = torch.from_numpy(to_bundle)
        for name, value in settings["boosts"].items():
            boost[bundle_index[1:][_match_rule(dataset, name)]] += value
        for name in settings["exclude"]:
            boost[bundle_index[1:][_match_rule(dataset, name)]] = -torch.inf
        boost[0] = 0.0
        caps = tuple(
            (_value_codes(dataset, column, bundle_index, len(cold_V) - 1), limit)
            for column, limit in settings["caps"].items()
        )
        share = settings.get("cold_item_share", 0.0) if cold_V.any() and len(cold_gaps) else 0.0
        if not (settings["diversity"] or boost.any() or cold_boost.any() or caps or share):
            return None
        rules = cls(settings["diversity"], boost, caps, cold_boost if cold_boost.any() else None)
        if not share:
            return rules
        last_boost = float(np.interp(share, np.linspace(0.0, 1.0, len(cold_gaps)), cold_gaps))
        return replace(rules, last_boost=last_boost, is_cold_V=torch.from_numpy(cold_V))

    def add_boosts(self, scores: Tensor, first: int) -> Tensor:
        """Scores [..., n] of the items from `first` on, with boosts."""
        return scores + self.boost_V[first : first + scores.shape[-1]].to(scores.device)

    def adjust_scores(self, scores: Tensor, first: int) -> Tensor:
        """Model scores [..., n] of the items from `first` on, with boosts and the boost for cold items."""
        boosted = self.add_boosts(scores, first)
        if self.cold_boost_V is None:
            return boosted
        return boosted + self.cold_boost_V[first : first + scores.shape[-1]].to(scores.device)

    def adjust_counts(self, counts: Tensor, first: int) -> Tensor:
        """Counts [..., n] of the items from `first` on, boosted as if their score were log(1 + count).

        A negative score is returned as it is, not as a count.
        """
        boost = self.boost_V[first : first + counts.shape[-1]].to(counts.device)
        score, clamped = counts.log1p() + boost, boost.clamp(max=MAX_COUNT_BOOST)
        return torch.where(score < 0, score, counts * clamped.exp() + clamped.expm1())

    def pool_size(self, k: int) -> int:
        """How many of the best items `rerank` needs to select k."""
        return max(k, POOL) if self.diversity or self.caps else k

    @cached_property
    def max_length(self) -> int:
        """Upper bound of the length of a list under exclusions and caps."""
        allowed = self.boost_V[1:] > -torch.inf
        bounds = [int(allowed.sum())]
        for code_V, limit in self.caps:
            code = code_V[1:][allowed]
            bounds.append(int((code < 0).sum() + code[code >= 0].bincount().clamp(max=limit).sum()))
        return min(bounds)

    def rerank(
        self, index_BP: Tensor, scores_BP: Tensor, vectors_VD: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """k of P items in a new order, and their scores [B, k].

        A position that a cap leaves empty has index 0 and score -inf.

        index_BP : items by descending score, 0 with score -inf where there are fewer
        vectors_VD : item vectors, whose cosine is the similarity
        """
        if not (self.diversity or self.caps):
            return index_BP[:, :k], scores_BP[:, :k]

        rows = torch.arange(len(index_BP), device=index_BP.device)
        free = scores_BP > -torch.inf
        value, unit_BPD = scores_BP, None
        if self.diversity:
            first = min(POOL, index_BP.shape[1])
            relevance = _to_relevance(scores_BP[:, :first], free[:, :first])
            unit_BPD = torch.nn.functional.normalize(vectors_VD[index_BP[:, :first]], dim=-1)
            similarity = torch.zeros_like(relevance)
            # candidates beyond the pool come after all others, in their order
            rest = -2.0 - torch.arange(index_BP.shape[1] - first, device=index_BP.device) / index_BP.shape[1]
            value = torch.cat([relevance, rest.expand(len(index_BP), -1)], 1)

        codes = [code_V.to(index_BP.device)[index_BP] for code_V, _ in self.caps]
        picks: list[Tensor] = []
        for _ in range(min(k, index_BP.shape[1])):
            if unit_BPD is not None:
                value[:, :first] = (1 - self.diversity) * relevance - self.diversity * similarity
            pick = value.masked_fill(~free, -torch.inf).argmax(1)
            picks.append(torch.where(free.any(1), pick, -1))
            if unit_BPD is not None:
                similarity = torch.maximum(
                    similarity, (unit_BPD @ unit_BPD[rows, pick.clamp(max=first - 1)][:, :, None]).squeeze(2)
                )
            free[rows, pick] = False
            selected = torch.stack(picks, 1)
            for (_, limit), code_BP in zip(self.caps, codes, strict=True):
                selected_codes = torch.where(selected >= 0, code_BP.gather(1, selected.clamp(min=0)), -1)
                code = code_BP[rows, pick]
                is_full = ((selected_codes == code[:, None]).sum(1) >= limit) & (code >= 0)
                free &= ~(is_full[:, None] & (code_BP == code[:, None]))

        position = torch.stack(picks, 1)
        is_filled = position >= 0
        return (
            torch.where(is_filled, index_BP.gather(1, position.clamp(min=0)), 0),
            torch.where(is_filled, scores_BP.gather(1, position.clamp(min=0)), -torch.inf),
        )

    def explore(
        self, index_Bk: Tensor, scores_Bk: Tensor, cold_B: Tensor, cold_score_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Lists whose last place may go to a cold item, and their scores [B, k].

        A list stays as it is if it is shorter than `LEAST_LIST`, has an empty place, or has the cold item, or
        if a cap leaves no room for it.

        cold_B : the best cold item of each list, 0: none
        """
        if self.last_boost is None or index_Bk.shape[1] < LEAST_LIST:
            return index_Bk, scores_Bk
        reached_B = cold_score_B + self.last_boost
        enters_B = (
            (cold_B > 0)
            & (index_Bk[:, -1] > 0)
            & (reached_B >= scores_Bk[:, -1])
            & ~(index_Bk == cold_B[:, None]).any(1)
        )
        for code_V, limit in self.caps:
            code_V = code_V.to(index_Bk.device)
            same_B = (code_V[index_Bk[:, :-1]] == code_V[cold_B][:, None]).sum(1)
            enters_B &= (code_V[cold_B] < 0) | (same_B < limit)
        last_B = torch.where(enters_B, cold_B, index_Bk[:, -1])
        # in order, as the scores of a list are
        score_B = torch.where(enters_B, torch.minimum(reached_B, scores_Bk[:, -1]), scores_Bk[:, -1])
        return (
            torch.cat([index_Bk[:, :-1], last_B[:, None]], 1),
            torch.cat([scores_Bk[:, :-1], score_B[:, None]], 1),
        )


def find_unmatched(settings: Mapping[str, Any], dataset: Dataset) -> list[str]:
    """The `feature=value` of boosts and exclusions that no item of the dataset has. Raises RefusedError as
    `Rules.from_settings`.
    """
    names = (*settings["boosts"], *settings["exclude"])
    return [name for name in names if not _match_rule(dataset, name).any()]


def is_everything_excluded(settings: Mapping[str, Any], dataset: Dataset) -> bool:
    """Whether the exclusions leave no item of the dataset. Raises RefusedError as `Rules.from_settings`."""
    return bool(settings["exclude"]) and bool(
        torch.stack([_match_rule(dataset, name) for name in settings["exclude"]]).any(0).all()
    )


def _to_relevance(scores_BP: Tensor, free: Tensor) -> Tensor:
    """Scores scaled from 1 (the best) to 0 (the worst that is free)."""
    worst = torch.where(free, scores_BP, torch.inf).amin(1, keepdim=True)
    span = (scores_BP[:, :1] - worst).clamp(min=1e-9)
    return torch.where(free, (scores_BP - worst) / span, 0.0)


def _column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    if column not in dataset.items.column_names:
        raise RefusedError(
            f"a rule of section score is about {column!r}, which dataset {dataset.key} does not have",
            "name it in data.features and prepare the dataset again, or remove the rule",
        )
    return dataset.items[column]


def _match_rule(dataset: Dataset, name: str) -> Tensor:
    """Which items have the value of `column=value`, bool [items]."""
    column, _, value = name.partition("=")
    _column(dataset, column)
    return torch.from_numpy(match_values(dataset, column, [value]))


def match_values(dataset: Dataset, column: str, values: Sequence[Any]) -> np.ndarray:
    """Which items have one of the values in a column, bool [items].

    A list matches if one of its elements does. Numbers are compared in the precision of the column (0.85 in
    float32, 1 in decimal(10, 2)).
    """
    cells = dataset.items[column].combine_chunks()
    is_multi = dataset.manifest["settings"]["data"]["features"].get(column) == "multi"
    texts = {str(value).lower() if isinstance(value, bool) else str(value) for value in values}
    is_wrapped = pa.types.is_nested(cells.type) or pa.types.is_dictionary(cells.type)
    kind = cells.type.value_type if is_wrapped else cells.type
    numbers = {to_precision(number, kind) for text in texts if (number := _to_number(text)) is not None}

    def is_match(value: Any) -> bool:
        if value is None or isinstance(value, bool):
            return value is not None and str(value).lower() in {text.lower() for text in texts}
        return value in numbers if isinstance(value, int | float | Decimal) else str(value) in texts

    def has_match(cell: Any) -> bool:
        parts = cell.split("|") if is_multi and isinstance(cell, str) else cell
        if is_multi and isinstance(parts, list):
            return any(is_match(part) for part in parts if part != "")
        return is_match(cell)

    if pa.types.is_nested(cells.type):
        return np.fromiter((has_match(cell) for cell in cells.to_pylist()), bool, len(cells))
    if pa.types.is_float16(cells.type):  # which Arrow does not encode
        cells = cells.cast(pa.float32())
    encoded = cells if pa.types.is_dictionary(cells.type) else cells.dictionary_encode()
    matches = np.array([*(has_match(cell) for cell in encoded.dictionary.to_pylist()), False])
    result: np.ndarray = matches[pc.fill_null(encoded.indices.cast(pa.int64()), len(matches) - 1).to_numpy()]
    return result


def match_range(column: pa.ChunkedArray, low: int | float | None, high: int | float | None) -> np.ndarray:
    """Which numbers of a column lie between two bounds, both included, in the precision of the column, bool
    [n]; nulls never do.
    """
    is_valid = column.is_valid().to_numpy()
    if pa.types.is_decimal(column.type):
        values = np.array(
            [number if number is None else Fraction(number) for number in column.to_pylist()], object
        )[is_valid]
    else:
        values = pc.drop_null(column).to_numpy()
    inside = np.ones(len(values), bool)
    if low is not None:
        inside &= values >= to_precision(Fraction(str(low)), column.type)
    if high is not None:
        inside &= values <= to_precision(Fraction(str(high)), column.type)
    matches = np.zeros(len(column), bool)
    matches[is_valid] = inside
    return matches


def to_precision(number: Fraction, kind: pa.DataType) -> Any:
    """A number as a column of this type holds it; integers stay exact, whatever their size."""
    if pa.types.is_decimal(kind):
        return number
    if pa.types.is_integer(kind) and number.denominator == 1:
        return int(number)
    precision = (
        np.float32 if pa.types.is_float32(kind) else np.float16 if pa.types.is_float16(kind) else np.float64
    )
    try:
        return float(precision(float(number)))
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _to_number(text: str) -> Fraction | None:
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def _value_codes(dataset: Dataset, column: str, bundle_index: Tensor, n_items: int) -> Tensor:
    """Code of the value of each of the bundle's items, int64 [V]; -1 for no value or an empty one."""
    encoded = _column(dataset, column).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    values = encoded.dictionary.to_pylist()
    codes = [code if to_elements([value]) else -1 for code, value in enumerate(values)]
    item_codes = np.array([*codes, -1])[pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy()]
    code_V = torch.full((n_items + 1,), -1)
    code_V[bundle_index[1:]] = torch.from_numpy(item_codes)
    code_V[0] = -1
    return code_V
