"""The folder that `save_pretrained` writes works with vLLM and with other versions of transformers.

They run in environments without the package, by the code in the folder, and give the engine's
answers. The tests make the environments, which takes minutes and hundreds of megabytes; a folder
named by FLASHVL_TEST_ENVIRONMENTS keeps them.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flashvl.data import synthetic
from flashvl.engine import Engine, Request
from flashvl.eval.scenes import held_out_items
from flashvl.model.loading import load_model, load_processor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODELS = ("tiny", "tiny-iss", "tiny-dynamic")
SIZES = ((96, 96), (250, 90), (90, 250), (200, 200), (640, 480), (31, 47))
"""Sizes of the pictures in pixels: from one tile to the most that are possible."""
MAX_TOKENS = 48

Conversation = list[dict[str, Any]]
"""Messages in transformers' format; an image is given as the path of its file."""


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    """Questions of every task about held-out scenes of every size, two images, or none."""
    folder = tmp_path_factory.mktemp("pictures")
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


def export(model: str, folder: Path) -> Path:
    """A folder with the code beside the weights, as users publish a model."""
    load_model(model).save_pretrained(folder)
    load_processor(model).save_pretrained(folder)
    return folder


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


@pytest.mark.parametrize("model", MODELS)
def test_vllm_answers_as_the_engine(
    model: str, conversations: list[Conversation], vllm_python: Path, tmp_path: Path
) -> None:
    folder = export(model, tmp_path / model)
    answers = answers_of(vllm_python, VLLM, folder, conversations, tmp_path)
    assert answers == answers_of_the_engine(model, conversations)
    assert len(set(answers)) > len(answers) / 2


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


@pytest.mark.parametrize("transformers", ["transformers==5.16.0", "transformers>=5.24,<6"])
def test_transformers_of_another_version_answer_as_the_engine(
    transformers: str,
    conversations: list[Conversation],
    make_environment: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """The oldest supported transformers and the newest one, both without the package."""
    python = make_environment(transformers, "torch==2.13.0", "pillow", "jinja2")
    for model in MODELS:
        home = tmp_path / model
        folder = export(model, home / "exported")
        answers = answers_of(python, TRANSFORMERS, folder, conversations, home)
        assert answers == answers_of_the_engine(model, conversations)
        # A folder that this version saves holds the same model, with and without the package.
        ours, theirs = (
            json.loads((path / "config.json").read_text()) for path in (folder, home / "again")
        )
        assert theirs["transformers_version"] != ours.pop("transformers_version")
        assert theirs | ours == theirs
        assert {path.name for path in folder.iterdir()} <= {
            path.name for path in (home / "again").iterdir()
        }
        assert answers_of_the_engine(home / "again", conversations) == answers
