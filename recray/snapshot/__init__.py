"""Nightly scores on disk: parts sealed as one directory, made visible by one flip of `LATEST.json`."""
