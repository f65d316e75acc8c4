"""Rows of a table or of the procedural world -> documents, which the model can compute."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from flashvl.data import synthetic
from flashvl.data.features import decode_tiles, encode_conversation
from flashvl.errors import DataError, one_line
from flashvl.model import FlashVLProcessor
from flashvl.train.feed.mixture import SyntheticData
from flashvl.train.feed.shares import Document

Raw = dict[str, Any] | DataError
"""A row's images and messages, or why it cannot be read."""
Step = Literal["read", "decode", "encode"]


class UnusableError(Exception):
    """A row cannot be used.

    Args:
        step: what failed.
        error: why.
    """

    def __init__(self, step: Step, error: DataError):
        super().__init__(step, error)
        self.step, self.error = step, error

    def dead_letter(self, row: int, id: str) -> dict[str, Any]:
        """The row as one of `schema.DEAD_LETTERS`."""
        return {
            "id": id,
            "step": self.step,
            "error": type(self.error).__name__,
            "reason": one_line(self.error, width=1000),
            "row": row,
        }


class Encoder(Protocol):
    """Makes documents of rows."""

    def encode(self, row: int, source: int, raw: Raw) -> Document:
        """The document of a row.

        Raises:
            UnusableError: the row cannot be used.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationEncoder:
    """Conversations, whose labels are the tokens of the assistant's turns."""

    processor: FlashVLProcessor
    max_length: int

    def encode(self, row: int, source: int, raw: Raw) -> Document:
        if isinstance(raw, DataError):
            raise UnusableError("read", raw)
        try:
            tiles = decode_tiles(raw["images"] or [], self.processor)
        except DataError as error:
            raise UnusableError("decode", error) from error
        try:
            input_ids, labels = encode_conversation(
                _check_messages(raw["messages"]), tiles.counts, self.processor, self.max_length
            )
        except DataError as error:
            raise UnusableError("encode", error) from error
        return Document(
            row=row,
            source=source,
            input_ids=np.array(input_ids, np.int32),
            labels=np.array(labels, np.int32),
            tiles=tiles.pixels,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CellsEncoder:
    """Scenes of the procedural world, whose labels are what lies in each cell, a token each."""

    processor: FlashVLProcessor

    def encode(self, row: int, source: int, raw: Raw) -> Document:
        assert not isinstance(raw, DataError)  # what is drawn can be read
        cells = raw["cells"]
        return Document(
            row=row,
            source=source,
            input_ids=np.full(len(cells), self.processor.image_token_id, np.int32),
            labels=cells.astype(np.int32).reshape(-1),
            tiles=decode_tiles(raw["images"], self.processor).pixels,
        )


def draw(data: SyntheticData, row: int) -> Raw:
    """A row of the procedural world, as from a table, with the labels of its `cells`."""
    sample = synthetic.sample("train", data.seed, row, data.tasks)
    conversation = synthetic.conversation(sample, row, data.words_share)
    return conversation | {"cells": synthetic.cell_labels(sample.scene)}


def _check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages, of which none is null.

    Raises:
        DataError: the messages, or a role or a content among them, are null.
    """
    for number, message in enumerate(messages or [None]):
        if message is None or message["role"] is None or message["content"] is None:
            raise DataError(
                f"message {number} has no role or no content; give each message both, as text"
            )
    return messages
