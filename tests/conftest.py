"""What tests of several parts share: one local Ray, and a model that is made on the spot."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests marked `ray`: four logical CPUs, no GPU."""
    import ray

    from flashvl.entrypoint import start_ray

    start_ray(num_cpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_random(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model of `tiny`'s shape with fewer layers and random weights.

    Its answers are gibberish that depends on the image. The weights are larger than a training
    would begin with, so that the likeliest token is so by far, in whatever batch.
    """
    import torch

    from flashvl.data.tokenizer import train_tokenizer
    from flashvl.model import (
        FlashVLForConditionalGeneration,
        FlashVLImageProcessor,
        FlashVLProcessor,
    )
    from flashvl.model.presets import build_config

    config = build_config("tiny")
    tokenizer = train_tokenizer(["Describe the image.", "a large red circle"], vocab_size=300)
    config.vision_config.num_hidden_layers = 1
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.text_config.vocab_size = len(tokenizer)

    torch.manual_seed(0)
    model = FlashVLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
        model.get_input_embeddings().weight.normal_()

    size = config.vision_config.image_size
    processor = FlashVLProcessor(
        FlashVLImageProcessor(size={"height": size, "width": size}),
        tokenizer,
        image_seq_length=config.image_seq_length,
    )
    folder = tmp_path_factory.mktemp("tiny_random")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
