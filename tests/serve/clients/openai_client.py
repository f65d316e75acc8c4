"""OpenAI's own."""

import json
import sys

import openai
from answers import CHOICE, QUESTIONS, Scene, as_part, tell

url, image = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
model = client.models.list().data[0].id
first = [{"role": "user", "content": [as_part(image), {"type": "text", "text": QUESTIONS[0]}]}]

reply = client.chat.completions.create(model=model, messages=first).choices[0].message
with client.chat.completions.stream(model=model, messages=first) as stream:
    streamed = "".join(event.delta for event in stream if event.type == "content.delta")
    final = stream.get_final_completion().choices[0].message.content
assert streamed == final

turns = [*first, reply.model_dump(), {"role": "user", "content": QUESTIONS[1]}]
second = client.chat.completions.create(model=model, messages=turns).choices[0].message

parsed = client.chat.completions.parse(model=model, messages=first, response_format=Scene)
tool = openai.pydantic_function_tool(Scene, name="report", description="Report the scene.")
named = client.chat.completions.create(
    model=model, messages=first, tools=[tool], tool_choice=CHOICE
).choices[0]
(call,) = named.message.tool_calls
after = [
    *first,
    named.message.model_dump(),
    {"role": "tool", "tool_call_id": call.id, "content": "noted"},
    {"role": "user", "content": QUESTIONS[1]},
]
client.chat.completions.create(model=model, messages=after)
response = client.responses.create(
    model=model,
    input=[
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": as_part(image)["image_url"]["url"]},
                {"type": "input_text", "text": QUESTIONS[0]},
            ],
        }
    ],
)
assert response.output_text == reply.content
tell(
    image=reply.content,
    stream=streamed,
    turns=second.content,
    structured=parsed.choices[0].message.parsed.model_dump(),
    tools={"name": call.function.name, "arguments": json.loads(call.function.arguments)},
)
