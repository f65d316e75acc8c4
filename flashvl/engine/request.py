"""What goes into the engine and what comes out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from flashvl.data.features import Message, Tiles

FinishReason = Literal["stop", "length"]
"""The model ended its answer, or `max_new_tokens` did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One conversation to continue."""

    messages: Sequence[Message]
    """`role` and `content`; an `<image>` in a content stands for the next image."""
    images: Sequence[Image.Image] | Tiles = field(default=())
    """RGB images, or the tiles that `features.make_tiles` made of them."""
    max_new_tokens: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The answer to one request; `token_ids` without the end token."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
