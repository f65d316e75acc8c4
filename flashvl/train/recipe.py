"""Training recipes: one YAML file for each stage, the paper's numbers as defaults.

What all kinds of training share is in `Recipe`; `kind` says which of its subclasses a file is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from flashvl.config import StrictModel, load_config
from flashvl.train.rows import TrainingData

ModelPart = Literal["vision_tower", "multi_modal_projector", "language_model"]


class Recipe(StrictModel):
    """Settings of a stage that every kind of training has."""

    stage: str
    """Name of the stage, for the progress bar and the logs."""
    init_from: str
    """Folder (or shipped name) of the checkpoint that the stage starts from."""
    output_dir: Path
    """New folder for the Hugging Face checkpoint and its logs; on storage all nodes share."""
    trainable: tuple[ModelPart, ...] = ("vision_tower", "multi_modal_projector", "language_model")
    """Parts that learn (paper, Table 1); the others stay bit-identical."""

    global_batch_size: PositiveInt = 240
    """Samples a step: per_device_train_batch_size x accumulation x num_workers."""
    per_device_train_batch_size: PositiveInt = 6
    num_workers: PositiveInt = 40
    use_gpu: bool = True
    threads_per_worker: PositiveInt = 1
    """CPU threads (and logical CPUs) of one worker."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak, reached after the warm-up (Table 1: 1e-3 in stage 1, 1e-5 in stages 2-4)."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Floor of the cosine, reached at the last step (Table 1: 2e-5 in stage 1, else 0)."""
    warmup_steps: int = Field(default=400, ge=0)
    """Linear warm-up. The paper gives 400 for its ablations and nothing for the full runs."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    zero_stage: Literal[1, 2] = 1
    """DeepSpeed ZeRO. Stage 1 shards the optimizer's states, and a 2B model then fits 80 GB."""
    precision: Literal["bf16", "fp32"] = "bf16"
    max_length: PositiveInt = 4096
    """Tokens of a conversation, image tokens included (an ISS image has up to 2,880); longer ones
    are left out and counted."""
    seed: int = 0

    @property
    def gradient_accumulation_steps(self) -> int:
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
    """Conversations to train on; each is seen once."""


class CellsRecipe(Recipe):
    """Pre-training of a random vision tower: what lies in each cell of a synthetic scene."""

    kind: Literal["cells"]
    data: TrainingData
    """Synthetic scenes to train on; each is seen once."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data.synthetic is None:
            raise ValueError("kind 'cells' needs data.synthetic: only its scenes have known cells")
        return self


AnyRecipe = SupervisedRecipe | CellsRecipe
RECIPES: dict[str, type[AnyRecipe]] = {"supervised": SupervisedRecipe, "cells": CellsRecipe}
"""Recipe classes by their `kind`."""


class _Kind(StrictModel):
    """The `kind` of a recipe file, whatever else the file holds."""

    model_config = ConfigDict(extra="ignore")

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
        ConfigError: there is no such file, `kind` is missing or unknown, a key is unknown, or a
            value is wrong.
    """
    kind = load_config(_Kind, path, overrides).kind
    return load_config(RECIPES[kind], path, overrides)
