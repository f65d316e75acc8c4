"""Runs a stage on Ray Train, from its recipe to the finished model, through lost workers and nodes.

output_dir/
    _manifest.json, _lock       what decides the weights; see `flashvl.data.ledger`
    checkpoints/                see `flashvl.train.checkpoint`
    steps/, dead_letters/       see `flashvl.train.parts`
    runs/                       TensorBoard
    training_log.json           totals, and a record of each step
    config.json, ...            the model as a Hugging Face folder, `config.json` written last
"""

import logging
import os
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from flashvl.data.ledger.lock import LOCK, held
from flashvl.data.ledger.manifest import check_same, has_begun, write_manifest
from flashvl.data.storage import UNFINISHED, Location, locate
from flashvl.errors import ConfigError, FlashVLError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import hash_folder, load_processor, resolve_checkpoint
from flashvl.model.parts.prepare import prepare_model
from flashvl.progress import ShowProgress, ignore_progress
from flashvl.train.checkpoint import Checkpoint, list_checkpoints, remove_incomplete
from flashvl.train.consumed import Consumed
from flashvl.train.export import CONFIG, read_totals
from flashvl.train.failures import is_of_ray, what_was_lost
from flashvl.train.feed import Feed, build_feed
from flashvl.train.mixture import TrainingData
from flashvl.train.monitor import Watch, start_monitor
from flashvl.train.parameters import Parameters, count_parameters
from flashvl.train.parts import remove_later
from flashvl.train.recipe import AnyRecipe, Recipe, SupervisedRecipe
from flashvl.train.schedule import check_count
from flashvl.train.supervised import Assignment, train_worker

logger = logging.getLogger(__name__)

MAY_DIFFER = frozenset(
    {
        "stage",
        "output_dir",
        "preset",
        "init_from",  # its hash counts
        "data",  # the feed's fingerprint counts
        "eval_data",
        "num_trainable_params",
        "token_budget",
        "num_workers",
        "use_gpu",
        "threads_per_worker",
        "zero_stage",
        "gradient_checkpointing",
        "save_steps",
        "save_total_limit",
        "eval_steps",
        "max_error_rate",
        "max_skipped_steps",
        "max_failures",
        "hang_timeout_s",
    }
)
"""Fields of a recipe that a resumed run may change, as they do not decide the weights."""
EXTRA_COLLECTIVE_S = 600
"""Seconds after the watchdog's time-out when torch's own ends a collective, which says less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """Figures of a finished stage."""

    checkpoint: str
    """Folder or URI that the stage has written."""
    planned_steps: int
    """Steps that the rows make."""
    num_steps: int
    """Steps that were made: fewer than planned if some were skipped."""
    num_trained: int
    """Rows that were trained."""
    num_dead: int
    """Rows that could not be used."""
    loss: float
    """Loss of the last step."""
    eval_loss: float | None
    """Loss on the held-out rows after the last step; None: there are none."""
    seconds: float
    """Time in the training loop, without the start of the workers."""

    def __str__(self) -> str:
        held_out = f", {self.eval_loss:.4f} on held-out rows" if self.eval_loss is not None else ""
        return (
            f"{self.checkpoint}: {self.num_steps} of {self.planned_steps} steps in"
            f" {self.seconds:.0f} s, {self.num_trained} rows, {self.num_dead} dead letters, last"
            f" loss {self.loss:.4f}{held_out}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage that has been checked."""

    recipe: AnyRecipe
    """Recipe whose paths are absolute."""
    output: Location
    feed: Feed
    eval_feed: Feed | None
    fingerprint: dict[str, Any]
    """What decides the weights, by name."""
    parameters: Parameters
    """Numbers of the model's parameters, and of those that are trained."""

    def __str__(self) -> str:
        recipe, counts = self.recipe, self.parameters
        parts = ", ".join(f"{part} {counts.trained[part]:,}" for part in recipe.trainable)
        return (
            f"{recipe.stage}: {self.feed.num_rows:,} rows of {', '.join(self.feed.sources)} in"
            f" {self.feed.num_steps:,} steps of {recipe.global_batch_size}; trains"
            f" {counts.num_trained:,} of {counts.num_total:,} parameters ({parts})"
        )

    def finished(self) -> StageResult | None:
        """The result, if the stage has run to its end."""
        if not (self.output / CONFIG).is_file():
            return None
        totals = read_totals(self.output)
        names = StageResult.__dataclass_fields__
        return StageResult(
            checkpoint=str(self.output), **{name: totals[name] for name in names if name in totals}
        )


