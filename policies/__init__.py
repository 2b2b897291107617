"""Learned attention policies: rewards, the environment, the learner (RLlib), baselines, off-policy evaluation
and promotion criteria.

The result is a `recray.inference.policy.Policy`, which serving evaluates without this package.
"""
