"""`recray benchmark`: what recray costs, measured on this machine, kept as one JSON file a run."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recray.errors import SettingsError
from recray.stages import JobResult, Say

PEERS = ("implicit", "rectools")
ALONE = (
    *("prepare", "submit", "catalogue", "scale", "privacy", "serve", "serve-overload", "serve-state"),
    *("policy", "policy-drift", "policy-follow", "experiments"),
)


def run(
    what: str,
    out: Path,
    say: Say,
    *,
    data: str | None = None,
    against: str | None = None,
    overrides: Sequence[str] = (),
    overload: bool = False,
    state: bool = False,
    drift: bool = False,
    follow: bool = False,
    users: int | None = None,
) -> JobResult:
    """Run one benchmark and keep its figures as a JSON file in `out`.

    data : folder of a data set, or its name under $RECRAY_DATA; for those that run on one
    against : the peer that runs on the same data in the same run, of prepare another checkout; None: recray alone
    overrides : of the settings, where data are named
    overload, state, users : of serve, what is asked of the endpoint instead; drift, follow : of policy, a world that changes under a running endpoint
    """
    if (drift or follow) and (what != "policy" or not drift):
        raise SettingsError(f"benchmark {what} takes no --drift and no --follow", "benchmark policy takes --drift, and --drift --follow")
    if (overload or users or state) and what != "serve":
        raise SettingsError(f"benchmark {what} takes no --overload, no --state and no --users", "they are for benchmark serve")
    variants = {"follow": follow, "drift": drift, "overload": overload, "state": state, "users": users}
    what = next((f"{what}-{name}" for name, wanted in variants.items() if wanted), what)
    started = time.monotonic()
    if data is not None and what != "privacy":
        from recray.benchmark.data import find_data

        data = str(find_data(data).resolve())  # once: preparing it sets RECRAY_DATA
    with tempfile.TemporaryDirectory(prefix="recray-benchmark-") as folder:
        if what == "serve-users":
            from recray.benchmark import serve

            config: dict[str, Any] = {}
            metrics = serve.measure_users(Path(folder), users or 1, say)
        else:
            config, metrics = _measure(what, Path(folder), say, data, against, overrides, out)
        kept = {path.name: path.read_bytes() for path in Path(folder).glob("keep/*")}
    result = JobResult(f"benchmark {what}", "ok", metrics=metrics, seconds=round(time.monotonic() - started, 2))
    out.mkdir(parents=True, exist_ok=True)
    named = f"{what}-{Path(data).name}" if data else what
    path = out / f"{named}-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}.json"
    content = {"benchmark": what, "metrics": metrics, "config": config, **machine()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for name, data_of in kept.items():
        path.with_suffix(f".{name}").write_bytes(data_of)
    result.outputs["result"] = str(path)
    return result


def _measure(
    what: str, folder: Path, say: Say, data: str | None, against: str | None, overrides: Sequence[str], out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    if what == "privacy" and data:
        if against:
            raise SettingsError("benchmark privacy takes no --against", "leave it out; a transformer under Opacus runs beside ours")
        from recray.benchmark import cuts, utility

        if data == "cuts":
            return cuts.measure_cuts(folder, list(overrides), say, out)
        return utility.measure_utility(folder, data, list(overrides), say, out)
    if what == "policy" and data:
        if against:
            raise SettingsError("benchmark policy takes no --against", "leave it out")
        from recray.benchmark import policy

        return policy.measure_real(folder, data, list(overrides), say)
    if what in ("prepare", "privacy", "serve") and against and not data and not overrides:
        from recray.benchmark import prepare, privacy, serve

        measures_against = {"prepare": prepare.measure_against, "privacy": privacy.measure_against, "serve": serve.measure_against}
        return {}, measures_against[what](folder, Path(against), say)
    if against and against not in PEERS:
        raise SettingsError(f"benchmark {what}: --against {against}", f"known: {', '.join(PEERS)}")
    if what in ALONE:
        if data or against or overrides:
            raise SettingsError(f"benchmark {what} takes no --data, no --against and no settings", "leave them out")
        from recray.benchmark import catalogue, drift, experiments, policy, prepare, privacy, scale, serve, submit

        measures: dict[str, Callable[[Path, Say], dict[str, Any]]] = {
            "prepare": prepare.measure_prepare,
            "submit": submit.measure_submit,
            "catalogue": catalogue.measure_catalogue,
            "scale": scale.measure_scale,
            "privacy": privacy.measure_privacy,
            "serve": serve.measure_serve,
            "serve-overload": serve.measure_overload,
            "serve-state": serve.measure_state,
            "policy": policy.measure_policy,
            "policy-drift": drift.measure_drift,
            "policy-follow": drift.measure_follow,
            "experiments": experiments.measure_experiments,
        }
        return {}, measures[what](folder, say)
    if what in ("ablations", "explain"):
        if against:
            raise SettingsError(f"benchmark {what} takes no --against", "leave it out")
        from recray.benchmark import ablations, explain

        measure = ablations.measure_ablations if what == "ablations" else explain.measure_explain
        return measure(folder, data, list(overrides), say)
    if data is None:
        raise SettingsError(f"benchmark {what} needs --data", "--data ml-1m, or the path of its folder")
    from recray.benchmark import features, quality, score, slate, train

    if what == "train" and against == "implicit":
        raise SettingsError("benchmark train compares epochs, which implicit does not have", "--against rectools, or another benchmark")

    if what in ("features", "slate"):
        if against:
            raise SettingsError(f"benchmark {what} takes no --against", "leave it out")
        return {"features": features.measure_features, "slate": slate.measure_slate}[what](folder, data, list(overrides), say)

    if what == "quality":
        return quality.measure_quality(folder, data, against, list(overrides), say, out)
    return {"train": train.measure_train, "score": score.measure_score}[what](folder, data, against, list(overrides), say)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    packages = [name for name in ("recray", "ray", "torch", "pyarrow", "numpy") if find_spec(name)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {"cpus": os.cpu_count(), "memory_bytes": memory, "platform": platform.platform()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return {"machine": found, "versions": {name: version(name) for name in packages}}
