"""The model against second implementations: plain loops, arithmetic and transformers' parts."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2ForCausalLM,
    SiglipVisionModel,
    pipeline,
)
from transformers.models.internvl.modeling_internvl import InternVLModel

from flashvl.errors import ConfigError
from flashvl.model import (
    FlashVLConfig,
    FlashVLForConditionalGeneration,
    FlashVLImageProcessor,
    FlashVLModel,
    FlashVLProcessor,
)
from flashvl.model.modeling_flashvl import pixel_shuffle
from flashvl.model.presets import build_config, count_parameters
from tests.support.images import noise


@dataclass(frozen=True)
class Subject:
    model: FlashVLForConditionalGeneration
    processor: FlashVLProcessor
    folder: Path

    def inputs(self, *prompts: list[str | Image.Image], padding: bool = False) -> dict[str, Any]:
        """The processor's outputs for user messages of texts and pictures."""
        conversations = [
            [{"role": "user", "content": [block(part) for part in prompt]}] for prompt in prompts
        ]
        return self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": padding},
        )


def block(part: str | Image.Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part}


@pytest.fixture(scope="module")
def subject(tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """`tiny_random` with weights with which short answers differ between images."""
    model = FlashVLForConditionalGeneration.from_pretrained(tiny_random)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
        model.get_input_embeddings().weight[model.config.image_token_id] = 0  # never chosen
    processor = FlashVLProcessor.from_pretrained(tiny_random)
    folder = tmp_path_factory.mktemp("lively")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Subject(model.eval(), processor, folder)


@pytest.fixture
def fresh(subject: Subject) -> FlashVLForConditionalGeneration:
    """A fresh model for tests that change or train it."""
    return FlashVLForConditionalGeneration.from_pretrained(subject.folder)


def picture(seed: int = 0) -> Image.Image:
    return noise(seed, (100, 80 + seed))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# The full size


@pytest.fixture(scope="module")
def static() -> FlashVLForConditionalGeneration:
    """The paper's model on the meta device, which takes no memory."""
    with torch.device("meta"):
        return FlashVLForConditionalGeneration(build_config("static"))


def count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + (outputs if bias else 0)


def test_adapter_has_the_papers_size(static: FlashVLForConditionalGeneration) -> None:
    channels, hidden, out = 4 * 1152, 7168, 1536
    by_hand = 2 * channels + linear(channels, hidden) + linear(hidden, hidden) + linear(hidden, out)
    assert count(static.model.multi_modal_projector) == by_hand == 95_445_504
    assert round(by_hand / 2**20, 2) == 91.02  # the number in the paper


def test_tower_has_the_published_size(static: FlashVLForConditionalGeneration) -> None:
    width, mlp = 1152, 4304
    block = 4 * linear(width, width) + linear(width, mlp) + linear(mlp, width) + 2 * 2 * width
    embeddings = linear(3 * 16 * 16, width) + (512 // 16) ** 2 * width
    by_hand = embeddings + 27 * block + 2 * width
    assert count(static.model.vision_tower) == by_hand == 413_534_448


def test_llm_has_the_published_size(static: FlashVLForConditionalGeneration) -> None:
    width, mlp, kv, vocab = 1536, 8960, 2 * 128, 151_936
    attention = linear(width, width) + 2 * linear(width, kv) + linear(width, width, bias=False)
    block = attention + 3 * linear(width, mlp, bias=False) + 2 * width
    by_hand = vocab * width + 28 * block + width
    assert count(static.model.language_model) == by_hand == 1_543_714_304
    # The head is tied to the embedding, so the whole has no more parameters than its three parts.
    assert count(static) == 95_445_504 + 413_534_448 + 1_543_714_304


@pytest.mark.parametrize(
    ("preset", "channels", "published"),
    [
        ("static", 4 * 1152, 95_445_504),
        ("dynamic", 4 * 1536, 106_458_624),
        ("iss", 1536, 73_419_264),
    ],
)
def test_adapters_have_the_published_sizes(preset: str, channels: int, published: int) -> None:
    """Widths known from the sizes of the published files; ISS has no pixel shuffle."""
    hidden, out = 7168, 1536
    by_hand = 2 * channels + linear(channels, hidden) + linear(hidden, hidden) + linear(hidden, out)
    assert count_parameters(preset)["multi_modal_projector"] == by_hand == published


def test_aimv2_huge_has_its_published_size() -> None:
    width, mlp = 1536, 4096
    block = 4 * width * width + 3 * width * mlp + 2 * width  # no biases
    embeddings = linear(3 * 14 * 14, width) + width + (448 // 14) ** 2 * width
    by_hand = embeddings + 24 * block + width
    assert count_parameters("iss")["vision_tower"] == by_hand == 682_031_616


def test_counts_are_reported_by_part() -> None:
    assert count_parameters("static") == {
        "vision_tower": 413_534_448,
        "multi_modal_projector": 95_445_504,
        "language_model": 1_543_714_304,
        "total": 2_052_694_256,
    }


def test_visual_tokens_of_the_papers_model() -> None:
    config = build_config("static")
    assert config.image_seq_length == 256
    assert config.projector_input_size == 4608
    assert config.get_text_config() is config.text_config


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'tinny'.*static.*tiny"):
        build_config("tinny")


# Pixel shuffle


def shuffle_by_loops(grid: torch.Tensor, factor: int) -> torch.Tensor:
    images, rows, columns, channels = grid.shape
    tokens = torch.zeros(images, rows // factor * (columns // factor), factor * factor * channels)
    for image in range(images):
        for row in range(rows):
            for column in range(columns):
                token = row // factor * (columns // factor) + column // factor
                place = row % factor * factor + column % factor
                begin = place * channels
                tokens[image, token, begin : begin + channels] = grid[image, row, column]
    return tokens


@settings(deadline=None, max_examples=40)
@given(
    factor=st.sampled_from([1, 2, 3, 4]),
    images=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    channels=st.integers(1, 5),
)
def test_pixel_shuffle_is_the_plain_loop(
    factor: int, images: int, rows: int, columns: int, channels: int
) -> None:
    grid = torch.rand(images, rows * factor, columns * factor, channels)
    assert torch.equal(pixel_shuffle(grid, 1 / factor), shuffle_by_loops(grid, factor))


@pytest.mark.parametrize("preset", ["tiny", "dynamic"])
def test_the_layers_of_a_tower_get_patches_that_lie_channel_by_channel(preset: str) -> None:
    with torch.device("meta"):
        model = FlashVLModel(build_config(preset))
    side = model.config.vision_config.image_size
    patches = model.vision_tower.embeddings(torch.empty(2, 3, side, side, device="meta"))
    assert patches.is_contiguous()


def test_column_major_order_is_the_transposed_grid() -> None:
    grid = torch.rand(2, 6, 4, 3)
    rows = pixel_shuffle(grid, 0.5).unflatten(1, (3, 2))
    columns = pixel_shuffle(grid, 0.5, "column_major").unflatten(1, (2, 3))
    assert torch.equal(columns, rows.transpose(1, 2))


@settings(deadline=None, max_examples=40)
@given(
    ratio=st.sampled_from([1.0, 0.5, 0.25]),
    images=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    channels=st.integers(1, 5),
)
def test_pixel_shuffle_is_internvls(
    ratio: float, images: int, rows: int, columns: int, channels: int
) -> None:
    factor = int(1 / ratio)
    grid = torch.rand(images, rows * factor, columns * factor, channels * factor)
    theirs = InternVLModel.pixel_shuffle(SimpleNamespace(), grid, ratio)
    assert torch.equal(pixel_shuffle(grid, ratio), theirs.flatten(1, 2))


# The forward pass


class HandWired:
    """Flash-VL from transformers' classes and a plain Sequential; a loop places the tokens."""

    def __init__(self, model: FlashVLForConditionalGeneration):
        config = model.config
        state = model.state_dict()

        def part(prefix: str, new: str = "") -> dict[str, torch.Tensor]:
            return {
                new + name.removeprefix(prefix): weight
                for name, weight in state.items()
                if name.startswith(prefix)
            }

        self.tower = SiglipVisionModel(config.vision_config).eval()
        self.tower.load_state_dict(part("model.vision_tower."))
        self.llm = Qwen2ForCausalLM(config.text_config).eval()
        self.llm.load_state_dict(
            part("model.language_model.", new="model.") | part("lm_head.", new="lm_head.")
        )
        size, hidden = 4 * config.vision_config.hidden_size, config.projector_hidden_size
        self.adapter = nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.text_config.hidden_size),
        )
        layers = {"layer_norm": 0, "linear_1": 1, "linear_2": 3, "linear_3": 5}
        adapter = part("model.multi_modal_projector.")
        self.adapter.load_state_dict(
            {
                f"{layers[name.split('.')[0]]}.{name.split('.')[1]}": weight
                for name, weight in adapter.items()
            }
        )
        self.side = config.vision_config.image_size // config.vision_config.patch_size

    def visual_tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.tower(pixel_values).last_hidden_state
        grid = patches.reshape(len(patches), self.side, self.side, -1)
        return self.adapter(shuffle_by_loops(grid, 2)).flatten(0, 1)

    def logits(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits of one conversation, whose `input_ids` are (L,)."""
        embeddings = self.llm.get_input_embeddings()(input_ids).clone()
        waiting = list(self.visual_tokens(pixel_values))
        for position, token in enumerate(input_ids.tolist()):
            if token == 3:
                embeddings[position] = waiting.pop(0)
        assert not waiting
        return self.llm(inputs_embeds=embeddings[None]).logits[0]


@torch.no_grad()
def test_forward_is_the_hand_wired_model(subject: Subject) -> None:
    by_hand = HandWired(subject.model)
    inputs = subject.inputs([picture(0), "and", picture(1), "Which is larger?"])
    expected = by_hand.logits(inputs["input_ids"][0], inputs["pixel_values"])
    outputs = subject.model(**inputs)
    assert_near(outputs.logits[0], expected)
    visual_tokens = by_hand.visual_tokens(inputs["pixel_values"])
    assert_near(outputs.image_hidden_states.flatten(0, 1), visual_tokens)
    # The images, and their order, change the logits by far more than the tolerance.
    swapped = subject.model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert (swapped[0, -1] - expected[-1]).abs().max() > 0.05


@torch.no_grad()
def test_text_alone_is_plain_qwen2(subject: Subject) -> None:
    llm = HandWired(subject.model).llm
    input_ids = subject.inputs(["Describe the image."])["input_ids"]
    outputs = subject.model(input_ids=input_ids)
    assert_near(outputs.logits, llm(input_ids).logits)
    assert outputs.image_hidden_states is None


@torch.no_grad()
def test_base_model_gives_the_states_under_the_head(subject: Subject) -> None:
    inputs = subject.inputs([picture(), "Describe"])
    states = subject.model.model(**inputs).last_hidden_state
    embedding = subject.model.model.language_model.embed_tokens.weight
    assert_near(subject.model(**inputs).logits, states @ embedding.T)
    few = subject.model(**inputs, logits_to_keep=2).logits
    assert_near(few, (states @ embedding.T)[:, -2:])


@torch.no_grad()
def test_embeddings_or_encoded_images_instead_of_ids_and_pixels(subject: Subject) -> None:
    """TRL and vLLM pass embeddings with the placeholders' rows, and images encoded before."""
    inputs = subject.inputs([picture(), "Describe"])
    expected = subject.model(**inputs).logits
    embeddings = subject.model.get_input_embeddings()(inputs["input_ids"])
    pixel_values = inputs["pixel_values"]
    assert_near(subject.model(inputs_embeds=embeddings, pixel_values=pixel_values).logits, expected)
    encoded = subject.model.get_image_features(pixel_values)
    length = subject.model.config.image_seq_length
    assert encoded.pooler_output.shape == (1, length, embeddings.shape[-1])
    outputs = subject.model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": encoded})
    assert_near(outputs.logits, expected)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        subject.model(input_ids=inputs["input_ids"], inputs_embeds=embeddings)


@pytest.mark.parametrize("missing", [-1, 1, 5])
def test_wrong_number_of_placeholders_names_both(subject: Subject, missing: int) -> None:
    length = subject.model.config.image_seq_length
    input_ids = torch.tensor([[5, *[3] * (length - missing), 6]])
    pixel_values = torch.zeros(1, 3, 96, 96)
    with pytest.raises(ValueError, match=rf"\b{length - missing} placeholder.*\b{length} visual"):
        subject.model(input_ids=input_ids, pixel_values=pixel_values)


# Loss and gradients


def labelled(subject: Subject) -> dict[str, torch.Tensor]:
    inputs = dict(subject.inputs([picture(0), "Describe"], [picture(1), "Describe"]))
    labels = inputs["input_ids"].clone()
    labels[0, :20] = -100
    labels[1, 5:-9] = -100
    return inputs | {"labels": labels}


@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_next_token(subject: Subject) -> None:
    inputs = labelled(subject)
    outputs = subject.model(**inputs)
    total, tokens = 0.0, 0
    for row, labels in zip(outputs.logits.double().log_softmax(-1), inputs["labels"], strict=True):
        for position, label in enumerate(labels.tolist()[1:]):
            if label != -100:
                total -= row[position, label].item()
                tokens += 1
    assert outputs.loss.item() == pytest.approx(total / tokens, rel=1e-5)
    # The Trainer divides losses of accumulated batches by a number that it passes.
    scaled = subject.model(**inputs, num_items_in_batch=torch.tensor(1000))
    assert scaled.loss.item() == pytest.approx(total / 1000, rel=1e-5)


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


def test_gradients_reach_every_weight(
    subject: Subject, fresh: FlashVLForConditionalGeneration
) -> None:
    found = gradients(fresh, labelled(subject))
    # Adding one vector to all keys does not change a softmax: its gradient is zero in theory.
    indifferent = {name for name in found if "vision_tower" in name and "k_proj.bias" in name}
    assert indifferent
    for name, gradient in found.items():
        assert gradient is not None, name
        assert name in indifferent or gradient.abs().max() > 1e-7, name


def test_gradient_checkpointing_changes_no_gradient(
    subject: Subject, fresh: FlashVLForConditionalGeneration
) -> None:
    inputs = labelled(subject)
    calls = {"tower": 0, "llm": 0}

    def counter(name: str) -> Callable[..., None]:
        def add(*_: Any) -> None:
            calls[name] += 1

        return add

    fresh.model.vision_tower.encoder.layers[0].mlp.register_forward_pre_hook(counter("tower"))
    fresh.model.language_model.layers[0].mlp.register_forward_pre_hook(counter("llm"))
    fresh.train()
    plain = gradients(fresh, inputs)
    assert calls == {"tower": 1, "llm": 1}
    fresh.gradient_checkpointing_enable()
    checkpointed = gradients(fresh, inputs)
    assert calls == {
        "tower": 3,
        "llm": 3,
    }  # called again in the backward pass, so checkpointing is on
    for name, gradient in plain.items():
        assert_near(checkpointed[name], gradient, tolerance=1e-5)


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (["vision_tower", "language_model"], "multi_modal_projector"),
        (["vision_tower", "multi_modal_projector"], "language_model"),
        (["multi_modal_projector", "language_model"], "vision_tower"),
    ],
)
def test_a_part_learns_alone(
    subject: Subject, fresh: FlashVLForConditionalGeneration, frozen: list[str], trained: str
) -> None:
    for name in frozen:
        fresh.model.get_submodule(name).requires_grad_(False)
    found = gradients(fresh, labelled(subject))
    assert {name.split(".")[1] for name, grad in found.items() if grad is not None} == {trained}


def test_lora_on_the_llm_trains_only_its_own_weights(
    subject: Subject, fresh: FlashVLForConditionalGeneration
) -> None:
    inputs = labelled(subject)
    with torch.no_grad():
        before = fresh(**inputs).logits
    rank = 4
    model = get_peft_model(
        fresh, LoraConfig(r=rank, target_modules=r".*language_model\..*q_proj", lora_dropout=0.0)
    )
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name and "language_model" in name for name in trainable)
    text_config = fresh.config.text_config
    heads = (
        text_config.num_attention_heads * fresh.model.language_model.layers[0].self_attn.head_dim
    )
    expected = text_config.num_hidden_layers * rank * (text_config.hidden_size + heads)
    assert model.get_nb_trainable_parameters()[0] == expected
    with torch.no_grad():
        assert_near(model(**inputs).logits, before)

    old = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = []
    for _ in range(2):  # B begins at zero, so A moves in the second step
        loss = model(**inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, weight in model.named_parameters() if not torch.equal(weight, old[n])}
    assert moved == trainable
    assert losses[1] < losses[0]


