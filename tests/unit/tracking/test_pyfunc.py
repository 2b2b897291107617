"""A registered bundle is an MLflow model: it loads where recray is not installed, ranks as the endpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from harness import wait_for

from recray.bundle import Bundle
from recray.cluster import free_ports
from recray.config import Settings
from recray.errors import RequestError
from recray.serving.api import RecommendRequest
from recray.serving.query import resolve_query
from recray.serving.ranking import bind_query, rank_inputs
from recray.serving.state import ServingState
from recray.storage import Storage
from recray.testing.published import publish_untrained
from recray.tracking import runs
from recray.tracking.pyfunc import HistoryModel, find_sources
from recray.tracking.runs import Tracking

pytestmark = pytest.mark.second

T = 1_712_000_000


@pytest.fixture(scope="module")
def storage(synthetic_settings, synthetic_dataset, tmp_path_factory) -> Storage:
    settings = synthetic_settings.replace("model", cooccurrence=True)
    return publish_untrained(settings, synthetic_dataset, tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="module")
def bundle(storage) -> Bundle:
    (path,) = (storage.root / "bundles").glob("[!.]*")
    return Bundle.open(path)


@pytest.fixture(scope="module")
def histories(bundle):
    ids = bundle.item_ids.to_pylist()
    return [
        {"history": ids[:5], "timestamps": [float(T + 3600 * n) for n in range(5)]},
        {"history": ids[7:9], "events": ["view", "purchase"], "values": [1.0, 2.0]},
        {"history": [ids[3], "no such item"], "now": float(T + 90 * 86_400)},
        {"history": []},
    ]


def respond(storage, row, k, filter_seen):
    """The endpoint's response to the same history."""
    state = ServingState.load(storage)
    fields = [row.get(name) or [None] * len(row["history"]) for name in ("timestamps", "events", "values")]
    events = [
        {
            "item_id": item,
            "timestamp": None if time is None else pd.Timestamp(time, unit="s").isoformat(),
            "event": event,
            "value": 1.0 if value is None else value,
        }
        for item, time, event, value in zip(row["history"], *fields, strict=True)
    ]
    body = {"history": events, "k": k, "filter_seen": filter_seen, "mode": "realtime"}
    if "now" in row:
        body["now"] = pd.Timestamp(row["now"], unit="s").isoformat()
    (ranked,) = rank_inputs([bind_query(resolve_query(RecommendRequest(**body), state), state)])
    return [item for item, _ in ranked.items], [score for _, score in ranked.items]


def assert_equals_the_endpoint(rows, storage, histories, k, filter_seen):
    for row, history in zip(rows, histories, strict=True):
        items, scores = respond(storage, history, k, filter_seen)
        assert row["item_ids"] == items
        np.testing.assert_allclose(row["scores"], scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "filter_seen"), [(10, False), (4, True)])
def test_it_ranks_as_the_endpoint(storage, bundle, histories, k, filter_seen):
    table = HistoryModel(bundle).predict(pd.DataFrame(histories), {"k": k, "filter_seen": filter_seen})
    assert_equals_the_endpoint(table.to_dict("records"), storage, histories, k, filter_seen)
    assert table["source"].tolist() == ["model", "model", "model", "popular"]


def test_a_row_that_contradicts_itself_is_named(bundle):
    frame = pd.DataFrame([{"history": ["a", "b"], "timestamps": [1.0]}])
    with pytest.raises(RequestError, match="row 0: timestamps has 1 entries, history 2"):
        HistoryModel(bundle).predict(frame)


@pytest.mark.parametrize(
    ("row", "params", "words"),
    [
        ({"history": ["a"], "events": ["zap"]}, {}, "unknown type 'zap'"),
        ({"history": ["a"], "events": "abc"}, {}, "events is 'abc', not a list"),
        ({"history": "i0000001"}, {}, "history is 'i0000001', not a list"),
        ({"history": ["a"], "timestamps": [1.7e12]}, {}, "not seconds since 1970"),
        ({"history": ["a"], "timestamps": [float("inf")]}, {}, "not seconds since 1970"),
        ({"history": ["a"], "timestamps": ["soon"]}, {}, "not seconds since 1970"),
        ({"history": ["a"], "now": "soon"}, {}, "now: "),
        ({"items": ["a"]}, {}, "no column history, but items"),
        ({"history": ["a"]}, {"filter_seen": "false"}, "filter_seen: 'false'"),
    ],
)
def test_what_the_endpoint_refuses_is_refused_with_the_row(bundle, row, params, words):
    with pytest.raises(RequestError, match=words):
        HistoryModel(bundle).predict(pd.DataFrame([row]), params)


