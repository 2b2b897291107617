"""The results of a privacy audit, as its file holds them."""

from __future__ import annotations

from typing import TypedDict


class FindingRecord(TypedDict):
    """A `recray.privacy.watch.Finding` as JSON."""

    name: str
    passed: bool
    text: str


class AuditCheck(FindingRecord):
    """A finding about a training, or about `all` of them."""

    training: str


class AuditClaim(TypedDict):
    """A claimed ε against the training that makes the claim.

    claim : the ε
    verdict : `refuted`, `not refuted` or `cannot tell`
    control_caught : whether the control without noise refutes the claim
    """

    claim: float
    training: str
    verdict: str
    control_caught: bool


class AuditResults(TypedDict):
    """The results of an audit.

    canaries : synthetic users whose presence is guessed
    rows : synthetic users that are rows of the dataset
    delta, users, steps : of the audited mechanism
    private_epsilon : ε of the private training whose members are guessed by the loss
    runs : figures of each training by its name. With canaries: `sigma` and the fields of
        `recray.privacy.audit.Bound`; for membership inference: `members`, `others` and
        `true_positives_at_` each share of false positives
    """

    canaries: int
    rows: int
    delta: float
    users: int
    steps: int
    population: str
    settings_key: str
    private_epsilon: float
    runs: dict[str, dict[str, float]]
    claims: list[AuditClaim]
    checks: list[AuditCheck]
