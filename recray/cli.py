"""`recray …` and `python -m jobs.…`: arguments in, one JSON line and an exit code out.

Exit codes: 0 ok or skipped, 1 failed, 2 settings that cannot be used, 3 refused by a rule. What a person or a log reads
goes to standard error; the last line of standard output is the job's JSON. A job runs in a child of this process, so that
the last line is there whatever ended it.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import traceback
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recray.config import FIRST_SETTINGS, Settings, load_settings, parse_as_of, render_yaml
from recray.errors import RecrayError, RefusedError, SettingsError
from recray.version import __version__

_OVERRIDE = re.compile(r"[a-z_]+(\.\w+)+=")

JOBS = {
    "validate": "check settings, and the input's columns and types; runs nothing",
    "collect": "what the endpoint was told since the last time, to Parquet for the next night",
    "prepare": "events to a dataset",
    "train": "dataset to a bundle",
    "evaluate": "the bundle beside baselines on the test users",
    "promote": "ask the gate whether a bundle becomes the champion",
    "tune": "an attention policy for the champion, learned by RLlib; a gate decides whether it answers",
    "adapt": "the next attention policy, from what answers that explored were worth; the same gate",
    "score": "every user's list by the champion, published",
    "nightly": "collect, prepare, train, evaluate, promote, tune, score, report; goes on where it stopped",
    "report": "a page about the night, with plots; opened in a browser",
    "rollback": "the champion before this one again, and its scores for the published night",
    "export": "copy what is kept of a user to a file: log, collected events, history, lists",
    "forget": "drop a user from log, collected events, datasets and lists, and keep nothing of the user any more",
    "serve": "answer requests from the published night until interrupted",
}
SUBMITTED = ("collect", "prepare", "train", "evaluate", "promote", "tune", "adapt", "score", "nightly", "rollback", "audit")
INIT_HEADING = """recray nightly --config {path}
What to decide first. `recray settings` prints all others with their defaults; override any on the command line: train.epochs=3"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `recray`. Given `argv`, runs in this process."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides = [argument for argument in arguments if _OVERRIDE.match(argument)]  # they may stand anywhere
    parsed = _parser().parse_args([argument for argument in arguments if argument not in overrides])
    if overrides:  # for init argparse knows none
        parsed.overrides = [*getattr(parsed, "overrides", []), *overrides]
    if argv is not None or parsed.job in ("init", "settings"):
        return _run(parsed)
    from recray.supervise import supervise

    started = time.monotonic()
    return supervise(lambda tell: _run(parsed, tell), lambda what, fix: _end(parsed, RecrayError(what, fix), started))