@pytest.fixture(scope="module")
def registered(storage, bundle):
    """The tracking in which the bundle is the champion."""
    tracking = Tracking(Settings().tracking, storage)
    run = tracking.run(bundle.key, "train")
    tracking.log_folder(run, bundle.path, "bundle")
    tags = {runs.RUN_KEY: bundle.key, runs.DATASET: "d", runs.DIGEST: bundle.digest}
    for _ in range(2):
        tracking.register(run, bundle.path, tags)
    tracking._client.set_registered_model_alias("recray", "champion", "1")
    return tracking


PREDICT = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/recray@champion")
frame = pd.DataFrame(json.loads(sys.argv[2])).astype(object)
table = model.predict(frame.where(frame.notna(), None), params={"k": 6})
import recray
loaded = [name for name in ("ray", "opacus") if name in sys.modules]
print(json.dumps([recray.__file__, loaded, table.to_dict("records")]))
"""


def predict_elsewhere(python, tracking, histories, folder):
    done = subprocess.run(
        [python, "-c", PREDICT, tracking.uri, json.dumps(histories)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_loads_with_the_code_that_was_logged(storage, registered, histories, tmp_path):
    file, loaded, rows = predict_elsewhere(sys.executable, registered, histories, tmp_path)
    assert "/artifacts/bundle/code/recray/" in file and loaded == []
    assert_equals_the_endpoint(rows, storage, histories, 6, False)


def test_the_logged_code_is_what_it_needs_and_no_more(registered):
    sources = find_sources("recray.tracking.pyfunc")
    rooms = {path.parent.name for path in sources}
    assert {"inference", "model", "dataset"} <= rooms and not rooms & {"serving", "stages", "training", "cli"}
    (code,) = registered.storage.tracking.glob("artifacts/*/artifacts/bundle/code")
    assert len(list(code.rglob("*.py"))) == len(sources)
    assert not list(code.parent.rglob("*.pkl"))


@pytest.mark.slow
def test_it_is_served_by_mlflow_in_a_fresh_environment(storage, registered, histories, tmp_path):
    (model,) = registered.storage.tracking.glob("artifacts/*/artifacts/bundle")
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "-r", model / "requirements.txt"]
    subprocess.run(pip, check=True)
    _, _, rows = predict_elsewhere(python, registered, histories, tmp_path)
    assert_equals_the_endpoint(rows, storage, histories, 6, False)

    (port,) = free_ports(1)
    words = ["-m", "mlflow", "models", "serve", "-m", "models:/recray@champion", "--env-manager", "local"]
    environment = {
        **os.environ, "PYTHONPATH": "", "MLFLOW_TRACKING_URI": registered.uri,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    log = Path(tmp_path / "serve.log")
    with open(log, "w") as file:
        server = subprocess.Popen(
            [python, *words, "--port", str(port)], env=environment, stdout=file, stderr=file, cwd=tmp_path,
            start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(
            "mlflow models serve",
            lambda: urllib.request.urlopen(f"{address}/ping").status == 200,
            last_seen=log.read_text,
            ended=server.poll,
        )
        names = ("history", "timestamps", "events", "values", "now")
        records = [{name: row.get(name) for name in names} for row in histories]
        body = {"dataframe_records": records, "params": {"k": 6}}
        request = urllib.request.Request(
            f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        rows = json.loads(urllib.request.urlopen(request).read())["predictions"]
        assert_equals_the_endpoint(rows, storage, histories, 6, False)
    finally:
        os.killpg(server.pid, 15)
        server.wait()
