"""What goes into the engine and what comes out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from PIL import Image

from flashvl.data.features import Message, Tiles
from flashvl.errors import DataError

FinishReason = Literal["stop", "length"]
"""The model ended its answer (or said a stop string), or `max_new_tokens` did."""


MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
"""OpenAI's bounds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """What an answer must look like, in exactly one way; the names are vLLM's."""

    json: str | None = None
    """A JSON schema, as text. The answer is written as `json.dumps` would write it."""
    json_object: bool = False
    """Any JSON object, written likewise."""
    regex: str | None = None
    """The whole answer matches it; syntax of Rust's `regex`, without lookaround."""
    choice: Sequence[str] | None = None
    """The answer is one of these."""
    grammar: str | None = None
    """A context-free grammar, in Lark's syntax or in GBNF."""

    def __post_init__(self) -> None:
        names = [each.name for each in fields(self)]
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise DataError(
                "structured_outputs must have exactly one of json, json_object, regex, choice and"
                f" grammar, not {' and '.join(given) or 'none'}"
            )
        if self.choice is not None and not self.choice:
            raise DataError("structured_outputs.choice must hold at least one text, not none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One conversation to continue; the sampling parameters have vLLM's names and meanings."""

    messages: Sequence[Message] = ()
    """`role` and `content`; an `<image>` in a content stands for the next image."""
    prompt: str | Sequence[int] | None = None
    """Text or token ids to continue as they are, without a chat template, in place of `messages`.
    Control tokens in the text are control tokens. The token ids of `features.encode_prompt` hold
    the places of `images`; other prompts have no images."""
    images: Sequence[Image.Image] | Tiles = field(default=())
    """RGB images, or the tiles that `features.make_tiles` made of them."""
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    """The answer does not end before."""
    temperature: float = 0.0
    """0: greedy, the likeliest token each time. Else the logits are divided by it."""
    top_k: int = 0
    """Only the likeliest so many tokens may be sampled; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability may be sampled."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stood before are divided by it, or multiplied if negative."""
    min_p: float = 0.0
    """Only tokens at least so many times as likely as the likeliest may be sampled."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer holds already."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens once for every time that the answer holds them already."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    seed: int = 0
    """Of this request's own random numbers: the same answer whoever shares its batch."""
    stop: Sequence[str] = ()
    """The answer ends before the one of these that is complete first; of several that are complete
    with the same character, the longest."""
    stop_token_ids: Sequence[int] = ()
    """The answer ends before any of these tokens, whatever `ignore_eos` says."""
    ignore_eos: bool = False
    """Go on behind the end token, up to `max_new_tokens`."""
    structured_outputs: StructuredOutputs | None = None
    """The answer ends where nothing can follow, whatever `min_new_tokens` and `ignore_eos` say; one
    that `max_new_tokens` or `stop` ends before may be incomplete."""
    logprobs: int | None = None
    """Of every new token report its log-probability, and those of so many likeliest ones."""

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            # Below it the logits' quotients overflow.
            (
                "temperature",
                self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
                "0, or between 0.001 and 1000",
            ),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                1e-3 <= self.repetition_penalty <= 1e3,
                "between 0.001 and 1000",
            ),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", abs(self.presence_penalty) <= MAX_PENALTY, "between -2 and 2"),
            ("frequency_penalty", abs(self.frequency_penalty) <= MAX_PENALTY, "between -2 and 2"),
            (
                "logit_bias",
                all(abs(bias) <= MAX_LOGIT_BIAS for bias in self.logit_bias.values()),
                "token ids with biases between -100 and 100",
            ),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None"),
            ("stop", all(self.stop), "without empty strings"),
        ):
            if not holds:
                raise DataError(f"{name} ({getattr(self, name)}) must be {rule}")
        has_others = self.messages or (isinstance(self.prompt, str) and self.num_images)
        if self.prompt is not None and has_others:
            raise DataError("prompt must stand alone; leave out messages and images, or prompt")

    @property
    def num_images(self) -> int:
        return len(self.images.counts if isinstance(self.images, Tiles) else self.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place of an answer, by the model's own distribution.

    That is before anything which a request asks for; an image's placeholder has no part in it.
    """

    token_id: int
    """That was chosen."""
    logprob: float
    """Of it."""
    top: dict[int, float]
    """Of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Of one answer, in seconds since the engine was given the request."""

    queue_s: float
    """Until its turn came."""
    first_token_s: float
    last_token_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The answer to one request; `token_ids` without the end token."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `token_ids`, if the request asked for them."""
    timing: Timing = field(compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one token added to an answer."""

    text: str
    """Empty while the token is a part of a character, or may be one of a stop string."""
    logprobs: TokenLogprobs | None = None
    """Of that token, if the request asked for them; the end token has none."""
    completion: Completion | None = None
    """The whole answer, with its last delta."""