def job_main(*job: str) -> int:
    """Entry point of `python -m jobs.<job>`: the same arguments as `recray <job>`, with JSON logs."""
    sys.argv[1:1] = [*job, "--log=json"]
    return main()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recray", description="An attention recommender on Ray: nightly scores and an endpoint.")
    parser.add_argument("--version", action="version", version=f"recray {__version__}")
    commands = parser.add_subparsers(dest="job", required=True, metavar="COMMAND")
    init = commands.add_parser("init", help="write a settings file with what to decide first")
    init.add_argument("path", nargs="?", default="recray.yaml", help="the file to write (default: recray.yaml)")
    printed = commands.add_parser("settings", help="print every setting with its value and meaning, as YAML")
    printed.add_argument("section", nargs="?", choices=list(Settings.model_fields), metavar="SECTION", help=", ".join(Settings.model_fields))
    printed.add_argument("--config", help="YAML settings whose values are printed; without it the defaults")
    printed.set_defaults(overrides=[])
    for job, text in JOBS.items():
        command = commands.add_parser(job, help=text, description=text)
        if job == "promote":
            command.add_argument(
                "bundle", nargs="?", help="run key of the bundle (recray models lists them; default: the current one), or BUNDLE+POLICY"
            )
        if job == "adapt":
            command.add_argument("--follow", action="store_true", help="a round whenever policy.round_decisions more are ripe, until it is stopped")
        if job in ("forget", "export"):
            command.add_argument("user", help="id of the user, as in the event log")
        if job == "export":
            command.add_argument("--out", help="a new file, which nobody else may read (default: recray-export-TIME.jsonl here)")
        if job == "nightly":
            command.add_argument("--restart", action="store_true", help="begin a night anew that was begun with other settings and did not end")
        if job == "report":
            command.add_argument("--no-open", action="store_true", help="write it and say where it is, without a browser")
        if job == "serve":
            command.add_argument(
                "what",
                nargs="?",
                choices=["run", "status", "canary", "rollback", "key"],
                default="run",
                help="run: until interrupted (default); status: what answers whom; canary BUNDLE: let a challenger answer a share of the users; "
                "rollback: end that, or as recray rollback; key NAME: draw an API key",
            )
            command.add_argument("name", nargs="?", help="canary: run key of the bundle, or BUNDLE+POLICY; key: whose it is")
            command.add_argument("--share", type=float, default=0.05, help="canary: of the users (default: 0.05)")
            command.add_argument("--shadow", action="store_true", help="canary: it answers all, and nobody sees it")
            command.add_argument("--scopes", default="read,write", help="key: of read, history, write and admin (default: read,write)")
        _settings(command)
    _submit(commands)
    models = commands.add_parser("models", help="bundles, their roles and their versions in MLflow")
    _settings(models)
    text = "what private trainings have spent of their users' privacy, and what can be afforded"
    privacy = commands.add_parser("privacy", help=text, description=text)
    privacy.add_argument(
        "what",
        choices=["status", "plan", "close", "audit"],
        help="status: the ledger; plan: noise, cadence and shards of users for a cap; close: end a training that will not go on, which "
        "frees the steps that it reserved and did not take; audit: how much of its ε a training shows (several trainings)",
    )
    privacy.add_argument("--training", metavar="KEY", help="close: the training, as status names it")
    privacy.add_argument("--days", type=int, default=30, help="plan: how long the cap is to last (default: 30)")
    _settings(privacy)
    doctor = commands.add_parser("doctor", help="look at machine, versions, Ray, MLflow and storage; say what to fix")
    _settings(doctor)
    demo = commands.add_parser("demo", help="a night on the data that ships, then three live requests")
    demo.add_argument("--root", help="where to write (default: .demo/<time> here)")
    demo.add_argument("--keep-serving", action="store_true", help="leave the endpoint up until interrupted")
    _common(demo)
    text = "measure recray on this machine, beside a peer where one is named"
    benchmark = commands.add_parser("benchmark", help=text, description=text)
    benchmark.add_argument(
        "what",
        choices=[
            "prepare",
            "submit",
            "quality",
            "ablations",
            "features",
            "slate",
            "train",
            "score",
            "catalogue",
            "scale",
            "privacy",
            "serve",
            "explain",
            "policy",
            "experiments",
        ],
        help="prepare: peak memory, or with --against events a second; submit: a submitted night beside a local one; "
        "quality: HR and NDCG of three seeds (an hour; a peer "
        "trains to its own early stop, some hours, and goes on where it was stopped); ablations: what each part of the model is worth, "
        "a training each, on the data that ships (half an hour) or others; features: what each column is worth, and items that training never saw; "
        "slate: AUC within impressions (MIND); train: seconds an epoch; score: users a second; catalogue: memory and time with a "
        "million items; scale: how seconds grow with events and users; privacy: a private step beside a plain one, and with --data "
        "quality by ε (hours; goes on where it was stopped); serve: the endpoint beside plain uvicorn and beside Serve's defaults; "
        "explain: whether the events that an explanation names carried the answer; policy: a learned attention policy in worlds whose best "
        "actions are known, and with --data on real histories; experiments: how many experiments of equal variants end, and how soon worse ones do",
    )
    benchmark.add_argument(
        "--data",
        help="of those that run on data: folder of a data set, or its name under $RECRAY_DATA; privacy: or world, or cuts (12 trainings of one ε)",
    )
    benchmark.add_argument(
        "--against",
        help="quality, train, score: the peer to run on the same data in the same run, implicit or rectools; "
        "prepare, privacy, serve: the folder of another checkout of recray, run in turns with this one",
    )
    benchmark.add_argument("--overload", action="store_true", help="serve: three times as many requests as it can answer")
    benchmark.add_argument("--state", action="store_true", help="serve: beside a user of 1,000 recent events, and while Redis hangs")
    benchmark.add_argument("--drift", action="store_true", help="policy: a world that turns around under a running endpoint (half an hour)")
    benchmark.add_argument("--follow", action="store_true", help="policy --drift: with recray adapt --follow, by the clock (half an hour)")
    benchmark.add_argument("--users", type=int, help="serve: a snapshot of so many users (10000000: some minutes, 5 GB)")
    benchmark.add_argument("--out", default="infra/benchmarks", help="folder of the result file (default: infra/benchmarks)")
    _common(benchmark)
    return parser


