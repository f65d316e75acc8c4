"""Contenders of the benchmarks: ways from a JPEG and a question to an answer of a given length.

A contender first prepares its input, from the JPEG's bytes to tensors, and then answers it. The two
are timed apart, so that one run measures both the model alone and the whole way.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.streamers import BaseStreamer

from flashvl.bench.models import Twins
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.features import (
    Tiles,
    ask_about_image,
    decode_tiles,
    encode_prompt,
    normalize_tiles,
)
from flashvl.data.synthetic import PhotoScene, Sample, encode_jpeg
from flashvl.engine import Engine, Request
from flashvl.engine.cache import bytes_per_token

WIDTH, HEIGHT, QUALITY = 1024, 768, 90


def make_photo(seed: int) -> bytes:
    """A JPEG of `WIDTH` x `HEIGHT` with the noise of a photograph."""
    picture = Sample(PhotoScene(seed), (), seed, WIDTH).image().resize((WIDTH, HEIGHT))
    return encode_jpeg(picture, QUALITY)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one answer, the same for every contender with this model.

    Attention counts in full, also where a causal mask would save half of it.
    """

    prompt_tokens: int
    """Tokens of the prompt, the image's included."""
    prefill_flops: float
    """Operations of matrix products, convolutions and attention for image and prompt."""
    weight_bytes: int
    """The size of the LLM's matrices, all of which each new token must read."""
    cache_bytes_per_token: int
    """Keys and values of one token in all layers."""

    def step_bytes(self, num_tokens: int) -> float:
        """Bytes that a decoding step reads, on average over an answer of `num_tokens`."""
        cached = self.prompt_tokens + num_tokens / 2
        return self.weight_bytes + cached * self.cache_bytes_per_token


class Contender(Protocol):
    """A way to answer, with its model in memory."""

    name: str

    def prepare(self, jpeg: bytes) -> Any:
        """Turn a JPEG into the input of `answer`."""

    def answer(self, prepared: Any, num_tokens: int) -> list[float]:
        """Answer with `num_tokens` tokens; returns each token's time by `perf_counter`."""

    def count_work(self, jpeg: bytes) -> Work:
        """The work of an answer about this image."""


@dataclass(kw_only=True, slots=True)
class GenerateContender:
    """A transformers model that answers by its own `generate`."""

    name: str
    model: Any
    make_inputs: Callable[[bytes], dict[str, torch.Tensor]]
    """Turns a JPEG into keyword arguments of `generate`."""

    def prepare(self, jpeg: bytes) -> dict[str, torch.Tensor]:
        return {
            key: value.to(
                self.model.device, self.model.dtype if value.is_floating_point() else None
            )
            for key, value in self.make_inputs(jpeg).items()
        }

    def answer(self, prepared: dict[str, torch.Tensor], num_tokens: int) -> list[float]:
        return generate(self.model, prepared, num_tokens)

    def count_work(self, jpeg: bytes) -> Work:
        prepared = self.prepare(jpeg)
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            generate(self.model, prepared, 1)
        layers = [m for m in self.model.get_decoder().modules() if isinstance(m, nn.Linear)]
        return Work(
            prompt_tokens=prepared["input_ids"].shape[1],
            prefill_flops=counter.get_total_flops(),
            weight_bytes=sum(layer.weight.nbytes for layer in [*layers, self.model.lm_head]),
            cache_bytes_per_token=bytes_per_token(self.model.config.text_config, self.model.dtype),
        )


@dataclass(kw_only=True, slots=True)
class EngineContender:
    """The engine of `flashvl`."""

    engine: Engine
    twin: GenerateContender
    """The same model without the engine, on which the work is counted."""
    name: str = "flashvl"

    def prepare(self, jpeg: bytes) -> Tiles:
        return decode_tiles([jpeg], self.engine.processor)

    def answer(self, prepared: Tiles, num_tokens: int) -> list[float]:
        self.engine.image_features.clear()
        stream = self.engine.stream(make_request(prepared, num_tokens))
        return [time.perf_counter() for _ in stream]

    def count_work(self, jpeg: bytes) -> Work:
        return self.twin.count_work(jpeg)


def build_flashvl(twins: Twins) -> tuple[EngineContender, GenerateContender]:
    """The engine, and `generate` with the same weights."""
    processor = twins.processor

    def make_inputs(jpeg: bytes) -> dict[str, torch.Tensor]:
        tiles = decode_tiles([jpeg], processor)
        prompt = encode_prompt(make_request(tiles, 1).messages, tiles.counts, processor)
        return {
            "input_ids": torch.tensor([prompt]),
            "pixel_values": normalize_tiles(torch.from_numpy(tiles.pixels), processor),
        }

    plain = GenerateContender(name="flashvl (generate)", model=twins.twin, make_inputs=make_inputs)
    return EngineContender(engine=Engine(twins.model, processor), twin=plain), plain


def make_request(tiles: Tiles, num_tokens: int) -> Request:
    """A request about one image whose answer has exactly `num_tokens` tokens."""
    messages = ask_about_image(DEFAULT_PROMPT)
    return Request(messages=messages, images=tiles, max_new_tokens=num_tokens, ignore_eos=True)


def generate(model: Any, inputs: dict[str, torch.Tensor], num_tokens: int) -> list[float]:
    """Greedy `generate` of exactly `num_tokens` for each row; returns the time of each step."""
    clock = _Clock()
    # Without an end token no answer ends early, and no step spends time on suppressing that token.
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        model.generate(
            **inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, streamer=clock
        )
    return clock.times[1:]


class _Clock(BaseStreamer):
    """Records when `generate` has a token; its first call is for the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of the two products of (queries, keys, head_dim) in each head."""
    batch, heads, num_queries, head_dim = query
    return 4 * batch * heads * num_queries * key[2] * head_dim


# torch has no formula for the CPU's operator, and those for a GPU's refuse heads that share keys.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
}
