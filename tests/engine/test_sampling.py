"""Sampling parameters against vLLM's definitions."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper

from flashvl.engine import Engine, Request
from flashvl.engine.sampling import Sampler, admit, choose_tokens
from flashvl.errors import DataError
from flashvl.model.loading import load_model, load_processor

QUESTION = [{"role": "user", "content": "Describe the image."}]


@pytest.fixture(scope="module")
def engine(tiny_random: Path) -> Engine:
    return Engine(load_model(tiny_random), load_processor(tiny_random))


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6),
    said=st.lists(st.integers(0, 5), max_size=8),
    repetition=st.sampled_from([1.0, 0.7, 1.5]),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 5), st.floats(-100, 100), max_size=3),
)
def test_biases_come_before_penalties_as_in_vllm(
    logits: list[float],
    said: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
) -> None:
    """Logits by vLLM's V1 sampler: bias, repetition (prompt and answer), frequency, presence."""
    prompt = [0, 3, 3]
    request = Request(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    sampler = Sampler(request, prompt, [0])
    sampler.said.update(said)
    scores = [logit + bias.get(token, 0.0) for token, logit in enumerate(logits)]
    for token in {*prompt, *said}:
        scores[token] *= 1 / repetition if scores[token] > 0 else repetition
    for token in set(said):
        scores[token] -= frequency * said.count(token) + presence
    best, second = sorted(scores, reverse=True)[:2]
    if best - second > 1e-3:  # otherwise rounding decides
        chosen = choose_tokens([sampler], torch.tensor([logits]), [len(said)])
        assert chosen == [scores.index(best)]


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=9, unique=True),
    min_p=st.floats(0.01, 1.0),
)
def test_min_p_is_the_librarys(logits: list[float], min_p: float) -> None:
    request = Request(temperature=1.0, min_p=min_p)
    kept = admit(torch.tensor([logits]), [request], None)[0][0].isfinite()
    expected = MinPLogitsWarper(min_p)(torch.empty(0), torch.tensor([logits]))[0].isfinite()
    shares = torch.tensor(logits).double().softmax(-1)
    sure = ((shares / shares.max()) - min_p).abs() > 1e-5
    assert torch.equal(kept[sure], expected[sure])


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """By the chi-square statistic of 20,000 draws, with and without the least likely tokens."""
    logits = torch.tensor([1.0, -torch.inf, 0.3, -2.0, 2.0, 0.3, -30.0, 1.1])
    shares = (logits.double() / 0.7).softmax(-1)
    order = shares.argsort(descending=True)
    for options, admitted in (
        ({}, range(8)),
        ({"top_k": 3}, order[:3].tolist()),
        ({"top_p": 0.9}, order[: int((shares[order].cumsum(0) < 0.9).sum()) + 1].tolist()),
        ({"min_p": 0.1}, (shares >= 0.1 * shares.max()).nonzero()[:, 0].tolist()),
    ):
        expected = torch.zeros(8, dtype=torch.double)
        expected[list(admitted)] = shares[list(admitted)]
        expected *= 20_000 / expected.sum()
        requests = [Request(temperature=0.7, seed=seed, **options) for seed in range(200)]
        samplers = [Sampler(request, [], [0]) for request in requests]
        counts = torch.zeros(8, dtype=torch.double)
        for _ in range(100):
            for token in choose_tokens(samplers, logits.expand(200, -1), [0] * 200):
                counts[token] += 1
        likely = expected > 5
        assert counts[~likely].sum() < 5
        statistic = ((counts - expected) ** 2 / expected)[likely].sum()
        assert statistic < 30  # one in 10,000 exceeds it with seven degrees of freedom


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.5, 2.0]),
                "top_k": st.sampled_from([0, 2, 5]),
                "top_p": st.sampled_from([0.3, 1.0]),
                "min_p": st.sampled_from([0.0, 0.2]),
                "presence_penalty": st.sampled_from([0.0, 1.0]),
                "logit_bias": st.sampled_from([{}, {3: 2.0}]),
                "min_new_tokens": st.sampled_from([0, 3]),
                "seed": st.integers(0, 99),
            }
        ),
        min_size=1,
        max_size=9,
    ),
    seed=st.integers(0, 99),
)
def test_a_rows_tokens_do_not_depend_on_the_others(rows: list[dict[str, Any]], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randn(4, len(rows), 40, generator=draw).mul(2).round()  # with equal ones
    steps[:, :, 7] = -torch.inf
    together, alone = ([Sampler(Request(**options), [], [0]) for options in rows] for _ in range(2))
    for length, logits in enumerate(steps):
        found = choose_tokens(together, logits, [length] * len(rows))
        assert found == [
            choose_tokens([sampler], row[None], [length])[0]
            for sampler, row in zip(alone, logits, strict=True)
        ]
        assert 7 not in found
        for token, options in zip(found, rows, strict=True):
            assert token != 0 or length >= options["min_new_tokens"]


@given(chance=st.sampled_from([0.0, 1 - 2**-24]), last=st.floats(0.125, 9, width=32))
def test_the_ends_of_the_distribution_are_tokens_that_are_admitted(
    chance: float, last: float
) -> None:
    sampler = Sampler(Request(temperature=1.0), [], [0])
    sampler.uniform = lambda: chance  # type: ignore[method-assign]
    logits = torch.tensor([[-torch.inf, 1.0, last, 0.5, -torch.inf]])
    assert choose_tokens([sampler], logits, [0]) == [1 if chance == 0 else 3]


def test_no_token_is_chosen_where_none_is_admitted() -> None:
    samplers = [Sampler(Request(temperature=value), [], [0]) for value in (0.0, 1.0, 1.0)]
    logits = torch.full((3, 5), -torch.inf)
    logits[2, 3] = 0.0
    assert choose_tokens(samplers, logits, [0] * 3) == [None, None, 3]


def test_a_biased_token_is_said_or_never(engine: Engine) -> None:
    letter = engine.processor.tokenizer.convert_tokens_to_ids("Q")
    always = Request(messages=QUESTION, max_new_tokens=5, logit_bias={letter: 100.0})
    assert engine.generate([always])[0].token_ids == [letter] * 5
    free = Request(messages=QUESTION, max_new_tokens=5, ignore_eos=True)
    (first,) = engine.generate([free])
    never = Request(
        messages=QUESTION, max_new_tokens=5, ignore_eos=True, logit_bias={first.token_ids[0]: -100}
    )
    assert first.token_ids[0] not in engine.generate([never])[0].token_ids


def test_a_stop_token_ends_the_answer_and_is_none_of_it(engine: Engine) -> None:
    free = Request(messages=QUESTION, max_new_tokens=12, ignore_eos=True)
    (whole,) = engine.generate([free])
    place = next(n for n, token in enumerate(whole.token_ids) if token not in whole.token_ids[:n])
    stop = whole.token_ids[place]
    options: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "stop_token_ids": [stop]}
    (stopped,) = engine.generate([Request(messages=QUESTION, **options)])
    assert stopped.token_ids == whole.token_ids[:place]
    assert stopped.finish_reason == "stop"
    (later,) = engine.generate([Request(messages=QUESTION, min_new_tokens=6, **options)])
    assert len(later.token_ids) >= 6
    assert stop not in later.token_ids


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"temperature": 1000.0}], ids=str)
def test_an_images_placeholder_is_never_said(engine: Engine, options: dict[str, Any]) -> None:
    image = engine.processor.image_token_id
    requests = [
        Request(
            messages=QUESTION, max_new_tokens=30, seed=seed, logit_bias={image: 100.0}, **options
        )
        for seed in range(8)
    ]
    for answer in engine.generate(requests):
        assert image not in answer.token_ids


