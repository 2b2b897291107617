"""`recray submit`: a job on a Ray cluster by Ray's job API, followed to its end.

The submission id names what is asked for: job, as-of, 12 characters of the hash of settings and input listing, attempt.
Asked for again while an attempt runs, that one is followed; after its end the next attempt is made.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recray.cluster import first_line, token_source
from recray.config import Settings, load_settings, parse_as_of
from recray.errors import ClusterError, DataError, SettingsError
from recray.pipeline import RESULT_SECTIONS
from recray.prepare.files import list_files, resolve
from recray.stages import JobResult
from recray.storage import key_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from recray.terminal import Reporter

LOST_S = 60.0  # a dashboard that does not answer for so long is given up
POLL_S = 1.0
MAX_BYTES = 100 << 20  # what Ray's dashboard takes in one request
_SILENT = logging.getLogger("recray.submission.silent")
_SILENT.disabled = True


@dataclass(frozen=True)
class Wish:
    """What is asked for. `passed` are the arguments of the job."""

    job: str
    settings: Settings
    as_of: dt.datetime | None
    passed: list[str]
    working_dir: Path

    @property
    def name(self) -> str:
        """The submission id without its attempt."""
        asked = key_of(self.settings.result_settings(*RESULT_SECTIONS), self.settings.storage.root, self.passed, _listing(self.settings))
        hashed = key_of("submission", asked)[:12]
        return f"{self.job}-{self.as_of.date() if self.as_of else 'latest'}-{hashed}"


def wish(job: str, config: str | None, as_of: str | None, overrides: list[str], working_dir: Path, flags: Sequence[str] = ()) -> Wish:
    """What is asked for, from the words of the command line; `flags` are those of the job alone.

    Raises SettingsError for what could not work on the cluster.
    """
    home = working_dir.resolve()
    if not (home / "jobs" / f"{job}.py").is_file():
        raise SettingsError(f"--working-dir {working_dir} has no jobs/{job}.py", "name the checkout of recray")
    passed = [*flags, *overrides]
    path = None
    if config is not None:
        path = (home / config).resolve()
        if not path.is_relative_to(home):
            raise SettingsError(
                f"--config {config} is not in the working directory {working_dir}", "put it there: the cluster gets that folder alone"
            )
        passed = ["--config", str(path.relative_to(home)), *passed]
    settings = load_settings(path, overrides)
    settings.root()
    return Wish(job, settings, parse_as_of(as_of, settings.data.timezone), [*passed, *(["--as-of", as_of] if as_of else [])], working_dir)


@dataclass
class SubmittedResult(JobResult):
    """What the job on the cluster said, and the exit code that Ray saw."""

    driver_exit_code: int | None = None

    @property
    def exit_code(self) -> int:
        return super().exit_code if self.driver_exit_code is None else self.driver_exit_code


def run_submit(wanted: Wish, address: str | None, reporter: Reporter, *, follow: bool = True) -> JobResult:
    """Submit, or find the attempt that is running; follow its log and return how it ended.

    Raises SettingsError for a working directory that is too large, ClusterError.
    """
    started = time.monotonic()
    with _named(address):
        _fits(wanted.working_dir)
        client = _client(address)
        attempt, running = _last_attempt(client, wanted.name)
        try:
            submission = f"{wanted.name}-{attempt}" if running else _submit(client, wanted, attempt + 1)
        except RuntimeError as error:
            attempt, running = _last_attempt(client, wanted.name)
            if not running:
                raise
            submission = f"{wanted.name}-{attempt}"  # somebody else was faster with the same wish
            reporter.say(f"submitted meanwhile: {first_line(error)}", level="debug")
    reporter.say(f"{'following' if running else 'submitted'} {submission}", submission=submission)
    outputs = {"submission": submission}
    if not follow:
        return JobResult("submit", "ok", outputs=outputs, seconds=round(time.monotonic() - started, 2))
    details, last = _follow(client, submission, address)
    seconds = round(time.monotonic() - started, 2)
    if last is None:
        reason = f"{submission} ended {details.status.value} without a result: {details.message or 'no message'}"
        last = asdict(JobResult("submit", "failed", reason=reason))
    last |= {"job": "submit", "outputs": {**last["outputs"], **outputs}, "seconds": seconds}
    return SubmittedResult(**last, driver_exit_code=details.driver_exit_code)


def _submit(client: JobSubmissionClient, wanted: Wish, attempt: int) -> str:
    """Submit an attempt; its id. A cluster that has just come up is given a minute to be ready for jobs."""
    submission, deadline = f"{wanted.name}-{attempt}", time.monotonic() + LOST_S
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", f"jobs.{wanted.job}", *wanted.passed]),
                submission_id=submission,
                runtime_env={"working_dir": str(wanted.working_dir)},  # no secrets: the dashboard shows it
                entrypoint_num_cpus=0,
                metadata={"recray": wanted.job},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _fits(folder: Path) -> None:
    """Raises SettingsError if the folder, less what its .rayignore and .gitignore leave out, is more than Ray takes."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes  # Ray's own rules; it has no public name for them

    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            top = path.relative_to(folder).parts[0]
            sizes[top] = sizes.get(top, 0) + path.stat().st_size

    _dir_travel(folder, [_get_excludes(folder, get_runtime_env_default_excludes())], count, include_gitignore=True, logger=_SILENT)
    if sum(sizes.values()) > MAX_BYTES:
        largest = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sorted(sizes.items(), key=lambda entry: -entry[1])[:3])
        raise SettingsError(
            f"the working directory {folder} is too large to send: {sum(sizes.values()) / 1e6:.0f} MB of {MAX_BYTES / 1e6:.0f} MB ({largest})",
            f"name what stays home (data, environments, outputs) in {folder / '.rayignore'}",
        )


