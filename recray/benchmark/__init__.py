"""`recray benchmark`: measures recray on this machine and writes one JSON file a run."""

from __future__ import annotations

import datetime as dt
import importlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from recray.benchmark.data import find_data
from recray.errors import SettingsError
from recray.stages import JobResult, ProgressLog

LIBRARIES = ("implicit", "rectools")
MODELS = {"rectools-sasrec": "sasrec", "rectools-hstu": "hstu", "rectools-fast": "fast"}
"""Models of a library that `quality` compares with all baselines, and their names in its script."""

Result = dict[str, Any]
"""The figures of a benchmark, or of a part of it: the JSON object `metrics` of its result file. The docstring
of its `measure_` function describes the fields.
"""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: the function that measures, and what it takes in this order beside the folder it works in.

    function : `module.function` of `recray.benchmark`, imported when it runs
    takes : of data, against, checkout, models, overrides, users, progress and out
    needs_data : `--data` must name a data set
    returns_settings : it returns the settings of its runs before the metrics
    """

    function: str
    takes: tuple[str, ...] = ("progress",)
    needs_data: bool = False
    returns_settings: bool = False


def _on_data(function: str, *takes: str, needs_data: bool = True) -> Benchmark:
    return Benchmark(function, takes, needs_data, returns_settings=True)


BENCHMARKS = {
    "prepare": Benchmark("prepare.measure_prepare"),
    "prepare --against": Benchmark("prepare.measure_against", ("checkout", "progress")),
    "adopt": Benchmark("adopt.measure_adopt"),
    "submit": Benchmark("submit.measure_submit"),
    "quality": _on_data("quality.measure_quality", "data", "against", "overrides", "progress", "out"),
    "quality --against": _on_data("baselines.measure_baselines", "data", "models", "overrides", "progress"),
    "ablations": _on_data("ablations.measure_ablations", "data", "overrides", "progress", needs_data=False),
    "evidence": _on_data("evidence.measure_evidence", "data", "overrides", "progress", needs_data=False),
    "features": _on_data("features.measure_features", "data", "overrides", "progress"),
    "slate": _on_data("slate.measure_slate", "data", "overrides", "progress"),
    "train": _on_data("train.measure_train", "data", "against", "overrides", "progress"),
    "train --against": Benchmark(
        "checkouts.compare_train", ("checkout", "data", "overrides", "progress"), True
    ),
    "score": _on_data("score.measure_score", "data", "against", "overrides", "progress"),
    "score --against": Benchmark(
        "checkouts.compare_score", ("checkout", "data", "overrides", "progress"), True
    ),
    "catalogue": Benchmark("catalogue.measure_catalogue"),
    "scale": Benchmark("scale.measure_scale"),
    "privacy": Benchmark("privacy.measure_privacy"),
    "privacy --against": Benchmark("privacy.measure_against", ("checkout", "progress")),
    "privacy --data": _on_data("utility.measure_utility", "data", "overrides", "progress", "out"),
    "privacy --data cuts": _on_data("cuts.measure_cuts", "overrides", "progress", "out"),
    "serve": Benchmark("serve.measure_serve"),
    "serve --against": Benchmark("serve.measure_against", ("checkout", "progress")),
    "serve-overload": Benchmark("serve.measure_overload"),
    "serve-state": Benchmark("serve.measure_state"),
    "serve-items": Benchmark("items.measure_items"),
    "serve-users": Benchmark("serve.measure_users", ("users", "progress")),
    "explain": _on_data("explain.measure_explain", "data", "overrides", "progress", needs_data=False),
    "policy": Benchmark("policy.measure_policy"),
    "policy --data": _on_data("policy.measure_real", "data", "overrides", "progress"),
    "policy-drift": Benchmark("drift.measure_drift"),
    "policy-follow": Benchmark("drift.measure_follow"),
    "rounds": Benchmark("rounds.measure_rounds"),
    "experiments": Benchmark("experiments.measure_experiments"),
}
"""By name and variant, and by what the command line names beside it."""


def run(
    benchmark: str,
    out: Path,
    progress: ProgressLog,
    *,
    data: str | None = None,
    against: str | None = None,
    overrides: Sequence[str] = (),
    overload: bool = False,
    state: bool = False,
    items: bool = False,
    drift: bool = False,
    follow: bool = False,
    users: int | None = None,
) -> JobResult:
    """Run one benchmark and write its figures as a JSON file in `out`.

    data : folder of a data set, or its name under $RECRAY_DATA, for benchmarks that run on one
    against : baseline library that runs on the same data, or another checkout (prepare, privacy, score,
        serve, train); None: recray alone
    overrides : of the settings, with `data`
    overload, state, items, users : other measurements of the endpoint, for serve
    drift, follow : rewards that change under a running endpoint, for policy
    """
    if (drift or follow) and (benchmark != "policy" or not drift):
        raise SettingsError(
            f"benchmark {benchmark} takes no --drift and no --follow",
            "benchmark policy takes --drift, and --drift --follow",
        )
    if (overload or users or state or items) and benchmark != "serve":
        raise SettingsError(
            f"benchmark {benchmark} takes no --overload, --state, --items and --users",
            "they are for benchmark serve",
        )
    variants = {"follow": follow, "drift": drift, "overload": overload, "state": state}
    variants |= {"items": items, "users": bool(users)}
    benchmark = next((f"{benchmark}-{name}" for name, is_set in variants.items() if is_set), benchmark)

    started = time.monotonic()
    if data is not None and benchmark != "privacy":
        data = str(find_data(data).resolve())  # before RECRAY_DATA is set to its folder
    with tempfile.TemporaryDirectory(prefix="recray-benchmark-") as folder:
        options = {"data": data, "against": against, "overrides": list(overrides), "users": users}
        config, metrics = _measure(benchmark, Path(folder), {**options, "progress": progress, "out": out})
        attachments = {path.name: path.read_bytes() for path in Path(folder).glob("keep/*")}

    result = JobResult(
        f"benchmark {benchmark}", "ok", metrics=metrics, seconds=round(time.monotonic() - started, 2)
    )
    out.mkdir(parents=True, exist_ok=True)
    stem = f"{benchmark}-{Path(data).stem}" if data else benchmark
    path = out / f"{stem}-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}.json"
    content = {"benchmark": benchmark, "metrics": metrics, "config": config, **machine()}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for name, content_bytes in attachments.items():
        path.with_suffix(f".{name}").write_bytes(content_bytes)
    result.outputs["result"] = str(path)
    return result


def _measure(name: str, folder: Path, options: Mapping[str, Any]) -> tuple[Mapping[str, Any], Result]:
    """Settings of a benchmark's runs, and its metrics. Raises SettingsError for options it does not take."""
    variant, benchmark = _select(name, options)
    flags = {"data": "--data", "against": "--against", "overrides": "settings"}
    unknown = [
        flag
        for option, flag in flags.items()
        if options[option] and option not in benchmark.takes and flag not in variant
    ]
    if unknown:
        raise SettingsError(f"benchmark {name} takes no {' and no '.join(unknown)}", "leave it out")
    if benchmark.needs_data and options["data"] is None:
        raise SettingsError(f"benchmark {name} needs --data", "--data ml-1m, or the path of its folder")
    if "against" in benchmark.takes and options["against"] not in (None, *LIBRARIES):
        fix = f"known: {', '.join(LIBRARIES)}"
        raise SettingsError(f"benchmark {name}: --against {options['against']}", fix)
    if name == "train" and options["against"] == "implicit":
        raise SettingsError(
            "benchmark train compares epochs, and implicit has none",
            "--against rectools, or another benchmark",
        )

    module, _, function = benchmark.function.partition(".")
    measure = getattr(importlib.import_module(f"recray.benchmark.{module}"), function)
    values = {**options, "checkout": Path(options["against"] or "")}
    values["models"] = _select_models(options["against"]) if "models" in benchmark.takes else ()
    result = measure(folder, *(values[option] for option in benchmark.takes))
    return result if benchmark.returns_settings else ({}, result)


