"""LiteLLM's."""

import json
import sys

import litellm
from answers import CHOICE, QUESTIONS, Scene, as_part, tell

url, image = sys.argv[1:]
where = {"model": "hosted_vllm/tiny", "api_base": f"{url}/v1", "api_key": "any", "num_retries": 0}
first = [{"role": "user", "content": [as_part(image), {"type": "text", "text": QUESTIONS[0]}]}]

reply = litellm.completion(messages=first, **where).choices[0].message
streamed = "".join(
    chunk.choices[0].delta.content or ""
    for chunk in litellm.completion(messages=first, stream=True, **where)
    if chunk.choices
)
turns = [*first, reply.model_dump(), {"role": "user", "content": QUESTIONS[1]}]
second = litellm.completion(messages=turns, **where).choices[0].message
shaped = litellm.completion(messages=first, response_format=Scene, **where).choices[0].message
parameters = Scene.model_json_schema()
tool = {"type": "function", "function": {"name": "report", "parameters": parameters}}
# Of tools for hosted_vllm it leaves out that there are no further properties.
where["model"] = "openai/tiny"
called = litellm.completion(messages=first, tools=[tool], tool_choice=CHOICE, **where)
(call,) = called.choices[0].message.tool_calls
assert litellm.completion(messages=first, **where).choices[0].message.content == reply.content
tell(
    image=reply.content,
    stream=streamed,
    turns=second.content,
    structured=json.loads(shaped.content),
    tools={"name": call.function.name, "arguments": json.loads(call.function.arguments)},
)
