"""A worker of a stage: builds the model and its DeepSpeed engine, trains, and writes the result.

It runs inside Ray Train's `TorchTrainer`, which `launch.run` starts.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
from peft.tuners.lora import LoraModel
from ray.actor import ActorHandle
from torch import distributed

from flashvl.data.storage import Location, locate
from flashvl.errors import FlashVLError
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from flashvl.train.answers import Answers
from flashvl.train.cells import Cells
from flashvl.train.feed.feed import Feed
from flashvl.train.grpo.objective import Groups
from flashvl.train.objectives import Objective
from flashvl.train.pairs import Pairs
from flashvl.train.recipe import AnyRecipe, CellsRecipe, DpoRecipe, GrpoRecipe
from flashvl.train.run.checkpoint import (
    Checkpoint,
    CheckpointState,
    CheckpointWriter,
    checkpoint_folder,
    read_checkpoint,
)
from flashvl.train.run.consumed import Consumed
from flashvl.train.run.export import gathered, write_log, write_model
from flashvl.train.run.failures import keep_traceback
from flashvl.train.run.guard import Guard
from flashvl.train.run.loop import Loop
from flashvl.train.run.lora import add_adapters, merge
from flashvl.train.run.metrics import BOARDS, Boards, Meter, peak_flops
from flashvl.train.run.monitor import Pulse
from flashvl.train.run.parts import read_steps
from flashvl.train.run.schedule import check_count, count_trained, freeze_all_but, group_by_rate
from flashvl.train.run.shards import ShardReader
from flashvl.train.run.zero import publish, read_fragments, start_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What the workers of an attempt are given."""

    recipe: AnyRecipe
    feed: Feed
    eval_feed: Feed | None
    first_step: int
    """Steps of the checkpoint to resume from; 0 begins anew."""
    run_id: str
    """Differs between attempts."""
    monitor: ActorHandle


def train_worker(config: dict[str, Any]) -> None:
    """Run one worker of a stage.

    Args:
        config: `assignment`, an `Assignment`.

    Raises:
        FlashVLError: the run cannot go on; the error says why.
    """
    assignment: Assignment = config["assignment"]
    rank = ray.train.get_context().get_world_rank()
    pulse = Pulse(assignment.monitor, rank)
    pulse.beat(assignment.first_step, "start")
    try:
        _train(assignment, rank, pulse)
    except torch.OutOfMemoryError as error:
        raise FlashVLError(
            f"rank {rank} has too little GPU memory ({str(error).partition('.')[0]}); lower"
            f" token_budget ({assignment.recipe.token_budget}), raise zero_stage"
            f" ({assignment.recipe.zero_stage}), or set gradient_checkpointing=true"
        ) from error
    except Exception as error:
        keep_traceback(error)
        raise


def _train(assignment: Assignment, rank: int, pulse: Pulse) -> None:
    recipe = assignment.recipe
    torch.set_num_threads(recipe.threads_per_worker)
    torch.manual_seed(recipe.seed)
    output = locate(recipe.output_dir)
    model = load_model(recipe.init_from).train()
    processor = load_processor(recipe.init_from)
    adapters = prepare_parts(model, recipe)
    objective = _build_objective(recipe, model, processor, adapters, output)
    groups = group_by_rate(objective.module, model, recipe)
    peaks = [group["lr"] for group in groups]
    engine = start_engine(objective.module, groups, recipe)
    resumed = _restore(engine, output, assignment.first_step)
    state = resumed.state if resumed is not None else None
    is_first = rank == 0
    boards_folder = f"{output.path}/{BOARDS}" if output.is_local else tempfile.mkdtemp()
    consumed = Consumed(assignment.feed.num_numbers, resumed.consumed() if resumed else None)
    loop = Loop(
        engine=engine,
        objective=objective,
        config=model.config,
        recipe=recipe,
        feed=assignment.feed,
        eval_feed=assignment.eval_feed,
        output=output,
        pulse=pulse,
        writer=CheckpointWriter(output, rank, assignment.run_id),
        guard=_build_guard(recipe, state),
        meter=Meter(
            sources=assignment.feed.sources,
            peak_flops=peak_flops(engine.device),
            seconds=state.seconds if state else 0.0,
        ),
        peaks=peaks,
        consumed=consumed if is_first else None,
        boards=Boards(boards_folder, recipe.stage, assignment.first_step + 1) if is_first else None,
        step=assignment.first_step,
        num_trained=state.num_trained if state else 0,
        num_dead=state.num_dead if state else 0,
        loss=state.loss if state else 0.0,
        eval_loss=state.eval_loss if state else None,
    )
    if loop.run():
        pulse.beat(loop.step, "export")
        _audit(loop)
        _export(model, adapters, loop)
    if loop.boards is not None:
        loop.boards.close()


