"""Sizes of a stage's rows, which its plan is made for: sampled where data and model are there."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from flashvl.data.features import IGNORE_INDEX
from flashvl.errors import CheckpointError, ConfigError
from flashvl.model import FlashVLConfig
from flashvl.model.loading import resolve_checkpoint
from flashvl.model.presets import build_config
from flashvl.train.feed.mixture import load_tables
from flashvl.train.recipe import AnyRecipe

if TYPE_CHECKING:
    from flashvl.train.feed.feed import Feed  # imports Ray, which a plan needs only to read rows

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
    source: str
    """Where the numbers come from."""
    branches: tuple[float, ...] = ()
    """Tokens of each branch: of the chosen and of the rejected answer of a pair."""

    @property
    def num_tokens(self) -> float:
        return self.text_tokens + self.visual_tokens

    @classmethod
    def assume(
        cls, config: FlashVLConfig, text_tokens: int, images: float, num_branches: int = 0
    ) -> Self:
        """A row with some images, cut as the model cuts them, whose text is all to be learnt.

        Args:
            num_branches: answers to the same images, each of `text_tokens`; 0: the text is one.
        """
        num_tiles = images * config.tiling_rule.num_tiles(IMAGE_SIZE)
        row = cls(
            text_tokens=0 if num_branches else text_tokens,
            visual_tokens=num_tiles * config.image_seq_length,
            num_tiles=num_tiles,
            num_labels=0 if num_branches else text_tokens,
            source="assumed",
        )
        return row.with_branches(text_tokens, num_branches)

    def with_branches(self, tokens: int, count: int) -> Self:
        """The row followed by `count` branches of `tokens` each, which are to be learnt."""
        return replace(
            self,
            text_tokens=self.text_tokens + count * tokens,
            num_labels=self.num_labels + count * tokens,
            branches=(*self.branches, *[float(tokens)] * count),
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
            raise ConfigError(
                f"{error}; or name the preset of its shapes, as preset=static"
            ) from None
    return build_config(recipe.preset)


def count_rows(recipe: AnyRecipe) -> int:
    """Rows of a stage: of the procedural world, of its mixture's counts, or of its tables.

    Raises:
        ConfigError: the mixture's file is wrong, or a table without a count cannot be read.
    """
    if recipe.data.synthetic is not None:
        return recipe.data.synthetic.count
    tables = load_tables(recipe.data)
    counts = [table.count for table in tables if table.count is not None]
    if len(counts) == len(tables):
        return sum(counts)
    try:
        return _feed(recipe).num_rows
    except ConfigError as error:
        raise ConfigError(f"{error}; or give the number of its rows by --rows") from None


def sample_rows(recipe: AnyRecipe) -> RowSize | None:
    """Mean sizes of the first rows of a stage; None until its data and its model exist.

    Raises:
        ConfigError: none of these rows can be used.
    """
    try:
        folder = resolve_checkpoint(recipe.init_from)
    except CheckpointError:
        return None
    from flashvl.train.feed.feed import read_steps
    from flashvl.train.feed.shares import decode_share

    try:
        feed = _feed(recipe.model_copy(update={"init_from": str(folder)}))
    except ConfigError:
        return None
    share = decode_share(next(read_steps(feed, range(1), num_workers=1)))
    count = len(share.rows)
    if not count:
        raise ConfigError(
            f"none of the first {len(share.dead)} rows of {recipe.stage} can be used:"
            f" {share.dead[0]['reason']}"
        )
    batches = share.micro_batches
    num_tokens = sum(int(batch.lengths.sum()) for batch in batches)
    num_tiles = sum(int(batch.num_tiles.sum()) for batch in batches)
    visual = num_tiles * FlashVLConfig.from_pretrained(folder).image_seq_length
    num_labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
    branches = np.concatenate([batch.branches for batch in batches]).reshape(count, -1)
    return RowSize(
        text_tokens=(num_tokens - visual) / count,
        visual_tokens=visual / count,
        num_tiles=num_tiles / count,
        num_labels=num_labels / count,
        source=f"means of {count} rows",
        branches=tuple(branches.mean(axis=0).tolist()),
    )


def _feed(recipe: AnyRecipe) -> "Feed":
    """The feed of a stage, whose first step has `SAMPLED_ROWS` rows."""
    from flashvl.train.feed.feed import build_feed

    return build_feed(
        recipe.data,
        model=recipe.init_from,
        global_batch_size=SAMPLED_ROWS,
        max_length=recipe.max_length,
        token_budget=recipe.token_budget,
        seed=recipe.seed,
        kind=recipe.kind,
    )
