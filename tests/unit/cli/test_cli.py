"""What a person or a scheduler meets: exit codes, the last line, errors that name the thing and the fix."""

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import synthetic_overrides

from recray import cli
from recray.bundle import Bundle
from recray.cli import demo
from recray.cluster import free_ports
from recray.config import load_settings
from recray.errors import ClusterError, DamagedArtifactError, RefusedError
from recray.privacy.accounting import Mechanism
from recray.privacy.ledger import Ledger
from recray.testing.published import prepare_here, untrained_bundle


def call(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def test_validate_reads_footers_only(capsys, synthetic_folder, tmp_path):
    code, result, said = call(capsys, "validate", *synthetic_overrides(synthetic_folder, tmp_path / "root"))
    assert (code, result["status"]) == (0, "ok") and result["metrics"]["items"] == 120
    assert "ordered by timestamp" in said
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["prepare", "train.epoch=3"], 2, "did you mean epochs?"),
        (["prepare", "--config", "/nowhere.yaml"], 2, "recray init"),
        (["prepare", "--as-of", "soon"], 2, "--as-of"),
        (["prepare", "storage.root=relative"], 2, "absolute"),
        (["validate", "data.events=/nowhere"], 1, "/nowhere does not exist"),
        (["validate", "data.columns={timestamp: null}"], 1, "needs a timestamp column"),
        (["prepare", "storage.root=/proc/nowhere"], 1, "cannot be written to"),
        (["train", "storage.root={tmp}"], 1, "recray prepare"),
    ],
)
def test_errors_are_named_without_a_traceback(capsys, tmp_path, arguments, code, named):
    arguments = [argument.format(tmp=tmp_path) if "{tmp}" in argument else argument for argument in arguments]
    exit_code, result, said = call(capsys, *arguments)
    assert (exit_code, result["status"]) == (code, "failed")
    assert named in said and "fix:" in said and "Traceback" not in said
    _, _, loud = call(capsys, *arguments, "--traceback")
    assert "Traceback" in loud


def test_later_stages_name_the_stage_that_is_missing(capsys, synthetic_folder, tmp_path):
    overrides = synthetic_overrides(synthetic_folder, tmp_path)
    prepare_here(load_settings(None, overrides))
    for job in ("evaluate", "promote", "report"):
        code, result, said = call(capsys, job, *overrides)
        assert code == 1 and "recray train" in said and "recray train" in result["reason"]
    for job, named in (("score", "recray promote"), ("rollback", "recray models")):
        code, result, said = call(capsys, job, *overrides)
        assert (code, result["status"]) == (3, "refused") and named in said


def test_a_damaged_dataset_stops_the_job_before_any_work(capsys, synthetic_folder, tmp_path):
    overrides = synthetic_overrides(synthetic_folder, tmp_path)
    data = prepare_here(load_settings(None, overrides))
    file = data.path / "items.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    code, result, said = call(capsys, "train", *overrides)
    assert (code, result["status"]) == (1, "failed") and "items.parquet differs from the digest" in said
    assert not (tmp_path / "bundles").exists() and not (tmp_path / "training").exists()


def test_a_damaged_bundle_is_refused(capsys, synthetic_folder, tmp_path):
    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path))
    path = tmp_path / "bundle"
    untrained_bundle(settings, prepare_here(settings), path, "k")
    for name in (
        "model.safetensors",
        "items.parquet",
        "config.yaml",
        "popularity.parquet",
        "privacy.json",
        "metrics.json",
    ):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        original = (path / name).read_bytes()
        (path / name).write_bytes(content)
        with pytest.raises(DamagedArtifactError, match=name):
            Bundle.open(path)
        (path / name).write_bytes(original)
    Bundle.open(path)
    original = (path / "manifest.json").read_bytes()
    for offset in range(0, len(original), 37):
        changed = bytearray(original)
        changed[offset] ^= 1
        (path / "manifest.json").write_bytes(changed)
        with pytest.raises(DamagedArtifactError):
            Bundle.open(path)


def test_one_job_at_a_time_in_a_root(capsys, synthetic_folder, tmp_path):
    from recray.storage import lease

    with lease.hold(tmp_path, "nightly", 1.0):
        code, result, said = call(
            capsys, "prepare", *synthetic_overrides(synthetic_folder, tmp_path), "storage.lease_s=1"
        )
    assert (code, result["status"]) == (3, "refused") and "nightly (attempt 1, process" in said