def _build_objective(
    recipe: AnyRecipe,
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    adapters: LoraModel | None,
    output: Location,
) -> Objective:
    """What the recipe's kind trains; made before DeepSpeed splits the weights."""
    if isinstance(recipe, CellsRecipe):
        return Cells(model, processor)
    if isinstance(recipe, DpoRecipe):
        return Pairs(model, processor, adapters, recipe.beta)
    if isinstance(recipe, GrpoRecipe):
        return Groups(model, processor, recipe, adapters, output)
    return Answers(model, processor)


def prepare_parts(model: FlashVLForConditionalGeneration, recipe: AnyRecipe) -> LoraModel | None:
    """Let only what the recipe names be trained.

    Returns:
        The low-rank adapters, if these are trained in place of the parts' weights.

    Raises:
        ConfigError: another number of parameters would be trained than the recipe says.
    """
    adapters = None
    if recipe.lora is not None:
        adapters = add_adapters(model, recipe.lora, recipe.trainable)
    else:
        freeze_all_but(model, recipe.trainable)
    check_count(count_trained(model), recipe)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        # Else it sends gradients into frozen parts, which cost as much as trained ones then.
        model.disable_input_require_grads()
    return adapters


def _restore(engine: Any, output: Location, step: int) -> Checkpoint | None:
    """Give the engine the state of the checkpoint after `step` steps."""
    if step == 0:
        return None
    folder = checkpoint_folder(output, step)
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise FlashVLError(f"{folder} was removed meanwhile; run the same command again")
    with ShardReader(checkpoint.shards) as reader:
        reader.fill(read_fragments(engine))
    publish(engine, checkpoint.state.adam_step)
    return checkpoint


def _build_guard(recipe: AnyRecipe, state: CheckpointState | None) -> Guard:
    if state is None:
        return Guard(recipe.spike_factor, recipe.max_skipped_steps)
    return Guard(
        recipe.spike_factor,
        recipe.max_skipped_steps,
        recent=state.recent_losses,
        num_skipped=state.num_skipped,
        num_in_a_row=state.num_skipped_in_a_row,
    )


def _audit(loop: Loop) -> None:
    """
    Raises:
        FlashVLError: a row is neither trained nor a dead letter; or no row could be used.
    """
    if loop.consumed is not None:
        loop.consumed.check(loop.feed, loop.feed.num_steps)
    if not loop.num_trained:
        raise FlashVLError(
            f"none of the {loop.feed.num_rows} rows could be used; see {loop.output}/dead_letters"
            f" for the reasons, and raise max_length ({loop.recipe.max_length}) for rows that are"
            " too long"
        )


def _export(model: FlashVLForConditionalGeneration, adapters: LoraModel | None, loop: Loop) -> None:
    """Write the finished model on rank 0; all ranks call this."""
    recipe, output = loop.recipe, loop.output
    with gathered(model, recipe.zero_stage):
        if loop.rank == 0:
            if adapters is not None:
                merge(adapters)
            totals = {
                "num_steps": loop.step - loop.guard.num_skipped,
                "planned_steps": loop.feed.num_steps,
                "num_skipped": loop.guard.num_skipped,
                "num_trained": loop.num_trained,
                "num_dead": loop.num_dead,
                "loss": loop.loss,
                "eval_loss": loop.eval_loss,
                "seconds": loop.meter.seconds,
            }
            try:
                write_log(output, recipe, totals, read_steps(output))
                write_model(output, model, load_processor(recipe.init_from))
            except OSError as error:
                raise FlashVLError(
                    f"the trained model cannot be written to {output}"
                    f" ({error.strerror or error}); make room, and run the same command again"
                ) from None
        distributed.barrier()
