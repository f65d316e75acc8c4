"""The requests for engines that a client's request makes."""

import asyncio

import pytest

from flashvl.data.features import decode_tiles, encode_prompt
from flashvl.engine import Request
from flashvl.serve.config import ServiceConfig
from flashvl.serve.prompts import Prompts
from flashvl.serve.protocol.chat import ChatCompletionRequest
from tests.support.images import encode, noise
from tests.support.serving import ask


@pytest.fixture(scope="module", params=["tiny", "tiny-iss"])
def prompts(request: pytest.FixtureRequest) -> Prompts:
    return Prompts(ServiceConfig(model=request.param))


def chat(**fields: object) -> ChatCompletionRequest:
    images = [encode(noise(0, size)) for size in ((96, 80), (640, 200), (60, 900))]
    return ChatCompletionRequest.model_validate(
        {"model": "tiny", "messages": ask("Which of <image>?", *images), "max_tokens": 7} | fields
    )


def test_a_prompt_is_token_ids_that_the_decoded_images_would_give(prompts: Prompts) -> None:
    """An engine need not tokenize again what the service has tokenized."""
    wanted = asyncio.run(prompts.read_chat(chat(seed=3)))
    tiles = decode_tiles(wanted.images, prompts.processor)
    content = [*[{"type": "image"}] * 3, {"type": "text", "text": "Which of <image>?"}]
    expected = encode_prompt(
        [{"role": "user", "content": content}], tiles.counts, prompts.processor
    )
    assert wanted.requests == [Request(prompt=expected, max_new_tokens=7, seed=3, stop=())]


def test_each_answer_has_a_seed_of_its_own(prompts: Prompts) -> None:
    wanted = asyncio.run(prompts.read_chat(chat(seed=3, n=3)))
    assert [each.seed for each in wanted.requests] == [3, 4, 5]
