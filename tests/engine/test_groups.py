"""Requests with the same prompt share one copy of it, and are answered as if each were alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashvl.data.features import Tiles, make_tiles, normalize_tiles
from flashvl.engine import Completion, Engine, Request, StructuredOutputs
from flashvl.engine.attention import attend_plainly, attend_with_sums
from flashvl.engine.cache import ROW_STEP, HeldPrompt, bytes_per_token
from flashvl.engine.prompts import Prompts
from flashvl.engine.scheduler import Scheduler
from flashvl.engine.sequence import Sequence
from flashvl.model.loading import load_model, load_processor
from tests.engine.test_cache import make_cache, make_sequence
from tests.support.images import noise
from tests.support.models import draw_weights

NUM_TWINS = 8


@pytest.fixture(scope="module", params=["tiny", "tiny-iss"])
def engine(request: pytest.FixtureRequest, random_folder: Callable[[str], Path]) -> Engine:
    """Three query heads share each key head in both models."""
    return make_engine(random_folder(request.param))


def make_engine(folder: Path, **options: Any) -> Engine:
    model = load_model(folder)
    draw_weights(model)
    return Engine(model, load_processor(folder), **options)


def ask(engine: Engine, picture: int = 0, text: str = "Describe", **options: Any) -> Request:
    """A request about a picture of two to four tiles, where images are cut; -1: without one."""
    images = [noise(picture, (190, 90 + 40 * (picture % 2)))] if picture >= 0 else []
    return Request(
        messages=[{"role": "user", "content": "<image>\n" * len(images) + text}],
        images=make_tiles(images, engine.processor),
        **{"max_new_tokens": 12} | options,
    )


def seeded(request: Request, count: int = NUM_TWINS) -> list[Request]:
    return [replace(request, seed=seed) for seed in range(count)]


def one_by_one(engine: Engine, requests: list[Request]) -> list[Completion]:
    return [engine.generate([request])[0] for request in requests]


def by_generate(engine: Engine, request: Request) -> list[int]:
    """Tokens by transformers alone, without the end token."""
    (message,), images = request.messages, request.images
    assert isinstance(images, Tiles)
    content = [{"type": "text", "text": message["content"]}]
    text = engine.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    text = text.replace("<image>", engine.processor.image_text(*images.counts))
    ids = engine.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    generated = engine.model.generate(
        **ids,
        pixel_values=normalize_tiles(torch.from_numpy(images.pixels), engine.processor),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    tokens = generated[0, ids["input_ids"].shape[1] :].tolist()
    end = engine.processor.tokenizer.eos_token_id
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_greedy_twins_are_answered_as_by_generate(engine: Engine) -> None:
    for picture in range(3):
        request = ask(engine, picture)
        expected = by_generate(engine, request)
        for completion in engine.generate([request] * 4):
            assert completion.token_ids == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 2.0, "top_p": 0.9, "top_k": 20, "min_new_tokens": 5},
        {"temperature": 1.5, "repetition_penalty": 1.3, "stop": ["e", "arg"]},
        {"temperature": 1.0, "structured_outputs": StructuredOutputs(regex="[a-z ]{3,9}")},
    ],
    ids=lambda options: "-".join(options),
)
def test_sampled_twins_are_answered_as_one_by_one(engine: Engine, options: dict[str, Any]) -> None:
    twins = seeded(ask(engine, 1, **options))
    expected = one_by_one(engine, twins)
    found = engine.generate(twins)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.prompt_tokens == other.prompt_tokens
        pairs = zip(one.logprobs or [], other.logprobs or [], strict=True)
        assert all(a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs)
    assert len({tuple(completion.token_ids) for completion in found}) > 1


def test_a_group_reads_and_holds_its_prompt_once(engine: Engine) -> None:
    engine.image_features.clear()
    misses, read = engine.image_features.num_misses, engine.num_prefilled_tokens
    cache = engine.runner.cache
    numbers = [engine.add(each) for each in seeded(ask(engine, 2, max_new_tokens=40))]
    engine.step()
    first = engine.scheduler.decoding[0]
    length = len(first.prompt)
    assert length > 40
    assert engine.num_running == len(numbers)
    assert engine.num_prefilled_tokens - read == length
    assert engine.image_features.num_misses - misses == 1
    (held,) = cache._prompts
    config = engine.model.config.text_config
    assert held.num_bytes == length * bytes_per_token(config, engine.model.dtype)
    # The rows have room for the answers alone, and all is within the memory that there was before.
    assert cache.row_length == ROW_STEP
    assert cache.num_rows * cache.row_length + length <= cache.num_tokens
    for store in (held.keys, held.values):
        assert store.untyped_storage().data_ptr() == cache._memory.untyped_storage().data_ptr()
    engine.step()
    assert [sequence.num_cached for sequence in engine.scheduler.decoding] == [1] * len(numbers)
    for number in numbers[:-1]:
        engine.cancel(number)
    assert cache.num_prompt_tokens == length
    engine.cancel(numbers[-1])
    assert cache.num_prompt_tokens == 0


def test_twins_that_come_late_or_wait_for_a_row_join(random_folder: Callable[[str], Path]) -> None:
    engine = make_engine(random_folder("tiny"), max_num_seqs=3, max_prefill_tokens=20)
    twins = seeded(ask(engine, 1, temperature=1.5, ignore_eos=True))
    expected = one_by_one(engine, twins)
    read = engine.num_prefilled_tokens
    late = twins[5:]
    numbers = [engine.add(each) for each in twins[:5]]
    found: dict[int, Completion] = {}
    while len(found) < len(twins):
        if late and not engine.num_waiting:
            numbers.append(engine.add(late.pop(0)))
        engine.step()
        assert engine.num_running <= 3
        for number in numbers:
            for delta in engine.take(number):
                assert delta.completion is not None
                found[number] = delta.completion
    assert [found[number] for number in numbers] == expected
    assert engine.num_prefilled_tokens - read == expected[0].prompt_tokens
    assert engine.runner.cache.num_prompt_tokens == 0


@pytest.mark.parametrize("max_model_len", [96, 4096])
def test_whoever_shares_the_batch_and_however_they_arrive(
    random_folder: Callable[[str], Path], max_model_len: int
) -> None:
    """Groups of all sizes and loners arrive, wait, join, leave, are cancelled and change rows."""
    folder = random_folder("tiny-iss")
    engine = make_engine(folder, max_num_seqs=6, max_prefill_tokens=48, max_model_len=4096)
    engine.max_model_len = max_model_len if max_model_len > 96 else 400
    if max_model_len == 96:  # memory for little more than the longest conversation
        cache = make_cache_of(engine, 512)
        engine.runner.cache = cache
        engine.scheduler = Scheduler(cache, 48)
    rng = random.Random(3)
    kinds = [(picture, text) for picture in (-1, 0, 1, 2) for text in ("Describe", "circle red")]
    requests = []
    for seed in range(70):
        picture, text = rng.choice(kinds)
        options: dict[str, Any] = {"temperature": rng.choice([0.0, 1.5]), "seed": seed}
        options["max_new_tokens"] = rng.choice([1, 3, 9, 90])
        requests.append(ask(engine, picture, text, **options))
    alone = make_engine(folder)
    expected = one_by_one(alone, requests)
    numbers: dict[int, int] = {}
    waiting, found, cancelled = list(range(len(requests))), {}, set()
    while len(found) + len(cancelled) < len(requests):
        for _ in range(rng.choice([0, 0, 0, 2, 9])):
            if waiting:
                index = waiting.pop(0)
                numbers[engine.add(requests[index])] = index
        engine.step()
        assert engine.num_running <= 6
        cache = engine.runner.cache
        assert cache.num_rows * cache.row_length + cache.num_prompt_tokens <= cache.num_tokens
        assert len(cache._prompts) == len(engine.scheduler._sharing)
        for number, index in list(numbers.items()):
            for delta in engine.take(number):
                assert delta.completion is not None
                found[index] = delta.completion
                del numbers[number]
        for number in sorted(numbers):
            if rng.random() < 0.01:
                engine.cancel(number)
                cancelled.add(numbers.pop(number))
    assert cancelled
    for index, completion in found.items():
        assert completion.token_ids == expected[index].token_ids, index
    assert engine.is_idle
    assert engine.runner.cache.num_prompt_tokens == 0
    assert not engine.scheduler._sharing


def make_cache_of(engine: Engine, num_tokens: int) -> Any:
    old = engine.runner.cache
    return type(old)(
        engine.model.config.text_config,
        num_tokens=num_tokens,
        max_rows=old.max_rows,
        dtype=engine.model.dtype,
        device=engine.device,
    )


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_parts_of_attention_are_put_together_by_their_sums(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    rows, queries, tokens = shape
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, 2, queries, 8, generator=draw).to(dtype)
    keys, values = torch.randn(2, rows, 2, tokens, 8, generator=draw).to(dtype)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=draw)
    is_in = (torch.arange(tokens) < lengths)[:, None, None]
    mask = torch.zeros((), dtype=dtype).where(is_in, -torch.inf)
    exact = F.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), attn_mask=is_in, scale=0.3
    )
    scores = (query.double() @ keys.double().mT * 0.3).masked_fill(~is_in, -torch.inf)
    for attend in (attend_with_sums, attend_plainly):
        found, sums = attend(query, keys, values, mask, 0.3)
        near = {"rtol": 2**-6, "atol": 2**-6} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found, exact.to(dtype), **near)
        torch.testing.assert_close(
            sums, scores.logsumexp(-1).float(), **(near or {"rtol": 1e-5, "atol": 1e-5})
        )


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_prompts_and_rows_keep_their_tokens_as_others_come_and_go(data: st.DataObject) -> None:
    cache = make_cache(num_tokens=1024, max_rows=6)
    cache.resize_rows(64, [])
    prompts: list[tuple[HeldPrompt, torch.Tensor, torch.Tensor]] = []
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["hold", "drop", "row", "resize"]))
        if what == "hold":
            length = data.draw(st.integers(1, 300))
            if cache.rows_of(cache.row_length, length) >= max(len(rows), 1):
                held = cache.hold_prompt(length)
                for store in (held.keys, held.values):
                    assert store.shape == (2, 1, 2, length, 2)
                    store.normal_()
                prompts.append((held, held.keys.clone(), held.values.clone()))
        elif what == "drop" and prompts:
            place = data.draw(st.integers(0, len(prompts) - 1))
            cache.drop_prompt(prompts.pop(place)[0])
        elif what == "row" and len(rows) < cache.num_rows:
            for store in (cache.keys, cache.values):
                store[:, len(rows), :, :60].normal_()
            rows.append(
                (
                    cache.keys[:, len(rows), :, :60].clone(),
                    cache.values[:, len(rows), :, :60].clone(),
                )
            )
        elif what == "resize":
            length = data.draw(st.integers(60, 400))
            if cache.rows_of(length) >= max(len(rows), 1):
                cache.resize_rows(length, [60] * len(rows))
        assert cache.num_rows * cache.row_length + cache.num_prompt_tokens <= cache.num_tokens
        for held, keys, values in prompts:
            assert torch.equal(held.keys, keys) and torch.equal(held.values, values)
        for number, (keys, values) in enumerate(rows):
            assert torch.equal(cache.keys[:, number, :, :60], keys)
            assert torch.equal(cache.values[:, number, :, :60], values)


@pytest.mark.parametrize("seed", range(20))
def test_all_are_admitted_in_the_end_whatever_the_memory(seed: int) -> None:
    rng = random.Random(seed)
    cache = make_cache(num_tokens=1024, max_rows=8)
    scheduler = Scheduler(cache, max_prefill_tokens=256)
    prompts = [make_sequence(0, rng.choice([3, 90, 400, 700]), 1).prompt for _ in range(8)]
    todo: list[Sequence] = []
    for number in range(80):
        sequence = make_sequence(number, 1, rng.choice([1, 60, 200, 324]))
        sequence.prompt = rng.choice(prompts)
        todo.append(sequence)
    admitted: list[int] = []
    is_shared = False
    for _ in range(100_000):
        if not todo and scheduler.is_idle:
            break
        for _ in range(rng.randint(0, 4)):
            if todo:
                scheduler.add(todo.pop())
        for sequence in scheduler.admit():
            admitted.append(sequence.id)
            if sequence.shared is None:
                sequence.num_cached = len(sequence.prompt)
            else:
                is_shared = True
                assert sequence.shared.held in cache._prompts
        running = scheduler.decoding + scheduler.prefilling
        assert len(running) <= cache.num_rows <= 8
        assert all(sequence.row_length <= cache.row_length for sequence in running)
        assert cache.num_rows * cache.row_length + cache.num_prompt_tokens <= 1024
        scheduler.start_decoding()
        for sequence in [*scheduler.decoding, *scheduler.waiting]:
            if rng.random() < (0.3 if sequence in scheduler.decoding else 0.01):
                if sequence in scheduler.waiting:
                    admitted.append(sequence.id)
                scheduler.remove(sequence)
    assert sorted(admitted) == list(range(80))
    assert is_shared
    assert cache.num_prompt_tokens == 0


def test_prompts_are_equal_if_their_tokens_and_all_their_pixels_are(
    random_folder: Callable[[str], Path],
) -> None:
    processor = load_processor(random_folder("tiny"))
    tiles = make_tiles([noise(0, (90, 90))], processor)
    same = make_tiles([noise(0, (90, 90))], processor)
    other = make_tiles([noise(0, (90, 90))], processor)
    other.pixels[0, 1, 2, 3] ^= 1
    prompts = Prompts()
    first = prompts.make([1, 2], tiles)
    assert prompts.make([1, 2], same) is first
    assert prompts.make([1, 3], same) is not first
    assert prompts.make([1, 2], other) is not first
