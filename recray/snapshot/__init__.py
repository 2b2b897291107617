"""Batch recommendations on disk: an immutable artifact that `LATEST.json` publishes in one step."""
