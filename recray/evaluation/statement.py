"""The privacy page: what a private training guarantees, to whom, and at what ε.

It follows the reporting checklist of Ponomareva et al., "How to DP-fy ML", arXiv 2303.00654, section 5.3: the
unit, the adjacency, the trust model, what is released and what is not protected, mechanism, accountant and
its assumptions, ε of this training and in total, tuning, and the result of an attack.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from recray.bundle import PrivacyStatement
from recray.privacy.results import AuditResults
from recray.storage import read_json


class Line(NamedTuple):
    """A heading and its text."""

    name: str
    text: str


def describe_training(statement: PrivacyStatement) -> list[Line]:
    """The page of a bundle's statement (`privacy.json`), heading by heading."""
    facts: PrivacyStatement = {
        "counts_sigma": 0.0,
        "part": 0,
        "parts": 1,
        "randomness": "of the framework",
        **statement,
    }
    counts = f", item counts once at σ {facts['counts_sigma']:.3g}" if facts["counts_sigma"] else ""
    part = "" if facts["parts"] == 1 else f", part {facts['part'] + 1} of {facts['parts']}"
    mechanism = (
        f"{facts['sampling']}-subsampled Gaussian, σ {facts['sigma']:.3g}, q {facts['rate']:g}, "
        f"{facts['steps']} steps, "
        f"clipping norm {facts['clipping_norm']:g}{counts}; about {facts['users']} users{part}"
    )
    holdout = "users by a hash of their ids"
    if "held_out" in facts:
        holdout = f"{facts['held_out']:.0%} of the users, by a hash of their ids"
    return [
        Line("ε of this training", f"{facts['epsilon']:.2f} at δ {facts['delta']:g}"),
        Line("ε in total", _describe_total(facts)),
        Line("Unit", f"a user, {facts['unit']}"),
        Line("Neighbours", facts["adjacency"]),
        Line("Mechanism", mechanism),
        Line("Accountant", f"{facts['accountant']}; users are drawn for each step by independent coins"),
        Line("Randomness", facts["randomness"]),
        Line("Initial weights", facts.get("began_with", "random weights")),
        Line("Holdout users", holdout),
        Line("Protected", facts["protected"]),
        *(Line("Not protected", text) for text in facts["not_protected"]),
    ]


def _describe_total(facts: PrivacyStatement) -> str:
    trainings = "training" if facts["trainings"] == 1 else "trainings"
    cap = facts.get("cap")
    return (
        f"{facts['epsilon_of_all_trainings']:.2f} after {facts['trainings']} {trainings} of population "
        f"{facts['population']}{'' if cap is None else f', of a cap of {cap:g}'}; every started training "
        "counts, also tuning, crashes and refused bundles"
    )


def load_audits(root: Path, settings_key: str) -> dict[str, AuditResults]:
    """Complete audits of trainings with the settings of a bundle, by their keys."""
    audits = {path.stem: read_json(path) for path in sorted((root / "audits").glob("*.json"))}
    return {key: audit for key, audit in audits.items() if audit.get("settings_key") == settings_key}


def list_violations(audit: AuditResults) -> list[str]:
    """The guarantees of a training that an audit refuted, and its failed checks, as text."""
    refuted = [
        f"ε {claim['claim']:.3g} is refuted" for claim in audit["claims"] if claim["verdict"] == "refuted"
    ]
    return refuted + [f"{check['name']}: {check['text']}" for check in audit["checks"] if not check["passed"]]


def describe_audits(audits: dict[str, AuditResults]) -> Line:
    """Results of the audits of a bundle's settings."""
    if not audits:
        return Line("Audit", "no audit with these settings; run recray privacy audit")
    texts = []
    for key, audit in audits.items():
        epsilon = max((run["epsilon"] for name, run in audit["runs"].items() if name == "own ε"), default=0.0)
        result = (
            "; ".join(list_violations(audit))
            or "nothing was refuted; contributions, rates, noise and ledger were as accounted for"
        )
        texts.append(f"{key}: {result}; {audit['canaries']} canaries show an ε above {epsilon:.2f}")
    return Line("Audit", ". ".join(texts))


def to_markdown(statement: PrivacyStatement, title: str) -> str:
    """The page as a Markdown file beside the weights."""
    lines = [f"- **{line.name}**: {line.text}" for line in describe_training(statement)]
    return "\n".join([f"# Privacy of {title}", "", *lines, ""])
