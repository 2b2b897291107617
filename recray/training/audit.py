"""Trainings that are watched and thrown away: how much of its ε an attacker can show.

Each is a Ray task with the loop of a private training in one process. Some have canaries among their users; two are asked how well
their loss tells who was learned from. Nothing of them is released but the figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recray import __version__
from recray.cluster import require, unwrapped
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, SettingsError
from recray.model.recommender import Recommender
from recray.privacy.accounting import sigma_for
from recray.privacy.audit import Bound, Canaries, bound, ceiling, true_positives
from recray.storage import key_of
from recray.training.batches import TrainingBatches, Windows
from recray.training.private import PrivateLoop, physical_users
from recray.training.trainer import bundle_settings, mechanism_for
from recray.training.worker import build_loop

FALSE_POSITIVES = (0.001, 0.01)
CONTROL, PRIVATE, PLAIN = "no noise", "private", "not private"

Run = dict[str, Any]


def audit_key(settings: Settings, dataset: Dataset) -> str:
    """Run key of an audit."""
    options = settings.privacy
    return key_of("audit", bundle_settings(settings), list(options.audit_claims), options.audit_canaries, dataset.digest, __version__)


def audit(settings: Settings, dataset: Dataset, say: Any, runs: dict[str, Run], keep: Callable[[dict[str, Run]], None]) -> dict[str, Any]:
    """Lower bounds at each of `privacy.audit_claims`, the control without noise, and membership beside a plain training.

    runs : those that an earlier attempt made, which are not made again; keep : called with them all after each

    Needs a Ray session. Raises SettingsError where privacy is off, DataError, ClusterError, TrainingError.
    """
    whole = settings.privacy.model_copy(update={"shards": 1})  # so that private and plain trainings learn from the same users
    mechanism = mechanism_for(settings.model_copy(update={"privacy": whole}), dataset)
    if mechanism is None:
        raise SettingsError("privacy.enabled: there is no privacy to audit", "audit with the settings of a private training")
    if not any((shard.split[shard.asked, 2] > 1).any() for shard in dataset.shards()):
        raise DataError(f"dataset {dataset.key} holds nobody out with two events or more", "raise split.held_out")
    options = settings.privacy
    most = ceiling(options.audit_canaries, options.delta)
    say(f"audit: {options.audit_canaries} canaries can show an ε of up to {most:.2f}")
    sigmas = {f"ε {claim:g}": sigma_for(claim, options.delta, options.sampling_rate, options.steps) for claim in options.audit_claims}
    work = [(name, sigma, options.audit_canaries) for name, sigma in [*sigmas.items(), (CONTROL, 0.0)]]
    for name, sigma, canaries in [*work, (PRIVATE, mechanism.sigma, 0), (PLAIN, None, 0)]:
        if name in runs:
            continue
        say(f"audit: a training, {name}")
        watched = None
        if sigma is not None:  # canaries are in the steps alone, so those have the whole claim
            counts = 0.0 if canaries else mechanism.counts_sigma
            watched = dataclasses.asdict(dataclasses.replace(mechanism, sigma=sigma, counts_sigma=counts))
        run = _in_ray(settings, dataset, watched, canaries)
        if canaries:
            runs[name] = {"sigma": sigma, **dataclasses.asdict(bound(run["planted"], run["seen"], options.delta))}
            say(f"audit: {name}: ε is above {runs[name]['epsilon']:.2f}, {runs[name]['correct']} of {runs[name]['guesses']} guesses are right")
        else:
            runs[name] = run
        keep(runs)
    control = runs[CONTROL]["epsilon"]
    claims = [
        {"claim": claim, "verdict": Bound(**{k: v for k, v in runs[name].items() if k != "sigma"}).verdict(claim), "control_caught": control > claim}
        for claim, name in zip(options.audit_claims, sigmas, strict=True)
    ]
    told = {"canaries": options.audit_canaries, "delta": options.delta, "users": mechanism.users, "steps": options.steps}
    return {**told, "private_epsilon": round(mechanism.epsilon, 2), "runs": runs, "claims": claims}


def rate_name(false_positives: float) -> str:
    """Name of the figure: share of the members who are found at a share of false positives."""
    return f"true_positives_at_{false_positives:g}"


def _in_ray(settings: Settings, dataset: Dataset, mechanism: dict[str, Any] | None, canaries: int) -> Run:
    import ray

    options = settings.train
    require(options.cpus_per_worker, float(options.use_gpu), "audit", options.timeout_s)
    task = ray.remote(num_cpus=options.cpus_per_worker, num_gpus=float(options.use_gpu), max_retries=options.max_failures)(watch)
    device = "cuda" if options.use_gpu else "cpu"
    with unwrapped():
        found: Run = ray.get(task.remote(str(dataset.path), bundle_settings(settings), mechanism, canaries, options.threads, device))
    return found


def watch(
    dataset_path: str, settings: dict[str, Any], mechanism: dict[str, Any] | None, canaries: int, threads: int | None = None, device: str = "cpu"
) -> Run:
    """Train privately with canaries: which were `planted` and what was `seen` of each. Without them, or (mechanism None) plainly:
    how well the loss tells those who were learned from."""
    if threads:
        torch.set_num_threads(threads)
    loop = build_loop(dataset_path, settings, torch.device(device), None, mechanism)
    if isinstance(loop, PrivateLoop):
        step, rate = loop.private, loop.sampler.rate
        step.canaries = Canaries(step.optimizer.params, canaries, rate, step.clipping_norm) if canaries else None
        loop.begin()
        for _ in range(loop.steps):
            loop.private_step()
        if step.canaries is not None:
            return {"planted": step.canaries.planted_M, "seen": step.canaries.seen_M}
    else:
        for _ in loop.run():
            pass
        loop.average.load_state_dict(loop.best)
    batches = loop.batches
    assert isinstance(batches, TrainingBatches)
    members, others = (losses(loop.average.eval(), batches, batches.last_windows(held_out=held)) for held in (False, True))
    rates = {rate_name(share): round(true_positives(members, others, share), 4) for share in FALSE_POSITIVES}
    return {"members": len(members), "others": len(others), **rates}


@torch.no_grad()
def losses(model: Recommender, batches: TrainingBatches, windows: Windows) -> np.ndarray:
    """Mean cross-entropy of each window's queries over the whole catalogue [windows]."""
    device = next(model.parameters()).device
    table = model.items()
    output = model.output(table)
    length = windows.stop - windows.start
    order = np.argsort(-length, kind="stable")
    found = np.zeros(len(windows))
    first = 0
    while first < len(order):
        chosen = order[first : first + physical_users(len(table), int(length[order[first]]), model.shape.dim * model.shape.blocks)]
        batch, targets = batches.collate(windows[chosen])
        batch = batch.to(device)
        scores = model.scores(model.hidden(batch, table, None), output, batch).log_softmax(1).cpu()
        wanted = targets.offsets.diff()
        query = torch.repeat_interleave(torch.arange(len(wanted)), wanted)
        by_query = torch.zeros(len(wanted)).index_add_(0, query, -scores[query, targets.item] / wanted[query])
        user = batch.user_N.cpu()
        total = torch.zeros(len(chosen)).index_add_(0, user, by_query)
        found[chosen] = (total / torch.bincount(user, minlength=len(chosen)).clamp(min=1)).numpy()
        first += len(chosen)
    return found
