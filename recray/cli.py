"""`recray …` and `python -m jobs.…`: arguments in, one JSON line and an exit code out.

Exit codes: 0 ok or skipped, 1 failed, 2 settings that cannot be used, 3 refused by a rule. What a person reads goes to
standard error; the last line of standard output is the job's JSON.
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
from typing import Any

import recray
from recray.config import Settings, load_settings, parse_as_of, render_yaml
from recray.errors import RecrayError, RefusedError, SettingsError

_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")

JOBS = {
    "validate": "check settings, and the input's columns and types; runs nothing",
    "prepare": "events to a dataset",
    "train": "dataset to a bundle",
    "evaluate": "the bundle beside baselines on the test users",
    "score": "every user's list, published",
    "nightly": "prepare, train, evaluate, score; goes on where it stopped",
    "serve": "answer requests from the published night until interrupted",
}
INIT_HEADING = """recray nightly --config {path}
Every setting with its default. Override any on the command line: train.epochs=3"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `recray`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]  # they may stand anywhere
    return _run(_parser().parse_args([argument for argument in arguments if argument not in overrides] + overrides))


def job_main(job: str, argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m jobs.<job>`: the same arguments as `recray <job>`."""
    return main([job, *(sys.argv[1:] if argv is None else argv)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recray", description="An attention recommender on Ray: nightly scores and an endpoint.")
    parser.add_argument("--version", action="version", version=f"recray {recray.__version__}")
    commands = parser.add_subparsers(dest="job", required=True, metavar="COMMAND")
    init = commands.add_parser("init", help="write a settings file in which every default is explained")
    init.add_argument("path", nargs="?", default="recray.yaml", help="the file to write (default: recray.yaml)")
    for job, text in JOBS.items():
        command = commands.add_parser(job, help=text, description=text)
        command.add_argument("--config", help="YAML settings; without it the defaults: the data that ships")
        command.add_argument("--as-of", help="read nothing after this moment, UTC; a date means its end (default: all there is)")
        _common(command)
    demo = commands.add_parser("demo", help="a night on the data that ships, then three live requests")
    demo.add_argument("--root", help="where to write (default: .demo/<time> here)")
    demo.add_argument("--keep-serving", action="store_true", help="leave the endpoint up until interrupted")
    _common(demo)
    benchmark = commands.add_parser("benchmark", help="measure recray itself")
    benchmark.add_argument("what", choices=["prepare"], help="prepare: peak memory at 1 and 10 million events")
    benchmark.add_argument("--out", default="infra/benchmarks", help="folder of the result file (default: infra/benchmarks)")
    _common(benchmark)
    return parser


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to override")
    command.add_argument("--traceback", action="store_true", help="show where an error came from")


def _run(arguments: argparse.Namespace) -> int:
    from recray.pipeline import JobResult

    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job ends as an interrupted one
    try:
        if arguments.job == "init":
            return _init(Path(arguments.path))
        result = _work(arguments)
        print(result.to_json(), flush=True)
        return 0
    except KeyboardInterrupt:
        print("interrupted; the job goes on where it stopped when it is repeated", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.__dict__.get("traceback"):
            traceback.print_exc()
        text = str(error) if isinstance(error, RecrayError) else f"unexpected {type(error).__name__}: {error}\n  fix: --traceback shows where"
        print(f"error: {text}", file=sys.stderr)
        status = "refused" if isinstance(error, RefusedError) else "failed"
        print(JobResult(arguments.job, status, seconds=round(time.monotonic() - started, 2)).to_json(), flush=True)
        return error.exit_code if isinstance(error, RecrayError) else 1


def _work(arguments: argparse.Namespace) -> Any:
    from recray import benchmark, demo, pipeline
    from recray.terminal import Reporter

    with Reporter() as reporter:
        if arguments.job == "demo":
            return demo.run_demo(arguments.root, arguments.overrides, reporter, keep_serving=arguments.keep_serving)
        if arguments.job == "benchmark":
            return benchmark.run_benchmark_prepare(Path(arguments.out), reporter.say)
        settings = load_settings(arguments.config, arguments.overrides)
        as_of = parse_as_of(arguments.as_of)
        if arguments.job == "serve":
            return demo.run_serve(settings, reporter)
        job: Callable[..., Any] = getattr(pipeline, f"run_{arguments.job}")
        result = job(settings, as_of, reporter.say)
        if "evaluation" in result.outputs:
            reporter.show_evaluation(result.outputs["evaluation"], settings)
        return result


def _init(path: Path) -> int:
    if path.exists():
        raise SettingsError(f"{path} exists", "name another file: recray init other.yaml")
    path.write_text(render_yaml(Settings(), INIT_HEADING.format(path=path)))
    print(f"wrote {path}; next: recray validate --config {path}", file=sys.stderr)
    return 0
