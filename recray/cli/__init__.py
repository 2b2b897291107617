"""`recray …` and `python -m jobs.…`: arguments in, one JSON line and an exit code out.

Exit codes: 0 ok or skipped, 1 failed, 2 invalid settings, 3 refused by a rule. Progress goes to standard
error. The last line of standard output is the job's JSON; on a terminal only with `--json`. A job runs in a
child process, so that the last line is written whatever ends the job.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recray.cli.dispatch import make_reporter, print_settings, run_job
from recray.cli.parser import JOBS, SUBMITTED, build_parser
from recray.errors import RecrayError, RefusedError

if TYPE_CHECKING:
    from recray.stages import JobResult

__all__ = ["JOBS", "SUBMITTED", "build_parser", "job_main", "main"]

_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `recray`. With `argv`, the job runs in this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]  # they may be anywhere
    parsed = build_parser().parse_args([argument for argument in arguments if argument not in overrides])
    if overrides:  # argparse has none for init
        parsed.overrides = [*getattr(parsed, "overrides", []), *overrides]
    is_read_by_a_program = parsed.__dict__.get("log") == "json" or not (sys.stdout and sys.stdout.isatty())
    parsed.json = parsed.__dict__.get("json", False) or is_read_by_a_program
    if argv is not None or parsed.job in ("init", "settings"):
        return _run(parsed)
    from recray.cli.supervise import supervise

    started = time.monotonic()
    return supervise(
        lambda write_line: _run(parsed, write_line),
        lambda message, fix: _fail(parsed, RecrayError(message, fix), started),
    )


def job_main(*job: str) -> int:
    """Entry point of `python -m jobs.<job>`: the same arguments as `recray <job>`, with JSON logs."""
    sys.argv[1:1] = [*job, "--log=json"]
    return main()


def _run(arguments: argparse.Namespace, write_line: Callable[[str], None] = print) -> int:
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        if arguments.job == "init":
            from recray.cli.init import write_settings

            overrides = getattr(arguments, "overrides", [])
            return write_settings(Path(arguments.path), overrides, arguments.from_data, arguments.template)
        if arguments.job == "settings":
            return print_settings(arguments)
        result = run_job(arguments, write_line)
        _report(arguments, result, write_line)
        if result.status not in ("ok", "skipped"):
            from recray.cli.webhook import notify

            notify(arguments, result)
        return result.exit_code
    except KeyboardInterrupt:
        stopped = RecrayError("stopped by a signal", "repeat the job; it continues where it stopped")
        if arguments.job == "submit":
            stopped = RecrayError(
                "no longer followed; the job continues",
                "the same command follows it again; ray job stop ends it",
            )
        return _fail(arguments, stopped, started, write_line)
    except Exception as error:
        if arguments.__dict__.get("traceback"):
            traceback.print_exc()
        return _fail(arguments, error, started, write_line)


def interrupt(number: int, frame: object) -> None:
    """Signal handler that ends a job once; a second signal must not interrupt the end."""
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(
    arguments: argparse.Namespace, error: Exception, started: float, write_line: Callable[[str], None] = print
) -> int:
    """Report a job that did not succeed; return its exit code."""
    from recray.stages import JobResult

    text = f"unexpected {type(error).__name__}: {error}\n  fix: --traceback shows where"
    if isinstance(error, RecrayError):
        text = str(error)
    make_reporter(arguments).error(text)
    result = JobResult(
        job=arguments.job,
        status="refused" if isinstance(error, RefusedError) else "failed",
        seconds=round(time.monotonic() - started, 2),
        reason=text.replace("\n  fix: ", "; fix: "),
    )
    if arguments.json:
        write_line(result.to_json())
    from recray.cli.webhook import notify

    notify(arguments, result)
    return error.exit_code if isinstance(error, RecrayError) else 1


def _report(arguments: argparse.Namespace, result: JobResult, write_line: Callable[[str], None]) -> None:
    """Write a result as JSON, or for a person at a terminal in words."""
    if arguments.json:
        write_line(result.to_json())
        return
    reason = f": {result.reason}" if result.reason else ""
    print(f"{result.job} {result.status} after {result.seconds:.0f} s{reason}", file=sys.stderr)
