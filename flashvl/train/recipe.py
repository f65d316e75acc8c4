"""Training recipes: one YAML file for each stage, the paper's numbers as defaults.

`Recipe` has the settings that all kinds of training share; the `kind` of a file names its subclass.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from flashvl.config import StrictModel, load_config, validate
from flashvl.train.feed.mixture import TrainingData

ModelPart = Literal["vision_tower", "multi_modal_projector", "language_model"]
"""Part of the model, by the name of its module."""
MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)
"""All parts, in the order in which a row passes through them."""


class Recipe(StrictModel):
    """Settings of a stage that every kind of training has."""

    stage: str
    """Name of the stage, for the progress bar and the logs."""
    init_from: str
    """Checkpoint that the stage starts from: a folder, or a shipped or published model's name."""
    preset: str | None = None
    """Preset with the shapes of `init_from`; `flashvl plan` goes by it until that folder exists."""
    output_dir: Annotated[str, BeforeValidator(os.fspath)]
    """Folder or URI (s3://, gs://, abfs://, hdfs://) for the trained model, its checkpoints and its
    logs, which all nodes reach. The same recipe again resumes what a stopped run left there."""
    trainable: tuple[ModelPart, ...] = MODEL_PARTS
    """Parts that are trained (paper, Table 1); the others stay bit-identical."""

    num_trainable_params: PositiveInt | None = None
    """Number of parameters that are trained; a model in which the parts have another number is
    refused. None: any number."""

    global_batch_size: PositiveInt = 240
    """Rows in a step, on all workers together. Any number of workers may share them."""
    token_budget: PositiveInt = 4096
    """Tokens that a worker computes at once, at most; rows are packed to fill them. It bounds the
    memory of a worker, and changes neither the rows of a step nor its loss."""
    max_length: PositiveInt = 4096
    """Tokens of a row at most, with those of images (up to 2,880 for an ISS image); longer rows
    become dead letters."""
    num_workers: PositiveInt = 40
    """Worker processes, each with a GPU if `use_gpu` is set."""
    use_gpu: bool = True
    """Whether to train on GPUs; otherwise on CPUs."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of each worker, and logical CPUs that Ray reserves for it."""

    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate, after the warm-up (Table 1: 1e-3 in stage 1, 1e-5 in stages 2-4)."""
    learning_rates: dict[ModelPart, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Peak learning rates of parts that differ from `learning_rate`; all follow one schedule."""
    min_learning_rate: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Learning rate at the end of the cosine (Table 1: 2e-5 in stage 1, else 0). Parts with a rate
    of their own end in the same proportion."""
    warmup_steps: int = Field(default=400, ge=0)
    """Steps of linear warm-up. The paper has 400 in its ablations, and no number for full runs."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay of AdamW."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """Second beta of AdamW; the first is 0.9."""
    max_grad_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Norm to which gradients are clipped."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Stage of DeepSpeed ZeRO: 0 shards nothing, 1 the optimizer's states (a 2B model then fits
    80 GB), 2 the gradients as well, 3 the weights as well."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the training; with bf16, the optimizer keeps fp32 master weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more computing."""
    seed: int = 0
    """Random seed of the order of the rows and of the workers."""

    save_steps: PositiveInt = 500
    """Steps between two checkpoints from which a stopped run resumes."""
    save_total_limit: PositiveInt = 2
    """Newest checkpoints that are kept, besides the one with the lowest evaluation loss."""
    eval_steps: PositiveInt | None = None
    """Steps between two evaluations on `eval_data`; None: only after the last step."""
    max_error_rate: float = Field(default=0.01, ge=0, le=1)
    """Share of rows that may be dead letters; above it the run stops."""
    max_skipped_steps: PositiveInt = 10
    """Steps in a row that may be skipped because of their loss; one more stops the run."""
    spike_factor: float | None = Field(default=10.0, gt=1, allow_inf_nan=False)
    """A step is skipped, its weights unchanged, if its loss is NaN, infinite, or this many times
    the median of the recent steps. None: however high a finite loss is."""
    max_failures: int = Field(default=3, ge=0)
    """Times that the workers are started again, from the last checkpoint, after one of them or its
    node was lost."""
    hang_timeout_s: PositiveInt = 1800
    """Seconds without a finished step after which the run is stopped as hung."""

    @model_validator(mode="after")
    def _check_rates_and_lengths(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) is above learning_rate"
                f" ({self.learning_rate}); lower it"
            )
        if self.max_length > self.token_budget:
            raise ValueError(
                f"max_length ({self.max_length}) is above token_budget ({self.token_budget}), into"
                " which a row must fit; lower it, or raise token_budget"
            )
        for part in self.learning_rates:
            if part not in self.trainable:
                raise ValueError(
                    f"learning_rates has {part}, which trainable does not name; add it there, or"
                    " leave out its rate"
                )
        return self

    @property
    def has_reference(self) -> bool:
        """Whether a step computes the model that the stage began with, too."""
        return False