# Generation


NEW_TOKENS = 8


@torch.no_grad()
def greedy_without_cache(subject: Subject, inputs: dict[str, Any]) -> list[int]:
    ids = inputs["input_ids"]
    answer: list[int] = []
    while len(answer) < NEW_TOKENS and subject.processor.tokenizer.eos_token_id not in answer:
        pixel_values = inputs.get("pixel_values")
        logits = subject.model(input_ids=ids, pixel_values=pixel_values, use_cache=False).logits
        answer.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], dim=1)
    return answer


def generate(subject: Subject, inputs: dict[str, Any]) -> list[list[int]]:
    generated = subject.model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


PROMPTS: list[list[str | Image.Image]] = [
    [picture(0), "Describe the image."],
    [picture(1), "Describe the image."],
    [picture(2), picture(3), "Which of the two?"],
    ["Who are you?"],
]


@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_generate_is_the_argmax_step_by_step(subject: Subject, number: int) -> None:
    inputs = subject.inputs(PROMPTS[number])
    assert generate(subject, inputs) == [greedy_without_cache(subject, inputs)]


def test_answers_depend_on_the_image(subject: Subject) -> None:
    """Without this the tests of generation would prove nothing about images."""
    answers = [tuple(generate(subject, subject.inputs(prompt))[0]) for prompt in PROMPTS[:2]]
    assert len(set(answers)) == 2
    assert len(set(answers[0])) > 2


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(subject: Subject) -> None:
    inputs = subject.inputs(PROMPTS[0])
    padding = 7
    padded = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (padding, 0), value=0),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (padding, 0), value=0),
        "pixel_values": inputs["pixel_values"],
    }
    assert generate(subject, padded) == generate(subject, inputs)
    assert_near(subject.model(**padded).logits[:, padding:], subject.model(**inputs).logits)


