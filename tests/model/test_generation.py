"""`generate` answers in batches, ends at the right token, and never writes a placeholder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    pipeline,
)

from flashvl.data import synthetic
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import SHIPPED, load_model, load_processor

Questions = list[tuple[Image.Image, str, str]]
TASKS: tuple[synthetic.Task, ...] = ("caption", "count", "read")
NAMES = ["tiny", "tiny-dynamic", "tiny-iss"]
IMAGE, END = 3, 2


@pytest.fixture(scope="module")
def questions() -> Questions:
    """Pictures, questions and answers of the held-out world, of different lengths."""
    drawn = [next(synthetic.samples("heldout", 0, 1, (task,))) for task in TASKS]
    return [(d.image(), d.turns[0].question, d.turns[0].answer) for d in drawn]


def messages(image: Image.Image, question: str) -> list[dict[str, Any]]:
    text = question.removeprefix("<image>\n")
    blocks = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": blocks}]


# Batches


@pytest.mark.parametrize("name", NAMES)
def test_the_pipelines_batches_are_its_single_answers(name: str, questions: Questions) -> None:
    pipe = pipeline("image-text-to-text", model=str(SHIPPED / name), dtype=torch.float32)
    chats = [messages(image, question) for image, question, _ in questions]
    options: dict[str, Any] = {"max_new_tokens": 40, "return_full_text": False}
    answers = {
        size: [a[0]["generated_text"] for a in pipe(text=chats, batch_size=size, **options)]
        for size in (1, 3)
    }
    assert answers[3] == answers[1]
    assert len({len(answer) for answer in answers[1]}) > 1
    right = sum(a == answer for a, (*_, answer) in zip(answers[3], questions, strict=True))
    assert right == len(questions)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_tokenizer_pads_on_the_left_by_itself(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / name)
    assert tokenizer(["a", "a red circle"], padding=True)["attention_mask"][0][0] == 0


def test_a_folder_that_was_saved_to_pad_on_the_right_pads_on_the_left(
    tiny_random: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_random, tmp_path / "older"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "right"}))
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
    processor = load_processor(folder)
    assert processor.tokenizer.padding_side == "left"
    padded = processor(text=["a", "a red circle"], padding=True)
    assert padded["attention_mask"][0][0] == 0
    asked = processor(text=["a", "a red circle"], padding=True, padding_side="right")
    assert asked["attention_mask"][0][-1] == 0
    processor.save_pretrained(tmp_path / "newer")
    assert AutoTokenizer.from_pretrained(tmp_path / "newer").padding_side == "left"


# The end


@pytest.mark.parametrize("stored", [7, [7, 9], [7, END], None], ids=str)
def test_an_older_folder_ends_its_answers_as_the_chat_template_says(
    tiny_random: Path, tmp_path: Path, stored: Any
) -> None:
    folder = Path(shutil.copytree(tiny_random, tmp_path / "older"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stored}))
    model = load_model(folder)
    others = [token for token in ([7, 9] if stored == [7, 9] else [7]) if stored is not None]
    assert model.generation_config.eos_token_id == [END, *others]
    with likeliest(model, END):
        assert answer(model, load_processor(folder)) == [[END]]


# The image's placeholder


class likeliest:
    """Make `token` by far the likeliest one for `model` inside the block."""

    def __init__(self, model: FlashVLForConditionalGeneration, token: int):
        self.bias = torch.zeros(model.config.text_config.vocab_size)
        self.bias[token] = 1e4
        self.head = model.lm_head

    def __enter__(self) -> None:
        self.hook = self.head.register_forward_hook(lambda head, args, out: out + self.bias)

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def answer(model: Any, processor: FlashVLProcessor, **options: Any) -> list[list[int]]:
    inputs = processor.apply_chat_template(
        messages(Image.new("RGB", (96, 96), "red"), "What?"),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    options = {"max_new_tokens": 6, "do_sample": False} | options
    if "generation_config" in options:
        options = {
            key: options[key] for key in options if key not in ("max_new_tokens", "do_sample")
        }
    torch.manual_seed(0)
    generated = model.generate(**inputs, **options)
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


def fresh(**options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=6, eos_token_id=END, pad_token_id=0, **options)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 2.0, "num_return_sequences": 3},
    "the likeliest alone": lambda: {"do_sample": True, "top_k": 1},
    "beams": lambda: {"num_beams": 3, "num_return_sequences": 3},
    "sampled beams": lambda: {"num_beams": 3, "do_sample": True},
    "a fresh configuration": lambda: {"generation_config": fresh(do_sample=True)},
    "other tokens suppressed": lambda: {"generation_config": fresh(suppress_tokens=[5, 6])},
    "a processor of the same kind": lambda: {
        "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([5, 6])])
    },
    "drafts": lambda: {"prompt_lookup_num_tokens": 3},
    "a penalty": lambda: {"repetition_penalty": 0.2},
    "a static cache": lambda: {"cache_implementation": "static", "disable_compile": True},
}


@pytest.fixture(scope="module")
def random(tiny_iss_random: Path) -> tuple[FlashVLForConditionalGeneration, FlashVLProcessor]:
    return load_model(tiny_iss_random), load_processor(tiny_iss_random)


@pytest.mark.parametrize("way", WAYS)
def test_generate_never_chooses_the_placeholder(random: Any, way: str) -> None:
    model, processor = random
    with likeliest(model, IMAGE):
        (logits,) = model(input_ids=torch.tensor([[5]])).logits[0]
        assert logits.argmax() == IMAGE
        answers = answer(model, processor, **WAYS[way]())
    assert answers and all(IMAGE not in tokens for tokens in answers)


def test_an_adapter_does_not_choose_it_either(tiny_random: Path) -> None:
    model, processor = load_model(tiny_random), load_processor(tiny_random)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with likeliest(model, IMAGE):
        assert IMAGE not in answer(adapted, processor)[0]


def test_nothing_else_changes(random: Any) -> None:
    """Each chosen token is the one that would be chosen without the placeholder's column."""
    model, processor = random
    plain = super(FlashVLForConditionalGeneration, model)._get_logits_processor
    kept = [type(p) for p in plain(model.generation_config)]
    ours = [type(p) for p in model._get_logits_processor(model.generation_config)]
    assert [kind.__name__ for kind in ours] == [*(k.__name__ for k in kept), "ImageTokenSuppressor"]
