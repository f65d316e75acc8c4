"""HTTP by hand, with the parts spelt as in public bug reports."""

import json
import sys

import requests
from answers import CHOICE, QUESTIONS, Scene, as_part, tell

url, image = sys.argv[1:]
session = requests.Session()


def post(messages, **options):
    body = {"model": model, "messages": messages, **options}
    answer = session.post(f"{url}/v1/chat/completions", json=body, timeout=120, stream=True)
    assert answer.status_code == 200, answer.text
    return answer


model = session.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
first = [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[0]}, as_part(image)]}]
nothing = dict.fromkeys(
    ("n", "tools", "tool_choice", "logit_bias", "response_format", "stop", "seed", "top_k")
)
reply = post(first, **nothing).json()["choices"][0]["message"]

streamed, lines = "", post(first, stream=True).iter_lines()
for line in lines:
    if line.startswith(b"data: ") and line != b"data: [DONE]":
        for choice in json.loads(line[6:])["choices"]:
            streamed += choice["delta"].get("content") or ""

second = post([*first, reply, {"role": "user", "content": QUESTIONS[1]}]).json()["choices"][0]
schema = {"name": "scene", "schema": Scene.model_json_schema(), "strict": True}
shaped = post(first, response_format={"type": "json_schema", "json_schema": schema}).json()
tool = {"type": "function", "function": {"name": "report", "parameters": schema["schema"]}}
called = post(first, tools=[tool], tool_choice=CHOICE).json()["choices"][0]["message"]
(call,) = called["tool_calls"]
tell(
    image=reply["content"],
    stream=streamed,
    turns=second["message"]["content"],
    structured=json.loads(shaped["choices"][0]["message"]["content"]),
    tools={
        "name": call["function"]["name"],
        "arguments": json.loads(call["function"]["arguments"]),
    },
)
