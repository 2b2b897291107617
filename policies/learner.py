"""Learns a policy with RLlib's PPO from rewards of any action. Each episode is one decision (gamma 0,
lambda 1).

The weights are saved as plain tensors after every iteration; no pickle is written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from policies.environment import DecisionEnvironment
from policies.rewards import Rewards
from recray.errors import DamagedArtifactError
from recray.inference.policy import ObservationNormalizer, Policy

NORMALIZER_REQUESTS = 4096
UPDATES = 20  # minimum number of batches
LAYERS = (
    "encoder.actor_encoder.net.mlp.0",
    "encoder.actor_encoder.net.mlp.2",
    "pi.net.mlp.0",
)  # of RLlib's module


@dataclass(frozen=True)
class Ppo:
    """Hyperparameters of PPO, by RLlib's names where not listed here.

    decisions : requests to decide
    at_once : requests in a step of the environment
    batch : maximum decisions of a batch; fewer where `UPDATES` batches would not fit
    sigma : initial standard deviation of the exploration, around 0 or the policy it starts from
    penalty : see `policies.environment.DecisionEnvironment`
    """

    decisions: int = 100_000
    at_once: int = 256
    batch: int = 4096
    minibatch: int = 512
    epochs: int = 6
    lr: float = 1e-3
    last_lr: float = 3e-4
    hidden: int = 64
    sigma: float = 0.5
    penalty: float = 0.002


def learn(
    rewards: Rewards,
    options: Ppo,
    bundle_digest: str,
    *,
    seed: int = 0,
    min_diversity: float | None = None,
    start: Policy | None = None,
    checkpoint: Path | None = None,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda decisions, metrics: None,
) -> Policy:
    """Learn a policy from rewards. Needs a Ray session. Raises DamagedArtifactError for a checkpoint of
    another shape.

    min_diversity : required mean diversity, see `policies.environment.DecisionEnvironment`
    start : policy whose weights and statistics it starts from; the range of known observations is widened
    checkpoint : file for the state, saved after every iteration; training resumes from it if it exists
    on_metrics : called after every iteration with the number of decisions and their mean reward
    """
    observation, _ = rewards.draw(NORMALIZER_REQUESTS, np.random.default_rng(seed))
    normalizer = (
        ObservationNormalizer.of(observation)
        if start is None
        else start.normalizer.widen(ObservationNormalizer.of(observation))
    )
    saved = load_file(checkpoint) if checkpoint is not None and checkpoint.exists() else None
    done, price = 0, 0.0
    if saved is not None:
        normalizer = ObservationNormalizer(
            **{name: saved.pop(f"frozen_{name}").numpy() for name in ("mean", "scale", "low", "high")}
        )
        done, price = int(saved.pop("decisions")), float(saved.pop("price", torch.zeros(())))

    draw_seed = np.random.SeedSequence([seed, done]).generate_state(1)[0]  # other requests after a resume
    environment = DecisionEnvironment(
        rewards,
        normalizer,
        options.at_once,
        penalty=options.penalty,
        min_diversity=min_diversity,
        price=price,
        seed=int(draw_seed),
    )
    algorithm = _build_algorithm(environment, options, seed, done)
    try:
        module = algorithm.get_module()
        if saved is not None:
            load_state(module, saved, checkpoint)
        else:
            load_state(module, initialize_state(module, options.sigma, start), None)
        algorithm.learner_group.set_state(
            {"learner": {"rl_module": {"default_policy": _to_numpy(module.state_dict())}}}
        )
        while done < options.decisions:
            metrics = algorithm.train()["env_runners"]
            done += int(metrics["num_env_steps_sampled"])
            on_metrics(done, {"reward": float(metrics["episode_return_mean"])})
            if checkpoint is not None:
                _save_checkpoint(checkpoint, algorithm.get_module().state_dict(), environment, done)
        weights = to_policy_weights(algorithm.get_module().state_dict())
    finally:
        algorithm.stop()
    return Policy(
        rewards.actions,
        normalizer,
        weights,
        bundle_digest,
        {"decisions": done, "learner": "ppo", "seed": seed},
    )


# The environment stays in this process: a config given to Ray would put users' histories on its head node.
_environments: dict[str, DecisionEnvironment] = {}


def _get_environment(context: Any) -> DecisionEnvironment:
    return _environments["environment"]


def _build_algorithm(environment: DecisionEnvironment, options: Ppo, seed: int, done: int) -> Any:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.tune.registry import register_env

    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    _environments["environment"] = environment
    register_env("recray", _get_environment)
    remaining = max(options.decisions - done, 1)
    # the learning rate that the previous attempt had reached
    lr = options.last_lr + (options.lr - options.last_lr) * remaining / options.decisions
    config = (
        PPOConfig()  # type: ignore[no-untyped-call]
        .environment("recray")
        .env_runners(
            num_env_runners=0,
            num_envs_per_env_runner=options.at_once,
            gym_env_vectorize_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
            batch_mode="complete_episodes",
        )
        .learners(num_learners=0)
        .training(
            gamma=0.0,
            lambda_=1.0,
            lr=[[0, lr], [remaining, options.last_lr]],
            train_batch_size_per_learner=min(
                options.batch, max(options.decisions // UPDATES, options.minibatch)
            ),
            minibatch_size=options.minibatch,
            num_epochs=options.epochs,
            use_kl_loss=False,
            entropy_coeff=0.0,
            grad_clip=1.0,
        )
        .rl_module(model_config=make_module_config(options.hidden))
        # without Ray's monitor of the system: stopped before its thread began, it would never end
        .debugging(seed=seed, log_level="ERROR", log_sys_usage=False)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium's, about the environment of a previous training
        return config.build_algo()


def make_module_config(hidden: int) -> dict[str, Any]:
    """Configuration of RLlib's network, whose mean `Policy` evaluates."""
    return {
        "fcnet_hiddens": [hidden, hidden],
        "fcnet_activation": "tanh",
        "free_log_std": True,
        "vf_share_layers": False,
    }


