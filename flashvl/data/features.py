"""Messages and images -> the model's inputs. Pure functions: no Ray, no files.

Pixels stay uint8 between processes (a quarter of the bytes of fp32); `normalize_tiles` is the last
step before the tower.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from flashvl.data.images import decode_reduced
from flashvl.data.limits import DEFAULT_LIMITS, ImageLimits
from flashvl.data.schema import IMAGE_MARKER
from flashvl.errors import DataError
from flashvl.model import FlashVLProcessor

IGNORE_INDEX = -100
"""Label of a token that takes no loss."""

Side = Literal["left", "right"]

Message = Mapping[str, Any]
"""`role` and `content`. A content is a text in which `<image>` stands for an image, or, if the text
may hold `<image>` literally, a list of `{"type": "text", "text": ...}` and `{"type": "image"}`."""

BREAK = "\ufdd0"
"""Character that splits a control token found in a text; Unicode reserves it for internal use."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of some images, one image after the other, resized but not normalised."""

    pixels: npt.NDArray[np.uint8]
    """(tiles of all images, 3, height, width)."""
    counts: tuple[int, ...]
    """Tiles of each image."""


def make_tiles(images: Sequence[Image.Image], processor: FlashVLProcessor) -> Tiles:
    """RGB images -> their tiles, cut by the model's tiling rule."""
    return _join([processor.image_processor.cut_tiles(image) for image in images], processor)


def _join(cut: Sequence[npt.NDArray[np.uint8]], processor: FlashVLProcessor) -> Tiles:
    side = processor.image_processor.size["height"]
    none = np.zeros((0, 3, side, side), np.uint8)
    return Tiles(np.concatenate([none, *cut]), tuple(map(len, cut)))


def decode_tiles(
    images: Iterable[bytes | None],
    processor: FlashVLProcessor,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Tiles:
    """Encoded images -> their tiles, without decoding more of a JPEG than they need.

    Raises:
        DataError: an image cannot be decoded, as in `decode_image`.
    """
    image_processor = processor.image_processor
    decoded = [decode_reduced(data, image_processor.least_size, limits) for data in images]
    return _join([image_processor.cut_tiles(image, size) for image, size in decoded], processor)


def tiles_from_bytes(data: bytes, processor: FlashVLProcessor) -> npt.NDArray[np.uint8]:
    """The bytes of `Tiles.pixels.tobytes()` -> the pixels again, read-only."""
    side = processor.image_processor.size["height"]
    return np.frombuffer(data, np.uint8).reshape(-1, 3, side, side)


def normalize_tiles(tiles: torch.Tensor, processor: FlashVLProcessor) -> torch.Tensor:
    """uint8 tiles -> fp32 `pixel_values`, scaled and normalised like the image processor's."""
    image_processor = processor.image_processor
    mean = torch.tensor(image_processor.image_mean, device=tiles.device).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std, device=tiles.device).view(3, 1, 1)
    return (tiles.float() * image_processor.rescale_factor - mean) / std


def ask_about_image(question: str, num_images: int = 1) -> list[Message]:
    """A conversation of one question about `num_images` images, which come first."""
    return [{"role": "user", "content": f"{IMAGE_MARKER}\n" * num_images + question}]


def encode_prompt(
    messages: Sequence[Message], counts: Sequence[int], processor: FlashVLProcessor
) -> list[int]:
    """Token ids of a conversation that the assistant is to continue.

    A control token inside a message's text, such as `<|im_start|>`, is encoded as plain text, so
    that the author of a message can neither end it nor begin another.

    Args:
        counts: tiles of each image, in the order of the images in the messages.

    Raises:
        DataError: the messages do not have one place for each image.
    """
    text: str = processor.tokenizer.apply_chat_template(
        _expand_images(messages, counts, processor),
        chat_template=processor.chat_template,
        add_generation_prompt=True,
        tokenize=False,
    )
    return [token for token, _, _ in _tokens(text, processor)]


