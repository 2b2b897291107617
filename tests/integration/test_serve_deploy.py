"""The Serve config file that ships, deployed on a real cluster by `serve deploy`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import synthetic_overrides
from harness import wait_for

from recray.cli.demo import post
from recray.cluster import free_ports
from recray.config import load_settings
from recray.errors import MissingArtifactError, SettingsError
from recray.serving.app import Arguments, deploy
from recray.testing.cluster import Head
from recray.testing.published import publish_untrained

CONFIG = Path(__file__).resolve().parents[2] / "infra" / "serve" / "recray.yaml"


@pytest.fixture(scope="module")
def storage(synthetic_folder, synthetic_dataset, tmp_path_factory):
    root = tmp_path_factory.mktemp("deployed")
    return publish_untrained(
        load_settings(None, synthetic_overrides(synthetic_folder, root)), synthetic_dataset, root
    )


def test_the_file_that_ships_is_deployed_and_answers(own_home, storage, tmp_path):
    (port,) = free_ports(1)
    content = yaml.safe_load(CONFIG.read_text())
    content["http_options"]["port"] = port
    (application,) = content["applications"]
    application["args"]["overrides"] = [f"storage.root={storage.root}", "serve.replicas=1"]
    edited = tmp_path / "recray.yaml"
    edited.write_text(yaml.safe_dump(content))
    with Head(own_home) as head:
        words = [
            Path(sys.executable).with_name("serve"),
            "deploy",
            "--address",
            f"http://127.0.0.1:{head.dashboard}",
            edited,
        ]
        done = subprocess.run(words, env=head.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        ask = {"user_id": 7, "k": 3}
        answer = wait_for(
            "an answer",
            lambda: post(f"http://127.0.0.1:{port}/v1/recommend", ask),
            last_seen=(own_home / "head.log").read_text,
            ended=head.process.poll,
        )
        assert answer["source"] == "snapshot" and len(answer["items"]) == 3 and answer["degraded"] == []


def test_arguments_that_cannot_be_used_are_refused_before_anything_starts(tmp_path, storage):
    with pytest.raises(MissingArtifactError):
        deploy(Arguments(overrides=[f"storage.root={tmp_path}"]))
    with pytest.raises(SettingsError, match="serve.rate"):
        deploy(Arguments(overrides=[f"storage.root={storage.root}", "serve.rate=often"]))
    with pytest.raises(ValueError, match="bogus"):
        Arguments(bogus=1)