def _last_attempt(client: JobSubmissionClient, name: str) -> tuple[int, bool]:
    """The number of the last attempt (0: none) and whether it has not ended."""
    last, running = 0, False
    for details in client.list_jobs():
        prefix, _, number = (details.submission_id or "").rpartition("-")
        if prefix == name and number.isdigit() and int(number) > last:
            last, running = int(number), not details.status.is_terminal()
    return last, running


def _follow(client: JobSubmissionClient, submission: str, address: str | None) -> tuple[JobDetails, dict[str, Any] | None]:
    """Copy the job's log to standard error until it ends; its last line that is a result is returned. A lost connection is
    taken up again for a while: the job does not depend on us."""
    printed, last, silent = 0, None, None
    while True:
        try:
            details, text = client.get_job_info(submission), client.get_job_logs(submission)
            silent = None
        except Exception as error:
            silent = silent or time.monotonic()
            if time.monotonic() - silent > LOST_S:
                raise ClusterError(
                    f"the cluster stopped answering while {submission} was followed: {first_line(error)}",
                    "repeat this command: a running attempt is followed, a lost one is made again",
                ) from error
            time.sleep(POLL_S)
            continue
        whole = text if details.status.is_terminal() else text[: text.rfind("\n") + 1]
        for line in whole[printed:].splitlines():
            if found := _result(line):
                last = found
            else:
                print(line, file=sys.stderr, flush=True)
        printed = len(whole)
        if details.status.is_terminal():
            return details, last
        time.sleep(POLL_S)


def _result(line: str) -> dict[str, Any] | None:
    """A line of the log as the result of a job, None if it is something else."""
    if not line.startswith('{"job": '):
        return None
    with contextlib.suppress(ValueError):
        content = json.loads(line)
        if {"job", "status", "run_key"} <= content.keys():
            return dict(content)
    return None


def _client(address: str | None) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for noisy in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(noisy).setLevel(logging.ERROR)  # packaging names every folder that stays home
    return JobSubmissionClient(_dashboard(address))


def _dashboard(address: str | None) -> str:
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


@contextlib.contextmanager
def _named(address: str | None) -> Iterator[None]:
    """Errors of Ray's job API by what they mean."""
    try:
        yield
    except (SettingsError, DataError):
        raise
    except Exception as error:
        text, where = first_line(error), _dashboard(address)
        if type(error).__name__ == "AuthenticationError":
            source = token_source()
            what = f"{where} does not take the token from {source}" if source else f"{where} wants a token and there is none"
            fix = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            raise ClusterError(f"{what}: {text}", fix) from error
        if isinstance(error, ConnectionError):
            raise ClusterError(f"no cluster answers at {where}: {text}", "start it, or name its dashboard with --address") from error
        raise ClusterError(f"{where} did not take the job: {text}", "look at the cluster's dashboard") from error


def _listing(settings: Settings) -> list[Any]:
    """Names, sizes and times of the input files as they are seen from here; empty if they are only seen from the cluster."""
    try:
        files = [*list_files(settings.data.events).files, *(list_files((settings.data.items,), "data.items").files if settings.data.items else ())]
    except DataError:
        return []
    found = []
    for file in files:
        filesystem, path = resolve(file.uri)
        info = filesystem.get_file_info(path)
        found.append([file.uri, info.size, info.mtime_ns])
    return found
