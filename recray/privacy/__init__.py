"""User-level differential privacy: clipping, Poisson sampling, accounting. The unit is a user, one row of a
batch.
"""
