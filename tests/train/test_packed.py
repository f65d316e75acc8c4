"""Packed equals unpacked: the same loss and gradients, and no token sees another document."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from flashvl.data.features import encode_conversation, make_tiles, normalize_tiles
from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from flashvl.train.answers import Answers
from flashvl.train.attention import BY_DOCUMENT
from flashvl.train.feed.packing import pack
from flashvl.train.feed.shares import Document, MicroBatch, decode_share, encode_share
from flashvl.train.flops import row_flops

BUDGET = 700
SIDE = 96
Folder = Callable[[str], Path]


def picture(seed: int, width: int = 90, height: int = 90) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
    corner = rng.integers(0, 40, 2).tolist()
    ImageDraw.Draw(image).rectangle((*corner, 80, 80), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def document(
    processor: FlashVLProcessor, row: int, images: Sequence[Image.Image], words: int, turns: int = 1
) -> Document:
    messages = []
    for turn in range(turns):
        opening = "<image>\n" * len(images) if turn == 0 else ""
        messages.append(
            {"role": "user", "content": f"{opening}Describe row {row}" + " the" * words}
        )
        messages.append({"role": "assistant", "content": f"a large red circle {row * 37}{turn}"})
    tiles = make_tiles(images, processor)
    input_ids, labels = encode_conversation(messages, tiles.counts, processor, BUDGET)
    return Document(
        row=row,
        source=row % 2,
        input_ids=np.array(input_ids, np.int32),
        labels=np.array(labels, np.int32),
        tiles=tiles.pixels,
    )


KINDS: dict[str, Callable[[FlashVLProcessor, int], Document]] = {
    "text": lambda processor, row: document(processor, row, [], 3 + 5 * row, turns=2),
    "one image": lambda processor, row: document(processor, row, [picture(row)], row),
    "many images": lambda processor, row: document(
        processor, row, [picture(10 * row + n) for n in range(1 + row % 3)], row
    ),
    "tiled": lambda processor, row: document(
        processor, row, [picture(row, 300, 100 + 60 * row), picture(row)], row
    ),
}


def mixed(processor: FlashVLProcessor, num_rows: int = 8) -> list[Document]:
    """Rows of all kinds, in turn."""
    makers = list(KINDS.values())
    return [makers[row % len(makers)](processor, row) for row in range(num_rows)]


def micro_batches(
    documents: Sequence[Document],
    num_workers: int = 1,
    token_budget: int = 10**5,
    cost: Callable[[int, int], float] = lambda tokens, tiles: tokens,
) -> Iterator[MicroBatch]:
    """The micro-batches of all workers, as a step of the feed has them."""
    costs = [cost(len(each.input_ids), len(each.tiles)) for each in documents]
    lengths = [len(each.input_ids) for each in documents]
    for rank, bins in enumerate(pack(lengths, costs, num_workers, token_budget)):
        packed = [[documents[place] for place in places] for places in bins]
        yield from decode_share(encode_share(0, rank, packed, [], SIDE)).micro_batches


def gradients(model: FlashVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    found = {}
    for name, weight in model.named_parameters():
        found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        weight.grad = None
    return found


def plain(
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    documents: Sequence[Document],
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the model's own loss, one document after the other."""
    num_items = sum(int((each.labels != -100).sum()) for each in documents)
    total = 0.0
    for each in documents:
        pixels = {}
        if len(each.tiles):
            tiles = torch.from_numpy(each.tiles)
            pixels = {"pixel_values": normalize_tiles(tiles, processor)}
        loss = model(
            input_ids=torch.from_numpy(each.input_ids.astype(np.int64))[None],
            labels=torch.from_numpy(each.labels.astype(np.int64))[None],
            num_items_in_batch=torch.tensor(num_items),
            use_cache=False,
            **pixels,
        ).loss
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def packed(
    objective: Answers, batches: Sequence[MicroBatch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the objective."""
    num_items = torch.tensor(float(sum(objective.count_items(each).sum() for each in batches)))
    total = 0.0
    for each in batches:
        loss, by_document = objective.loss(objective.module, objective.collate(each), num_items)
        assert len(by_document) == len(each.lengths)
        torch.testing.assert_close(by_document.sum() / num_items, loss.detach())
        loss.backward()
        total += loss.item()
    return total, gradients(objective.module)


def assert_same(
    found: tuple[float, dict[str, torch.Tensor]], expected: tuple[float, dict[str, torch.Tensor]]
) -> None:
    """The same loss, and gradients that differ by at most 1e-5 of the largest in a part.

    Those of single parameters may be rounding errors: a key's bias, say, has no influence.
    """
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    largest: dict[str, float] = {}
    for name, gradient in expected[1].items():
        part = ".".join(name.split(".")[:2])
        largest[part] = max(largest.get(part, 0.0), float(gradient.abs().max()))
    for name, gradient in expected[1].items():
        atol = 1e-5 * largest[".".join(name.split(".")[:2])]
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module", params=["tiny", "tiny-iss"])
def objective(request: pytest.FixtureRequest, random_folder: Folder) -> Answers:
    folder = random_folder(request.param)
    return Answers(load_model(folder).train(), load_processor(folder))


@pytest.fixture(scope="module")
def alone(objective: Answers) -> FlashVLForConditionalGeneration:
    """The same model with the library's usual attention."""
    model = FlashVLForConditionalGeneration(FlashVLConfig(**objective.module.config.to_dict()))
    model.load_state_dict(objective.module.state_dict())
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_give_the_loss_and_gradients_of_rows_alone(
    objective: Answers, alone: FlashVLForConditionalGeneration, kind: str
) -> None:
    documents = [KINDS[kind](objective.processor, row) for row in range(4)]
    (batch,) = micro_batches(documents)
    assert len(batch.lengths) == 4
    assert_same(packed(objective, [batch]), plain(alone, objective.processor, documents))


@pytest.mark.parametrize("num_workers", [1, 2, 4, 8, 11])
def test_loss_and_gradients_do_not_depend_on_how_rows_are_split(
    objective: Answers, alone: FlashVLForConditionalGeneration, num_workers: int
) -> None:
    """Worlds of 1 to 8 workers, and one with more workers than rows, some of which compute none."""
    documents = mixed(objective.processor)
    cost = partial(row_flops, objective.module.config)
    batches = list(micro_batches(documents, num_workers, BUDGET, cost))
    assert num_workers < 8 or len(batches) == num_workers
    assert_same(packed(objective, batches), plain(alone, objective.processor, documents))


@pytest.mark.parametrize("attention", [BY_DOCUMENT, "sdpa", "eager", "flex_attention"])
@torch.compiler.set_stance("force_eager")  # PyTorch's C++ for flex attention does not compile
def test_no_token_sees_another_document(random_folder: Folder, attention: str) -> None:
    folder = random_folder("tiny-iss")
    objective = Answers(load_model(folder).eval(), load_processor(folder))
    objective.module.set_attn_implementation({"text_config": attention})
    documents = mixed(objective.processor, 4)
    changed = [KINDS["tiled"](objective.processor, 9), *documents[1:3], documents[2]]
    lengths = [len(each.input_ids) for each in documents]

    def logits(documents: Sequence[Document]) -> list[torch.Tensor]:
        (batch,) = decode_share(encode_share(0, 0, [documents], [], SIDE)).micro_batches
        tensors = objective.collate(batch)
        with torch.no_grad():
            found = objective.module(
                input_ids=tensors["input_ids"],
                position_ids=tensors["position_ids"],
                pixel_values=normalize_tiles(tensors["tiles"], objective.processor),
                document_parts=[[length] for length in batch.lengths.tolist()],
                use_cache=False,
            ).logits[0]
        return list(found.split(batch.lengths.tolist()))

    before, after = logits(documents), logits(changed)
    assert list(map(len, before)) == lengths
    for number in (1, 2):
        torch.testing.assert_close(before[number], after[number], rtol=1e-5, atol=1e-4)
    alone = logits([documents[3]])
    torch.testing.assert_close(before[3], alone[0], rtol=1e-5, atol=1e-4)


def test_a_token_sees_the_documents_own_beginning(objective: Answers) -> None:
    """The check of isolation would find a leak: within a document a change is seen."""
    first, other = (KINDS["text"](objective.processor, row) for row in (1, 1))
    other.input_ids[3] += 1
    losses = []
    for each in (first, other):
        (batch,) = micro_batches([each])
        losses.append(packed(objective, [batch])[0])
    assert losses[0] != losses[1]
