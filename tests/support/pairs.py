"""Pairs of answers about scenes, and a step of DPO on them, without TRL, which loads slowly."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flashvl.data import synthetic
from flashvl.model.loading import load_model, load_processor
from flashvl.train.feed.documents import PairEncoder
from flashvl.train.feed.packing import pack
from flashvl.train.feed.shares import MicroBatch, decode_share, encode_share
from flashvl.train.pairs import Pairs
from flashvl.train.recipe import LoraSettings
from flashvl.train.run.lora import add_adapters
from flashvl.train.run.schedule import freeze_all_but

BETA = 0.3
SETTINGS = LoraSettings(r=4, alpha=8)
PARTS = ("multi_modal_projector", "language_model")
WRONG = ("a small red cross and a large blue diamond", "7", "nothing", "the")


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Pairs of answers of different lengths about scenes of different sizes."""
    drawn = list(synthetic.samples("train", 7, count))
    return [
        {
            "prompt": [{"role": "user", "content": sample.turns[0].question}],
            "images": [sample.image()],
            "chosen": [{"role": "assistant", "content": sample.turns[0].answer}],
            "rejected": [{"role": "assistant", "content": wrong}],
        }
        for sample, wrong in zip(drawn, WRONG, strict=True)
    ]


def batches_of(
    folder: Path, pairs: Sequence[dict[str, Any]], num_workers: int = 1, token_budget: int = 10**5
) -> list[MicroBatch]:
    """The micro-batches of all workers, as a step of the feed has them."""
    processor = load_processor(folder)
    encoder = PairEncoder(processor=processor, max_length=10**4)
    documents = []
    for number, pair in enumerate(pairs):
        (question,) = pair["prompt"]
        marks = "<image>\n" * len(pair["images"])
        raw = pair | {
            "prompt": [question | {"content": marks + question["content"]}],
            "images": [png(image) for image in pair["images"]],
        }
        documents.append(encoder.encode(number, 0, raw))
    lengths = [len(each.input_ids) for each in documents]
    found: list[MicroBatch] = []
    for rank, bins in enumerate(pack(lengths, lengths, num_workers, token_budget)):
        packed = [[documents[place] for place in places] for places in bins]
        found += decode_share(encode_share(0, rank, packed, [], 96)).micro_batches
    return found


def png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def build(folder: Path, lora: LoraSettings | None) -> Pairs:
    model = load_model(folder).train()
    adapters = add_adapters(model, lora, PARTS) if lora is not None else None
    if lora is None:
        freeze_all_but(model, PARTS)
    return Pairs(model, load_processor(folder), adapters, BETA)


def trained_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by the names that they have in the model."""
    return {
        name_in_model(name): weight
        for name, weight in module.named_parameters()
        if weight.requires_grad
    }


def name_in_model(name: str) -> str:
    return re.sub(r"^.*?(multi_modal_projector|language_model|lm_head)", r"\1", name)


def move(weights: dict[str, nn.Parameter]) -> None:
    """Give the weights a random change, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in sorted(weights):
            weights[name] += 0.03 * torch.randn(weights[name].shape, generator=generator)


def step(objective: Pairs, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    num_items = torch.tensor(float(sum(objective.count_items(each).sum() for each in batches)))
    total = 0.0
    for each in batches:
        loss, by_document = objective.loss(objective.module, objective.collate(each), num_items)
        assert by_document.shape == (len(each.lengths),)
        loss.backward()
        total += loss.item()
    gradients = {}
    for name, weight in trained_of(objective.module).items():
        gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        weight.grad = None
    return total, gradients
