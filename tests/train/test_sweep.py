"""`flashvl train --sweep`: one trial for each value, told as a table, resumed, and refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flashvl.errors import ConfigError
from flashvl.train.sweep import Sweep, Trial, load_trials
from tests.support.recipes import CONFIGS

STAGE5 = CONFIGS / "static" / "stage5.yaml"


def test_a_trial_differs_in_its_value_and_its_folder() -> None:
    field, trials = load_trials(STAGE5, ["seed=3"], "lora.r=4, 8")
    assert field == "lora.r" and list(trials) == ["4", "8"]
    for value, recipe in trials.items():
        assert recipe.lora is not None
        assert (recipe.seed, str(recipe.lora.r)) == (3, value)
        assert recipe.output_dir == f"runs/static/stage5/lora.r={value}"
    _, trials = load_trials(STAGE5, [], "learning_rate=1e-6,5e-6")
    assert [recipe.learning_rate for recipe in trials.values()] == [1e-6, 5e-6]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("beta", "must name a field and at least two different values"),
        ("beta=0.1", "at least two different values"),
        ("beta=0.1,0.1", "at least two different values"),
        ("=1,2", "must name a field"),
        ("beta=0.1,", "at least two different values"),
        ("beta=0.1,-1", "beta=-1"),
        ("betta=1,2", "unknown key 'betta'. Did you mean 'beta'?"),
        ("output_dir=a,b", "cannot vary output_dir"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line(sweep: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_trials(STAGE5, [], sweep)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def trial(value: str, eval_loss: float | None, accuracy: float | None = None) -> Trial:
    return Trial(
        value=value, folder=f"runs/{value}", loss=1.0, eval_loss=eval_loss, eval_accuracy=accuracy
    )


def test_the_best_trial_is_the_most_accurate_or_that_of_the_lowest_loss() -> None:
    accurate = [trial("1", 0.2, 0.7), trial("2", 0.5, 0.9), trial("3", 0.4, 0.9)]
    assert Sweep(field="beta", trials=accurate).best.value == "3"
    assert Sweep(field="beta", trials=[trial("1", 0.4), trial("2", 0.3)]).best.value == "2"
    lines = str(Sweep(field="beta", trials=accurate)).splitlines()
    assert lines[0].split() == ["beta", "loss", "eval_loss", "accuracy", "folder"]
    assert lines[2].split() == ["2", "1.0000", "0.5000", "0.900", "runs/2"]
    assert lines[-1] == "best: beta=3"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trials_run_on_few_cores_and_are_told_again(
    starts_ray: None, tiny_random: Path, tmp_path: Path
) -> None:
    """Three trials, of which a Ray of three logical CPUs has room for one at a time."""
    recipe = {
        "kind": "dpo",
        "stage": "test",
        "init_from": str(tiny_random),
        "output_dir": str(tmp_path / "run"),
        "data": {"synthetic": {"count": 40, "tasks": ["caption"]}},
        "eval_data": {"synthetic": {"count": 8, "seed": 1, "tasks": ["caption"]}},
        "lora": {"r": 4},
        "global_batch_size": 8,
        "token_budget": 700,
        "max_length": 700,
        "num_workers": 2,
        "use_gpu": False,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "warmup_steps": 0,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "flashvl", "train", str(tmp_path / "recipe.yaml")]
    command += ["--sweep", "beta=0.1,0.5,2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [each["value"] for each in found["trials"]] == ["0.1", "0.5", "2"]
    for each in found["trials"]:
        folder = tmp_path / "run" / f"beta={each['value']}"
        assert each["folder"] == str(folder) and (folder / "config.json").is_file()
        log = json.loads((folder / "training_log.json").read_text())
        assert log["recipe"]["beta"] == float(each["value"])
        assert log["steps"][-1]["eval_accuracy"] == each["eval_accuracy"]
        assert log["totals"]["eval_loss"] == each["eval_loss"]
    assert len({each["eval_loss"] for each in found["trials"]}) == 3
    again = subprocess.run(command[:-1], capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[-1] == f"best: beta={found['best']}"

    broken = [*command[:-1], "init_from=/no/model"]
    done = subprocess.run(broken, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
