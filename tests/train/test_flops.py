"""FLOPs of a row: those that torch counts while it computes, and those of the paper's models."""

from collections.abc import Sequence

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration
from flashvl.model.presets import build_config
from flashvl.train.flops import forward_flops, row_flops, training_flops
from flashvl.train.recipe import SupervisedRecipe
from flashvl.train.run.worker import prepare_parts

ALL_PARTS = ("vision_tower", "multi_modal_projector", "language_model")
TILES = {"static": 1, "dynamic": 3, "iss": 5}
TEXT = 40
"""Tokens of text in each row that is computed here."""


def small(preset: str) -> FlashVLConfig:
    """The preset's architecture at a size that takes milliseconds."""
    config = build_config(preset)
    for section, layers in ((config.vision_config, 3), (config.text_config, 4)):
        section.hidden_size, section.num_hidden_layers = 96, layers
        section.num_attention_heads, section.intermediate_size = 6, 200
    config.text_config.num_key_value_heads, config.text_config.vocab_size = 2, 600
    config.text_config.layer_types = ["full_attention"] * 4
    config.vision_config.image_size = 8 * config.vision_config.patch_size
    if config.tiling and "margin" in config.tiling:
        config.tiling = config.tiling | {"margin": config.vision_config.patch_size}
    config.projector_hidden_size, config.image_token_id = 160, 3
    return config


def count(
    config: FlashVLConfig,
    num_tiles: int,
    trainable: Sequence[str] = (),
    gradient_checkpointing: bool = False,
) -> tuple[int, int]:
    """(operations that torch counts for one row, the row's tokens), with a backward pass if
    anything is trained."""
    torch.manual_seed(0)
    model = FlashVLForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.train(bool(trainable))
    recipe = {
        "kind": "supervised",
        "stage": "count",
        "init_from": "",
        "output_dir": "",
        "data": {"synthetic": {"count": 1}},
        "trainable": trainable,
        "gradient_checkpointing": gradient_checkpointing,
    }
    prepare_parts(model, SupervisedRecipe.model_validate(recipe))
    visual = num_tiles * config.image_seq_length
    input_ids = torch.cat([torch.full((1, visual), 3), torch.randint(4, 600, (1, TEXT))], dim=1)
    side = config.vision_config.image_size
    pixels = torch.randn(num_tiles, 3, side, side) if num_tiles else None
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(bool(trainable)):
        logits = model(
            input_ids=input_ids,
            pixel_values=pixels,
            logits_to_keep=torch.arange(visual, visual + TEXT),
            use_cache=False,
        ).logits
        if trainable:
            logits.sum().backward()
    return counter.get_total_flops(), visual + TEXT


def causal_discount(config: FlashVLConfig, num_tokens: int, passes: int) -> float:
    """Operations above the diagonal, which torch's eager attention computes as well."""
    text = config.text_config
    return passes * text.num_hidden_layers * 2 * num_tokens**2 * text.hidden_size


@pytest.mark.parametrize("preset", TILES)
@pytest.mark.parametrize("has_image", [True, False])
def test_forward_flops_are_those_that_torch_counts(preset: str, has_image: bool) -> None:
    config, num_tiles = small(preset), TILES[preset] * has_image
    counted, num_tokens = count(config, num_tiles)
    expected = row_flops(config, num_tokens, num_tiles) + causal_discount(config, num_tokens, 1)
    assert counted == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", TILES)
@pytest.mark.parametrize("trainable", [("multi_modal_projector",), ALL_PARTS, ("language_model",)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_flops_are_those_that_torch_counts(
    preset: str, trainable: tuple[str, ...], gradient_checkpointing: bool
) -> None:
    config, num_tiles = small(preset), TILES[preset]
    counted, num_tokens = count(config, num_tiles, trainable, gradient_checkpointing)
    expected = training_flops(config, trainable, num_tokens, num_tiles, gradient_checkpointing)
    expected += causal_discount(config, num_tokens, 4 if gradient_checkpointing else 3)
    assert counted == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("preset", ["static", "dynamic", "iss", "static-llama"])
def test_full_size_flops_follow_the_parameters(preset: str) -> None:
    """Two operations for each weight of a matrix, counted on the model itself."""
    config = build_config(preset)
    with torch.device("meta"):
        model = FlashVLForConditionalGeneration(config)
    flops = forward_flops(config, num_tokens=1000, num_tiles=2, num_labels=1)
    uses = {"language_model": 1000, "multi_modal_projector": 2 * config.image_seq_length}
    for part, num_uses in uses.items():
        layers = model.get_submodule(f"model.{part}").modules()
        weights = sum(m.weight.numel() for m in layers if isinstance(m, torch.nn.Linear))
        assert flops[part].linear == 2 * num_uses * weights


def test_a_row_of_the_static_model_takes_what_the_plan_of_the_paper_assumes() -> None:
    """256 visual and 200 text tokens: 1.02 TFLOP of vision, 3.73 in stage 1, 6.99 in stage 2."""
    config = build_config("static")
    flops = forward_flops(config, 456, 1)
    vision = ("patch_embedding", "vision_tower", "multi_modal_projector")
    assert sum(flops[part].total for part in vision) == pytest.approx(1.02e12, rel=0.01)
    adapter = training_flops(config, ["multi_modal_projector"], 456, 1)
    assert adapter == pytest.approx(3.73e12, rel=0.01)
    assert training_flops(config, ALL_PARTS, 456, 1) == pytest.approx(6.99e12, rel=0.01)
    assert training_flops(config, ALL_PARTS, 456, 1, has_lora=True) < 0.7 * 6.99e12


def test_tokens_of_different_branches_do_not_attend_to_each_other() -> None:
    """Against a count of the pairs that attend, half of those of a square."""
    config = small("static")
    branches, prompt = (5, 9, 2), 30
    owner = torch.tensor([-1] * prompt + [n for n, b in enumerate(branches) for _ in range(b)])
    num_tokens = len(owner)
    sees = (owner[None] == owner[:, None]) | (owner[None] == -1)
    num_pairs = int(sees.tril(-1).sum()) + num_tokens / 2  # the diagonal counts half, as in N^2 / 2
    whole = forward_flops(config, num_tokens, 0)["language_model"].attention
    found = forward_flops(config, num_tokens, 0, branches=branches)["language_model"].attention
    assert found / whole == pytest.approx(num_pairs / (num_tokens**2 / 2))


def test_a_reference_adds_the_forward_pass_of_what_it_does_not_share() -> None:
    config = small("iss")
    parts = ("multi_modal_projector", "language_model")
    alone = training_flops(config, parts, 600, 5, has_lora=True)
    both = training_flops(config, parts, 600, 5, has_lora=True, has_reference=True)
    forward = forward_flops(config, 600, 5)
    shared = forward["patch_embedding"].total + forward["vision_tower"].total
    assert both - alone == pytest.approx(row_flops(config, 600, 5) - shared)
