"""instructor's."""

import json
import sys

import instructor
import openai
from answers import QUESTIONS, Scene, as_part, tell

url, image = sys.argv[1:]
plain = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
first = [{"role": "user", "content": [as_part(image), {"type": "text", "text": QUESTIONS[0]}]}]


def extract(mode: instructor.Mode) -> tuple[Scene, openai.types.chat.ChatCompletion]:
    client = instructor.from_openai(plain, mode=mode)
    return client.chat.completions.create_with_completion(
        model="tiny", messages=first, response_model=Scene, max_retries=0
    )


structured, _ = extract(instructor.Mode.JSON_SCHEMA)
_, completion = extract(instructor.Mode.TOOLS)
(call,) = completion.choices[0].message.tool_calls
assert call.function.name == "Scene"
partial = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
*_, last = partial.chat.completions.create_partial(
    model="tiny", messages=first, response_model=Scene
)
assert last.model_dump() == structured.model_dump()
reply = plain.chat.completions.create(model="tiny", messages=first).choices[0].message
turns = [*first, reply.model_dump(), {"role": "user", "content": QUESTIONS[1]}]
second = plain.chat.completions.create(model="tiny", messages=turns).choices[0].message
tell(
    image=reply.content,
    stream=reply.content,
    turns=second.content,
    structured=structured.model_dump(),
    tools={"name": "report", "arguments": json.loads(call.function.arguments)},
)
