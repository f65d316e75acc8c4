"""Generation: requests in, completions out. Knows no Ray, no HTTP, no Parquet.

Continuous batching: between two decoding steps new requests are admitted, and finished or cancelled
ones leave. Steps take turns: a piece of a prefill, if one waits, and one token for all that decode.
"""

import itertools
import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from flashvl.config import Dtype
from flashvl.data.features import Tiles, encode_prompt, make_tiles
from flashvl.engine.cache import KVCache, bytes_per_token
from flashvl.engine.grammars import Grammar, Grammars
from flashvl.engine.images import ImageFeatures
from flashvl.engine.request import Completion, Delta, FinishReason, Request
from flashvl.engine.runner import Runner
from flashvl.engine.sampling import Sampler, token_logprobs
from flashvl.engine.scheduler import Scheduler
from flashvl.engine.sequence import AnswerText, Sequence
from flashvl.engine.tokens import TokenTable
from flashvl.errors import DataError
from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import inference_dtype, load_model, load_processor

MAX_LENGTH = 4096
"""Tokens of a conversation: an ISS image of 2,880, a long question and a long answer."""
CACHE_SHARE = 0.25
"""Of the free memory, for the cache."""
IMAGE_CACHE_BYTES = 256 * 2**20
"""Of visual tokens: 300 images of the static preset."""