@torch.no_grad()
def test_a_batch_is_its_rows_one_by_one(subject: Subject) -> None:
    batch = subject.inputs(*PROMPTS, padding=True)
    assert batch["attention_mask"].sum(1).unique().numel() > 1  # needs padding
    together = subject.model(**batch).logits
    generated = generate(subject, batch)
    end = subject.processor.tokenizer.eos_token_id
    for row, prompt in enumerate(PROMPTS):
        alone = subject.inputs(prompt)
        length = alone["input_ids"].shape[1]
        assert_near(together[row, -length:], subject.model(**alone).logits[0])
        answer = generate(subject, alone)[0]
        assert generated[row][: len(answer)] == answer
        assert len(answer) == NEW_TOKENS or answer[-1] == end


# Save and load


@torch.no_grad()
def test_save_and_load_give_bit_identical_logits(subject: Subject, tmp_path: Path) -> None:
    inputs = subject.inputs(PROMPTS[0])
    expected = subject.model(**inputs).logits
    subject.model.save_pretrained(tmp_path)
    loaded, report = FlashVLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys"))
    assert torch.equal(loaded.eval()(**inputs).logits, expected)
    kept = [model.config.to_dict() for model in (loaded, subject.model)]
    for values in kept:  # the path, and which code of the folder belongs to which class
        values.pop("_name_or_path")
        values.pop("auto_map", None)
    assert kept[0] == kept[1]
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
    assert "lm_head.weight" not in names  # the tied weight is stored once
    assert {name.split(".")[1] for name in names} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
    }


