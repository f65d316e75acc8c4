"""lmms-eval's model `flashvl`: an entry point of this package names it to lmms-eval.

python -m lmms_eval --model flashvl --model_args model=tiny --tasks ocrbench --batch_size 64
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm.asyncio import tqdm

from flashvl.config import Dtype
from flashvl.data.features import Message
from flashvl.engine import AsyncEngine, Engine, Request
from flashvl.errors import DataError
from flashvl.model.parts.prepare import prepare_model

MANIFEST = ModelManifest(model_id="flashvl", chat_class_path=f"{__name__}.FlashVL")
MAX_NEW_TOKENS = 512
"""Tokens of an answer at most, where a task does not say."""

log = logging.getLogger(__name__)


class FlashVL(lmms):
    """A model whose questions flashvl's engine answers, `batch_size` at once."""

    is_simple = False

    def __init__(
        self,
        model: str | Path = "tiny",
        dtype: Dtype = "auto",
        batch_size: int | str = 64,
        **_: Any,
    ):
        """
        Args:
            model: name of a shipped or published model, or its folder.
            batch_size: questions that are answered at once, at most.
        """
        super().__init__()
        self.batch_size = int(batch_size)
        engine = Engine.from_pretrained(prepare_model(model), dtype, max_num_seqs=self.batch_size)
        self.engine = AsyncEngine(engine)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers in the questions' order; that to one that cannot be answered is empty."""
        return asyncio.run(self._answer_all(requests))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("flashvl answers tasks of one round only; leave this task out")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "flashvl writes answers and scores none; choose a task of the type generate_until"
        )

    async def _answer_all(self, instances: list[Instance]) -> list[str]:
        # A question loads its images while it holds a slot: few are in memory at a time.
        slots = asyncio.Semaphore(2 * self.batch_size)

        async def answer(instance: Instance) -> str:
            async with slots:
                try:
                    return (await self.engine.generate(self._read(instance))).text
                except DataError as error:
                    log.warning("%s/%s: %s", instance.task_name, instance.doc_id, error)
                    return ""

        answers: list[str] = await tqdm.gather(*map(answer, instances), desc="flashvl")
        return answers

    def _read(self, instance: Instance) -> Request:
        """
        Raises:
            DataError: the question cannot be asked.
        """
        _, to_messages, options, number, task, split = instance.args
        asked = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        images: list[Image.Image] = []
        messages: list[Message] = []
        for message in asked.messages:
            parts = []
            for part in message.content:
                if part.type == "text":
                    parts.append({"type": "text", "text": part.text})
                    continue
                if part.type != "image":
                    raise DataError(f"question holds {part.type}; choose a task about images")
                image = part.url if isinstance(part.url, Image.Image) else Image.open(part.url)
                images.append(image.convert("RGB"))
                parts.append({"type": "image"})
            messages.append({"role": message.role, "content": parts})
        is_sampled = options.get("do_sample", True)
        until = options.get("until", ())
        return Request(
            messages=messages,
            images=images,
            max_new_tokens=options.get("max_new_tokens", MAX_NEW_TOKENS),
            temperature=(options.get("temperature") or 0.0) if is_sampled else 0.0,
            stop=[until] if isinstance(until, str) else until,
        )
