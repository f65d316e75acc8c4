"""Weights on disk: read without copies, renamed and checked, written whole or not at all.

read_weights -> rename_weights -> save_model
"""

import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open

from flashvl.errors import CheckpointError, ConfigError, one_line
from flashvl.model.checks import read_json
from flashvl.model.configuration_flashvl import FlashVLConfig
from flashvl.model.modeling_flashvl import FlashVLForConditionalGeneration
from flashvl.model.processing_flashvl import FlashVLProcessor

AIMV2_NAMES = {
    "embeddings.patch_embed": "preprocessor.patchifier.proj",
    "embeddings.rms_norm": "preprocessor.patchifier.norm",
    "embeddings.position_embedding.weight": "preprocessor.pos_embed",
    "encoder.layers": "trunk.blocks",
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.out_proj": "attn.proj",
    "rms_norm1": "norm_1",
    "rms_norm2": "norm_2",
    "ffn.gate_proj": "mlp.fc1",
    "ffn.down_proj": "mlp.fc2",
    "ffn.up_proj": "mlp.fc3",
    "rms_norm.": "trunk.post_trunk_norm.",  # the last norm; the others are renamed by now
}
"""transformers' names in AIMv2's weights -> names of Apple's code, to be replaced in this order."""


BUFFERS = re.compile(r"(^|\.)(position_ids|inv_freq|cos_cached|sin_cached)$")
"""Buffers that older transformers stored with the weights, and that a model computes itself."""


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of `model.safetensors`, or of the shards in its index.

    Files are mapped, not read: the system loads a page when it is used, and may drop it again.

    Raises:
        CheckpointError: a file is missing or broken, or lacks a tensor that the index names.
    """
    index = folder / "model.safetensors.index.json"
    places: dict[str, str] = {}
    files = ["model.safetensors"]
    if index.is_file():
        places = read_json(index).get("weight_map", {})
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
            raise CheckpointError(f"{index}: its weight_map must name files; download it anew")
        files = sorted(set(places.values()))
    weights: dict[str, torch.Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, "pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # a broken header makes safetensors raise nearly anything
            raise CheckpointError(
                f"{folder / name} cannot be read: {one_line(error)}; download it anew"
            ) from None
    for key, name in places.items():
        if key not in weights:
            raise CheckpointError(
                f"{folder / name} lacks {key}, which the index names; download the folder anew"
            )
    return weights


def rename_weights(
    folder: Path,
    stored: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    stored_name: Callable[[str], str],
) -> dict[str, torch.Tensor]:
    """The weights `stored`, each checked, under the names of `wanted`; views, not copies.

    `BUFFERS` are dropped. Apple's fused attn.qkv, (3 * C, C), is split into q, k and v, and its
    pos_embed, (1, S, C), becomes an embedding's weight.

    Args:
        folder: folder of `stored`, for errors.
        wanted: the weights of the model, on the meta device.
        stored_name: name of a weight in `wanted` -> its name in `stored`.

    Raises:
        CheckpointError: a weight is missing, unknown, misshapen or of whole numbers.
    """
    weights: dict[str, torch.Tensor] = {}
    unknown = {name for name in stored if not BUFFERS.search(name)}
    for name, weight in wanted.items():
        source, shape = stored_name(name), tuple(weight.shape)
        if source not in stored:
            raise CheckpointError(f"{folder} lacks the weight {source}; download it anew")
        is_fused, is_position = source.endswith(".attn.qkv.weight"), source.endswith(".pos_embed")
        if is_fused:
            shape = (3 * shape[0], *shape[1:])
        elif is_position:
            shape = (1, *shape)
        tensor = stored[source]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{folder}: {source} has shape {tuple(tensor.shape)}, not {shape} as its"
                " config.json says; correct that, or download the weights anew"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{folder}: {source} holds {str(tensor.dtype).removeprefix('torch.')} numbers;"
                " use weights that are not quantised"
            )
        if is_fused:
            tensor = tensor.chunk(3)["qkv".index(name.removesuffix("_proj.weight")[-1])]
        weights[name] = tensor[0] if is_position else tensor
        unknown.discard(source)
    if unknown:
        raise CheckpointError(
            f"{folder} holds {len(unknown)} unknown weights, such as {min(unknown)};"
            " name a folder of a supported model"
        )
    return weights


def apple_name(name: str) -> str:
    """transformers' name of a weight of AIMv2 -> Apple's name."""
    for ours, theirs in AIMV2_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def build_empty(config: FlashVLConfig) -> FlashVLForConditionalGeneration:
    """A model on the meta device, which `save_model` fills with weights."""
    with torch.device("meta"):
        return FlashVLForConditionalGeneration(config)


def save_model(
    model: FlashVLForConditionalGeneration,
    weights: dict[str, torch.Tensor],
    processor: FlashVLProcessor,
    output: Path,
) -> None:
    """Fill `model` with `weights` and write it with its processor to the new folder `output`.

    The weights are neither copied nor cast, so those that are mapped from files stay mapped.

    Args:
        weights: all weights of the model; a tied head may be left out.
    """
    if model.config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["model.language_model.embed_tokens.weight"]}
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    with _new_folder(output) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)


def refuse_existing(output: Path) -> None:
    """Raise ConfigError if `output` exists."""
    if output.exists():
        raise ConfigError(f"{output} exists; name a new folder or remove it")


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which is renamed to `output` at the end, or removed after an error."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.parent / f".{output.name}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()  # tempfile's folders can be read by their owner only
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror}; name another folder"
        ) from None
    try:
        yield partial
        try:
            partial.rename(output)
        except OSError:
            refuse_existing(output)  # another process came first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
