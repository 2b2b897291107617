"""A whole night on real Ray, MLflow and Serve: what it writes, that repeating adds nothing, that all answers
agree.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import shutil
import signal
import urllib.error
import urllib.request
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import synthetic_overrides
from harness import replica_logs, wait_for

from recray import pipeline
from recray.cli.demo import post, with_port
from recray.config import load_settings
from recray.dataset.context import encode_request
from recray.dataset.reader import Dataset
from recray.errors import DataError, TrainingError
from recray.inference import Predictor
from recray.release import Release
from recray.serving import app
from recray.serving.state import ServingState
from recray.snapshot.reader import Snapshot
from recray.storage import Storage
from recray.testing.published import skip_training
from recray.testing.synthetic import SyntheticShop

FIRST = dt.datetime(2024, 4, 20, 23, 59, 59, tzinfo=dt.UTC)
SECOND = FIRST + dt.timedelta(days=1)
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("night")
    SyntheticShop(users=300, items=120, events_per_user=15, seed=1).write(folder)
    overrides = [
        *synthetic_overrides(folder, folder / "root"),
        "serve.port=0",
        "serve.poll_s=0.2",
        "serve.timeout_s=30",
        "train.every_days=3",
        "model.cooccurrence=true",
    ]
    return with_port(load_settings(None, overrides))


@pytest.fixture(scope="module")
def first_run(settings):
    before = signal.getsignal(signal.SIGINT)
    first_run = pipeline.run("nightly", settings, FIRST)
    assert signal.getsignal(signal.SIGINT) is before, "after a training Ctrl-C ends a run as it did before it"
    return first_run


@pytest.fixture(scope="module")
def address(settings, first_run):
    from ray import serve

    with app.run_endpoint(settings) as address:
        yield address
    assert not app.is_running()
    serve.shutdown()


def test_a_nightly_run_writes_its_outputs(first_run, settings):
    assert first_run.status == "ok"
    assert set(first_run.outputs) == {
        "dataset",
        "bundle",
        "evaluation",
        "promotion",
        "release",
        "snapshot",
        "latest",
        "report",
    }
    assert first_run.metrics["promoted"] == 1 and first_run.reason == "" and first_run.warnings == []
    assert first_run.metrics["with_repeats_ndcg@10"] > 0 and first_run.metrics["users"] == 300
    snapshot = Snapshot.latest(Storage(settings.root()))
    assert snapshot.path.as_posix().startswith(f"{settings.root()}/scores/dt=2024-04-20/run=")
    rows = [
        row
        for part in sorted(snapshot.path.glob("part-*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]
    assert len({row["user_id"] for row in rows}) == len(rows) == 300
    assert {row["source"] for row in rows} <= {"model", "popular"}
    assert all(
        len(row["item_ids"]) == 20 and row["scores"] == sorted(row["scores"], reverse=True) for row in rows
    )
    assert not list(settings.root().glob("staging/*")) and not list(settings.root().rglob(".run=*"))


def written(settings) -> dict[Path, int]:
    """When each file of the root was written, but for the locks and MLflow's own database."""
    files = [
        p
        for p in settings.root().rglob("*")
        if p.is_file() and "mlflow" not in p.parts and not p.name.endswith(".lock")
    ]
    return {p: p.stat().st_mtime_ns for p in files}


def test_repeating_the_nightly_run_changes_nothing(first_run, settings):
    stamps = written(settings)
    repeated = pipeline.run("nightly", settings, FIRST)
    assert (
        repeated.status == "skipped"
        and repeated.outputs == first_run.outputs
        and repeated.run_key == first_run.run_key
    )
    assert written(settings) == stamps


def documented_metrics() -> list[str]:
    """Patterns of the metrics in the table of the documents."""
    page = Path(__file__).resolve().parents[2] / "infra" / "docs" / "pages" / "outputs.md"
    table = page.read_text().split("## Metrics of a run")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 8
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [name.replace("_K", "_10").replace("…", "*").replace("NAME", "*") for name in names]


