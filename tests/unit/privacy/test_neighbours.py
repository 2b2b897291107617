"""What is published of two logs that differ by one protected user is equal to the byte, but for sums under
noise and digests of the data.

A nightly run is made of each log, stage by stage, with the noise and the sums under it replaced by a
constant.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import recray.snapshot.score as scoring
import recray.training.trainer as trainer
from recray import cluster
from recray.config import load_settings
from recray.dataset.reader import Dataset, is_holdout
from recray.privacy.noise import GridNoise
from recray.stages import JobContext, run_stage
from recray.stages import promote as promote_stage
from recray.stages import train as train_stage
from recray.storage import Storage
from recray.testing.published import prepare_here
from recray.testing.synthetic import SyntheticShop
from recray.tracking.outbox import Outbox
from recray.training.plan import training_settings
from recray.training.worker import build_loop, save_checkpoint

pytestmark = pytest.mark.second

PUBLISHED = ("bundles", "evaluations", "promotions", "reports", "tracked")
# one key of 1,800 has no letter: then it is told from a number by what stands around it
DIGEST = re.compile(rb"""\b(?=[0-9]*[a-f])[0-9a-f]{16,64}\b|(?<=["/=-])[0-9]{16}(?=["/.])""")
SMALL = (
    *(
        "privacy.enabled=true",
        "privacy.cap=8",
        "privacy.trainings=1",
        "privacy.steps=1",
        "privacy.report_every=1",
        "privacy.delta=1e-5",
    ),
    *(
        "split.holdout_users=0.3",
        "evaluate.bootstrap=100",
        "evaluate.max_users=40",
        "model.dim=8",
        "model.history=20",
        "score.k=10",
        "train.threads=1",
    ),
    *(
        "data.shards=2",
        "promotion.consistency_users=5",
        "train.validation_users=40",
        "promotion.must_beat=[]",
    ),
)


def of_types(folder: Path) -> tuple[pa.Table, Path, list[str]]:
    """A log whose types of events are nearly as frequent as each other, one of them that of one user alone;
    and items that nobody met.
    """
    SyntheticShop(users=120, items=60, events_per_user=12, seed=5).write(folder)
    events = pq.read_table(folder / "events")
    random = np.random.default_rng(0)
    kind = np.where(random.random(len(events)) < 0.5, "buy", "view").astype(object)
    user = events["user_id"].to_numpy()
    lonely = next(
        one
        for one in np.unique(user)
        if not is_holdout(pa.array([one]), {"seed": 0, "holdout_users": 0.3})[0]
    )
    kind[user == lonely] = "wish"
    table = events.set_column(3, "event", pa.array(kind.tolist(), pa.string()))
    named = table["item_id"].to_pylist()
    named[int(np.flatnonzero(user == lonely)[0])] = "that nobody else met"
    return (
        table.set_column(1, "item_id", pa.array(named)),
        folder / "items.parquet",
        ["data.features={category: categorical, price: numeric}"],
    )


def of_a_shop(folder: Path) -> tuple[pa.Table, Path, list[str]]:
    """An eighth of the users of Online Retail."""
    import recray.dataset.reader as reader

    shop = Path(reader.__file__).with_name("online_retail")
    events = pq.read_table(shop / "events.parquet")
    return events.filter(pc.equal(pc.bit_wise_and(events["user_id"], 7), 3)), shop / "items.parquet", []


def of_last_items(folder: Path) -> tuple[pa.Table, Path, list[str]]:
    """The log with types of events, of whose users the last item is asked."""
    events, items, overrides = of_types(folder)
    return events, items, [*overrides, "split.kind=leave_one_out", "privacy.counts_share=0"]


LOGS = {"types of events": of_types, "Online Retail": of_a_shop, "last items, no counts": of_last_items}
MOST = {"last items, no counts": 20}  # users, of a log that is another one's but for its split


class Published:
    """A nightly run of a log in a root of its own."""

    def __init__(self, folder: Path, events: pa.Table, items: Path, overrides: list[str]) -> None:
        folder.mkdir()
        pq.write_table(events, folder / "events.parquet")
        where = [
            f"data.events=[{folder / 'events.parquet'}]",
            f"data.items={items}",
            f"storage.root={folder / 'root'}",
        ]
        self.settings, self.storage = (
            load_settings(None, [*where, *SMALL, *overrides]),
            Storage(folder / "root"),
        )
        self.dataset = prepare_here(self.settings)
        context = JobContext(self.settings, self.storage, lambda *_, **__: None)
        with ExitStack() as patched:
            for target, name, instead in (
                (
                    GridNoise,
                    "from_grid",
                    lambda _, whole: torch.full(whole.shape, 0.01, dtype=torch.float32),
                ),  # sum and noise
                (trainer, "_fit", in_this_process),
                (scoring, "score_on_ray_data", bucket_by_bucket),
                (cluster, "start", lambda *_: None),
                (train_stage, "LiveCurve", lambda *_: lambda line: None),
                (promote_stage, "find_registry_conflict", lambda *_, **__: None),
                (Outbox, "deliver", lambda _: None),
            ):
                patched.enter_context(mock.patch.object(target, name, instead))
            patched.enter_context(mock.patch.dict("os.environ", TZ="UTC"))
            for stage in ("train", "evaluate", "promote", "score", "report"):
                run_stage(stage, context, self.dataset)

    def files(self) -> dict[str, bytes]:
        """What is published, by its name, with every key and digest in the same words."""
        root = self.storage.root
        content_of = {}
        for path in sorted(path for name in PUBLISHED for path in (root / name).rglob("*") if path.is_file()):
            content = path.read_bytes().replace(str(root.parent).encode(), b"FOLDER")
            content = re.sub(rb'"at_ms": \d+', b'"at_ms": 0', content)  # the clock is not of the data
            named = (
                f"told {json.loads(content)['order'][1]}"
                if path.parent.name == "tracked"
                else str(path.relative_to(root))
            )
            named = DIGEST.sub(b"KEY", named.encode()).decode()
            assert named not in content_of
            content_of[named] = (
                content
                if path.suffix in (".npy", ".parquet", ".safetensors")
                else DIGEST.sub(b"KEY", content)
            )
        return content_of

    def lists(self) -> dict[object, list[object]]:
        parts = [
            pq.read_table(path) for path in sorted((self.storage.root / "scores").rglob("part-*.parquet"))
        ]
        rows = pa.concat_tables(parts).to_pylist()
        return {row.pop("user_id"): row for row in rows}


def excerpts(one: bytes, other: bytes) -> tuple[bytes, bytes]:
    """Where two files begin to differ."""
    first = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
    return one[max(first - 60, 0) : first + 60], other[max(first - 60, 0) : first + 60]


def in_this_process(settings, run, dataset, progress, parent, private, neighbours):
    train_settings = training_settings(settings)
    loop = build_loop(
        str(dataset.path),
        train_settings,
        torch.device("cpu"),
        parent and str(parent.path),
        private["mechanism"],
        neighbours,
    )
    for _ in loop.run():
        pass
    (run / "checkpoint").mkdir()
    save_checkpoint(loop, run / "checkpoint")
    return run / "checkpoint"


def bucket_by_bucket(settings, arguments, buckets):
    scorer = scoring.BucketScorer(**arguments, threads=1)
    return [scorer({"item": bucket}) for bucket in range(buckets)]


def learned(dataset: Dataset) -> dict[object, tuple[object, ...]]:
    """What of each user may be learned: items, types and times, and the split."""
    publications = {}
    for shard in dataset.shards():
        for row, user in enumerate(shard.user_ids.to_pylist()):
            history = shard.history(row)
            publications[user] = (*(values.tolist() for values in history), shard.split[row].tolist())
    return publications


@pytest.fixture(scope="module", params=LOGS)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("neighbours")
    (folder / "world").mkdir()
    events, items, overrides = LOGS[request.param](folder / "world")
    return (
        events,
        items,
        overrides,
        Published(folder / "all", events, items, overrides),
        MOST.get(request.param, 100),
    )


def remarkable(events: pa.Table, dataset: Dataset, count: int) -> list[object]:
    """Protected users: the one of the newest event, the one of most events, who has an item alone, then
    any."""
    split = dataset.manifest["settings"]["split"]
    protected = events.filter(pa.array(~is_holdout(events["user_id"].combine_chunks(), split)))
    newest = protected.sort_by([("timestamp", "descending")])["user_id"][0].as_py()
    most = protected["user_id"].combine_chunks().value_counts().to_pylist()
    owners = events.group_by("item_id").aggregate([("user_id", "count_distinct"), ("user_id", "min")])
    alone = owners.filter(pc.equal(owners["user_id_count_distinct"], 1))["user_id_min"].to_pylist()
    everybody = protected["user_id"].unique().to_pylist()
    random = np.random.default_rng(1).permutation(len(everybody))
    busiest = max(most, key=lambda one: one["counts"])["values"]
    users = [
        newest,
        busiest,
        *[one for one in alone if one in set(everybody)][:1],
        *(everybody[row] for row in random),
    ]
    return list(dict.fromkeys(users))[:count]


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_what_is_published_is_equal_without_any_one_protected_user(base, tmp_path, count):
    events, items, overrides, with_all, most = base
    whole, lists, rows = with_all.files(), with_all.lists(), learned(with_all.dataset)
    assert len(whole) > 10 and any("model.safetensors" in name for name in whole)
    for user in remarkable(events, with_all.dataset, min(count, most)):
        without = Published(
            tmp_path / f"without {user}",
            events.filter(pc.not_equal(events["user_id"], user)),
            items,
            overrides,
        )
        files = without.files()
        assert sorted(files) == sorted(whole)
        assert {one: excerpts(files[one], whole[one]) for one in whole if files[one] != whole[one]} == {}, (
            user
        )
        assert without.lists() == {other: row for other, row in lists.items() if other != user}
        assert learned(without.dataset) == {other: row for other, row in rows.items() if other != user}
        shutil.rmtree(tmp_path / f"without {user}")


def test_the_comparison_notices_what_a_user_changes(base, tmp_path):
    """The control: a user of whom nothing is learned is not protected, and shows."""
    events, items, overrides, with_all, _ = base
    users = events["user_id"].combine_chunks()
    held = users.filter(pa.array(is_holdout(users, with_all.dataset.manifest["settings"]["split"])))
    without_user = Published(
        tmp_path / "gone",
        events.filter(pc.invert(pc.is_in(events["user_id"], held.unique().slice(0, 30)))),
        items,
        overrides,
    )
    files, whole = without_user.files(), with_all.files()
    assert [one for one in whole if files.get(one) != whole[one]]
