"""Messages and images -> what the model takes. Pure functions: no Ray, no files.

Pixels stay uint8 between processes (a quarter of the bytes of fp32); `normalize_tiles` is the last
step before the tower. Messages carry `<image>` where an image goes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from flashvl.data.schema import IMAGE_MARKER
from flashvl.errors import DataError
from flashvl.model import FlashVLProcessor

IGNORE_INDEX = -100
"""Label of a token that takes no loss."""

Side = Literal["left", "right"]

Message = Mapping[str, str]
"""`role` and `content`."""


def make_tiles(images: Sequence[Image.Image], processor: FlashVLProcessor) -> npt.NDArray[np.uint8]:
    """RGB images -> (tiles, 3, height, width), resized but not normalised."""
    if not images:
        size = processor.image_processor.size
        return np.zeros((0, 3, size["height"], size["width"]), np.uint8)
    batch = processor.image_processor(
        list(images), do_rescale=False, do_normalize=False, return_tensors="np"
    )
    return np.asarray(batch["pixel_values"]).astype(np.uint8)


def normalize_tiles(tiles: torch.Tensor, processor: FlashVLProcessor) -> torch.Tensor:
    """uint8 tiles -> fp32 `pixel_values`, scaled and normalised as the image processor does it."""
    image_processor = processor.image_processor
    mean = torch.tensor(image_processor.image_mean, device=tiles.device).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std, device=tiles.device).view(3, 1, 1)
    return (tiles.float() * image_processor.rescale_factor - mean) / std


def encode_prompt(messages: Sequence[Message], processor: FlashVLProcessor) -> list[int]:
    """Token ids of a conversation that the assistant is to continue."""
    return processor.tokenizer.apply_chat_template(
        _expand_images(messages, processor),
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        return_dict=False,
    )


def encode_conversation(
    messages: Sequence[Message], processor: FlashVLProcessor, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and its labels: the assistant's turns, else -100.

    Raises:
        DataError: longer than `max_length` tokens (to cut it could cut an image), or no answer.
    """
    encoded: dict[str, Any] = processor.tokenizer.apply_chat_template(
        _expand_images(messages, processor),
        chat_template=processor.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    input_ids, is_answer = encoded["input_ids"], encoded["assistant_masks"]
    if len(input_ids) > max_length:
        raise DataError(
            f"conversation has {len(input_ids)} tokens, more than max_length={max_length};"
            " raise max_length or shorten it"
        )
    if not any(is_answer):
        raise DataError("conversation has no assistant turn; there is nothing to learn from it")
    labels = [
        token if answer else IGNORE_INDEX
        for token, answer in zip(input_ids, is_answer, strict=True)
    ]
    return input_ids, labels


def _expand_images(
    messages: Sequence[Message], processor: FlashVLProcessor
) -> list[dict[str, str]]:
    if any(processor.image_token in message["content"] for message in messages):
        raise DataError(
            f"a message holds {processor.image_token}, the model's own mark of an image;"
            f" write {IMAGE_MARKER} where an image goes"
        )
    run = processor.image_token * processor.image_seq_length
    return [
        {"role": message["role"], "content": message["content"].replace(IMAGE_MARKER, run)}
        for message in messages
    ]


def pad(rows: Iterable[npt.ArrayLike], value: int, side: Side = "right") -> torch.Tensor:
    """Ragged rows -> (rows, longest), filled up with `value` on the right or the left."""
    arrays = [np.asarray(row, np.int64) for row in rows]
    length = max(map(len, arrays))
    padded = np.full((len(arrays), length), value, np.int64)
    for line, array in zip(padded, arrays, strict=True):
        start = 0 if side == "right" else length - len(array)
        line[start : start + len(array)] = array
    return torch.from_numpy(padded)