def run(recipe: AnyRecipe, on_progress: ShowProgress = ignore_progress) -> StageResult:
    """Train the stage on the Ray cluster that this process is connected to, or what is left of it.

    Args:
        on_progress: shows the steps that are done, with figures of the last one.

    Raises:
        ConfigError, CheckpointError: the recipe cannot be run; nothing was started.
        FlashVLError: the run cannot go on, or SIGTERM has stopped it.
        RankError: a worker has failed; the message holds its traceback.
    """
    return run_stage(check_stage(recipe), on_progress)


def run_stage(stage: Stage, on_progress: ShowProgress = ignore_progress) -> StageResult:
    """What `run` does after `check_stage`."""
    if (result := stage.finished()) is not None:
        return result
    resources = _resources_of_a_worker(stage.recipe)
    with held(stage.output):
        if has_begun(stage.output):
            _check_same(stage)
        else:
            write_manifest(stage.output, stage.fingerprint)
        stage.output.remove_unfinished()
        _run_attempts(stage, resources, on_progress)
    result = stage.finished()
    assert result is not None
    return result


def check_stage(recipe: AnyRecipe) -> Stage:
    """Check the recipe, its model, its data, and what the output holds.

    Raises:
        ConfigError, CheckpointError: the recipe cannot be run.
    """
    init_from = resolve_checkpoint(prepare_model(recipe.init_from)).resolve()
    load_processor(init_from)
    output = locate(recipe.output_dir)
    # Workers have another working directory.
    output_dir = output.path if output.is_local else recipe.output_dir
    recipe = recipe.model_copy(update={"init_from": str(init_from), "output_dir": output_dir})
    parameters = _count_parameters(recipe)
    feed = _build_feed(recipe, recipe.data)
    eval_data = recipe.eval_data if isinstance(recipe, SupervisedRecipe) else None
    settings = recipe.model_dump(mode="json", exclude=set(MAY_DIFFER))
    stage = Stage(
        recipe=recipe,
        output=output,
        feed=feed,
        eval_feed=_build_feed(recipe, eval_data) if eval_data is not None else None,
        fingerprint={"init_from": hash_folder(init_from), **feed.fingerprint(), **settings},
        parameters=parameters,
    )
    _check_output(stage)
    return stage


def _count_parameters(recipe: AnyRecipe) -> Parameters:
    """
    Raises:
        ConfigError: another number of parameters would be trained than the recipe says.
    """
    lora = recipe.lora if isinstance(recipe, SupervisedRecipe) else None
    config = FlashVLConfig.from_pretrained(recipe.init_from)
    counts = count_parameters(config, recipe.trainable, lora.r if lora is not None else None)
    check_count(counts.num_trained, recipe)
    return counts


def _build_feed(recipe: AnyRecipe, data: TrainingData) -> Feed:
    return build_feed(
        data,
        model=recipe.init_from,
        global_batch_size=recipe.global_batch_size,
        max_length=recipe.max_length,
        token_budget=recipe.token_budget,
        seed=recipe.seed,
        kind=recipe.kind,
    )


def _check_output(stage: Stage) -> None:
    """
    Raises:
        ConfigError: the output is a file, holds other things, or another stage's run.
    """
    output = stage.output
    if output.is_file():
        raise ConfigError(f"output_dir={output} is a file; name a folder")
    if has_begun(output):
        _check_same(stage)
        return
    others = [name for name in output.names() if not name.startswith((LOCK, UNFINISHED))]
    if others:
        raise ConfigError(
            f"output_dir={output} holds {others[0]}, and no training that was begun; name a new"
            " folder or remove it"
        )


def _check_same(stage: Stage) -> None:
    remedy = "Name another output_dir, or remove this one"
    check_same(stage.output, stage.fingerprint, remedy=remedy)


def _run_attempts(stage: Stage, resources: dict[str, float], on_progress: ShowProgress) -> None:
    """Start the workers from the newest checkpoint, again and again while processes are lost.

    Raises:
        FlashVLError, RankError: as from `run`.
    """
    num_failures, last_step = 0, -1
    while True:
        newest = _newest(stage)
        step = newest.state.step if newest is not None else 0
        num_failures = 0 if step > last_step else num_failures
        last_step = step
        lost = _run_attempt(stage, step, resources, on_progress)
        if lost is None:
            return
        num_failures += 1
        if num_failures > stage.recipe.max_failures:
            raise FlashVLError(
                f"the workers were lost {num_failures} times in a row without a new checkpoint"
                f" ({lost}), and max_failures is {stage.recipe.max_failures}; run the same command"
                " again to go on from the last checkpoint"
            )
        logger.warning("%s: starting again from the last checkpoint", lost)


