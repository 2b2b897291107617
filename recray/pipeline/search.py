"""The job `search`: trials of settings, and the best of them as a settings file and as a challenger."""

from __future__ import annotations

import importlib.util
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recray import cluster
from recray.config import Settings, render_yaml, with_values
from recray.config.sections import Range
from recray.dataset.reader import Dataset
from recray.errors import DataError, RefusedError, SettingsError
from recray.evaluation.protocol import EvaluationQueries
from recray.pipeline import discard, hold_workspace
from recray.prepare import prepare as preparation
from recray.search.space import Domain, own_values, read_space, to_json
from recray.search.trial import METRIC, Search, Trial, read_curve
from recray.search.trials import find_winner, run_trials
from recray.stages import AsOf, JobContext, JobResult, ProgressLog, run_stage, to_date
from recray.storage import key_of, write_json
from recray.training.plan import bundle_settings
from recray.training.trainer import check_dataset

if TYPE_CHECKING:
    from recray.tracking.outbox import Entry

FEWEST_USERS = 30
HEADING = """recray nightly --config {path}
Chosen by recray search in {trials} trials: validation NDCG {best:.4f}, {own} with the settings before.
All other settings keep their defaults, which recray settings prints."""


def search(
    settings: Settings, as_of: AsOf, progress: ProgressLog = discard, *, out: str | None = None
) -> JobResult:
    """Try settings of model and training on the validation users for `search.minutes`, or `search.trials`.

    The best ones become a settings file (`out`; None: in the folder of the search) and a bundle, which
    `recray promote` checks. A repeated search continues. No test event is read.
    """
    started = time.monotonic()
    if settings.privacy.enabled:
        raise RefusedError(
            "every trial would spend privacy budget", "search on public data, with privacy.enabled=false"
        )
    if importlib.util.find_spec("optuna") is None:
        raise SettingsError("recray search needs optuna", 'pip install "recray[search]"')
    path = None if out is None else Path(out)
    if path is not None and path.exists():
        raise SettingsError(f"{path} exists", "name another file: --out other.yaml")
    if path is not None and not path.absolute().parent.is_dir():
        raise SettingsError(f"{path}: its folder does not exist", "make the folder, or name another file")
    with hold_workspace("search", settings, progress) as context:
        progress("── prepare", stage="prepare")
        prepared = run_stage("prepare", context, as_of, preparation.find_input(settings))
        dataset = Dataset.open(prepared.outputs["dataset"], verify=True)
        require_enough(dataset)
        space = read_space(settings, dataset)
        key = key_of(
            "search", bundle_settings(settings), dataset.digest, to_json(space), settings.search.seed
        )
        folder = context.storage.search(key)
        job = Search(folder, dataset.path, settings, space)

        progress("── search", stage="search")
        for name, domain in space.items():
            progress(f"{name}: {_describe_domain(domain)}")
        cluster.start()
        trials = run_trials(job, progress)
        winner = find_winner(trials)
        best = with_values(settings, winner.values)
        document = _write_results(job, trials, winner)
        path = path or folder / "best.yaml"
        _write_config(path, job, trials, winner)
        _report(context, dataset, key, job, trials, winner, document)

        progress("── train", stage="train")
        challenger = JobContext(best, context.storage, progress, context.warnings)
        _hand_over(job, challenger, dataset, winner)
        trained = run_stage("train", challenger, dataset)
    return JobResult(
        job="search",
        status="ok",
        run_key=key,
        outputs={"search": str(folder), "config": str(path), **trained.outputs},
        metrics={
            "trials": len(trials),
            "failed_trials": sum(not trial.epochs for trial in trials),
            METRIC: winner.ndcg,
            "trial_seconds": round(sum(trial.seconds for trial in trials), 1),
        },
        seconds=round(time.monotonic() - started, 2),
        warnings=context.warnings,
    )


def require_enough(dataset: Dataset) -> None:
    """Raises DataError if there is nothing to train, or too few validation users to compare settings."""
    check_dataset(dataset)
    users = len(EvaluationQueries(dataset, "validation"))
    if users < FEWEST_USERS:
        raise DataError(
            f"{users} validation users are too few to choose settings: {FEWEST_USERS} are the fewest, and "
            "some 1,000 tell settings apart that differ by a tenth",
            "raise split.validation_users, or search when the log has more users",
        )


def _describe_domain(domain: Domain) -> str:
    if isinstance(domain, Range):
        return f"{domain.min:g} to {domain.max:g}" + (", by its logarithm" if domain.log else "")
    return ", ".join(map(str, domain))