def encode_conversation(
    messages: Sequence[Message],
    counts: Sequence[int],
    processor: FlashVLProcessor,
    max_length: int,
) -> tuple[list[int], list[int]]:
    """Token ids of a whole conversation, and its labels: -100 outside the assistant's turns.

    A control token inside a message's text is encoded as plain text, as in `encode_prompt`.

    Args:
        counts: tiles of each image, in the order of the `<image>`s.

    Raises:
        DataError: the messages do not have one `<image>` for each image, are longer than
            `max_length` tokens (cutting them could cut an image), or hold no answer.
    """
    (text,), (answers,) = render_jinja_template(
        [_expand_images(messages, counts, processor)],
        chat_template=processor.chat_template,
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    input_ids, is_answer = [], []
    spans = iter([*answers, (len(text), len(text))])
    start, end = next(spans)
    for token, first, last in _tokens(text, processor):
        while end <= first and end < len(text):
            start, end = next(spans)
        input_ids.append(token)
        is_answer.append(first < end and start < last)
    if len(input_ids) > max_length:
        raise DataError(
            f"conversation has {len(input_ids)} tokens, more than max_length={max_length};"
            " raise max_length or shorten the conversation"
        )
    if not any(is_answer):
        raise DataError("conversation has no assistant turn; there is nothing to learn from it")
    labels = [
        token if answer else IGNORE_INDEX
        for token, answer in zip(input_ids, is_answer, strict=True)
    ]
    return input_ids, labels


def _expand_images(
    messages: Sequence[Message],
    counts: Sequence[int],
    processor: FlashVLProcessor,
) -> list[dict[str, str]]:
    """The messages with every image's placeholders filled in, and no other control token."""
    control_tokens = _control_tokens(processor.tokenizer)

    def as_text(text: str) -> str:
        text = text.replace(BREAK, "\N{REPLACEMENT CHARACTER}")
        return control_tokens.sub(lambda token: token[0][0] + BREAK + token[0][1:], text)

    contents = [_pieces(message["content"]) for message in messages]
    num_places = sum(piece is None for content in contents for piece in content)
    if num_places != len(counts):
        raise DataError(
            f"messages hold {num_places} {IMAGE_MARKER}, but {len(counts)} images are"
            f" given; write one {IMAGE_MARKER} for each image"
        )
    images = map(processor.image_text, counts)
    return [
        {
            "role": message["role"],
            "content": "".join(
                next(images) if piece is None else as_text(piece) for piece in content
            ),
        }
        for message, content in zip(messages, contents, strict=True)
    ]


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokenizer.added_tokens_encoder)))


def _tokens(text: str, processor: FlashVLProcessor) -> Iterator[tuple[int, int, int]]:
    """Each token of a rendered text, with the places in the text where it begins and ends."""
    start = 0
    for piece in text.split(BREAK):
        encoded = processor.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        for token, (first, last) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield token, start + first, start + last
        start += len(piece) + len(BREAK)


def _pieces(content: str | list[dict[str, str]]) -> list[str | None]:
    """A message's texts, with None where an image goes."""
    if isinstance(content, str):
        texts: list[str | None] = list(content.split(IMAGE_MARKER))
        return list(itertools.chain.from_iterable((None, text) for text in texts))[1:]
    pieces: list[str | None] = []
    for part in content:
        # An image has a line of its own, as in the chat template and in training.
        pieces += [None, "\n"] if part["type"] == "image" else [part["text"]]
    return pieces


def pad(rows: Iterable[npt.ArrayLike], value: int, side: Side = "right") -> torch.Tensor:
    """Ragged rows -> (rows, longest), padded with `value` on the right or the left."""
    arrays = [np.asarray(row, np.int64) for row in rows]
    length = max(map(len, arrays))
    padded = np.full((len(arrays), length), value, np.int64)
    for line, array in zip(padded, arrays, strict=True):
        start = 0 if side == "right" else length - len(array)
        line[start : start + len(array)] = array
    return torch.from_numpy(padded)
