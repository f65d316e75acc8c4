"""Stages of two workers in which something goes wrong: what the user is told, and what is left."""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashvl.data.storage import locate
from flashvl.errors import FlashVLError
from flashvl.train.feed.shares import Share
from flashvl.train.recipe import RECIPES
from flashvl.train.run import attempts, worker
from flashvl.train.run.checkpoint import list_checkpoints
from flashvl.train.run.export import read_log
from flashvl.train.run.failures import RankError
from flashvl.train.run.launch import run
from flashvl.train.run.loop import Loop
from flashvl.train.run.stage import StageResult

NUM_STEPS, GLOBAL_BATCH = 8, 8

Happen = Callable[[Loop, Share], None]
"""What happens on each rank before it makes a step."""


@pytest.fixture(scope="module")
def stage(ray_cluster: None, tiny_random: Path) -> Callable[..., StageResult]:
    """Run a stage, in which `happen` is called before each step."""

    def run_stage(output: Path, happen: Happen | None = None, **changes: object) -> StageResult:
        recipe = {
            "kind": "supervised",
            "stage": "test",
            "init_from": str(tiny_random),
            "output_dir": output,
            "data": {"synthetic": {"count": NUM_STEPS * GLOBAL_BATCH, "seed": 5}},
            "trainable": ["multi_modal_projector"],
            "global_batch_size": GLOBAL_BATCH,
            "token_budget": 1000,
            "max_length": 1000,
            "num_workers": 2,
            "use_gpu": False,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "save_steps": 2,
        }
        with pytest.MonkeyPatch.context() as patch:
            if happen is not None:
                patch.setattr(attempts, "train_worker", worker_in_which(happen))
            return run(RECIPES["supervised"].model_validate(recipe | changes))

    return run_stage


def worker_in_which(happen: Happen) -> Callable[[dict[str, Any]], None]:
    """A worker's function that calls `happen` before each step."""

    def work(config: dict[str, Any]) -> None:
        make_step = Loop._make_step

        def make_step_after(self: Loop, share: Share, wait_s: float) -> None:
            happen(self, share)
            make_step(self, share, wait_s)

        Loop._make_step = make_step_after  # type: ignore[method-assign]
        try:
            worker.train_worker(config)
        finally:
            Loop._make_step = make_step  # type: ignore[method-assign]

    return work


def raise_on_rank_1(loop: Loop, share: Share) -> None:
    if loop.rank == 1 and share.step == 3:
        raise ValueError("broken on purpose")


@pytest.mark.slow
def test_one_ranks_error_is_told_once_with_its_traceback(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    with pytest.raises(RankError) as raised:
        stage(tmp_path / "run", raise_on_rank_1)
    told = str(raised.value)
    assert told.startswith("rank 1 failed:")
    assert told.count("Traceback") == 1
    assert told.count("ValueError: broken on purpose") == 1
    assert "raise_on_rank_1" in told
    assert raised.value.__suppress_context__


def hang_on_rank_1(loop: Loop, share: Share) -> None:
    if loop.rank == 1 and share.step == 3:
        time.sleep(600)


@pytest.mark.slow
def test_a_hang_names_the_rank_that_lags_and_its_step(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    with pytest.raises(
        FlashVLError, match=r"hang_timeout_s \(8\): rank 1 \(step 4, data"
    ) as raised:
        stage(tmp_path / "run", hang_on_rank_1, hang_timeout_s=8)
    assert "rank 0 (step 4, compute" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert stage(tmp_path / "run").num_trained == NUM_STEPS * GLOBAL_BATCH


def fill_disk_of_rank_1(loop: Loop, share: Share) -> None:
    if loop.rank == 1 and share.step == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_disk_that_fills_ends_the_run_in_one_line_and_loses_nothing(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    with pytest.raises(FlashVLError, match=r"step 4 cannot be written .* make room") as raised:
        stage(tmp_path / "run", fill_disk_of_rank_1)
    assert "\n" not in str(raised.value)
    assert [each.state.step for each in list_checkpoints(locate(tmp_path / "run"))] == [2]
    assert stage(tmp_path / "run").num_trained == NUM_STEPS * GLOBAL_BATCH


def spoil_steps_3_and_4(loop: Loop, share: Share) -> None:
    """Let the loss of rank 1 be NaN."""
    loss = type(loop.objective).loss

    def spoiled(engine: Any, batch: Any, num_items: Any) -> Any:
        total, parts = loss(loop.objective, engine, batch, num_items)
        is_bad = loop.rank == 1 and share.step in (2, 3)
        factor = float("nan") if is_bad else 1.0
        return total * factor, parts * factor

    loop.objective.loss = spoiled  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_steps_whose_loss_is_nan_are_skipped(
    stage: Callable[..., StageResult], tmp_path: Path, zero_stage: int
) -> None:
    result = stage(tmp_path / "run", spoil_steps_3_and_4, zero_stage=zero_stage, save_steps=3)
    assert result.num_steps == NUM_STEPS - 2
    log = read_log(tmp_path / "run")
    assert [record["step"] for record in log if "skipped" in record] == [3, 4]
    assert all(0 < record["loss"] < 20 for record in log if "skipped" not in record)
    state = list_checkpoints(locate(tmp_path / "run"))[-1].state
    assert (state.step, state.adam_step, state.num_skipped) == (NUM_STEPS, NUM_STEPS - 2, 2)


@pytest.mark.slow
def test_too_many_skipped_steps_end_the_run(
    stage: Callable[..., StageResult], tmp_path: Path
) -> None:
    with pytest.raises(FlashVLError, match="step 4 is the 2th in a row that was skipped"):
        stage(tmp_path / "run", spoil_steps_3_and_4, max_skipped_steps=1)
