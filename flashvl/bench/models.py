"""Models to time: presets with random weights, on which timing does not depend."""

import torch
from transformers import AutoModelForImageTextToText

from flashvl.data import synthetic
from flashvl.data.tokenizer import train_tokenizer
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor
from flashvl.model.assembly import build_processor
from flashvl.model.presets import build_config


def build_random(
    preset: str, dtype: torch.dtype
) -> tuple[FlashVLForConditionalGeneration, FlashVLProcessor]:
    """The model of `preset`, its weights random, with a small tokenizer of our own.

    The vocabulary keeps its size; so the head costs what it costs.

    Raises:
        ConfigError: no such preset.
    """
    config = build_config(preset)
    questions = [
        turn.question for drawn in synthetic.samples("train", 0, 200) for turn in drawn.turns
    ]
    tokenizer = train_tokenizer(questions, 400)
    config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config.text_config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval(), build_processor(config, tokenizer)
