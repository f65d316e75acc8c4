"""Rows of a table or of the procedural world -> documents, which the model can compute."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from flashvl.data import synthetic
from flashvl.data.features import (
    IGNORE_INDEX,
    Tiles,
    decode_tiles,
    encode_conversation,
    encode_prompt,
)
from flashvl.errors import DataError, one_line
from flashvl.model import FlashVLProcessor
from flashvl.train.feed.mixture import SyntheticData
from flashvl.train.feed.shares import Document
from flashvl.train.feed.tables import Kind

Raw = dict[str, Any] | DataError
"""A row's images and texts, or why it cannot be read."""
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
        values, tiles = _open(raw, self.processor)
        try:
            input_ids, labels = encode_conversation(
                _check_messages(values["messages"]), tiles.counts, self.processor, self.max_length
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
class PairEncoder:
    """Preferences: the prompt, and the chosen and the rejected answer as its two branches.

    The labels are the tokens that the assistant says in the branches.
    """

    processor: FlashVLProcessor
    max_length: int

    def encode(self, row: int, source: int, raw: Raw) -> Document:
        values, tiles = _open(raw, self.processor)
        try:
            prompt = _check_messages(values["prompt"])
            asked = encode_prompt(prompt, tiles.counts, self.processor)
            answers = [
                encode_conversation(
                    [*prompt, *_check_messages(values[name])],
                    tiles.counts,
                    self.processor,
                    self.max_length,
                )
                for name in ("chosen", "rejected")
            ]
            length = _common_length([asked, *(tokens for tokens, _ in answers)])
            input_ids, labels = asked[:length], [IGNORE_INDEX] * length
            for tokens, labels_of_answer in answers:
                input_ids += tokens[length:]
                labels += labels_of_answer[length:]
            _check_pair(answers[0][0], answers[1][0], len(input_ids), self.max_length)
        except DataError as error:
            raise UnusableError("encode", error) from error
        return Document(
            row=row,
            source=source,
            input_ids=np.array(input_ids, np.int32),
            labels=np.array(labels, np.int32),
            tiles=tiles.pixels,
            branches=tuple(len(tokens) - length for tokens, _ in answers),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEncoder:
    """Prompts, whose completions are sampled in training: no token has a label."""

    processor: FlashVLProcessor
    max_length: int

    def encode(self, row: int, source: int, raw: Raw) -> Document:
        values, tiles = _open(raw, self.processor)
        try:
            prompt = _check_messages(values["prompt"])
            input_ids = encode_prompt(prompt, tiles.counts, self.processor)
            if len(input_ids) > self.max_length:
                raise DataError(
                    f"prompt has {len(input_ids)} tokens, more than max_length={self.max_length};"
                    " raise max_length or shorten the prompt"
                )
            if values["answer"] is None:
                raise DataError("prompt has no answer; give each prompt one, as text")
        except DataError as error:
            raise UnusableError("encode", error) from error
        extra = {"id": row, "prompt": prompt, "answer": values["answer"]}
        return Document(
            row=row,
            source=source,
            input_ids=np.array(input_ids, np.int32),
            labels=np.full(len(input_ids), IGNORE_INDEX, np.int32),
            tiles=tiles.pixels,
            extra=json.dumps(extra),
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


def draw(data: SyntheticData, row: int, kind: Kind) -> Raw:
    """A row of the procedural world, as from a table; for kind `cells` with the labels of its
    `cells`."""
    if kind == "dpo":
        return synthetic.preference(synthetic.pair(data.split, data.seed, row), row)
    is_replayed = random.Random(f"replay/{data.seed}/{row}").random() < data.replay_share
    tasks = synthetic.TASKS if is_replayed else data.tasks
    sample = synthetic.sample(data.split, data.seed, row, tasks, bool(data.is_large))
    if kind == "grpo":
        return synthetic.problem(sample, row)
    if is_replayed:
        return synthetic.conversation(sample, row)
    conversation = synthetic.conversation(sample, row, data.words_share, data.worked_share)
    if kind == "cells":
        conversation["cells"] = synthetic.cell_labels(sample.scene)
    return conversation


def _open(raw: Raw, processor: FlashVLProcessor) -> tuple[dict[str, Any], Tiles]:
    """A row's values, and the tiles of its images.

    Raises:
        UnusableError: the row cannot be read, or an image of it not be decoded.
    """
    if isinstance(raw, DataError):
        raise UnusableError("read", raw)
    try:
        return raw, decode_tiles(raw["images"] or [], processor)
    except DataError as error:
        raise UnusableError("decode", error) from error


def _common_length(texts: Sequence[Sequence[int]]) -> int:
    """Tokens with which all texts begin.

    A prompt's last token may differ from the one in the whole text, where the answer's beginning is
    merged with it: then it belongs to the branches.
    """
    tokens = enumerate(zip(*texts, strict=False))
    shortest = min(map(len, texts))
    return next((place for place, each in tokens if len(set(each)) > 1), shortest)


def _check_pair(chosen: list[int], rejected: list[int], length: int, max_length: int) -> None:
    """
    Raises:
        DataError: the answers are alike, or prompt and answers are too long.
    """
    if chosen == rejected:
        raise DataError("chosen and rejected are the same; there is nothing to prefer")
    if length > max_length:
        raise DataError(
            f"prompt and both answers have {length} tokens, more than max_length={max_length};"
            " raise max_length or shorten them"
        )


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
