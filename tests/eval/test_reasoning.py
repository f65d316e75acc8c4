"""The miniature of preferences and reasoning: its tables, verdicts and curves, and a real run."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashvl.data.synthetic import REASONING_TASKS, TASKS
from flashvl.eval.curves import plot_preferences, plot_reasoning
from flashvl.eval.reasoning import (
    Preference,
    Reasoner,
    Scores,
    judge,
    render_preferences,
    render_reasoning,
)
from flashvl.eval.scenes import TaskScore
from flashvl.train.pipeline import load_pipeline
from tests.support.recipes import CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def scores(reading: float, reasoning: float) -> Scores:
    return {
        task: TaskScore(items=120, exact_match=value)
        for tasks, value in ((TASKS, reading), (REASONING_TASKS, reasoning))
        for task in tasks
    }


def preference(seed: int, accuracy: float, reading: float) -> Preference:
    return Preference(seed=seed, accuracy=accuracy, margin=1.0, scores=scores(reading, 0.0))


BEFORE = scores(0.93, 0.0)
BASE = scores(0.92, 0.25)
AFTER = [preference(0, 0.9, 0.93), preference(1, 0.8, 0.94), preference(2, 0.85, 0.93)]
GAINS = {"SFT": (0.5, 0.54), "RL": (0.35, 0.41), "SFT+RL": (0.6, 0.62)}
TRAINED = [
    Reasoner(seed=seed, way=way, scores=scores(0.91, value))
    for way, values in GAINS.items()
    for seed, value in enumerate(values)
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_hold_mean_and_spread() -> None:
    lines = [cells(line) for line in render_preferences(BEFORE, AFTER).splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert lines[0][-1] == "exact match, 600 items"
    assert lines[2] == ["tiny", "0.500", "0.000", "0.930"]
    mean, deviation = map(float, lines[-1][1].split(" +- "))
    assert mean == pytest.approx(0.85, abs=5e-4)
    assert deviation == pytest.approx(0.05, abs=5e-4)  # 0.8, 0.85, 0.9

    lines = [cells(line) for line in render_reasoning(BASE, TRAINED).splitlines()]
    assert len({len(line) for line in lines}) == 1
    assert lines[0][1:6] == list(REASONING_TASKS)
    assert lines[0][6] == "mean of 600 items"
    table = {line[0]: line[6:] for line in lines}
    assert table["base"] == ["0.250", "0.920"]
    for way, values in GAINS.items():
        mean, deviation = map(float, table[f"+ {way}, mean and spread"][0].split(" +- "))
        assert mean == pytest.approx(sum(values) / 2, abs=5e-4)
        assert deviation == pytest.approx(statistics.stdev(values), abs=5e-4)
        assert float(table[f"+ {way}, seed 1"][0]) == values[1]


def test_what_was_to_be_shown_is_judged_claim_by_claim() -> None:
    assert all(judge(BEFORE, AFTER, BASE, TRAINED).values())
    worse = [Reasoner(seed=0, way=way, scores=scores(0.89, 0.2)) for way in GAINS]
    assert list(judge(BEFORE, AFTER, BASE, worse).values()) == [True, True, *[False] * 4]
    weak = [preference(0, 0.7, 0.92)]
    assert list(judge(BEFORE, weak, BASE, TRAINED).values()) == [False, False, *[True] * 4]


def test_curves_are_drawn(tmp_path: Path) -> None:
    steps = range(1, 31)
    dpo: list[dict[str, Any]] = [{"step": step, "loss": 0.6} for step in steps]
    for record in dpo[9::10]:
        record |= {"eval_accuracy": 0.9, "eval_reward_chosen": 0.2, "eval_reward_rejected": -1.0}
    sft = [{"step": step, "loss": 1 / step} for step in steps]
    rl = [{"step": step, "reward": 0.01 * step, "completion_length": 20.0} for step in steps]
    plot_preferences([dpo, dpo], tmp_path / "preference.png")
    plot_reasoning({"SFT": [sft], "RL": [rl, rl], "SFT+RL": [rl]}, tmp_path / "reasoning.png")
    for name, num_lines in (("preference", 2), ("reasoning", 3)):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"
            colors = {color for _, color in image.convert("RGB").getcolors(2**24) or []}
        # Blue, red and, for SFT, grey are there.
        assert sum(min(each) < 180 and len(set(each)) > 1 for each in colors) >= num_lines


def test_the_recipes_draw_other_scenes_in_each_stage_and_evaluate_held_out_ones() -> None:
    recipes = load_pipeline(CONFIGS / "pipelines" / "tiny-reasoning.yaml").recipes()
    found = [recipe.data.synthetic for recipe in recipes]
    data = [each for each in found if each is not None]
    assert len({each.seed for each in data}) == len(recipes) == 5
    assert all(each.split == "train" for each in data)
    assert recipes[0].eval_data is not None
    assert recipes[0].eval_data.synthetic is not None
    assert recipes[0].eval_data.synthetic.split == "heldout"
    assert recipes[0].eval_data.synthetic.count >= 600


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_miniature_resumes_and_writes_its_tables(starts_ray: None, tmp_path: Path) -> None:
    """Not what is learnt, which takes an hour, but the whole chain on a few rows."""
    runs = tmp_path / "runs"

    def run() -> str:
        sizes = ["data.synthetic.count=40", "save_steps=2"]
        options = ["--seeds", "0", "--items", "4", "--runs", str(runs)]
        done = subprocess.run(
            [sys.executable, str(ROOT / "ray_jobs" / "reasoning.py"), *sizes, *options],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    assert "| + SFT+RL, seed 0 |" in first
    figures = json.loads((runs / "scores.json").read_text())
    assert len(figures["claims"]) == 6
    assert {each["way"] for each in figures["reasoning"]} == set(GAINS)
    last = runs / "seed-0" / "sft-rl"
    made = {path: path.stat().st_mtime_ns for path in runs.rglob("model.safetensors")}
    assert len(made) == 6
    shutil.rmtree(last)  # as if the run had been interrupted before this stage
    second = run()
    remade = {path for path, time in made.items() if path.stat().st_mtime_ns != time}
    assert remade == {last / "model.safetensors"}

    def tables(text: str) -> list[str]:
        return re.findall(r"^\|.*\|$", text, re.MULTILINE)

    assert tables(first) == tables(second)
    assert (runs / "preference.png").is_file()
    assert (runs / "reasoning.png").is_file()
