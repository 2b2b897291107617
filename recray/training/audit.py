"""Privacy audit: monitored trainings that measure how much of its ε an attacker can demonstrate.

Each training is a Ray task with the loop of a private training in one process. Some have canaries among their
users; two measure membership inference by the loss. Only figures are released, and the weights are discarded.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from recray.bundle import settings_key
from recray.cluster import require_resources, unwrap_errors
from recray.config import PrivacySettings, Settings
from recray.config.formats import RESULTS_SINCE, to_first_names
from recray.dataset.reader import Dataset
from recray.errors import DataError, SettingsError
from recray.model.network import Network
from recray.privacy.accounting import Mechanism, Steps, epsilon_of, sigma_for
from recray.privacy.audit import Bound, Canaries, bound, ceiling, required_canaries, true_positives
from recray.privacy.ledger import Ledger
from recray.privacy.results import AuditCheck, AuditClaim, FindingRecord
from recray.privacy.results import AuditResults as AuditResults  # of what `audit` returns
from recray.privacy.watch import Finding, StepMonitor, check_repeated_noise
from recray.storage import key_of
from recray.training.batches import Sequences, TrainingBatches
from recray.training.canaries import SyntheticRows, synthetic_users
from recray.training.plan import bundle_settings, training_settings
from recray.training.private import PrivateLoop, physical_users
from recray.training.trainer import mechanism_for
from recray.training.worker import build_loop

FALSE_POSITIVES = (0.001, 0.01)
OWN, CONTROL, ROWS, PRIVATE, PLAIN = "own ε", "no noise", "rows made up", "private", "not private"
SYNTHETIC_ROWS = 32  # synthetic users that are rows of the data set

RunRecord = dict[str, Any]
"""Stored results of one training."""


def audit_key(settings: Settings, dataset: Dataset) -> str:
    """Run key of an audit."""
    options = settings.privacy
    return key_of(
        "audit",
        to_first_names(bundle_settings(settings)),
        list(options.audit_claims),
        options.audit_canaries,
        dataset.digest,
        RESULTS_SINCE,
    )


def audit(
    settings: Settings,
    dataset: Dataset,
    log: Callable[[str], None],
    runs: dict[str, RunRecord],
    keep: Callable[[dict[str, RunRecord]], None],
) -> AuditResults:
    """Measure how much ε an attacker can demonstrate for a private training.

    The trainings are: one at the training's own ε and one at each of `privacy.audit_claims`, each with
    canaries; a control without noise; one with synthetic users as rows of the data set; and a private and a
    plain one for membership inference.

    runs : trainings of an earlier attempt, which are not repeated
    keep : called with all trainings after each one

    Needs a Ray session. Raises SettingsError where privacy is off, DataError, ClusterError, TrainingError.
    """
    # one shard: private and plain trainings learn from the same users
    unsharded = settings.privacy.model_copy(update={"shards": 1})
    mechanism = mechanism_for(settings.model_copy(update={"privacy": unsharded}), dataset)
    if mechanism is None:
        raise SettingsError(
            "privacy.enabled is off: nothing to audit", "audit with the settings of a private training"
        )
    if not any((shard.split[shard.queried, 2] > 1).any() for shard in dataset.shards()):
        raise DataError(
            f"dataset {dataset.key} has no holdout user with two events", "raise split.holdout_users"
        )

    options = settings.privacy
    # canaries are in the steps only, not in the item counts
    own = epsilon_of([Steps(mechanism.sigma, mechanism.rate, mechanism.steps)], mechanism.delta)
    claims = {f"ε {claim:g}": claim for claim in options.audit_claims} | {OWN: own}
    weights = _count_weights(settings, dataset)
    canaries = options.audit_canaries or required_canaries(max(claims.values()), options.delta, weights)
    log(f"audit: {canaries} canaries can demonstrate an ε of up to {ceiling(canaries, options.delta):.2f}")

    for name, sigma, planted, rows in _planned_runs(options, mechanism, canaries):
        if name in runs:
            continue
        log(f"audit: training {name}")
        audited = None
        if sigma is not None:
            counts = 0.0 if planted or rows else mechanism.counts_sigma
            audited = dataclasses.asdict(dataclasses.replace(mechanism, sigma=sigma, counts_sigma=counts))
        run = _train_on_ray(settings, dataset, audited, planted, rows)
        if planted or rows:
            measured = bound(run.pop("planted"), run.pop("seen"), options.delta)
            run = {"sigma": sigma, **dataclasses.asdict(measured), **run}
            log(
                f"audit: {name}: ε is above {run['epsilon']:.2f}; {run['correct']} of {run['guesses']} "
                "guesses are correct"
            )
        runs[name] = run
        keep(runs)

    shown = {
        name: {key: value for key, value in run.items() if key not in ("findings", "first_noise")}
        for name, run in runs.items()
    }
    return {
        "canaries": canaries,
        "rows": SYNTHETIC_ROWS,
        "delta": options.delta,
        "users": mechanism.users,
        "steps": options.steps,
        "population": options.population,
        "settings_key": settings_key(bundle_settings(settings)),
        "private_epsilon": round(mechanism.epsilon, 2),
        "runs": shown,
        "claims": _judge_claims(claims, runs),
        "checks": _checks(runs),
    }


def _planned_runs(
    options: PrivacySettings, mechanism: Mechanism, canaries: int
) -> list[tuple[str, float | None, int, int]]:
    """Name, noise multiplier (None: not private), canaries and synthetic rows of each training."""
    sigmas = {
        f"ε {claim:g}": sigma_for(claim, options.delta, options.sampling_rate, options.steps)
        for claim in options.audit_claims
    }
    with_canaries = [*sigmas.items(), (OWN, mechanism.sigma), (CONTROL, 0.0)]
    return [
        *((name, sigma, canaries, 0) for name, sigma in with_canaries),
        (ROWS, mechanism.sigma, 0, SYNTHETIC_ROWS),
        (PRIVATE, mechanism.sigma, 0, 0),
        (PLAIN, None, 0, 0),
    ]


def _judge_claims(claims: dict[str, float], runs: dict[str, RunRecord]) -> list[AuditClaim]:
    """Verdict of each claimed ε, and whether the control without noise refutes it."""
    control = runs[CONTROL]["epsilon"]
    return [
        {
            "claim": round(claim, 4),
            "training": name,
            "verdict": _bound(runs[name]).verdict(claim),
            "control_caught": control > claim,
        }
        for name, claim in claims.items()
    ]


def _checks(runs: dict[str, RunRecord]) -> list[AuditCheck]:
    """Findings of each training's steps, and whether all trainings drew noise of their own."""
    checks: list[AuditCheck] = []
    for name, run in runs.items():
        findings: list[FindingRecord] = run.get("findings", [])
        checks += [{"training": name, **finding} for finding in findings]
    first_noise = {name: run["first_noise"] for name, run in runs.items() if "first_noise" in run}
    return [*checks, {"training": "all", **check_repeated_noise(first_noise).to_record()}]