def test_events_of_the_future_or_a_clock_set_back_are_refused(
    capsys, synthetic_folder, tmp_path, monkeypatch
):
    from recray.prepare import prepare as preparation

    class Earlier(preparation.dt.datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(2024, 1, 2, tzinfo=zone)

    settings = load_settings(None, synthetic_overrides(synthetic_folder, tmp_path))
    monkeypatch.setattr(preparation.dt, "datetime", Earlier)
    with pytest.raises(
        RefusedError,
        match=r"events have times in the future by this machine's clock, 2024-01-02.*\n.*--as-of",
    ):
        prepare_here(settings)
    monkeypatch.undo()
    prepare_here(settings)


def test_a_nightly_run_with_other_settings_is_refused_until_the_running_one_ends(synthetic_folder, tmp_path):
    from recray.pipeline.nightly import begin_run

    progress_file = tmp_path / "night.json"
    settings, other = (
        load_settings(None, [*synthetic_overrides(synthetic_folder, tmp_path), f"train.epochs={n}"])
        for n in (2, 3)
    )
    begin_run(progress_file, settings, None, restart=False)
    begin_run(progress_file, settings, None, restart=False)
    with pytest.raises(RefusedError, match="train.epochs 2 → 3"):
        begin_run(progress_file, other, None, restart=False)
    begin_run(progress_file, other, None, restart=True)
    progress_file.write_text(progress_file.read_text().replace('"ended": false', '"ended": true'))
    begin_run(progress_file, settings, None, restart=False)


def test_json_logs_have_time_level_job_stage_and_fields(capsys):
    from recray.pipeline.terminal import LogReporter

    with LogReporter("nightly") as log:
        log.progress("── train", stage="train")
        log.progress("epoch 1", loss=0.5, level="debug")
        log.error("no room")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["level"], line["job"], line["stage"]) for line in lines] == [
        ("info", "nightly", "train"), ("debug", "nightly", "train"), ("error", "nightly", "train")
    ]  # fmt: skip
    assert lines[1]["loss"] == 0.5 and all(line["time"].endswith("+00:00") for line in lines)


def test_doctor_says_what_it_found_and_what_to_fix(capsys, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, result, said = call(capsys, "doctor", f"storage.root={tmp_path / 'root'}")
    assert (code, result["status"]) == (0, "ok")
    for name in (
        "machine",
        "Python",
        "packages",
        "GPU",
        "Ray",
        "Ray token",
        "Ray job API",
        "MLflow",
        "storage space",
        "storage",
        "champion",
    ):
        assert name in result["metrics"], name
        assert name in said
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "RELEASE.json").write_text("{}")
    code, result, said = call(
        capsys,
        "doctor",
        f"storage.root={tmp_path / 'root'}",
        "tracking.uri=http://127.0.0.1:9",
        "tracking.retries=0",
    )
    assert (code, result["status"]) == (1, "failed")
    assert (
        "Ray token" in result["reason"]
        and "is not a release" in result["reason"]
        and any("MLflow" in text for text in result["warnings"])
    )
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, result, said = call(capsys, "doctor", "storage.root=/proc/nowhere")
    assert (
        code == 1
        and "no Ray responds at 127.0.0.1:9" in result["reason"]
        and "cannot be written to" in result["reason"]
    )


def test_doctor_says_what_was_spent_of_privacy(capsys, tmp_path):
    where = [
        f"storage.root={tmp_path}",
        "privacy.enabled=true",
        "privacy.cap=8",
        "privacy.delta=1e-5",
        f"data.items={tmp_path}/items.parquet",
    ]
    assert "the first training creates it" in call(capsys, "doctor", *where)[1]["metrics"]["privacy"]
    ledger = Ledger.open(f"sqlite:///{tmp_path}/privacy.sqlite", "users")
    ledger.reserve(
        "a", Mechanism(sigma=2.0, rate=0.1, steps=100, clipping_norm=1.0, delta=1e-5, users=50), None
    )
    exit_code = call(capsys, "doctor", *where)[1]["metrics"]["privacy"]
    assert re.fullmatch(
        r"ε 2\.\d+ of 8 at δ 1e-05 is spent, by 1 trainings of population users", exit_code
    ), exit_code
    assert any(
        "privacy" in warning for warning in call(capsys, "doctor", *where, "privacy.cap=1")[1]["warnings"]
    )
    assert "privacy" not in call(capsys, "doctor", f"storage.root={tmp_path}")[1]["metrics"]


