"""Attempts to run a stage on Ray Train, from the newest checkpoint, while processes are lost."""

import logging
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.data import ExecutionOptions
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from flashvl.errors import FlashVLError
from flashvl.progress import ShowProgress
from flashvl.train.run.checkpoint import Checkpoint, list_checkpoints, remove_incomplete
from flashvl.train.run.consumed import Consumed
from flashvl.train.run.failures import is_of_ray, what_was_lost
from flashvl.train.run.goodput import Goodput
from flashvl.train.run.monitor import Watch, start_monitor
from flashvl.train.run.parts import remove_later
from flashvl.train.run.reservations import give_back, list_reservations
from flashvl.train.run.stage import Stage
from flashvl.train.run.worker import Assignment, train_worker

logger = logging.getLogger(__name__)

EXTRA_COLLECTIVE_S = 600
"""Seconds after the watchdog's time-out when torch's own ends a collective, which says less."""

SHOWN = ("accuracy", "margin")
"""Figures of objectives that the line of progress has."""


def run_attempts(stage: Stage, resources: dict[str, float], on_progress: ShowProgress) -> None:
    """Start the workers from the newest checkpoint, again and again while processes are lost.

    Raises:
        FlashVLError: the run cannot go on, or SIGTERM has stopped it.
        RankError: a worker has failed; the message holds its traceback.
    """
    num_failures, last_step = 0, -1
    goodput: Goodput | None = None
    while True:
        newest = _newest(stage)
        step = newest.state.step if newest is not None else 0
        seconds = newest.state.seconds if newest is not None else 0.0
        goodput = goodput or Goodput(stage.recipe.stage, seconds)
        goodput.show(seconds)
        num_failures = 0 if step > last_step else num_failures
        last_step = step
        lost = _run_attempt(stage, step, resources, on_progress, goodput)
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
    stage: Stage,
    first_step: int,
    resources: dict[str, float],
    on_progress: ShowProgress,
    goodput: Goodput,
) -> str | None:
    """Run the workers once.

    Returns:
        What was lost; None: the stage is finished.
    """
    recipe, num_steps = stage.recipe, stage.feed.num_steps
    others = list_reservations()
    monitor = start_monitor()

    def show(record: dict[str, Any]) -> None:
        on_progress(record["step"], num_steps, _describe(record))
        goodput.show(record["seconds"])

    watch = Watch(monitor, recipe.hang_timeout_s, show)
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
            give_back(others)
            if stopped.is_set():
                raise FlashVLError(f"stopped by SIGTERM; {_how_to_go_on(stage)}") from None
            return lost
        finally:
            watch.end()
    if stage.finished() is None:
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
        # Encoded before training, once: later no CPU may be free for it. Tasks of the training rows
        # keep theirs while they wait for the workers, which in an evaluation wait for these rows.
        datasets["eval"] = assignment.eval_feed.dataset(0, recipe.num_workers).materialize()
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
    if "rollout_s" in record:
        return _describe_rollouts(record)
    figures = [
        f"loss {record['loss']:.4f}",
        *(f"{name} {record[name]:.2f}" for name in SHOWN if name in record),
        f"{record['samples_per_s']:.1f} rows/s",
        f"{record['tokens_per_s']:.0f} tokens/s",
        f"data wait {record['data_wait_share']:.0%}",
    ]
    if "mfu" in record:
        figures.insert(1, f"MFU {record['mfu']:.0%}")
    return ", ".join(figures)


def _describe_rollouts(record: dict[str, Any]) -> str:
    """The figures of a step that samples completions."""
    parts = [name for name in record if name.startswith("reward_") and name != "reward_s"]
    by_part = [f"{name.removeprefix('reward_')} {record[name]:.2f}" for name in parts]
    figures = [
        f"reward {record['reward']:.3f}" if "reward" in record else "no reward",
        *(by_part if len(by_part) > 1 else ()),
        *([f"KL {record['kl']:.4f}"] if "kl" in record else []),
        f"entropy {record.get('entropy', 0.0):.2f}",
        f"{record.get('completion_length', 0.0):.0f} tokens",
        f"no signal {record.get('no_signal_share', 0.0):.0%}",
        f"rollout {record['rollout_s']:.1f} s",
        f"update {record['update_s']:.1f} s",
    ]
    if record.get("undefined_share"):
        figures.append(f"undefined {record['undefined_share']:.0%}")
    return ", ".join(figures)
