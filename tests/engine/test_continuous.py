"""Continuous batching against `generate`, request by request; and its bookkeeping under stress."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from flashvl.engine import Completion, Engine, Request
from flashvl.engine.images import ImageFeatures
from flashvl.engine.sampling import Sampler, admit, choose_tokens
from flashvl.errors import DataError
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from tests.support.images import noise
from tests.support.models import draw_weights

MAX_LENGTH = 4096
"""Length limit of this file's engines; RoPE needs no weights for it."""
WORDS = "Describe the image. a large red circle".split()


class Subject:
    """A model for plain `generate`, which can also make engines of its weights."""

    def __init__(self, folder: Path):
        self.model: FlashVLForConditionalGeneration = load_model(folder)
        self.processor: FlashVLProcessor = load_processor(folder)
        self.folder = folder
        draw_weights(self.model)

    def engine(self, **options: Any) -> Engine:
        model = load_model(self.folder)
        model.load_state_dict(self.model.state_dict())
        model.config.text_config.max_position_embeddings = MAX_LENGTH
        return Engine(model, self.processor, **options)

    def by_generate(self, request: Request) -> tuple[list[int], int]:
        """New tokens without the end token, and the length of the prompt."""
        images = iter(request.images)
        blocks = []
        for message in request.messages:
            content: list[dict[str, Any]] = []
            *runs, text = message["content"].split("<image>\n")
            for before in runs:
                assert not before
                content.append({"type": "image", "image": next(images)})
            content.append({"type": "text", "text": text})
            blocks.append({"role": message["role"], "content": content})
        inputs = self.processor.apply_chat_template(
            blocks, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        generated = self.model.generate(
            **inputs,
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens or None,
            repetition_penalty=request.repetition_penalty,
            do_sample=False,
            pad_token_id=0,
        )
        length = inputs["input_ids"].shape[1]
        tokens = generated[0, length:].tolist()
        end = self.processor.tokenizer.eos_token_id
        return tokens[: tokens.index(end)] if end in tokens else tokens, length


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("tiny", marks=pytest.mark.long),
        pytest.param("tiny-dynamic", marks=pytest.mark.long),
        pytest.param("tiny-overlap", marks=pytest.mark.long),
        "tiny-iss",
    ],
)
def subject(request: pytest.FixtureRequest, random_folder: Callable[[str], Path]) -> Subject:
    return Subject(random_folder(request.param))