@torch.no_grad()
def test_auto_classes_load_the_folder(subject: Subject) -> None:
    assert isinstance(AutoConfig.from_pretrained(subject.folder), FlashVLConfig)
    processor = AutoProcessor.from_pretrained(subject.folder)
    assert isinstance(processor, FlashVLProcessor)
    image_processor = AutoImageProcessor.from_pretrained(subject.folder)
    assert isinstance(image_processor, FlashVLImageProcessor)
    assert image_processor.size == processor.image_processor.size

    inputs = subject.inputs(PROMPTS[0])
    model = AutoModelForImageTextToText.from_pretrained(subject.folder).eval()
    assert isinstance(model, FlashVLForConditionalGeneration)
    assert torch.equal(model(**inputs).logits, subject.model(**inputs).logits)
    base = AutoModel.from_pretrained(subject.folder).eval()
    assert isinstance(base, FlashVLModel)
    expected = subject.model.model(**inputs).last_hidden_state
    assert torch.equal(base(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("by", ["objects", "folder"])
def test_pipeline_answers_a_chat(subject: Subject, by: str) -> None:
    if by == "objects":
        pipe = pipeline("image-text-to-text", model=subject.model, processor=subject.processor)
    else:
        pipe = pipeline("image-text-to-text", model=str(subject.folder))
    prompt = PROMPTS[0]
    messages = [{"role": "user", "content": [block(part) for part in prompt]}]
    answer = pipe(text=messages, max_new_tokens=NEW_TOKENS, return_full_text=False)
    (expected,) = generate(subject, subject.inputs(prompt))
    decoded = subject.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert answer[0]["generated_text"] == decoded


# A process without flashvl, which runs the folder's own code, named by `auto_map`.

STRANGER = """
import json, sys
sys.modules["flashvl"] = None  # as if it were not installed
import numpy as np, torch
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
)

folder, text = sys.argv[1:]
found = {"errors": {}}
for auto in (AutoModelForImageTextToText, AutoProcessor, AutoModel, AutoImageProcessor):
    try:
        loaded = auto.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:
        found["errors"][auto.__name__] = f"{type(error).__name__}: {error}"
        continue
    found[auto.__name__] = f"{type(loaded).__module__}.{type(loaded).__name__}"
    if auto is AutoModelForImageTextToText:
        model = loaded.eval()
    if auto is AutoProcessor:
        image = Image.open("picture.png")
        inputs = loaded(images=[image], text=[text], return_tensors="pt")
        with torch.no_grad():
            np.save("logits.npy", model(**inputs).logits.numpy())
        found["generated"] = model.generate(**inputs, max_new_tokens=5, do_sample=False).tolist()
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def stranger(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("stranger")
    picture(0).save(home / "picture.png")
    text = "<|im_start|>user\n<|image_pad|>\nDescribe<|im_end|>\n<|im_start|>assistant\n"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {
        "HF_HOME": str(home / "hf"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", STRANGER, str(subject.folder), text]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((home / "found.json").read_text())
    return found | {"logits": np.load(home / "logits.npy"), "text": text}


@pytest.mark.long
def test_a_stranger_loads_the_folder_with_the_code_in_it(
    subject: Subject, stranger: dict[str, Any]
) -> None:
    assert stranger["AutoModelForImageTextToText"].startswith("transformers_modules.")
    assert stranger["AutoModelForImageTextToText"].endswith(".FlashVLForConditionalGeneration")
    assert stranger["AutoProcessor"].startswith("transformers_modules.")
    assert stranger["AutoProcessor"].endswith(".FlashVLProcessor")
    inputs = subject.processor(images=[picture(0)], text=[stranger["text"]], return_tensors="pt")
    with torch.no_grad():
        expected = subject.model(**inputs).logits
    assert_near(torch.from_numpy(stranger["logits"]), expected, tolerance=1e-5)
    generated = subject.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert stranger["generated"] == generated.tolist()


@pytest.mark.long
@pytest.mark.parametrize("auto", ["AutoModel", "AutoImageProcessor"])
def test_a_stranger_finds_the_parts_that_vllm_asks_for(stranger: dict[str, Any], auto: str) -> None:
    assert auto not in stranger["errors"], stranger["errors"][auto]
    assert stranger[auto].startswith("transformers_modules.")
