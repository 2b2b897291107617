"""`recray doctor`: checks the environment of a nightly run, and reports findings and fixes."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from rich.table import Column, Table
from rich.text import Text

from recray import cluster
from recray.bundle import Bundle
from recray.cluster import token_source
from recray.config import Settings
from recray.errors import MissingArtifactError, RecrayError
from recray.pipeline.terminal import Reporter
from recray.privacy.accounting import epsilon_of
from recray.privacy.ledger import Ledger
from recray.release import Release, list_bundles
from recray.snapshot.reader import Snapshot
from recray.stages import JobResult
from recray.storage import Storage, lease, read_json, write_json
from recray.tracking.outbox import Outbox
from recray.tracking.runs import Tracking

GIB = 1 << 30
FREE_BYTES = 2 * GIB
SHARED_BYTES = 512 << 20
OK, WARNING, ERROR = "ok", "look", "fix"


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    state : ok, look (works, with a warning) or fix (a nightly run would fail)
    fix : what to do; empty if nothing
    """

    name: str
    state: str
    text: str
    fix: str = ""


def run_doctor(settings: Settings, reporter: Reporter) -> JobResult:
    """Run all checks. The status of the result is failed if a nightly run would fail."""
    started = time.monotonic()
    findings = [finding for check in CHECKS for finding in _run_check(check, settings)]
    table = Table("", "", Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    marks = {OK: "[green]✓[/]", WARNING: "[yellow]![/]", ERROR: "[red]✗[/]"}
    for finding in findings:
        table.add_row(
            marks[finding.state],
            finding.name,
            Text(finding.text + (f"\n→ {finding.fix}" if finding.fix else "")),
        )
        if finding.state != OK:
            reporter.progress(
                f"{finding.name}: {finding.text}",
                level="warning" if finding.state == WARNING else "error",
                fix=finding.fix,
            )
    reporter.show(table)
    to_fix = [finding for finding in findings if finding.state == ERROR]
    warnings = [f"{finding.name}: {finding.text}" for finding in findings if finding.state == WARNING]
    reason = "; ".join(f"{finding.name}: {finding.text}" for finding in to_fix)
    texts = {finding.name: finding.text for finding in findings}
    seconds = round(time.monotonic() - started, 2)
    return JobResult(
        "doctor",
        "failed" if to_fix else "ok",
        metrics=texts,
        seconds=seconds,
        reason=reason,
        warnings=warnings,
    )


def _run_check(check: Callable[[Settings], Iterator[Finding]], settings: Settings) -> Iterator[Finding]:
    name = check.__name__.removeprefix("_check_")
    try:
        yield from check(settings)
    except RecrayError as error:
        yield Finding(name, ERROR, error.message, error.fix)
    except Exception as error:  # a broken environment must not end the other checks
        yield Finding(name, ERROR, f"{type(error).__name__}: {error}", "fix this error first")


def _check_machine(settings: Settings) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", OK, f"{platform.platform()}, {cores} cores, {memory / GIB:.1f} GiB of memory")
    python = platform.python_version()
    is_supported = sys.version_info[:2] == (3, 11)
    yield Finding(
        "Python",
        OK if is_supported else ERROR,
        f"{python} at {sys.executable}",
        "" if is_supported else "use Python 3.11",
    )
    shared = shutil.disk_usage("/dev/shm").free
    fix = (
        ""
        if shared > SHARED_BYTES
        else "enlarge /dev/shm, where Ray stores its objects (in Docker: --shm-size)"
    )
    yield Finding("shared memory", WARNING if fix else OK, f"{shared / GIB:.1f} GiB free in /dev/shm", fix)


def _check_versions(settings: Settings) -> Iterator[Finding]:
    mismatches, installed = [], []
    for text in requires("recray") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            current = version(requirement.name)
        except PackageNotFoundError:
            mismatches.append(f"{requirement.name} is missing")
            continue
        installed.append(f"{requirement.name} {current}")
        if not requirement.specifier.contains(current, prereleases=True):
            mismatches.append(f"{requirement.name} {current} is not {requirement.specifier}")
    fix = "pip install with infra/constraints.txt" if mismatches else ""
    yield Finding(
        "packages",
        ERROR if mismatches else OK,
        "; ".join(mismatches) if mismatches else ", ".join(installed),
        fix,
    )


def _check_gpu(settings: Settings) -> Iterator[Finding]:
    uses_gpu = {
        "train.use_gpu": settings.train.use_gpu,
        "score.gpus_per_actor": settings.score.gpus_per_actor > 0,
        "serve.gpus_per_replica": settings.serve.gpus_per_replica > 0,
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        idle = ", ".join(name for name, uses in uses_gpu.items() if not uses)
        yield Finding("GPU", OK, ", ".join(names) + (f"; not used by {idle}" if idle else ""))
    else:
        required = [] if os.environ.get("RAY_ADDRESS") else [name for name, uses in uses_gpu.items() if uses]
        fix = (
            f"reset {' and '.join(required)}, or install a CUDA build of torch and its driver"
            if required
            else ""
        )
        yield Finding("GPU", ERROR if required else OK, "none on this machine; CPUs do all work", fix)


def _check_ray(settings: Settings) -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    source, mode = token_source(), os.environ.get("RAY_AUTH_MODE", "not set")
    token = f"token from {source}" if source else "no token"
    if not address:
        yield Finding("Ray", OK, f"{version('ray')}; RAY_ADDRESS is not set: jobs start a local Ray")
    else:
        cluster.start()
        import ray

        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
        yield Finding(
            "Ray",
            OK,
            f"{version('ray')} at {address}: {nodes} nodes, {total.get('CPU', 0):g} CPUs, "
            f"{total.get('GPU', 0):g} GPUs",
        )
    fix = (
        "" if source or mode != "token" else "put the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    )
    yield Finding("Ray token", ERROR if fix else OK, f"RAY_AUTH_MODE {mode}, {token}", fix)
    yield _check_jobs_api()


def _check_jobs_api() -> Finding:
    """Check whether `recray submit` would find a cluster."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        text = f"{address} responds with status {error.code}" + (
            ": it requires a token" if error.code in (401, 403) else ""
        )
        return Finding("Ray job API", OK, text)
    except (OSError, ValueError) as error:
        is_configured = "RAY_API_SERVER_ADDRESS" in os.environ
        fix = (
            "start the cluster (ray start --head), or name its dashboard in RAY_API_SERVER_ADDRESS"
            if is_configured
            else "only recray submit needs it"
        )
        return Finding(
            "Ray job API", WARNING if is_configured else OK, f"nothing responds at {address} ({error})", fix
        )
    return Finding("Ray job API", OK, f"{address} responds")


def _check_storage(settings: Settings) -> Iterator[Finding]:
    root = settings.root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    fix = (
        ""
        if free > FREE_BYTES
        else "free or add space: a nightly run stops when storage is full, and resumes when there is space"
    )
    yield Finding("storage space", WARNING if fix else OK, f"{free / GIB:.1f} GiB free at {existing}", fix)
    if not root.exists():
        folder, note = existing, " (the first job will create storage.root)"
    else:
        folder, note = root, ""
    probe = folder / f".recray-doctor-{uuid.uuid4().hex[:8]}"
    try:
        write_json(probe, {"host": socket.gethostname()})  # write, fsync, rename
        read_json(probe)
        probe.unlink()
    except OSError as error:
        yield Finding(
            "storage", ERROR, f"{folder} cannot be written to: {error}", "check its permissions and its mount"
        )
        return
    holder = lease.describe_holder(root)
    yield Finding(
        "storage",
        OK,
        f"{root}: write, fsync and rename work{note}" + (f"; running: {holder}" if holder else ""),
    )


def _check_published(settings: Settings) -> Iterator[Finding]:
    storage = Storage(settings.root())
    release = Release.read(storage)
    if release.champion is None:
        yield Finding("champion", OK, "none yet: the first nightly run creates one")
    else:
        bundle = release.champion.open(storage)
        yield Finding("champion", OK, f"bundle {bundle.key}, intact")
    if storage.latest.exists():
        snapshot = Snapshot.latest(storage)
        yield Finding(
            "published snapshot",
            OK,
            f"{snapshot.path.relative_to(storage.root)}, intact: {snapshot.manifest['users']} users",
        )


def _check_privacy(settings: Settings) -> Iterator[Finding]:
    if not settings.privacy.enabled:
        return

    options, url = settings.privacy, settings.ledger_url()
    private = [
        path
        for path in list_bundles(Storage(settings.root()))
        if Bundle.open(path).privacy["differential_privacy"]
    ]
    try:
        ledger = Ledger.read(url, options.population)
    except MissingArtifactError as error:
        fix = "restore the ledger that counted them (a backup, or privacy.ledger)" if private else ""
        yield Finding(
            "privacy",
            ERROR if private else OK,
            f"{error.message}; {len(private)} private bundles"
            if private
            else "the first training creates it",
            fix,
        )
        return
    runs, spent = ledger.runs(), epsilon_of(ledger.spent(), options.delta)
    budget = (
        f"ε {spent:.2f} of {options.cap:g} at δ {options.delta:g} is spent, by {len(runs)} trainings of "
        f"population {options.population}"
    )
    full = options.cap is not None and spent >= options.cap
    yield Finding(
        "privacy",
        WARNING if full else OK,
        budget,
        "training is refused from now on; scoring continues with the existing weights" if full else "",
    )


def _check_mlflow(settings: Settings) -> Iterator[Finding]:
    storage = Storage(settings.root())
    tracking = Tracking(settings.tracking, storage)
    queued = len(Outbox(storage, tracking).pending()) if storage.root.exists() else 0
    pending = f"; {queued} entries are queued for it" if queued else ""
    if settings.tracking.uri is None and not storage.tracking.exists():
        yield Finding(
            "MLflow", OK, f"{version('mlflow')}, sqlite under storage.root (created by the first job)"
        )
        return
    try:
        tracking.ping()
    except RecrayError as error:
        yield Finding(
            "MLflow",
            WARNING,
            error.message + pending,
            "start it or fix tracking.uri; nightly runs continue without it, promotions wait",
        )
        return
    yield Finding("MLflow", OK, f"{version('mlflow')}, {tracking.uri} responds{pending}")


CHECKS = (
    _check_machine,
    _check_versions,
    _check_gpu,
    _check_ray,
    _check_storage,
    _check_published,
    _check_privacy,
    _check_mlflow,
)
