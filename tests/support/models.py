"""Models with random weights, whose answers are gibberish that depends on the image."""

from pathlib import Path

import torch

from flashvl.data.tokenizer import train_tokenizer
from flashvl.model import FlashVLForConditionalGeneration
from flashvl.model.parts.assembly import build_processor
from flashvl.model.presets import build_config


def write_random(preset: str, folder: Path) -> Path:
    """A model of the preset's shape with fewer layers; with the weights that training begins with,
    it would repeat its last token whatever it sees."""
    config = build_config(preset)
    tokenizer = train_tokenizer(["Describe the image.", "a large red circle"], vocab_size=300)
    config.vision_config.num_hidden_layers = 1
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.vocab_size = len(tokenizer)

    torch.manual_seed(0)
    model = FlashVLForConditionalGeneration(config)
    # What a layer adds is to outweigh what a token is, and the image what the prompt says.
    gains = {"embed_tokens": 0.1, "o_proj": 16.0, "down_proj": 16.0, "projector.linear_3": 16.0}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                gain = next((gain for part, gain in gains.items() if part in name), 1.0)
                weight.normal_(std=gain if "embed" in name else gain * weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    build_processor(config, tokenizer).save_pretrained(folder)
    return folder


def draw_weights(model: FlashVLForConditionalGeneration) -> None:
    """Weights under which short answers differ from image to image; no image token is chosen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=(3 / weight[0].numel()) ** 0.5)
        model.get_input_embeddings().weight[model.config.image_token_id] = 0
