"""What recray 0.1.0 wrote is still opened and answers as it did then. `tests/fixtures/0.1.0` is of the
synthetic generator.
"""

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from recray.bundle import Bundle
from recray.config import load_settings
from recray.config.formats import to_current_settings
from recray.dataset.reader import Dataset
from recray.errors import SettingsError
from recray.evaluation.evaluate import read_ndcg, read_table
from recray.events.store import open_log
from recray.inference.policy import Policy
from recray.release import Release
from recray.serving.api import EventsRequest, RecommendRequest
from recray.serving.service import Service
from recray.snapshot.reader import Snapshot
from recray.storage import Storage
from recray.testing.published import prepare_here
from recray.testing.synthetic import SyntheticShop

WRITTEN = Path(__file__).parents[2] / "fixtures" / "0.1.0"


@pytest.fixture
def workspace(tmp_path):
    shutil.copytree(WRITTEN / "workspace", tmp_path / "root")
    return Storage(tmp_path / "root")


@pytest.fixture
def settings(workspace):
    return renamed_settings(workspace, "policy.exploration_scale=0", "policy.exploration_share=0")


def renamed_settings(workspace, *overrides):
    """The settings of then with the names of today, as a person would correct the file."""
    content = to_current_settings(yaml.safe_load((WRITTEN / "settings.yaml").read_text()))
    file = workspace.root.parent / "renamed.yaml"
    file.write_text(yaml.safe_dump(content))
    return load_settings(file, [f"storage.root={workspace.root}", *overrides])


def test_every_artifact_opens_whole(workspace):
    assert Dataset.open(workspace.dataset("a6e697f6d31ca8c2"), verify=True).n_users == 40
    snapshot = Snapshot.latest(workspace)
    assert snapshot.find(3) is not None
    assert snapshot.manifest["filter_seen"] is False and "new_only" not in snapshot.manifest
    bundle = Bundle.open(workspace.bundle("fixture"))
    assert bundle.settings["model"]["popularity_prior_days"] == bundle.manifest["popularity_prior_days"] == 7
    assert Dataset.open(workspace.dataset("a6e697f6d31ca8c2")).query_time == "cutoff"
    champion = Release.read(workspace).champion
    assert champion.policy == "fixture"
    assert Policy.load(
        workspace.policy("fixture"), Bundle.open(workspace.bundle("fixture")).digest
    ).actions == ("temperature",)


def test_answers_are_those_of_then(workspace, settings):
    handler = Service(workspace, settings.serve, settings.score, policy=settings.policy)
    recorded = json.loads((WRITTEN / "responses.json").read_text())
    assert len(recorded) > 10 and {one["source"] for one in recorded} == {"snapshot", "realtime", "popular"}
    for one in recorded:
        request = {
            ("filter_seen" if name == "new_only" else name): value for name, value in one["request"].items()
        }
        answer = asyncio.run(handler.recommend(RecommendRequest(**request)))
        assert (answer.source, answer.bundle, answer.policy) == (
            one["source"],
            one["bundle"],
            one["policy"],
        ), one["request"]
        assert [item.item_id for item in answer.items] == [item for item, _ in one["items"]], one["request"]
        np.testing.assert_allclose(
            [item.score for item in answer.items], [score for _, score in one["items"]], rtol=1e-4, atol=1e-5
        )
    handler.close()


def test_the_log_of_events_goes_on(workspace, settings):
    log = open_log("sqlite", workspace.root)
    assert [entry.key for entry in log.recent("7", 0, 0.0)] == ["7\0e1", "7\0e2"] and log.last() == 26
    log.close()
    handler = Service(workspace, settings.serve, settings.score, policy=settings.policy)
    item = handler.state.popular_items[0][0]
    history = asyncio.run(
        handler.intake.events(
            EventsRequest(
                user_id=7, events=[{"item_id": item, "event_id": "e2"}, {"item_id": item, "event_id": "e3"}]
            )
        )
    )
    assert history.kept == 1, "e2 was kept by 0.1.0"
    handler.close()


def test_what_was_collected_is_read(workspace, tmp_path):
    SyntheticShop(users=40, items=30, events_per_user=8, seed=1).write(tmp_path / "shop")
    data = [
        f"data.events=[{tmp_path / 'shop' / 'events'}]",
        f"data.items={tmp_path / 'shop' / 'items.parquet'}",
    ]
    old = Dataset.open(workspace.dataset("a6e697f6d31ca8c2"))
    new = prepare_here(renamed_settings(workspace, *data))
    assert list(new.manifest["collected"].values()) == [12] and new.n_events == old.n_events + 2
    assert new.user_history(7).timestamp_s[-1] > old.as_of_s
    assert new.items["item_id"].equals(old.items["item_id"])


def test_its_settings_file_is_refused_with_the_new_names():
    with pytest.raises(SettingsError, match=r"split\.held_out is now split\.holdout_users"):
        load_settings(WRITTEN / "settings.yaml")


def test_an_evaluation_with_the_first_names_of_its_protocols_is_read(tmp_path):
    """A nightly run of then that is repeated today finds it, and goes on from it."""
    row = {"ndcg@10": 0.25, "order": 0}
    table = {"repeats": {"recray": row}, "new_only": {"recray": {"skipped": "nothing new"}}}
    (tmp_path / "metrics.json").write_text(json.dumps(table))
    np.save(tmp_path / "ndcg_repeats.npy", np.array([0.5, 0.0]))
    read = read_table(tmp_path)
    assert read == {"with_repeats": table["repeats"], "filter_seen": table["new_only"]}
    assert read_ndcg(tmp_path, "with_repeats").tolist() == [0.5, 0.0]
