"""A real `mlflow server`: runs, versions and aliases through it, and nights while it is away."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from harness import BEFORE, Job, Workspace, assert_tracked, wait_for

from recray.cluster import free_ports

FIRST = dt.date(2024, 4, 20)
CHALLENGE = ("promotion.margin=1", "tracking.timeout_s=30", "tracking.retries=0")
POINTS = {**BEFORE, "flip": "promotion:visible"}  # flip: the promotion is decided, the aliases are not set
IN_CI = ("train", "flip")  # of one nightly run: away at its training, and at the flip of its repeat


class Server:
    """`mlflow server` on sqlite and a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = [
            "--backend-store-uri",
            f"sqlite:///{self.folder / 'server.db'}",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }  # of GenAI jobs, by eleven more processes
        with open(self.folder / "server.log", "a") as log:
            command = [sys.executable, "-m", "mlflow", "server", *words]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        health = f"{self.uri}/health"
        wait_for(
            "MLflow's server",
            lambda: urllib.request.urlopen(health, timeout=2).read(),
            last_seen=self.said,
            ended=self.process.poll,
        )

    def said(self) -> str:
        return (self.folder / "server.log").read_text()[-2000:]

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(own_home, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def shop(workspace, server, synthetic_folder, tmp_path_factory):
    """The nightly runs of one root, one day after the other; the first one, whose bundle was trained before,
    has ended.
    """
    root = shutil.copytree(workspace.cut("evaluate"), tmp_path_factory.mktemp("shop") / "root")
    for folder in ("mlflow", "nights", "tracked"):
        shutil.rmtree(root / folder)
    shop = Shop(root, synthetic_folder, workspace.environment, server)
    shop.first = shop.nightly().ends_ok()
    return shop


class Shop:
    def __init__(self, root: Path, folder: Path, environment: dict[str, str], server: Server) -> None:
        self.root, self.folder, self.environment, self.server, self.day = (
            root,
            folder,
            environment,
            server,
            -1,
        )

    def nightly(self, *, is_repeat: bool = False, fault: str | None = None) -> Job:
        self.day += 0 if is_repeat else 1
        as_of = str(FIRST + dt.timedelta(days=self.day))
        overrides = (f"tracking.uri={self.server.uri}", *CHALLENGE)
        return Job("nightly", self.folder, self.root, self.environment, *overrides, as_of=as_of, fault=fault)

    def release(self) -> dict:
        return json.loads((self.root / "RELEASE.json").read_text())

    def pending(self) -> list[str]:
        return [
            p.stem
            for p in (self.root / "tracked").glob("[!.]*.json")
            if "run_id" not in json.loads(p.read_text())
        ]


def test_a_server_works_as_the_local_store_does(shop, server):
    assert (shop.first["status"], shop.first["warnings"], shop.first["metrics"]["promoted"]) == (
        "ok",
        [],
        1,
    ), shop.first
    assert_tracked(shop.root, server.uri)
    assert shop.nightly(is_repeat=True).ends_ok()["status"] == "skipped"


@pytest.mark.parametrize(
    "stages",
    [IN_CI, *(pytest.param([stage], marks=pytest.mark.slow) for stage in POINTS)],
    ids=lambda stages: "-".join(stages),
)
def test_a_nightly_run_without_mlflow_is_scored_by_the_champion_and_logged_later(shop, server, stages):
    before = shop.release()["champion"]["run_key"]
    for number, stage in enumerate(stages):
        job = shop.nightly(is_repeat=number > 0, fault=f"STOP@{POINTS[stage]}")
        stopped = job.stops()
        server.stop()
        try:
            os.kill(stopped, signal.SIGCONT)
            result = job.ends_ok()
            assert (
                result["status"] == "ok"
                and any("MLflow" in warning for warning in result["warnings"])
                and shop.pending()
            )
            champion = shop.release()["champion"]["run_key"]
            if stage in ("flip", "score", "report"):
                assert champion != before and result["metrics"]["promoted"] == 1
            else:
                assert (
                    champion == before
                    and result["metrics"]["promoted"] == 0
                    and "waits for the next run" in result["reason"]
                )
            latest = json.loads((shop.root / "LATEST.json").read_text())
            scored = json.loads((shop.root / latest["snapshot"] / "manifest.json").read_text())
            assert (
                scored["bundle"] == f"bundles/{champion}"
                and str(FIRST + dt.timedelta(days=shop.day)) in latest["snapshot"]
            )
        finally:
            server.start()
    result = shop.nightly(is_repeat=True).ends_ok()
    assert result["warnings"] == [] and not shop.pending() and result["metrics"]["promoted"] == 1, result
    assert_tracked(shop.root, server.uri)


def test_the_first_nightly_run_needs_no_mlflow(workspace: Workspace):
    workspace.cut("promote")
    uri = f"tracking.uri=http://127.0.0.1:{free_ports(1)[0]}"
    result = workspace.job("nightly", uri, "tracking.timeout_s=30", "tracking.retries=0").ends_ok()
    assert result["metrics"]["promoted"] == 1 and any(
        "does not respond" in warning for warning in result["warnings"]
    )


def test_another_storage_under_the_same_name_is_refused(shop, server, workspace):
    if shop.day == 0:
        shop.nightly().ends_ok()  # its champion is one that the workspace does not have
    root = workspace.cut("promote")
    code, result = workspace.job("nightly", f"tracking.uri={server.uri}").end()
    assert (code, result["status"]) == (3, "refused"), result
    assert (
        "another workspace uses this model name" in result["reason"] and "tracking.model" in result["reason"]
    )
    assert not (root / "LATEST.json").exists() and not (root / "RELEASE.json").exists()
