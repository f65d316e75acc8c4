"""Models to begin a training with: of random weights, or with tower and LLM of another model."""

from collections.abc import Iterator
from pathlib import Path

import torch

from flashvl.data import synthetic
from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import ConfigError
from flashvl.model import FlashVLForConditionalGeneration
from flashvl.model.end_tokens import build_generation_config
from flashvl.model.loading import load_model, load_processor
from flashvl.model.parts.assembly import build_processor
from flashvl.model.parts.weights import refuse_existing
from flashvl.model.presets import build_config
from flashvl.train.run.export import save_pretrained

ADAPTER = "multi_modal_projector"


def create_random(preset: str, output: Path, seed: int = 0) -> None:
    """Write a random model of `preset`, with a tokenizer of the procedural world, to `output`.

    Raises:
        ConfigError: `output` exists, or the preset is not one of the procedural world.
    """
    config = build_config(preset)
    refuse_existing(output)
    tokenizer = train_tokenizer(world_texts(), config.text_config.vocab_size)
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ConfigError(
            f"preset {preset!r} has Qwen2.5's vocabulary, which is not the procedural world's;"
            " use a preset such as tiny"
        )
    processor = build_processor(config, tokenizer)
    torch.manual_seed(seed)
    model = FlashVLForConditionalGeneration(config)
    model.generation_config = build_generation_config(config, tokenizer)
    save_pretrained(model, processor, output)


def create_variant(
    model: str | Path, preset: str, output: Path, seed: int = 0, *, keeps_adapter: bool = True
) -> None:
    """Write a model of `preset` with the tower, the LLM and the tokenizer of `model` to `output`.

    Args:
        keeps_adapter: the adapter comes from `model` too, if it has the preset's shapes; else it is
            random.

    Raises:
        CheckpointError: `model` cannot be loaded.
        ConfigError: `output` exists, or tower or LLM of the preset have other shapes.
    """
    source = load_model(model)
    config = build_config(preset)
    refuse_existing(output)
    torch.manual_seed(seed)
    variant = FlashVLForConditionalGeneration(config)
    weights, wanted = source.state_dict(), variant.state_dict()
    fitting = {
        name: weight
        for name, weight in weights.items()
        if name in wanted and weight.shape == wanted[name].shape
    }
    missing = [name for name in wanted if name not in fitting and ADAPTER not in name]
    if missing:
        raise ConfigError(
            f"preset {preset!r} and {model} have {missing[0]} of different shapes;"
            " use a preset with the model's tower and LLM"
        )
    adapter = {name for name in wanted if ADAPTER in name}
    if not (keeps_adapter and adapter <= fitting.keys()):
        fitting = {name: weight for name, weight in fitting.items() if name not in adapter}
    variant.load_state_dict(fitting, strict=False)
    tokenizer = load_processor(model).tokenizer
    processor = build_processor(config, tokenizer)
    variant.generation_config = build_generation_config(config, tokenizer)
    save_pretrained(variant, processor, output)


def world_texts() -> Iterator[str]:
    """Texts of the procedural world without the letters on signs, which stay one token each."""
    for _ in range(100):
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
    for drawn in synthetic.samples("train", seed=0, count=3000):
        texts = [drawn.scene.describe()]
        for turn in drawn.turns:
            texts += [turn.question, turn.answer]
        yield "\n".join(
            "".join(c for c in text if not c.isupper() or c in "DHWA") for text in texts
        )
