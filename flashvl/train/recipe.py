"""Training recipes: one YAML file for each stage, the paper's numbers as defaults.

`Recipe` has the settings that all kinds of training share; the `kind` of a file names its subclass.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from flashvl.config import StrictModel, load_config, validate
from flashvl.train.rows import TrainingData

ModelPart = Literal["vision_tower", "multi_modal_projector", "language_model"]
"""Part of the model, by the name of its module."""


class Recipe(StrictModel):
    """Settings of a stage that every kind of training has."""

    stage: str
    """Name of the stage, for the progress bar and the logs."""
    init_from: str
    """Checkpoint that the stage starts from: a folder, or a shipped or published model's name."""
    output_dir: Path
    """New folder for the checkpoint and its logs, on storage that all nodes share."""
    trainable: tuple[ModelPart, ...] = ("vision_tower", "multi_modal_projector", "language_model")
    """Parts that are trained (paper, Table 1); the others stay bit-identical."""

    global_batch_size: PositiveInt = 240
    """Rows in a step: per_device_train_batch_size x accumulation x num_workers."""
    per_device_train_batch_size: PositiveInt = 6
    """Rows that a worker computes at once."""
    num_workers: PositiveInt = 40
    """Worker processes, each with a GPU if `use_gpu` is set."""
    use_gpu: bool = True
    """Whether to train on GPUs; otherwise on CPUs."""
    threads_per_worker: PositiveInt = 1
    """CPU threads of each worker, and logical CPUs that Ray reserves for it."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate, after the warm-up (Table 1: 1e-3 in stage 1, 1e-5 in stages 2-4)."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine (Table 1: 2e-5 in stage 1, else 0)."""
    warmup_steps: int = Field(default=400, ge=0)
    """Steps of linear warm-up. The paper has 400 in its ablations, and no number for full runs."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    """Second beta of AdamW; the first is 0.9."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm to which gradients are clipped."""
    zero_stage: Literal[1, 2] = 1
    """Stage of DeepSpeed ZeRO: 1 shards the optimizer's states (a 2B model then fits 80 GB), 2 the
    gradients as well."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the training."""
    max_length: PositiveInt = 4096
    """Tokens of a conversation at most, with those of images (up to 2,880 for an ISS image); longer
    conversations are left out with a warning."""
    seed: int = 0
    """Random seed of the workers."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of each worker in a step."""
        return self.global_batch_size // (self.per_device_train_batch_size * self.num_workers)

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        micro_batch = self.per_device_train_batch_size * self.num_workers
        if self.global_batch_size % micro_batch:
            nearest = max(self.global_batch_size // micro_batch, 1) * micro_batch
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be divisible by"
                f" per_device_train_batch_size x num_workers ({self.per_device_train_batch_size} x"
                f" {self.num_workers} = {micro_batch}). Try global_batch_size={nearest}."
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate}) is above learning_rate"
                f" ({self.learning_rate}); lower it"
            )
        return self


class SupervisedRecipe(Recipe):
    """A stage that learns the assistant's turns of conversations, token by token."""

    kind: Literal["supervised"]
    data: TrainingData
    """Conversations to train on, each once."""


class CellsRecipe(Recipe):
    """Pre-training of a random vision tower: what lies in each cell of a synthetic scene."""

    kind: Literal["cells"]
    data: TrainingData
    """Synthetic scenes to train on, each once."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data.synthetic is None:
            raise ValueError("kind 'cells' needs data.synthetic; only synthetic scenes have cells")
        return self


AnyRecipe = SupervisedRecipe | CellsRecipe
"""A recipe of any kind."""
RECIPES: dict[str, type[AnyRecipe]] = {"supervised": SupervisedRecipe, "cells": CellsRecipe}
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
    return validate(RECIPES[found.kind], values, source=str(path))