def _select_models(against: str) -> list[str]:
    """The models that `--against` names beside the baselines. Raises SettingsError for an unknown name."""
    names = [name.strip() for name in against.split(",")]
    if unknown := [name for name in names if name not in ("baselines", *MODELS)]:
        known = ", ".join((*LIBRARIES, "baselines", *MODELS))
        raise SettingsError(
            f"benchmark quality: --against {', '.join(unknown)}",
            f"known: {known}; all but {' and '.join(LIBRARIES)} may be combined with a comma",
        )
    return [name for name in names if name != "baselines"]


def _select(name: str, options: Mapping[str, Any]) -> tuple[str, Benchmark]:
    """The variant of a benchmark that its options mean."""
    variant = name
    if options["data"] is not None and f"{name} --data" in BENCHMARKS:
        variant = f"{name} --data {options['data']}"
        variant = variant if variant in BENCHMARKS else f"{name} --data"
    elif options["against"] not in (None, *LIBRARIES) and f"{name} --against" in BENCHMARKS:
        variant = f"{name} --against"
    return variant, BENCHMARKS[variant]


def machine() -> dict[str, Mapping[str, str | int | None]]:
    """The machine and the package versions of the figures."""
    import torch

    packages = [name for name in ("recray", "ray", "torch", "pyarrow", "numpy") if find_spec(name)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts: dict[str, str | int | None] = {
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "platform": platform.platform(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return {"machine": facts, "versions": {name: version(name) for name in packages}}
