"""The demo, and the endpoint in the foreground."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from recray import cluster, pipeline
from recray.config import Settings, load_settings, sqlite_url
from recray.errors import ClusterError, MissingArtifactError, SettingsError
from recray.stages import JobResult
from recray.storage import Storage, read_json
from recray.terminal import Reporter

LOOK_S = 10.0  # between two looks whether the endpoint is alive
PATIENCE_S = 120.0  # Serve brings back replicas, and itself


def run_serve(settings: Settings, reporter: Reporter) -> JobResult:
    """Serve the published night until interrupted."""
    started = time.monotonic()
    settings = with_port(settings)
    _can_serve(settings)
    cluster.start(places=settings.serve.places, port=settings.serve.port)
    from recray.serving import app  # Serve reads its environment when it is imported

    with app.running(settings) as address:
        metrics = cluster.metrics_address()
        until_stopped(app.alive, lambda: reporter.say(f"serving on {address} (API page: {address}/docs; metrics: {metrics}); Ctrl-C ends it"))
    return JobResult("serve", "ok", outputs={"address": address, "metrics": metrics}, seconds=round(time.monotonic() - started, 2))


def _can_serve(settings: Settings) -> None:
    """What would keep the endpoint from starting is said before Ray is: it takes its time. Raises MissingArtifactError, ClusterError."""
    storage, options = Storage(settings.root()), settings.serve
    if not storage.latest.exists() and not storage.release.exists():
        raise MissingArtifactError(f"no night was published in {storage.root}", "recray nightly makes one; is storage.root the right one?")
    if "RAY_ADDRESS" not in os.environ:
        try:
            family, kind, _, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            told = f"the endpoint cannot listen on {options.host}:{options.port}: {error.strerror}"
            raise ClusterError(told, "stop what listens there, or set serve.port (0: a free one)") from None


def run_status(settings: Settings, reporter: Reporter) -> JobResult:
    """What answers whom, as RELEASE.json and the published night have it, and as the endpoint says, where one answers."""
    from rich.table import Table

    from recray.release import Release

    storage = Storage(settings.root())
    release = Release.read(storage)
    latest = read_json(storage.latest) if storage.latest.exists() else None
    table = Table("role", "bundle", "answers", title=str(storage.root), title_justify="left")
    trial = "all, unseen" if release.shadow else f"{release.share:.0%} of the users" if release.share else "nobody"
    whom = {"champion": "the others" if release.share else "everybody", "challenger": trial, "previous": "nobody"}
    for role, answers in whom.items():
        member = getattr(release, role)
        if member is not None:
            table.add_row(role, member.run_key, answers)
    table.add_section()
    table.add_row("nightly lists", "–" if latest is None else str(latest["run_key"]), "–" if latest is None else latest["snapshot"].split("/")[1])
    if release.ended:
        table.add_row("last trial", "", release.ended)
    address = f"http://{settings.serve.host}:{settings.serve.port}"
    live: dict[str, Any] = {}
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=2) as response:
            live = dict(json.load(response))
    except OSError:
        table.add_row("endpoint", address, "does not answer")
    else:
        table.add_row("endpoint", address, f"answers; night {live.get('night')}")
    reporter.show(table)
    members = {role: member and member.run_key for role, member in (("champion", release.champion), ("challenger", release.challenger))}
    metrics = {**members, "share": release.share, "shadow": release.shadow, "ended": release.ended, "answers": bool(live)}
    return JobResult("serve status", "ok", metrics=metrics)


def run_key(name: str | None, scopes: list[str], reporter: Reporter) -> JobResult:
    """Draw an API key; its entry for a keys file is the job's output, the key itself is shown and nowhere else."""
    from recray.serving.guard import new_key

    if not name:
        raise SettingsError("recray serve key: whose?", "recray serve key NAME")
    secret, entry = new_key(name, scopes)
    reporter.say(f"the key, shown this once: {secret}")
    reporter.say(f"append to the file that serve.keys names:\n{entry.rstrip()}")
    return JobResult("serve key", "ok", metrics={"entry": entry})


