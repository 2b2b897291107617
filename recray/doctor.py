"""`recray doctor`: looks at everything that a night needs, says what it found, and what to fix."""

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

from packaging.requirements import Requirement
from rich.table import Column, Table
from rich.text import Text

from recray import lease
from recray.cluster import token_source
from recray.config import Settings
from recray.errors import MissingArtifactError, RecrayError
from recray.release import Release
from recray.stages import JobResult
from recray.storage import Storage, read_json, write_json
from recray.terminal import Reporter
from recray.tracking.outbox import Outbox
from recray.tracking.runs import Tracking

GIB = 1 << 30
FREE_BYTES = 2 * GIB
SHARED_BYTES = 512 << 20
OK, LOOK, FIX = "ok", "look", "fix"


@dataclass(frozen=True)
class Finding:
    """What was found of one thing: `state` ok, look (works, but) or fix (a night would fail), and what to do."""

    name: str
    state: str
    text: str
    fix: str = ""


def run_doctor(settings: Settings, reporter: Reporter) -> JobResult:
    """Look at everything. The result's status is failed if a night could not run."""
    started = time.monotonic()
    findings = [finding for look in (_machine, _versions, _gpu, _ray, _storage, _published, _privacy, _mlflow) for finding in _looked(look, settings)]
    table = Table("", "", Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
    marks = {OK: "[green]✓[/]", LOOK: "[yellow]![/]", FIX: "[red]✗[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.name, Text(finding.text + (f"\n→ {finding.fix}" if finding.fix else "")))
        if finding.state != OK:
            reporter.say(f"{finding.name}: {finding.text}", level="warning" if finding.state == LOOK else "error", fix=finding.fix)
    reporter.show(table)
    to_fix = [finding for finding in findings if finding.state == FIX]
    warnings = [f"{finding.name}: {finding.text}" for finding in findings if finding.state == LOOK]
    reason = "; ".join(f"{finding.name}: {finding.text}" for finding in to_fix)
    found = {finding.name: finding.text for finding in findings}
    seconds = round(time.monotonic() - started, 2)
    return JobResult("doctor", "failed" if to_fix else "ok", metrics=found, seconds=seconds, reason=reason, warnings=warnings)


def _looked(look: Callable[[Settings], Iterator[Finding]], settings: Settings) -> Iterator[Finding]:
    try:
        yield from look(settings)
    except RecrayError as error:
        yield Finding(look.__name__.strip("_"), FIX, error.what, error.fix)
    except Exception as error:  # a broken environment is what we are here for
        yield Finding(look.__name__.strip("_"), FIX, f"{type(error).__name__}: {error}", "mend that first")


def _machine(settings: Settings) -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("machine", OK, f"{platform.platform()}, {cores} cores, {memory / GIB:.1f} GiB of memory")
    python = platform.python_version()
    good = sys.version_info[:2] == (3, 11)
    yield Finding("Python", OK if good else FIX, f"{python} at {sys.executable}", "" if good else "use Python 3.11")
    shared = shutil.disk_usage("/dev/shm").free
    fix = "" if shared > SHARED_BYTES else "enlarge /dev/shm: Ray keeps its objects there (in Docker: --shm-size)"
    yield Finding("shared memory", LOOK if fix else OK, f"{shared / GIB:.1f} GiB free in /dev/shm", fix)


def _versions(settings: Settings) -> Iterator[Finding]:
    wrong, shown = [], []
    for text in requires("recray") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        shown.append(f"{requirement.name} {found}")
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
    fix = "pip install with infra/constraints.txt" if wrong else ""
    yield Finding("packages", FIX if wrong else OK, "; ".join(wrong) if wrong else ", ".join(shown), fix)


def _gpu(settings: Settings) -> Iterator[Finding]:
    import torch

    asking = {
        "train.use_gpu": settings.train.use_gpu,
        "score.gpus_per_actor": settings.score.gpus_per_actor > 0,
        "serve.gpus_per_replica": settings.serve.gpus_per_replica > 0,
    }
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        idle = ", ".join(name for name, asks in asking.items() if not asks)
        yield Finding("GPU", OK, ", ".join(names) + (f"; not asked for by {idle}" if idle else ""))
    else:
        wanted = [] if os.environ.get("RAY_ADDRESS") else [name for name, asks in asking.items() if asks]
        fix = f"set {' and '.join(wanted)} back, or install a CUDA build of torch and its driver" if wanted else ""
        yield Finding("GPU", FIX if wanted else OK, "none here (CPUs do it all)", fix)


def _ray(settings: Settings) -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    source, mode = token_source(), os.environ.get("RAY_AUTH_MODE", "not set")
    token = f"token from {source}" if source else "no token"
    if not address:
        yield Finding("Ray", OK, f"{version('ray')}; RAY_ADDRESS is not set: jobs start a Ray of their own here")
    else:
        from recray import cluster

        cluster.start()
        import ray

        total = ray.cluster_resources()  # type: ignore[no-untyped-call]
        nodes = len([node for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
        yield Finding("Ray", OK, f"{version('ray')} at {address}: {nodes} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs")
    fix = "" if source or mode != "token" else "put the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    yield Finding("Ray token", FIX if fix else OK, f"RAY_AUTH_MODE {mode}, {token}", fix)
    yield _jobs_api()


def _jobs_api() -> Finding:
    """Whether `recray submit` would find a cluster."""
    where = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    try:
        urllib.request.urlopen(f"{where}/api/version", timeout=5).close()
    except urllib.error.HTTPError as error:
        text = f"{where} answers {error.code}" + (": it wants a token" if error.code in (401, 403) else "")
        return Finding("Ray job API", OK, text)
    except (OSError, ValueError) as error:
        named = "RAY_API_SERVER_ADDRESS" in os.environ
        fix = "start the cluster (ray start --head), or name its dashboard in RAY_API_SERVER_ADDRESS" if named else "needed by recray submit only"
        return Finding("Ray job API", LOOK if named else OK, f"nothing answers at {where} ({error})", fix)
    return Finding("Ray job API", OK, f"{where} answers")


def _storage(settings: Settings) -> Iterator[Finding]:
    root = settings.root()
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    fix = "" if free > FREE_BYTES else "free space or add some: a night that runs full stops, and goes on when there is room"
    yield Finding("storage space", LOOK if fix else OK, f"{free / GIB:.1f} GiB free at {existing}", fix)
    if not root.exists():
        probe_in, note = existing, " (storage.root will be made by the first job)"
    else:
        probe_in, note = root, ""
    probe = probe_in / f".recray-doctor-{uuid.uuid4().hex[:8]}"
    try:
        write_json(probe, {"host": socket.gethostname()})  # write, fsync, rename
        read_json(probe)
        probe.unlink()
    except OSError as error:
        yield Finding("storage", FIX, f"{probe_in} cannot be written to: {error}", "check its permissions and its mount")
        return
    busy = lease.holder(root)
    yield Finding("storage", OK, f"{root}: write, fsync and rename work{note}" + (f"; at work: {busy}" if busy else ""))


def _published(settings: Settings) -> Iterator[Finding]:
    storage = Storage(settings.root())
    release = Release.read(storage)
    if release.champion is None:
        yield Finding("champion", OK, "none yet: the first night makes one")
    else:
        bundle = release.champion.open(storage)
        yield Finding("champion", OK, f"bundle {bundle.key}, whole")
    if storage.latest.exists():
        from recray.snapshot.reader import Snapshot

        snapshot = Snapshot.latest(storage)
        yield Finding("published night", OK, f"{snapshot.path.relative_to(storage.root)}, whole: {snapshot.manifest['users']} users")


def _privacy(settings: Settings) -> Iterator[Finding]:
    if not settings.privacy.enabled:
        return
    from recray.bundle import Bundle
    from recray.privacy.accounting import epsilon_of
    from recray.privacy.ledger import Ledger
    from recray.release import bundles

    options, url = settings.privacy, settings.ledger_url()
    private = [path for path in bundles(Storage(settings.root())) if Bundle.open(path).privacy["differential_privacy"]]
    try:
        ledger = Ledger.read(url, options.population)
    except MissingArtifactError as error:
        fix = "bring back the ledger that counted them (a backup, or privacy.ledger)" if private else ""
        yield Finding(
            "privacy", FIX if private else OK, f"{error.what}; {len(private)} private bundles" if private else "the first training begins it", fix
        )
        return
    runs, spent = ledger.runs(), epsilon_of(ledger.spent(), options.delta)
    left = f"ε {spent:.2f} of {options.cap:g} at δ {options.delta:g} is spent, by {len(runs)} trainings of population {options.population}"
    full = options.cap is not None and spent >= options.cap
    yield Finding(
        "privacy", LOOK if full else OK, left, "nothing is trained any more; scoring goes on with the weights that are there" if full else ""
    )


def _mlflow(settings: Settings) -> Iterator[Finding]:
    storage = Storage(settings.root())
    tracking = Tracking(settings.tracking, storage)
    spooled = len(Outbox(storage, tracking).pending()) if storage.root.exists() else 0
    waits = f"; {spooled} entries are spooled for it" if spooled else ""
    if settings.tracking.uri is None and not storage.tracking.exists():
        yield Finding("MLflow", OK, f"{version('mlflow')}, sqlite under storage.root (made by the first job)")
        return
    try:
        tracking.ping()
    except RecrayError as error:
        yield Finding("MLflow", LOOK, error.what + waits, "start it or mend tracking.uri; nights go on without it, promotions wait")
        return
    yield Finding("MLflow", OK, f"{version('mlflow')}, {tracking.uri} answers{waits}")
