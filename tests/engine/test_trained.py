"""An engine on a model in training: each update counts at once, and training goes on as before."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from flashvl.data.features import Tiles, ask_about_image, encode_prompt, make_tiles, normalize_tiles
from flashvl.engine import Engine, Request
from flashvl.engine.packed import PackedLinear, can_pack
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import load_model, load_processor
from tests.support.images import noise
from tests.support.models import draw_weights

MAX_NEW_TOKENS = 6


class Training:
    """A model in training: by another attention than the engine's, with dropout in the adapters."""

    def __init__(self, folder: Path, has_adapters: bool):
        self.processor: FlashVLProcessor = load_processor(folder)
        self.model: FlashVLForConditionalGeneration = load_model(folder)
        draw_weights(self.model)
        self.model.train().set_attn_implementation({"text_config": "eager"})
        self.model.model.vision_tower.requires_grad_(False).eval()
        if has_adapters:
            layers = r".*language_model.*(q|v|down)_proj|.*multi_modal_projector\.linear_\d"
            config = LoraConfig(r=4, lora_dropout=0.2, target_modules=layers)
            LoraModel(self.model, {"default": config}, "default")
        self.weights = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.05)
        self.tiles = [make_tiles([noise(seed, (190, 100))], self.processor) for seed in range(3)]

    def prompt(self, tiles: Tiles) -> list[int]:
        return encode_prompt(ask_about_image("Describe the image."), tiles.counts, self.processor)

    def update(self) -> list[torch.Tensor]:
        """One step of the optimizer; returns its gradients."""
        torch.manual_seed(5)
        self.optimizer.zero_grad()
        tiles = self.tiles[0]
        ids = torch.tensor([[*self.prompt(tiles), 50, 60, 70]])
        self.model(
            input_ids=ids,
            pixel_values=normalize_tiles(torch.from_numpy(tiles.pixels), self.processor),
            labels=ids,
        ).loss.backward()
        gradients = [weight.grad.clone() for weight in self.weights if weight.grad is not None]
        self.optimizer.step()
        return gradients

    def requests(self) -> list[Request]:
        """Groups of three."""
        return [
            Request(
                prompt=self.prompt(tiles),
                images=tiles,
                max_new_tokens=MAX_NEW_TOKENS,
                ignore_eos=True,
            )
            for tiles in self.tiles
            for _ in range(3)
        ]

    def by_generate(self) -> list[list[int]]:
        """Greedy answers to all pictures by a copy of the model as it is now."""
        model = copy.deepcopy(self.model).eval()
        model.set_attn_implementation({"text_config": "sdpa"})
        found = []
        for tiles in self.tiles:
            ids = torch.tensor([self.prompt(tiles)])
            generated = model.generate(
                input_ids=ids,
                pixel_values=normalize_tiles(torch.from_numpy(tiles.pixels), self.processor),
                max_new_tokens=MAX_NEW_TOKENS,
                min_new_tokens=MAX_NEW_TOKENS,
                eos_token_id=None,
                do_sample=False,
                pad_token_id=0,
            )
            found.append(generated[0, ids.shape[1] :].tolist())
        return found


@pytest.mark.parametrize("has_adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-iss"])
def test_each_update_counts_at_once_and_leaves_no_trace(
    random_folder: Callable[[str], Path], preset: str, has_adapters: bool
) -> None:
    training = Training(random_folder(preset), has_adapters)
    undisturbed = Training(random_folder(preset), has_adapters)
    undisturbed.model.load_state_dict(training.model.state_dict())
    engine = Engine(training.model, training.processor, max_num_seqs=5, is_trained=True)
    flags = {name: module.training for name, module in training.model.named_modules()}
    answers = []
    for _ in range(4):
        found = [completion.token_ids for completion in engine.generate(training.requests())]
        answers.append(found[::3])
        assert found == [tokens for tokens in training.by_generate() for _ in range(3)]
        assert {name: each.training for name, each in training.model.named_modules()} == flags
        assert engine.runner.cache.num_bytes == 0
        assert not engine.image_features.kept
        language_model = training.model.model.language_model
        assert language_model.config._attn_implementation == "eager"
        gradients = zip(training.update(), undisturbed.update(), strict=True)
        assert all(torch.equal(one, other) for one, other in gradients)
    assert all(answers[step] != answers[step + 1] for step in range(3))


def test_answers_step_by_step_end_when_the_model_is_given_back(tiny_random: Path) -> None:
    training = Training(tiny_random, has_adapters=False)
    engine = Engine(training.model, training.processor, is_trained=True)
    expected = [each.token_ids for each in engine.generate(training.requests())]
    for _ in range(2):
        with engine.borrow_model():
            for request in training.requests():
                engine.add(replace(request, max_new_tokens=90))
            found = [each.token_ids for each in engine.generate(training.requests()[:1])]
            assert found == expected[:1]
            assert engine.num_running == 9
        assert engine.is_idle
        assert engine.runner.cache.num_prompt_tokens == 0
    assert [each.token_ids for each in engine.generate(training.requests())] == expected


def test_a_failure_gives_the_model_back(tiny_random: Path) -> None:
    training = Training(tiny_random, has_adapters=False)
    engine = Engine(training.model, training.processor, is_trained=True)
    with pytest.raises(MemoryError), engine.borrow_model():
        assert not any(module.training for module in training.model.modules())
        raise MemoryError
    assert training.model.training
    assert not training.model.model.vision_tower.training
    training.update()


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="no bf16 on this processor"
)
def test_weights_that_are_trained_are_not_packed(tiny_random: Path) -> None:
    model = load_model(tiny_random, torch.bfloat16)
    Engine(model, load_processor(tiny_random), is_trained=True)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert any(isinstance(module, nn.Linear) for module in model.modules())
