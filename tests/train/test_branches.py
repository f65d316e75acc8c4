"""A document with branches equals its branches alone, each in a row with the prompt."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashvl.data.features import IGNORE_INDEX, encode_conversation, encode_prompt, make_tiles
from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from flashvl.train.answers import Answers
from flashvl.train.branches import find_predictors, list_parts, number_branches, place_tokens
from flashvl.train.feed.shares import Document, MicroBatch, decode_share, encode_share
from flashvl.train.packed import model_inputs
from tests.train.test_packed import assert_same, packed, picture, plain

Folder = Callable[[str], Path]
SIDE = 96
ANSWERS = ["a red circle", "two", "a large blue square and a small green cross", "the"]


def pair(
    processor: FlashVLProcessor,
    question: str,
    images: Sequence[Image.Image],
    answers: Sequence[str],
) -> tuple[Document, list[Document]]:
    """A document with a branch for each answer, and a document for each answer alone."""
    tiles = make_tiles(images, processor)
    prompt = [{"role": "user", "content": "<image>\n" * len(images) + question}]
    asked = encode_prompt(prompt, tiles.counts, processor)
    alone, ids, labels, branches = [], [*asked], [IGNORE_INDEX] * len(asked), []
    for answer in answers:
        row, row_labels = encode_conversation(
            [*prompt, {"role": "assistant", "content": answer}], tiles.counts, processor, 10**4
        )
        assert row[: len(asked)] == asked
        alone.append(make_document(row, row_labels, tiles.pixels))
        ids += row[len(asked) :]
        labels += row_labels[len(asked) :]
        branches.append(len(row) - len(asked))
    return make_document(ids, labels, tiles.pixels, tuple(branches)), alone


def make_document(
    ids: list[int], labels: list[int], pixels: np.ndarray, branches: tuple[int, ...] = ()
) -> Document:
    return Document(
        row=0,
        source=0,
        input_ids=np.array(ids, np.int32),
        labels=np.array(labels, np.int32),
        tiles=pixels,
        branches=branches,
    )


def one_batch(documents: Sequence[Document]) -> MicroBatch:
    (batch,) = decode_share(encode_share(0, 0, [documents], [], SIDE)).micro_batches
    return batch


KINDS: dict[str, Callable[[FlashVLProcessor], list[tuple[Document, list[Document]]]]] = {
    "text": lambda processor: [
        pair(processor, "Say it", [], ANSWERS),
        pair(processor, "Say it again" + " the" * 40, [], ANSWERS[:1]),
    ],
    "images": lambda processor: [
        pair(processor, "Look", [picture(1), picture(2, 300, 100)], ANSWERS[:2]),
        pair(processor, "Say it", [], ANSWERS[1:]),
        pair(processor, "Describe", [picture(3, 100, 250)], ANSWERS[:3]),
    ],
}


@pytest.fixture(scope="module", params=["tiny", "tiny-iss"])
def objective(request: pytest.FixtureRequest, random_folder: Folder) -> Answers:
    folder = random_folder(request.param)
    return Answers(load_model(folder).train(), load_processor(folder))


@pytest.fixture(scope="module")
def usual(objective: Answers) -> FlashVLForConditionalGeneration:
    """The same model with the library's usual attention."""
    model = FlashVLForConditionalGeneration(FlashVLConfig(**objective.module.config.to_dict()))
    model.load_state_dict(objective.module.state_dict())
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_branches_have_the_loss_and_gradients_of_rows_of_their_own(
    objective: Answers, usual: FlashVLForConditionalGeneration, kind: str
) -> None:
    pairs = KINDS[kind](objective.processor)
    batch = one_batch([branched for branched, _ in pairs])
    alone = [row for _, rows in pairs for row in rows]
    assert_same(packed(objective, [batch]), plain(usual, objective.processor, alone))


@pytest.mark.parametrize("kind", KINDS)
def test_branches_have_the_log_probabilities_of_rows_of_their_own(
    objective: Answers, kind: str
) -> None:
    pairs = KINDS[kind](objective.processor)
    batch = one_batch([branched for branched, _ in pairs])
    alone = one_batch([row for _, rows in pairs for row in rows])
    tensors = [objective.collate(each) for each in (batch, alone)]
    assert tensors[0]["targets"].tolist() == tensors[1]["targets"].tolist()
    with torch.no_grad():
        found = [
            objective.module(**model_inputs(each, objective.processor)).logits.log_softmax(-1)
            for each in tensors
        ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_token_of_a_branch_sees_no_other_branch(objective: Answers) -> None:
    """A branch that is changed moves the loss of its own tokens alone."""
    branched, _ = pair(objective.processor, "Look", [picture(1)], ANSWERS[:3])
    middle = number_branches(one_batch([branched])) == 1
    losses = []
    for token in (70, 71):
        other = one_batch([branched])
        ids = other.input_ids.copy()
        ids[middle] = token
        object.__setattr__(other, "input_ids", ids)
        tensors = objective.collate(other)
        with torch.no_grad():
            logits = objective.module(**model_inputs(tensors, objective.processor)).logits[0]
        losses.append((tensors["branches"], logits))
    branches, before = losses[0]
    differs = (before - losses[1][1]).abs().amax(dim=-1) > 1e-4
    assert not differs[branches != 1].any()
    assert (
        differs[branches == 1].sum() == (branches == 1).sum() - 1
    )  # the prompt predicts the first


def test_places_are_those_of_rows_of_their_own() -> None:
    """Against positions and predictors written out by hand."""
    batch = one_batch(
        [
            make_document([1] * 7, [-100] * 7, np.zeros((0, 3, SIDE, SIDE), np.uint8), (3, 1)),
            make_document([1] * 2, [-100] * 2, np.zeros((0, 3, SIDE, SIDE), np.uint8)),
            make_document([1] * 4, [-100] * 4, np.zeros((0, 3, SIDE, SIDE), np.uint8), (2, 1)),
        ]
    )
    assert [each.tolist() for each in list_parts(batch)] == [[3, 3, 1, 2, 1, 2, 1], [3, 1, 3]]
    assert place_tokens(batch).tolist() == [0, 1, 2, 3, 4, 5, 3, 0, 1, 0, 1, 2, 1]
    assert find_predictors(batch).tolist() == [-1, 0, 1, 2, 3, 4, 2, -1, 7, -1, 9, 10, 9]
    assert number_branches(batch).tolist() == [-1] * 3 + [0] * 3 + [1] + [-1] * 3 + [2, 2, 3]
