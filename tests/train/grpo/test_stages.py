"""Stages of GRPO on Ray Train and DeepSpeed, killed and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvl.model.loading import load_model
from flashvl.progress import ignore_progress
from flashvl.train.grpo.gallery import PAGE
from flashvl.train.recipe import GrpoRecipe
from flashvl.train.run.export import read_log
from flashvl.train.run.launch import run
from flashvl.train.run.stage import StageResult
from tests.support.problems import problems, write_problems
from tests.support.processes import kill_worker

NUM_STEPS, GLOBAL_BATCH = 20, 3
LORA = {"r": 4, "alpha": 8}


Stage = Callable[..., StageResult]


@pytest.fixture
def stage(ray_cluster: None, tiny_iss_random: Path, tmp_path: Path) -> Stage:
    """Run a stage; keyword arguments replace its recipe's keys."""

    def run_stage(
        name: str,
        num_steps: int = NUM_STEPS,
        on_progress: Callable[..., None] = ignore_progress,
        **changes: Any,
    ) -> StageResult:
        table = tmp_path / f"table-{num_steps}"
        if not table.exists():
            write_problems(table, problems(num_steps * GLOBAL_BATCH, with_text_only=True))
        recipe = {
            "kind": "grpo",
            "stage": "test",
            "init_from": str(tiny_iss_random),
            "output_dir": tmp_path / name,
            "data": {"parquet": str(table)},
            "trainable": ["multi_modal_projector", "language_model"],
            "global_batch_size": GLOBAL_BATCH,
            "num_generations": 5,
            "max_completion_length": 8,
            "max_length": 300,
            "token_budget": 400,
            "rewards": {"tests.support.rewards.undefined": 1.0, "format": 1.0},
            "num_workers": 2,
            "use_gpu": False,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "save_steps": 5,
        }
        return run(GrpoRecipe.model_validate(recipe | changes), on_progress)

    return run_stage


DRAWN = ("reward", "reward_undefined", "completion_length", "undefined_share")
"""Figures that tell which completions were drawn."""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_killed_stage_goes_on_with_the_same_completions(
    zero_stage: int, lora: dict[str, int] | None, stage: Stage, tmp_path: Path
) -> None:
    """Two ranks, uneven images and prompts without any; no prompt is used twice."""
    undisturbed = stage("undisturbed", zero_stage=zero_stage, lora=lora)
    kills = [8]

    def disturb(done: int, total: int, note: str = "") -> None:
        if kills and done >= kills[0]:
            kills.pop(0)
            kill_worker()

    result = stage("killed", on_progress=disturb, zero_stage=zero_stage, lora=lora)
    assert not kills
    assert result.num_trained == undisturbed.num_trained == NUM_STEPS * GLOBAL_BATCH
    log, truth = read_log(result.checkpoint), read_log(undisturbed.checkpoint)
    assert [record["step"] for record in log] == list(range(1, NUM_STEPS + 1))
    for record, wanted in zip(log, truth, strict=True):
        for name in DRAWN:
            assert record.get(name) == pytest.approx(wanted.get(name)), (record["step"], name)
        assert record["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert record["logprob_difference"] < 1e-4
    assert any(record["kl"] > 1e-4 for record in log)
    assert (Path(result.checkpoint) / PAGE).is_file()
    last = max((Path(result.checkpoint) / "checkpoints").iterdir())
    bits = np.unpackbits(np.frombuffer((last / "consumed.bin").read_bytes(), np.uint8))
    assert bits[: NUM_STEPS * GLOBAL_BATCH].all()
    weights, others = (load_model(each.checkpoint).state_dict() for each in (result, undisturbed))
    for name, weight in weights.items():
        assert np.allclose(weight.numpy(), others[name].numpy(), atol=1e-5), name


@pytest.mark.long
def test_two_steps_of_a_stage(stage: Stage, tmp_path: Path) -> None:
    told: list[str] = []
    held_out = write_problems(tmp_path / "held-out", problems(4))
    result = stage(
        "short",
        num_steps=2,
        on_progress=lambda done, total, note="": told.append(note),
        eval_data={"parquet": str(held_out)},
    )
    records = read_log(result.checkpoint)
    assert [record["samples"] for record in records] == [GLOBAL_BATCH] * 2
    assert {"reward", "kl", "entropy", "rollout_s", "update_s", "cut_share"} <= records[0].keys()
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert "eval_reward" in records[-1]
    assert any("rollout" in note and "KL" in note for note in told)
    assert (Path(result.checkpoint) / PAGE).is_file()
