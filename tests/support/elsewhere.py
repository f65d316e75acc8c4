"""One conversation asked of a model folder in several ways: by the engine, and in environments
without the package, by vLLM and by transformers with the code in the folder."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from PIL import Image

from flashvl.data import synthetic
from flashvl.engine import Engine, Request
from flashvl.eval.scenes import held_out_items
from flashvl.model.loading import load_model, load_processor

SIZES = ((96, 96), (250, 90), (90, 250), (200, 200), (640, 480), (31, 47))
"""Sizes of the pictures in pixels: from one tile to the most that are possible."""
MAX_TOKENS = 48

Conversation = list[dict[str, Any]]
"""Messages in transformers' format; an image is given as the path of its file."""


def make_conversations(folder: Path) -> list[Conversation]:
    """Questions of every task about held-out scenes of every size, two images, or none.

    The pictures are written to `folder`.
    """
    asked: list[Conversation] = []
    for task in synthetic.TASKS:
        for size, item in zip(SIZES, held_out_items(task, len(SIZES)), strict=True):
            path = folder / f"{task}-{size[0]}x{size[1]}.png"
            item.image.resize(size).save(path)
            asked.append([user(path, item.question)])
    one, two = asked[0][0]["content"][0]["image"], asked[4][0]["content"][0]["image"]
    answered = {"role": "assistant", "content": [{"type": "text", "text": "A picture."}]}
    asked.append([user(one, "Describe the image."), answered, user(two, "Describe the image.")])
    asked.append([user(None, "Describe the image.")])
    return asked


def user(image: Path | str | None, text: str) -> dict[str, Any]:
    images = [] if image is None else [{"type": "image", "image": str(image)}]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def answers_of_the_engine(model: str | Path, conversations: list[Conversation]) -> list[str]:
    """The engine's answers in fp32, greedy, all in one batch."""
    engine = Engine(load_model(model), load_processor(model))
    requests = []
    for messages in conversations:
        parts = [part for message in messages for part in message["content"]]
        images = [Image.open(part["image"]) for part in parts if part["type"] == "image"]
        requests.append(Request(messages=messages, images=images, max_new_tokens=MAX_TOKENS))
    return [completion.text for completion in engine.generate(requests)]


def answers_of(
    python: Path, script: str, folder: Path, conversations: list[Conversation], home: Path
) -> list[str]:
    """The answers of the model in `folder` by `script`, run by `python`."""
    asked, answered = home / "asked.json", home / "answered.json"
    asked.write_text(json.dumps(conversations))
    # The process sees neither the package nor the environment of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-c", script, str(folder), str(asked), str(answered), str(MAX_TOKENS)],
        env=environment,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    answers: list[str] = json.loads(answered.read_text())
    return answers


VLLM = """
import json, os, sys
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from importlib.util import find_spec
from pathlib import Path
from PIL import Image
from vllm import LLM, SamplingParams

folder, asked, answered, max_tokens = sys.argv[1:]
assert find_spec("flashvl") is None
conversations = json.loads(Path(asked).read_text())
for messages in conversations:
    for message in messages:
        message["content"] = [
            {"type": "image_pil", "image_pil": Image.open(part["image"])}
            if part["type"] == "image"
            else part
            for part in message["content"]
        ]
llm = LLM(
    folder,
    trust_remote_code=True,
    model_impl="transformers",
    dtype="float32",
    enforce_eager=True,
    limit_mm_per_prompt={"image": 2},
)
parameters = SamplingParams(temperature=0.0, max_tokens=int(max_tokens))
outputs = llm.chat(conversations, parameters)
Path(answered).write_text(json.dumps([output.outputs[0].text for output in outputs]))
"""


TRANSFORMERS = """
import json, sys
from importlib.util import find_spec
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, asked, answered, max_tokens = sys.argv[1:]
assert find_spec("flashvl") is None
model = AutoModelForImageTextToText.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32
)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
answers = []
for messages in json.loads(Path(asked).read_text()):
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=int(max_tokens), do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    answers.append(processor.decode(answer, skip_special_tokens=True))
for part in (model, processor):
    part.save_pretrained(Path(answered).parent / "again")
Path(answered).write_text(json.dumps(answers))
"""