class LoraSettings(StrictModel):
    """Low-rank adapters on the linear layers of the trainable parts (PEFT's `LoraConfig`)."""

    r: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveInt = 32
    """Scale of the adapters: their output is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapters' input."""


class SupervisedRecipe(Recipe):
    """A stage that learns the assistant's turns of conversations, token by token."""

    kind: Literal["supervised"]
    data: TrainingData
    """Conversations to train on, each once."""
    eval_data: TrainingData | None = None
    """Held-out conversations whose loss is measured."""
    lora: LoraSettings | None = None
    """Low-rank adapters, which are trained in place of the parts' own weights and merged into them
    at the end; None trains the weights."""


class CellsRecipe(Recipe):
    """Pre-training of a random vision tower: what lies in each cell of a synthetic scene."""

    kind: Literal["cells"]
    data: TrainingData
    """Synthetic scenes to train on, each once."""

    @property
    def eval_data(self) -> None:
        """No rows are held out: stages that use the tower judge it."""

    @property
    def lora(self) -> None:
        """A random tower has no weights to put adapters on."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data.synthetic is None:
            raise ValueError("kind 'cells' needs data.synthetic; only synthetic scenes have cells")
        return self


class DpoRecipe(Recipe):
    """Direct preference optimization: which of two answers is better (paper, stage 5)."""

    kind: Literal["dpo"]
    data: TrainingData
    """Preferences to train on, each once: tables with the schema `flashvl.data.schema.PREFERENCES`,
    or pairs of the procedural world. A pair is a row, with both answers within `max_length`."""
    eval_data: TrainingData | None = None
    """Held-out preferences, whose loss and accuracy are measured."""
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """How strongly the policy is held to the reference, the model that it began as: its inverse is
    how far a preference may move it. The paper found 0.1 best in a grid search."""
    trainable: tuple[ModelPart, ...] = ("multi_modal_projector", "language_model")
    lora: LoraSettings | None = LoraSettings()
    """Low-rank adapters, merged at the end; the reference is the model without them. None trains
    the parts' own weights, and keeps a copy of them as the reference."""
    learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Peak learning rate. The paper gives none; this is ten times TRL's default for whole weights,
    as is usual for adapters."""
    warmup_steps: int = Field(default=36, ge=0)
    """Steps of linear warm-up. The paper gives none; this is a tenth of its 363 steps."""
    spike_factor: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """As in the other kinds; None, as the loss of pairs may come close to zero."""

    @property
    def has_reference(self) -> bool:
        return True


class GrpoRecipe(Recipe):
    """Reinforcement learning on problems whose answers can be checked (GRPO). The names are TRL's.

    A step samples `num_generations` completions of each of its `global_batch_size` prompts.
    """

    kind: Literal["grpo"]
    data: TrainingData
    """Prompts with answers to train on, each once: tables with the schema
    `flashvl.data.schema.PROMPTS`, or problems of the procedural world."""
    eval_data: TrainingData | None = None
    """Held-out prompts, whose completions are sampled and scored; not trained."""
    lora: LoraSettings | None = None
    """Low-rank adapters, which are trained in place of the parts' own weights and merged into them
    at the end; None trains the weights."""
    global_batch_size: PositiveInt = 10
    """Prompts in a step, on all workers together (10 of 24 completions on 40 GPUs)."""
    learning_rate: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    """Peak learning rate, after the warm-up. The paper has none for GRPO; this is TRL's default for
    full weights. Adapters take about ten times as much."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    spike_factor: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    """As in the other kinds; None, as the loss is close to zero and may be negative."""
    num_generations: int = Field(default=24, ge=2)
    """Completions of each prompt, which are compared with each other."""
    max_completion_length: PositiveInt = 1024
    """Tokens of a completion at most, its end token included; longer ones are cut."""
    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Divisor of the logits, in sampling and in the loss."""
    beta: float = Field(default=0.001, ge=0, allow_inf_nan=False)
    """Weight of the divergence (KL) from the model that the training starts from; 0 needs no
    reference model."""
    epsilon: float = Field(default=0.2, gt=0, lt=1)
    """Change of a token's probability, as a share, beyond which it is not rewarded further."""
    rewards: dict[str, float] = Field(default={"accuracy": 1.0, "format": 1.0}, min_length=1)
    """Weights of the reward functions by name: `accuracy`, `exact_match` or `format`, or the import
    path of one with TRL's signature, as trl.rewards.think_format_reward."""
    importance_sampling_correction: bool = False
    """Whether to weigh each token by how much likelier the trainer finds it than the engine that
    sampled it; needs temperature 1. The step's `logprob_difference` tells how far they differ."""
    importance_sampling_cap: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Greatest such weight."""

    @model_validator(mode="after")
    def _check_completions(self) -> Self:
        if self.max_length + self.max_completion_length > self.token_budget:
            raise ValueError(
                f"max_length ({self.max_length}) and max_completion_length"
                f" ({self.max_completion_length}) exceed token_budget ({self.token_budget}), into"
                " which a prompt with a completion must fit; lower them, or raise token_budget"
            )
        if self.importance_sampling_correction and self.temperature != 1:
            raise ValueError(
                "importance_sampling_correction needs temperature=1.0, not"
                f" {self.temperature}; correct one of them"
            )
        return self

    @property
    def has_reference(self) -> bool:
        return self.beta > 0


AnyRecipe = SupervisedRecipe | CellsRecipe | DpoRecipe | GrpoRecipe
"""A recipe of any kind."""
RECIPES: dict[str, type[AnyRecipe]] = {
    "supervised": SupervisedRecipe,
    "cells": CellsRecipe,
    "dpo": DpoRecipe,
    "grpo": GrpoRecipe,
}
"""Recipe classes by their `kind`."""


class _Kind(StrictModel):
    """The `kind` of a recipe file; the other keys are kept as they are, for its class to check."""

    model_config = ConfigDict(extra="allow")

    kind: str

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str) -> str:
        if kind not in RECIPES:
            raise ValueError(f"must be one of {', '.join(RECIPES)}")
        return kind


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The recipe in the YAML file `path`, of the class that its `kind` names.

    Args:
        overrides: `key=value` or `section.key=value`, as `load_config` takes them.

    Raises:
        ConfigError: the file cannot be read, `kind` is missing or unknown, another key is unknown,
            or a value is wrong.
    """
    found = load_config(_Kind, path, overrides)  # once, as a pipe cannot be read again
    values = {"kind": found.kind, **(found.model_extra or {})}
    for name in ("data", "eval_data"):
        if isinstance(data := values.get(name), dict) and isinstance(data.get("mixture"), str):
            data["mixture"] = str(Path(path).parent / data["mixture"])
    return validate(RECIPES[found.kind], values, source=str(path))