def test_every_end_token_of_the_configuration_ends_an_answer(tiny_random: Path) -> None:
    free = Request(messages=QUESTION, max_new_tokens=12, ignore_eos=True)
    processor = load_processor(tiny_random)
    (whole,) = Engine(load_model(tiny_random), processor).generate([free])
    other = whole.token_ids[0]
    for tokens in ([2, other], [other, 2], other):
        model = load_model(tiny_random)
        model.generation_config.eos_token_id = tokens
        engine = Engine(model, processor)
        (answer,) = engine.generate([Request(messages=QUESTION, max_new_tokens=12)])
        assert (answer.token_ids, answer.finish_reason) == ([], "stop")
        (longer,) = engine.generate(
            [Request(messages=QUESTION, max_new_tokens=5, min_new_tokens=5)]
        )
        assert len(longer.token_ids) == 5 and other not in longer.token_ids


def test_a_raw_prompt_is_gone_on_with_as_it_is(engine: Engine) -> None:
    tokenizer = engine.processor.tokenizer
    text = "<|im_start|>user\na large red"
    ids = tokenizer.encode(text)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in ids
    by_text, by_ids = engine.generate(
        [Request(prompt=each, max_new_tokens=6, ignore_eos=True) for each in (text, ids)]
    )
    assert by_text == by_ids
    assert by_text.prompt_tokens == len(ids)
    generated = engine.model.generate(
        torch.tensor([ids]), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert by_ids.token_ids[0] == generated[0, len(ids)].item()


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("min_p", {"min_p": 1.1}),
        ("min_p", {"min_p": math.nan}),
        ("presence_penalty", {"presence_penalty": 2.1}),
        ("frequency_penalty", {"frequency_penalty": math.nan}),
        ("logit_bias", {"logit_bias": {1: 101.0}}),
        ("logit_bias", {"logit_bias": {1: math.inf}}),
        ("logit_bias", {"logit_bias": {1: math.nan}}),
        ("logit_bias", {"logit_bias": {100_000: 1.0}}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
        ("stop_token_ids", {"stop_token_ids": [-1]}),
        ("stop_token_ids", {"stop_token_ids": [100_000]}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [100_000]}),
        ("prompt", {"prompt": [3]}),
        ("prompt", {"prompt": "a <|image_pad|>"}),
        ("prompt", {"prompt": "a", "messages": QUESTION}),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(
    engine: Engine, field: str, options: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=f"^{field} ") as caught:
        engine.add(Request(**({"prompt": "a"} | options if "messages" not in options else options)))
    assert "\n" not in str(caught.value)
    assert engine.is_idle
