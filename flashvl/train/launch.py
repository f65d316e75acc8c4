"""Runs a stage on Ray Train, from its recipe to the finished checkpoint folder."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.data import ExecutionOptions
from ray.train import DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Queue

from flashvl.errors import ConfigError
from flashvl.model.loading import load_processor, resolve_checkpoint
from flashvl.model.parts.prepare import prepare_model
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.checkpoint import LOG, read_log
from flashvl.train.feed import build_feed
from flashvl.train.recipe import AnyRecipe, Recipe
from flashvl.train.supervised import train_worker

PROGRESS_INTERVAL_S = 1.0
"""Seconds between two reports of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """Figures of a finished stage."""

    checkpoint: Path
    """Folder that the stage has written."""
    planned_steps: int
    """Steps that all rows would make."""
    num_steps: int
    """Steps that were made: fewer than planned if rows had to be left out."""
    loss: float
    """Loss of the last step."""
    seconds: float
    """Time in the training loop, without the start of the workers."""

    def __str__(self) -> str:
        return (
            f"{self.checkpoint}: {self.num_steps} of {self.planned_steps} steps in"
            f" {self.seconds:.0f} s, last loss {self.loss:.4f}"
        )


def run(recipe: AnyRecipe, on_progress: ShowProgress = ignore_progress) -> StageResult:
    """Train the stage on the Ray cluster that this process is connected to.

    Args:
        on_progress: shows the steps that are done, with the last one's loss as its note.

    Raises:
        ConfigError, CheckpointError: the recipe cannot be run; nothing was started.
    """
    init_from = resolve_checkpoint(prepare_model(recipe.init_from)).resolve()
    load_processor(init_from)
    feed = build_feed(
        recipe.data,
        model=str(init_from),
        global_batch_size=recipe.global_batch_size,
        max_length=recipe.max_length,
        token_budget=recipe.token_budget,
        seed=recipe.seed,
        kind=recipe.kind,
    )
    num_steps = feed.num_steps
    resources = _resources_of_a_worker(recipe)
    output_dir = _new_folder(recipe.output_dir)
    recipe = recipe.model_copy(update={"init_from": str(init_from), "output_dir": output_dir})
    rows = feed.dataset(0, recipe.num_workers)
    progress = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe,
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
    if not (output_dir / LOG).exists():
        raise ConfigError(
            f"none of the {feed.num_rows} rows could be used; correct them, or"
            f" raise max_length ({recipe.max_length}) if they are too long"
        )
    log = read_log(output_dir)
    return StageResult(
        checkpoint=output_dir,
        planned_steps=num_steps,
        num_steps=len(log),
        loss=log[-1]["loss"],
        seconds=log[-1]["seconds"],
    )


@contextlib.contextmanager
def _show(progress: Queue, num_steps: int, on_progress: ShowProgress) -> Iterator[None]:
    """Pass the records in `progress` to `on_progress` while the block runs; then end the queue."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(PROGRESS_INTERVAL_S):
            records = progress.get_nowait_batch(progress.qsize())
            if records:
                on_progress(int(records[-1]["step"]), num_steps, f"loss {records[-1]['loss']:.4f}")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        progress.shutdown()


def _resources_of_a_worker(recipe: Recipe) -> dict[str, float]:
    """Resources that Ray reserves for each worker.

    Raises:
        ConfigError: a local Ray, which cannot grow, has too few for all workers and the data tasks;
            Ray Train would wait for ever.
    """
    resources: dict[str, float] = {"CPU": recipe.threads_per_worker}
    if recipe.use_gpu:
        resources["GPU"] = 1
    if "RAY_ADDRESS" in os.environ:  # a cluster, which may scale up
        return resources
    available = ray.cluster_resources()
    for name, spare in (("GPU", 0), ("CPU", 1)):
        needed = recipe.num_workers * resources.get(name, 0) + spare
        if needed > available.get(name, 0):
            raise ConfigError(
                f"num_workers ({recipe.num_workers}) needs {needed:.0f} {name}s, this machine's Ray"
                f" has {available.get(name, 0):.0f}; set RAY_ADDRESS to a cluster, or lower"
                " num_workers and set use_gpu=false"
            )
    return resources


def _new_folder(folder: Path) -> Path:
    """Create `folder`, unless it exists; returns its absolute path.

    Raises:
        ConfigError: it holds a checkpoint, or cannot be written.
    """
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
