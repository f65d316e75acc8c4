"""Generation: requests in, completions out. Knows no Ray, no HTTP, no Parquet.

Continuous batching: between two decoding steps new requests are admitted, and finished or cancelled
ones removed. Steps alternate: a piece of a prefill, if any waits, then one token for each sequence
that decodes.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from flashvl.config import Dtype
from flashvl.data.features import Tiles, ask_about_image, encode_prompt, make_tiles
from flashvl.engine.cache import KVCache, bytes_per_token
from flashvl.engine.grammars import Grammar, Grammars
from flashvl.engine.images import ImageFeatures
from flashvl.engine.prompts import Prompts, SharedPrompt
from flashvl.engine.request import Completion, Delta, FinishReason, Request, TokenLogprobs
from flashvl.engine.runner import MAX_RECORDED_TOKENS, Runner
from flashvl.engine.sampling import Sampler, choose_tokens, token_logprobs
from flashvl.engine.scheduler import Scheduler
from flashvl.engine.sequence import AnswerText, Sequence
from flashvl.engine.tokens import TokenTable
from flashvl.errors import DataError
from flashvl.model import FlashVLConfig, FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import inference_dtype, load_model, load_processor

MAX_LENGTH = 4096
"""Tokens of a conversation: an ISS image of 2,880, a long question and a long answer."""
CACHE_SHARE = 0.25
"""Share of the free memory that the cache takes."""
MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": MAX_RECORDED_TOKENS}
"""Prompt tokens in one step. A GPU reads an image of the ISS preset in one, without a mask."""
SMALL_PREFILL_TOKENS = {"cpu": 128, "cuda": 512}
"""Prompt tokens in one step of requests whose `priority` is above 0, for one of which a request
that comes meanwhile waits. Fewer would let a CPU read the weights too often; a GPU reads a prompt
of the static preset at once, by a recorded graph."""
IMAGE_CACHE_BYTES = 256 * 2**20
"""Bytes of visual tokens that are kept: those of 300 images of the static preset."""


class Engine:
    """Answers requests with one model, on a GPU if there is one; to be used by one thread.

    `add` gives a request its number; `step` prefills a piece of a prompt, or decodes one token of
    each answer; `take` returns what is new of an answer. `generate` and `stream` call all three.
    """

    def __init__(
        self,
        model: FlashVLForConditionalGeneration,
        processor: FlashVLProcessor,
        *,
        max_num_seqs: int = 64,
        max_model_len: int = MAX_LENGTH,
        max_prefill_tokens: int | None = None,
        is_trained: bool = False,
    ):
        """
        Args:
            max_num_seqs: requests answered at once, at most; fewer if memory has no room for as
                many of their lengths in the cache.
            max_model_len: tokens of a prompt and its answer, at most; the model's own limit holds
                as well.
            max_prefill_tokens: prompt tokens in one step, at most, so that long prompts do not keep
                other requests waiting; by default `MAX_PREFILL_TOKENS`.
            is_trained: whether the model is being trained meanwhile. Then no weight is copied into
                a faster layout, so that each update counts at once, adapters included; and the
                model is set up for generation, and memory taken for the cache, only within
                `borrow_model`.
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
        self.is_trained, self._is_borrowing = is_trained, False
        if is_trained:
            cache.release()
        self.runner = Runner(self.model, processor, cache, is_trained)
        # A step with a shared prompt is not recorded: each would lose more than one prefill saves.
        self.scheduler = Scheduler(
            cache,
            max_prefill_tokens or MAX_PREFILL_TOKENS[self.device.type],
            shares_prompts=self.runner.graphs is None,
            small_prefill_tokens=SMALL_PREFILL_TOKENS[self.device.type],
        )
        self.image_features = ImageFeatures(self.runner.encode_tiles, IMAGE_CACHE_BYTES)
        self.num_steps = 0
        """Steps so far; if the count stands still while requests wait, the engine hangs."""
        self.num_decode_steps = self.num_decoded_tokens = 0
        """Counts so far; their quotient is the mean number of requests that a step served."""
        self.num_prefilled_tokens = 0
        """Prompt tokens so far that the model has read; shared prompts count once."""
        self._has_prefilled = False
        """Whether the last step was a prefill; the next one then decodes."""
        self._ids = itertools.count()
        self._prompts = Prompts()
        self._sequences: dict[int, Sequence] = {}
        self._outbox: dict[int, list[Delta]] = {}
        self._errors: dict[int, DataError] = {}
        """Errors that ended requests, by the requests' numbers, until `take` raises them."""
        if self.runner.graphs is not None:
            self._warm_up()

    @classmethod
    def from_pretrained(
        cls, model: str | Path, dtype: Dtype = "auto", *, max_num_seqs: int = 64
    ) -> "Engine":
        """The engine of a model, given as a shipped name or a folder.

        In bfloat16, which of two nearly equal tokens is likeliest may depend on the other requests
        in the batch.
        """
        loaded = load_model(model, inference_dtype() if dtype == "auto" else getattr(torch, dtype))
        return cls(loaded, load_processor(model), max_num_seqs=max_num_seqs)

    def _warm_up(self) -> None:
        """Answer one request and then two: a GPU compiles what they need for ten seconds."""
        picture = Image.new("RGB", (64, 64))
        for count in (1, 2):
            requests = [
                Request(messages=ask_about_image(question), images=[picture], max_new_tokens=8)
                for question in ("What?", "Where?")[:count]
            ]
            self.generate(requests)
        self.image_features.clear()

    def generate(self, requests: Many[Request]) -> list[Completion]:
        """Answer all `requests`, in their order; borrows a model that is being trained.

        Raises:
            DataError: one of them cannot be answered; all are cancelled.
        """
        if self.is_trained and not self._is_borrowing:
            with self.borrow_model():
                return self._generate(requests)
        return self._generate(requests)

    @contextlib.contextmanager
    def borrow_model(self) -> Iterator[None]:
        """Set up a model that is being trained for `step`, and put it back as it was at the end.

        Its attention is replaced meanwhile, and no module is in training mode. At the end requests
        that are not answered are cancelled, the memory of the cache is given back, and images are
        forgotten, as the weights will change.
        """
        self.runner.cache.allocate()
        self._is_borrowing = True
        try:
            with self.runner.borrow_model():
                yield
        finally:
            self._is_borrowing = False
            for number in list(self._sequences):
                self.cancel(number)
            self.image_features.clear()
            self.runner.cache.release()

    def _generate(self, requests: Many[Request]) -> list[Completion]:
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
        """The answer as it grows; the last delta holds the completion. `close` cancels the rest.

        Raises:
            DataError: the request cannot be answered.
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
        """Put a request into the queue; returns its number.

        Args:
            is_streamed: whether `take` returns the text as it grows, not only the completion.
            grammar: what `grammars.compile` made of the request's `structured_outputs`, not used
                before; None: they are compiled here, if there are any.

        Raises:
            DataError: the numbers of images and `<image>`s differ, the request is too long, holds
                unknown token ids, or its `structured_outputs` cannot be compiled.
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
            prompt=self._prompts.make(prompt, tiles),
            sampler=Sampler(request, prompt, self.end_token_ids),
            text=AnswerText(self.tokens, request.stop),
            is_streamed=is_streamed,
            grammar=grammar,
        )
        if sequence.max_length > self.max_model_len:
            raise DataError(
                f"prompt of {len(prompt)} tokens and max_new_tokens={request.max_new_tokens} exceed"
                f" max_model_len={self.max_model_len}; shorten the prompt or lower max_new_tokens"
            )
        self._sequences[number] = sequence
        self._outbox[number] = []
        self.scheduler.add(sequence)
        return number

    def _check_tokens(self, request: Request) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        for name, tokens in (
            ("prompt", () if isinstance(request.prompt, str | None) else request.prompt),
            ("logit_bias", request.logit_bias),
            ("stop_token_ids", request.stop_token_ids),
        ):
            for token in tokens:
                if not 0 <= token < self.vocab_size:
                    raise DataError(
                        f"{name} must hold token ids from 0 to {self.vocab_size - 1}, not {token}"
                    )

    def _encode(self, request: Request, tiles: Tiles) -> list[int]:
        """Token ids of the request's messages or prompt.

        Raises:
            DataError: the prompt has no token, or image tokens other than those of the images; or
                the numbers of images and `<image>`s differ.
        """
        if request.prompt is None:
            return encode_prompt(request.messages, tiles.counts, self.processor)
        processor = self.processor
        is_text = isinstance(request.prompt, str)
        tokens = list(processor.tokenizer.encode(request.prompt) if is_text else request.prompt)
        num_places = tokens.count(processor.image_token_id)
        num_visual_tokens = sum(tiles.counts) * processor.image_seq_length
        if tiles.counts and num_places != num_visual_tokens:
            raise DataError(
                f"prompt has {num_places} {processor.image_token}, but its images make"
                f" {num_visual_tokens} tokens; encode it for these images"
            )
        if not tokens or num_places != num_visual_tokens:
            raise DataError(
                f"prompt must hold at least one token, and no {processor.image_token}; show"
                " images in messages"
            )
        return tokens

    def take(self, number: int) -> list[Delta]:
        """What is new of an answer since the last call; nothing after its completion or its error.

        Raises:
            DataError: the answer cannot be continued.
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
        """Drop a request; one that is finished or was never added is ignored."""
        self._outbox.pop(number, None)
        self._errors.pop(number, None)
        sequence = self._sequences.pop(number, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or is being answered."""
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
        """Prefill a piece of the waiting prompts, or decode a token of each answer, alternately.

        A step does only one of the two, so that new tokens are handed out at once. Answers pause
        while a prompt of a lower `priority` than all of theirs is read.
        """
        self.num_steps += 1
        is_turn_to_decode = self._has_prefilled and self.scheduler.is_decoding_first
        self._has_prefilled = not is_turn_to_decode and self._prefill_next()
        if not self._has_prefilled and self.scheduler.decoding:
            self._decode(self.scheduler.decoding)

    def _prefill_next(self) -> bool:
        """Prefill a piece of some prompts, admitting them first if needed; False if none waits."""
        if admitted := self.scheduler.admit():
            has_embedded = self._embed(admitted)
            if has_embedded and admitted[0].request.priority > 0:
                return True  # a request that has come meanwhile need not wait for the prefill
        group = self.scheduler.prefilling
        if not group:
            return False
        shared = group[0].shared
        size = self.scheduler.prefill_tokens(group[0])
        logits = (
            self._prefill(group, size) if shared is None else self._prefill_shared(shared, size)
        )
        if logits is not None:
            self.scheduler.start_decoding()
            self._append(group, logits.expand(len(group), -1))
        return True

    def _embed(self, group: list[Sequence]) -> bool:
        """Make the embeddings of the prompts of `group`, encoding all their images together.

        Returns:
            whether any were made: those of sequences that were set aside are there.
        """
        admitted_s = time.perf_counter()
        for sequence in group:
            sequence.admitted_s = sequence.admitted_s or admitted_s
        shared = group[0].shared
        if shared is None:
            new = [sequence for sequence in group if not len(sequence.embeddings)]
            for sequence, embeddings in zip(new, self._embed_prompts(new), strict=True):
                sequence.embeddings = embeddings
            return bool(new)
        if shared.num_cached or len(shared.embeddings):
            return False
        (shared.embeddings,) = self._embed_prompts(group[:1])
        return True

    def _embed_prompts(self, group: list[Sequence]) -> list[torch.Tensor]:
        prompts = [sequence.prompt for sequence in group]
        images = [image for prompt in prompts for image in _images(prompt.tiles)]
        # A job shows each image once; kept, they would push out those of conversations.
        keep = all(sequence.request.priority <= 0 for sequence in group)
        features = iter(self.image_features(images, keep) if images else [])
        embedded = []
        for prompt in prompts:
            own = list(itertools.islice(features, len(prompt.tiles.counts)))
            visual_tokens = torch.cat(own) if own else None
            embedded.append(self.runner.embed(prompt.token_ids, visual_tokens))
        return embedded

    def _prefill(self, group: list[Sequence], size: int) -> torch.Tensor | None:
        """Prefill the next `size` tokens of the prompts of `group`, which all have the same length.

        Returns:
            (rows, vocabulary): logits of the first tokens of the answers; None before the end.
        """
        start = group[0].num_cached
        end = start + max(size // len(group), 1)
        pieces = torch.stack([sequence.embeddings[start:end] for sequence in group])
        logits = self.runner.prefill(pieces, len(self.scheduler.decoding), start)
        self.num_prefilled_tokens += pieces.shape[0] * pieces.shape[1]
        for sequence in group:
            sequence.num_cached += pieces.shape[1]
        if group[0].num_cached < len(group[0].prompt):
            return None
        for sequence in group:
            sequence.embeddings = torch.empty(0)  # a slice would keep all of it
        return logits

    def _prefill_shared(self, shared: SharedPrompt, size: int) -> torch.Tensor | None:
        """Prefill the next `size` tokens of a prompt that is shared, if there are some.

        Returns:
            (vocabulary,): logits of the first token of each answer; None before the end.
        """
        if not shared.is_prefilled:
            start = shared.num_cached
            piece = shared.embeddings[start : start + size]
            logits = self.runner.prefill(piece[None], 0, start, shared.held)
            self.num_prefilled_tokens += len(piece)
            shared.num_cached += len(piece)
            if not shared.is_prefilled:
                return None
            shared.logits, shared.embeddings = logits[0], torch.empty(0)
        return shared.logits

    def _decode(self, sequences: list[Sequence]) -> None:
        logits = self.runner.decode(
            [sequence.token_ids[-1] for sequence in sequences],
            [sequence.num_cached for sequence in sequences],
            [sequence.shared.held if sequence.shared else None for sequence in sequences],
        )
        self.num_decode_steps += 1
        self.num_decoded_tokens += len(sequences)
        for sequence in sequences:
            sequence.num_cached += 1
        self._append(list(sequences), logits)

    def _append(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """Choose the next token of each sequence, and remove the finished ones."""
        tokens = choose_tokens(
            [sequence.sampler for sequence in sequences],
            self._admit(sequences, logits),
            [len(sequence.token_ids) for sequence in sequences],
        )
        logprobs = _logprobs(sequences, logits, tokens)
        for sequence, token, told in zip(sequences, tokens, logprobs, strict=True):
            try:
                self._take_token(sequence, token, told)
            except DataError as error:
                self._errors[sequence.id] = error
                self._remove(sequence)

    def _admit(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits, -inf for tokens that a sequence's grammar does not admit."""
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
                is_out[row, self.end_token_ids] = True  # a grammar admits nothing after them
        choices = logits.clone()  # `logprobs` reports the unmasked ones
        places = list(grammars)
        choices[places] = logits[places].masked_fill(
            torch.from_numpy(is_out).to(logits.device), -torch.inf
        )
        return choices

    def _take_token(
        self, sequence: Sequence, token: int | None, logprobs: TokenLogprobs | None
    ) -> None:
        """Add a token to an answer, and hand out what it adds to the text.

        Args:
            token: None if no token is admitted.
            logprobs: those of the token, if the request asked for them.

        Raises:
            DataError: the grammar has become too complex.
        """
        if sequence.grammar is not None:
            sequence.grammar.check()
        num_before = len(sequence.token_ids)
        sequence.finish_reason = self._add_token(sequence, token, logprobs)
        told = logprobs if len(sequence.token_ids) > num_before else None
        sequence.first_token_s = sequence.first_token_s or time.perf_counter()
        if sequence.finish_reason is not None:
            sequence.text.close()
            text = sequence.text.take()
            completion = sequence.complete()
            self._outbox[sequence.id].append(Delta(text=text, logprobs=told, completion=completion))
            self._remove(sequence)
        elif sequence.is_streamed:
            text = sequence.text.take()
            self._outbox[sequence.id].append(Delta(text=text, logprobs=told))

    def _remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id]
        self.scheduler.remove(sequence)

    def _add_token(
        self, sequence: Sequence, token: int | None, logprobs: TokenLogprobs | None
    ) -> FinishReason | None:
        """Add a token to the answer; returns the reason if the answer ends with it."""
        request = sequence.request
        is_end = token in self.end_token_ids and not request.ignore_eos
        if token is None or is_end or token in request.stop_token_ids:
            sequence.end = logprobs
            return "stop"
        sequence.token_ids.append(token)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        if sequence.text.add(token):
            return "stop"
        if sequence.grammar is not None:
            sequence.grammar.add(token)
            if sequence.grammar.is_over:
                return "stop"
        return "length" if len(sequence.token_ids) == request.max_new_tokens else None


def _logprobs(
    sequences: Many[Sequence], logits: torch.Tensor, tokens: Many[int | None]
) -> list[TokenLogprobs | None]:
    """The log-probabilities of the tokens of those sequences that ask for them."""
    asked = {
        row: (token, sequence.request.logprobs)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True))
        if token is not None and sequence.request.logprobs is not None
    }
    if not asked:
        return [None] * len(sequences)
    part = logits if len(asked) == len(sequences) else logits[list(asked)]
    told = token_logprobs(part, *zip(*asked.values(), strict=True))
    by_row = dict(zip(asked, told, strict=True))
    return [by_row.get(row) for row in range(len(sequences))]


def end_tokens(model: FlashVLForConditionalGeneration, processor: FlashVLProcessor) -> list[int]:
    """Tokens that end an answer: those of the model's `generation_config`, else its tokenizer's."""
    tokens = model.generation_config.eos_token_id
    if tokens is None:
        tokens = processor.tokenizer.eos_token_id
    return [tokens] if isinstance(tokens, int) else list(tokens)


def longest_conversation(config: FlashVLConfig, max_model_len: int = MAX_LENGTH) -> int:
    """Tokens that a prompt and its answer may have together in an engine."""
    return min(max_model_len, config.text_config.max_position_embeddings)


def _images(tiles: Tiles) -> list[npt.NDArray[np.uint8]]:
    """The tiles of each image."""
    return np.split(tiles.pixels, np.cumsum(tiles.counts)[:-1]) if tiles.counts else []


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
