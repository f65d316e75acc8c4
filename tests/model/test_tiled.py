"""Models with tiled images: several images, images anywhere in a turn, text alone, padding."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Qwen2ForCausalLM

from flashvl.data.features import encode_conversation, make_tiles, normalize_tiles
from flashvl.engine import Engine, Request
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from tests.support.images import noise

TOKENS = 16
"""Patches of a tile of `tiny-iss`: 8 x 8, of which two on each side are dropped."""


@pytest.fixture(scope="module")
def model(tiny_iss_random: Path) -> FlashVLForConditionalGeneration:
    return load_model(tiny_iss_random)


@pytest.fixture(scope="module")
def processor(tiny_iss_random: Path) -> FlashVLProcessor:
    return load_processor(tiny_iss_random)


ONE, THREE, FIVE = (40, 48), (96, 45), (192, 192)
"""Number of tiles, the overview included -> size of an image that has it."""


def prompt(processor: FlashVLProcessor, *parts: str | Image.Image, **options: Any) -> Any:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        **options,
    )


@pytest.mark.parametrize(("size", "num_tiles"), [(ONE, 1), (THREE, 3), (FIVE, 5)])
def test_all_who_count_image_tokens_agree(
    model: FlashVLForConditionalGeneration,
    processor: FlashVLProcessor,
    size: tuple[int, int],
    num_tiles: int,
) -> None:
    image = noise(size=size)
    inputs = prompt(processor, image, "What?")
    placeholders = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert placeholders == TOKENS * num_tiles
    assert inputs["pixel_values"].shape == (num_tiles, 3, 96, 96)
    assert inputs["image_grid_thw"].tolist() == [[num_tiles, 1, 1]]
    assert "num_patches" not in inputs
    # What the processor tells vLLM, by (height, width); its own method, by (width, height); Tiling.
    counted = processor._get_num_multimodal_tokens(image_sizes=[size[::-1]])
    assert counted.num_image_tokens == [placeholders]
    assert counted.num_image_patches == [num_tiles]
    assert processor.num_image_tokens(size) == placeholders
    assert model.config.tiling_rule.num_tiles(size) == num_tiles
    # The tokens in the prompt, and those from the model.
    tiles = make_tiles([image], processor)
    messages = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "a"},
    ]
    input_ids, _ = encode_conversation(messages, tiles.counts, processor, 4000)
    assert input_ids.count(processor.image_token_id) == placeholders
    assert model.get_image_features(inputs["pixel_values"]).pooler_output.shape[:2] == (
        num_tiles,
        TOKENS,
    )


@torch.no_grad()
def test_iss_is_the_tower_the_middle_and_the_adapter(
    model: FlashVLForConditionalGeneration, processor: FlashVLProcessor
) -> None:
    """Visual tokens by a loop over the patches that are kept, without pixel shuffle."""
    pixel_values = prompt(processor, noise(size=THREE), "What?")["pixel_values"]
    patches = model.model.vision_tower(pixel_values=pixel_values).last_hidden_state
    by_hand = [
        [patches[tile, row * 8 + column] for row in range(2, 6) for column in range(2, 6)]
        for tile in range(3)
    ]
    kept = torch.stack([torch.stack(tokens) for tokens in by_hand])
    expected = model.model.multi_modal_projector(kept)
    torch.testing.assert_close(model.get_image_features(pixel_values).pooler_output, expected)


@torch.no_grad()
def test_images_anywhere_in_a_turn_and_in_order(
    model: FlashVLForConditionalGeneration, processor: FlashVLProcessor
) -> None:
    """The embeddings that the LLM sees, token by token, against a loop over the placeholders."""
    images = [noise(1, FIVE), noise(2, ONE), noise(3, THREE)]
    inputs = prompt(processor, "First", images[0], images[1], "and then", images[2], "which?")
    assert inputs["image_grid_thw"].prod(-1).tolist() == [5, 1, 3]
    features = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])[0].clone()
    waiting = list(features)
    for position, token in enumerate(inputs["input_ids"][0].tolist()):
        if token == processor.image_token_id:
            embeddings[position] = waiting.pop(0)
    assert not waiting
    llm = Qwen2ForCausalLM(model.config.text_config).eval()
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.lm_head.load_state_dict(model.lm_head.state_dict())
    expected = llm(inputs_embeds=embeddings[None]).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_different_numbers_of_tiles_is_its_rows(tiny_iss_random: Path) -> None:
    engine = Engine.from_pretrained(tiny_iss_random, "float32")
    requests = [
        Request(
            messages=[{"role": "user", "content": "<image>" * len(images) + "Describe"}],
            images=images,
            max_new_tokens=6,
        )
        for images in ([noise(size=FIVE)], [], [noise(1, ONE), noise(2, THREE)])
    ]
    assert engine.generate(requests) == [engine.generate([request])[0] for request in requests]


# A training batch without images


def gradients(model: FlashVLForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, Any]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_text_alone_gives_every_weight_a_gradient(
    tiny_iss_random: Path, processor: FlashVLProcessor
) -> None:
    """Gradients are zero in tower and adapter; those of the LLM are as without images."""
    model = load_model(tiny_iss_random)
    inputs = dict(prompt(processor, "Describe the image."))
    inputs["labels"] = inputs["input_ids"]
    assert any(
        gradient is None for gradient in gradients(model.eval(), inputs).values()
    )  # the case that training must avoid
    found = gradients(model.train(), inputs)
    for name, gradient in found.items():
        assert gradient is not None, name
        is_visual = "vision_tower" in name or "multi_modal_projector" in name
        assert is_visual == (gradient.abs().max() == 0), name
    llm = Qwen2ForCausalLM(model.config.text_config)
    llm.model.load_state_dict(model.model.language_model.state_dict())
    llm.tie_weights()
    llm(**inputs).loss.backward()
    for name, weight in llm.model.named_parameters():
        torch.testing.assert_close(found[f"model.language_model.{name}"], weight.grad)


# vLLM's Transformers backend, by its documented rules


def test_vllm_finds_what_its_rules_ask_for(
    model: FlashVLForConditionalGeneration, processor: FlashVLProcessor, tiny_iss_random: Path
) -> None:
    """https://docs.vllm.ai/en/latest/models/supported_models.html#writing-custom-models"""
    config = AutoConfig.from_pretrained(tiny_iss_random)
    assert set(config.auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert config.get_text_config() is not config  # otherwise vLLM takes it for a text model
    assert "kwargs" in inspect.signature(model.model.forward).parameters
    assert model._supports_attention_backend
    assert model.input_modalities == ("image", "text")

    images = [noise(size=FIVE), noise(size=ONE)]
    text = "<|im_start|>user\n<|image_pad|>A<|image_pad|>B<|im_end|>\n"
    inputs = processor(
        images=images, text=[text], return_tensors="pt", return_text_replacement_offsets=True
    )
    # Images have tensors of their own, as lengths differ; `image_grid_thw` has a row for each.
    features = model.get_image_features(
        inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], return_dict=True
    ).pooler_output
    width = config.text_config.hidden_size
    assert [part.shape for part in features] == [(5 * TOKENS, width), (TOKENS, width)]
    together = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(torch.cat(features), together.flatten(0, 1))
    # Every image is one contiguous run, and the processor reports where it was put.
    (offsets,) = inputs["text_replacement_offsets"]
    assert len(offsets) == 2
    is_image = (inputs["input_ids"][0] == processor.image_token_id).int()
    runs = int((is_image.diff() == 1).sum()) + int(is_image[0])
    assert runs == 2
    counted = processor._get_num_multimodal_tokens(
        image_sizes=[(image.height, image.width) for image in images]
    )
    assert counted.num_image_tokens == [len(part) for part in features]


def test_tile_wrappers_stand_around_every_tile(processor: FlashVLProcessor) -> None:
    wrapped = FlashVLProcessor(
        processor.image_processor,
        processor.tokenizer,
        image_seq_length=2,
        tile_wrappers=["[", "]"],
    )
    assert wrapped.image_text(3) == "[<|image_pad|><|image_pad|>]" * 3


def test_an_accelerator_normalises_what_the_processor_would(processor: FlashVLProcessor) -> None:
    images = [noise(size=FIVE), noise(size=ONE)]
    tiles = make_tiles(images, processor)
    assert tiles.counts == (5, 1)
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    found = normalize_tiles(torch.from_numpy(tiles.pixels), processor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
