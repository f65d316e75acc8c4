"""Requests and answers of `/v1/responses`, OpenAI's newer form of a chat.

The service keeps nothing, so each request holds the whole conversation.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag

from flashvl.serve.protocol.answers import TokenLogprob, new_id, now
from flashvl.serve.protocol.messages import (
    MAX_MESSAGES,
    AnswerContent,
    Content,
    Marked,
    TextContent,
)
from flashvl.serve.protocol.parts import Answer, Closed, Only, Text, form
from flashvl.serve.protocol.sampling import Lacking, Sampling
from flashvl.serve.protocol.structured import JSONObjectFormat, Schema, TextFormat
from flashvl.serve.protocol.tools import MAX_TOOLS, Function, ToolMode, ToolName

# What clients send


class Item(Marked):
    """Base of the items, the parts of a conversation."""

    id: str | None = None
    """Taken and ignored, as are `status` and `phase`."""
    status: str | None = None
    phase: str | None = None


class UserItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user"]
    content: Content


class AssistantItem(Item):
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: AnswerContent


class SystemItem(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: TextContent


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Text
    parsed_arguments: Any = None
    """Taken and ignored: OpenAI's client adds it."""
    async_: Annotated[Any, Only(False)] = Field(alias="async", default=None)
    namespace: Annotated[Any, Only()] = None
    caller: dict[str, Any] | None = None
    """Taken and ignored."""


class FunctionOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str | None = None
    output: TextContent
    name: str | None = None
    namespace: Annotated[Any, Only()] = None
    caller: dict[str, Any] | None = None
    """Taken and ignored."""


class ReasoningItem(Item):
    """Reasoning of another model; taken and ignored."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] = []
    encrypted_content: str | None = None


class ItemReference(Closed):
    """A reference to an item that a service keeps; this one keeps none."""

    type: Literal["item_reference"]
    id: Annotated[Any, Only(instead="send the item itself: nothing is kept")]


def _kind(item: Any) -> Any:
    """The tag of an item's form; messages differ by their roles, and may leave `type` out."""
    if not isinstance(item, dict):
        return None
    kind = item.get("type") or "message"
    return kind if kind != "message" else item.get("role") or kind


InputItem = Annotated[
    Annotated[UserItem, Tag("user")]
    | Annotated[AssistantItem, Tag("assistant")]
    | Annotated[SystemItem, Tag("system")]
    | Annotated[SystemItem, Tag("developer")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(_kind),
]
Input = Annotated[
    Annotated[Text, Tag("[text]")]
    | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES), Tag("[parts]")],
    Discriminator(form),
]


class JSONSchemaTextFormat(Closed):
    type: Literal["json_schema"]
    name: str = "answer"
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool = False
    """Taken and ignored: the answer is always valid under the schema."""


class TextConfig(Closed):
    format: Annotated[
        TextFormat | JSONObjectFormat | JSONSchemaTextFormat, Field(discriminator="type")
    ] = TextFormat(type="text")
    verbosity: Annotated[Any, Only("medium")] = None


class FunctionTool(Function):
    type: Literal["function"]
    allowed_callers: Annotated[Any, Only(["direct"])] = None
    async_: Annotated[Any, Only(False)] = Field(alias="async", default=None)
    defer_loading: Annotated[Any, Only(False)] = None
    output_schema: dict[str, Any] | None = None
    """Taken and ignored."""


class NamedFunction(Closed):
    type: Literal["function"]
    name: ToolName


class AllowedFunctions(Closed):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


def _choice_form(choice: Any) -> str:
    return "[text]" if isinstance(choice, str) else "[tool]"


FunctionChoice = Annotated[
    Annotated[ToolMode, Tag("[text]")]
    | Annotated[
        Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")], Tag("[tool]")
    ],
    Discriminator(_choice_form),
]


class Reasoning(Closed):
    """Fields about reasoning, taken only with values that ask for none."""

    effort: Annotated[Any, Only("none")] = None
    summary: Annotated[Any, Only()] = None
    generate_summary: Annotated[Any, Only()] = None
    context: Annotated[Any, Only("auto")] = None
    mode: Annotated[Any, Only("standard")] = None


class ResponseStreamOptions(Closed):
    include_obfuscation: bool = False
    """Taken and ignored."""


Included = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]


class ResponseRequest(Sampling, Lacking):
    model: str
    """The service's model, by the id that `/v1/models` lists."""
    input: Input
    """The conversation, or the one message of a user."""
    instructions: Text | None = None
    """System's message, which is put before the input."""
    max_output_tokens: PositiveInt | None = None
    """Tokens of the answer at most; by default, what the service is configured to give."""
    text: TextConfig = TextConfig()
    """Form of the answer: text, a JSON object, or JSON under a schema."""
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = []
    """Tools that the model may call."""
    tool_choice: FunctionChoice = "auto"
    """Tools to call: `none`, `auto` (the model decides), `required` (at least one), or a tool."""
    parallel_tool_calls: bool = True
    """Whether the model may call several tools in one answer."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    """Likeliest tokens at each place to report too, if `include` asks for log-probabilities."""
    include: list[Included] = []
    """Parts to include in the answer; only `message.output_text.logprobs` has an effect, as the
    service never has the others."""
    metadata: dict[str, str] | None = None
    """Texts that the answer repeats."""
    store: bool = False
    """Taken and ignored: nothing is kept."""
    stream_options: ResponseStreamOptions = ResponseStreamOptions()
    truncation: Annotated[Any, Only("disabled")] = None
    access_programs: Annotated[Any, Only({})] = None
    background: Annotated[Any, Only(False)] = None
    background_options: Annotated[Any, Only({})] = None
    chat_template_kwargs: Annotated[Any, Only({}, {"enable_thinking": False})] = None
    context_management: Annotated[Any, Only([])] = None
    conversation: Annotated[
        Any, Only(instead="send the whole conversation as input: nothing is kept")
    ] = None
    enable_response_messages: Annotated[Any, Only(False)] = None
    image: dict[str, Any] | None = None
    """Taken and ignored: the model decides how an image is cut."""
    include_reasoning: bool | None = None
    """Taken and ignored: the model does not reason."""
    max_tool_calls: int | None = None
    """Taken and ignored: it is about OpenAI's own tools."""
    previous_input_messages: Annotated[Any, Only([])] = None
    previous_response_id: Annotated[
        Any, Only(instead="send the whole conversation as input: nothing is kept")
    ] = None
    prompt: Annotated[Any, Only(instead="send input")] = None
    reasoning: Reasoning = Reasoning()


# What the service sends

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Answer):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[dict[str, Any]] = []
    logprobs: list[TokenLogprob] = []


class OutputMessage(Answer):
    id: str = Field(default_factory=lambda: new_id("msg_"))
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ResponseStatus = "in_progress"
    content: list[OutputText] = []


class OutputCall(Answer):
    id: str = Field(default_factory=lambda: new_id("fc_"))
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str = ""
    """JSON object with the arguments, as text."""
    status: ResponseStatus = "in_progress"


class InputTokensDetails(Answer):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(Answer):
    reasoning_tokens: int = 0


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseError(Answer):
    code: str
    message: str


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class Response(Answer):
    id: str = Field(default_factory=lambda: new_id("resp_"))
    object: Literal["response"] = "response"
    created_at: int = Field(default_factory=now)
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputMessage | OutputCall] = []
    usage: ResponseUsage | None = None
    # Repeated from the request.
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    user: str | None
    # Always the same: the service has no such feature.
    background: Literal[False] = False
    previous_response_id: None = None
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
