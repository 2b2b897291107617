"""RLlib learns a policy: PPO where an action can be tried, each episode one decision (gamma 0, lambda 1).

What it learned is read off as plain tensors after every iteration, so nothing that outlives the process is a pickle.
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

from policies.environment import Decisions
from policies.rewards import Rewards
from recray.errors import DamagedArtifactError
from recray.inference.policy import Frozen, Policy

NORMALISED_ON = 4096  # requests
UPDATES = 20
LAYERS = ("encoder.actor_encoder.net.mlp.0", "encoder.actor_encoder.net.mlp.2", "pi.net.mlp.0")  # of RLlib's module


@dataclass(frozen=True)
class Ppo:
    """How PPO learns. decisions: requests that are decided; batch: at most, so that few decisions are learned from in `UPDATES` batches too;
    sigma: how far around 0, or around the policy that it begins with, actions are tried at first; the others as RLlib names them."""

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
    floor: float | None = None,
    start: Policy | None = None,
    checkpoint: Path | None = None,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda decisions, metrics: None,
) -> Policy:
    """Learn a policy on requests whose actions can be paid. Needs a Ray session.

    floor : how varied lists have to be, see `policies.environment.Decisions`
    start : begin with this policy's weights, whose statistics are kept; what it knows becomes more
    checkpoint : file that the state is kept in after every iteration, and gone on from if it is there
    on_metrics : told after every iteration how many decisions were made, and what they paid
    Raises DamagedArtifactError for a checkpoint of another shape.
    """
    observation, _ = rewards.draw(NORMALISED_ON, np.random.default_rng(seed))
    frozen = Frozen.of(observation) if start is None else start.frozen.widened(Frozen.of(observation))
    kept = load_file(checkpoint) if checkpoint is not None and checkpoint.exists() else None
    done, price = 0, 0.0
    if kept is not None:
        frozen = Frozen(**{name: kept.pop(f"frozen_{name}").numpy() for name in ("mean", "scale", "low", "high")})
        done, price = int(kept.pop("decisions")), float(kept.pop("price", torch.zeros(())))
    draws = np.random.SeedSequence([seed, done]).generate_state(1)[0]  # after a resume other requests come
    environment = Decisions(rewards, frozen, options.at_once, penalty=options.penalty, floor=floor, price=price, seed=int(draws))
    algorithm = _algorithm(environment, options, seed, done)
    try:
        module = algorithm.get_module()
        if kept is not None:
            restore(module, kept, checkpoint)
        else:
            restore(module, beginning(module, options.sigma, start), None)
        algorithm.learner_group.set_state({"learner": {"rl_module": {"default_policy": _numpy(module.state_dict())}}})
        while done < options.decisions:
            found = algorithm.train()
            done += int(found["env_runners"]["num_env_steps_sampled"])
            on_metrics(done, {"reward": float(found["env_runners"]["episode_return_mean"])})
            if checkpoint is not None:
                _keep(checkpoint, algorithm.get_module().state_dict(), environment, done)
        weights = plain(algorithm.get_module().state_dict())
    finally:
        algorithm.stop()
    return Policy(rewards.actions, frozen, weights, bundle_digest, {"decisions": done, "learner": "ppo", "seed": seed})


_here: dict[str, Decisions] = {}  # of this process: what Ray is given is kept on its head node, and users' histories are not


def _environment(context: Any) -> Decisions:
    return _here["environment"]


def _algorithm(environment: Decisions, options: Ppo, seed: int, done: int) -> Any:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.tune.registry import register_env

    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    _here["environment"] = environment
    register_env("recray", _environment)
    left = max(options.decisions - done, 1)
    now = options.last_lr + (options.lr - options.last_lr) * left / options.decisions  # where the attempt before had come to
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
            lr=[[0, now], [left, options.last_lr]],
            train_batch_size_per_learner=min(options.batch, max(options.decisions // UPDATES, options.minibatch)),
            minibatch_size=options.minibatch,
            num_epochs=options.epochs,
            use_kl_loss=False,
            entropy_coeff=0.0,
            grad_clip=1.0,
        )
        .rl_module(model_config=module_config(options.hidden))
        .debugging(seed=seed, log_level="ERROR")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gymnasium's, about an environment of the training before
        return config.build_algo()


def module_config(hidden: int) -> dict[str, Any]:
    """Of RLlib's network, whose mean `Policy` evaluates."""
    return {"fcnet_hiddens": [hidden, hidden], "fcnet_activation": "tanh", "free_log_std": True, "vf_share_layers": False}


def beginning(module: Any, sigma: float, start: Policy | None) -> dict[str, Tensor]:
    """Of a module that plays what a policy plays, or 0 for everybody, that far around it."""
    found = dict(module.state_dict())
    found["pi.log_std"] = torch.full_like(found["pi.log_std"], float(np.log(sigma)))
    if start is not None:
        return found | as_module(start.weights)
    return found | {name: torch.zeros_like(found[name]) for name in ("pi.net.mlp.0.weight", "pi.net.mlp.0.bias")}


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean's layers, by the names of `Policy`."""
    found = {}
    for place, layer in enumerate(LAYERS):
        found[f"weight_{place}"], found[f"bias_{place}"] = (torch.as_tensor(state[f"{layer}.{part}"]).detach().clone() for part in ("weight", "bias"))
    return found


def as_module(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A policy's layers by the names of RLlib's module."""
    return {f"{layer}.{part}": weights[f"{part}_{place}"] for place, layer in enumerate(LAYERS) for part in ("weight", "bias")}


def _numpy(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in state.items()}


def restore(module: Any, state: dict[str, Tensor], where: Path | None) -> None:
    """Set a module's tensors. Raises DamagedArtifactError for another shape; where : file that they are from."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise DamagedArtifactError(f"{where or 'the policy'} has another shape: {error}", "begin anew, or with the same options") from None


def _keep(checkpoint: Path, state: dict[str, Tensor], environment: Decisions, done: int) -> None:
    """Replace the file in one step."""
    tensors = {name: value.detach().contiguous() for name, value in state.items()}
    tensors |= {f"frozen_{name}": torch.from_numpy(value.copy()) for name, value in asdict(environment.frozen).items()}
    scratch = checkpoint.with_suffix(".part")
    counted = {"decisions": torch.tensor(done), "price": torch.tensor(environment.price, dtype=torch.float64)}
    save_file(tensors | counted, scratch)
    scratch.replace(checkpoint)
