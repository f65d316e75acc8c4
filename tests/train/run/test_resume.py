"""Stages that are stopped, killed and resumed, also at another number of workers."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvl.data.storage import locate
from flashvl.errors import FlashVLError
from flashvl.progress import ignore_progress
from flashvl.train.recipe import RECIPES
from flashvl.train.run.checkpoint import list_checkpoints, remove_folder
from flashvl.train.run.export import read_log
from flashvl.train.run.launch import run
from flashvl.train.run.stage import StageResult
from tests.support.processes import kill_worker
from tests.support.stages import assert_every_row_once
from tests.support.stores import s3_bucket

NUM_ROWS, GLOBAL_BATCH = 480, 8
NUM_STEPS = NUM_ROWS // GLOBAL_BATCH


@pytest.fixture(scope="module")
def stage(ray_cluster: None, tiny_random: Path) -> Callable[..., StageResult]:
    """Run a stage of sixty steps; keyword arguments replace its recipe's keys."""

    def run_stage(
        output: Path | str, on_progress: Callable[..., None] = ignore_progress, **changes: object
    ) -> StageResult:
        recipe = {
            "kind": "supervised",
            "stage": "test",
            "init_from": str(tiny_random),
            "output_dir": output,
            "data": {"synthetic": {"count": NUM_ROWS, "seed": 5}},
            "trainable": ["multi_modal_projector"],
            "global_batch_size": GLOBAL_BATCH,
            "token_budget": 1000,
            "max_length": 1000,
            "num_workers": 2,
            "use_gpu": False,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_steps": 10,
        }
        return run(RECIPES["supervised"].model_validate(recipe | changes), on_progress)

    return run_stage


@pytest.mark.slow
def test_a_killed_worker_and_sigterm_change_nothing_but_the_time(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    """Two workers, one killed; then SIGTERM; then one worker without ZeRO makes the rest."""
    undisturbed = stage(tmp_path / "undisturbed")
    events: list[Any] = [kill_worker, lambda: os.kill(os.getpid(), signal.SIGTERM)]

    def disturb(done: int, total: int, note: str = "") -> None:
        if events and done > 20 - 10 * len(events):
            events.pop(0)()

    output = tmp_path / "disturbed"
    with pytest.raises(FlashVLError, match=r"stopped by SIGTERM; step \d+ of 60 is saved"):
        stage(output, disturb)
    assert not events
    result = stage(output, num_workers=1, zero_stage=0)
    assert result.num_trained == undisturbed.num_trained == NUM_ROWS
    assert_every_row_once(output, NUM_STEPS, NUM_ROWS)
    losses = [record["loss"] for record in read_log(output)]
    truth = [record["loss"] for record in read_log(tmp_path / "undisturbed")]
    assert losses == pytest.approx(truth, abs=1e-4)
    state = json.loads((max((output / "checkpoints").iterdir()) / "state.json").read_text())
    assert state["step"] == state["adam_step"] == NUM_STEPS


@pytest.mark.slow
def test_a_stage_on_an_object_store_resumes_there(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    with s3_bucket() as (_, uri):
        result = stage(uri.format("run"), save_steps=30)
        output = locate(uri.format("run"))
        assert (output / "config.json").is_file()
        assert list((output / "runs").names())
        assert result.num_trained == NUM_ROWS
        truth = (output / "training_log.json").read()
        for name in ("config.json", "training_log.json"):
            (output / name).remove()
        remove_folder(list_checkpoints(output)[-1].folder)
        assert stage(uri.format("run"), save_steps=30, num_workers=1).num_trained == NUM_ROWS
        logs = [json.loads(log) for log in (truth, (output / "training_log.json").read())]
    first, second = ([record["loss"] for record in log["steps"]] for log in logs)
    assert second == pytest.approx(first, abs=1e-4)
