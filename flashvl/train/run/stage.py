"""A stage before it runs: its recipe, data, model and output are checked without Ray."""

from dataclasses import dataclass
from typing import Any

from flashvl.data.ledger.lock import LOCK
from flashvl.data.ledger.manifest import check_same, has_begun
from flashvl.data.storage import UNFINISHED, Location, locate
from flashvl.errors import ConfigError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import hash_folder, load_processor, resolve_checkpoint
from flashvl.model.parts.prepare import prepare_model
from flashvl.train.feed.feed import Feed, build_feed
from flashvl.train.feed.mixture import TrainingData
from flashvl.train.grpo.checks import check_rollouts
from flashvl.train.parameters import Parameters, count_parameters
from flashvl.train.recipe import AnyRecipe, GrpoRecipe
from flashvl.train.run.export import CONFIG, read_totals
from flashvl.train.run.schedule import check_count

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
    config = FlashVLConfig.from_pretrained(init_from)
    parameters = _count_parameters(recipe, config)
    if isinstance(recipe, GrpoRecipe):
        check_rollouts(recipe, config)
    feed = _build_feed(recipe, recipe.data)
    settings = recipe.model_dump(mode="json", exclude=set(MAY_DIFFER))
    stage = Stage(
        recipe=recipe,
        output=output,
        feed=feed,
        eval_feed=_build_feed(recipe, recipe.eval_data) if recipe.eval_data else None,
        fingerprint={"init_from": hash_folder(init_from), **feed.fingerprint(), **settings},
        parameters=parameters,
    )
    _check_output(stage)
    return stage


def _count_parameters(recipe: AnyRecipe, config: FlashVLConfig) -> Parameters:
    """
    Raises:
        ConfigError: another number of parameters would be trained than the recipe says.
    """
    counts = count_parameters(config, recipe.trainable, recipe.lora.r if recipe.lora else None)
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
        num_generations=recipe.num_generations if isinstance(recipe, GrpoRecipe) else 1,
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
        check_resumes(stage)
        return
    others = [name for name in output.names() if not name.startswith((LOCK, UNFINISHED))]
    if others:
        raise ConfigError(
            f"output_dir={output} holds {others[0]}, and no training that was begun; name a new"
            " folder or remove it"
        )


def check_resumes(stage: Stage) -> None:
    """
    Raises:
        ConfigError: the output holds a run with other settings; the error names where they differ.
    """
    remedy = "Name another output_dir, or remove this one"
    check_same(stage.output, stage.fingerprint, remedy=remedy)
