"""Generation: requests in, completions out. Knows no Ray, no HTTP, no Parquet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flashvl.data.features import Tiles, encode_prompt, make_tiles, normalize_tiles, pad
from flashvl.engine.request import Completion, Request
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import inference_dtype, load_model, load_processor


class Engine:
    """Greedy generation for batches of requests, on a GPU where there is one."""

    def __init__(self, model: FlashVLForConditionalGeneration, processor: FlashVLProcessor):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.processor = processor
        self.end_token_id: int = processor.tokenizer.eos_token_id
        self.pad_token_id: int = processor.tokenizer.pad_token_id

    @classmethod
    def from_pretrained(cls, model: str | Path, dtype: torch.dtype | None = None) -> "Engine":
        """The engine for a shipped model's name or a folder; `dtype` as the hardware likes it."""
        return cls(load_model(model, dtype or inference_dtype()), load_processor(model))

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all `requests` as one batch, in their order."""
        if not requests:
            return []
        tiles = [self._tiles(request) for request in requests]
        prompts = [
            encode_prompt(request.messages, cut.counts, self.processor)
            for request, cut in zip(requests, tiles, strict=True)
        ]
        input_ids = pad(prompts, self.pad_token_id, side="left").to(self.device)
        attention_mask = pad([[1] * len(prompt) for prompt in prompts], 0, side="left")
        max_new_tokens = max(request.max_new_tokens for request in requests)
        generated = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.to(self.device),
            **self._image_inputs(tiles),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=self.end_token_id,
            pad_token_id=self.pad_token_id,
        )
        answers = generated[:, input_ids.shape[1] :].tolist()
        return [
            self._complete(request, prompt, answer)
            for request, prompt, answer in zip(requests, prompts, answers, strict=True)
        ]

    def _tiles(self, request: Request) -> Tiles:
        images = request.images
        return images if isinstance(images, Tiles) else make_tiles(images, self.processor)

    def _image_inputs(self, tiles: Sequence[Tiles]) -> dict[str, torch.Tensor]:
        """`pixel_values`, or nothing where no request has an image: `generate` takes no None."""
        batch = np.concatenate([cut.pixels for cut in tiles])
        if not len(batch):
            return {}
        tiles_on_device = torch.from_numpy(batch).to(self.device)
        return {"pixel_values": normalize_tiles(tiles_on_device, self.processor)}

    def _complete(self, request: Request, prompt: list[int], answer: list[int]) -> Completion:
        answer = answer[: request.max_new_tokens]
        stopped = self.end_token_id in answer
        if stopped:
            answer = answer[: answer.index(self.end_token_id)]
        return Completion(
            text=self.processor.tokenizer.decode(answer, skip_special_tokens=True),
            token_ids=answer,
            prompt_tokens=len(prompt),
            finish_reason="stop" if stopped else "length",
        )