def test_mlflow_knows_the_run_once(first_run, settings):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{Storage(settings.root()).tracking / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("recray").experiment_id])
    key = first_run.outputs["bundle"].rsplit("/", 1)[-1]
    assert [run.data.tags["recray.run_key"] for run in runs] == [key]
    run = runs[0]
    assert run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "2" and "storage.root" not in run.data.params
    curve = client.get_metric_history(run.info.run_id, "validation_ndcg")
    assert [point.step for point in curve] == [1, 2]
    assert all(run.info.start_time <= point.timestamp <= run.info.end_time for point in curve)
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.digest and json.loads(data.dataset.source)["uri"] == list(settings.data.events)
    assert run.data.tags["recray.as_of"] == "2024-04-20"
    prefix = "baselines/most popular/with_repeats"
    difference = run.data.metrics[f"{prefix}_difference"]
    assert difference == pytest.approx(
        run.data.metrics["with_repeats_ndcg_at_10"] - run.data.metrics[f"{prefix}_ndcg_at_10"]
    )
    assert run.data.metrics[f"{prefix}_difference_low"] <= difference
    patterns = documented_metrics()
    assert [name for name in run.data.metrics if not any(fnmatch(name, each) for each in patterns)] == []
    assert run.data.metrics["with_repeats_ndcg_at_10"] == pytest.approx(
        first_run.metrics["with_repeats_ndcg@10"]
    )
    assert run.data.metrics["snapshot_users"] == 300 and "snapshot_best_score_q0.5" in run.data.metrics
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"bundle", "evaluation", "snapshots"}
    (snapshot,) = client.list_artifacts(run.info.run_id, "snapshots")
    document = json.loads(Path(client.download_artifacts(run.info.run_id, snapshot.path)).read_text())
    assert (
        document["date"] == "2024-04-20"
        and document["users"] == 300
        and len(document["manifest_sha256"]) == 64
    )


def ids_of(answer):
    return [item["item_id"] for item in answer["items"]]


def scores_of(answer):
    return [item["score"] for item in answer["items"]]


def test_the_answers_of_all_ways_agree(first_run, settings, address):
    """Alone, in a batch, through Ray Data (the snapshot) and through HTTP: equal but for scores within
    1e-5."""
    storage = Storage(settings.root())
    snapshot, dataset = Snapshot.latest(storage), Dataset.open(first_run.outputs["dataset"])
    predictor = Predictor.load(first_run.outputs["bundle"], dataset=dataset)
    users = [user for user in range(0, 300, 11) if snapshot.find(user).source == "model"]
    histories = [
        predictor.vocabulary.translation(dataset).history(dataset.user_history(user)) for user in users
    ]
    batch = predictor.recommend(histories, 10, now=dataset.now_s)
    contexts = [encode_request(predictor.vocabulary.context, {}, dataset.now_s)] * len(
        histories
    )  # a request that names its moment tells its hour
    aware = predictor.recommend(histories, 10, now=dataset.now_s, context=contexts)
    moment = dt.datetime.fromtimestamp(dataset.now_s, dt.UTC).isoformat()
    sources = set()
    for row, user in enumerate(users):
        alone = predictor.recommend([histories[row]], 10, now=dataset.now_s)
        stored = snapshot.find(user)
        nightly = post(f"{address}/v1/recommend", {"user_id": user, "k": 10})
        live = post(f"{address}/v1/recommend", {"user_id": user, "k": 10, "now": moment})
        sources |= {nightly["source"], live["source"]}
        answers = [
            (predictor.vocabulary.ids_of(batch.item_index[row]), batch.scores[row]),
            (predictor.vocabulary.ids_of(alone.item_index[0]), alone.scores[0]),
            (stored.item_ids[:10], stored.scores[:10]),
            (ids_of(nightly), scores_of(nightly)),
        ]
        for same in (
            answers,
            [
                (predictor.vocabulary.ids_of(aware.item_index[row]), aware.scores[row]),
                (ids_of(live), scores_of(live)),
            ],
        ):
            for ids, scores in same:
                np.testing.assert_allclose(scores, same[0][1], atol=1e-5)
                for one_by_one, theirs, score in zip(ids, same[0][0], scores, strict=True):
                    assert one_by_one == theirs or np.isclose(same[0][1], score, atol=1e-5).sum() > 1
    assert sources == {"snapshot", "realtime"}


