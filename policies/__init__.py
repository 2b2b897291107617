"""Learned attention policies: rewards, the environment, the learner (RLlib), baselines, off-policy evaluation and the gate.

What is learned here is a `recray.inference.policy.Policy`, which serving evaluates without any of this.
"""
