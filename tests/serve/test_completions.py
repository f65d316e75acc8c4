"""`/v1/completions` by OpenAI's own client: it continues a text as the engine does."""

from collections import defaultdict
from typing import Any

import openai
import pytest

from flashvl.engine import Completion, Engine, Request, token_bytes

TEXT = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def by_engine(engine: Engine, prompt: str | list[int], **options: Any) -> Completion:
    return engine.generate([Request(prompt=prompt, **({"max_new_tokens": 16} | options))])[0]


def test_prompts_in_every_form_are_continued(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.processor.tokenizer.encode(TEXT)
    expected = by_engine(engine, TEXT)
    other = by_engine(engine, "a red")
    assert expected.text
    for prompt in (TEXT, [TEXT], ids, [ids]):
        found = client.completions.create(model="tiny", prompt=prompt)
        (choice,) = found.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert found.usage is not None and found.usage.prompt_tokens == len(ids)
        assert found.usage.completion_tokens == len(expected.token_ids)
    found = client.completions.create(model="tiny", prompt=[TEXT, "a red"], n=2)
    assert [each.text for each in found.choices] == [expected.text] * 2 + [other.text] * 2
    assert [each.index for each in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.prompt_tokens + other.prompt_tokens


def test_streams_the_same_text(client: openai.OpenAI, engine: Engine) -> None:
    texts: dict[int, str] = defaultdict(str)
    *parts, last = client.completions.create(
        model="tiny",
        prompt=[TEXT, "a red"],
        echo=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in parts:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    expected = [by_engine(engine, prompt) for prompt in (TEXT, "a red")]
    assert texts == {0: TEXT + expected[0].text, 1: "a red" + expected[1].text}
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == sum(len(each.token_ids) for each in expected)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_in_their_older_form(
    client: openai.OpenAI, engine: Engine, is_streamed: bool
) -> None:
    options = {"temperature": 2.0, "seed": 4}
    expected = by_engine(engine, TEXT, logprobs=2, **options)
    found = client.completions.create(
        model="tiny", prompt=TEXT, logprobs=2, stream=is_streamed, **options
    )
    chunks = list(found) if is_streamed else [found]
    told = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    tokens = [token for each in told for token in each.tokens or []]
    offsets = [offset for each in told for offset in each.text_offset or []]
    values = [value for each in told for value in each.token_logprobs or []]
    tops = [top for each in told for top in each.top_logprobs or []]
    assert expected.logprobs is not None
    assert values == pytest.approx([each.logprob for each in expected.logprobs], abs=1e-4)
    data = [token_bytes(engine.processor.tokenizer, each) for each in expected.token_ids]
    for index, (token, offset) in enumerate(zip(tokens, offsets, strict=True)):
        before = b"".join(data[:index]).decode(errors="ignore")
        assert offset == len(before)
        assert token.startswith("bytes:") or token == data[index].decode()
    assert all(len(top) == 2 for top in tops)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "<|image_pad|>"}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt.1.0"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"logit_bias": {"5000": 1}}}, "logit_bias"),
        ({"extra_body": {"stop_token_ids": [5000]}}, "stop_token_ids"),
        ({"extra_body": {"prompt_embeds": "x"}}, "prompt_embeds"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**({"model": "tiny", "prompt": "Hi"} | options))
    assert caught.value.param == param, caught.value.body
