"""Real worlds of one, two and four workers: the same losses, step by step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from flashvl.entrypoint import start_ray
from flashvl.train.run.export import read_log
from flashvl.train.run.launch import run
from flashvl.train.recipe import RECIPES

start_ray(num_cpus=6)
for num_workers in (1, 2, 4):
    recipe = {
        "kind": "supervised",
        "stage": "test",
        "init_from": sys.argv[1],
        "output_dir": f"{sys.argv[2]}/{num_workers}",
        "data": {"synthetic": {"count": 45, "seed": 5, "words_share": 0.3}},
        "global_batch_size": 8,
        "token_budget": 400,
        "max_length": 400,
        "num_workers": num_workers,
        "use_gpu": False,
        "precision": "fp32",
        "learning_rate": 1e-4,
        "warmup_steps": 2,
    }
    result = run(RECIPES["supervised"].model_validate(recipe))
    print(json.dumps([record["loss"] for record in read_log(result.checkpoint)]))
"""


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_workers(
    starts_ray: None, tiny_iss_random: Path, tmp_path: Path
) -> None:
    """Eight rows on one worker, four on each of two, two on each of four; five in the last step."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_iss_random), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    one, two, four = map(json.loads, done.stdout.splitlines()[-3:])
    assert len(one) == 6
    assert two == pytest.approx(one, abs=1e-5)
    assert four == pytest.approx(one, abs=1e-5)
