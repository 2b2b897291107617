"""`recray submit`: runs a job on a Ray cluster through Ray's job API and follows it to its end.

The submission id consists of job, as-of, 12 characters of the hash of settings and input listing, and the
attempt. If an attempt with the same id is running, it is followed; otherwise the next attempt is submitted.
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
from recray.config import RESULT_SECTIONS, Settings, load_settings, parse_as_of
from recray.errors import ClusterError, DataError, SettingsError
from recray.prepare.files import list_files, resolve_uri
from recray.stages import JobResult
from recray.storage import key_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from recray.pipeline.terminal import Reporter

LOST_S = 60.0  # a dashboard that does not respond for this long is unavailable
POLL_S = 1.0
MAX_BYTES = 100 << 20  # of one request to Ray's dashboard
_SILENT = logging.getLogger("recray.cli.submission.silent")
_SILENT.disabled = True


@dataclass(frozen=True)
class Submission:
    """A job to submit.

    arguments : of the job
    """

    job: str
    settings: Settings
    as_of: dt.datetime | None
    arguments: list[str]
    working_dir: Path

    @property
    def name(self) -> str:
        """The submission id without its attempt."""
        content_key = key_of(
            self.settings.key_settings(*RESULT_SECTIONS),
            self.settings.storage.root,
            self.arguments,
            _list_inputs(self.settings),
        )
        digest = key_of("submission", content_key)[:12]
        return f"{self.job}-{self.as_of.date() if self.as_of else 'latest'}-{digest}"


def prepare_submission(
    job: str,
    config: str | None,
    as_of: str | None,
    overrides: list[str],
    working_dir: Path,
    flags: Sequence[str] = (),
) -> Submission:
    """The job to submit, from the command line. Raises SettingsError for what could not work on the cluster.

    flags : of the job alone
    """
    checkout = working_dir.resolve()
    if not (checkout / "jobs" / f"{job}.py").is_file():
        raise SettingsError(
            f"--working-dir {working_dir} has no jobs/{job}.py", "name the checkout of recray"
        )
    arguments = [*flags, *overrides]
    path = None
    if config is not None:
        path = (checkout / config).resolve()
        if not path.is_relative_to(checkout):
            raise SettingsError(
                f"--config {config} is not in the working directory {working_dir}",
                "move it there: the cluster receives only that folder",
            )
        arguments = ["--config", str(path.relative_to(checkout)), *arguments]
    settings = load_settings(path, overrides)
    settings.root()
    return Submission(
        job,
        settings,
        parse_as_of(as_of, settings.data.timezone),
        [*arguments, *(["--as-of", as_of] if as_of else [])],
        working_dir,
    )


@dataclass
class SubmittedResult(JobResult):
    """The result of the job on the cluster, and the exit code that Ray reports."""

    driver_exit_code: int | None = None

    @property
    def exit_code(self) -> int:
        return super().exit_code if self.driver_exit_code is None else self.driver_exit_code


def run_submit(
    submission: Submission, address: str | None, reporter: Reporter, *, follow: bool = True
) -> JobResult:
    """Submit, or find the running attempt; follow its log and return its result.

    Raises SettingsError for a working directory that is too large, ClusterError.
    """
    started = time.monotonic()
    with _explain_errors(address):
        _require_size(submission.working_dir)
        client = _connect(address)
        attempt, running = _find_last_attempt(client, submission.name)
        try:
            submission_id = (
                f"{submission.name}-{attempt}" if running else _submit(client, submission, attempt + 1)
            )
        except RuntimeError as error:
            attempt, running = _find_last_attempt(client, submission.name)
            if not running:
                raise
            submission_id = f"{submission.name}-{attempt}"  # somebody else submitted the same job
            reporter.progress(f"submitted meanwhile: {first_line(error)}", level="debug")
    reporter.progress(f"{'following' if running else 'submitted'} {submission_id}", submission=submission_id)
    outputs = {"submission": submission_id}
    if not follow:
        return JobResult("submit", "ok", outputs=outputs, seconds=round(time.monotonic() - started, 2))
    details, result = _follow(client, submission_id)
    seconds = round(time.monotonic() - started, 2)
    if result is None:
        reason = (
            f"{submission_id} ended {details.status.value} without a result: "
            f"{details.message or 'no message'}"
        )
        result = asdict(JobResult("submit", "failed", reason=reason))
    result |= {"job": "submit", "outputs": {**result["outputs"], **outputs}, "seconds": seconds}
    return SubmittedResult(**result, driver_exit_code=details.driver_exit_code)


def _submit(client: JobSubmissionClient, submission: Submission, attempt: int) -> str:
    """Submit an attempt; its id. A cluster that has just started has a minute to become ready for jobs."""
    submission_id, deadline = f"{submission.name}-{attempt}", time.monotonic() + LOST_S
    while True:
        try:
            return client.submit_job(
                entrypoint=shlex.join(["python", "-m", f"jobs.{submission.job}", *submission.arguments]),
                submission_id=submission_id,
                runtime_env={
                    "working_dir": str(submission.working_dir)
                },  # without secrets, since the dashboard shows it
                entrypoint_num_cpus=0,
                metadata={"recray": submission.job},
            )
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _require_size(folder: Path) -> None:
    """Raises SettingsError if the folder, without what its .rayignore and .gitignore exclude, is too large
    for Ray.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import (  # Ray's own rules; it has no public name for them
        _dir_travel,
        _get_excludes,
    )

    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            entry = path.relative_to(folder).parts[0]
            sizes[entry] = sizes.get(entry, 0) + path.stat().st_size

    _dir_travel(
        folder,
        [_get_excludes(folder, get_runtime_env_default_excludes())],
        count,
        include_gitignore=True,
        logger=_SILENT,
    )
    if sum(sizes.values()) > MAX_BYTES:
        largest = ", ".join(
            f"{name} {size / 1e6:.0f} MB"
            for name, size in sorted(sizes.items(), key=lambda entry: -entry[1])[:3]
        )
        raise SettingsError(
            f"the working directory {folder} is too large to send: {sum(sizes.values()) / 1e6:.0f} MB of "
            f"{MAX_BYTES / 1e6:.0f} MB ({largest})",
            f"exclude data, environments and outputs in {folder / '.rayignore'}",
        )


