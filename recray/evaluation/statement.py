"""The privacy page: what a private training promises, to whom, at what price, in lines for a person.

It answers what published check-lists ask of a claim (Ponomareva et al., "How to DP-fy ML", arXiv 2303.00654, section 5.3): the unit, the
adjacency, the trust model, what is released and what is not protected, mechanism, accountant and its assumptions, ε of this training and of
all together, tuning, and what an attack showed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from recray.storage import read_json


class Line(NamedTuple):
    """A heading and what is to be said under it."""

    name: str
    text: str


def lines(statement: dict[str, Any]) -> list[Line]:
    """The page of a bundle's statement (`privacy.json`), heading by heading."""
    said = {"counts_sigma": 0.0, "part": 0, "parts": 1, "randomness": "of the framework", **statement}
    counts = f", item counts once at σ {said['counts_sigma']:.3g}" if said["counts_sigma"] else ""
    part = "" if said["parts"] == 1 else f", part {said['part'] + 1} of {said['parts']}"
    mechanism = (
        f"{said['sampling']}-subsampled Gaussian, σ {said['sigma']:.3g}, q {said['rate']:g}, {said['steps']} steps, "
        f"clipping norm {said['clipping_norm']:g}{counts}; about {said['users']} users{part}"
    )
    found = [
        Line("ε of this training", f"{said['epsilon']:.2f} at δ {said['delta']:g}"),
        Line(
            "ε in total",
            f"{said['epsilon_of_all_trainings']:.2f} after {said['trainings']} {'training' if said['trainings'] == 1 else 'trainings'} of population "
            f"{said['population']}{_of_cap(said.get('cap'))}; all that was begun counts, also what tuning, crashes and refused bundles spent",
        ),
        Line("Unit", f"a user, {said['unit']}"),
        Line("Neighbours", said["adjacency"]),
        Line("Mechanism", mechanism),
        Line("Accountant", f"{said['accountant']}; users are drawn for each step by independent coins"),
        Line("Randomness", said["randomness"]),
        Line("Began with", said.get("began_with", "random weights")),
        Line("Held out", f"{said['held_out']:.0%} of the users, by a hash of their ids" if "held_out" in said else "users by a hash of their ids"),
        Line("Protected", said["protected"]),
        *(Line("Not protected", text) for text in said["not_protected"]),
    ]
    return found


def audits(root: Path, settings_key: str) -> dict[str, dict[str, Any]]:
    """Audits of trainings with the settings of a bundle that were made to their end, by their keys."""
    found = {path.stem: read_json(path) for path in sorted((root / "audits").glob("*.json"))}
    return {key: content for key, content in found.items() if content.get("settings_key") == settings_key}


def objections(audit: dict[str, Any]) -> list[str]:
    """What an audit found that a training promises and does not keep, in words."""
    wrong = [f"ε {claim['claim']:.3g} is refuted" for claim in audit["claims"] if claim["verdict"] == "refuted"]
    return wrong + [f"{check['name']}: {check['text']}" for check in audit["checks"] if not check["passed"]]


def audited(found: dict[str, dict[str, Any]]) -> Line:
    """What the audits of a bundle's settings say."""
    if not found:
        return Line("Audit", "none was made with these settings: recray privacy audit")
    said = []
    for key, audit in found.items():
        shown = max((run["epsilon"] for name, run in audit["runs"].items() if name == "own ε"), default=0.0)
        words = "; ".join(objections(audit)) or "nothing was refuted, and contributions, rates, noise and ledger were as accounted for"
        said.append(f"{key}: {words}; {audit['canaries']} canaries show an ε above {shown:.2f}")
    return Line("Audit", ". ".join(said))


def _of_cap(cap: float | None) -> str:
    return "" if cap is None else f", of a cap of {cap:g}"


def markdown(statement: dict[str, Any], title: str) -> str:
    """The page as a file beside the weights."""
    return "\n".join([f"# Privacy of {title}", "", *(f"- **{line.name}**: {line.text}" for line in lines(statement)), ""])
