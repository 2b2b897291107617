"""Jobs as an operator runs them, in processes that can be hit at a known moment; what a right nightly run
leaves; and waiting for events.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import psutil
import pyarrow.parquet as pq
from conftest import synthetic_overrides
from forked import FORKS, run_job
from processes import children, status, titled

from recray.storage.lease import FAULT
from recray.testing.cluster import Head

if TYPE_CHECKING:
    from recray.serving.service import Service

STAGES = ("prepare", "train", "evaluate", "promote", "score", "report")
BEFORE = {
    "prepare": "lease:held",
    "train": "dataset:visible",
    "evaluate": "bundle:visible",
    "promote": "evaluation:visible",
    "score": "RELEASE.json:visible",
    "report": "LATEST.json:visible",
}
"""The commit point after which a nightly run comes to a stage."""
ARTIFACTS = ("datasets", "bundles", "evaluations", "promotions", "scores", "reports")
WRITES = {"prepare": ("datasets",), "train": ("bundles", "training")}
AS_OF = "2024-04-20"
QUICK = ("train.epochs=3", "train.patience=3", "train.timeout_s=120", "storage.lease_s=5")
DEADLINE_S = 240.0  # of any wait: far above what a busy machine needs

Value = TypeVar("Value")


def wait_for(
    awaited: str,
    condition: Callable[[], Value],
    *,
    last_seen: Callable[[], Any] | None = None,
    ended: Callable[[], Any] | None = None,
    every_s: float = 0.05,
) -> Value:
    """The first true value of a condition; an OSError or ValueError in it counts as not yet.

    last_seen : what to show if it never came (default: what the condition gave last)
    ended : true once it cannot come any more, for instance `process.poll` or `lambda: not job.alive()`

    Raises AssertionError naming what was waited for and what was seen last.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        last: Any = None
        over = ended is not None and _is_over(
            ended()
        )  # looked at first: what came just before the end counts
        try:
            last = value = condition()
            if value:
                return value
        except (OSError, ValueError) as error:
            last = error
        if over or time.monotonic() > deadline:
            why = "it ended" if over else f"{DEADLINE_S:.0f} s went by"
            raise AssertionError(
                f"waited for {awaited}, but {why}; last seen: {last if last_seen is None else last_seen()!s}"
            )
        time.sleep(every_s)


def _is_over(state: Any) -> bool:
    """Of `Popen.poll`, for which 0 is an end, or of a predicate."""
    return state is not None and state is not False