def test_models_of_an_empty_root(capsys, tmp_path):
    code, result, _ = call(capsys, "models", f"storage.root={tmp_path}")
    assert (code, result["metrics"]["models"]) == (0, [])


def test_options_and_overrides_may_stand_in_any_order(capsys, tmp_path):
    code, _, said = call(
        capsys,
        "promote",
        f"storage.root={tmp_path}",
        "0123456789abcdef",
        "--as-of",
        "2011-12-01",
        "train.epochs=1",
    )
    assert code == 1 and "recray prepare" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_hears_that_the_endpoint_is_up_may_end_it_at_once(number):
    before, said = {asks: signal.signal(asks, cli.interrupt) for asks in (signal.SIGINT, signal.SIGTERM)}, []
    try:
        demo.wait_until_stopped(
            bool,
            lambda: said.append("serving"),
            lambda: signal.raise_signal(number),
            lambda: said.append("told after the end"),
        )
    finally:
        for asks, handler in before.items():
            signal.signal(asks, handler)
    assert said == ["serving"]


def test_an_endpoint_that_does_not_come_back_ends_the_job(monkeypatch):
    monkeypatch.setattr(demo, "POLL_S", 0.01)
    monkeypatch.setattr(demo, "GRACE_S", 0.2)
    looks, exit_code = iter([True, False, False, True]), []

    def alive():
        exit_code.append(next(looks, False))
        return exit_code[-1]

    with pytest.raises(ClusterError, match="no replica of the endpoint runs any more"):
        demo.wait_until_stopped(alive)
    assert exit_code[:4] == [True, False, False, True] and len(exit_code) > 6
    with pytest.raises(ClusterError, match="no replica of the endpoint runs any more"):
        demo.wait_until_stopped(lambda: time.sleep(60))


@pytest.mark.parametrize(("flags", "is_json"), [([], False), (["--json"], True)])
def test_json_is_for_programs_and_a_terminal_gets_words(tmp_path, flags, is_json):
    import pty

    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "recray.cli", "models", f"storage.root={tmp_path}", *flags]
    done = subprocess.run(words, stdout=end, stderr=subprocess.PIPE, text=True)
    os.close(end)
    with contextlib.suppress(OSError):  # the end of a terminal
        written = ""
        while piece := os.read(terminal, 1 << 16):
            written += piece.decode()
    os.close(terminal)
    assert done.returncode == 0, done.stderr
    assert ('"status": "ok"' in written) == is_json
    assert ("models ok after" in done.stderr) != is_json


@pytest.fixture
def webhook():
    """Its address, and the bodies that it got."""
    bodies = []

    class Taker(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Taker)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_job_that_fails_tells_the_webhook_and_others_tell_nothing(capsys, tmp_path, webhook):
    address, bodies = webhook
    where = [f"storage.root={tmp_path / 'root'}", f"report.webhook={address}"]
    code, _, _ = call(capsys, "prepare", f"data.events=[{tmp_path / 'gone.csv'}]", *where)
    assert code == 1 and len(bodies) == 1
    assert (
        bodies[0]["text"].startswith("recray prepare failed: ")
        and "gone.csv does not exist" in bodies[0]["text"]
    )
    assert bodies[0]["job"] == "prepare" and bodies[0]["status"] == "failed"
    call(capsys, "models", *where)
    call(capsys, "prepare", "train.epochs=none", *where)  # settings that cannot be read
    assert len(bodies) == 1


def test_a_webhook_that_is_not_there_is_a_warning(capsys, tmp_path):
    (port,) = free_ports(1)
    words = [f"storage.root={tmp_path}", f"report.webhook=http://127.0.0.1:{port}"]
    code, result, err = call(capsys, "prepare", "data.events=[/gone.csv]", *words)
    assert code == 1 and result["status"] == "failed"
    assert "warning: report.webhook does not take the result" in err
