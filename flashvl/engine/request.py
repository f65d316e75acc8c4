"""Requests that the engine takes, and the answers that it gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from PIL import Image

from flashvl.data.features import Message, Tiles
from flashvl.errors import DataError

FinishReason = Literal["stop", "length"]
"""What ended an answer: the model or a stop string (`stop`), or `max_new_tokens` (`length`)."""


MAX_LOGIT_BIAS = 100.0
"""Bound of `logit_bias` in OpenAI's API."""
MAX_PENALTY = 2.0
"""Bound of the presence and frequency penalties in OpenAI's API."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputs:
    """The form that an answer must have; exactly one field is set. The names are vLLM's."""

    json: str | None = None
    """JSON schema, as text. The answer is JSON that satisfies it, written as by `json.dumps`."""
    json_object: bool = False
    """Whether the answer is a JSON object of any content, written as by `json.dumps`."""
    regex: str | None = None
    """Pattern of the whole answer, in the syntax of Rust's `regex`, without lookaround."""
    choice: Sequence[str] | None = None
    """Texts of which the answer is one."""
    grammar: str | None = None
    """Context-free grammar of the answer, in Lark's syntax or in GBNF."""

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
    """The conversation: `role` and `content` each. An `<image>` in a content marks an image."""
    prompt: str | Sequence[int] | None = None
    """Text or token ids to continue without a chat template, instead of `messages`. Control tokens
    in the text count as control tokens. Token ids from `features.encode_prompt` hold the places of
    `images`; other prompts have no images."""
    images: Sequence[Image.Image] | Tiles = field(default=())
    """RGB images in the order of the `<image>`s, or their tiles from `features.make_tiles`."""
    max_new_tokens: int = 128
    """Tokens of the answer at most."""
    min_new_tokens: int = 0
    """Tokens before which the answer does not end."""
    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 chooses the likeliest token each time."""
    top_k: int = 0
    """Number of the likeliest tokens that may be sampled; 0: all."""
    top_p: float = 1.0
    """Total probability of the likeliest tokens, which alone may be sampled; 1: all tokens."""
    repetition_penalty: float = 1.0
    """Divisor of positive logits, and factor of negative ones, for tokens of prompt and answer."""
    min_p: float = 0.0
    """Least probability of a token that may be sampled, as a share of the likeliest token's."""
    presence_penalty: float = 0.0
    """Amount subtracted from the logits of tokens that the answer already holds."""
    frequency_penalty: float = 0.0
    """Amount subtracted from a token's logit for each time that the answer already holds it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Amounts added to the logits of these tokens."""
    seed: int = 0
    """Random seed for sampling; other requests in the batch do not change the answer."""
    priority: int = 0
    """Class of the request: its prompt is read after those of all requests with a lower number.
    Above 0, it is read in small pieces, between which requests of lower numbers go first."""
    stop: Sequence[str] = ()
    """Texts that end the answer, which does not include them. The first to be complete counts; of
    several completed by the same character, the longest."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, which does not include them, even with `ignore_eos`."""
    ignore_eos: bool = False
    """Whether the answer continues after the end token, up to `max_new_tokens`."""
    structured_outputs: StructuredOutputs | None = None
    """Form of the answer, which ends when its form is complete, even before `min_new_tokens` and
    with `ignore_eos`. `max_new_tokens` or `stop` may end it earlier, and so incomplete."""
    logprobs: int | None = None
    """Number of likeliest tokens whose log-probabilities are reported at each place of the answer,
    besides the chosen token's; None reports nothing."""

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "at least 0"),
            # Below 0.001 the divided logits overflow.
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
        """Number of `images`."""
        return len(self.images.counts if isinstance(self.images, Tiles) else self.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one place of an answer, by the model's own distribution.

    Temperature, penalties, biases and grammars do not change them. The image's placeholder has no
    part in the distribution.
    """

    token_id: int
    """The chosen token."""
    logprob: float
    """Its log-probability."""
    top: dict[int, float]
    """Log-probabilities of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Times of one answer, in seconds since the engine was given the request."""

    queue_s: float
    """When the request's prefill began."""
    first_token_s: float
    """When the first token was chosen."""
    last_token_s: float
    """When the answer was complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The answer to one request."""

    text: str
    token_ids: list[int]
    """Tokens of the answer, without the end token, unless `ignore_eos` was set."""
    prompt_tokens: int
    """Number of tokens of the prompt, image tokens included."""
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None
    """Log-probabilities for each of `token_ids`, if the request asked for them."""
    end: TokenLogprobs | None = None
    """The end token, or the one of `stop_token_ids`, that ended the answer, if the request asked
    for log-probabilities; None where something else has ended it."""
    timing: Timing = field(compare=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one token has added to an answer."""

    text: str
    """New text; empty while the token is part of a character, or may be part of a stop string."""
    logprobs: TokenLogprobs | None = None
    """The token's log-probabilities, if the request asked for them; the end token has none."""
    completion: Completion | None = None
    """The whole answer, in its last delta."""
