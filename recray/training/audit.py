"""Trainings that are watched and thrown away: how much of its ε an attacker can show.

Each is a Ray task with the loop of a private training in one process. Some have canaries among their users; two are asked how well
their loss tells who was learned from. Nothing of them is released but the figures.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from recray.bundle import settings_key
from recray.cluster import require, unwrapped
from recray.config import Settings
from recray.dataset.reader import Dataset
from recray.errors import DataError, SettingsError
from recray.model.recommender import Recommender
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, sigma_for
from recray.privacy.audit import Bound, Canaries, bound, ceiling, enough, true_positives
from recray.privacy.ledger import Ledger
from recray.privacy.watch import Finding, Watch, as_dicts, repeats
from recray.storage import key_of
from recray.training.batches import TrainingBatches, Windows
from recray.training.canaries import Rows, made_up
from recray.training.private import PrivateLoop, physical_users
from recray.training.trainer import bundle_settings, mechanism_for
from recray.training.worker import build_loop
from recray.version import __version__

FALSE_POSITIVES = (0.001, 0.01)
OWN, CONTROL, ROWS, PRIVATE, PLAIN = "own ε", "no noise", "rows made up", "private", "not private"
MADE_UP = 32  # users who are rows of the data set

Run = dict[str, Any]


def audit_key(settings: Settings, dataset: Dataset) -> str:
    """Run key of an audit."""
    options = settings.privacy
    return key_of("audit", bundle_settings(settings), list(options.audit_claims), options.audit_canaries, dataset.digest, __version__)


def audit(settings: Settings, dataset: Dataset, say: Any, runs: dict[str, Run], keep: Callable[[dict[str, Run]], None]) -> dict[str, Any]:
    """Lower bounds at the training's own ε and at each of `privacy.audit_claims`, the control without noise, users made up as rows of the data
    set, what was found of each step, and membership beside a plain training.

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
    own = epsilon_of([Steps(mechanism.sigma, mechanism.rate, mechanism.steps)], mechanism.delta)  # canaries are in the steps alone
    claims = {f"ε {claim:g}": claim for claim in options.audit_claims} | {OWN: own}
    sigmas = {f"ε {claim:g}": sigma_for(claim, options.delta, options.sampling_rate, options.steps) for claim in options.audit_claims}
    canaries = options.audit_canaries or enough(max(claims.values()), options.delta, _weights(settings, dataset))
    say(f"audit: {canaries} canaries can show an ε of up to {ceiling(canaries, options.delta):.2f}")
    work = [(name, sigma, canaries, 0) for name, sigma in [*sigmas.items(), (OWN, mechanism.sigma), (CONTROL, 0.0)]]
    for name, sigma, planted, rows in [*work, (ROWS, mechanism.sigma, 0, MADE_UP), (PRIVATE, mechanism.sigma, 0, 0), (PLAIN, None, 0, 0)]:
        if name in runs:
            continue
        say(f"audit: a training, {name}")
        watched = None
        if sigma is not None:
            counts = 0.0 if planted or rows else mechanism.counts_sigma
            watched = dataclasses.asdict(dataclasses.replace(mechanism, sigma=sigma, counts_sigma=counts))
        run = _in_ray(settings, dataset, watched, planted, rows)
        if planted or rows:
            found = bound(run.pop("planted"), run.pop("seen"), options.delta)
            run = {"sigma": sigma, **dataclasses.asdict(found), **run}
            say(f"audit: {name}: ε is above {run['epsilon']:.2f}, {run['correct']} of {run['guesses']} guesses are right")
        runs[name] = run
        keep(runs)
    control = runs[CONTROL]["epsilon"]
    told_claims = [
        {"claim": round(claim, 4), "training": name, "verdict": _bound(runs[name]).verdict(claim), "control_caught": control > claim}
        for name, claim in claims.items()
    ]
    checks = [{"training": name, **found} for name, run in runs.items() for found in run.get("findings", [])]
    checks.append({"training": "all", **vars(repeats({name: run["first_noise"] for name, run in runs.items() if "first_noise" in run}))})
    told: dict[str, Any] = {"canaries": canaries, "rows": MADE_UP, "delta": options.delta, "users": mechanism.users, "steps": options.steps}
    told |= {"population": options.population, "settings_key": settings_key(bundle_settings(settings))}
    shown = {name: {key: value for key, value in run.items() if key not in ("findings", "first_noise")} for name, run in runs.items()}
    return {**told, "private_epsilon": round(mechanism.epsilon, 2), "runs": shown, "claims": told_claims, "checks": checks}


