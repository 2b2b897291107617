"""Learned attention policies. Empty for now: the attention controls that a policy will move are in `recray.model.controls`."""