def _submit(commands: Any) -> None:
    text = "run a job on a Ray cluster by Ray's job API, follow its log, end with its exit code"
    submit = commands.add_parser("submit", help=text, description=text)
    submit.add_argument("submitted", choices=SUBMITTED, metavar="JOB", help=", ".join(SUBMITTED))
    submit.add_argument("--address", help="the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)")
    submit.add_argument("--working-dir", default=".", help="folder that is sent along: recray's code, jobs/ and configs (default: .)")
    submit.add_argument("--bundle", metavar="KEY", help="promote: the bundle to ask about")
    submit.add_argument("--restart", action="store_true", help="nightly: begin a night anew that was begun with other settings")
    submit.add_argument("--no-follow", action="store_true", help="do not wait for the end")
    _settings(submit)


def _settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", help="YAML settings; without it the defaults: the data that ships")
    command.add_argument("--as-of", help="read nothing after this moment, UTC; a date means its end (default: all there is)")
    _common(command)


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to override")
    command.add_argument("--log", choices=["text", "json"], default="text", help="how standard error is written (jobs.*: json)")
    command.add_argument("--traceback", action="store_true", help="show where an error came from")


def _run(arguments: argparse.Namespace, tell: Callable[[str], None] = print) -> int:
    started = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        if arguments.job == "init":
            return _init(Path(arguments.path))
        if arguments.job == "settings":
            return _print_settings(arguments)
        result = _work(arguments, tell)
        tell(result.to_json())
        return int(result.exit_code)
    except KeyboardInterrupt:
        if arguments.job == "submit":
            stopped = RecrayError("no longer followed; the job runs on", "the same command follows it again; ray job stop ends it")
        else:
            stopped = RecrayError("stopped by a signal", "repeated, the job goes on where it stopped")
        return _end(arguments, stopped, started, tell)
    except Exception as error:
        if arguments.__dict__.get("traceback"):
            traceback.print_exc()
        return _end(arguments, error, started, tell)


