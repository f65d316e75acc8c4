"""VLMEvalKit (`ms-vlmeval`) with a model in its own process, without a service.

from vlmeval.run import main
from flashvl.eval.adapters.vlmevalkit import register

register("flashvl", model="tiny")
main()  # with VLMEvalKit's options: --model flashvl --data OCRBench --api-nproc 64 ...
"""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from vlmeval.config import supported_VLM
from vlmeval.smp.file import INFER_FAIL_MSG
from vlmeval.vlm.base import BaseModel
from vlmeval.vlm.flash_vl import FlashVL

from flashvl.config import Dtype
from flashvl.data.features import ask_about_image, decode_tiles
from flashvl.engine import AsyncEngine, Engine, Request
from flashvl.errors import DataError
from flashvl.model.parts.prepare import prepare_model


class BatchedFlashVL(FlashVL):
    """VLMEvalKit's own Flash-VL, with its prompts, whose questions flashvl's engine answers."""

    INTERLEAVE = False
    is_api = True
    """VLMEvalKit asks an API's questions from `--api-nproc` threads, which the engine batches; of
    other models it asks one question at a time."""

    def __init__(
        self,
        model: str | Path = "tiny",
        dtype: Dtype = "auto",
        max_new_tokens: int = 512,
        max_num_seqs: int = 64,
    ):
        """
        Args:
            model: name of a shipped or published model, or its folder.
            max_new_tokens: tokens of an answer, at most.
            max_num_seqs: questions that are answered at once, at most.
        """
        BaseModel.__init__(self)  # FlashVL's own would load the published code
        engine = Engine.from_pretrained(prepare_model(model), dtype, max_num_seqs=max_num_seqs)
        self.engine = AsyncEngine(engine)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The answer to a question about its first image, or VLMEvalKit's mark of a failure."""
        prompt, image = self.message_to_promptimg(message, dataset)
        images = [] if image is None else [Path(image).read_bytes()]
        try:
            request = Request(
                messages=ask_about_image(prompt, len(images)),
                images=decode_tiles(images, self.engine.processor),
                max_new_tokens=self.max_new_tokens,
            )
            return asyncio.run(self.engine.generate(request)).text
        except DataError as error:
            return f"{INFER_FAIL_MSG} {error}"


def register(name: str, **options: Any) -> None:
    """Give VLMEvalKit a model of this name, which `--model` then takes.

    Args:
        options: those of `BatchedFlashVL`.
    """
    supported_VLM[name] = partial(BatchedFlashVL, **options)
