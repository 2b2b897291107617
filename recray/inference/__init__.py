"""The one scoring path. Batch scoring, the endpoint, evaluation and training's validation all call `Predictor`."""

from recray.inference.filters import Filters
from recray.inference.predictor import Explanation, Predictor, Recommendations, Translation
from recray.inference.rules import Rules, unmatched

__all__ = ["Explanation", "Filters", "Predictor", "Recommendations", "Rules", "Translation", "unmatched"]