def _interrupt(number: int, frame: object) -> None:
    """End the job once; a second signal must not cut the end short."""
    for asks in (signal.SIGINT, signal.SIGTERM):
        signal.signal(asks, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end(arguments: argparse.Namespace, error: Exception, started: float, tell: Callable[[str], None] = print) -> int:
    """The last words of a job that did not succeed; its exit code."""
    from recray.stages import JobResult

    known = isinstance(error, RecrayError)
    text = str(error) if known else f"unexpected {type(error).__name__}: {error}\n  fix: --traceback shows where"
    _reporter(arguments).error(text)
    status = "refused" if isinstance(error, RefusedError) else "failed"
    seconds = round(time.monotonic() - started, 2)
    tell(JobResult(arguments.job, status, seconds=seconds, reason=text.replace("\n  fix: ", "; fix: ")).to_json())
    return error.exit_code if isinstance(error, RecrayError) else 1


def _reporter(arguments: argparse.Namespace) -> Any:
    from recray.terminal import LogReporter, Reporter

    return LogReporter(arguments.job) if arguments.__dict__.get("log") == "json" else Reporter()


def _work(arguments: argparse.Namespace, tell: Callable[[str], None]) -> Any:
    from recray import benchmark, demo, pipeline

    with _reporter(arguments) as reporter:
        if arguments.job == "demo":
            return demo.run_demo(arguments.root, arguments.overrides, reporter, tell if arguments.keep_serving else None)
        if arguments.job == "benchmark":
            return benchmark.run(
                arguments.what,
                Path(arguments.out),
                reporter.say,
                data=arguments.data,
                against=arguments.against,
                overrides=arguments.overrides,
                overload=arguments.overload,
                state=arguments.state,
                drift=arguments.drift,
                follow=arguments.follow,
                users=arguments.users,
            )
        if arguments.job == "submit":
            return _submitted(arguments, reporter)
        settings = load_settings(arguments.config, arguments.overrides)
        if settings.changed:
            reporter.say(f"privacy.enabled changes {len(settings.changed)} settings: {', '.join(settings.changed)}")
        as_of = parse_as_of(arguments.as_of, settings.data.timezone)
        if arguments.job == "serve":
            return _serve(arguments, settings, as_of, reporter)
        if arguments.job == "doctor":
            from recray import doctor

            return doctor.run_doctor(settings, reporter)
        if arguments.job == "models":
            return pipeline.run_models(settings, reporter)
        if arguments.job == "privacy":
            return pipeline.run_privacy(settings, arguments.what, as_of, reporter, days=arguments.days, training=arguments.training)
        job: Callable[..., Any] = getattr(pipeline, f"run_{arguments.job}")
        options = {name: getattr(arguments, name) for name in ("bundle", "restart", "user", "follow", "out") if hasattr(arguments, name)}
        result = job(settings, as_of, reporter.say, **options)
        if "evaluation" in result.outputs:
            reporter.show_evaluation(result.outputs["evaluation"], settings)
        if result.status == "refused":
            reporter.error(result.reason.replace("; fix: ", "\n  fix: "))
        if arguments.job == "report" and not arguments.no_open:
            webbrowser.open(Path(result.outputs["report"]).as_uri())
        return result


def _serve(arguments: argparse.Namespace, settings: Settings, as_of: Any, reporter: Any) -> Any:
    from recray import demo, pipeline

    if arguments.name and arguments.what not in ("key", "canary"):
        raise SettingsError(f"recray serve {arguments.what} takes no name, {arguments.name!r} was given", "leave it out")
    if arguments.what == "key":
        return demo.run_key(arguments.name, arguments.scopes.split(","), reporter)
    if arguments.what == "status":
        return demo.run_status(settings, reporter)
    if arguments.what == "rollback":
        return pipeline.run_serve_rollback(settings, as_of, reporter.say)
    if arguments.what == "canary":
        if not arguments.name:
            raise SettingsError("recray serve canary: which bundle?", "recray serve canary BUNDLE; recray models lists them")
        if not 0 < arguments.share < 1:
            raise SettingsError(f"--share {arguments.share:g} lies outside 0 to 1", "0.05 is a twentieth of the users; recray promote gives it all")
        return pipeline.run_canary(settings, arguments.name, arguments.share, shadow=arguments.shadow, say=reporter.say)
    return demo.run_serve(settings, reporter)


def _submitted(arguments: argparse.Namespace, reporter: Any) -> Any:
    from recray import submission

    if (arguments.restart and arguments.submitted != "nightly") or (arguments.bundle and arguments.submitted != "promote"):
        raise SettingsError("--restart is for nightly and --bundle for promote", "leave it out")
    flags = [*(["--restart"] if arguments.restart else []), *([arguments.bundle] if arguments.bundle else [])]
    home = Path(arguments.working_dir)
    wanted = submission.wish(arguments.submitted, arguments.config, arguments.as_of, arguments.overrides, home, flags)
    return submission.run_submit(wanted, arguments.address, reporter, follow=not arguments.no_follow)


def _init(path: Path) -> int:
    if path.exists():
        raise SettingsError(f"{path} exists", "name another file: recray init other.yaml")
    path.write_text(render_yaml(Settings(), INIT_HEADING.format(path=path), FIRST_SETTINGS))
    print(f"wrote {path}; next: recray validate --config {path}", file=sys.stderr)
    return 0


def _print_settings(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments.config, arguments.overrides)
    sections = [arguments.section] if arguments.section else list(Settings.model_fields)
    shown = {section: list(type(getattr(settings, section)).model_fields) for section in sections}
    print(render_yaml(settings, "Override any on the command line: train.epochs=3", shown), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