def mixed_requests(count: int, seed: int = 0) -> list[Request]:
    """Requests with no image, one or two, of all numbers of tiles, and of many lengths."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        sizes = rng.choice([(), (), (40,), (90,), (130,), (190,), (90, 190)])
        images = [noise(index, (size, size)) for size in sizes]
        words = " ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 60])))
        max_new_tokens = rng.choice([1, 2, 5, 12])
        made.append(
            Request(
                messages=[{"role": "user", "content": "<image>\n" * len(images) + words}],
                images=images,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min(rng.choice([0, 0, 4]), max_new_tokens),
                repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            )
        )
    return made


def assert_is_by_generate(subject: Subject, request: Request, completion: Completion) -> None:
    tokens, prompt_tokens = subject.by_generate(request)
    assert completion.token_ids == tokens
    assert completion.prompt_tokens == prompt_tokens
    assert completion.text == subject.processor.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.long
def test_whoever_shares_the_batch_and_however_they_arrive(subject: Subject) -> None:
    """With few rows and small pieces of prefill, requests wait, join, leave and change rows."""
    requests = mixed_requests(100)
    engine = subject.engine(max_num_seqs=5, max_prefill_tokens=48)
    rng = random.Random(1)
    waiting = dict(enumerate(requests))
    numbers: dict[int, int] = {}
    completions: dict[int, Completion] = {}
    while len(completions) < len(requests):
        for index in rng.sample(sorted(waiting), min(len(waiting), rng.randrange(4))):
            numbers[engine.add(waiting.pop(index))] = index
        engine.step()
        for number, index in numbers.items():
            for delta in engine.take(number):
                assert delta.completion is not None
                assert index not in completions
                completions[index] = delta.completion
    assert engine.is_idle
    for index, request in enumerate(requests):
        assert_is_by_generate(subject, request, completions[index])


def test_prompts_of_one_to_two_thousand_tokens(subject: Subject) -> None:
    """The longest prompt is prefilled in pieces, and its row is as long as it needs."""
    engine = subject.engine(max_prefill_tokens=300)
    requests = [
        Request(messages=[{"role": "user", "content": " ".join(WORDS * count)}], max_new_tokens=3)
        for count in (0, 1, 20, 90, 200, 1)
    ]
    completions = engine.generate(requests)
    assert max(completion.prompt_tokens for completion in completions) > 2000
    for request, completion in zip(requests, completions, strict=True):
        assert_is_by_generate(subject, request, completion)


def test_sampling_is_the_requests_own(subject: Subject) -> None:
    def ask(seed: int, **options: Any) -> Request:
        content = "Describe the image."
        return Request(
            messages=[{"role": "user", "content": content}],
            max_new_tokens=12,
            temperature=1.5,
            seed=seed,
            ignore_eos=True,
            **options,
        )

    engine = subject.engine()
    alone = [engine.generate([ask(seed, top_p=0.9, top_k=50)])[0] for seed in range(4)]
    others = mixed_requests(9, seed=3)
    together = engine.generate([ask(seed, top_p=0.9, top_k=50) for seed in range(4)] + others)
    assert together[:4] == alone
    assert len({tuple(completion.token_ids) for completion in alone}) == 4
    assert all(len(completion.token_ids) == 12 for completion in alone)
    greedy = Request(messages=ask(0).messages, max_new_tokens=12, ignore_eos=True)
    assert engine.generate([ask(0, top_k=1)]) == engine.generate([greedy])


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=9),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.05, 1.0),
)
def test_top_k_and_top_p_admit_what_their_definitions_say(
    logits: list[float], top_k: int, top_p: float
) -> None:
    request = Request(messages=[], temperature=1.0, top_k=top_k, top_p=top_p)
    values, ids = admit(torch.tensor([logits]), [request], top_k)
    assert ids is not None
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    least = logits[order[min(top_k or len(order), len(order)) - 1]]
    admitted = [token for token in order if logits[token] >= least]
    weights = torch.tensor([logits[token] for token in admitted]).double().exp()
    shares = (weights / weights.sum()).tolist()
    expected, before = set(), 0.0
    for token, share in zip(admitted, shares, strict=True):
        if before < top_p - 1e-6:
            expected.add(token)
        if abs(before - top_p) < 1e-6:
            return  # rounding decides between equal logits
        before += share
    found = set(ids[values.isfinite()].tolist())
    if len({logits[token] for token in order}) == len(
        order
    ):  # equal logits may come in either order
        assert found == expected


def test_repetition_penalty_is_the_librarys() -> None:
    prompt, logits = [1, 4, 4], torch.tensor([0.5, 1.0, -1.0, 2.0, -3.0])
    sampler = Sampler(Request(messages=[], repetition_penalty=3.0), prompt, [0])
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
    expected = processors(torch.tensor([prompt]), logits[None]).argmax().item()
    assert choose_tokens([sampler], logits[None], [0]) == [expected] == [3]


# Text


def test_a_stop_string_ends_the_answer_before_it(subject: Subject) -> None:
    engine = subject.engine()
    free = Request(messages=[{"role": "user", "content": "Describe"}], max_new_tokens=30)
    (whole,) = engine.generate([free])
    middle = whole.text[5:8]
    assert middle
    stopped = Request(messages=free.messages, max_new_tokens=30, stop=[middle, "never said"])
    (completion,) = engine.generate([stopped])
    assert completion.text == whole.text[: whole.text.index(middle)]
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) < len(whole.token_ids)


@pytest.mark.parametrize("stop", [(), ("lar",), ("e re", "zzz")])
def test_a_stream_joined_is_the_completion(subject: Subject, stop: tuple[str, ...]) -> None:
    engine = subject.engine()
    for request in mixed_requests(12, seed=5):
        request = Request(
            messages=request.messages,
            images=request.images,
            max_new_tokens=request.max_new_tokens,
            stop=stop,
        )
        deltas = list(engine.stream(request))
        (completion,) = engine.generate([request])
        assert "".join(delta.text for delta in deltas) == completion.text
        assert [delta.completion for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].completion == completion


def test_logprobs_are_the_models(subject: Subject) -> None:
    request = Request(
        messages=[{"role": "user", "content": "Describe the image."}], max_new_tokens=4, logprobs=3
    )
    (completion,) = subject.engine().generate([request])
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) > 0
    inputs = subject.processor.apply_chat_template(
        list(request.messages), tokenize=True, return_dict=True, return_tensors="pt",
        add_generation_prompt=True,
    )["input_ids"]  # fmt: skip
    with torch.no_grad():
        whole = torch.cat([inputs, torch.tensor([completion.token_ids])], 1)
        logits = subject.model(input_ids=whole).logits[0, inputs.shape[1] - 1 :]
    logits[:, subject.processor.image_token_id] = -torch.inf
    expected = logits.log_softmax(-1)
    for place, (token, found) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        assert found.logprob == pytest.approx(expected[place, token].item(), abs=1e-4)
        values, tokens = expected[place].topk(3)
        assert list(found.top) == tokens.tolist()
        assert list(found.top.values()) == pytest.approx(values.tolist(), abs=1e-4)


# Bounds


def test_what_can_never_fit_is_refused_and_what_just_fits_is_answered(subject: Subject) -> None:
    engine = subject.engine(max_model_len=64)
    request = mixed_requests(1)[0]
    short = Request(messages=[{"role": "user", "content": "a"}], max_new_tokens=1)
    (completion,) = engine.generate([short])
    room = 64 - completion.prompt_tokens
    just = Request(messages=short.messages, max_new_tokens=room, ignore_eos=True)
    assert len(engine.generate([just])[0].token_ids) == room
    more = Request(messages=short.messages, max_new_tokens=room + 1)
    with pytest.raises(DataError, match=rf"max_new_tokens={room + 1}.*max_model_len=64"):
        engine.generate([short, more])
    assert engine.is_idle
    assert request is not None


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"stop": ["a", ""]},
        {"repetition_penalty": 0.0},
        {"logprobs": -1},
    ],
    ids=str,
)
def test_parameters_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(DataError, match=rf"^{name} \("):
        Request(messages=[], **options)


def test_an_image_seen_again_is_not_encoded_again() -> None:
    encoded: list[int] = []

    def encode(tiles: np.ndarray) -> torch.Tensor:
        encoded.append(len(tiles))
        return (
            torch.from_numpy(tiles.astype(np.float32)).mean((1, 2, 3)).repeat_interleave(2)[:, None]
        )

    features = ImageFeatures(encode, max_bytes=100)  # of four bytes each: 25 tokens
    images = [np.full((count, 3, 2, 2), value, np.uint8) for value, count in enumerate((1, 3, 2))]
    first = features([images[0], images[1], images[0]])
    assert encoded == [4]
    assert [len(tokens) for tokens in first] == [2, 6, 2]
    assert [tokens.unique().tolist() for tokens in first] == [[0.0], [1.0], [0.0]]
    features([images[1], images[2]])
    assert encoded == [4, 2]
    many = [np.full((1, 3, 2, 2), value, np.uint8) for value in range(10, 30)]
    features(many)
    assert features.num_bytes <= 100
    assert features.num_bytes == sum(tokens.nbytes for tokens in features.kept.values())
    features([images[0]])
    assert encoded[-1] == 1  # it was dropped


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_arrivals_cancellations_and_refusals_leave_nothing_behind(
    tiny_random: Path, count: int
) -> None:
    engine = Engine(
        load_model(tiny_random), load_processor(tiny_random), max_num_seqs=8, max_model_len=80
    )
    rng = random.Random(7)
    live: set[int] = set()
    answered, cancelled, refused, added = 0, 0, 0, 0
    while added < count or live:
        for _ in range(rng.randrange(4)):
            if added == count:
                break
            added += 1
            request = Request(
                messages=[{"role": "user", "content": " ".join(rng.choices(WORDS, k=3))}],
                max_new_tokens=rng.choice([1, 2, 9, 100]),
                seed=added,
            )
            try:
                live.add(engine.add(request))
            except DataError:
                refused += 1
        engine.step()
        for number in sorted(live):
            for delta in engine.take(number):
                assert delta.completion is not None
                live.remove(number)
                answered += 1
        for number in [number for number in sorted(live) if rng.random() < 0.02]:
            engine.cancel(number)
            live.remove(number)
            cancelled += 1
            assert engine.take(number) == []
        scheduler = engine.scheduler
        assert len(scheduler.decoding) + len(scheduler.prefilling) <= 8
    assert answered + cancelled + refused == count
    assert min(answered, cancelled, refused) > 0
    assert engine.is_idle
    assert not engine._sequences
    assert not engine._outbox


def test_the_first_token_is_handed_out_before_the_second_is_made(subject: Subject) -> None:
    """Prefills of other requests are cut in pieces, and none waits for more than one piece."""
    engine = subject.engine(max_prefill_tokens=16)
    first = engine.add(Request(messages=[{"role": "user", "content": "circle"}], ignore_eos=True))
    num_tokens = 0
    while not num_tokens:
        engine.step()
        num_tokens = engine.scheduler.decoding and len(engine.scheduler.decoding[0].token_ids)
    assert num_tokens == 1
    long = "Describe the image. " * 20
    engine.add(Request(messages=[{"role": "user", "content": long}], max_new_tokens=2))
    sequence, *_ = engine.scheduler.decoding
    num_steps = 0
    while len(engine.scheduler.decoding) < 2:
        engine.step()
        num_steps += 1
        assert len(sequence.token_ids) >= 1 + num_steps // 2
    assert num_steps > 10
    engine.cancel(first)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-3},
        {"temperature": 1e3, "min_new_tokens": 2},
        {"temperature": 1.0, "top_p": 1e-50},
        {"logprobs": 10_000},
        {"repetition_penalty": 1e3},
    ],
    ids=str,
)
def test_extreme_parameters_that_are_accepted_are_answered(
    subject: Subject, options: dict[str, Any]
) -> None:
    engine = subject.engine()
    messages = [{"role": "user", "content": "Describe"}]
    (completion,) = engine.generate([Request(messages=messages, max_new_tokens=3, **options)])
    assert len(completion.token_ids) <= 3


@pytest.mark.parametrize("value", [1e-40, float("inf"), float("nan"), -1.0])
def test_parameters_that_would_overflow_are_refused(value: float) -> None:
    with pytest.raises(DataError, match="temperature"):
        Request(messages=[], temperature=value)
    with pytest.raises(DataError, match="repetition_penalty"):
        Request(messages=[], repetition_penalty=value)
