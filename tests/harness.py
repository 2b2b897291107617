"""A night as an operator runs it, in a process of its own, that can be hit at a known moment; and what a right night is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
from conftest import world_overrides

STAGES = ("prepare", "train", "evaluate", "promote", "score", "report")
ARTIFACTS = ("datasets", "bundles", "evaluations", "promotions", "scores", "reports")
AS_OF = "2024-04-20"
QUICK = ("train.epochs=3", "train.patience=3", "train.timeout_s=30", "storage.lease_s=5")


class Night:
    """`python -m jobs.nightly` for the small world under `root`. Its log is read as it comes."""

    def __init__(self, folder: Path, root: Path, environment: dict[str, str], *more: str, as_of: str = AS_OF) -> None:
        command = [sys.executable, "-m", "jobs.nightly", "--as-of", as_of, *world_overrides(folder, root), *QUICK, *more]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.stages: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            stage = json.loads(line)["stage"] if line.startswith('{"time"') else ""
            with self._news:
                self.lines.append(line)
                if stage and stage not in self.stages:
                    self.stages.append(stage)
                self._news.notify_all()
        with self._news:
            self.stages.append("end")
            self._news.notify_all()

    def reaches(self, stage: str, timeout_s: float = 200) -> bool:
        """Wait until a stage begins; False if the night ended before."""
        with self._news:
            assert self._news.wait_for(lambda: {stage, "end"} & set(self.stages), timeout_s), "".join(self.lines[-20:])
            return stage in self.stages

    @property
    def job(self) -> int | None:
        """The process that does the work: the child of the one we started."""
        children = [pid for pid, parent in parents().items() if parent == self.process.pid]
        return children[0] if children else None

    def end(self, timeout_s: float = 240) -> tuple[int, dict]:
        """Exit code and last line, {} if there is none."""
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        out = self.process.stdout.read().splitlines()
        return code, json.loads(out[-1]) if out else {}

    @property
    def said(self) -> str:
        return "".join(self.lines)


def parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    return found


def titled(home: Path, *words: str) -> list[int]:
    """Processes of this home whose title holds one of the words."""
    found = []
    for pid in parents():
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            mine = f"HOME={home}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if mine and any(word in title for word in words):
            found.append(pid)
    return found


def kill(*pids: int | None) -> None:
    for pid in pids:
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def content(root: Path) -> dict[str, bytes]:
    """Every file that a night promises to write alike, by its name under the root."""
    found = {str(p.relative_to(root)): p.read_bytes() for name in ARTIFACTS for p in sorted((root / name).rglob("*")) if p.is_file()}
    return found | {name: (root / name).read_bytes() for name in ("LATEST.json", "RELEASE.json")}


def assert_right(root: Path, reference: dict[str, bytes]) -> None:
    """The night's files are those of the undisturbed one, nothing else lies there, one row a user, and MLflow has one of each."""
    mine = content(root)
    assert sorted(mine) == sorted(reference)
    assert [name for name in mine if mine[name] != reference[name]] == []
    assert not [p for name in ARTIFACTS for p in (root / name).rglob(".*")], "scratch of an attempt was left"
    assert not list(root.glob("staging/*")) and not [p for p in root.glob("training/*") if p.is_dir()]
    users = [user for part in sorted((root / "scores").rglob("part-*.parquet")) for user in pq.read_table(part)["user_id"].to_pylist()]
    assert len(users) == len(set(users)) == 300
    assert_tracked(root, f"sqlite:///{root / 'mlflow' / 'mlflow.db'}")


def assert_tracked(root: Path, uri: str, nights: int = 1) -> None:
    """One MLflow run and one version a bundle, no value twice, the alias where RELEASE.json has the champion, nothing spooled."""
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("recray").experiment_id])
    bundles = {p.name for p in (root / "bundles").iterdir()}
    assert sorted(run.data.tags["recray.run_key"] for run in runs) == sorted(bundles)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        curve = client.get_metric_history(run.info.run_id, "validation_ndcg")
        assert [point.step for point in curve] == list(range(1, len(curve) + 1)) and curve
        assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"bundle", "evaluation", "promotions"}
    versions = client.search_model_versions("name = 'recray'")
    assert sorted(version.tags["recray.run_key"] for version in versions) == sorted(bundles)
    champion = json.loads((root / "RELEASE.json").read_text())["champion"]["run_key"]
    assert client.get_model_version_by_alias("recray", "champion").tags["recray.run_key"] == champion
    assert all("run_id" in json.loads(p.read_text()) for p in (root / "tracked").glob("[!.]*.json"))