def _bound(run: Run) -> Bound:
    return Bound(**{field.name: run[field.name] for field in dataclasses.fields(Bound)})


def _weights(settings: Settings, dataset: Dataset) -> int:
    """Numbers of the network that a private training moves."""
    loop = build_loop(dataset, bundle_settings(settings), torch.device("cpu"))
    return sum(parameter.numel() for parameter in loop.model.parameters() if parameter.requires_grad)


def rate_name(false_positives: float) -> str:
    """Name of the figure: share of the members who are found at a share of false positives."""
    return f"true_positives_at_{false_positives:g}"


def _in_ray(settings: Settings, dataset: Dataset, mechanism: dict[str, Any] | None, canaries: int, rows: int) -> Run:
    import ray

    options = settings.train
    require(options.cpus_per_worker, float(options.use_gpu), "audit", options.timeout_s)
    task = ray.remote(num_cpus=options.cpus_per_worker, num_gpus=float(options.use_gpu), max_retries=options.max_failures)(watch)
    device = "cuda" if options.use_gpu else "cpu"
    with unwrapped():
        found: Run = ray.get(task.remote(str(dataset.path), bundle_settings(settings), mechanism, canaries, options.threads, device, rows))
    return found


def watch(
    dataset_path: str,
    settings: dict[str, Any],
    mechanism: dict[str, Any] | None,
    canaries: int,
    threads: int | None = None,
    device: str = "cpu",
    rows: int = 0,
) -> Run:
    """Train privately, with canaries in the gradients or `rows` users made up in the data set: which were `planted`, what was `seen` of each, and
    `findings` of the steps. Without any, or (mechanism None) plainly: how well the loss tells those who were learned from."""
    if threads:
        torch.set_num_threads(threads)
    dataset, random = Dataset.open(dataset_path), np.random.default_rng()
    if rows:
        dataset = dataset.with_shard(made_up(dataset, rows, random))
    loop = build_loop(dataset, settings, torch.device(device), None, mechanism)
    found: Run = {}
    if isinstance(loop, PrivateLoop):
        assert mechanism is not None
        found = _look(loop, Mechanism(**mechanism), canaries, rows, random)
        if canaries or rows:
            return found
    else:
        for _ in loop.run():
            pass
        loop.average.load_state_dict(loop.best)
    batches = loop.batches
    assert isinstance(batches, TrainingBatches)
    members, others = (losses(loop.average.eval(), batches, batches.last_windows(held_out=held)) for held in (False, True))
    rates = {rate_name(share): round(true_positives(members, others, share), 4) for share in FALSE_POSITIVES}
    return {**found, "members": len(members), "others": len(others), **rates}


def _look(loop: PrivateLoop, mechanism: Mechanism, canaries: int, rows: int, random: np.random.Generator) -> Run:
    """Run a private training to its end, as it is run, with a ledger that is thrown away, and look at each step."""
    step, sampler = loop.private, loop.sampler
    watched = Watch(len(loop.rows), mechanism.rate, mechanism.sigma * mechanism.clipping_norm, mechanism.clipping_norm)
    step.watch = watched
    step.canaries = Canaries(step.optimizer.params, canaries, mechanism.rate, mechanism.clipping_norm) if canaries else None
    made = Rows(loop, rows, watched, random) if rows else None
    draw, take = loop.sampler.draw, loop.private_step

    def drawn() -> np.ndarray:
        users = draw()
        watched.draws(users)
        return users

    loop.sampler.draw = drawn  # type: ignore[method-assign]
    if made is not None:
        loop.private_step = lambda: made.step(take)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.open(f"sqlite:///{folder}/audit.sqlite", "audit")
        ledger.reserve("audit", mechanism, None)
        loop.take = lambda steps, counts: ledger.take("audit", steps, counts)
        for _ in loop.run():
            pass
        (run,) = ledger.runs()
    watched.drawn = watched.drawn[sampler.mine if made is None else loop.sampler.mine]
    accounted = Finding("ledger", run.taken == watched.steps == mechanism.steps, f"{watched.steps} steps were taken, {run.taken} are in the ledger")
    found: Run = {"findings": as_dicts([*watched.findings(), accounted]), "first_noise": watched.first_noise}
    if made is not None:
        return {**found, "planted": made.planted_M, "seen": made.seen_M}
    if step.canaries is not None:
        return {**found, "planted": step.canaries.planted_M, "seen": step.canaries.seen_M}
    loop.average.load_state_dict(loop.best)
    return found


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
