"""The one scoring path. Batch scoring, the endpoint, evaluation and training's validation all call
`Predictor`.
"""

from recray.inference.filters import Filters
from recray.inference.predictor import Predictor, Recommendations
from recray.inference.rules import Rules, find_unmatched
from recray.inference.vocabulary import Catalogue, Translation, Vocabulary

__all__ = [
    "Catalogue", "Filters", "Predictor", "Recommendations", "Rules", "Translation", "Vocabulary",
    "find_unmatched",
]  # fmt: skip
