"""Two workers on two nodes learn what one worker learns.

This module must meet Ray first in its process (marker `alone`): after another session of the same process,
Ray (2.60) cancels new actors of a `cluster_utils` cluster before they start.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import synthetic_overrides
from safetensors.torch import load_file

from recray.config import load_settings
from recray.errors import SettingsError
from recray.testing.published import prepare_here
from recray.training.plan import TrainingPlan, plan_training, training_settings
from recray.training.worker import build_loop

STEPS = 20
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def two_nodes(own_home):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def settings_of(folder, root, *options):
    overrides = [
        *synthetic_overrides(folder, root),
        "model.dropout=0",
        "data.context=[]",
        "train.precision=float32",
        "train.epochs=1",
        "train.batch_tokens=150",
        *options,
    ]
    return load_settings(None, overrides)


def test_two_workers_on_two_nodes_equal_one(two_nodes, synthetic_folder, tmp_path):
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from recray.training.worker import train_worker

    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    settings = settings_of(synthetic_folder, tmp_path)
    dataset = prepare_here(settings)
    train_settings = training_settings(settings)
    one = build_loop(str(dataset.path), train_settings, torch.device("cpu"))
    assert sum(1 for _ in one.batches.epoch(0)) >= STEPS
    list(one.run())

    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "dataset": str(dataset.path),
            "settings": train_settings,
            "threads": 1,
            "progress": str(tmp_path / "p.jsonl"),
            "resume": None,
            "parent": None,
            "private": None,
            "neighbours": None,
        },
        scaling_config=ScalingConfig(
            num_workers=2, resources_per_worker={"CPU": 1}, placement_strategy="STRICT_SPREAD"
        ),
        run_config=RunConfig(name="two", storage_path=str(tmp_path / "runs")),
    )
    checkpoint = trainer.fit().checkpoint.path
    progress = json.loads(Path(checkpoint, "progress.json").read_text())
    assert progress["step"] == one.progress.step >= STEPS
    assert progress["curve"][0]["loss"] == pytest.approx(one.progress.curve[0]["loss"], abs=1e-5)
    assert progress["best_ndcg"] == pytest.approx(one.progress.best_ndcg, abs=1e-3)
    two = load_file(f"{checkpoint}/model.safetensors")
    start = build_loop(str(dataset.path), train_settings, torch.device("cpu")).model.state_dict()
    moved = 0.0
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)
        moved = max(moved, (tensor.float() - start[name].float()).abs().max().item())
    assert moved > 1e-3, "training moved nothing, so the comparison said nothing"


def test_workers_that_find_no_place_are_an_error_that_names_the_holders(
    two_nodes, synthetic_folder, tmp_path
):
    import ray

    from recray.errors import ClusterError
    from recray.training.trainer import train

    @ray.remote(num_cpus=1)
    class Squatter:
        def ready(self):
            return True

    settings = settings_of(synthetic_folder, tmp_path, "train.workers=2", "train.timeout_s=2")
    dataset = prepare_here(settings)
    squatter = Squatter.remote()
    ray.get(squatter.ready.remote())
    with pytest.raises(ClusterError, match="Squatter"):
        train(settings, plan_training(settings, dataset), dataset)
    ray.kill(squatter)
    with pytest.raises(ClusterError, match="needs 9 CPUs.*the cluster has 2"):
        train(settings_of(synthetic_folder, tmp_path, "train.workers=9"), TrainingPlan("k", None), dataset)


def test_a_gpu_that_is_not_there_is_named(two_nodes, synthetic_folder, tmp_path):
    from recray.errors import ClusterError
    from recray.training.trainer import train

    settings = settings_of(synthetic_folder, tmp_path, "train.use_gpu=true")
    with pytest.raises(ClusterError, match="1 GPUs; the cluster has 2 and 0"):
        train(settings, TrainingPlan("k", None), prepare_here(settings))


def test_an_endpoint_asks_for_a_gpu_that_is_there(two_nodes, tmp_path):
    from recray.serving.app import Arguments, deploy

    with pytest.raises(SettingsError, match="gpus_per_replica is 0.5, the cluster has 0 GPUs"):
        deploy(Arguments(overrides=[f"storage.root={tmp_path}", "serve.gpus_per_replica=0.5"]))


def test_an_endpoint_whose_log_is_for_one_machine_is_refused_on_two(two_nodes, tmp_path):
    from recray.serving.app import Arguments, deploy

    with pytest.raises(SettingsError, match="this cluster has 2"):
        deploy(Arguments(overrides=[f"storage.root={tmp_path}"]))
