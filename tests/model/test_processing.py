"""Processor: the exact prompt, pixels and labels that the model gets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ProcessorMixin

from flashvl.data.features import (
    IGNORE_INDEX,
    encode_conversation,
    encode_prompt,
    make_tiles,
    normalize_tiles,
    pad,
)
from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import DataError
from flashvl.model import FlashVLImageProcessor, FlashVLProcessor

IMAGE_SEQ_LENGTH = 5
SIDE = 96
PAD = "<|image_pad|>"
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def processor() -> FlashVLProcessor:
    texts = ["How many shapes are there?", "You are a helpful assistant."] * 3
    return FlashVLProcessor(
        FlashVLImageProcessor(size={"height": SIDE, "width": SIDE}),
        train_tokenizer(texts, 290),
        image_seq_length=IMAGE_SEQ_LENGTH,
    )


def picture(seed: int = 0, width: int = 50, height: int = 70, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def user(*parts: str | Image.Image) -> dict[str, Any]:
    blocks = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": blocks}


# The template: every expected string is written out.

IMAGE = {"type": "image"}
CONVERSATIONS = {
    "default system": (
        [{"role": "user", "content": "Hi"}],
        DEFAULT_SYSTEM + "<|im_start|>user\nHi<|im_end|>\n",
    ),
    "custom system": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
    ),
    "system in blocks": (
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}],
        "<|im_start|>system\nBe brief.<|im_end|>\n",
    ),
    "one image": (
        [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What is it?"}]}],
        DEFAULT_SYSTEM + "<|im_start|>user\n<|image_pad|>\nWhat is it?<|im_end|>\n",
    ),
    "two images": (
        [{"role": "user", "content": [IMAGE, IMAGE, {"type": "text", "text": "Which?"}]}],
        DEFAULT_SYSTEM + "<|im_start|>user\n<|image_pad|>\n<|image_pad|>\nWhich?<|im_end|>\n",
    ),
    "multi-turn": (
        [
            {"role": "user", "content": [IMAGE, {"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "More"},
            {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
        ],
        DEFAULT_SYSTEM
        + "<|im_start|>user\n<|image_pad|>\nHi<|im_end|>\n"
        + "<|im_start|>assistant\nHello.<|im_end|>\n"
        + "<|im_start|>user\nMore<|im_end|>\n"
        + "<|im_start|>assistant\nNo.<|im_end|>\n",
    ),
}


@pytest.mark.parametrize(("messages", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_template_renders_the_published_format(
    processor: FlashVLProcessor, messages: list[dict[str, Any]], expected: str
) -> None:
    assert processor.apply_chat_template(messages) == expected
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == expected + "<|im_start|>assistant\n"


def test_template_matches_qwens_own_for_text(processor: FlashVLProcessor) -> None:
    """The same text, composed by hand: role, newline, content, end token, newline."""
    messages = [
        {"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant")
    ]
    by_hand = "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages
    )
    assert processor.apply_chat_template(messages) == by_hand


# Placeholders


@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
def test_every_image_becomes_its_run_of_placeholders(
    processor: FlashVLProcessor, num_images: int
) -> None:
    images = [picture(seed) for seed in range(num_images)]
    inputs = processor.apply_chat_template(
        [user(*images, "Which?")], tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == num_images * IMAGE_SEQ_LENGTH
    body = (PAD * IMAGE_SEQ_LENGTH + "\n") * num_images + "Which?"
    expected = DEFAULT_SYSTEM + f"<|im_start|>user\n{body}<|im_end|>\n"
    assert processor.tokenizer.decode(ids) == expected
    if num_images:
        assert inputs["pixel_values"].shape == (num_images, 3, SIDE, SIDE)
    else:
        assert "pixel_values" not in inputs


def test_batch_is_padded_on_the_left(processor: FlashVLProcessor) -> None:
    inputs = processor(
        images=[[picture(0)], [picture(1), picture(2)]],
        text=[f"{PAD}a", f"{PAD}{PAD}abc"],
        padding=True,
        return_tensors="pt",
    )
    long = 2 * IMAGE_SEQ_LENGTH + len(processor.tokenizer.encode("abc"))
    short = IMAGE_SEQ_LENGTH + 1
    assert inputs["attention_mask"].tolist() == [[0] * (long - short) + [1] * short, [1] * long]
    assert inputs["input_ids"][0, : long - short].eq(processor.tokenizer.pad_token_id).all()
    assert inputs["pixel_values"].shape[0] == 3


def test_fewer_images_than_placeholders_is_refused(processor: FlashVLProcessor) -> None:
    with pytest.raises(ValueError, match=r"(?i)2.*image.*1 image"):
        processor(images=[picture()], text=[f"{PAD}{PAD}which"])


def test_replacement_offsets_are_those_of_the_strings(processor: FlashVLProcessor) -> None:
    texts = [f"{PAD}\nab{PAD}c", f"no, {PAD}"]
    inputs = processor(
        images=[[picture(0), picture(1)], [picture(2)]],
        text=list(texts),
        return_text_replacement_offsets=True,
    )
    run = PAD * IMAGE_SEQ_LENGTH
    assert [len(offsets) for offsets in inputs["text_replacement_offsets"]] == [2, 1]
    for text, offsets, ids in zip(
        texts, inputs["text_replacement_offsets"], inputs["input_ids"], strict=True
    ):
        expanded = text.replace(PAD, run)
        starts = [start for start in range(len(text)) if text.startswith(PAD, start)]
        assert [offset["span"] for offset in offsets] == [(s, s + len(PAD)) for s in starts]
        for offset in offsets:
            start, end = offset["new_span"]
            assert expanded[start:end] == offset["replacement"] == run
            assert offset["type"] == "image"
        assert processor.tokenizer.decode(ids) == expanded
        new_starts = [offset["new_span"][0] for offset in offsets]
        grown = len(run) - len(PAD)
        assert new_starts == [start + i * grown for i, start in enumerate(starts)]


def test_what_trl_and_vllm_look_for(processor: FlashVLProcessor) -> None:
    assert isinstance(processor, ProcessorMixin)  # by this TRL recognises a vision-language model
    assert "{%- generation -%}" in processor.chat_template  # for its assistant_only_loss
    assert (processor.image_token, processor.image_token_id) == (PAD, 3)
    counts = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (SIDE, SIDE), (999, 1)])
    images = [picture(0, 20, 10), picture(1, SIDE, SIDE), picture(2, 1, 999)]
    for image, count, tiles in zip(
        images, counts["num_image_tokens"], counts["num_image_patches"], strict=True
    ):
        inputs = processor(images=[image], text=[PAD])
        assert inputs["input_ids"][0].count(processor.image_token_id) == count
        assert len(inputs["pixel_values"]) == tiles
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] == []


# Pixels


def pixels_by_hand(image: Image.Image) -> np.ndarray:
    if image.mode in ("RGBA", "P"):  # laid on white; this palette is of RGBA
        pixels = np.asarray(image.convert("RGBA")).astype(np.float64)
        alpha = pixels[:, :, 3:] / 255
        opaque = pixels[:, :, :3] * alpha + 255 * (1 - alpha)
        image = Image.fromarray(np.rint(opaque).astype(np.uint8))
    resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    scaled = np.asarray(resized).astype(np.float64) / 255
    return ((scaled - 0.5) / 0.5).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (50, 70), (333, 20), (1, 1)], ids=str)
def test_pixels_are_those_of_an_independent_computation(
    processor: FlashVLProcessor, mode: str, size: tuple[int, int]
) -> None:
    image = picture(3, *size, mode=mode)
    pixel_values = processor.image_processor(image, return_tensors="np")["pixel_values"]
    assert pixel_values.shape == (1, 3, SIDE, SIDE)
    grey_level = 1 / 127.5 + 1e-6
    rounding = 2 * grey_level if mode in ("RGBA", "P") else grey_level  # Pillow blends in integers
    np.testing.assert_allclose(pixel_values[0], pixels_by_hand(image), rtol=0, atol=rounding)


def test_range_and_channels(processor: FlashVLProcessor) -> None:
    orange = Image.new("RGB", (30, 9), (255, 127, 0))
    pixel_values = processor.image_processor(orange, return_tensors="pt")["pixel_values"][0]
    for channel, expected in zip(pixel_values, (1.0, 127 / 127.5 - 1, -1.0), strict=True):
        torch.testing.assert_close(channel, torch.full((SIDE, SIDE), expected))


def test_defaults_are_siglip2s() -> None:
    processor = FlashVLImageProcessor()
    pixel_values = processor(picture(), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 512, 512)


def test_tiles_then_normalising_is_what_the_processor_does(processor: FlashVLProcessor) -> None:
    images = [picture(0), picture(1, 200, 31), picture(2, SIDE, SIDE)]
    tiles = make_tiles(images, processor)
    assert (tiles.pixels.dtype, tiles.pixels.shape) == (np.uint8, (3, 3, SIDE, SIDE))
    assert tiles.counts == (1, 1, 1)
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    pixel_values = normalize_tiles(torch.from_numpy(tiles.pixels), processor)
    torch.testing.assert_close(pixel_values, expected, rtol=0, atol=1e-6)


def test_no_images_give_no_tiles(processor: FlashVLProcessor) -> None:
    tiles = make_tiles([], processor)
    assert (tiles.pixels.dtype, tiles.pixels.shape) == (np.uint8, (0, 3, SIDE, SIDE))
    assert tiles.counts == ()


# Encoding


@pytest.mark.parametrize(
    ("contents", "blocks"),
    [
        ([("user", "Hi")], [user("Hi")]),
        ([("user", "<image>\nWhat?")], [user(picture(), "What?")]),
        ([("user", "<image>\n<image>\nWhich?")], [user(picture(0), picture(1), "Which?")]),
        ([("user", "<image>\n")], [user(picture())]),
        (
            [("system", "Be brief."), ("user", "<image>\nA?"), ("assistant", "B."), ("user", "C?")],
            [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                user(picture(), "A?"),
                {"role": "assistant", "content": [{"type": "text", "text": "B."}]},
                user("C?"),
            ],
        ),
    ],
)
def test_encode_prompt_is_the_processors_own_encoding(
    processor: FlashVLProcessor, contents: list[tuple[str, str]], blocks: list[dict[str, Any]]
) -> None:
    messages = [{"role": role, "content": content} for role, content in contents]
    expected = processor.apply_chat_template(
        blocks, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    counts = [1] * sum(content.count("<image>") for _, content in contents)
    assert encode_prompt(messages, counts, processor) == expected["input_ids"][0]


def segments(input_ids: list[int], labels: list[int]) -> list[list[int]]:
    """The texts of the runs of tokens that take loss."""
    runs: list[list[int]] = [[]]
    for token, label in zip(input_ids, labels, strict=True):
        if label == IGNORE_INDEX:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [run for run in runs if run]


ANSWER = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30)


@settings(deadline=None, max_examples=50)
@given(answers=st.lists(ANSWER.filter(lambda text: text.isascii()), min_size=1, max_size=3))
def test_only_the_answers_and_their_end_take_loss(
    processor: FlashVLProcessor, answers: list[str]
) -> None:
    messages = [{"role": "system", "content": "assistant"}]
    for number, answer in enumerate(answers):
        question = "<image>\nassistant?" if number == 0 else answer
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    input_ids, labels = encode_conversation(messages, [1], processor, max_length=500)
    learnt = [processor.tokenizer.decode(run) for run in segments(input_ids, labels)]
    assert learnt == [f"{answer}<|im_end|>" for answer in answers]
    assert processor.tokenizer.decode(input_ids).count(PAD) == IMAGE_SEQ_LENGTH


def test_prompt_is_the_beginning_of_the_conversation(processor: FlashVLProcessor) -> None:
    question = [{"role": "user", "content": "<image>\nHow many shapes?"}]
    conversation = [*question, {"role": "assistant", "content": "3"}]
    prompt = encode_prompt(question, [1], processor)
    input_ids, labels = encode_conversation(conversation, [1], processor, max_length=200)
    assert input_ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORE_INDEX}
    assert processor.tokenizer.decode(input_ids[len(prompt) :]) == "3<|im_end|>\n"


TEXT = st.lists(
    st.sampled_from(
        ("<|im_start|>", "<|im_end|>", PAD, "<|endoftext|>", "<|im_", "end|>")
        + ("a", " ", "\n", "\u00e9\U0001f642")
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=100)
@given(question=TEXT, answer=TEXT, more=TEXT)
def test_control_tokens_in_a_text_are_text_in_training_as_in_inference(
    processor: FlashVLProcessor, question: str, answer: str, more: str
) -> None:
    opening = [{"role": "user", "content": f"<image>{question}."}]
    turns = [{"role": "assistant", "content": f"I{answer}"}, {"role": "user", "content": more}]
    last = {"role": "assistant", "content": "I."}
    tokenizer = processor.tokenizer
    input_ids, labels = encode_conversation([*opening, *turns, last], [1], processor, 999)
    for messages in (opening, [*opening, *turns]):
        prompt = encode_prompt(messages, [1], processor)
        assert input_ids[: len(prompt)] == prompt
    assert input_ids.count(tokenizer.convert_tokens_to_ids(PAD)) == IMAGE_SEQ_LENGTH
    assert input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 5
    assert input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 5
    learnt = [tokenizer.decode(run) for run in segments(input_ids, labels)]
    assert learnt == [f"I{answer}<|im_end|>", "I.<|im_end|>"]


def test_labels_are_the_librarys_assistant_mask(processor: FlashVLProcessor) -> None:
    """The processor's own mask, which TRL's assistant_only_loss uses, marks the same tokens."""
    blocks = [user(picture(), "A?"), {"role": "assistant", "content": "B c."}]
    encoded = processor.apply_chat_template(
        blocks,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"return_assistant_tokens_mask": True},
        return_assistant_tokens_mask=True,
    )
    messages = [
        {"role": "user", "content": "<image>\nA?"},
        {"role": "assistant", "content": "B c."},
    ]
    input_ids, labels = encode_conversation(messages, [1], processor, max_length=200)
    assert encoded["input_ids"][0] == input_ids
    masks = np.asarray(encoded["assistant_masks"]).reshape(-1).tolist()
    assert masks == [int(label != IGNORE_INDEX) for label in labels]


def test_conversation_is_refused_not_cut(processor: FlashVLProcessor) -> None:
    messages = [
        {"role": "user", "content": "<image>\nA?"},
        {"role": "assistant", "content": "B."},
    ]
    length = len(encode_conversation(messages, [1], processor, max_length=200)[0])
    assert len(encode_conversation(messages, [1], processor, max_length=length)[0]) == length
    with pytest.raises(DataError, match=rf"{length} tokens.*max_length={length - 1}") as caught:
        encode_conversation(messages, [1], processor, max_length=length - 1)
    assert "\n" not in str(caught.value)


def test_conversation_without_an_answer_is_refused(processor: FlashVLProcessor) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        encode_conversation([{"role": "user", "content": "A?"}], [], processor, max_length=200)


# Padding

ROWS = st.lists(st.lists(st.integers(0, 500), max_size=8), min_size=1, max_size=5)


@settings(deadline=None)
@given(rows=ROWS, value=st.integers(-100, 500))
def test_pad_fills_up_the_asked_side(rows: list[list[int]], value: int) -> None:
    longest = max(len(row) for row in rows)
    right = [row + [value] * (longest - len(row)) for row in rows]
    left = [[value] * (longest - len(row)) + row for row in rows]
    assert pad(rows, value).tolist() == right
    assert pad(rows, value, side="right").tolist() == right
    assert pad(rows, value, side="left").tolist() == left
    assert pad(rows, value).dtype == torch.long


# Save and load


def test_save_and_load(processor: FlashVLProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = FlashVLProcessor.from_pretrained(tmp_path)
    assert loaded.image_seq_length == IMAGE_SEQ_LENGTH
    assert loaded.image_token_id == 3
    assert loaded.chat_template == processor.chat_template
    messages = [user(picture(), "A?"), {"role": "assistant", "content": "B"}, user("C?")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    before = processor.apply_chat_template(messages, **options)
    after = loaded.apply_chat_template(messages, **options)
    assert set(before) == set(after)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    assert (tmp_path / "processing_flashvl.py").is_file()
    assert (tmp_path / "image_processing_flashvl.py").is_file()
