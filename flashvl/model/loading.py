"""Loads a model and its processor from a folder or by a shipped name."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from flashvl.errors import CheckpointError, one_line
from flashvl.model.checks import check_shapes, check_sizes, shorten
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.end_tokens import end_at, find_end_token
from flashvl.model.modeling_flashvl import FlashVLForConditionalGeneration
from flashvl.model.processing_flashvl import FlashVLProcessor

SHIPPED = Path(__file__).parent.parent / "checkpoints"
"""Folder of the checkpoints inside the package; their folder names are the shipped names."""


def resolve_checkpoint(model: str | Path) -> Path:
    """The folder of `model`, which is a shipped checkpoint's name or a path.

    Published checkpoints are refused: `parts.prepare.prepare_model` converts them at entry points.

    Raises:
        CheckpointError: the folder does not exist, or holds no Flash-VL model.
    """
    shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
    folder = SHIPPED / model if str(model) in shipped else Path(model)
    remedy = (
        "name a Flash-VL folder (`flashvl import` makes one of a published checkpoint) or a shipped"
        f" model ({', '.join(shipped)})"
    )
    if not folder.is_dir():
        raise CheckpointError(f"no model folder {str(model)!r}; {remedy}")
    try:
        values = json.loads((folder / "config.json").read_text())
        model_type = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{folder} has no readable config.json; {remedy}") from None
    if is_published(model_type):
        raise CheckpointError(
            f"{folder} holds a published checkpoint; run `flashvl import {folder} --output DIR`,"
            " then name the folder DIR"
        )
    if model_type != FlashVLConfig.model_type:
        raise CheckpointError(
            f"{folder} holds a {shorten(model_type)} model, not {FlashVLConfig.model_type!r};"
            f" {remedy}"
        )
    check_sizes(folder, values)
    return folder


def is_published(model_type: Any) -> bool:
    """Whether a config.json of this `model_type` belongs to a published FlashVL/* checkpoint.

    `FlashVLStaticConfig` and `FlashVLDynamicISSConfig` are known; the Dynamic model's is not, so
    only the beginning that they share is compared.
    """
    return isinstance(model_type, str) and model_type.startswith("FlashVL")


def load_processor(model: str | Path) -> FlashVLProcessor:
    """The processor of a model, given as a shipped name or a folder.

    Raises:
        CheckpointError: as in `resolve_checkpoint`; or the processor is incomplete, broken, or
            contradicts the model's config.json.
    """
    folder = resolve_checkpoint(model)
    for name in ("processor_config.json", "tokenizer.json"):
        if not (folder / name).is_file():  # transformers would make an empty tokenizer
            raise CheckpointError(
                f"{folder} has no {name}, so no usable processor; save the folder anew"
            )
    try:
        processor = AutoProcessor.from_pretrained(folder)
        config = FlashVLConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder} has no usable processor: {one_line(error)}") from error
    for name, ours, wanted in (
        ("image_token_id", processor.image_token_id, config.image_token_id),
        ("image_seq_length", processor.image_seq_length, config.image_seq_length),
        ("tiling", processor.image_processor.tiling_rule, config.tiling_rule),
    ):
        if ours != wanted:
            raise CheckpointError(
                f"{folder}: its processor has {name}={ours}, its config.json {wanted};"
                " save the folder anew"
            )
    return processor


def load_model(
    model: str | Path, dtype: torch.dtype = torch.float32
) -> FlashVLForConditionalGeneration:
    """The model, in evaluation mode on the CPU; every weight comes from the folder.

    The chat template's end token is the first one of its `generation_config`, even if the folder
    does not say so.

    Raises:
        CheckpointError: as in `resolve_checkpoint`; or a weight is missing, unknown or misshapen.
    """
    folder = resolve_checkpoint(model)
    try:
        loaded, report = FlashVLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            name = sorted(map(str, report[problem]))[0]
            raise CheckpointError(
                f"{folder}: {problem.replace('_keys', '')} weight {name}; save the folder anew"
            )
    check_shapes(folder, loaded.config)
    end_token = find_end_token(folder, loaded.config.text_config.model_type)
    if end_token is not None:
        ends = loaded.generation_config.eos_token_id
        loaded.generation_config.eos_token_id = end_at(end_token, ends)
    return loaded.eval()


def inference_dtype() -> torch.dtype:
    """bf16 if the hardware multiplies it (a GPU, a CPU with AMX or AVX512-BF16), else fp32.

    A CPU that must emulate bf16 is several times slower with it than with fp32.
    """
    if torch.cuda.is_available():
        return torch.bfloat16
    has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def model_id(model: str | Path) -> str:
    """The name by which clients ask for a model: its shipped name, or that of its folder."""
    return Path(model).name


def hash_folder(folder: Path, has_weights: bool = True) -> str:
    """A hash of the names and contents of the files in a model's folder.

    Args:
        has_weights: whether the weights count; without them, models have the same hash if they make
            the same prompts.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not has_weights:
        files = [path for path in files if ".safetensors" not in path.suffixes]
    return _hash_files(
        tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    )


@functools.lru_cache(maxsize=4)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash, kept for the next call: hashing the weights of a 2B model takes seconds."""
    whole = hashlib.blake2b(digest_size=16)
    for path, _, _ in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").digest()
        whole.update(path.name.encode() + digest)
    return whole.hexdigest()