def _write_results(job: Search, trials: Sequence[Trial], winner: Trial) -> dict[str, Any]:
    """Write the table of all trials and its plots; returns the table."""
    rows = sorted(trials, key=lambda trial: (-trial.ndcg if trial.epochs else 0.0, trial.key))
    document: dict[str, Any] = {
        "space": to_json(job.space),
        "winner": winner.key,
        "trials": [
            {
                "key": trial.key,
                "values": trial.values,
                METRIC: trial.ndcg if trial.epochs else None,
                "epochs": trial.epochs,
                "seconds": trial.seconds,
                "reason": trial.reason,
            }
            for trial in rows
        ],
        "importance": _plot(job, trials),
    }
    write_json(job.folder / "search.json", document)
    return document


def _plot(job: Search, trials: Sequence[Trial]) -> dict[str, float]:
    """Plot importance and parallel coordinates of the trials; returns the importance of each setting (share
    of the variance of validation NDCG, by functional ANOVA: Hutter et al., ICML 2014).
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    distributions = {name: _to_distribution(domain) for name, domain in job.space.items()}
    for trial in trials:
        if trial.epochs and trial.values.keys() == distributions.keys():
            study.add_trial(
                optuna.trial.create_trial(params=trial.values, distributions=distributions, value=trial.ndcg)
            )
    if len(study.trials) < 4 or len({trial.value for trial in study.trials}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=job.settings.search.seed)
    importance = optuna.importance.get_param_importances(study, evaluator=evaluator)
    with warnings.catch_warnings(action="ignore"):
        figures = {
            "importance": optuna.visualization.matplotlib.plot_param_importances(study, evaluator=evaluator),
            "parallel": optuna.visualization.matplotlib.plot_parallel_coordinate(study),
        }
    for name, axes in figures.items():
        figure: Any = axes.figure
        figure.set_size_inches(12, 6)
        figure.tight_layout()
        figure.savefig(job.folder / f"{name}.png", dpi=120)
        figure.clear()
    return {name: round(value, 4) for name, value in importance.items()}


def _to_distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if isinstance(domain, Range):
        return FloatDistribution(domain.min, domain.max, log=domain.log)
    return CategoricalDistribution(tuple(domain))


def _write_config(path: Path, job: Search, trials: Sequence[Trial], winner: Trial) -> None:
    """Write the settings that differ from the defaults, with the winner's."""
    own = own_values(job.settings, job.space)
    before = [trial.ndcg for trial in trials if trial.values == own and trial.epochs]
    heading = HEADING.format(
        path=path, trials=len(trials), best=winner.ndcg, own=f"{before[0]:.4f}" if before else "untried"
    )
    best, defaults = with_values(job.settings, winner.values), Settings()
    shown: dict[str, list[str]] = {}
    for section in Settings.model_fields:
        values, default = getattr(best, section), getattr(defaults, section)
        names = [
            name for name in type(values).model_fields if getattr(values, name) != getattr(default, name)
        ]
        if names and section != "search":
            shown[section] = names
    path.write_text(render_yaml(best, heading, shown))


def _report(
    context: JobContext,
    dataset: Dataset,
    key: str,
    job: Search,
    trials: Sequence[Trial],
    winner: Trial,
    document: Mapping[str, Any],
) -> None:
    """Queue the search for MLflow: one run, and a child run for each trial."""
    name = f"search {to_date(dataset.as_of_s)}"
    report_key = key_of(key, document)
    entry: Entry = {
        "run_key": key,
        "run_name": name,
        "order": [dataset.as_of_s, 6],
        "settings": bundle_settings(job.settings),
        "metrics": {"values": {METRIC: winner.ndcg, "trials": len(trials)}, "step": len(trials)},
        "documents": {"search.json": document},
        "folders": {},
        "finished": True,
    }
    context.outbox.put(report_key, entry)
    for number, trial in enumerate(trials, 1):
        sections: dict[str, dict[str, Any]] = {}
        for setting, value in trial.values.items():
            section, _, field = setting.partition(".")
            sections.setdefault(section, {})[field] = value
        child: Entry = {
            "run_key": f"{key} {trial.key}",
            "run_name": f"trial {number}",
            "order": [dataset.as_of_s, 7],
            "parent": {"run_key": key, "run_name": name},
            "settings": sections,
            "curve": read_curve(job.folder / "trials" / trial.key),
            "tags": {"recray.reason": trial.reason} if trial.reason else {},
            "finished": True,
        }
        context.outbox.put(key_of(report_key, trial.key), child)
    context.deliver()


def _hand_over(job: Search, context: JobContext, dataset: Dataset, winner: Trial) -> None:
    """Let the training of the winner continue at its trial's checkpoint."""
    run = context.storage.training_runs / context.training_plan(dataset).key
    target = run / "search"
    if not run.exists():
        run.mkdir(parents=True)
        shutil.copytree(job.trial_folder(winner.values) / "run", target)
