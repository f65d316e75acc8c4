"""Evaluation during a stage whose training rows fill the memory of a small cluster."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

WINDOW_ROWS, NUM_WINDOWS, GLOBAL_BATCH = 1024, 4, 64
"""One worker leaves three CPUs to three of the windows, none of which the memory has room for."""
NODE = {"num_cpus": 4, "object_store_memory": 80 * 2**20}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_held_out_rows_need_no_cpu_that_training_rows_wait_with(
    starts_ray: None, tiny_random: Path, tmp_path: Path
) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    values = {
        "kind": "supervised",
        "stage": "evaluated",
        "init_from": str(tiny_random),
        "output_dir": str(output),
        "data": {"synthetic": {"count": NUM_WINDOWS * WINDOW_ROWS, "seed": 5}},
        "eval_data": {"synthetic": {"count": 16, "seed": 6, "split": "heldout"}},
        "eval_steps": 2,
        "trainable": ["multi_modal_projector"],
        "global_batch_size": GLOBAL_BATCH,
        "token_budget": 1000,
        "max_length": 1000,
        "num_workers": 1,
        "use_gpu": False,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "hang_timeout_s": 60,
    }
    recipe.write_text(json.dumps(values))
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        environment = os.environ | {"RAY_ADDRESS": cluster.address}
        command = [sys.executable, "-m", "flashvl", "train", str(recipe)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        cluster.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads((output / "training_log.json").read_text())["steps"]
    measured = [record["step"] for record in steps if "eval_loss" in record]
    assert measured == list(range(2, NUM_WINDOWS * WINDOW_ROWS // GLOBAL_BATCH + 1, 2))
