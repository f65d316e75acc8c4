"""The paper's 40 GPUs, as logical ones of five simulated nodes, and workers that really talk."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from flashvl.model.loading import load_model
from tests.support.cluster import workers
from tests.support.stages import assert_every_row_once

NODES, GPUS_A_NODE = 5, 8
NUM_WORKERS = NODES * GPUS_A_NODE
NUM_ROWS = 2 * NUM_WORKERS - 5
"""A row for each worker in the first step, and none for five of them in the last."""
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

TRAIN_WITHOUT_NCCL = """
import json, sys
import ray
from ray.train.torch import TorchConfig
from ray.util.placement_group import placement_group_table
from flashvl.entrypoint import start_ray
from flashvl.train.recipe import load_recipe
from flashvl.train.run import attempts
from flashvl.train.run.launch import run

start_ray()
attempts.TorchConfig = lambda **options: TorchConfig(**options | {"backend": "gloo"})

def tell(*_):
    held = [each for each in placement_group_table().values() if each["state"] == "CREATED"]
    for group in held:
        print(json.dumps(list(group["bundles_to_node_id"].values())), flush=True)

run(load_recipe(sys.argv[1], sys.argv[2:]), tell)
"""
"""`flashvl train`, whose workers reserve GPUs and talk by gloo, as NCCL would need real ones. With
each step it prints the nodes of each placement group's bundles."""


@pytest.fixture(scope="module")
def cluster(starts_ray: None) -> Iterator[Cluster]:
    """Five nodes of eight GPUs, which exist in Ray's books alone."""
    with pytest.MonkeyPatch.context() as environment:
        # Forty workers fill 24 GB: no idle processes beside them, and swap may hold what is unused.
        environment.setenv("RAY_prestart_worker_first_driver", "0")
        environment.setenv("RAY_enable_worker_prestart", "0")
        environment.setenv("RAY_memory_monitor_refresh_ms", "0")
        cluster = Cluster(initialize_head=True, head_node_args=NODE)
        for _ in range(NODES - 1):
            cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


def environment_of(cluster: Cluster) -> dict[str, str]:
    return os.environ | {"RAY_ADDRESS": cluster.address, "HF_HUB_OFFLINE": "1"}


def run_on(cluster: Cluster, *command: str) -> str:
    """What a command prints that is connected to the cluster."""
    environment = environment_of(cluster)
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def watch_memory(cluster: Cluster, run: "subprocess.Popen[bytes]") -> dict[int, int]:
    """The most memory of each training process, by its number, until the command has ended.

    A page that several processes share counts for each by its part (proportional set size), and so
    does one that is swapped out.
    """
    most: dict[int, int] = {}
    while run.poll() is None:
        for process in workers(cluster, "ray::RayTrainWorker"):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                memory = process.memory_full_info()
                size = memory.pss + memory.swap
                most[process.pid] = max(most.get(process.pid, 0), size)
        time.sleep(5)
    return most


def options_of(file: Path, output: Path, num_workers: int, use_gpu: bool) -> list[str]:
    settings = {"output_dir": output, "num_workers": num_workers, "use_gpu": use_gpu}
    return [str(file), "save_steps=1", *(f"{name}={settings[name]}" for name in settings)]


def read_log(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "training_log.json").read_text()))


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in read_log(output)["steps"]]


def last_checkpoint(output: Path) -> Path:
    return max((output / "checkpoints").iterdir())


def distance(one: Path, other: Path) -> float:
    """Euclidean distance between the weights of two models."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    squares = [(first[name].double() - second[name].double()).square().sum() for name in first]
    return float(torch.stack(squares).sum().sqrt())


def recipe(folder: Path, model: Path) -> Path:
    """A small stage; its file is JSON, which is YAML."""
    path = folder / "stage.yaml"
    values = {
        "kind": "supervised",
        "stage": "scale",
        "init_from": str(model),
        "data": {"synthetic": {"count": NUM_ROWS, "seed": 5}},
        "global_batch_size": NUM_WORKERS,
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    psutil.virtual_memory().total + psutil.swap_memory().total < 28 * 2**30,
    reason="forty workers need 28 GiB of memory and swap",
)
def test_forty_workers_train_as_one_and_another_number_goes_on(
    cluster: Cluster, tiny_random: Path, tmp_path: Path
) -> None:
    """Forty processes with a logical GPU each make two steps; one goes on from their checkpoint."""
    file, forty, one = recipe(tmp_path, tiny_random), tmp_path / "forty", tmp_path / "one"
    command = ["-c", TRAIN_WITHOUT_NCCL, *options_of(file, forty, NUM_WORKERS, True)]
    began_s = time.monotonic()
    with (tmp_path / "placed").open("wb") as placed, (tmp_path / "errors").open("wb") as errors:
        run = subprocess.Popen(
            [sys.executable, *command], env=environment_of(cluster), stdout=placed, stderr=errors
        )
        sizes = watch_memory(cluster, run)
    assert run.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    assert len(sizes) == NUM_WORKERS
    figures = {
        "MB of a worker": round(max(sizes.values()) / 1e6),
        "GB in all": round(sum(sizes.values()) / 1e9, 1),
        "seconds in all": round(time.monotonic() - began_s),
        "seconds of the steps": round(read_log(forty)["totals"]["seconds"], 1),
    }
    print(json.dumps(figures))  # noqa: T201
    assert sum(sizes.values()) < 20e9, figures

    groups = map(json.loads, (tmp_path / "placed").read_text().splitlines())
    assert sorted(Counter(max(groups, key=len)).values()) == [GPUS_A_NODE] * NODES

    begun = tmp_path / "begun"
    shutil.copytree(forty, begun)  # as after the first step: no model, no later checkpoint
    (begun / "config.json").unlink()
    shutil.rmtree(last_checkpoint(begun))
    checkpoint = last_checkpoint(begun)
    assert len(list(checkpoint.glob("*.safetensors"))) == NUM_WORKERS
    for output in (one, begun):
        run_on(cluster, "-m", "flashvl", "train", *options_of(file, output, 1, False))
    first, second = losses(one)
    for output in (forty, begun):
        assert losses(output) == pytest.approx([first, second], rel=1e-5)
        assert [step["samples"] for step in read_log(output)["steps"]] == [NUM_WORKERS, 35]
        assert_every_row_once(output, 2, NUM_ROWS)
        assert not list(output.rglob("dead_letters/*.parquet"))
        assert distance(output, one) < 1e-2 * distance(one, tiny_random)
    load_model(forty)
