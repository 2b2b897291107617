"""Trustworthy offline evaluation: metrics over the whole catalogue, protocols, baselines, intervals."""
