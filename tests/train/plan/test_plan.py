"""The plan: the paper's whole training, arithmetic, what does not fit, and every recipe."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.errors import ConfigError
from flashvl.model.presets import build_config
from flashvl.train.parameters import MODEL_PARTS, Parameters, count_parameters
from flashvl.train.plan.assumptions import Assumptions
from flashvl.train.plan.memory import sending_bytes, state_bytes
from flashvl.train.plan.plan import Plan, build_plan
from flashvl.train.plan.report import describe_plan
from flashvl.train.recipe import load_recipe
from tests.support.recipes import CONFIGS, RECIPES, name_of

A100S = {"gpus": 40, "gpu": "a100-80g"}


def plan(name: str, *overrides: str, **assumptions: Any) -> Plan:
    return build_plan(load_recipe(CONFIGS / name, overrides), Assumptions(**assumptions))


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_in_the_repository_is_planned(path: Path) -> None:
    recipe = load_recipe(path)
    made = build_plan(recipe, Assumptions())
    assert made.num_gpus == recipe.num_workers
    assert made.num_steps == math.ceil(made.num_rows / recipe.global_batch_size)
    assert 0 < made.memory.total <= made.usable_bytes
    assert made.largest_token_budget >= recipe.token_budget // 256 * 256
    assert describe_plan(made)


@pytest.mark.parametrize(
    ("stage", "gpu_hours", "hours", "rows_per_s", "steps"),
    [
        (1, {0.3: 111, 0.4: 83, 0.5: 66}, 2.1, 33.4, 41_667),
        (2, {0.3: 498, 0.4: 373, 0.5: 299}, 9.3, 17.9, 100_000),
        (3, {0.3: 124, 0.4: 93, 0.5: 75}, 2.3, 17.9, 25_000),
        (4, {0.3: 207, 0.4: 156, 0.5: 124}, 3.9, 17.9, 41_667),
    ],
)
def test_the_papers_stages_take_what_was_computed_by_hand(
    stage: int, gpu_hours: dict[float, float], hours: float, rows_per_s: float, steps: int
) -> None:
    """The table that was made before the code, from the sizes of the layers alone."""
    for mfu, expected in gpu_hours.items():
        made = plan(f"static/stage{stage}.yaml", mfu=mfu, **A100S)
        assert made.gpu_hours == pytest.approx(expected, rel=0.02)
    made = plan(f"static/stage{stage}.yaml", **A100S)
    assert made.hours == pytest.approx(hours, rel=0.03)
    assert made.rows_per_s_of_a_gpu == pytest.approx(rows_per_s, rel=0.01)
    assert made.num_steps == steps


def test_network_and_feed_are_those_computed_by_hand() -> None:
    """Stage 2: 8.2 GB for 4.1 GB of gradients, 0.33 s at 25 GB/s; 716 rows/s."""
    made = plan("static/stage2.yaml", network=25, **A100S)
    assert made.network.gradient_bytes == pytest.approx(8.2e9, rel=0.03)
    assert made.network.gradient_bytes / 25e9 == pytest.approx(0.33, rel=0.04)
    assert made.step_s == pytest.approx(made.network.seconds, rel=0.01)
    assert made.network.seconds > made.compute_s
    assert "The network bounds the step" in describe_plan(made)
    made = plan("static/stage2.yaml", **A100S)
    assert made.step_s == pytest.approx(made.compute_s, rel=0.01)
    assert made.compute_s == pytest.approx(0.34, rel=0.02)
    assert made.update_s == pytest.approx(28 * 2.0527e9 / 40 / 2039e9, rel=0.01)
    assert made.loading.rows_per_s == pytest.approx(716, rel=0.01)
    assert 5.9 < made.loading.cores < 12  # "6-12 decode cores"


def test_the_papers_whole_training_takes_what_was_computed_by_hand() -> None:
    """707 GPU-hours and 17.7 hours at 40% for stages 1 to 5; reasoning comes on top."""
    path = str(CONFIGS / "pipelines" / "static.yaml")
    arguments = ["plan", path, "--gpus", "40", "--gpu", "a100-80g"]
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    stages = values["stages"][:5]
    assert sum(stage["gpu_hours"] for stage in stages) == pytest.approx(707, rel=0.02)
    assert sum(stage["hours"] for stage in stages) == pytest.approx(17.7, rel=0.02)
    assert sum(stage["num_rows"] for stage in stages) == 50_087_000
    assert values["gpu_hours"] > sum(stage["gpu_hours"] for stage in stages)
    table = CliRunner().invoke(app, [*arguments, "--price", "1.8"]).stdout.splitlines()
    assert [line.split()[0] for line in table[3:11]] == [
        "stage1",
        "stage2",
        "stage3",
        "stage4",
        "stage5",
        "reasoning_sft",
        "grpo",
        "all",
    ]
    assert all(len(line) < 100 for line in table)


def test_a_pair_takes_what_was_computed_by_hand() -> None:
    """The tower once; the LLM thrice over 256 visual tokens and two answers of 200: the policy's
    forward and backward pass, which has no gradients of weights, and the reference's forward."""
    made = plan("static/stage5.yaml", **A100S)
    assert made.num_steps == 363
    tower = 2 * 0.4115 * 1024 + 27 * 4 * 1024**2 * 1152 / 1e9
    blocks = 2 * 1.3103 * (256 + 2 * 200)
    ends = 2 * 0.2334 * 2 * 200 + 2 * 0.0954 * 256
    assert made.tflop_of_a_row == pytest.approx((tower + 3 * (blocks + ends)) / 1e3, rel=0.03)


