"""What `recray privacy` shows: the ledger, a plan, an audit. Each gives a table and the figures of the JSON line."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from recray.config import Settings
from recray.errors import MissingArtifactError, SettingsError
from recray.privacy import plan as planning
from recray.privacy.accounting import epsilon_of, noise_of
from recray.privacy.ledger import Ledger

Shown = tuple[Table, dict[str, Any]]


def status(settings: Settings) -> Shown:
    """What the population has spent, training by training."""
    options = settings.privacy
    ledger = Ledger.read(settings.ledger_url(), options.population)
    runs = ledger.runs()
    table = Table(
        "training", "begun", "σ", "q", "C", "users", "steps", "counts", "ε alone", title=f"population {options.population}", title_justify="left"
    )
    for run in runs:
        m = run.mechanism
        steps = f"{run.taken}" if run.committed else f"{run.taken} of {run.reserved} reserved, open"
        released = run.counts_taken if run.committed else run.counts_reserved
        counts = f"{released} at σ {m.counts_sigma:.3g}" if released else "–"
        users = f"{m.users}" if m.parts == 1 else f"{m.users}, part {m.part + 1} of {m.parts}"
        alone = f"{epsilon_of(run.counted, options.delta):.2f}"
        table.add_row(run.run_key, run.begun, f"{m.sigma:.3g}", f"{m.rate:g}", f"{m.clipping_norm:g}", users, steps, counts, alone)
    spent = epsilon_of(ledger.spent(), options.delta)
    table.caption = f"all together: ε {spent:.2f} at δ {options.delta:g}" + (f" of {options.cap:g}" if options.cap else "; no cap is set")
    table.caption += f"; {ledger.members()} users. Scoring with weights that are there costs nothing."
    return table, {"epsilon": round(spent, 4), "delta": options.delta, "cap": options.cap, "users": ledger.members(), "trainings": len(runs)}


def plan(settings: Settings, days: int) -> Shown:
    """What cadences and shards of users would spend in so many days, and the noise that keeps the cap."""
    options = settings.privacy
    cap = options.cap or options.epsilon
    if cap is None:
        raise SettingsError("privacy.cap: a plan needs what may be spent", "set privacy.cap=8, say")
    try:
        before = Ledger.read(settings.ledger_url(), options.population).spent()
    except MissingArtifactError:
        before = []
    rate, steps, delta = options.sampling_rate, options.steps, options.delta
    noise = sigma, _ = noise_of(options)
    found = planning.options(cap, delta, rate, steps, noise, days, before, counts_share=options.counts_share)
    title = f"{days} days, ε {cap:g} at δ {delta:g}; a training: {steps} steps, q {rate:g}, σ {sigma:.3g}"
    columns = ("train every", "users a night", "trainings a user", "σ that keeps the cap", f"ε with σ {sigma:.3g}")
    table = Table(*columns, title=title, title_justify="left")
    for option in found:
        needed = "–" if option.sigma is None else f"{option.sigma:.3g}"
        users = "all" if option.shards == 1 else f"1 in {option.shards}"
        table.add_row(f"{option.every_days} d", users, str(option.trainings), needed, f"{option.epsilon:.2f}")
    table.caption = "after what the ledger has spent" if before else "with nothing spent before"
    return table, {"options": [asdict(option) for option in found]}


def audit(found: dict[str, Any]) -> Shown:
    """What `recray.training.audit` found."""
    title = f"{found['canaries']} canaries, about {found['users']} users, {found['steps']} steps, δ {found['delta']:g}"
    table = Table("training", "σ", "ε is above", "could show", "right guesses", title=title, title_justify="left")
    for name, run in found["runs"].items():
        if "sigma" in run:
            table.add_row(name, f"{run['sigma']:.3g}", f"{run['epsilon']:.2f}", f"{run['ceiling']:.2f}", f"{run['correct']} of {run['guesses']}")
    said = []
    for one in found["claims"]:
        control = "would have been" if one["control_caught"] else "would not have been"
        said.append(f"ε {one['claim']:.3g} ({one['training']}): {one['verdict']}; without noise it {control} refuted")
    failed = [check for check in found["checks"] if not check["passed"]]
    said += [f"FAILED {check['name']}, training {check['training']}: {check['text']}" for check in failed]
    said += [f"{check['name']}: {check['text']}" for check in found["checks"] if check["passed"] and check["training"] in ("rows made up", "all")]
    for name, run in found["runs"].items():
        rates = [(float(key.rpartition("_")[2]), value) for key, value in run.items() if key.startswith("true_positives_at_")]
        if rates:
            which = f"{name} (ε {found['private_epsilon']:g})" if name == "private" else name
            said.append(
                f"{which}: the loss gives away " + ", ".join(f"{value:.2%} of the members at {share:.1%} false alarms" for share, value in rates)
            )
    table.caption = "\n".join(said)
    return table, found
