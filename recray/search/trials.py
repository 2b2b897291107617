"""Trials of a search on Ray Tune."""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import warnings
from collections.abc import Sequence
from typing import Any

from recray.cluster import keep_signal_handlers, require_resources, unwrap_errors
from recray.config.sections import Range
from recray.errors import TrainingError
from recray.search.space import Domain, count_choices, nearest, own_values
from recray.search.trial import METRIC, Search, Trial, describe_values, read_curve, run_trial
from recray.stages import ProgressLog

FEW_CHOICES = 64  # a space of so many trials is tried in full
REDUCTION = 3  # ASHA keeps one trial of so many


def run_trials(search: Search, progress: ProgressLog) -> list[Trial]:
    """Run trials until time or number of `settings.search` is reached; continues an earlier attempt.

    Raises TrainingError if every trial failed.
    """
    from ray import tune

    from recray.search.watch import Watch

    options = search.settings.search
    earlier = search.trials()
    watch = Watch(search, progress)
    left_s = 60 * options.minutes - watch.elapsed_s
    left_trials = math.inf if options.trials is None else options.trials
    first = _first_points(search, [trial.values for trial in earlier])
    if (choices := count_choices(search.space)) <= len(first):
        left_trials = min(left_trials, choices)
    finished = len(earlier) >= left_trials and not any(_is_open(search, trial) for trial in earlier)
    if left_s > 0 and not finished:
        gpus = 1 if search.settings.train.use_gpu else 0
        require_resources(options.cpus_per_trial, gpus, "search", search.settings.train.timeout_s)
        os.environ.update(
            TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
            TUNE_DISABLE_SIGINT_HANDLER="1",
            TUNE_MAX_PENDING_TRIALS_PG="2",
            RAY_CHDIR_TO_TRIAL_DIR="0",
            RAY_AIR_NEW_OUTPUT="0",
        )
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, search=search, threads=max(1, int(options.cpus_per_trial))),
            {"cpu": options.cpus_per_trial, "gpu": gpus},
        )
        scratch = search.folder / "tune"
        shutil.rmtree(scratch, ignore_errors=True)
        tuner = tune.Tuner(
            trainable,
            param_space={name: _to_tune(domain) for name, domain in search.space.items()},
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=_sampler(search, first, len(earlier)),
                scheduler=_scheduler(search),
                num_samples=-1 if math.isinf(left_trials) else int(left_trials),
                time_budget_s=left_s,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(search.folder),
                callbacks=[watch],
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=1),
            ),
        )
        try:
            with unwrap_errors(), keep_signal_handlers():
                tuner.fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    trials = search.trials()
    if not any(trial.epochs for trial in trials):
        failed = [trial for trial in trials if trial.reason]
        if not failed:
            raise TrainingError(
                f"no trial trained an epoch within {options.minutes:g} minutes",
                "give the search more minutes",
            )
        example = f"the first ({describe_values(failed[0].values)}): {failed[0].reason}"
        raise TrainingError(
            f"all {len(trials)} trials failed; {example}",
            "fix the cause, or leave such values out of search.space, and repeat the job",
        )
    return trials


def _is_open(search: Search, trial: Trial) -> bool:
    """Whether a trial neither failed nor reached its last epoch."""
    settings = search.settings.train
    curve = read_curve(search.folder / "trials" / trial.key)
    best = max(range(len(curve)), key=lambda n: curve[n][METRIC], default=-1) + 1
    is_over = len(curve) >= settings.epochs or len(curve) - best >= settings.patience
    return not trial.reason and not is_over


def _to_tune(domain: Domain) -> Any:
    from ray import tune

    if isinstance(domain, Range):
        draw = tune.loguniform if domain.log else tune.uniform
        return draw(domain.min, domain.max)
    return tune.choice(list(domain))


def _first_points(search: Search, earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials to begin with: the earlier ones, or the settings' own values; and all others of a small
    space.
    """
    own = own_values(search.settings, search.space)
    first = list(earlier) or [{name: nearest(search.space[name], value) for name, value in own.items()}]
    if count_choices(search.space) > FEW_CHOICES:
        return first
    names = list(search.space)
    values_of_all = itertools.product(*(list(search.space[name]) for name in names))
    points = (dict(zip(names, values, strict=True)) for values in values_of_all)
    rest = [point for point in points if point not in first]
    random.Random(search.settings.search.seed).shuffle(rest)
    return [*first, *rest]


def _sampler(search: Search, first: list[dict[str, Any]], earlier: int) -> Any:
    """Optuna's TPE, which begins with some points. `earlier` trials were drawn before: it draws others."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    return OptunaSearch(
        metric=METRIC,
        mode="max",
        points_to_evaluate=first,
        sampler=optuna.samplers.TPESampler(
            seed=1000 * earlier + search.settings.search.seed, multivariate=True
        ),
    )


def _scheduler(search: Search) -> Any:
    from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule

    options, epochs = search.settings.search, search.settings.train.epochs
    grace = min(options.grace_epochs, epochs)
    if options.scheduler == "median":
        return MedianStoppingRule(time_attr="epochs", grace_period=grace, min_samples_required=2)
    return ASHAScheduler(
        time_attr="epochs", max_t=max(epochs, grace), grace_period=grace, reduction_factor=REDUCTION
    )


def find_winner(trials: Sequence[Trial]) -> Trial:
    """The trial with the best validation NDCG; of equal ones the first."""
    return max((trial for trial in trials if trial.epochs), key=lambda trial: trial.ndcg)
