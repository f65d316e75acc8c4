"""Flash-VL beside the peers of the paper's comparison, at their true sizes with random weights.

    flashvl bench peers --plot peers.png

Each peer is transformers' own class with its own image processor, and the configuration of the
published checkpoint. Only the text around the image is ours; it has the same length for all.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    InternVLConfig,
    LlamaConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from flashvl.bench import vllm
from flashvl.bench.contenders import Contender, GenerateContender, build_flashvl
from flashvl.bench.latency import Latency, measure_latency
from flashvl.bench.machine import Machine, measure_machine
from flashvl.bench.models import RandomWeights, build_twins
from flashvl.bench.throughput import Throughput, compare_at_once
from flashvl.errors import ConfigError
from flashvl.model.presets import qwen2_1_5b
from flashvl.progress import ShowProgress, ignore_progress

NUM_TEXT_TOKENS = 30
"""Tokens of the chat template and the question."""
VLLM_WIDTH = 16
"""Requests that the engine and vLLM answer at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """A model, and what an image of 1024x768 becomes in its prompt."""

    build_config: Callable[[], PreTrainedConfig]
    image_processor: Any
    num_image_tokens: int
    """Placeholders of the image; the model's `forward` refuses a wrong number."""
    num_separators: int
    """Tokens around the image and between its tiles."""
    paper_average: float | None
    """The model's average over the paper's 11 benchmarks (Table 2); None, where it has none."""


def _qwen2_vl_2b() -> PreTrainedConfig:
    return Qwen2VLConfig(
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536},
        text_config={
            **_fields(qwen2_1_5b()),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                "mrope_section": [16, 24, 24],
            },
        },
        tie_word_embeddings=True,
    )


def _internvl2_5_2b() -> PreTrainedConfig:
    # InternLM2-1.8B differs from a Llama of this shape by names and by the order of its weights.
    llm = LlamaConfig(
        vocab_size=92553,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    return InternVLConfig(text_config=llm, image_token_id=92546, tie_word_embeddings=False)


def _aquila_vl_2b() -> PreTrainedConfig:
    tower = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaOnevisionConfig(vision_config=tower, text_config=qwen2_1_5b())


def _smolvlm2_2_2b() -> PreTrainedConfig:
    llm = LlamaConfig(
        vocab_size=49280,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    return SmolVLMConfig(
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        text_config=llm,
        scale_factor=3,
        image_token_id=49190,
    )


PEERS = {
    # 74 x 54 patches; four are a token.
    "Qwen2-VL-2B": Peer(
        build_config=_qwen2_vl_2b,
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
        ),
        num_image_tokens=37 * 27,
        num_separators=2,
        paper_average=60.2,
    ),
    # Twelve tiles (4 x 3) and an overview.
    "InternVL2.5-2B": Peer(
        build_config=_internvl2_5_2b,
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=12
        ),
        num_image_tokens=13 * 256,
        num_separators=2,
        paper_average=63.6,
    ),
    # Six tiles (3 x 2) of 27 x 27 patches, without 8 columns of padding; an end token for each
    # line; an overview.
    "Aquila-VL-2B": Peer(
        build_config=_aquila_vl_2b,
        image_processor=LlavaOnevisionImageProcessorPil(),
        num_image_tokens=54 * 73 + 54 + 27 * 27,
        num_separators=0,
        paper_average=62.6,
    ),
    # Twelve tiles (4 x 3) and an overview; nine patches are a token; each tile has two marks.
    "SmolVLM2-2.2B": Peer(
        build_config=_smolvlm2_2_2b,
        image_processor=SmolVLMImageProcessorPil(
            size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}
        ),
        num_image_tokens=13 * 81,
        num_separators=12 * 2 + 3 + 4,
        paper_average=None,
    ),
}
"""The peers by their names in the paper, and SmolVLM2, which is newer than the paper."""


OURS = ("flashvl", "flashvl (generate)")
"""Names of the contenders that run Flash-VL: by the engine, and by `generate`."""

PAPER_AVERAGES = {"static": 62.4, "dynamic": 64.0, "iss": 64.8}
"""Flash-VL's own averages over the paper's 11 benchmarks, by preset."""


