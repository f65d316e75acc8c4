"""What a micro-batch leaves in memory between its forward and its backward pass.

Sizes are those of the tensors that transformers' layers (SigLIP, AIMv2, Qwen2, Llama) save for the
backward pass with PyTorch's fused attention, each counted once however many operations save it.
How such a count is made: Korthikanti et al. 2022, arXiv 2205.05198, section 4.1.
"""

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedConfig

from flashvl.engine.cache import head_dim
from flashvl.model import FlashVLConfig
from flashvl.train.flops import SWIGLU_TOWERS
from flashvl.train.recipe import MODEL_PARTS

FLOAT = 4
"""Bytes of an fp32 number: norms and losses compute in fp32 whatever the weights are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSize:
    """Size of a micro-batch: one row of packed documents."""

    num_tokens: int
    num_tiles: int
    num_labels: int
    """Tokens whose logits are computed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """What the backward pass of a part needs."""

    inputs: bool
    """The gradient passes through the part, so its non-linear operations keep their inputs."""
    weights: bool
    """Its weights, or low-rank adapters beside them, are trained, so products with them keep their
    inputs as well."""
    norms: bool
    """The weights of its norms are trained."""


def saving_of(part: str, trainable: Collection[str], has_lora: bool = False) -> Saving:
    """What the backward pass needs of a part, named as in `trainable`."""
    names = list[str](MODEL_PARTS)
    before = names[: names.index(part) + 1]
    is_trained = part in trainable
    return Saving(
        inputs=any(name in trainable for name in before),
        weights=is_trained,
        norms=is_trained and not has_lora,
    )


def activation_bytes(
    config: FlashVLConfig,
    trainable: Collection[str],
    batch: BatchSize,
    *,
    number_bytes: int,
    gradient_checkpointing: bool = False,
    has_lora: bool = False,
) -> int:
    """Bytes that are kept until the backward pass, without those of the logits.

    With gradient checkpointing, a layer keeps its input alone, and one layer at a time is computed
    again.

    Args:
        number_bytes: 2 in bf16, 4 in fp32.
    """
    vision, text = config.vision_config, config.text_config
    b = number_bytes
    patches = batch.num_tiles * (vision.image_size // vision.patch_size) ** 2
    saving = {part: saving_of(part, trainable, has_lora) for part in MODEL_PARTS}
    tower = saving["vision_tower"]
    tower_layer = patches * _tower_layer(config, tower, b)
    llm = saving["language_model"]
    llm_layer = batch.num_tokens * _text_layer(config, llm, b)
    # PyTorch turns the mask that keeps documents apart into numbers, in each layer again.
    llm_layer += batch.num_tokens**2 * b
    ends = batch.num_tokens * _rms_norm(text.hidden_size, llm, b)
    ends += batch.num_tokens**2  # the mask itself, one byte a pair
    ends += batch.num_labels * text.hidden_size * b * llm.weights
    visual_tokens = batch.num_tiles * config.image_seq_length
    ends += visual_tokens * _projector(config, saving["multi_modal_projector"], b)
    if tower.inputs:
        ends += patches * (_tower_ends(config, tower, b) + 3 * vision.patch_size**2 * b)
    if not gradient_checkpointing:
        return ends + vision.num_hidden_layers * tower_layer + text.num_hidden_layers * llm_layer
    kept = text.num_hidden_layers * batch.num_tokens * text.hidden_size * b * llm.inputs
    kept += vision.num_hidden_layers * patches * vision.hidden_size * b * tower.inputs
    return ends + kept + max(tower_layer, llm_layer)


def logits_bytes(config: FlashVLConfig, num_labels: int) -> int:
    """Bytes of the logits at the height of the loss's backward pass.

    Three fp32 numbers for each token of the vocabulary: the log-probabilities that the loss has
    saved, their gradient, and the gradient of the logits. In the forward pass there are fewer.
    """
    return 3 * FLOAT * num_labels * config.text_config.vocab_size


def _text_layer(config: FlashVLConfig, saving: Saving, b: int) -> int:
    """Bytes of a token in a layer of the LLM."""
    if not saving.inputs:
        return 0
    text = config.text_config
    queries = text.num_attention_heads * head_dim(text)
    # Queries, keys and values (repeated for each query head) and what attention returns.
    attention = 4 * queries * b + FLOAT * text.num_attention_heads
    return 2 * _rms_norm(text.hidden_size, saving, b) + attention + _swiglu(text, saving, b)


def _tower_layer(config: FlashVLConfig, saving: Saving, b: int) -> int:
    """Bytes of a patch in a layer of the tower, which is reached only where it is trained."""
    vision = config.vision_config
    if not saving.inputs:
        return 0
    width = vision.hidden_size
    attention = 4 * width * b + FLOAT * vision.num_attention_heads
    if vision.model_type in SWIGLU_TOWERS:
        return 2 * _rms_norm(width, saving, b) + attention + _swiglu(vision, saving, b)
    norms = 2 * (width * b * (1 + saving.weights) + 2 * FLOAT)
    return norms + attention + vision.intermediate_size * b * (1 + saving.weights)


def _tower_ends(config: FlashVLConfig, saving: Saving, b: int) -> int:
    """Bytes of a patch in the norms around the layers: AIMv2 has one before them as well."""
    vision = config.vision_config
    if vision.model_type in SWIGLU_TOWERS:
        return 2 * _rms_norm(vision.hidden_size, saving, b)
    return vision.hidden_size * b * (1 + saving.weights)


def _rms_norm(width: int, saving: Saving, b: int) -> int:
    """The input in fp32; for its weights the normalised input, for the next product the output."""
    if not saving.inputs:
        return 0
    return width * (FLOAT + b * saving.norms + b * saving.weights)


def _swiglu(section: PreTrainedConfig, saving: Saving, b: int) -> int:
    """The gate before and after its activation and its partner; their product for the weights."""
    return section.intermediate_size * b * (3 + saving.weights)


def _projector(config: FlashVLConfig, saving: Saving, b: int) -> int:
    """Bytes of a visual token in the adapter."""
    if not saving.inputs:
        return 0
    hidden = (config.projector_num_layers - 1) * config.projector_hidden_size
    return (config.projector_input_size + hidden) * b * (1 + saving.weights)
