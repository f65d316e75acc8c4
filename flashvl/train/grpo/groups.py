"""Groups of completions -> micro-batches: a prompt once, then its completions as branches."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashvl.data.features import IGNORE_INDEX
from flashvl.model import FlashVLConfig
from flashvl.train.feed.packing import pack
from flashvl.train.feed.shares import Int32s, MicroBatch, Tiles
from flashvl.train.flops import row_flops
from flashvl.train.grpo.advantages import Float64s


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt, and which of its completions this worker makes."""

    row: int
    source: int
    """Number of the table that the row comes from."""
    input_ids: Int32s
    tiles: Tiles
    first_completion: int
    num_completions: int
    messages: list[dict[str, str]]
    id: str
    """What a person finds the row by."""
    columns: dict[str, Any]
    """The row's other columns, as `answer`, for the reward functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A completion that the engine has sampled."""

    token_ids: list[int]
    """Its tokens, with the end token, if it ended so."""
    logprobs: list[float]
    """Log-probability of each token by the engine, at temperature 1."""
    text: str
    is_cut: bool
    """Whether the completion reached `max_completion_length`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupBatch(MicroBatch):
    """A micro-batch of prompts with completions."""

    advantages: npt.NDArray[np.float32]
    """(branches,)."""
    sampled_logprobs: npt.NDArray[np.float32]
    """(tokens of all branches,): log-probabilities by the engine, at temperature 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Some completions of a group, which are computed with a copy of the prompt."""

    prompt: Prompt
    rollouts: Sequence[Rollout]
    advantages: Float64s

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids) + sum(len(each.token_ids) for each in self.rollouts)


def build_batches(
    prompts: Sequence[Prompt],
    rollouts: Sequence[Sequence[Rollout]],
    advantages: Sequence[Float64s],
    config: FlashVLConfig,
    token_budget: int,
) -> list[GroupBatch]:
    """The micro-batches of a worker; none without completions.

    A group whose tokens exceed `token_budget` is split, each part with the prompt.

    Args:
        rollouts: completions of each prompt that this worker has made.
        advantages: of these completions.
    """
    groups = zip(prompts, rollouts, advantages, strict=True)
    parts = [part for group in groups for part in _split(*group, token_budget)]
    if not parts:
        return []
    lengths = [part.length for part in parts]
    costs = [row_flops(config, part.length, len(part.prompt.tiles)) for part in parts]
    (bins,) = pack(lengths, costs, 1, token_budget)
    return [_join([parts[place] for place in places]) for places in bins if places]


def empty_batch(tile_side: int) -> GroupBatch:
    """A micro-batch of nothing: workers must take the same number of micro-batches."""
    none = np.empty(0, np.int32)
    return GroupBatch(
        input_ids=none,
        labels=none,
        lengths=none,
        num_branches=none,
        branches=none,
        sources=none,
        num_tiles=none,
        tiles=np.empty((0, 3, tile_side, tile_side), np.uint8),
        advantages=np.empty(0, np.float32),
        sampled_logprobs=np.empty(0, np.float32),
    )


def _split(
    prompt: Prompt, rollouts: Sequence[Rollout], advantages: Float64s, token_budget: int
) -> Iterator[_Part]:
    start = 0
    room = token_budget - len(prompt.input_ids)
    used = 0
    for number, rollout in enumerate(rollouts):
        if number > start and used + len(rollout.token_ids) > room:
            yield _Part(
                prompt=prompt, rollouts=rollouts[start:number], advantages=advantages[start:number]
            )
            start, used = number, 0
        used += len(rollout.token_ids)
    if start < len(rollouts):
        yield _Part(prompt=prompt, rollouts=rollouts[start:], advantages=advantages[start:])


def _join(parts: Sequence[_Part]) -> GroupBatch:
    rollouts = [rollout for part in parts for rollout in part.rollouts]
    input_ids, labels = [], []
    for part in parts:
        said = [np.array(rollout.token_ids, np.int32) for rollout in part.rollouts]
        input_ids += [part.prompt.input_ids, *said]
        labels += [np.full_like(part.prompt.input_ids, IGNORE_INDEX), *said]
    return GroupBatch(
        input_ids=np.concatenate(input_ids),
        labels=np.concatenate(labels),
        lengths=np.array([part.length for part in parts], np.int32),
        num_branches=np.array([len(part.rollouts) for part in parts], np.int32),
        branches=np.array([len(rollout.token_ids) for rollout in rollouts], np.int32),
        sources=np.array([part.prompt.source for part in parts], np.int32),
        num_tiles=np.array([len(part.prompt.tiles) for part in parts], np.int32),
        tiles=np.concatenate([part.prompt.tiles for part in parts]),
        advantages=np.concatenate([part.advantages for part in parts]).astype(np.float32),
        sampled_logprobs=np.array(
            list(itertools.chain.from_iterable(rollout.logprobs for rollout in rollouts)),
            np.float32,
        ),
    )
