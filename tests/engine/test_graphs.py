"""Steps by recorded graphs and fused layers: the same answers, on any machine and on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, LlamaConfig, PreTrainedConfig, Qwen2Config

from flashvl.engine import Completion, Engine, Request, StructuredOutputs, runner
from flashvl.engine.fused import fuse_layers
from flashvl.engine.graphs import Graphs
from flashvl.model.loading import load_model, load_processor
from tests.support.images import noise

WORDS = "Describe the image. a large red circle".split()


class Repeated(Graphs):
    """A recording that works on a CPU: each replay computes the same tensors again."""

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        output = run().clone()
        return lambda: output.copy_(run()), output


def make_requests(**options: Any) -> list[Request]:
    """Prompts that all differ, every third about a picture, in answers of all lengths."""
    return [
        Request(
            messages=[
                {
                    "role": "user",
                    "content": "<image>\n" * (number % 3 == 0)
                    + " ".join([*WORDS[: 1 + number % 8] * 3, str(number)]),
                }
            ],
            images=[noise(number, (190, 90))] if number % 3 == 0 else [],
            **{"max_new_tokens": 1 + 7 * number % 61, "ignore_eos": True, "seed": number} | options,
        )
        for number in range(40)
    ]


def make_engine(folder: Path) -> Engine:
    """With few rows and small pieces, idle rows of a batch are often being prefilled."""
    return Engine(load_model(folder), load_processor(folder), max_num_seqs=7, max_prefill_tokens=90)


@pytest.mark.parametrize("preset", ["tiny", "tiny-iss"])
def test_idle_rows_padded_prompts_and_longer_attention_change_nothing(
    preset: str, random_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_folder(preset)
    plain, recorded = make_engine(folder), make_engine(folder)
    monkeypatch.setattr(runner, "LENGTH_STEP", 16)
    monkeypatch.setattr("flashvl.engine.runner.Graphs", Repeated)
    fuse_layers(recorded.runner.language_model)
    recorded.runner.record()
    with torch.compiler.set_stance("force_eager"):
        found = recorded.generate(make_requests())
    assert [each.token_ids for each in found] == [
        each.token_ids for each in plain.generate(make_requests())
    ]
    graphs = recorded.runner.graphs
    assert graphs is not None
    decoded = [key for key in graphs._recorded if key[0] == "decode"]
    assert {rows for _, rows, _, _ in decoded} == {1, 2, 4, 7}
    assert all(length % 16 == 0 for _, _, length, _ in decoded)
    assert len({length for _, _, length, _ in decoded}) > 1
    assert {key[0] for key in graphs._recorded} == {"decode", "encode", "prefill"}


@pytest.mark.parametrize("config_class", [Qwen2Config, LlamaConfig])
def test_fused_layers_compute_what_those_of_transformers_do(
    config_class: type[PreTrainedConfig],
) -> None:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    model = AutoModel.from_config(config).eval()
    for weight in model.parameters():
        weight.data.normal_(std=0.3)  # biases and norms, too
    ids = torch.randint(90, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
        fuse_layers(model)
        found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)


def by_generate(engine: Engine, model: Any, request: Request) -> list[int]:
    """The answer by transformers alone."""
    messages = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in request.messages
    ]
    if request.images:
        text = messages[0]["content"][0]["text"].removeprefix("<image>\n")
        messages[0]["content"] = [
            {"type": "image", "image": request.images[0]},
            {"type": "text", "text": text},
        ]
    inputs = engine.processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    ).to(model.device)
    model.generation_config.eos_token_id = None
    generated = model.generate(
        **inputs, max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = generated[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["tiny", "tiny-iss"])
def test_a_gpu_gives_the_answers_of_generate_by_recorded_steps(
    preset: str, random_folder: Callable[[str], Path]
) -> None:
    folder = random_folder(preset)
    engine, model = make_engine(folder), load_model(folder).cuda()
    completions = engine.generate(make_requests())
    assert engine.runner.graphs is not None
    assert {key[0] for key in engine.runner.graphs._recorded} == {"decode", "encode", "prefill"}
    for request, completion in zip(make_requests(), completions, strict=True):
        assert completion.token_ids == by_generate(engine, model, request)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 2.0, "top_p": 0.9, "top_k": 20},
        {"temperature": 1.5, "repetition_penalty": 1.3, "stop": ["e"]},
        {"temperature": 1.0, "structured_outputs": StructuredOutputs(regex="[a-z ]{3,9}")},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_gpu_samples_the_same_in_company_and_alone(
    options: dict[str, Any], tiny_random: Path
) -> None:
    engine, requests = make_engine(tiny_random), make_requests(**options)[:12]

    def told(completion: Completion) -> Any:
        return completion.token_ids, completion.text, completion.finish_reason

    alone = [told(engine.generate([request])[0]) for request in requests]
    assert [told(each) for each in engine.generate(requests)] == alone