def test_a_copy_of_the_weights_is_the_reference_of_whole_weights() -> None:
    lora = plan("static/stage5.yaml", **A100S)
    whole = plan("static/stage5.yaml", "lora=null", "num_trainable_params=null", **A100S)
    assert lora.memory.reference == 0
    tower = whole.parameters.total["vision_tower"]
    assert whole.memory.reference == 2 * (whole.parameters.num_total - tower)


def test_table_1s_numbers_of_trained_parameters() -> None:
    """The paper's M is 2^20; it counts neither embeddings nor heads."""
    config = build_config("static")
    adapter = count_parameters(config, ["multi_modal_projector"])
    assert adapter.num_trained == adapter.paper_count == 95_445_504
    assert f"{adapter.paper_millions:.2f}" == "91.02"
    full = count_parameters(config, MODEL_PARTS)
    blocks_and_norm = 411_468_912  # of SigLIP2
    without_embedding = 1_543_714_304 - 233_373_696  # Qwen2.5
    assert full.paper_count == blocks_and_norm + 95_445_504 + without_embedding
    assert f"{full.paper_millions:.2f}" == "1733.07"


def test_states_of_zero_follow_the_papers_formulas() -> None:
    """ZeRO, figure 1: 16 bytes a parameter on one GPU, of which 12 are shared by all in stage 1."""
    numbers = Parameters(total={"all": 7_500}, trained={"all": 7_500}, paper_count=0)
    alone = state_bytes(numbers, precision="bf16", zero_stage=0, num_workers=64)
    assert (alone.weights, alone.gradients, alone.optimizer) == (15_000, 15_000, 90_000)
    shared = state_bytes(numbers, precision="bf16", zero_stage=1, num_workers=64)
    assert shared.optimizer == 12 * math.ceil(7_500 / 64)
    assert state_bytes(numbers, precision="bf16", zero_stage=2, num_workers=64).gradients < 500
    assert sending_bytes(
        numbers, precision="bf16", zero_stage=0, num_workers=2, micro_batches=3
    ) == (15_000, 0)
    gathered = sending_bytes(
        numbers, precision="bf16", zero_stage=3, num_workers=2, micro_batches=1
    )
    assert gathered == (7_500, 15_000)


def test_checkpoints_hold_three_numbers_in_fp32() -> None:
    made = plan("static/stage1.yaml", store=2, **A100S)
    assert made.checkpoints.size_bytes == 12 * 95_445_504
    assert made.checkpoints.write_s == pytest.approx(0.573, rel=0.01)
    assert made.checkpoints.count == math.ceil(41_667 / 500)


def test_the_largest_token_budget_fits_and_the_next_does_not() -> None:
    most = plan("static/stage2.yaml").largest_token_budget
    assert plan("static/stage2.yaml", f"token_budget={most}").memory.total
    with pytest.raises(ConfigError, match=f"set token_budget={most}|gradient_checkpointing"):
        plan("static/stage2.yaml", f"token_budget={most + 256}")