def test_the_endpoint_says_what_it_serves(first_run, address):
    def get(path):
        with urllib.request.urlopen(f"{address}{path}", timeout=30) as response:
            return json.load(response)

    assert get("/healthz") == {"status": "ok", "as_of": "2024-04-20"} and app.is_running()
    assert get("/v1/models")["bundle"] == first_run.outputs["bundle"].rsplit("/", 1)[-1]
    schema = get("/openapi.json")
    assert {"/v1/recommend", "/v1/models", "/healthz"} <= set(schema["paths"])
    assert len(schema["components"]["schemas"]["RecommendRequest"]["examples"]) == 4
    with urllib.request.urlopen(f"{address}/docs", timeout=30) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"k": 0}', "k"),
        (b'{"bogus": 1}', "bogus"),
        (b"{", "body"),
        (b'{"history": [{"item_id": "i1", "event": "zap"}]}', "zap"),
    ],
)
def test_requests_that_make_no_sense_are_422_and_named(address, body, named):
    request = urllib.request.Request(f"{address}/v1/recommend", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == 422 and named in error.value.read().decode()


def test_visitors_and_strangers_are_answered(address):
    visitor = post(
        f"{address}/v1/recommend",
        {"history": [{"item_id": "i0000005", "event": "purchase"}], "k": 5, "filter_seen": True},
    )
    stranger = post(f"{address}/v1/recommend", {"user_id": "stranger", "k": 5})
    assert (visitor["source"], stranger["source"]) == ("realtime", "popular")
    assert len(visitor["items"]) == len(stranger["items"]) == 5
    assert "i0000005" not in {item["item_id"] for item in visitor["items"]}


def test_the_next_nightly_run_keeps_the_bundle_and_the_endpoint_swaps(first_run, settings, address):
    second = pipeline.run("nightly", settings, SECOND)
    assert second.status == "ok" and second.outputs["dataset"] != first_run.outputs["dataset"]
    assert "bundle" not in second.outputs, "train.every_days=3 have not passed"

    def answer() -> dict:
        return post(f"{address}/v1/recommend", {"user_id": 1, "k": 3})

    wait_for("the endpoint to swap", lambda: answer()["as_of"] == "2024-04-21", last_seen=answer)
    answer = answer()
    assert answer["bundle"] == first_run.outputs["bundle"].rsplit("/", 1)[-1]


def test_the_endpoint_counts_on_rays_metrics_port(settings, address):
    import ray

    post(f"{address}/v1/recommend", {"user_id": 1, "k": 3})
    (node,) = ray.nodes()
    metric_names = {
        "recray_answers_total",
        "recray_latency_ms",
        "recray_run_age_s",
        "recray_serving",
        "recray_coverage",
    }

    def metrics() -> str:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10
        ) as response:
            return response.read().decode()

    wait_for(
        "the endpoint's counts",
        lambda: all(f"ray_{name}" in metrics() for name in metric_names),
        last_seen=metrics,
    )
    assert 'source="snapshot"' in metrics()


def test_a_damaged_snapshot_leaves_the_previous_one_in_place(settings, address):
    storage = Storage(settings.root())
    good = storage.latest.read_bytes()
    snapshot = storage.root / json.loads(good)["snapshot"]
    broken = snapshot.with_name("run=broken")
    shutil.copytree(snapshot, broken)
    part = next(broken.glob("index-*.arrow"))
    part.write_bytes(part.read_bytes()[:-1])
    storage.latest.write_text(
        json.dumps({**json.loads(good), "snapshot": broken.relative_to(storage.root).as_posix()})
    )
    wait_for(
        "the replica to refuse it",
        lambda: all("the old one stays" in log for log in replica_logs(Path.home())),
        last_seen=lambda: "not refused",
    )
    assert post(f"{address}/v1/recommend", {"user_id": 1, "k": 3})["as_of"] == "2024-04-21"
    storage.latest.write_bytes(good)
    shutil.rmtree(broken)


