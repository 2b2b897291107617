"""What a submission is called, and what is refused before anything is sent."""

import os
import re
import socket
import subprocess
import sys

import pytest

from recray import cluster
from recray.cli import submission
from recray.errors import SettingsError


def submit(folder, *overrides, as_of="2011-12-01", config=None, flags=()):
    return submission.prepare_submission("nightly", config, as_of, list(overrides), folder, flags)


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "nightly.py").touch()
    (tmp_path / "mine.yaml").write_text("train:\n  epochs: 3\n")
    return tmp_path


def test_the_name_is_job_as_of_and_a_hash_of_settings_and_input(checkout):
    one = submit(checkout)
    assert one.name.startswith("nightly-2011-12-01-") and len(one.name.rsplit("-", 1)[1]) == 12
    assert submit(checkout).name == one.name
    assert submit(checkout, as_of=None).name.startswith("nightly-latest-")
    others = [
        submit(checkout, "train.epochs=3"),
        submit(checkout, config="mine.yaml"),
        submit(checkout, "storage.root=/elsewhere"),
    ]
    assert len({one.name, *(other.name for other in others)}) == 4


def test_a_changed_input_is_another_submission(checkout, tmp_path):
    file = tmp_path / "events.parquet"
    file.write_bytes(b"one")
    before = submit(checkout, f"data.events=[{file}]").name
    file.write_bytes(b"two!")
    assert submit(checkout, f"data.events=[{file}]").name != before
    assert submit(checkout, "data.events=[/only/on/the/cluster.parquet]").name


def test_the_job_gets_the_arguments_relative_to_the_working_directory(checkout):
    command = submit(checkout, "train.epochs=2", flags=["--restart"], config=str(checkout / "mine.yaml"))
    assert command.arguments == [
        "--config",
        "mine.yaml",
        "--restart",
        "train.epochs=2",
        "--as-of",
        "2011-12-01",
    ]
    assert command.settings.train.epochs == 2


@pytest.mark.parametrize(
    ("overrides", "options", "named"),
    [
        (["storage.root=relative"], {}, "absolute"),
        (["train.epoch=3"], {}, "did you mean epochs"),
        ([], {"config": "/etc/hostname"}, "not in the working directory"),
        ([], {"as_of": "soon"}, "--as-of"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_sent(checkout, overrides, options, named):
    with pytest.raises(SettingsError, match=named):
        submit(checkout, *overrides, **options)


def test_a_folder_without_the_job_is_named(tmp_path):
    with pytest.raises(SettingsError, match="jobs/nightly.py"):
        submit(tmp_path)


def test_results_are_distinguished_from_logs():
    line = (
        '{"job": "nightly", "status": "ok", "run_key": "k", "outputs": {}, "metrics": {}, "seconds": '
        '1.0, "reason": "", "warnings": []}'
    )
    assert submission.to_result(line)["status"] == "ok"
    for other in ('{"time": "now"}', '{"job": broken', "epoch 1", '{"job": "x"}'):
        assert submission.to_result(other) is None


def test_ports_are_free_and_no_connection_takes_them_meanwhile(monkeypatch):
    ports = cluster.free_ports(50)
    assert len(set(ports)) == 50 and set(ports) <= set(cluster.PORTS)
    monkeypatch.setattr(cluster, "PORTS", range(ports[0], ports[0] + 1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[0]))
        taken.listen()
        with pytest.raises(OSError, match="no 1 free ports"):
            cluster.free_ports(1)
    assert cluster.free_ports(1) == ports[:1]


def test_replicas_of_two_rays_listen_on_ports_of_their_own(monkeypatch):
    first = cluster.free_block(0)
    assert (
        len(first) == cluster.BLOCK
        and first[0] in cluster.REPLICA_PORTS
        and first[-1] in cluster.REPLICA_PORTS
    )
    monkeypatch.setattr(cluster, "REPLICA_PORTS", range(first.start, first.stop))
    assert cluster.free_block(0) == first
    with pytest.raises(OSError, match="each block of 100 ports"):
        cluster.free_block(first[3])
    with socket.create_server(("127.0.0.1", first[50])), pytest.raises(OSError, match="stop the processes"):
        cluster.free_block(0)


def test_no_port_of_serves_is_one_that_another_ray_has_too():
    from ray.serve._private import constants

    ports = {
        name
        for name, value in vars(constants).items()
        if name.startswith("RAY_SERVE_") and re.search("_PORT$", name) and value is not None
    }
    of_grpc = {
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT",
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT",
    }  # nothing of ours speaks it
    first = cluster.serve_environment()
    assert ports - of_grpc == {name for name in first if name.endswith("_PORT")}
    ours = [int(first[name]) for name in ports - of_grpc]
    assert len(set(ours)) == len(ours) and not {8404, 8500, 9101, 9500} & set(ours)


def test_what_serve_left_behind_is_ended_and_nobody_else(tmp_path):
    own, other = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"{folder}/haproxy.cfg"])
        for folder in (tmp_path, "/tmp/x")
    )
    try:
        cluster.end_haproxy(str(tmp_path))
        assert own.wait(10) == -9 and other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_line_that_says_nothing_is_kept_off_standard_error_and_all_others_pass(capfd):
    with cluster.suppress_lines("Actor", "in the object store"):
        os.write(2, b"before\nAn Actor has arguments in the object store\nAn Actor began\nleft over")
    os.write(2, b" after\n")
    assert capfd.readouterr().err == "before\nAn Actor began\nleft over after\n"
