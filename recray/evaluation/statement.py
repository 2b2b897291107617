"""The privacy page: what a private training promises, to whom, at what price, in lines for a person.

It answers what published check-lists ask of a claim (Ponomareva et al., "How to DP-fy ML", arXiv 2303.00654, section 5.3): the unit, the
adjacency, the trust model, what is released and what is not protected, mechanism, accountant and its assumptions, ε of this training and of
all together, tuning, and what an attack showed.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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
        Line("Protected", said["protected"]),
        *(Line("Not protected", text) for text in said["not_protected"]),
    ]
    return found


def _of_cap(cap: float | None) -> str:
    return "" if cap is None else f", of a cap of {cap:g}"


def markdown(statement: dict[str, Any], title: str) -> str:
    """The page as a file beside the weights."""
    return "\n".join([f"# Privacy of {title}", "", *(f"- **{line.name}**: {line.text}" for line in lines(statement)), ""])
