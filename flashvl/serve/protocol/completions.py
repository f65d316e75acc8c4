"""Requests and answers of `/v1/completions`, OpenAI's older endpoint, which continues texts."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag

from flashvl.engine.request import FinishReason
from flashvl.serve.protocol.answers import Timings, Usage, new_id, now
from flashvl.serve.protocol.parts import Answer, Only, Text, TokenId
from flashvl.serve.protocol.sampling import CompletionOptions, Lacking, Sampling

MAX_PROMPTS = 64
"""Prompts in one request at most."""
MAX_PROMPT_TOKENS = 100_000
"""Token ids of a prompt at most, before the model's own limit, which is far lower, is checked."""


def _form(prompt: Any) -> str:
    """The tag of the form that a client means, so that an error is about that form."""
    if not isinstance(prompt, list):
        return "[text]"
    first = prompt[0] if prompt else ""
    if isinstance(first, list):
        return "[lists of tokens]"
    return "[texts]" if isinstance(first, str) else "[tokens]"


Tokens = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
Several = Field(min_length=1, max_length=MAX_PROMPTS)
Prompt = Annotated[
    Annotated[Text, Tag("[text]")]
    | Annotated[Annotated[list[Text], Several], Tag("[texts]")]
    | Annotated[Tokens, Tag("[tokens]")]
    | Annotated[Annotated[list[Tokens], Several], Tag("[lists of tokens]")],
    Discriminator(_form),
]


class CompletionRequest(Sampling, CompletionOptions, Lacking):
    model: str
    """The service's model, by the id that `/v1/models` lists."""
    prompt: Prompt
    """A text, token ids, or several of either. Control tokens in a text count as control tokens;
    images cannot be sent here."""
    max_tokens: PositiveInt = 16
    """Tokens of an answer at most; the default is OpenAI's."""
    echo: bool = False
    """Whether each answer begins with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Likeliest tokens at each place whose log-probabilities the answer holds; 0: only those of the
    chosen token."""
    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own tokens to a text."""
    prompt_embeds: Annotated[Any, Only([])] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, also if there is only one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


class TextLogprobs(Answer):
    """Log-probabilities in OpenAI's older form: lists of the same length, with an entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]
    """Places in the text, in characters, where the tokens begin."""


class TextChoice(Answer):
    index: int
    """Number of the answer: `p * n + i` for answer i of prompt p, both from 0."""
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(Answer):
    id: str = Field(default_factory=lambda: new_id("cmpl-"))
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[TextChoice]
    usage: Usage
    timing: Timings | None = None
