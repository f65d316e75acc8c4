"""A checkpoint of random weights, where training from nothing begins."""

from collections.abc import Iterator
from pathlib import Path

import torch

from flashvl.data import synthetic
from flashvl.data.tokenizer import train_tokenizer
from flashvl.errors import ConfigError
from flashvl.model import FlashVLForConditionalGeneration, FlashVLImageProcessor, FlashVLProcessor
from flashvl.model.presets import build_config
from flashvl.train.checkpoint import save_pretrained

SIGN_LETTERS = set(synthetic.LETTERS) - set("DHW")
"""Left out of the tokenizer's texts, but for those that begin a question."""


def create_random(preset: str, output: Path, seed: int = 0) -> None:
    """Write a random model of `preset` with a tokenizer for the procedural world to `output`.

    Raises:
        ConfigError: `output` exists, or the preset's vocabulary is not a small one of its own.
    """
    config = build_config(preset)
    if output.exists():
        raise ConfigError(f"{output} exists; name a new folder or remove it")
    tokenizer = train_tokenizer(world_texts(), config.text_config.vocab_size)
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id:
        raise ConfigError(
            f"preset {preset!r} has Qwen2.5's vocabulary, which cannot be made from nothing;"
            " use a preset of the procedural world (tiny)"
        )
    side = config.vision_config.image_size
    image_processor = FlashVLImageProcessor(size={"height": side, "width": side})
    processor = FlashVLProcessor(image_processor, tokenizer, config.image_seq_length)
    torch.manual_seed(seed)
    save_pretrained(FlashVLForConditionalGeneration(config), processor, output)


def world_texts() -> Iterator[str]:
    """The words of the procedural world; no sign's letters, which are to stay one token each."""
    for _ in range(100):
        yield "system\nYou are a helpful assistant.\nuser\nassistant\n"
    for drawn in synthetic.samples("train", seed=0, count=3000):
        texts = [drawn.scene.describe()]
        for turn in drawn.turns:
            texts += [turn.question, turn.answer]
        yield "\n".join(
            "".join(c for c in text if not c.isupper() or c in "DHWA") for text in texts
        )
