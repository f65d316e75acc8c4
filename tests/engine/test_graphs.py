"""Decoding by recorded graphs: their inputs and outputs, on any machine and on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashvl.engine import Engine, Request, graphs
from flashvl.engine.graphs import DecodingGraphs
from flashvl.model.loading import load_model, load_processor

WORDS = "Describe the image. a large red circle".split()


class Repeated(DecodingGraphs):
    """A recording that works on a CPU: each replay computes the same tensors again."""

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        logits = run().clone()
        return lambda: logits.copy_(run()), logits


def make_requests() -> list[Request]:
    """All prompts differ: equal ones would be shared, and then steps are not recorded."""
    return [
        Request(
            messages=[
                {"role": "user", "content": " ".join([*WORDS[: 1 + number % 8] * 3, str(number)])}
            ],
            max_new_tokens=1 + 7 * number % 61,
            ignore_eos=True,
        )
        for number in range(40)
    ]


def make_engine(folder: Path) -> Engine:
    """With few rows and small pieces, idle rows of a batch are often being prefilled."""
    return Engine(load_model(folder), load_processor(folder), max_num_seqs=7, max_prefill_tokens=20)


def test_idle_rows_and_longer_attention_change_nothing(
    tiny_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, recorded = make_engine(tiny_random), make_engine(tiny_random)
    monkeypatch.setattr(graphs, "LENGTH_STEP", 16)
    runner = recorded.runner
    runner.graphs = Repeated(runner._decode, runner.cache)
    assert recorded.generate(make_requests()) == plain.generate(make_requests())
    shapes = runner.graphs._recorded
    assert {rows for rows, _, _ in shapes} == {1, 2, 4, 7}
    assert all(length % 16 == 0 for _, length, _ in shapes)
    assert len({length for _, length, _ in shapes}) > 1


@pytest.mark.gpu
def test_a_gpu_gives_the_answers_of_generate_by_recorded_steps(tiny_random: Path) -> None:
    engine, model = make_engine(tiny_random), load_model(tiny_random).cuda()
    assert engine.runner.graphs is not None
    completions = engine.generate(make_requests())
    assert engine.runner.graphs._recorded
    for request, completion in zip(make_requests(), completions, strict=True):
        inputs = engine.processor.apply_chat_template(
            list(request.messages),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        ).to("cuda")
        model.generation_config.eos_token_id = None
        generated = model.generate(
            **inputs,
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        assert completion.token_ids == generated[0, inputs["input_ids"].shape[1] :].tolist()
