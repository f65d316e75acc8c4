"""`/v1/completions`: texts to go on with, as OpenAI's older endpoint has them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag

from flashvl.engine.request import FinishReason
from flashvl.serve.protocol.answers import Timings, Usage, new_id, now
from flashvl.serve.protocol.parts import Only, Text, TokenId
from flashvl.serve.protocol.sampling import CompletionOptions, Lacking, Sampling

MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 100_000
"""The model's limit is far below."""


def _form(prompt: Any) -> str:
    """Which of the four a client means, so that an error is of that one."""
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
    prompt: Prompt
    """A text, token ids, or several of either. Control tokens in a text are control tokens; images
    have no place here."""
    max_tokens: PositiveInt = 16
    """OpenAI's default."""
    echo: bool = False
    """Have each answer begin with its prompt."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """So many of the likeliest tokens at each place; 0: the chosen one only."""
    suffix: Annotated[Any, Only("")] = None
    add_special_tokens: bool = True
    """Those of the tokenizer, to a text."""
    prompt_embeds: Annotated[Any, Only([])] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]


class TextLogprobs(BaseModel):
    """In OpenAI's older form: lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]
    """Where in the text each token begins."""


class TextChoice(BaseModel):
    index: int
    """The p-th prompt's i-th answer: `p * n + i`."""
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    id: str = Field(default_factory=lambda: new_id("cmpl-"))
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=now)
    model: str
    choices: list[TextChoice]
    usage: Usage
    timing: Timings | None = None
