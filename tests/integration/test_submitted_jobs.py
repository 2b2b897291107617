"""Jobs on a real cluster with token authentication, by `ray job submit` and by `recray submit`, beside an
endpoint that is up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
import venv
from pathlib import Path

import pytest
from conftest import synthetic_overrides
from harness import wait_for

from recray.cli.demo import post
from recray.cluster import free_ports
from recray.storage import lease
from recray.testing.cluster import Head

REPOSITORY = Path(__file__).resolve().parents[2]
FIRST, SECOND = "2024-04-20", "2024-04-21"


@pytest.fixture(scope="module")
def head(own_home):
    with Head(own_home) as head:
        yield head


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("shop")


def submit(head, *words, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "recray.cli", "submit", *map(str, words)]
    return subprocess.run(
        command, env={**head.environment, **environment}, cwd=REPOSITORY, capture_output=True, text=True
    )


def last(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def first_run(head, root, synthetic_folder):
    done = submit(head, "nightly", "--as-of", FIRST, *synthetic_overrides(synthetic_folder, root))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_submitted_nightly_run_is_followed_to_its_end(first_run, root):
    result = last(first_run)
    assert (result["job"], result["status"]) == ("submit", "ok") and result["metrics"]["promoted"] == 1
    assert re.fullmatch(rf"nightly-{FIRST}-[0-9a-f]{{12}}-1", result["outputs"]["submission"])
    assert Path(result["outputs"]["snapshot"]).is_relative_to(root)
    logged = [json.loads(line) for line in first_run.stderr.splitlines() if line.startswith('{"time"')]
    assert {line["stage"] for line in logged} >= {
        "prepare",
        "train",
        "evaluate",
        "promote",
        "score",
        "report",
    }
    assert {"time", "level", "job", "message"} <= logged[0].keys() and {line["level"] for line in logged} <= {
        "info",
        "debug",
    }
    assert any(line.get("validation_ndcg") for line in logged)


def test_a_nightly_run_that_ended_is_repeated_under_the_next_number(head, root, synthetic_folder, first_run):
    done = submit(head, "nightly", "--as-of", FIRST, *synthetic_overrides(synthetic_folder, root))
    result = last(done)
    assert (done.returncode, result["status"]) == (0, "skipped")
    assert result["outputs"]["submission"] == last(first_run)["outputs"]["submission"][:-1] + "2"


def test_a_nightly_run_beside_the_endpoint_and_a_running_attempt_is_followed(
    head, root, synthetic_folder, first_run
):
    port = free_ports(1)[0]
    serve = [
        sys.executable,
        "-m",
        "recray.cli",
        "serve",
        f"storage.root={root}",
        f"serve.port={port}",
        "serve.poll_s=0.2",
    ]
    endpoint = subprocess.Popen(
        serve, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        assert _night(address, endpoint) == FIRST
        nights, stop = set(), threading.Event()

        def ask() -> None:
            while not stop.wait(0.2):
                nights.add(post(f"{address}/v1/recommend", {"user_id": 1, "k": 3})["as_of"])

        asking = threading.Thread(target=ask)
        asking.start()
        words = [
            "nightly",
            "--as-of",
            SECOND,
            *synthetic_overrides(synthetic_folder, root),
            "train.every_days=3",
        ]
        results: list[subprocess.CompletedProcess] = []
        one = threading.Thread(target=lambda: results.append(submit(head, *words)))
        one.start()
        wait_for("the job to run", lambda: lease.describe_holder(root))
        other = submit(head, *words)
        one.join()
        wait_for("an answer of the second night", lambda: SECOND in nights, last_seen=lambda: nights)
        stop.set()
        asking.join()
        assert nights == {FIRST, SECOND}
        assert (results[0].returncode, other.returncode) == (0, 0), other.stderr[-2000:]
        assert last(results[0])["outputs"]["submission"] == last(other)["outputs"]["submission"]
        assert "submitted nightly" in results[0].stderr and "following nightly" in other.stderr
        assert last(other)["status"] == "ok"
    finally:
        endpoint.terminate()
        endpoint.wait()


def _night(address: str, endpoint: subprocess.Popen) -> str:
    def submit_nightly() -> str:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as response:
            return json.load(response)["as_of"]

    try:
        return wait_for("the endpoint", submit_nightly, ended=endpoint.poll)
    except AssertionError as error:
        endpoint.kill()
        raise AssertionError(endpoint.communicate()[1][-2000:]) from error


def test_the_exit_code_is_the_jobs_and_an_older_nightly_run_is_refused(
    head, root, synthetic_folder, first_run
):
    words = ["nightly", "--as-of", "2024-04-01", *synthetic_overrides(synthetic_folder, root)]
    done = submit(head, *words)
    assert done.returncode == 3 and last(done)["status"] == "refused"
    assert "was a clock set back?" in last(done)["reason"]


@pytest.mark.slow
def test_a_job_that_fails_gives_its_exit_code(head, root, synthetic_folder, first_run):
    done = submit(head, "train", "--as-of", "2024-03-03", *synthetic_overrides(synthetic_folder, root))
    assert done.returncode == 1 and "recray prepare" in last(done)["reason"]


@pytest.mark.parametrize("job", ["prepare", pytest.param("nightly", marks=pytest.mark.slow)])
def test_the_sample_is_submitted_and_data_environments_and_outputs_are_not(head, tmp_path, job):
    """The way of the README: Ray's own client, the demo's config, nothing but the checkout."""
    words = ["--working-dir", ".", "--", "python", "-m", f"jobs.{job}", "--config", "jobs/configs/demo.yaml"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    overrides = [
        f"storage.root={tmp_path}",
        "train.epochs=1",
        "evaluate.ease_max_items=1",
        "evaluate.max_users=200",
    ]
    done = subprocess.run(
        [*ray, *words, *overrides], env=head.environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert f'"job": "{job}", "status": "ok"' in done.stdout and "succeeded" in done.stdout
    sent = max(
        head.temporary.rglob("runtime_resources/working_dir_files/_ray_pkg_*"),
        key=lambda p: p.stat().st_mtime,
    )
    assert {"recray", "jobs", "policies"} <= {p.name for p in sent.iterdir()}
    assert not {".venv", ".git", ".demo", "tests"} & {p.name for p in sent.iterdir()}


@pytest.mark.parametrize(
    ("environment", "code", "named"),
    [
        (
            {"RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"},
            1,
            "does not accept the token from RAY_AUTH_TOKEN",
        ),
        ({"HOME": "/nowhere"}, 1, "requires a token and there is none"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, 1, "no cluster responds at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_submitted_is_named(head, tmp_path, environment, code, named):
    done = submit(head, "nightly", f"storage.root={tmp_path}", **environment)
    assert (
        done.returncode == code
        and named in done.stderr
        and "fix:" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr


def test_a_working_directory_that_is_too_large_is_named_before_it_is_sent(head, tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "nightly.py").touch()
    (tmp_path / "mydata").mkdir()
    with open(tmp_path / "mydata" / "events.parquet", "wb") as file:
        file.truncate(101 << 20)
    done = submit(head, "nightly", "--working-dir", tmp_path, f"storage.root={tmp_path}")
    assert done.returncode == 2 and "mydata 106 MB" in done.stderr and ".rayignore" in done.stderr, (
        done.stderr
    )
    (tmp_path / ".rayignore").write_text("mydata/\n")
    done = submit(head, "nightly", "--working-dir", tmp_path, "--no-follow", f"storage.root={tmp_path}")
    assert done.returncode == 0, done.stderr


def test_a_folder_that_is_no_checkout_and_a_config_outside_of_it_are_named(head, tmp_path):
    done = submit(head, "nightly", "--working-dir", tmp_path)
    assert done.returncode == 2 and "jobs/nightly.py" in done.stderr
    config = tmp_path / "mine.yaml"
    config.write_text("train:\n  epochs: 1\n")
    done = submit(head, "nightly", "--config", config)
    assert done.returncode == 2 and "is not in the working directory" in done.stderr
    assert submit(head, "nightly", "storage.root=relative").returncode == 2


@pytest.mark.slow
def test_an_environment_that_has_only_ray_can_submit(head, tmp_path):
    venv.create(tmp_path / "only-ray", with_pip=True)
    python = tmp_path / "only-ray" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "ray[default]==2.60.0"], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode
    words = ["--working-dir", ".", "--", "python", "-m", "jobs.nightly", "--config", "jobs/configs/demo.yaml"]
    overrides = [
        f"storage.root={tmp_path / 'root'}",
        "train.epochs=1",
        "evaluate.ease_max_items=1",
        "evaluate.max_users=200",
    ]
    client = [str(python.with_name("ray")), "job", "submit"]
    done = subprocess.run(
        [*client, *words, *overrides], env=head.environment, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert '"job": "nightly", "status": "ok"' in done.stdout
