"""While a new version of a model is rolled out, an ingress may ask an engine of another version."""

import asyncio
from typing import Any

import pytest

from flashvl.engine import Completion
from flashvl.serve import replica
from flashvl.serve.config import ServiceConfig
from flashvl.serve.prompts import Prompts
from flashvl.serve.protocol.chat import ChatCompletionRequest
from flashvl.serve.replica import EngineReplica, Refusal
from tests.support.images import encode, noise
from tests.support.serving import ask

REQUEST: dict[str, Any] = {
    "model": "flashvl",
    "messages": ask("Describe the image.", encode(noise(0))),
    "max_tokens": 8,
}


def test_an_engine_answers_the_ingress_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "share_cores", lambda *_: None)  # it asks Ray for the nodes
    old, new = (ServiceConfig(model=model, dtype="float32") for model in ("tiny", "tiny-iss"))
    engine = EngineReplica(new)
    request = ChatCompletionRequest.model_validate(REQUEST)

    async def answer(ingress: ServiceConfig) -> Completion:
        asked = await Prompts(ingress).read_chat(request)
        items = [item async for item in engine.answer(asked)]
        assert not any(isinstance(item, Refusal) for item in items), items
        (completion,) = [item[1].completion for item in items if isinstance(item, tuple)]
        assert completion is not None
        return completion

    async def both() -> tuple[Completion, Completion]:
        return await answer(old), await answer(new)

    from_old, from_new = asyncio.run(both())
    assert from_old.prompt_tokens == from_new.prompt_tokens
    assert from_old.token_ids == from_new.token_ids
