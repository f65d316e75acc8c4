"""LangChain's, of the package langchain-openai."""

import sys

from answers import QUESTIONS, Scene, as_part, tell
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, image = sys.argv[1:]
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="any", model="tiny", max_retries=0)
first = HumanMessage([{"type": "text", "text": QUESTIONS[0]}, as_part(image)])

reply = chat.invoke([first])
streamed = "".join(piece.content for piece in chat.stream([first]))
second = chat.invoke([first, reply, HumanMessage(QUESTIONS[1])])
structured = chat.with_structured_output(Scene).invoke([first])
by_call = chat.with_structured_output(Scene, method="function_calling").invoke([first])
assert isinstance(by_call, Scene)


@tool(args_schema=Scene)
def report(**scene: object) -> str:
    """Report the scene."""
    return "noted"


called = chat.bind_tools([report], tool_choice="report", strict=True).invoke([first])
(call,) = called.tool_calls
chat.invoke([first, called, report.invoke(call), HumanMessage(QUESTIONS[1])])
tell(
    image=reply.content,
    stream=streamed,
    turns=second.content,
    structured=structured.model_dump(),
    tools={"name": call["name"], "arguments": call["args"]},
)
