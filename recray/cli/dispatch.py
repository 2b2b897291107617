"""Runs the job of the parsed arguments, and returns its result."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from recray.config import Settings, load_settings, parse_as_of, render_yaml
from recray.errors import SettingsError

if TYPE_CHECKING:
    from recray.pipeline.terminal import LogReporter, Reporter
    from recray.stages import AsOf, JobResult

JOB_OPTIONS = ("bundle", "restart", "user", "follow", "out")


def make_reporter(arguments: argparse.Namespace) -> Reporter | LogReporter:
    """The reporter of a job's progress, for a person or a log."""
    from recray.pipeline.terminal import LogReporter, Reporter

    return LogReporter(arguments.job) if arguments.__dict__.get("log") == "json" else Reporter()


def print_settings(arguments: argparse.Namespace) -> int:
    """Run `recray settings`."""
    settings = load_settings(arguments.config, arguments.overrides)
    sections = [arguments.section] if arguments.section else list(Settings.model_fields)
    shown = {section: list(type(getattr(settings, section)).model_fields) for section in sections}
    print(render_yaml(settings, "Override any on the command line: train.epochs=3", shown), end="")
    return 0


def run_job(arguments: argparse.Namespace, write_line: Callable[[str], None]) -> JobResult:
    """Run the job of the arguments.

    write_line : writes a line to standard output, for a demo that keeps serving
    """
    with make_reporter(arguments) as reporter:
        if arguments.job == "demo":
            from recray.cli import demo

            announce = write_line if arguments.json else lambda _: None
            keep_serving = announce if arguments.keep_serving else None
            return demo.run_demo(arguments.root, arguments.overrides, reporter, keep_serving)
        if arguments.job == "benchmark":
            return _run_benchmark(arguments, reporter)
        if arguments.job == "submit":
            return _submit(arguments, reporter)

        overrides = [*arguments.overrides, *_name_overrides(arguments)]
        settings = load_settings(arguments.config, overrides)
        if settings.changed:
            changes = ", ".join(settings.changed)
            reporter.progress(f"privacy.enabled changes {len(settings.changed)} settings: {changes}")
        as_of = parse_as_of(arguments.as_of, settings.data.timezone)
        if arguments.job == "serve":
            return _serve(arguments, settings, as_of, reporter)
        if arguments.job == "doctor":
            from recray.cli import doctor

            return doctor.run_doctor(settings, reporter)
        if arguments.job in ("models", "privacy"):
            return _inspect(arguments, settings, as_of, reporter)
        return _run_pipeline(arguments, settings, as_of, reporter)


def _name_overrides(arguments: argparse.Namespace) -> list[str]:
    """The arguments of a job that stand for settings, as overrides."""
    names = {"search.minutes": "minutes", "search.trials": "trials"} if arguments.job == "search" else {}
    values = {setting: getattr(arguments, name) for setting, name in names.items()}
    return [f"{setting}={value}" for setting, value in values.items() if value is not None]


def _run_pipeline(
    arguments: argparse.Namespace, settings: Settings, as_of: AsOf, reporter: Reporter
) -> JobResult:
    from recray import pipeline

    options = {name: getattr(arguments, name) for name in JOB_OPTIONS if hasattr(arguments, name)}
    result = pipeline.run(arguments.job, settings, as_of, reporter.progress, **options)
    if "evaluation" in result.outputs:
        reporter.show_evaluation(result.outputs["evaluation"], settings)
    if result.status == "refused":
        reporter.error(result.reason.replace("; fix: ", "\n  fix: "))
    if arguments.job == "report" and not arguments.no_open:
        webbrowser.open(Path(result.outputs["report"]).as_uri())
    return result


def _inspect(arguments: argparse.Namespace, settings: Settings, as_of: AsOf, reporter: Reporter) -> JobResult:
    from recray.pipeline import inspect

    if arguments.job == "models":
        return inspect.show_models(settings, reporter)
    days, training = arguments.days, arguments.training
    return inspect.run_privacy(settings, arguments.subcommand, as_of, reporter, days=days, training=training)


def _run_benchmark(arguments: argparse.Namespace, reporter: Reporter) -> JobResult:
    from recray import benchmark

    return benchmark.run(
        arguments.benchmark,
        Path(arguments.out),
        reporter.progress,
        data=arguments.data,
        against=arguments.against,
        overrides=arguments.overrides,
        overload=arguments.overload,
        state=arguments.state,
        items=arguments.items,
        drift=arguments.drift,
        follow=arguments.follow,
        users=arguments.users,
    )


def _serve(arguments: argparse.Namespace, settings: Settings, as_of: AsOf, reporter: Reporter) -> JobResult:
    from recray import pipeline
    from recray.cli import demo

    if arguments.name and arguments.subcommand not in ("key", "canary"):
        raise SettingsError(
            f"recray serve {arguments.subcommand} takes no name (got {arguments.name!r})", "omit it"
        )
    if arguments.subcommand == "key":
        return demo.run_key(arguments.name, arguments.scopes.split(","), reporter)
    if arguments.subcommand == "status":
        return demo.run_status(settings, reporter)
    if arguments.subcommand == "rollback":
        return pipeline.run("serve_rollback", settings, as_of, reporter.progress)
    if arguments.subcommand == "canary":
        if not arguments.name:
            raise SettingsError(
                "recray serve canary needs a bundle", "recray serve canary BUNDLE; recray models lists them"
            )
        if not 0 < arguments.share < 1:
            raise SettingsError(
                f"--share {arguments.share:g} is not between 0 and 1",
                "0.05 is 5 % of the users; recray promote gives a bundle all users",
            )
        options = {"bundle": arguments.name, "share": arguments.share, "shadow": arguments.shadow}
        return pipeline.run("canary", settings, as_of, reporter.progress, **options)
    return demo.run_serve(settings, reporter)


def _submit(arguments: argparse.Namespace, reporter: Reporter) -> JobResult:
    from recray.cli import submission

    is_misplaced = arguments.restart and arguments.submitted != "nightly"
    is_misplaced |= bool(arguments.bundle) and arguments.submitted != "promote"
    if is_misplaced:
        raise SettingsError("--restart is for nightly and --bundle for promote", "omit it")
    flags = [*(["--restart"] if arguments.restart else []), *([arguments.bundle] if arguments.bundle else [])]
    working_dir = Path(arguments.working_dir)
    submitted = submission.prepare_submission(
        arguments.submitted, arguments.config, arguments.as_of, arguments.overrides, working_dir, flags
    )
    return submission.run_submit(submitted, arguments.address, reporter, follow=not arguments.no_follow)