def test_errors_inside_ray_are_recrays_own(settings, tmp_path):
    """A damaged page is met inside a Ray Data task, a loss that is not finite inside a train worker."""
    source = Path(settings.data.events[0])
    folder = tmp_path / "events"
    shutil.copytree(source, folder)
    file = next(folder.glob("*.parquet"))
    content = file.read_bytes()
    file.write_bytes(content[:8] + bytes(400) + content[408:])
    overrides = [
        *synthetic_overrides(source.parent, tmp_path / "root"),
        "train.learning_rate=1e30",
        "train.warmup_steps=0",
    ]
    with pytest.raises(DataError, match="cannot be read"):
        pipeline.run("prepare", load_settings(None, [*overrides, f"data.events=[{folder}]"]), None)
    assert not list((tmp_path / "root" / "datasets").glob("*"))
    pipeline.run("prepare", load_settings(None, overrides), None)
    with pytest.raises(TrainingError, match="loss of epoch 1 is nan"):
        pipeline.run("train", load_settings(None, overrides), None)
    assert not list((tmp_path / "root" / "bundles").glob("*"))


def test_a_first_run_that_is_not_promoted_shows_its_comparisons_and_publishes_nothing(settings, tmp_path):
    changed = {"storage": settings.storage.model_copy(update={"root": str(tmp_path / "root")})}
    changed |= {"promotion": settings.promotion.model_copy(update={"must_beat": ("EASE",)})}
    changed |= {"train": settings.train.model_copy(update={"learning_rate": 1e-9, "epochs": 1})}
    weaker = {"repeat_consumption": False, "popularity_prior_days": 0, "cooccurrence": False}
    changed |= {"model": settings.model.model_copy(update=weaker)}
    skip_training(settings.model_copy(update=changed), FIRST)
    refused = pipeline.run("nightly", settings.model_copy(update=changed), FIRST)
    assert (
        (refused.status, refused.exit_code) == ("refused", 3)
        and "EASE" in refused.reason
        and "promotion.must_beat" in refused.reason
    )
    assert (
        Path(refused.outputs["evaluation"]).exists()
        and "is significantly better" in Path(refused.outputs["report"]).read_text()
    )
    assert not (tmp_path / "root" / "LATEST.json").exists() and "snapshot" not in refused.outputs
    repeated = pipeline.run("nightly", settings.model_copy(update=changed), FIRST)
    assert repeated.reason == refused.reason and repeated.outputs == refused.outputs

    gates = changed["promotion"].model_copy(update={"first_run": "fallback"})
    meanwhile = pipeline.run("nightly", settings.model_copy(update={**changed, "promotion": gates}), FIRST)
    assert (meanwhile.status, meanwhile.exit_code) == ("ok", 0) and refused.reason.startswith(
        meanwhile.reason
    )
    assert sum("popularity fallback" in warning for warning in meanwhile.warnings) == 1
    assert "everybody gets the popularity fallback" in Path(meanwhile.outputs["report"]).read_text()
    storage = Storage(tmp_path / "root")
    published = Snapshot.latest(storage)
    assert (
        published.manifest["popular_only"]
        and published.manifest["popular_users"] == published.manifest["users"] > 0
    )
    assert Release.read(storage).champion is None and ServingState.load(storage).predictor.popular_only

    gates = changed["promotion"].model_copy(update={"must_beat": ()})
    promoted = pipeline.run("nightly", settings.model_copy(update={**changed, "promotion": gates}), FIRST)
    assert promoted.status == "ok" and not ServingState.load(storage).predictor.popular_only
    assert Snapshot.latest(storage).manifest["popular_users"] < published.manifest["users"]


def test_a_job_says_its_warnings_in_its_last_line(settings, synthetic_folder, tmp_path):
    changed = {"storage": settings.storage.model_copy(update={"root": str(tmp_path)})}
    twice = sorted(map(str, (Path(synthetic_folder) / "events").rglob("*.parquet")))[:1] * 2
    changed |= {"data": settings.data.model_copy(update={"events": tuple(twice)})}
    result = pipeline.run("prepare", settings.model_copy(update=changed), FIRST)
    assert result.status == "ok" and any("more than once" in warning for warning in result.warnings)
