"""Memory of training: tensors that torch saves, and peaks of real steps, beside the plan's."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration
from flashvl.model.presets import build_config
from flashvl.train.parameters import MODEL_PARTS, count_parameters
from flashvl.train.plan.activations import BatchSize, activation_bytes
from flashvl.train.plan.memory import Memory, plan_memory
from tests.support.peak_memory import measure

TILES = {"static": 2, "dynamic": 3, "iss": 5}
TEXT, LABELS = 300, 150


def middling(preset: str, **sizes: int) -> FlashVLConfig:
    """The preset's architecture, of 63M parameters unless `sizes` says otherwise."""
    size = {"width": 768, "tower": 512, "layers": 4, "vocabulary": 16000, "patches": 32} | sizes
    config = build_config(preset)
    vision, text = config.vision_config, config.text_config
    for section, width in ((vision, size["tower"]), (text, size["width"])):
        section.hidden_size, section.intermediate_size = width, 4 * width
        section.num_hidden_layers, section.num_attention_heads = size["layers"], 8
    vision.image_size = size["patches"] * vision.patch_size
    if config.tiling and "margin" in config.tiling:
        config.tiling = config.tiling | {"margin": vision.patch_size * size["patches"] // 8}
    text.num_key_value_heads, text.vocab_size = 2, size["vocabulary"]
    text.layer_types = ["full_attention"] * size["layers"]
    text.bos_token_id = text.eos_token_id = None
    config.projector_hidden_size, config.image_token_id = 2 * size["width"], 3
    return config


def saved_bytes(
    config: FlashVLConfig, trainable: Sequence[str], size: BatchSize, dtype: torch.dtype
) -> int:
    """Bytes of all tensors that torch saves for the backward pass, but parameters."""
    torch.manual_seed(0)
    model = FlashVLForConditionalGeneration._from_config(config).to(dtype).train()
    model.requires_grad_(False)
    for part in trainable:
        model.get_submodule(f"model.{part}").requires_grad_(True)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    input_ids = torch.full((1, size.num_tokens), 5)
    input_ids[:, : size.num_tiles * config.image_seq_length] = config.image_token_id
    side = config.vision_config.image_size
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _ = model(
            input_ids=input_ids,
            pixel_values=torch.randn(size.num_tiles, 3, side, side),
            position_ids=torch.arange(size.num_tokens)[None] % (size.num_tokens // 2),
            logits_to_keep=torch.arange(size.num_tokens - size.num_labels, size.num_tokens),
            use_cache=False,
        ).logits.sum()
    return sum(saved.values())


@pytest.mark.parametrize("preset", TILES)
@pytest.mark.parametrize("trainable", [("multi_modal_projector",), MODEL_PARTS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_those_that_torch_saves(
    preset: str, trainable: tuple[str, ...], dtype: torch.dtype
) -> None:
    config = middling(preset, width=96, tower=96, vocabulary=600, patches=8)
    visual = TILES[preset] * config.image_seq_length
    size = BatchSize(num_tokens=visual + TEXT, num_tiles=TILES[preset], num_labels=LABELS)
    planned = activation_bytes(config, trainable, size, number_bytes=dtype.itemsize)
    assert planned == pytest.approx(saved_bytes(config, trainable, size, dtype), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"zero_stage": 2},
        {"precision": "fp32"},
        {"zero_stage": 2, "precision": "fp32"},
        {"zero_stage": 0},
        {"zero_stage": 3},
        {"gradient_checkpointing": True},
        {"trainable": ["multi_modal_projector"]},
        {"preset": "iss"},
    ],
    ids=str,
)
def test_memory_is_that_of_real_steps(settings: dict[str, Any]) -> None:
    """Two workers, two micro-batches a step; by default ZeRO 1 and bf16, all parts trained."""
    settings = {
        "preset": "static",
        "trainable": MODEL_PARTS,
        "num_workers": 2,
        "zero_stage": 1,
        "precision": "bf16",
        "gradient_checkpointing": False,
        "num_tokens": 1024,
        "num_tiles": 2,
        "num_labels": 400,
    } | settings
    config = middling(settings.pop("preset"))
    if config.image_seq_length > 256:  # ISS
        settings["num_tiles"] = 1
    measured = measure(settings | {"config": json.loads(config.to_json_string(use_diff=False))})
    parameters = count_parameters(config, settings["trainable"])
    memory = plan_memory(
        config,
        parameters,
        settings["trainable"],
        BatchSize(**_size(settings)),
        precision=settings["precision"],
        zero_stage=settings["zero_stage"],
        num_workers=2,
        gradient_checkpointing=settings["gradient_checkpointing"],
        has_lora=False,
    )
    planned = memory.total - unfilled(settings, parameters.num_trained, memory)
    peak = max(worker["peak"] for worker in measured)
    figures = f"planned {planned / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB: {memory}"
    sys.stdout.write(f"{settings} {figures} {measured}\n")
    assert planned == pytest.approx(peak, rel=0.15), figures


def _size(settings: dict[str, Any]) -> dict[str, int]:
    return {name: settings[name] for name in ("num_tokens", "num_tiles", "num_labels")}


def unfilled(settings: dict[str, Any], trained: int, memory: Memory) -> int:
    """Bytes of DeepSpeed's buffer that a CPU, unlike a GPU, gives no memory at the peak.

    ZeRO 2 makes it anew for each micro-batch, and fills it as activations go. ZeRO 3 keeps it, but
    a small model never fills it.
    """
    if settings["zero_stage"] < 2:
        return 0
    if settings["zero_stage"] == 2:
        return memory.buffers
    return memory.buffers - trained * (2 if settings["precision"] == "bf16" else 4)
