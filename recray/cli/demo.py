"""`recray demo`, and `recray serve`, which runs the endpoint in the foreground."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from recray import cluster, pipeline
from recray.config import Settings, load_settings, sqlite_url
from recray.dataset.reader import Dataset
from recray.errors import ClusterError, MissingArtifactError, SettingsError
from recray.pipeline.terminal import Reporter
from recray.release import Published, Release
from recray.serving import app
from recray.serving.guard import draw_key
from recray.stages import JobResult
from recray.storage import Storage, read_json

POLL_S = 10.0  # between two health checks of the endpoint
GRACE_S = 120.0  # in which Serve restarts replicas, and itself


def run_serve(settings: Settings, reporter: Reporter) -> JobResult:
    """Serve the published snapshot until interrupted."""
    started = time.monotonic()
    settings = with_port(settings)
    _require_servable(settings)
    outputs: dict[str, str] = {}
    try:
        cluster.start(request_limit=settings.serve.request_limit, port=settings.serve.port)
        with app.run_endpoint(settings) as address:
            outputs |= {"address": address, "metrics": cluster.metrics_address()}
            pages = f"console {address}/console, API {address}/docs, metrics {outputs['metrics']}"
            text = f"serving on {address} ({pages}); Ctrl-C ends it"
            wait_until_stopped(app.is_running, lambda: reporter.progress(text))
    except KeyboardInterrupt:
        reporter.progress("stopped while it was starting")
    return JobResult("serve", "ok", outputs=outputs, seconds=round(time.monotonic() - started, 2))


def _require_servable(settings: Settings) -> None:
    """Check before Ray starts, which takes long, that the endpoint can start. Raises MissingArtifactError,
    ClusterError.
    """
    storage, options = Storage(settings.root()), settings.serve
    if not storage.latest.exists() and not storage.release.exists():
        raise MissingArtifactError(
            f"no nightly run is published in {storage.root}", "run recray nightly, or check storage.root"
        )
    if "RAY_ADDRESS" not in os.environ:
        try:
            family, kind, _, _, address = socket.getaddrinfo(
                options.host, options.port, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            message = f"the endpoint cannot listen on {options.host}:{options.port}: {error.strerror}"
            raise ClusterError(
                message, "stop the process that listens there, or set serve.port (0: a free port)"
            ) from None


def run_status(settings: Settings, reporter: Reporter) -> JobResult:
    """Which model version serves which users, by RELEASE.json, the published snapshot and, if it runs, the
    endpoint.
    """
    storage = Storage(settings.root())
    release = Release.read(storage)
    latest = read_json(storage.latest) if storage.latest.exists() else None
    table = Table("role", "bundle", "serves", title=str(storage.root), title_justify="left")
    challenger_users = f"{release.share:.0%} of the users" if release.share else "no users"
    users_by_role = {
        "champion": "the other users" if release.share else "all users",
        "challenger": "shadow traffic" if release.shadow else challenger_users,
        "previous": "no users",
    }
    for role, users in users_by_role.items():
        member = getattr(release, role)
        if member is not None:
            table.add_row(role, member.run_key, users)
    table.add_section()
    table.add_row(
        "nightly lists",
        "–" if latest is None else str(latest["run_key"]),
        "–" if latest is None else latest["snapshot"].split("/")[1],
    )
    if release.ended:
        table.add_row("last experiment", "", release.ended)
    address = f"http://{settings.serve.host}:{settings.serve.port}"
    health: Mapping[str, Any] = {}
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=2) as response:
            health = dict(json.load(response))
    except OSError:
        table.add_row("endpoint", address, "unavailable")
    else:
        table.add_row("endpoint", address, f"serves the run as of {health.get('as_of')}")
    reporter.show(table)
    members = {
        role: member and member.run_key
        for role, member in (("champion", release.champion), ("challenger", release.challenger))
    }
    metrics = {
        **members,
        "share": release.share,
        "shadow": release.shadow,
        "ended": release.ended,
        "answers": bool(health),
    }
    return JobResult("serve status", "ok", metrics=metrics)


def run_key(name: str | None, scopes: list[str], reporter: Reporter) -> JobResult:
    """Create an API key. Its entry for a keys file is the job's output; the key itself is only shown."""
    if not name:
        raise SettingsError("recray serve key needs a name", "recray serve key NAME")
    secret, entry = draw_key(name, scopes)
    reporter.progress(f"the key, which is not shown again: {secret}")
    reporter.progress(f"append this to the file of serve.keys:\n{entry.rstrip()}")
    return JobResult("serve key", "ok", metrics={"entry": entry})


