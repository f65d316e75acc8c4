"""Sizes of a stage's rows, which its plan is made for: sampled where data and model are there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from flashvl.errors import CheckpointError, ConfigError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import resolve_checkpoint
from flashvl.model.presets import build_config
from flashvl.train.recipe import AnyRecipe

IMAGE_SIZE = (1024, 768)
"""Pixels of an image, width and height, while the data cannot be read."""
SAMPLED_ROWS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSize:
    """Means of a stage's rows."""

    text_tokens: float
    visual_tokens: float
    num_tiles: float
    num_labels: float
    """Tokens whose logits are computed."""
    image_bytes: float
    """Bytes of the images of a row, as they are stored."""
    source: str
    """Where the numbers come from."""

    @property
    def num_tokens(self) -> float:
        return self.text_tokens + self.visual_tokens

    @classmethod
    def assume(cls, config: FlashVLConfig, text_tokens: int, image_bytes: int) -> Self:
        """A row with one image, cut as the model cuts it, whose text is all to be learnt."""
        num_tiles = config.tiling_rule.num_tiles(IMAGE_SIZE)
        return cls(
            text_tokens=text_tokens,
            visual_tokens=num_tiles * config.image_seq_length,
            num_tiles=num_tiles,
            num_labels=text_tokens,
            image_bytes=image_bytes,
            source="assumed",
        )


def find_config(recipe: AnyRecipe) -> FlashVLConfig:
    """The configuration of the model that a stage starts from, or of its preset until it exists.

    Raises:
        ConfigError: the model does not exist, and the recipe names no preset.
    """
    try:
        return FlashVLConfig.from_pretrained(resolve_checkpoint(recipe.init_from))
    except CheckpointError as error:
        if recipe.preset is None:
            raise ConfigError(f"{error}; or name the preset of its shapes, as preset=static") from None
    return build_config(recipe.preset)


def count_rows(recipe: AnyRecipe) -> int:
    """Rows of a stage: of the procedural world, of its mixture's counts, or of its tables.

    Raises:
        ConfigError: the mixture names tables without counts that cannot be read.
    """
    raise NotImplementedError


def sample_rows(recipe: AnyRecipe) -> RowSize | None:
    """The sizes of some rows; None while the stage's data or its model does not exist."""
    return None
