"""Tables of `recray privacy`: the ledger, a plan, an audit. Each also gives the figures of the JSON line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from recray.config import Settings
from recray.errors import MissingArtifactError, SettingsError
from recray.privacy import plan as planning
from recray.privacy.accounting import epsilon_of, noise_of
from recray.privacy.ledger import Ledger
from recray.privacy.results import AuditResults

TableAndFigures = tuple[Table, Mapping[str, Any]]


def status(settings: Settings) -> TableAndFigures:
    """Spent ε of the population, by training."""
    options = settings.privacy
    ledger = Ledger.read(settings.ledger_url(), options.population)
    runs = ledger.runs()
    table = Table(
        "training",
        "started",
        "σ",
        "q",
        "C",
        "users",
        "steps",
        "counts",
        "ε alone",
        title=f"population {options.population}",
        title_justify="left",
    )
    for run in runs:
        mechanism = run.mechanism
        steps = (
            f"{run.steps_taken}"
            if run.committed
            else f"{run.steps_taken} of {run.steps_reserved} reserved, open"
        )
        released = run.counts_taken if run.committed else run.counts_reserved
        counts = f"{released} at σ {mechanism.counts_sigma:.3g}" if released else "–"
        users = (
            f"{mechanism.users}"
            if mechanism.parts == 1
            else f"{mechanism.users}, part {mechanism.part + 1} of {mechanism.parts}"
        )
        alone = f"{epsilon_of(run.counted, options.delta):.2f}"
        table.add_row(
            run.run_key,
            run.started_at,
            f"{mechanism.sigma:.3g}",
            f"{mechanism.rate:g}",
            f"{mechanism.clipping_norm:g}",
            users,
            steps,
            counts,
            alone,
        )
    spent = epsilon_of(ledger.spent(), options.delta)
    table.caption = f"total: ε {spent:.2f} at δ {options.delta:g}" + (
        f" of {options.cap:g}" if options.cap else "; no cap is set"
    )
    table.caption += f"; {ledger.members()} users. Scoring with existing weights costs nothing."
    return table, {
        "epsilon": round(spent, 4),
        "delta": options.delta,
        "cap": options.cap,
        "users": ledger.members(),
        "trainings": len(runs),
    }


def plan(settings: Settings, days: int) -> TableAndFigures:
    """Spent ε of each cadence and number of shards over `days`, and the noise that keeps the cap."""
    options = settings.privacy
    cap = options.cap or options.epsilon
    if cap is None:
        raise SettingsError("privacy.cap: a plan needs a cap", "set one, for example privacy.cap=8")
    try:
        before = Ledger.read(settings.ledger_url(), options.population).spent()
    except MissingArtifactError:
        before = []
    rate, steps, delta = options.sampling_rate, options.steps, options.delta
    noise = sigma, _ = noise_of(options)
    cadences = planning.options(
        cap, delta, rate, steps, noise, days, before, counts_share=options.counts_share
    )
    title = f"{days} days, ε {cap:g} at δ {delta:g}; a training: {steps} steps, q {rate:g}, σ {sigma:.3g}"
    columns = (
        "train every",
        "users per training",
        "trainings per user",
        "σ that keeps the cap",
        f"ε with σ {sigma:.3g}",
    )
    table = Table(*columns, title=title, title_justify="left")
    for option in cadences:
        needed = "–" if option.sigma is None else f"{option.sigma:.3g}"
        users = "all" if option.shards == 1 else f"1 in {option.shards}"
        table.add_row(f"{option.every_days} d", users, str(option.trainings), needed, f"{option.epsilon:.2f}")
    table.caption = "includes the ε spent in the ledger" if before else "the ledger has spent nothing"
    return table, {"options": [asdict(option) for option in cadences]}


def audit(results: AuditResults) -> TableAndFigures:
    """Results of `recray.training.audit`."""
    title = (
        f"{results['canaries']} canaries, about {results['users']} users, {results['steps']} steps, δ "
        f"{results['delta']:g}"
    )
    table = Table(
        "training",
        "σ",
        "ε is above",
        "can show at most",
        "correct guesses",
        title=title,
        title_justify="left",
    )
    for name, run in results["runs"].items():
        if "sigma" in run:
            table.add_row(
                name,
                f"{run['sigma']:.3g}",
                f"{run['epsilon']:.2f}",
                f"{run['ceiling']:.2f}",
                f"{run['correct']} of {run['guesses']}",
            )
    lines = []
    for claim in results["claims"]:
        control = "would have been" if claim["control_caught"] else "would not have been"
        lines.append(
            f"ε {claim['claim']:.3g} ({claim['training']}): {claim['verdict']}; without noise it {control} "
            "refuted"
        )
    failed = [check for check in results["checks"] if not check["passed"]]
    lines += [f"FAILED {check['name']}, training {check['training']}: {check['text']}" for check in failed]
    lines += [
        f"{check['name']}: {check['text']}"
        for check in results["checks"]
        if check["passed"] and check["training"] in ("rows made up", "all")
    ]
    for name, run in results["runs"].items():
        rates = [
            (float(key.rpartition("_")[2]), value)
            for key, value in run.items()
            if key.startswith("true_positives_at_")
        ]
        if rates:
            label = f"{name} (ε {results['private_epsilon']:g})" if name == "private" else name
            lines.append(
                f"{label}: the loss identifies "
                + ", ".join(
                    f"{value:.2%} of the members at {share:.1%} false positives" for share, value in rates
                )
            )
    table.caption = "\n".join(lines)
    return table, results
