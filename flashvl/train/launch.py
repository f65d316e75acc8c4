"""Start a stage on Ray Train, from a recipe to a finished checkpoint folder."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray.data import ExecutionOptions
from ray.train import DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from flashvl.data.pipeline import training_rows
from flashvl.errors import ConfigError
from flashvl.model.loading import load_processor, resolve_checkpoint
from flashvl.train.checkpoint import read_log
from flashvl.train.recipe import Recipe
from flashvl.train.supervised import train_worker

PROGRESS_INTERVAL_S = 1.0

Progress = Callable[[int, int, float], None]
"""Called with the steps done, the steps in all, and the last loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a finished stage reports."""

    checkpoint: Path
    num_steps: int
    loss: float
    """Of the last step."""
    seconds: float
    """In the training loop, without the start of the workers."""


def run(recipe: Recipe, on_progress: Progress | None = None) -> StageResult:
    """Train the stage on the Ray cluster that this process is connected to.

    Args:
        on_progress: called with the steps done, the steps in all, and the loss of the last.

    Raises:
        ConfigError, CheckpointError: before anything is started.
    """
    recipe = recipe.model_copy(
        update={
            "init_from": str(resolve_checkpoint(recipe.init_from).resolve()),
            "output_dir": _new_folder(recipe.output_dir),
        }
    )
    load_processor(recipe.init_from)
    num_rows = recipe.data.num_rows()
    num_steps = num_rows // recipe.global_batch_size
    if num_steps == 0:
        raise ConfigError(
            f"{num_rows} rows are less than one step of global_batch_size"
            f" ({recipe.global_batch_size}); give more rows or lower it"
        )
    rows = training_rows(
        recipe.data, recipe.init_from, recipe.max_length, recipe.per_device_train_batch_size
    )
    rows.context.enable_progress_bars = False  # the steps' progress is shown instead
    resources: dict[str, float] = {"CPU": recipe.threads_per_worker}
    if recipe.use_gpu:
        resources["GPU"] = 1
    progress = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "num_steps": num_steps,
            "progress": progress,
        },
        torch_config=TorchConfig(backend="nccl" if recipe.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=recipe.num_workers,
            use_gpu=recipe.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(name="ray", storage_path=str(recipe.output_dir)),
        datasets={"train": rows},
        dataset_config=DataConfig(
            execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False
        ),
    )
    with _show(progress, num_steps, on_progress):
        trainer.fit()
    log = read_log(recipe.output_dir)
    return StageResult(
        checkpoint=recipe.output_dir,
        num_steps=len(log),
        loss=log[-1]["loss"],
        seconds=log[-1]["seconds"],
    )


@contextlib.contextmanager
def _show(progress: Queue, num_steps: int, on_progress: Progress | None) -> Iterator[None]:
    """Hand what comes through `progress` to `on_progress` meanwhile, then end the queue."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(PROGRESS_INTERVAL_S):
            records = progress.get_nowait_batch(progress.qsize())
            if records and on_progress is not None:
                on_progress(int(records[-1]["step"]), num_steps, records[-1]["loss"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        progress.shutdown()


def _new_folder(folder: Path) -> Path:
    """`folder`, absolute, made and writable; refused when it holds a checkpoint."""
    folder = folder.absolute()
    if (folder / "config.json").exists():
        raise ConfigError(
            f"output_dir={folder} holds a checkpoint already; name a new folder or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir={folder} cannot be made: {error.strerror}; name a writable folder"
        ) from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"output_dir={folder} is not writable; name a writable folder")
    return folder
