"""pydantic-ai's."""

import sys
from pathlib import Path

from answers import QUESTIONS, Scene, tell
from pydantic_ai import Agent, BinaryContent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, image = sys.argv[1:]
model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="any"))
picture = BinaryContent(Path(image).read_bytes(), media_type="image/png")
first = [QUESTIONS[0], picture]

agent = Agent(model)
reply = agent.run_sync(first)
second = agent.run_sync(QUESTIONS[1], message_history=reply.all_messages())
streamed = agent.run_stream_sync(first)
whole = list(streamed.stream_text(delta=True))

structured = Agent(model, output_type=NativeOutput(Scene)).run_sync(first).output
called = Agent(model, output_type=ToolOutput(Scene, name="report")).run_sync(first)
call, *_ = [
    part
    for message in called.all_messages()
    for part in message.parts
    if part.part_kind == "tool-call"
]
assert isinstance(called.output, Scene)
tell(
    image=reply.output,
    stream="".join(whole),
    turns=second.output,
    structured=structured.model_dump(),
    tools={"name": call.tool_name, "arguments": call.args_as_dict()},
)