class Job:
    """`python -m jobs.<name>` for the small data set under `root`, in a process of its own.

    fault : commit point where the job kills or stops itself, as in `recray.storage.lease.commit_point`
    fork : False for a process that begins with nothing, as an operator's does
    """

    _begun: list[Job] = []

    def __init__(
        self,
        name: str,
        folder: Path,
        root: Path,
        environment: dict[str, str],
        *overrides: str,
        as_of: str = AS_OF,
        fault: str | None = None,
        fork: bool = True,
    ) -> None:
        words = ["--as-of", as_of, *synthetic_overrides(folder, root), *QUICK, *overrides]
        environment = environment if fault is None else {**environment, FAULT: fault}
        self._begun.append(self)
        self._folder = Path(tempfile.mkdtemp(prefix="recray-job-"))
        self.out, self.log = self._folder / "out", self._folder / "log"
        if fork:
            self._process: Any = FORKS.Process(
                target=run_job, args=(name, words, environment, self.out, self.log)
            )
            self._process.start()
        else:
            with open(self.out, "w") as out, open(self.log, "w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", f"jobs.{name}", *words], env=environment, stdout=out, stderr=log
                )

    @classmethod
    def end_all(cls) -> None:
        """Kill what still runs, and forget all."""
        for job in cls._begun:
            job.discard()
        cls._begun.clear()

    def discard(self) -> None:
        """Kill it if it still runs, and remove what it wrote."""
        if self.alive():
            kill(self.worker, self.pid)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The small process that waits for the job and reports."""
        return int(self._process.pid)

    @property
    def worker(self) -> int | None:
        """The process that does the work: the child of the one we started."""
        return next(iter(children(self.pid)), None)

    def alive(self) -> bool:
        return (
            self._process.poll() is None
            if isinstance(self._process, subprocess.Popen)
            else self._process.exitcode is None
        )

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def waits_for(self, awaited: str, condition: Callable[[], Value], every_s: float = 0.05) -> Value:
        """Wait for something that comes while the job runs."""
        return wait_for(
            awaited,
            condition,
            last_seen=lambda: f"\n{self.said[-2000:]}",
            ended=lambda: not self.alive(),
            every_s=every_s,
        )

    def logs(self, **fields: Any) -> dict[str, Any]:
        """Wait for a line of its log with these fields."""

        def line() -> dict[str, Any] | None:
            lines = [json.loads(text) for text in self.said.split("\n")[:-1] if text.startswith('{"time"')]
            return next((line for line in lines if fields.items() <= line.items()), None)

        return self.waits_for(f"a line of its log with {fields}", line)

    def stops(self) -> int:
        """Wait until it stopped at its `fault`; the process that did."""
        return self.waits_for(
            "the job to stop itself",
            lambda: self.worker if status(self.worker) == psutil.STATUS_STOPPED else None,
        )

    def end(self) -> tuple[int, dict[str, Any]]:
        """Exit code and last line, {} if there is none."""
        wait_for("the job to end", lambda: not self.alive(), last_seen=lambda: f"\n{self.said[-2000:]}")
        code = (
            self._process.returncode
            if isinstance(self._process, subprocess.Popen)
            else self._process.exitcode
        )
        lines = self.out.read_text().splitlines() if self.out.exists() else []
        return code, json.loads(lines[-1]) if lines else {}

    def ends_ok(self) -> dict[str, Any]:
        """Its last line, after it ended well."""
        code, result = self.end()
        assert code == 0, result or self.said[-2000:]
        return result

    def is_killed(self) -> None:
        """Wait until it ended itself at its `fault`."""
        code, result = self.end()
        assert (code, result.get("status")) == (1, "failed") and "signal 9" in result["reason"], (
            result,
            self.said[-2000:],
        )


class Workspace:
    """A workspace of the small data set where a nightly run ended, and how it was before each stage of it.

    All jobs run at the path where that run was, since MLflow's store names it. `reference` has every file
    that the run promises to write alike.
    """

    def __init__(self, folder: Path, data_folder: Path, environment: dict[str, str]) -> None:
        self.root, self._cuts, self.data_folder, self.environment = (
            folder / "root",
            folder / "cuts",
            data_folder,
            environment,
        )
        self._cuts.mkdir()
        words = [
            sys.executable,
            str(Path(__file__).with_name("cutting.py")),
            str(self._cuts),
            *synthetic_overrides(data_folder, self.root),
            *QUICK,
        ]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        self.reference = content(self.root)
        assert_right(self.root, self.reference)

    def cut(self, stage: str) -> Path:
        """The root as it was when a stage began; at "end", as the run left it."""
        for path in self.root.iterdir() if self.root.exists() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return Path(shutil.copytree(self._cuts / stage, self.root, dirs_exist_ok=True))

    def cut_out(self, stage: str) -> Path:
        """The root as the run left it, but for what a stage wrote."""
        root = self.cut("end")
        for name in WRITES[stage]:
            for key in (path.name for path in (root / name).iterdir()):
                (root / "tracked" / f"{key}.json").unlink(missing_ok=True)
            shutil.rmtree(root / name)
        return root

    def job(self, name: str, *overrides: str, **options: Any) -> Job:
        return Job(name, self.data_folder, self.root, self.environment, *overrides, **options)

    def assert_right(self) -> None:
        assert_right(self.root, self.reference)

    def nightly_finds_the_rest_right(self, *overrides: str) -> None:
        """One nightly run, after which everything is as if nothing had happened."""
        self.job("nightly", *overrides).ends_ok()
        self.assert_right()


class Cluster(Head):
    """A cluster of one node that can be lost and come again."""

    def kill(self) -> None:
        """End the head node at once; what it had started may live on until `start`."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start(self) -> None:
        kill(*titled(self.home, "raylet", "gcs_server", "ray::", "dashboard", "ray/_private"))
        super().start()


