"""Models to time: trained ones, or any configuration with random weights, which takes as long."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.initialization import no_init_weights

from flashvl.data import synthetic
from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import ConfigError
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.loading import inference_dtype, load_model, load_processor
from flashvl.model.parts.assembly import build_processor
from flashvl.model.presets import build_config

MAX_WEIGHTS = 3 * 10**9
"""Weights of one model at most; the system gives memory only for those that are used."""
BLOCK = 2**22
"""Random numbers that are drawn. All weights repeat them, which changes the speed of no kernel."""
SCALE = 0.02
"""Standard deviation of the random weights."""


class RandomWeights:
    """Random numbers that several models share as their weights.

    The peers of a benchmark, 4 GB each, can thus all be in memory and take turns.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.dtype = dtype
        self._memory = torch.empty(MAX_WEIGHTS, dtype=dtype, device=device)
        self._block = (torch.randn(BLOCK, device=device) * SCALE).to(dtype)
        self._num_drawn = 0

    @classmethod
    def for_this_machine(cls) -> "RandomWeights":
        """Weights on a GPU where there is one, in the type that the hardware is fastest with."""
        return cls(inference_dtype(), "cuda" if torch.cuda.is_available() else "cpu")

    def build(self, config: PreTrainedConfig) -> Any:
        """The image-text model of `config`, ready for inference."""
        with no_init_weights():  # an empty tensor takes no memory before it is written
            model = AutoModelForImageTextToText.from_config(config, dtype=self.dtype)
        model.tie_weights()
        self._fill(model)
        return model.to(self._memory.device).eval()

    def _fill(self, model: nn.Module) -> None:
        """Make matrices views of the numbers, norms ones and biases zeros."""
        views: dict[int, nn.Parameter] = {}
        start = 0
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is None:
                    continue
                if id(weight) not in views:
                    if weight.dim() < 2:
                        value = 1.0 if name == "weight" else 0.0
                        numbers = torch.full_like(weight.data, value)
                    else:
                        numbers = self._take(start, weight.numel()).view(weight.shape)
                        start += weight.numel()
                    views[id(weight)] = nn.Parameter(numbers, requires_grad=False)
                module._parameters[name] = views[id(weight)]

    def _take(self, start: int, count: int) -> torch.Tensor:
        assert start + count <= MAX_WEIGHTS, f"a model has more than {MAX_WEIGHTS} weights"
        while self._num_drawn < start + count:
            rest = self._memory[self._num_drawn : self._num_drawn + BLOCK]
            rest.copy_(self._block[: len(rest)])
            self._num_drawn += len(rest)
        return self._memory[start : start + count]


@dataclass(frozen=True, kw_only=True, slots=True)
class Twins:
    """The same model twice: for the engine, which changes it, and for `generate`."""

    model: FlashVLForConditionalGeneration
    twin: FlashVLForConditionalGeneration
    processor: FlashVLProcessor


def check_preset(preset: str | None, random_weights: bool) -> None:
    """
    Raises:
        ConfigError: only one of `preset` and `random_weights` is given.
    """
    if (preset is not None) != random_weights:
        raise ConfigError("--preset and --random-weights go together; give both or neither")


def load_twins(model: str, preset: str | None, random_weights: bool) -> Twins:
    """A trained model, or a preset with random weights, in the hardware's fastest type.

    Raises:
        CheckpointError: `model` does not exist, or cannot be loaded.
        ConfigError: the preset is unknown, or only one of `preset` and `random_weights` is given.
    """
    check_preset(preset, random_weights)
    if preset is not None:
        return build_twins(preset, RandomWeights.for_this_machine())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, second = (load_model(model, inference_dtype()).to(device) for _ in range(2))
    return Twins(model=first, twin=second, processor=load_processor(model))


def build_twins(preset: str, weights: RandomWeights) -> Twins:
    """Both models of `preset`, with the same numbers."""
    (model, processor), (twin, _) = (build_random(preset, weights) for _ in range(2))
    return Twins(model=model, twin=twin, processor=processor)


def build_random(
    preset: str, weights: RandomWeights, num_layers: int | None = None
) -> tuple[FlashVLForConditionalGeneration, FlashVLProcessor]:
    """The model of `preset` with random weights, and a processor with a small tokenizer of our own.

    The model's vocabulary keeps its size, so that its head takes the time that it takes.

    Args:
        num_layers: layers of the tower and of the LLM; None: all that the preset has.

    Raises:
        ConfigError: the preset is unknown.
    """
    config = build_config(preset)
    if num_layers is not None:
        config.vision_config.num_hidden_layers = num_layers
        text = config.text_config
        text.num_hidden_layers, text.layer_types = num_layers, text.layer_types[:num_layers]
    questions = [
        turn.question for drawn in synthetic.samples("train", 0, 200) for turn in drawn.turns
    ]
    tokenizer = train_tokenizer(questions, 400)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config.text_config.eos_token_id = tokenizer.eos_token_id
    return weights.build(config), build_processor(config, tokenizer)
