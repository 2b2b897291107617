"""The commands of `recray` and their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from recray.config import Settings
from recray.version import __version__

JOBS = {
    "validate": "check settings, columns and types; writes nothing",
    "collect": "copy new entries of the event store to Parquet, for the next nightly run",
    "prepare": "prepare a dataset from the events",
    "train": "train a model bundle on the dataset",
    "evaluate": "evaluate the bundle and the baselines on the test users",
    "promote": "check a bundle against the promotion criteria; it becomes the champion if it meets them",
    "tune": "learn an attention policy for the champion from holdout users, by RLlib",
    "adapt": "learn the next attention policy from the outcomes of responses that explored",
    "score": "write and publish batch recommendations for every user by the champion",
    "nightly": "collect, prepare, train, evaluate, promote, tune, score, report; continues where it stopped",
    "report": "write a page about the nightly run, with plots, and open it in a browser",
    "search": "try settings of model and training on the validation users; the best become a file and "
    "a challenger",
    "rollback": "make the previous champion the champion again, and publish its batch recommendations",
    "export": "copy all data of a user to a file: event store, collected events, history, lists",
    "forget": "erase a user from event store, collected events, datasets and lists; nothing more of them is "
    "stored",
    "serve": "serve requests from the published run until interrupted",
}
SUBMITTED = (
    *("collect", "prepare", "train", "evaluate", "promote", "tune", "adapt", "score", "nightly"),
    "search",
    *("rollback", "audit"),
)
BENCHMARKS = {
    "prepare": "peak memory; with --against, events a second",
    "adopt": "from files in the layouts of other tools to the first served recommendation, by three commands",
    "submit": "a submitted nightly run compared with a local one",
    "quality": "HR and NDCG of three seeds (an hour; a baseline library trains to its own early stop, some "
    "hours, and continues where it stopped)",
    "ablations": "the contribution of each part of the model, one training each, on the data that ships "
    "(half an hour) or another data set",
    "evidence": "what calibration and item-to-item evidence add, three trainings, on the data that ships or "
    "another data set",
    "features": "the contribution of each column, and cold items",
    "slate": "AUC within impressions (MIND)",
    "train": "seconds an epoch",
    "score": "users a second",
    "catalogue": "memory and time with a million items",
    "scale": "time by number of events and users",
    "privacy": "a private step compared with a plain one; with --data, quality by ε (hours; continues where "
    "it stopped)",
    "serve": "the endpoint compared with plain uvicorn and with Serve's defaults",
    "explain": "whether the events that an explanation names carried the score",
    "policy": "a learned attention policy on synthetic users whose best actions are known; with --data, on "
    "real histories",
    "rounds": "how often a policy without a gain passes the promotion criteria, in one round and in any of "
    "200",
    "experiments": "how many experiments of equal variants end, and how soon worse ones do",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="recray", description="An attention recommender on Ray: nightly runs and an endpoint."
    )
    parser.add_argument("--version", action="version", version=f"recray {__version__}")
    commands = parser.add_subparsers(dest="job", required=True, metavar="COMMAND")
    _add_init(commands)
    _add_settings(commands)
    for job, text in JOBS.items():
        command = commands.add_parser(job, help=text, description=text)
        if job in _OPTIONS:
            _OPTIONS[job](command)
        _add_common_settings(command)
    _add_submit(commands)
    models = commands.add_parser("models", help="bundles, their roles and their versions in MLflow")
    _add_common_settings(models)
    _add_privacy(commands)
    doctor = commands.add_parser(
        "doctor", help="look at machine, versions, Ray, MLflow and storage; say what to fix"
    )
    _add_common_settings(doctor)
    _add_demo(commands)
    _add_benchmark(commands)
    return parser


def _add_init(commands: Any) -> None:
    text = "write a file with the settings to decide first, or, from a log, with a guess for each"
    init = commands.add_parser("init", help=text, description=text)
    init.add_argument(
        "path", nargs="?", default="recray.yaml", help="the file to write (default: recray.yaml)"
    )
    init.add_argument(
        "--from-data",
        nargs="+",
        default=[],
        metavar=("EVENTS", "ITEMS"),
        help="guess from a log and, if there is one, an item table: Parquet, CSV or JSON lines, a file or a "
        "folder; section.field=value decides what is not to be guessed",
    )
    init.add_argument(
        "--template", choices=["shop", "news", "video"], help="settings of the model for such a product"
    )


def _add_settings(commands: Any) -> None:
    command = commands.add_parser(
        "settings", help="print every setting with its value and description, as YAML"
    )
    sections = list(Settings.model_fields)
    command.add_argument("section", nargs="?", choices=sections, metavar="SECTION", help=", ".join(sections))
    command.add_argument("--config", help="YAML settings whose values are printed (default: the defaults)")
    command.set_defaults(overrides=[])


def _add_promote(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "bundle",
        nargs="?",
        help="run key of the bundle (recray models lists them; default: the current one), or BUNDLE+POLICY",
    )


def _add_adapt(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--follow",
        action="store_true",
        help="learn a round whenever policy.round_decisions more are mature, until interrupted",
    )


def _add_user(command: argparse.ArgumentParser) -> None:
    command.add_argument("user", help="id of the user, as in the event log")


def _add_export(command: argparse.ArgumentParser) -> None:
    _add_user(command)
    command.add_argument(
        "--out", help="a new file, readable by its owner only (default: recray-export-TIME.jsonl here)"
    )


def _add_nightly(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--restart",
        action="store_true",
        help="start a run again that started with other settings and did not end",
    )


def _add_search(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--minutes", type=float, help="end after so many minutes (default: search.minutes, 30)"
    )
    command.add_argument("--trials", type=int, help="end after so many trials (default: by time)")
    command.add_argument("--out", help="the settings file to write (default: in the folder of the search)")


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-open", action="store_true", help="do not open a browser; print the path")


def _add_serve(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "subcommand",
        nargs="?",
        choices=["run", "status", "canary", "rollback", "key"],
        default="run",
        help="run: until interrupted (default); status: what is served; canary BUNDLE: begin an experiment "
        "with a share of the users; rollback: end the experiment, or as recray rollback; key NAME: draw an "
        "API key",
    )
    command.add_argument(
        "name", nargs="?", help="canary: run key of the bundle, or BUNDLE+POLICY; key: name of its owner"
    )
    command.add_argument(
        "--share", type=float, default=0.05, help="canary: share of the users (default: 0.05)"
    )
    command.add_argument(
        "--shadow", action="store_true", help="canary: shadow traffic; no user sees its responses"
    )
    command.add_argument(
        "--scopes",
        default="read,write",
        help="key: scopes, of read, history, write, items and admin (default: read,write)",
    )


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "promote": _add_promote,
    "adapt": _add_adapt,
    "forget": _add_user,
    "export": _add_export,
    "nightly": _add_nightly,
    "report": _add_report,
    "search": _add_search,
    "serve": _add_serve,
}
"""Job -> function that adds its own arguments."""


def _add_submit(commands: Any) -> None:
    text = "run a job on a Ray cluster by Ray's job API, follow its log, and exit with its code"
    submit = commands.add_parser("submit", help=text, description=text)
    submit.add_argument("submitted", choices=SUBMITTED, metavar="JOB", help=", ".join(SUBMITTED))
    submit.add_argument(
        "--address",
        help="the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)",
    )
    submit.add_argument(
        "--working-dir", default=".", help="folder to send: recray's code, jobs/ and configs (default: .)"
    )
    submit.add_argument("--bundle", metavar="KEY", help="promote: the bundle")
    submit.add_argument(
        "--restart", action="store_true", help="nightly: start a run again that started with other settings"
    )
    submit.add_argument("--no-follow", action="store_true", help="do not wait for the end of the job")
    _add_common_settings(submit)


def _add_privacy(commands: Any) -> None:
    text = "the privacy budget: what trainings have spent, and what can be planned"
    privacy = commands.add_parser("privacy", help=text, description=text)
    privacy.add_argument(
        "subcommand",
        choices=["status", "plan", "close", "audit"],
        help="status: the ledger; plan: noise, interval and shards of users for a cap; close: end a training "
        "that will not continue, which frees the steps that it reserved and did not take; audit: how much of "
        "its ε a training reveals (several trainings)",
    )
    privacy.add_argument("--training", metavar="KEY", help="close: key of the training; status lists it")
    privacy.add_argument(
        "--days", type=int, default=30, help="plan: days that the cap must last (default: 30)"
    )
    _add_common_settings(privacy)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="a nightly run on the data that ships, then three live requests")
    demo.add_argument("--root", help="folder to write to (default: .demo/<time> here)")
    demo.add_argument(
        "--keep-serving", action="store_true", help="keep the endpoint running until interrupted"
    )
    _add_common(demo)


def _add_benchmark(commands: Any) -> None:
    text = "measure recray on this machine; with --against, beside a baseline library"
    benchmark = commands.add_parser("benchmark", help=text, description=text)
    benchmark.add_argument(
        "benchmark",
        choices=list(BENCHMARKS),
        help="; ".join(f"{name}: {description}" for name, description in BENCHMARKS.items()),
    )
    benchmark.add_argument(
        "--data",
        help="folder of a data set, or its name under $RECRAY_DATA, for benchmarks that use one; privacy: "
        "also synthetic, or cuts (12 trainings of one ε)",
    )
    benchmark.add_argument(
        "--against",
        help="quality, train, score: the baseline library to run on the same data, implicit or rectools; "
        "quality: baselines, or with a comma also rectools-sasrec, rectools-hstu, rectools-fast; "
        "prepare, privacy, score, serve, train: folder of another checkout of recray, run in turns with this "
        "one",
    )
    flags = {
        "--overload": "serve: three times as many requests as it can serve",
        "--state": "serve: a user with 1,000 recent events, and while Redis hangs",
        "--items": "serve: how soon all replicas serve a change of an item",
        "--drift": "policy: users whose optima reverse under a running endpoint (half an hour)",
        "--follow": "policy --drift: with recray adapt --follow, in real time (half an hour)",
    }
    for flag, help_text in flags.items():
        benchmark.add_argument(flag, action="store_true", help=help_text)
    benchmark.add_argument(
        "--users", type=int, help="serve: number of users in the snapshot (10000000: some minutes, 5 GB)"
    )
    benchmark.add_argument(
        "--out", default="infra/benchmarks", help="folder of the result file (default: infra/benchmarks)"
    )
    _add_common(benchmark)


def _add_common_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", help="YAML settings (default: the defaults, on the data that ships)")
    command.add_argument(
        "--as-of", help="read nothing after this moment, UTC; a date means its end (default: read everything)"
    )
    _add_common(command)


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings to override")
    command.add_argument(
        "--log", choices=["text", "json"], default="text", help="format of standard error (jobs.*: json)"
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print the result as JSON on a terminal too; elsewhere it always is",
    )
    command.add_argument("--traceback", action="store_true", help="show the traceback of an unexpected error")
