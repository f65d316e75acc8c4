"""Fields about the sampling of an answer, and those of other services that this one lacks."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, StringConstraints, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from flashvl.serve.protocol.parts import Closed, Only, StreamOptions, TokenId, form
from flashvl.serve.protocol.structured import ResponseFormat, StructuredOutputsRequest

MAX_ANSWERS = 8
"""Answers to one prompt at most."""

StopString = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Stop = Annotated[
    Annotated[Annotated[str, StringConstraints(max_length=1000)], Tag("[text]")]
    | Annotated[list[StopString], Field(max_length=16), Tag("[parts]")],
    Discriminator(form),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Sampling(Closed):
    """Fields that every kind of request has; they mean what they mean in vLLM."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Sampling temperature; 0, the default, and values below 0.001 take the likeliest token."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Probability mass of the likeliest tokens, among which sampling chooses."""
    top_k: Annotated[int, Field(ge=-1, le=2**31)] = 0
    """Number of likeliest tokens among which sampling chooses; 0 or -1: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least probability of a token that may be sampled, as a share of the likeliest token's."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the answer already holds."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit, once for each time that the answer already holds it."""
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Divides the logits of tokens that came before, or multiplies them if they are negative."""
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Numbers to add to logits, by token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Random seed for sampling, with which the same request gets the same answer; by default a
    random one."""
    stop: Stop = []
    """Text, or list of texts, before whose first occurrence the answer ends."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] = []
    """Tokens before which the answer ends."""
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Tokens of an answer at least: the model cannot end it earlier."""
    ignore_eos: bool = False
    """Whether the answer continues after the model's end token."""
    structured_outputs: StructuredOutputsRequest | None = None
    """Form that the answer must have, written as for vLLM."""
    stream: bool = False
    """Whether the answer comes as server-sent events while it is generated."""
    user: str | None = None
    """Taken and ignored."""

    @property
    def stop_strings(self) -> list[str]:
        """The texts of `stop`, without empty ones, which count as none."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        return [text for text in stop if text]


class CompletionOptions(Closed):
    """Fields that `/v1/chat/completions` and `/v1/completions` share, and `/v1/responses` lacks."""

    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    """Answers to each prompt; the i-th, from 0, has the seed `seed + i`."""
    best_of: int | None = None
    """1 or `n`: the service generates no answers that it does not send."""
    stream_options: StreamOptions = StreamOptions()
    """What else a stream tells."""
    response_format: ResponseFormat | None = None
    """Form of the answers: text, a JSON object, or JSON under a schema."""
    include_timing: bool = False
    """Whether the answer tells how long its parts took."""

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, 1, info.data.get("n")):
            raise PydanticCustomError(
                "unsupported", "this service makes no answers but those it gives; leave it out"
            )
        return value


class Lacking(Closed):
    """Fields of OpenAI and vLLM that every request may have, with values that ask for nothing."""

    allowed_token_ids: Annotated[Any, Only([])] = None
    bad_words: Annotated[Any, Only([], instead="use logit_bias")] = None
    cache_salt: Annotated[Any, Only()] = None
    early_stopping: Annotated[Any, Only(False)] = None
    ec_transfer_params: Annotated[Any, Only({})] = None
    guided_choice: Annotated[Any, Only(instead="send structured_outputs")] = None
    guided_decoding_backend: Annotated[Any, Only("auto")] = None
    guided_grammar: Annotated[Any, Only(instead="send structured_outputs")] = None
    guided_json: Annotated[Any, Only(instead="send structured_outputs")] = None
    guided_regex: Annotated[Any, Only(instead="send structured_outputs")] = None
    guided_whitespace_pattern: Annotated[Any, Only()] = None
    include_stop_str_in_output: Annotated[Any, Only(False)] = None
    kv_transfer_params: Annotated[Any, Only({})] = None
    length_penalty: Annotated[Any, Only(1)] = None
    logits_processors: Annotated[Any, Only([])] = None
    logprob_token_ids: Annotated[Any, Only([])] = None
    media_io_kwargs: Annotated[Any, Only({})] = None
    mm_payload: Annotated[Any, Only("tensors", "none")] = None
    mm_processor_kwargs: Annotated[Any, Only({})] = None
    moderation: Annotated[Any, Only()] = None
    priority: Annotated[Any, Only(0)] = None
    prompt_cache_key: str | None = None
    """Taken and ignored, as are the other `prompt_cache` fields: they change no answer."""
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    prompt_logprobs: Annotated[Any, Only()] = None
    repetition_detection: Annotated[Any, Only()] = None
    request_id: str | None = None
    """Taken and ignored."""
    return_mm_kwargs: Annotated[Any, Only(False)] = None
    return_prompt_text: Annotated[Any, Only(False)] = None
    return_token_ids: Annotated[Any, Only(False)] = None
    return_token_offsets: Annotated[Any, Only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, Only(False)] = None
    routed_experts_prompt_start: Annotated[Any, Only(0)] = None
    safety_identifier: str | None = None
    """Taken and ignored."""
    service_tier: Annotated[Any, Only("auto", "default")] = None
    session_id: str | None = None
    """Taken and ignored."""
    skip_special_tokens: Annotated[Any, Only(True)] = None
    spaces_between_special_tokens: Annotated[Any, Only(True)] = None
    stream_interval: Annotated[Any, Only(1)] = None
    thinking_token_budget: Annotated[Any, Only(0, -1)] = None
    truncate_prompt_tokens: Annotated[Any, Only()] = None
    truncation_side: Annotated[Any, Only("left", "right")] = None
    use_beam_search: Annotated[Any, Only(False)] = None
    vllm_xargs: Annotated[Any, Only({})] = None
    watermarking: Annotated[Any, Only(False)] = None
