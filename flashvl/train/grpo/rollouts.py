"""Samples the completions of a step by the engine, on the weights that are being trained."""

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flashvl.data.features import Tiles
from flashvl.engine.engine import Engine
from flashvl.engine.request import Completion, Request
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.train.grpo.groups import Prompt, Rollout
from flashvl.train.recipe import GrpoRecipe
from flashvl.train.run.export import gathered

MAX_NUM_SEQS = 256
"""Completions that a worker samples at once, at most."""


class Sampler:
    """An engine on the model of a worker, which samples between the updates of its weights."""

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        recipe: GrpoRecipe,
    ):
        self.model, self.processor, self.recipe = model, processor, recipe
        self._engine: Engine | None = None

    @property
    def max_num_seqs(self) -> int:
        """Completions of a step that a worker makes at most, as far as it samples them at once."""
        completions = self.recipe.global_batch_size * self.recipe.num_generations
        return min(-(-completions // self.recipe.num_workers), MAX_NUM_SEQS)

    def sample(
        self, deepspeed_engine: Any, prompts: Sequence[Prompt], step: int
    ) -> list[list[Rollout]]:
        """The completions of each prompt that this worker makes; all workers call this together."""
        requests = [
            self._request(prompt, step, completion)
            for prompt in prompts
            for completion in range(
                prompt.first_completion, prompt.first_completion + prompt.num_completions
            )
        ]
        with self._at_work(deepspeed_engine) as engine:
            completions = iter(engine.generate(requests))
        return [
            [_as_rollout(next(completions)) for _ in range(prompt.num_completions)]
            for prompt in prompts
        ]

    def _request(self, prompt: Prompt, step: int, completion: int) -> Request:
        counts = (len(prompt.tiles),) if len(prompt.tiles) else ()
        return Request(
            prompt=prompt.input_ids.tolist(),
            images=Tiles(pixels=prompt.tiles, counts=counts),
            max_new_tokens=self.recipe.max_completion_length,
            temperature=self.recipe.temperature,
            seed=make_seed(self.recipe.seed, step, prompt.row, completion),
            logprobs=0,
        )

    @contextmanager
    def _at_work(self, deepspeed_engine: Any) -> Iterator[Engine]:
        """The engine, on whole weights; afterwards the model can be trained as before."""
        stage = self.recipe.zero_stage
        with gathered(self.model, stage), _without_hooks(deepspeed_engine, stage):
            if self._engine is None:
                self._engine = Engine(
                    self.model,
                    self.processor,
                    max_num_seqs=self.max_num_seqs,
                    max_model_len=self.recipe.max_length + self.recipe.max_completion_length,
                    is_trained=True,
                )
            yield self._engine


@contextmanager
def _without_hooks(deepspeed_engine: Any, zero_stage: int) -> Iterator[None]:
    """While the block runs, ZeRO-3 does not split the weights of each layer that was computed."""
    if zero_stage < 3:
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks  # imports DeepSpeed

    remove_hooks(deepspeed_engine)
    try:
        yield
    finally:
        add_hooks(deepspeed_engine)


def make_seed(seed: int, step: int, row: int, completion: int) -> int:
    """The seed of a completion: a function of these numbers alone, so that a resumed run, and one
    on other workers, samples the same."""
    data = struct.pack("<4q", seed, step, row, completion)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _as_rollout(completion: Completion) -> Rollout:
    said = list(completion.logprobs or [])
    if completion.end is not None:
        said.append(completion.end)
    return Rollout(
        token_ids=[each.token_id for each in said],
        logprobs=[each.logprob for each in said],
        text=completion.text,
        is_cut=completion.finish_reason == "length",
    )
