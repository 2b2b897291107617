"""A real `mlflow server`: runs, versions and aliases through it, and nights while it is away."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from harness import STAGES, Night, assert_tracked

from recray.benchmark.submit import Head
from recray.cluster import free_ports

FIRST = dt.date(2024, 4, 20)
IN_CI = ("train", "promote")
CHALLENGE = ("gates.margin=1", "tracking.timeout_s=30", "tracking.retries=0")


class Server:
    """`mlflow server` on sqlite and a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        words = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--artifacts-destination", str(self.folder / "artifacts")]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
                time.sleep(0.3)

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
def shop(head, server, world_folder, tmp_path_factory):
    """Runs the nights of one root, one day after the other."""
    return Shop(tmp_path_factory.mktemp("shop"), world_folder, head, server)


class Shop:
    def __init__(self, root: Path, folder: Path, head: Head, server: Server) -> None:
        self.root, self.folder, self.head, self.server, self.day = root, folder, head, server, -1

    def night(self, *, again: bool = False) -> Night:
        self.day += 0 if again else 1
        as_of = str(FIRST + dt.timedelta(days=self.day))
        return Night(self.folder, self.root, self.head.environment, f"tracking.uri={self.server.uri}", *CHALLENGE, as_of=as_of)

    def release(self) -> dict:
        return json.loads((self.root / "RELEASE.json").read_text())

    def pending(self) -> list[str]:
        return [p.stem for p in (self.root / "tracked").glob("[!.]*.json") if "run_id" not in json.loads(p.read_text())]


def test_a_server_works_as_the_local_store_does(shop, server):
    code, result = shop.night().end()
    assert (code, result["status"], result["warnings"]) == (0, "ok", []), result
    assert result["metrics"]["promoted"] == 1
    assert_tracked(shop.root, server.uri)
    code, result = shop.night(again=True).end()
    assert (code, result["status"]) == (0, "skipped")


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=[] if stage in IN_CI else [pytest.mark.slow]) for stage in STAGES])
def test_a_night_without_mlflow_is_scored_by_the_champion_and_told_later(shop, server, stage):
    if shop.day < 0:
        assert shop.night().end()[0] == 0
    before = shop.release()["champion"]["run_key"]
    night = shop.night()
    assert night.reaches(stage)
    server.stop()
    try:
        code, result = night.end()
        # the gate had answered when MLflow went away
        late = STAGES.index(stage) > STAGES.index("promote") or (stage == "promote" and result["metrics"].get("promoted") == 1)
        assert (code, result["status"]) == (0, "ok"), result
        assert any("MLflow" in warning for warning in result["warnings"]) and shop.pending()
        champion = shop.release()["champion"]["run_key"]
        if not late:
            assert champion == before and result["metrics"]["promoted"] == 0 and "waits for the next run" in result["reason"]
        latest = json.loads((shop.root / "LATEST.json").read_text())
        scored = json.loads((shop.root / latest["snapshot"] / "manifest.json").read_text())
        assert scored["bundle"] == f"bundles/{champion}" and str(FIRST + dt.timedelta(days=shop.day)) in latest["snapshot"]
    finally:
        server.start()
    code, result = shop.night(again=True).end()
    assert (code, result["warnings"]) == (0, []), result
    assert not shop.pending()
    assert result["metrics"]["promoted"] == 1
    assert_tracked(shop.root, server.uri)


def test_the_first_night_needs_no_mlflow(shop, world_folder, tmp_path):
    uri = f"tracking.uri=http://127.0.0.1:{free_ports(1)[0]}"
    code, result = Night(world_folder, tmp_path, shop.head.environment, uri, *CHALLENGE).end()
    assert (code, result["metrics"]["promoted"]) == (0, 1) and any("does not answer" in w for w in result["warnings"])


def test_another_storage_under_the_same_name_is_refused(shop, server, world_folder, tmp_path):
    if shop.day < 0:
        assert shop.night().end()[0] == 0
    code, result = Night(world_folder, tmp_path, shop.head.environment, f"tracking.uri={server.uri}", *CHALLENGE, "train.seed=5").end()
    assert (code, result["status"]) == (3, "refused"), result
    assert "another storage uses this name" in result["reason"] and "tracking.model" in result["reason"]
    assert not (tmp_path / "LATEST.json").exists() and not (tmp_path / "RELEASE.json").exists()