def replica_logs(home: Path) -> list[str]:
    """What each replica of the endpoints of a home has written into its log."""
    logs = []
    for pid in titled(home, "ray::ServeReplica"):
        paths = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
        logs.append(
            "".join(Path(path).read_text() for path in sorted(paths) if "/logs/serve/replica" in path)
        )
    return logs


def kill(*pids: int | None) -> None:
    for pid in pids:
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def content(root: Path) -> dict[str, bytes]:
    """Every file that a nightly run promises to write alike, by its name under the root."""
    files = {
        str(p.relative_to(root)): p.read_bytes()
        for name in ARTIFACTS
        for p in sorted((root / name).rglob("*"))
        if p.is_file()
    }
    return files | {name: (root / name).read_bytes() for name in ("LATEST.json", "RELEASE.json")}


def assert_right(root: Path, reference: dict[str, bytes]) -> None:
    """The files are those of an undisturbed run, nothing else lies there, one row a user, and MLflow has one
    of each.
    """
    ours = content(root)
    assert sorted(ours) == sorted(reference)
    assert [name for name in ours if ours[name] != reference[name]] == []
    assert not [p for name in ARTIFACTS for p in (root / name).rglob(".*")], "scratch of an attempt was left"
    assert not list(root.glob("staging/*")) and not [p for p in root.glob("training/*") if p.is_dir()]
    users = [
        user
        for part in sorted((root / "scores").rglob("part-*.parquet"))
        for user in pq.read_table(part)["user_id"].to_pylist()
    ]
    assert len(users) == len(set(users)) == 300
    assert_tracked(root, f"sqlite:///{root / 'mlflow' / 'mlflow.db'}")


def assert_nothing_half_written(root: Path, reference: dict[str, bytes]) -> None:
    """What is visible is as an undisturbed run has it."""
    for name in ARTIFACTS:
        for path in (root / name).rglob("*"):
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
                assert reference[str(path.relative_to(root))] == path.read_bytes(), path
    for name in ("LATEST.json", "RELEASE.json"):
        assert not (root / name).exists() or (root / name).read_bytes() == reference[name]


def assert_tracked(root: Path, uri: str) -> None:
    """One MLflow run and one version a bundle, no value twice, the alias where RELEASE.json has the champion,
    nothing spooled.
    """
    with mock.patch.dict(
        os.environ, MLFLOW_SQLALCHEMYSTORE_POOLCLASS="NullPool"
    ):  # else it goes on with a file that was replaced
        _assert_tracked(root, uri)


def _assert_tracked(root: Path, uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("recray").experiment_id])
    bundles = {p.name for p in (root / "bundles").iterdir()}
    assert sorted(run.data.tags["recray.run_key"] for run in runs) == sorted(bundles)
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        curve = client.get_metric_history(run.info.run_id, "validation_ndcg")
        assert [point.step for point in curve] == list(range(1, len(curve) + 1)) and curve
        assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {
            "bundle",
            "evaluation",
            "promotions",
        }
    versions = client.search_model_versions("name = 'recray'")
    assert sorted(version.tags["recray.run_key"] for version in versions) == sorted(bundles)
    champion = json.loads((root / "RELEASE.json").read_text())["champion"]["run_key"]
    assert client.get_model_version_by_alias("recray", "champion").tags["recray.run_key"] == champion
    assert all("run_id" in json.loads(p.read_text()) for p in (root / "tracked").glob("[!.]*.json"))


@contextlib.contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of a service behind uvicorn, in a thread."""
    import uvicorn

    from recray.serving.http import create_app

    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for("the server", lambda: server.started, every_s=0.01, ended=lambda: not thread.is_alive())
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
