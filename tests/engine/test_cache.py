"""The cache keeps the contents of its rows when it is cut anew; the scheduler admits by tokens."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from flashvl.data.features import Tiles
from flashvl.engine.cache import ROW_STEP, KVCache
from flashvl.engine.prompts import Prompt
from flashvl.engine.request import Request
from flashvl.engine.sampling import Sampler
from flashvl.engine.scheduler import Scheduler
from flashvl.engine.sequence import AnswerText, Sequence

CONFIG = Qwen2Config(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
PROMPT_LENGTHS = (3, 40, 90, 200)


def make_cache(num_tokens: int, max_rows: int) -> KVCache:
    return KVCache(
        CONFIG,
        num_tokens=num_tokens,
        max_rows=max_rows,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_rows_keep_their_tokens_when_they_are_cut_anew(data: st.DataObject) -> None:
    cache = make_cache(num_tokens=1000, max_rows=6)
    used: list[int] = []
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(data.draw(st.integers(1, 6))):
        most = max(1, cache.num_tokens // (ROW_STEP * max(len(used) + 1, 1)))
        length = data.draw(st.integers(max([1, *used]), max([1, *used, most * ROW_STEP])))
        if cache.rows_of(length) <= len(used):
            continue
        cache.resize_rows(length, used)
        assert cache.row_length >= length
        assert cache.num_rows == cache.rows_of(length) <= 6
        assert cache.num_rows * cache.row_length <= cache.num_tokens
        tokens = data.draw(st.integers(0, length))
        row = (torch.randn(2, 2, tokens, 2), torch.randn(2, 2, tokens, 2))
        cache.keys[:, len(used), :, :tokens], cache.values[:, len(used), :, :tokens] = row
        used.append(tokens)
        held.append(row)
        for number, (keys, values) in enumerate(held):
            assert torch.equal(cache.keys[:, number, :, : used[number]], keys)
            assert torch.equal(cache.values[:, number, :, : used[number]], values)


def make_sequence(number: int, prompt_tokens: int, max_new_tokens: int) -> Sequence:
    request = Request(messages=[], max_new_tokens=max_new_tokens)
    prompt = [1] * prompt_tokens
    return Sequence(
        id=number,
        request=request,
        prompt=Prompt(prompt, Tiles(torch.zeros(0).numpy(), ())),
        sampler=Sampler(request, prompt, [0]),
        text=AnswerText(None, ()),  # type: ignore[arg-type]
        is_streamed=False,
    )


def test_as_many_are_admitted_as_have_room_for_their_tokens() -> None:
    scheduler = Scheduler(make_cache(num_tokens=1024, max_rows=64), max_prefill_tokens=10_000)
    for number in range(20):
        scheduler.add(make_sequence(number, prompt_tokens=30, max_new_tokens=34))
    assert len(scheduler.admit()) == 16  # 1024 / 64
    scheduler.start_decoding()
    scheduler.add(make_sequence(20, prompt_tokens=300, max_new_tokens=100))
    assert scheduler.admit() == []
    while len(scheduler.decoding) > 1:
        scheduler.remove(scheduler.decoding[-1])
    assert [sequence.id for sequence in scheduler.admit()] == [16, 17, 18, 19]
    scheduler.start_decoding()
    assert scheduler.admit() == []  # 1024 tokens have room for two rows of 448
    for sequence in scheduler.decoding[1:]:
        scheduler.remove(sequence)
    assert [sequence.id for sequence in scheduler.admit()] == [20]


@pytest.mark.parametrize("seed", range(20))
def test_all_are_admitted_in_the_end_and_never_more_than_fit(seed: int) -> None:
    rng = random.Random(seed)
    cache = make_cache(num_tokens=1024, max_rows=8)
    scheduler = Scheduler(cache, max_prefill_tokens=256)
    todo = [
        make_sequence(number, rng.choice(PROMPT_LENGTHS), rng.randint(1, 700))
        for number in range(60)
    ]
    admitted: list[int] = []
    while todo or not scheduler.is_idle:
        for _ in range(rng.randint(0, 4)):
            if todo:
                scheduler.add(todo.pop())
        group = scheduler.admit()
        admitted += [sequence.id for sequence in group]
        running = scheduler.decoding + scheduler.prefilling
        assert len(running) <= cache.num_rows <= 8
        assert all(sequence.max_length <= cache.row_length for sequence in running)
        for sequence in group:
            sequence.num_cached = len(sequence.prompt)
        scheduler.start_decoding()
        for sequence in list(scheduler.decoding):
            if rng.random() < 0.3:
                scheduler.remove(sequence)
    assert sorted(admitted) == list(range(60))