def run_demo(
    root: str | None, overrides: Sequence[str], reporter: Reporter, keep_serving: Callable[[str], None] | None
) -> JobResult:
    """A nightly run on Online Retail in a new workspace, its evaluation, and three requests to an endpoint.

    keep_serving : called with the result, and then the endpoint serves until interrupted; None: stop it
    """
    started = time.monotonic()
    workspace = Path(root) if root else Path(".demo") / dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S")
    if workspace.exists() and any(workspace.iterdir()):
        raise SettingsError(
            f"{workspace} is not empty", "name a new --root: the demo starts with an empty workspace"
        )
    config = str(resources.files("jobs") / "configs" / "demo.yaml")
    settings = with_port(load_settings(config, [f"storage.root={workspace.absolute()}", *overrides]))
    cluster.start(request_limit=settings.serve.request_limit, port=settings.serve.port)
    result = pipeline.run("nightly", settings, None, reporter.progress)
    reporter.show_evaluation(result.outputs["evaluation"], settings)

    with app.run_endpoint(settings) as address:
        _send_requests(address, settings, reporter)
        reporter.progress("outputs:")
        for name, path in result.outputs.items():
            reporter.progress(f"  {name:<11} {path}")
        reporter.progress(
            f"  {'mlflow':<11} mlflow ui --backend-store-uri "
            f"'{sqlite_url(Storage(settings.root()).tracking / 'mlflow.db')}'"
        )
        report = Path(result.outputs["report"]).absolute().as_uri()
        reporter.progress(
            f"look at: {report}   ·   recray serve storage.root={settings.root()}, then /console"
        )
        reporter.progress(
            "with your own data: recray init --from-data EVENTS ITEMS; recray nightly --config recray.yaml"
        )
        demo_result = replace(
            result,
            job="demo",
            metrics={**result.metrics, "address": address},
            seconds=round(time.monotonic() - started, 2),
        )
        if keep_serving is not None:
            text = f"serving on {address}: console {address}/console, API {address}/docs; Ctrl-C ends it"
            wait_until_stopped(
                app.is_running, lambda: reporter.progress(text), lambda: keep_serving(demo_result.to_json())
            )
    return demo_result


def wait_until_stopped(is_alive: Callable[[], bool], *announcements: Callable[[], None]) -> None:
    """Announce that the endpoint is up, then wait for the signal that ends it. The signal may already arrive
    during the announcements.

    Raises ClusterError if the endpoint was not alive for `GRACE_S`, so that a supervisor restarts this
    process.
    """
    last_alive_s, stopped = [time.monotonic()], threading.Event()

    def poll() -> None:
        while not stopped.wait(POLL_S):
            if is_alive():
                last_alive_s[0] = time.monotonic()

    try:
        for announce in announcements:
            announce()
        threading.Thread(target=poll, daemon=True).start()  # in a thread, since a check may block
        while time.monotonic() - last_alive_s[0] <= GRACE_S:
            time.sleep(POLL_S)
        raise ClusterError(
            "no replica of the endpoint runs any more, and Ray Serve starts none",
            "look at its log, and start it again",
        )
    except KeyboardInterrupt:
        return
    finally:
        stopped.set()


def with_port(settings: Settings) -> Settings:
    """Settings in which `serve.port` 0 is replaced by a free port."""
    if settings.serve.port:
        return settings
    (port,) = cluster.free_ports(1, settings.serve.host)
    return settings.model_copy(update={"serve": settings.serve.model_copy(update={"port": port})})


def _send_requests(address: str, settings: Settings, reporter: Reporter) -> None:
    """Three requests: a user of the event log, a history in the request, an unknown user."""
    titles = _load_titles(settings)
    bought = [item for item, title in titles.items() if "PARTY BUNTING" in title][:1] or list(titles)[:1]
    requests: list[tuple[str, Mapping[str, Any]]] = [
        ("a user of the event log", {"user_id": 17850, "k": 3}),
        (
            f"a visitor who just bought {titles[bought[0]]}",
            {"history": [{"item_id": bought[0]}], "k": 3, "filter_seen": True},
        ),
        ("an unknown user", {"user_id": "nobody", "k": 3}),
    ]
    for user, body in requests:
        started = time.monotonic()
        response = post(f"{address}/v1/recommend", body)
        elapsed_ms = 1000 * (time.monotonic() - started)
        names = " · ".join(titles.get(item["item_id"], str(item["item_id"])) for item in response["items"])
        reporter.progress(f"{user}  →  {names}  [{response['source']}, {elapsed_ms:.0f} ms]")


def post(url: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """POST a JSON body; the JSON of the response."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.load(response))


def _load_titles(settings: Settings) -> dict[Any, str]:
    storage = Storage(settings.root())
    published = Published.read(storage)
    assert published is not None, "the demo's nightly run ended well"
    items = Dataset.open(published.dataset).items
    column = "title" if "title" in items.column_names else "item_id"
    return dict(zip(items["item_id"].to_pylist(), items[column].to_pylist(), strict=True))