def initialize_state(module: Any, sigma: float, start: Policy | None) -> dict[str, Tensor]:
    """The initial state of a module: the mean action of `start`, or 0 for everybody, with a standard
    deviation of `sigma`.
    """
    state = dict(module.state_dict())
    state["pi.log_std"] = torch.full_like(state["pi.log_std"], float(np.log(sigma)))
    if start is not None:
        return state | to_module_state(start.weights)
    return state | {
        name: torch.zeros_like(state[name]) for name in ("pi.net.mlp.0.weight", "pi.net.mlp.0.bias")
    }


def to_policy_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers of the mean action, by the names of `Policy`."""
    weights = {}
    for number, layer in enumerate(LAYERS):
        weights[f"weight_{number}"], weights[f"bias_{number}"] = (
            torch.as_tensor(state[f"{layer}.{part}"]).detach().clone() for part in ("weight", "bias")
        )
    return weights


def to_module_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A policy's layers, by the names of RLlib's module."""
    return {
        f"{layer}.{part}": weights[f"{part}_{number}"]
        for number, layer in enumerate(LAYERS)
        for part in ("weight", "bias")
    }


def _to_numpy(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in state.items()}


def load_state(module: Any, state: dict[str, Tensor], file: Path | None) -> None:
    """Set a module's tensors. Raises DamagedArtifactError for another shape, which names the `file`."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DamagedArtifactError(
            f"{file or 'the policy'} has another shape: {error}", "delete it, or use the same options"
        ) from None


def _save_checkpoint(
    checkpoint: Path, state: dict[str, Tensor], environment: DecisionEnvironment, done: int
) -> None:
    """Replace the file atomically."""
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    tensors |= {
        f"frozen_{name}": torch.from_numpy(value.copy())
        for name, value in asdict(environment.normalizer).items()
    }
    scratch = checkpoint.with_suffix(".part")
    progress = {
        "decisions": torch.tensor(done),
        "price": torch.tensor(environment.price, dtype=torch.float64),
    }
    save_file(tensors | progress, scratch)
    scratch.replace(checkpoint)
