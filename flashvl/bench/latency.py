"""How long one request takes, alone on the machine: to its first token, and from token to token.

    flashvl bench latency --preset static --random-weights

The contenders take turns, on the same image and question, and the answer always has the same number
of tokens. `flashvl` is the engine; `generate` is plain transformers with the same weights.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.streamers import BaseStreamer

from flashvl.bench.machine import Machine, measure_machine
from flashvl.data.features import Tiles, encode_prompt, make_tiles, normalize_tiles
from flashvl.data.schema import IMAGE_MARKER
from flashvl.engine import Engine, Request
from flashvl.engine.cache import bytes_per_token
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor

QUESTION = "Describe the image."
WIDTH, HEIGHT = 1024, 768


@dataclass(kw_only=True, slots=True)
class Latency:
    """Of one contender; medians over the rounds."""

    name: str
    ttft_ms: float
    """From the image's tiles to the first token."""
    tpot_ms: float
    """From one token to the next, on average over the answer."""
    tokens_per_s: float
    """Of the whole request."""
    roofline_fraction: float
    """The time that the machine's limits allow, as a share of the time that it took."""
    rounds: list[tuple[float, float]] = field(default_factory=list)
    """(time to the first token, time in all) of each round, in seconds."""


def measure_latency(
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    *,
    num_tokens: int = 128,
    rounds: int = 5,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Machine, list[Latency]]:
    """Time the engine and plain `generate` in turn; the first round warms up and does not count."""
    machine = measure_machine(model.dtype, model.device)
    engine = Engine(model, processor)
    tiles = make_tiles([Image.new("RGB", (WIDTH, HEIGHT), "teal")], processor)
    contenders = {
        "flashvl": lambda: _time_engine(engine, tiles, num_tokens),
        "generate": lambda: _time_generate(engine, tiles, num_tokens),
    }
    rounds_of: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            engine.image_features.clear()
            seconds = run()
            if number:
                rounds_of[name].append(seconds)
        on_progress(number, rounds)
    best_s = _roofline_s(engine, tiles, num_tokens, machine)
    return machine, [
        _summarize(name, measured, num_tokens, best_s) for name, measured in rounds_of.items()
    ]


def as_json(machine: Machine, latencies: list[Latency]) -> dict[str, Any]:
    """What `--json` writes."""
    return {"machine": asdict(machine), "contenders": [asdict(each) for each in latencies]}


def _summarize(
    name: str, rounds: list[tuple[float, float]], num_tokens: int, best_s: float
) -> Latency:
    first_s = statistics.median(first for first, _ in rounds)
    whole_s = statistics.median(whole for _, whole in rounds)
    step_s = statistics.median((whole - first) / max(num_tokens - 1, 1) for first, whole in rounds)
    return Latency(
        name=name,
        ttft_ms=first_s * 1e3,
        tpot_ms=step_s * 1e3,
        tokens_per_s=num_tokens / whole_s,
        roofline_fraction=best_s / whole_s,
        rounds=rounds,
    )


def _time_engine(engine: Engine, tiles: Tiles, num_tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    times = [time.perf_counter() for _ in engine.stream(_request(tiles, num_tokens))]
    return times[0] - start, times[-1] - start


class _Clock(BaseStreamer):
    """Notes when `generate` has a token; its first call is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _time_generate(engine: Engine, tiles: Tiles, num_tokens: int) -> tuple[float, float]:
    clock = _Clock()
    request = _request(tiles, num_tokens)
    start = time.perf_counter()
    prompt = encode_prompt(request.messages, tiles.counts, engine.processor)
    pixels = torch.from_numpy(tiles.pixels).to(engine.device)
    with torch.inference_mode():
        engine.model.generate(
            input_ids=torch.tensor([prompt], device=engine.device),
            pixel_values=normalize_tiles(pixels, engine.processor),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=engine.processor.tokenizer.pad_token_id,
            streamer=clock,
        )
    return clock.times[1] - start, clock.times[-1] - start


def _request(tiles: Tiles, num_tokens: int) -> Request:
    messages = [{"role": "user", "content": f"{IMAGE_MARKER}\n{QUESTION}"}]
    return Request(messages=messages, images=tiles, max_new_tokens=num_tokens, ignore_eos=True)


def _roofline_s(engine: Engine, tiles: Tiles, num_tokens: int, machine: Machine) -> float:
    """Prefill at the rate of matrix products, then each step at the rate of reading.

    The products are counted on the meta device; a step reads the LLM's weights and its cache once.
    """
    config = engine.model.config
    prompt = encode_prompt(_request(tiles, 1).messages, tiles.counts, engine.processor)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = type(engine.model)(config)
        twin.get_image_features(torch.empty(tiles.pixels.shape))
        embeddings = torch.empty(1, len(prompt), config.text_config.hidden_size)
        mask = torch.empty(1, 1, len(prompt), len(prompt))  # a made one would need real numbers
        twin(inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=1, use_cache=False)
    llm = engine.model.model.language_model
    step_bytes = sum(weight.nbytes for weight in llm.parameters())
    cache_bytes = (len(prompt) + num_tokens / 2) * bytes_per_token(
        config.text_config, engine.model.dtype
    )
    prefill_s = counter.get_total_flops() / (machine.gemm_tflops * 1e12)
    step_s = (step_bytes + cache_bytes) / (machine.read_gb_per_s * 1e9)
    return prefill_s + (num_tokens - 1) * step_s