def _bound(run: RunRecord) -> Bound:
    return Bound(**{field.name: run[field.name] for field in dataclasses.fields(Bound)})


def _count_weights(settings: Settings, dataset: Dataset) -> int:
    """Number of weights that a private training updates."""
    loop = build_loop(dataset, training_settings(settings), torch.device("cpu"))
    return sum(parameter.numel() for parameter in loop.model.parameters() if parameter.requires_grad)


def rate_name(false_positives: float) -> str:
    """Name of the figure: share of the members recognised at a share of false positives."""
    return f"true_positives_at_{false_positives:g}"


def _train_on_ray(
    settings: Settings, dataset: Dataset, mechanism: Mapping[str, Any] | None, canaries: int, rows: int
) -> RunRecord:
    import ray

    options = settings.train
    require_resources(options.cpus_per_worker, float(options.use_gpu), "audit", options.timeout_s)
    task = ray.remote(
        num_cpus=options.cpus_per_worker, num_gpus=float(options.use_gpu), max_retries=options.max_failures
    )(train_monitored)
    device = "cuda" if options.use_gpu else "cpu"
    with unwrap_errors():
        run: RunRecord = ray.get(
            task.remote(
                str(dataset.path),
                training_settings(settings),
                mechanism,
                canaries,
                options.threads,
                device,
                rows,
            )
        )
    return run