class Engine:
    """Answers requests with one model, on a GPU where there is one; for one thread.

    Requests get numbers from `add`; `step` prefills a piece, or moves those that decode on by a
    token; `take` hands out what is new of one. `generate` and `stream` do this for you.
    """

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        *,
        max_num_seqs: int = 64,
        max_model_len: int = MAX_LENGTH,
        max_prefill_tokens: int = 2048,
    ):
        """
        Args:
            max_num_seqs: requests answered at once, at most; fewer where the cache, whose tokens
                are bounded by the memory, has no room for as many of their lengths.
            max_model_len: tokens of a prompt and its answer, at most; and the model's own limit.
            max_prefill_tokens: in one step, so that long prompts do not keep others waiting.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.processor = processor
        self.end_token_ids = end_tokens(model, processor)
        config = model.config.text_config
        self.vocab_size: int = config.vocab_size
        self.tokens = TokenTable(processor.tokenizer)
        self.grammars = Grammars(processor.tokenizer, self.vocab_size, self.end_token_ids)
        self.max_model_len = longest_conversation(model.config, max_model_len)
        cache_bytes = CACHE_SHARE * _free_bytes(self.device)
        tokens_that_fit = int(cache_bytes / bytes_per_token(config, model.dtype))
        cache = KVCache(
            config,
            num_tokens=max(
                min(max_num_seqs * self.max_model_len, tokens_that_fit), self.max_model_len
            ),
            max_rows=max_num_seqs,
            dtype=model.dtype,
            device=self.device,
        )
        self.runner = Runner(self.model, processor, cache)
        self.scheduler = Scheduler(cache, max_prefill_tokens)
        self.image_features = ImageFeatures(self.runner.encode_tiles, IMAGE_CACHE_BYTES)
        self.num_steps = 0
        """So far; a count that stands still while requests wait is that of an engine that hangs."""
        self.num_decode_steps = self.num_decoded_tokens = 0
        """So far; their quotient is how many requests a step answered."""
        self._has_prefilled = False
        """The last step did; then it is the others' turn."""
        self._ids = itertools.count()
        self._sequences: dict[int, Sequence] = {}
        self._outbox: dict[int, list[Delta]] = {}
        self._errors: dict[int, DataError] = {}
        """Of requests that could not be answered to their end."""

    @classmethod
    def from_pretrained(
        cls, model: str | Path, dtype: Dtype = "auto", *, max_num_seqs: int = 64
    ) -> "Engine":
        """The engine for a shipped model's name or a folder.

        In bfloat16 a likeliest token that is nearly a tie may depend on who shares the batch.
        """
        loaded = load_model(model, inference_dtype() if dtype == "auto" else getattr(torch, dtype))
        return cls(loaded, load_processor(model), max_num_seqs=max_num_seqs)

    def generate(self, requests: Many[Request]) -> list[Completion]:
        """Answer all `requests`, in their order.

        Raises:
            DataError: one of them cannot be answered; then none is.
        """
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self.add(request))
            completions: dict[int, Completion] = {}
            while len(completions) < len(ids):
                self.step()
                for number in ids:
                    for delta in self.take(number):
                        if delta.completion is not None:
                            completions[number] = delta.completion
            return [completions[number] for number in ids]
        finally:
            for number in ids:
                self.cancel(number)

    def stream(self, request: Request) -> Iterator[Delta]:
        """The answer as it comes; the last delta holds the completion. To close it is to cancel.

        Raises:
            DataError: it cannot be answered.
        """
        number = self.add(request, is_streamed=True)
        try:
            while True:
                self.step()
                for delta in self.take(number):
                    yield delta
                    if delta.completion is not None:
                        return
        finally:
            self.cancel(number)

    def add(
        self, request: Request, is_streamed: bool = False, grammar: Grammar | None = None
    ) -> int:
        """Let a request wait for its turn; returns its number.

        Args:
            is_streamed: `take` is to hand out the text as it comes, not only the completion.
            grammar: of its `structured_outputs`, fresh from `grammars.compile`; None: compiled
                here, if it has some.

        Raises:
            DataError: images and `<image>`s do not match, it can never fit the cache, names tokens
                that are not there, or its `structured_outputs` cannot be compiled.
        """
        self._check_tokens(request)
        images = request.images
        tiles = images if isinstance(images, Tiles) else make_tiles(images, self.processor)
        prompt = self._encode(request, tiles)
        if grammar is None and request.structured_outputs is not None:
            grammar = self.grammars.compile(request.structured_outputs)
        number = next(self._ids)
        sequence = Sequence(
            id=number,
            request=request,
            prompt=prompt,
            tiles=tiles,
            sampler=Sampler(request, prompt, self.end_token_ids),
            text=AnswerText(self.tokens, request.stop),
            is_streamed=is_streamed,
            grammar=grammar,
        )
        if sequence.max_length > self.max_model_len:
            raise DataError(
                f"prompt of {len(prompt)} tokens and max_new_tokens={request.max_new_tokens} exceed"
                f" max_model_len={self.max_model_len}; shorten the one or lower the other"
            )
        self._sequences[number] = sequence
        self._outbox[number] = []
        self.scheduler.add(sequence)
        return number

    def _check_tokens(self, request: Request) -> None:
        """
        Raises:
            DataError: an id is not one of the model's tokens, or one that only an image is.
        """
        for name, tokens in (
            ("prompt", () if isinstance(request.prompt, str | None) else request.prompt),
            ("logit_bias", request.logit_bias),
            ("stop_token_ids", request.stop_token_ids),
        ):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise DataError(
                        f"{name} must hold ids of tokens, from 0 to {self.vocab_size - 1}, not"
                        f" {token}"
                    )

    def _encode(self, request: Request, tiles: Tiles) -> list[int]:
        """
        Raises:
            DataError: a prompt without a token, or with an image's, or images that do not match.
        """
        if request.prompt is None:
            return encode_prompt(request.messages, tiles.counts, self.processor)
        is_text = isinstance(request.prompt, str)
        tokens = self.processor.tokenizer.encode(request.prompt) if is_text else request.prompt
        if not tokens or self.processor.image_token_id in tokens:
            raise DataError(
                f"prompt must hold at least one token, and no {self.processor.image_token}; show"
                " images in messages"
            )
        return list(tokens)

    def take(self, number: int) -> list[Delta]:
        """What is new of a request since the last call; behind its completion, nothing ever.

        Raises:
            DataError: it cannot be answered to its end; behind that, nothing either.
        """
        if error := self._errors.pop(number, None):
            del self._outbox[number]
            raise error
        deltas = self._outbox.get(number, [])
        if deltas and deltas[-1].completion is not None:
            del self._outbox[number]
        elif deltas:
            self._outbox[number] = []
        return deltas

    def cancel(self, number: int) -> None:
        """Forget a request; nothing happens where it is finished or was never added."""
        self._outbox.pop(number, None)
        self._errors.pop(number, None)
        sequence = self._sequences.pop(number, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    @property
    def is_idle(self) -> bool:
        """No request waits or is being answered."""
        return self.scheduler.is_idle

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self.scheduler.decoding) + len(self.scheduler.prefilling)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self.scheduler.waiting)

    def step(self) -> None:
        """Prefill a piece of what waits, or decode a token for the others: in turn, if both can be.

        One thing a step, so that whoever has a new token gets it at once.
        """
        self.num_steps += 1
        is_turn_to_decode = self._has_prefilled and bool(self.scheduler.decoding)
        self._has_prefilled = not is_turn_to_decode and self._prefill_next()
        if not self._has_prefilled and self.scheduler.decoding:
            self._decode(self.scheduler.decoding)

    def _prefill_next(self) -> bool:
        """Admit a group if none is being prefilled, and prefill a piece; False where none waits."""
        if admitted := self.scheduler.admit():
            self._embed(admitted)
        if self.scheduler.prefilling:
            self._prefill(self.scheduler.prefilling)
            return True
        return False

    def _embed(self, group: list[Sequence]) -> None:
        """The embeddings of the prompts of `group`, all their images encoded together."""
        admitted_s = time.perf_counter()
        images = [image for sequence in group for image in _images(sequence.tiles)]
        features = iter(self.image_features(images) if images else [])
        for sequence in group:
            sequence.admitted_s = admitted_s
            own = list(itertools.islice(features, len(sequence.tiles.counts)))
            visual_tokens = torch.cat(own) if own else None
            sequence.embeddings = self.runner.embed(sequence.prompt, visual_tokens)

    def _prefill(self, group: list[Sequence]) -> None:
        """The next piece of the prompts of `group`, which are of the same length."""
        start = group[0].num_cached
        end = start + max(self.scheduler.max_prefill_tokens // len(group), 1)
        pieces = torch.stack([sequence.embeddings[start:end] for sequence in group])
        logits = self.runner.prefill(pieces, len(self.scheduler.decoding), start)
        for sequence in group:
            sequence.num_cached += pieces.shape[1]
        if group[0].is_prefilled:
            for sequence in group:
                sequence.embeddings = torch.empty(0)  # a slice would keep all of it
            self.scheduler.start_decoding()
            self._append(group, logits)

    def _decode(self, sequences: list[Sequence]) -> None:
        logits = self.runner.decode(
            [sequence.token_ids[-1] for sequence in sequences],
            [sequence.num_cached for sequence in sequences],
        )
        self.num_decode_steps += 1
        self.num_decoded_tokens += len(sequences)
        for sequence in sequences:
            sequence.num_cached += 1
        self._append(list(sequences), logits)

    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Choose each one's next token; the finished ones leave."""
        choices = self._admit(sequences, logits)
        best, likeliest = choices.max(-1)
        tokens = zip(best.tolist(), likeliest.tolist(), strict=True)
        for sequence, row, choice, (value, token) in zip(
            sequences, logits, choices, tokens, strict=True
        ):
            try:
                self._go_on(sequence, row, choice, None if value == -math.inf else token)
            except DataError as error:
                self._errors[sequence.id] = error
                self._remove(sequence)

    def _admit(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits, -inf where a sequence's grammar admits no such token."""
        grammars = {
            place: sequence.grammar
            for place, sequence in enumerate(sequences)
            if sequence.grammar is not None
        }
        if not grammars:
            return logits
        is_out = self.grammars.left_out(list(grammars.values()))
        for row, place in enumerate(grammars):
            if sequences[place].request.ignore_eos:
                is_out[row, self.end_token_ids] = True  # behind one, nothing is admitted
        choices = logits.clone()  # what they were is asked for by `logprobs`
        places = list(grammars)
        choices[places] = logits[places].masked_fill(
            torch.from_numpy(is_out).to(logits.device), -torch.inf
        )
        return choices

    def _go_on(
        self, sequence: Sequence, logits: torch.Tensor, choice: torch.Tensor, token: int | None
    ) -> None:
        """
        Args:
            choice: the (vocabulary,) logits, as its grammar leaves them.
            token: the likeliest; None where there is none.

        Raises:
            DataError: what its grammar admits has become too much to tell.
        """
        if sequence.grammar is not None:
            sequence.grammar.check()
        if not sequence.sampler.is_plain:
            token = sequence.sampler.choose(choice, len(sequence.token_ids))
        num_before = len(sequence.logprobs)
        sequence.finish_reason = self._take_token(sequence, token, logits)
        logprobs = sequence.logprobs[-1] if len(sequence.logprobs) > num_before else None
        sequence.first_token_s = sequence.first_token_s or time.perf_counter()
        if sequence.finish_reason is not None:
            sequence.text.close()
            text = sequence.text.take()
            completion = sequence.complete()
            self._outbox[sequence.id].append(
                Delta(text=text, logprobs=logprobs, completion=completion)
            )
            self._remove(sequence)
        elif sequence.is_streamed:
            text = sequence.text.take()
            self._outbox[sequence.id].append(Delta(text=text, logprobs=logprobs))

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id]
        self.scheduler.remove(sequence)

    def _take_token(
        self, sequence: Sequence, token: int | None, logits: torch.Tensor
    ) -> FinishReason | None:
        """Add a token to the answer; returns why that ends it, if it does."""
        request = sequence.request
        if token is None or token in request.stop_token_ids:
            return "stop"
        if token in self.end_token_ids and not request.ignore_eos:
            return "stop"
        sequence.token_ids.append(token)
        if request.logprobs is not None:
            sequence.logprobs.append(token_logprobs(logits, token, request.logprobs))
        if sequence.text.add(token):
            return "stop"
        if sequence.grammar is not None:
            sequence.grammar.add(token)
            if sequence.grammar.is_over:
                return "stop"
        return "length" if len(sequence.token_ids) == request.max_new_tokens else None


def end_tokens(model: FlashVLForConditionalGeneration, processor: FlashVLProcessor) -> list[int]:
    """Those that end an answer, by the model's `generation_config`, or else its tokenizer."""
    tokens = model.generation_config.eos_token_id
    if tokens is None:
        tokens = processor.tokenizer.eos_token_id
    return [tokens] if isinstance(tokens, int) else list(tokens)


def longest_conversation(config: FlashVLConfig, max_model_len: int = MAX_LENGTH) -> int:
    """Tokens of a prompt and its answer, at most, that an engine takes."""
    return min(max_model_len, config.text_config.max_position_embeddings)


def _images(tiles: Tiles) -> list[npt.NDArray[np.uint8]]:
    """The tiles of each image."""
    return np.split(tiles.pixels, np.cumsum(tiles.counts)[:-1]) if tiles.counts else []


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