@pytest.mark.parametrize(
    ("overrides", "assumptions", "message"),
    [
        (["token_budget=16384"], {"gpu": "a100-80g"}, "set token_budget="),
        (
            [],
            {"gpu": "a100-40g"},
            "has 36.0 GiB for it; set gradient_checkpointing=true",
        ),
        (["zero_stage=0"], {"gpu": "a100-40g"}, "set zero_stage=1 gradient_checkpointing=true"),
        ([], {"gpu": "h800"}, "unknown GPU 'h800'; known GPUs: a100-40g, a100-80g"),
        ([], {"gpus": 400}, "400 GPUs are more than the 240 rows of a step"),
        (["num_trainable_params=5"], {}, "num_trainable_params (5) is not the number"),
        (["preset="], {}, "name the preset of its shapes"),
        (["preset=statik"], {}, "unknown preset 'statik'"),
        (["data={parquet: /nowhere}"], {}, "give the number of its rows by --rows"),
        (["data={mixture: /nowhere.yaml}"], {}, "/nowhere.yaml"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    overrides: list[str], assumptions: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        plan("static/stage2.yaml", *overrides, **assumptions)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_refusal_proposes_fits() -> None:
    tight = {"gpu": "a100-40g"}
    assert plan("static/stage2.yaml", "gradient_checkpointing=true", **tight).memory.total


def test_gradient_checkpointing_takes_time_and_saves_memory() -> None:
    kept, computed_again = (
        plan("static/stage2.yaml", f"gradient_checkpointing={value}") for value in (False, True)
    )
    assert computed_again.memory.activations < kept.memory.activations / 5
    assert 1.2 < computed_again.compute_s / kept.compute_s < 4 / 3
    assert computed_again.tflop_of_a_row == kept.tflop_of_a_row


def test_rows_of_the_procedural_world_are_measured() -> None:
    """The shipped tiny is there, and so is its world: 16 visual tokens a picture."""
    made = plan("tiny/stage2.yaml", "init_from=tiny")
    assert made.row.source == "means of 64 rows"
    assert made.row.visual_tokens == 16
    assert 20 < made.row.text_tokens < 200
    assert 0 < made.row.num_labels < made.row.text_tokens


def test_a_plan_needs_no_ray() -> None:
    # A None in sys.modules makes the import fail, as where the library is not installed.
    code = "import sys; sys.modules['ray'] = None; from flashvl.cli import app; app()"
    recipe = str(CONFIGS / "static" / "stage2.yaml")
    done = subprocess.run([sys.executable, "-c", code, "plan", recipe], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_command_prints_a_table_or_json() -> None:
    recipe = str(CONFIGS / "static" / "stage2.yaml")
    arguments = ["plan", recipe, "--gpus", "40", "--gpu", "a100-80g", "--price", "1.8"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("24,000,000 rows on 40 x A100 80 GB", "gradients", "GPU-hours", "1.8 a GPU-hour"):
        assert text in shown.stdout
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert values["cost"] == pytest.approx(values["gpu_hours"] * 1.8)
    parts = {name: size for name, size in values["memory"].items() if name != "total"}
    assert values["memory"]["total"] == sum(parts.values())
    assert values["parameters"]["paper_millions"] == 1733.07


GRPO = """
kind: grpo
stage: grpo
preset: static
init_from: runs/static/stage4
output_dir: runs/static/grpo
data: {synthetic: {count: 8000}}
trainable: [multi_modal_projector, language_model]
lora: {r: 16, alpha: 32}
token_budget: 8192
"""


def test_completions_take_what_was_computed_by_hand(tmp_path: Path) -> None:
    """On 40 GPUs 10 prompts of 24 are 6 completions a GPU; each of 400 tokens reads 3.1 GB."""
    (tmp_path / "grpo.yaml").write_text(GRPO)
    recipe = load_recipe(tmp_path / "grpo.yaml")
    made = build_plan(recipe, Assumptions(text_tokens=400, **A100S))
    assert (made.num_steps, made.rows_of_a_gpu) == (800, 1)
    assert made.row.branches == (400.0,) * 6
    assert made.row.num_tokens == 256 + 6 * 400
    bandwidth = 0.5 * 2039e9
    assert made.rollout_s == pytest.approx(400 * 1.5437e9 * 2 / bandwidth, rel=0.05)
    tower = 2 * 0.4115 * 1024 + 27 * 4 * 1024**2 * 1152 / 1e9
    blocks = 2 * 1.3103 * (256 + 6 * 400)
    ends = 2 * 0.2334 * 6 * 400 + 2 * 0.0954 * 256
    assert made.tflop_of_a_row == pytest.approx((tower + 3 * (blocks + ends)) / 1e3, rel=0.05)
    assert made.step_s == pytest.approx(made.compute_s + made.rollout_s, rel=0.05)
    assert "rollouts" in describe_plan(made)
    with pytest.raises(ConfigError, match="241 GPUs are more than the 240 completions of a step"):
        build_plan(recipe, Assumptions(gpus=241))