def _newest(stage: Stage) -> Checkpoint | None:
    """The newest checkpoint, whose rows are audited; what later steps left behind is removed."""
    remove_incomplete(stage.output)
    found = list_checkpoints(stage.output)
    newest = found[-1] if found else None
    step = newest.state.step if newest is not None else 0
    remove_later(stage.output, step)
    if newest is not None:
        Consumed(stage.feed.num_numbers, newest.consumed()).check(stage.feed, step)
    return newest


def _run_attempt(
    stage: Stage, first_step: int, resources: dict[str, float], on_progress: ShowProgress
) -> str | None:
    """Run the workers once.

    Returns:
        What was lost; None: the stage is finished.
    """
    recipe, num_steps = stage.recipe, stage.feed.num_steps
    monitor = start_monitor()
    watch = Watch(
        monitor,
        recipe.hang_timeout_s,
        show=lambda record: on_progress(record["step"], num_steps, _describe(record)),
    )
    assignment = Assignment(
        recipe=recipe,
        feed=stage.feed,
        eval_feed=stage.eval_feed,
        first_step=first_step,
        run_id=uuid.uuid4().hex[:6],
        monitor=monitor,
    )
    with tempfile.TemporaryDirectory() as storage, _calls_on_sigterm(watch.ask_to_stop) as stopped:
        try:
            _build_trainer(assignment, resources, storage).fit()
        except Exception as error:
            if watch.hang is not None:
                raise FlashVLError(
                    f"no worker has got on for hang_timeout_s ({recipe.hang_timeout_s}):"
                    f" {watch.hang}; run the same command again to go on from the last checkpoint"
                ) from None
            if not is_of_ray(error):
                raise
            lost = what_was_lost(error)
            if stopped.is_set():
                raise FlashVLError(f"stopped by SIGTERM; {_how_to_go_on(stage)}") from None
            return lost
        finally:
            watch.end()
    if not (stage.output / CONFIG).is_file():
        raise FlashVLError(f"stopped by SIGTERM; {_how_to_go_on(stage)}")
    return None


def _how_to_go_on(stage: Stage) -> str:
    found = list_checkpoints(stage.output)
    step = found[-1].state.step if found else 0
    return (
        f"step {step} of {stage.feed.num_steps} is saved: run the same command again for the rest"
    )


def _build_trainer(
    assignment: Assignment, resources: dict[str, float], storage: str
) -> TorchTrainer:
    """
    Args:
        storage: folder for Ray Train's own files, which nothing is read from.
    """
    recipe = assignment.recipe
    datasets = {"train": assignment.feed.dataset(assignment.first_step, recipe.num_workers)}
    if assignment.eval_feed is not None:
        datasets["eval"] = assignment.eval_feed.dataset(0, recipe.num_workers)
    return TorchTrainer(
        train_worker,
        train_loop_config={"assignment": assignment},
        torch_config=TorchConfig(
            backend="nccl" if recipe.use_gpu else "gloo",
            timeout_s=recipe.hang_timeout_s + EXTRA_COLLECTIVE_S,
        ),
        scaling_config=ScalingConfig(
            num_workers=recipe.num_workers,
            use_gpu=recipe.use_gpu,
            resources_per_worker=resources,
            placement_strategy="PACK",  # fills a node, whose GPUs are connected best
        ),
        run_config=RunConfig(
            name="train",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
        ),
        datasets=datasets,
        dataset_config=DataConfig(
            execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False
        ),
    )


@contextmanager
def _calls_on_sigterm(stop: Callable[[], None]) -> Iterator[threading.Event]:
    """Call `stop` at SIGTERM, in the main thread, which alone may handle signals.

    Yields:
        Whether SIGTERM has come.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def on_signal(*_: object) -> None:
        stopped.set()
        stop()

    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield stopped
    finally:
        for name, handler in before.items():  # Ray Train replaces that of SIGINT
            signal.signal(name, handler)


def _describe(record: dict[str, Any]) -> str:
    """The figures of a step, for the line of progress."""
    figures = [
        f"loss {record['loss']:.4f}",
        f"{record['samples_per_s']:.1f} rows/s",
        f"{record['tokens_per_s']:.0f} tokens/s",
        f"data wait {record['data_wait_share']:.0%}",
    ]
    if "mfu" in record:
        figures.insert(1, f"MFU {record['mfu']:.0%}")
    return ", ".join(figures)


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
