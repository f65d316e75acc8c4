"""The paper's 40 GPUs, as logical ones of five simulated nodes, and workers that really talk."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

NODES, GPUS_A_NODE = 5, 8
NODE = {"num_cpus": 9, "num_gpus": GPUS_A_NODE, "object_store_memory": 80 * 2**20}
PLACE = """
import json, sys
import ray
from ray.train import ScalingConfig
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from flashvl.train.recipe import load_recipe
from flashvl.train.run import attempts, launch
from flashvl.train.run.stage import check_stage
from flashvl.train.run.worker import Assignment

ray.init(logging_level="error")
places = {}
for num_workers in (40, 16):
    recipe = load_recipe(sys.argv[1], [*sys.argv[2:], f"num_workers={num_workers}"])
    stage = check_stage(recipe)
    assignment = Assignment(
        recipe=stage.recipe, feed=stage.feed, eval_feed=None, first_step=0, run_id="", monitor=None
    )
    resources = launch.resources_of_a_worker(stage.recipe)
    scaling = attempts._build_trainer(assignment, resources, "/tmp").scaling_config
    bundles = [scaling._resources_per_worker_not_none] * scaling.num_workers
    group = placement_group(bundles, strategy=scaling.placement_strategy)
    assert group.wait(60)
    places[num_workers] = list(placement_group_table(group)["bundles_to_node_id"].values())
    remove_placement_group(group)
print(json.dumps(places))
"""
"""Reserves what Ray Train would for the workers of a stage; prints the node of each."""


@pytest.fixture(scope="module")
def cluster(starts_ray: None) -> Iterator[Cluster]:
    """Five nodes of eight GPUs, which exist in Ray's books alone."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for _ in range(NODES - 1):
        cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


def run_on(cluster: Cluster, *command: str) -> str:
    """What a command prints that is connected to the cluster."""
    environment = os.environ | {"RAY_ADDRESS": cluster.address, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def recipe(folder: Path, model: Path) -> Path:
    """A small stage; its file is JSON, which is YAML."""
    path = folder / "stage.yaml"
    values = {
        "kind": "supervised",
        "stage": "scale",
        "init_from": str(model),
        "data": {"synthetic": {"count": 80, "seed": 5}},
        "global_batch_size": 40,
        "token_budget": 1000,
        "max_length": 1000,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
    }
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
def test_forty_workers_are_eight_a_node_and_sixteen_fill_two(
    cluster: Cluster, tiny_random: Path, tmp_path: Path
) -> None:
    arguments = [str(recipe(tmp_path, tiny_random)), f"output_dir={tmp_path}/out"]
    places = json.loads(run_on(cluster, "-c", PLACE, *arguments).splitlines()[-1])
    assert sorted(Counter(places["40"]).values()) == [GPUS_A_NODE] * NODES
    assert sorted(Counter(places["16"]).values()) == [GPUS_A_NODE] * 2


@pytest.mark.slow
def test_five_workers_on_several_nodes_train_as_one(
    cluster: Cluster, tiny_random: Path, tmp_path: Path
) -> None:
    """Workers of four CPUs each: two fit a node, so five are on three nodes; two steps."""
    losses = []
    for num_workers in (5, 1):
        output = tmp_path / f"of-{num_workers}"
        options = [f"output_dir={output}", f"num_workers={num_workers}", "use_gpu=false"]
        command = ["-m", "flashvl", "train", str(recipe(tmp_path, tiny_random)), *options]
        run_on(cluster, *command, "threads_per_worker=4")
        log = json.loads((output / "training_log.json").read_text())
        losses.append([record["loss"] for record in log["steps"]])
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
