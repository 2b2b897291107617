"""recray: an attention recommender that runs on Ray, from an event log to an answered request.

Importing this package loads neither ray nor torch nor mlflow.
"""

__version__ = "0.1.0"
