"""Prompts, and the one copy of each that the requests with the same prompt can share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import numpy as np
import torch

from flashvl.data.features import Tiles
from flashvl.engine.cache import HeldPrompt

SAMPLED_PIXELS = 1009
"""Distance of the bytes of an image that are hashed to find images that may be equal."""


@dataclass(eq=False, kw_only=True, slots=True)
class SharedPrompt:
    """A prompt that is prefilled once for several requests, and what is left of that."""

    held: HeldPrompt
    embeddings: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """Embeddings of the prompt, kept until it is prefilled."""
    num_cached: int = 0
    """Tokens of the prompt that the cache holds."""
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """(vocabulary,): logits of the first token of each answer, once the prompt is prefilled."""

    @property
    def is_prefilled(self) -> bool:
        """Whether the cache holds the whole prompt."""
        return self.num_cached >= self.held.num_tokens


@dataclass(eq=False, slots=True, weakref_slot=True)
class Prompt:
    """The prompt of a request; equal prompts of requests that are here together are one object."""

    token_ids: list[int]
    tiles: Tiles
    shared: SharedPrompt | None = None
    """The copy in the cache that requests with this prompt share, if there is one."""

    def __len__(self) -> int:
        return len(self.token_ids)


class Prompts:
    """Finds out which requests have the same prompt."""

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[int, Prompt] = WeakValueDictionary()

    def make(self, token_ids: Sequence[int], tiles: Tiles) -> Prompt:
        """The prompt of these tokens and images: that of an earlier request, if it is alive."""
        sampled = tiles.pixels.reshape(-1)[::SAMPLED_PIXELS].tobytes()
        key = hash((tuple(token_ids), tiles.counts, sampled))
        found = self._alive.get(key)
        if found is None or not _is_equal(found, token_ids, tiles):
            found = self._alive[key] = Prompt(list(token_ids), tiles)
        return found


def _is_equal(prompt: Prompt, token_ids: Sequence[int], tiles: Tiles) -> bool:
    if prompt.token_ids != list(token_ids) or prompt.tiles.counts != tiles.counts:
        return False
    ours, theirs = prompt.tiles.pixels, tiles.pixels
    return ours is theirs or np.array_equal(ours, theirs)