def _find_last_attempt(client: JobSubmissionClient, name: str) -> tuple[int, bool]:
    """The number of the last attempt (0: none), and whether it is running."""
    last, running = 0, False
    for details in client.list_jobs():
        prefix, _, number = (details.submission_id or "").rpartition("-")
        if prefix == name and number.isdigit() and int(number) > last:
            last, running = int(number), not details.status.is_terminal()
    return last, running


def _follow(client: JobSubmissionClient, submission_id: str) -> tuple[JobDetails, dict[str, Any] | None]:
    """Copy the job's log to standard error until it ends; its details, and the last result in the log. A lost
    connection is retried for a while, since the job does not depend on this process.
    """
    printed, result, silent_since = 0, None, None
    while True:
        try:
            details, text = client.get_job_info(submission_id), client.get_job_logs(submission_id)
            silent_since = None
        except Exception as error:
            silent_since = silent_since or time.monotonic()
            if time.monotonic() - silent_since > LOST_S:
                raise ClusterError(
                    f"the cluster became unavailable while {submission_id} was followed: {first_line(error)}",
                    "repeat this command: it follows a running attempt, or submits a lost one again",
                ) from error
            time.sleep(POLL_S)
            continue
        complete = text if details.status.is_terminal() else text[: text.rfind("\n") + 1]
        for line in complete[printed:].splitlines():
            if line_result := to_result(line):
                result = line_result
            else:
                print(line, file=sys.stderr, flush=True)
        printed = len(complete)
        if details.status.is_terminal():
            return details, result
        time.sleep(POLL_S)


def to_result(line: str) -> dict[str, Any] | None:
    """A line of the log as the result of a job; None if it is something else."""
    if not line.startswith('{"job": '):
        return None
    with contextlib.suppress(ValueError):
        content = json.loads(line)
        if {"job", "status", "run_key"} <= content.keys():
            return dict(content)
    return None


def _connect(address: str | None) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # packaging lists every excluded folder
    return JobSubmissionClient(_dashboard_address(address))


def _dashboard_address(address: str | None) -> str:
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


@contextlib.contextmanager
def _explain_errors(address: str | None) -> Iterator[None]:
    """Raise errors of Ray's job API as ClusterError with their cause and fix."""
    try:
        yield
    except (SettingsError, DataError):
        raise
    except Exception as error:
        text, dashboard = first_line(error), _dashboard_address(address)
        if type(error).__name__ == "AuthenticationError":
            source = token_source()
            message = (
                f"{dashboard} does not accept the token from {source}"
                if source
                else f"{dashboard} requires a token and there is none"
            )
            fix = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            raise ClusterError(f"{message}: {text}", fix) from error
        if isinstance(error, ConnectionError):
            raise ClusterError(
                f"no cluster responds at {dashboard}: {text}",
                "start it, or name its dashboard with --address",
            ) from error
        raise ClusterError(
            f"{dashboard} did not accept the job: {text}", "look at the cluster's dashboard"
        ) from error


def _list_inputs(settings: Settings) -> list[Any]:
    """Names, sizes and times of the input files; empty if only the cluster can read them."""
    try:
        files = [
            *list_files(settings.data.events).files,
            *(list_files((settings.data.items,), "data.items").files if settings.data.items else ()),
        ]
    except DataError:
        return []
    entries = []
    for file in files:
        filesystem, path = resolve_uri(file.uri)
        info = filesystem.get_file_info(path)
        entries.append([file.uri, info.size, info.mtime_ns])
    return entries
