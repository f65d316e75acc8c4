"""The folder that `save_pretrained` writes works with vLLM and with other versions of transformers.

They run in environments without the package, by the code in the folder, and give the engine's
answers. The tests make the environments, which takes minutes and hundreds of megabytes; a folder
named by FLASHVL_TEST_ENVIRONMENTS keeps them.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flashvl.model.loading import load_model, load_processor
from tests.support.elsewhere import (
    TRANSFORMERS,
    VLLM,
    Conversation,
    answers_of,
    answers_of_the_engine,
    make_conversations,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

MODELS = ("tiny", "tiny-iss", "tiny-dynamic")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    return make_conversations(tmp_path_factory.mktemp("pictures"))


def export(model: str, folder: Path) -> Path:
    """A folder with the code beside the weights, as users publish a model."""
    load_model(model).save_pretrained(folder)
    load_processor(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_vllm_answers_as_the_engine(
    model: str, conversations: list[Conversation], vllm_python: Path, tmp_path: Path
) -> None:
    folder = export(model, tmp_path / model)
    answers = answers_of(vllm_python, VLLM, folder, conversations, tmp_path)
    assert answers == answers_of_the_engine(model, conversations)
    assert len(set(answers)) > len(answers) / 2


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