def train_monitored(
    dataset_path: str,
    settings: Settings,
    mechanism: Mapping[str, Any] | None,
    canaries: int,
    threads: int | None = None,
    device: str = "cpu",
    rows: int = 0,
) -> RunRecord:
    """Train and record what an attacker sees.

    With canaries in the gradients, or `rows` synthetic users in the data set: which were `planted`, what was
    `seen` of each, and `findings` of the steps. With neither, or without privacy (mechanism None): how well
    the loss separates members from others.
    """
    if threads:
        torch.set_num_threads(threads)
    dataset, random = Dataset.open(dataset_path), np.random.default_rng()
    if rows:
        dataset = dataset.with_shard(synthetic_users(dataset, rows, random))
    loop = build_loop(dataset, settings, torch.device(device), None, mechanism)
    record: RunRecord = {}
    if isinstance(loop, PrivateLoop):
        assert mechanism is not None
        record = run_monitored(loop, Mechanism(**mechanism), canaries, rows, random)
        if canaries or rows:
            return record
    else:
        for _ in loop.run():
            pass
        loop.ema_model.load_state_dict(loop.best)

    batches = loop.batches
    assert isinstance(batches, TrainingBatches)
    members, non_members = (
        sequence_losses(loop.ema_model.eval(), batches, batches.last_sequences(holdout=holdout))
        for holdout in (False, True)
    )
    rates = {
        rate_name(share): round(true_positives(members, non_members, share), 4) for share in FALSE_POSITIVES
    }
    return {**record, "members": len(members), "others": len(non_members), **rates}


def run_monitored(
    loop: PrivateLoop, mechanism: Mechanism, canaries: int, count: int, random: np.random.Generator
) -> RunRecord:
    """Run an unchanged private training with a temporary ledger, and monitor each step."""
    step, sampler = loop.private, loop.sampler
    monitor = StepMonitor(
        len(loop.rows), mechanism.rate, mechanism.sigma * mechanism.clipping_norm, mechanism.clipping_norm
    )
    step.monitor = monitor
    step.canaries = (
        Canaries(step.optimizer.params, canaries, mechanism.rate, mechanism.clipping_norm)
        if canaries
        else None
    )
    synthetic = SyntheticRows(loop, count, monitor, random) if count else None
    draw, take_steps = loop.sampler.draw, loop.private_step

    def draw_users() -> np.ndarray:
        users = draw()
        monitor.record_draw(users)
        return users

    loop.sampler.draw = draw_users  # type: ignore[method-assign]
    if synthetic is not None:
        loop.private_step = lambda: synthetic.step(take_steps)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger.open(f"sqlite:///{folder}/audit.sqlite", "audit")
        ledger.reserve("audit", mechanism, None)
        loop.take_steps = lambda steps, counts: ledger.take_steps("audit", steps, counts)
        for _ in loop.run():
            pass
        (ledger_run,) = ledger.runs()
    monitor.draw_counts = monitor.draw_counts[(sampler if synthetic is None else loop.sampler).own_users]
    accounted = Finding(
        "ledger",
        ledger_run.steps_taken == monitor.steps == mechanism.steps,
        f"{monitor.steps} steps were taken, {ledger_run.steps_taken} are in the ledger",
    )
    record: RunRecord = {
        "findings": [finding.to_record() for finding in (*monitor.findings(), accounted)],
        "first_noise": monitor.first_noise,
    }
    if synthetic is not None:
        return {**record, "planted": synthetic.is_present_M, "seen": synthetic.membership_score_M}
    if step.canaries is not None:
        return {**record, "planted": step.canaries.is_present_M, "seen": step.canaries.membership_score_M}
    loop.ema_model.load_state_dict(loop.best)
    return record


@torch.no_grad()
def sequence_losses(model: Network, batches: TrainingBatches, sequences: Sequences) -> np.ndarray:
    """Mean cross-entropy of each sequence's queries over the whole catalogue [sequences]."""
    device = next(model.parameters()).device
    table = model.items()
    output = model.output(table)
    length = sequences.stop - sequences.start
    order = np.argsort(-length, kind="stable")
    losses = np.zeros(len(sequences))
    first = 0
    while first < len(order):
        selected = order[
            first : first
            + physical_users(len(table), int(length[order[first]]), model.shape.dim * model.shape.blocks)
        ]
        batch, targets = batches.collate(sequences[selected])
        batch = batch.to(device)
        scores = model.scores(model.hidden(batch, table, None), output, batch).log_softmax(1).cpu()
        target_count = targets.offsets.diff()
        query = torch.repeat_interleave(torch.arange(len(target_count)), target_count)
        by_query = torch.zeros(len(target_count)).index_add_(
            0, query, -scores[query, targets.item] / target_count[query]
        )
        user = batch.user_N.cpu()
        total = torch.zeros(len(selected)).index_add_(0, user, by_query)
        losses[selected] = (total / torch.bincount(user, minlength=len(selected)).clamp(min=1)).numpy()
        first += len(selected)
    return losses