def run_demo(root: str | None, overrides: Sequence[str], reporter: Reporter, keep_serving: Callable[[str], None] | None) -> JobResult:
    """A night on Online Retail in a fresh root, a table, and three live requests.

    keep_serving : told the result before the endpoint is left up until interrupted; None: take it down
    """
    started = time.monotonic()
    where = Path(root) if root else Path(".demo") / dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S")
    if where.exists() and any(where.iterdir()):
        raise SettingsError(f"{where} is not empty", "the demo computes its night anew: name a fresh --root")
    config = str(resources.files("jobs") / "configs" / "demo.yaml")
    settings = with_port(load_settings(config, [f"storage.root={where.absolute()}", *overrides]))
    cluster.start(places=settings.serve.places, port=settings.serve.port)
    result = pipeline.run_nightly(settings, None, reporter.say)
    reporter.show_evaluation(result.outputs["evaluation"], settings)
    from recray.serving import app

    with app.running(settings) as address:
        _ask(address, settings, reporter)
        reporter.say("written:")
        for name, path in result.outputs.items():
            reporter.say(f"  {name:<11} {path}")
        reporter.say(f"  {'mlflow':<11} mlflow ui --backend-store-uri '{sqlite_url(Storage(settings.root()).tracking / 'mlflow.db')}'")
        reporter.say(f"go on: recray serve storage.root={settings.root()}   ·   your own data: recray init, then recray nightly --config recray.yaml")
        done = replace(result, job="demo", metrics={**result.metrics, "address": address}, seconds=round(time.monotonic() - started, 2))
        if keep_serving is not None:
            says = f"serving on {address} (API page: {address}/docs); Ctrl-C ends it"
            until_stopped(app.alive, lambda: reporter.say(says), lambda: keep_serving(done.to_json()))
    return done


def until_stopped(alive: Callable[[], bool], *told: Callable[[], None]) -> None:
    """Say that the endpoint is up, then wait for the signal that ends it; who is told may send it before the saying is over.

    Raises ClusterError when the endpoint was not alive for `PATIENCE_S`, so that what supervises this process starts it anew.
    """
    well, ended = [time.monotonic()], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            if alive():
                well[0] = time.monotonic()

    try:
        for tell in told:
            tell()
        threading.Thread(target=look, daemon=True).start()  # on its own: it may be kept waiting
        while time.monotonic() - well[0] <= PATIENCE_S:
            time.sleep(LOOK_S)
        raise ClusterError("no replica of the endpoint runs any more, and Ray Serve brings none back", "look at its log, and start it again")
    except KeyboardInterrupt:
        return
    finally:
        ended.set()


def with_port(settings: Settings) -> Settings:
    """`serve.port` 0 becomes a free port."""
    if settings.serve.port:
        return settings
    (port,) = cluster.free_ports(1, settings.serve.host)
    return settings.model_copy(update={"serve": settings.serve.model_copy(update={"port": port})})


def _ask(address: str, settings: Settings, reporter: Reporter) -> None:
    """Three live requests: a user of the log, a history sent along, somebody unknown."""
    titles = _titles(settings)
    liked = [item for item, title in titles.items() if "PARTY BUNTING" in title][:1] or list(titles)[:1]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("a user of the log", {"user_id": 17850, "k": 3}),
        (f"a visitor who just bought {titles[liked[0]]}", {"history": [{"item_id": liked[0]}], "k": 3, "new_only": True}),
        ("somebody unknown", {"user_id": "nobody", "k": 3}),
    ]
    for who, body in requests:
        begun = time.monotonic()
        answer = post(f"{address}/v1/recommend", body)
        shown = " · ".join(titles.get(item["item_id"], str(item["item_id"])) for item in answer["items"])
        reporter.say(f"{who}  →  {shown}  [{answer['source']}, {1000 * (time.monotonic() - begun):.0f} ms]")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST JSON, get JSON."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.load(response))


def _titles(settings: Settings) -> dict[Any, str]:
    from recray.dataset.reader import Dataset

    storage = Storage(settings.root())
    snapshot = read_json(storage.root / read_json(storage.latest)["snapshot"] / "manifest.json")
    items = Dataset.open(storage.root / snapshot["dataset"]).items
    shown = "title" if "title" in items.column_names else "item_id"
    return dict(zip(items["item_id"].to_pylist(), items[shown].to_pylist(), strict=True))
