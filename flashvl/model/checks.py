"""Checks a folder's settings before a model is built from them, with errors of one line.

The libraries would fail with a traceback, at the first question, or after hours of building layers.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvl.errors import CheckpointError, FlashVLError, one_line
from flashvl.model.configuration_flashvl import FlashVLConfig

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_channels",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "image_size",
    "patch_size",
    "projector_hidden_size",
    "projector_num_layers",
)
MAX_SIZES = {"num_hidden_layers": 1000, "projector_num_layers": 1000}
"""Bounds far above any model's; each layer takes a millisecond to build. Other sizes need no bound:
if too large they do not fit the weights, which shows at once."""


def check_sizes(folder: Path, values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise CheckpointError if a size in a config.json, or in a section of it, is impossible."""
    for key in SIZES:
        size, most = values.get(key), MAX_SIZES.get(key)
        if size is None:
            continue
        if type(size) is not int or size < 1 or (most is not None and size > most):
            limit = "1 or more" if most is None else f"1 to {most}"
            raise CheckpointError(
                f"{folder}: config.json has {prefix}{key} {shorten(size)}; it must be a whole"
                f" number of {limit}"
            )
    for section in ("vision_config", "text_config", "llm_config"):
        if isinstance(values.get(section), dict):
            check_sizes(folder, values[section], f"{section}.")


def check_shapes(folder: Path, config: FlashVLConfig) -> None:
    """Raise CheckpointError if a model of `config` could be built, but not used."""
    vision, text = config.vision_config, config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size / text.num_attention_heads
    side = config.tiling_rule.kept_patches
    for is_wrong, problem in (
        (
            vision.hidden_size % vision.num_attention_heads,
            f"the tower's num_attention_heads ({vision.num_attention_heads}) does not divide its"
            f" hidden_size ({vision.hidden_size})",
        ),
        (
            head_dim % 2,
            f"the LLM's heads have {head_dim:g} channels (hidden_size {text.hidden_size},"
            f" num_attention_heads {text.num_attention_heads}), which is not an even number",
        ),
        (
            text.num_attention_heads % text.num_key_value_heads,
            f"the LLM's num_key_value_heads ({text.num_key_value_heads}) does not divide its"
            f" num_attention_heads ({text.num_attention_heads})",
        ),
        (
            side * config.downsample_ratio % 1,
            f"a tile has a grid of {side}x{side} patches, whose side pixel shuffle cannot halve",
        ),
        (
            not 0 <= config.image_token_id < text.vocab_size,
            f"the image's placeholder has the id {config.image_token_id}, but the LLM's vocabulary"
            f" ends at {text.vocab_size - 1}",
        ),
    ):
        if is_wrong:
            raise CheckpointError(f"{folder}: {problem}; correct its config.json")


@contextmanager
def usable(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise about `what`, a broken file, into a CheckpointError."""
    try:
        yield
    except (FlashVLError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{what} is not usable: {one_line(error)}") from error


def shorten(value: Any) -> str:
    """A value from a file, in ASCII and at most 80 characters, for an error's line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, or does not hold an object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a readable JSON object; download the folder anew")
    return content