def paper_scores(preset: str) -> dict[str, float]:
    """The paper's averages by contender; all that run Flash-VL have the average of `preset`."""
    scores = {name: peer.paper_average for name, peer in PEERS.items()}
    scores |= dict.fromkeys((*OURS, vllm.NAME), PAPER_AVERAGES.get(preset))
    return {name: score for name, score in scores.items() if score is not None}


def choose_names(only: Collection[str] | None) -> list[str]:
    """The names of the contenders to measure: those in `only`, or all.

    Raises:
        ConfigError: no contender has a name that `only` holds.
    """
    known = [*OURS, *PEERS]
    for name in only or known:
        if name not in known:
            raise ConfigError(f"--only {name!r} is none of {', '.join(known)}; name one of these")
    return [name for name in known if name in (only or known)]


@dataclass(kw_only=True, slots=True)
class PeersReport:
    """Flash-VL beside its peers, and the limits of the machine on which they were measured."""

    machine: Machine
    contenders: list[Latency]
    at_once: list[Throughput] = field(default_factory=list)
    """The engine and vLLM with `VLLM_WIDTH` requests at once; empty without vLLM."""
    vllm: str | None = None
    """vLLM's version and settings; None, where it was not run."""


def measure_peers(
    preset: str,
    only: Collection[str] | None = None,
    vllm_python: Path | None = None,
    *,
    num_tokens: int,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> PeersReport:
    """Time one request alone by Flash-VL's `preset` and its peers, all with random weights.

    Args:
        only: names of the contenders to measure; by default all.
        vllm_python: the Python of an environment with vLLM, which then runs Flash-VL, too.

    Raises:
        ConfigError: the preset or a contender is unknown, or vLLM cannot be run.
    """
    names = choose_names(only)
    if vllm_python is not None:
        vllm.check_vllm(vllm_python)
    weights = RandomWeights.for_this_machine()
    twins = build_twins(preset, weights)
    engine, plain = build_flashvl(twins)
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = [each for each in (engine, plain) if each.name in names]
        other = None
        if vllm_python is not None:
            on_progress(0, rounds, "vLLM compiles for some minutes")
            other = stack.enter_context(vllm.run_vllm(vllm_python, plain, twins.processor))
            contenders.append(other)
        contenders += build_peers(weights, names)
        machine = measure_machine(twins.model.dtype, twins.model.device)
        latencies = measure_latency(
            contenders, machine, num_tokens=num_tokens, rounds=rounds, on_progress=on_progress
        )
        report = PeersReport(machine=machine, contenders=latencies)
        if other is not None:
            report.vllm = str(other)
            report.at_once = compare_at_once(
                engine,
                other,
                machine,
                width=VLLM_WIDTH,
                num_tokens=num_tokens,
                rounds=rounds,
                on_progress=on_progress,
            )
    return report


def build_peers(
    weights: RandomWeights, names: Collection[str] = tuple(PEERS)
) -> Iterator[GenerateContender]:
    """The peers that `names` holds, each ready to `generate`."""
    for name, peer in PEERS.items():
        if name not in names:
            continue
        config = peer.build_config()
        yield GenerateContender(
            name=name,
            model=weights.build(config),
            make_inputs=functools.partial(_make_inputs, peer, config),
        )


def _make_inputs(peer: Peer, config: PreTrainedConfig, jpeg: bytes) -> dict[str, torch.Tensor]:
    features = peer.image_processor(Image.open(io.BytesIO(jpeg)), return_tensors="pt")
    text = list(range(100, 100 + NUM_TEXT_TOKENS + peer.num_separators))
    middle = len(text) // 2
    image = [config.image_token_id] * peer.num_image_tokens
    input_ids = torch.tensor([[*text[:middle], *image, *text[middle:]]])
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    taken = {name: features[name] for name in _TAKEN if name in features}
    if "image_grid_thw" in features:  # Qwen2-VL: 1 for each token of an image, for its positions
        taken["mm_token_type_ids"] = (input_ids == config.image_token_id).int()
    return inputs | taken


_TAKEN = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
"""Names of the image processors' outputs that the models' `forward` takes."""


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key in _TEXT_KEYS}


_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)
