"""Floating-point operations of a training row, which packing balances and MFU is measured by.

A multiplication and its addition are two operations. Only products of matrices are counted, as
usual for MFU: norms, activations and the optimizer take under one percent of them. Padding, a
checkpoint's recomputation and the dummy image of a batch without images are no useful work, and
enter none of these numbers unless asked for.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flashvl.engine.cache import head_dim
from flashvl.model import FlashVLConfig

PARTS = (
    "patch_embedding",
    "vision_tower",
    "multi_modal_projector",
    "language_model",
    "lm_head",
)
"""Parts of the model in the order in which a row passes through them; the first belongs to the
tower, the last to the language model."""
OWNERS = {"patch_embedding": "vision_tower", "lm_head": "language_model"}
"""Names by which `trainable` means parts of another name."""
SWIGLU_TOWERS = {"aimv2_vision_model": 3}
"""Matrices of a block's MLP, for the towers that do not have the usual two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartFlops:
    """Operations of a part's forward pass."""

    linear: float
    """Products with weights; the backward pass takes as many for the gradients of the inputs, and
    as many again for those of the weights."""
    attention: float = 0.0
    """Products of queries with keys, and of their weights with values. Neither factor is a
    parameter: the backward pass takes twice as many, whether the part is trained or not."""
    recomputed: float = 0.0
    """Operations that gradient checkpointing repeats in the backward pass: all of each layer but
    the product with its last matrix, which nothing needs again (torch stops before it)."""

    @property
    def total(self) -> float:
        return self.linear + self.attention


def forward_flops(
    config: FlashVLConfig,
    num_tokens: float,
    num_tiles: float,
    num_labels: float | None = None,
    branches: Sequence[float] = (),
) -> dict[str, PartFlops]:
    """Operations of the forward pass of one row, for each of `PARTS`.

    With T tiles of S patches of p pixels a side, a tower of width d, L layers and m matrices of
    width f in its MLP, these are (Kaplan et al. 2020, arXiv 2001.08361, Table 1, with attention):

        patch_embedding        T 2 S 3 p^2 d
        vision_tower           T 2 S L (4 d^2 + m d f) + T L 4 S^2 d
        multi_modal_projector  2 T V sum(inputs x outputs), V visual tokens a tile
        language_model         2 N L (2 d h + 2 d k + 3 d f) + L 2 N^2 h
        lm_head                2 num_labels d vocabulary

    N tokens attend to those before them alone, half of the N^2 pairs; h is the width of all query
    heads together, k that of the key heads. Tokens of different branches do not attend to each
    other: with branches of n tokens, N^2 is less by (sum of n)^2 - sum of n^2.

    Args:
        num_tokens: tokens of the row, with those of its tiles and its branches.
        num_labels: tokens whose logits are computed; None: every token that is not a tile's.
        branches: tokens of each branch.
    """
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    width = vision.hidden_size
    matrices = SWIGLU_TOWERS.get(vision.model_type, 2)
    block = 4 * width**2 + matrices * width * vision.intermediate_size
    layers = vision.num_hidden_layers
    pixels = 3 * vision.patch_size**2
    visual_tokens = num_tiles * config.image_seq_length
    if num_labels is None:
        num_labels = num_tokens - visual_tokens
    pairs = num_tokens**2 - sum(branches) ** 2 + sum(length**2 for length in branches)
    return {
        "patch_embedding": PartFlops(linear=2 * num_tiles * patches * pixels * width),
        "vision_tower": _layers(
            2 * num_tiles * patches * layers,
            weights=block,
            last=width * vision.intermediate_size,
            attention=num_tiles * layers * 4 * patches**2 * width,
        ),
        "multi_modal_projector": PartFlops(linear=2 * visual_tokens * _projector_weights(config)),
        "language_model": _layers(
            2 * num_tokens * text.num_hidden_layers,
            weights=_text_block_weights(config),
            last=text.hidden_size * text.intermediate_size,
            attention=text.num_hidden_layers * 2 * pairs * _query_width(config),
        ),
        "lm_head": PartFlops(linear=2 * num_labels * text.hidden_size * text.vocab_size),
    }


def row_flops(
    config: FlashVLConfig, num_tokens: float, num_tiles: float, branches: Sequence[float] = ()
) -> float:
    """Operations of the forward pass of one row, whose logits are those of all its text."""
    parts = forward_flops(config, num_tokens, num_tiles, branches=branches)
    return sum(part.total for part in parts.values())


def training_flops(
    config: FlashVLConfig,
    trainable: Collection[str],
    num_tokens: float,
    num_tiles: float,
    gradient_checkpointing: bool = False,
    *,
    num_labels: float | None = None,
    branches: Sequence[float] = (),
    has_lora: bool = False,
    has_reference: bool = False,
) -> float:
    """Operations of the forward and the backward pass of one row.

    The gradient goes back to the first part in `trainable`, through every part after it. A part
    that it reaches costs its forward pass once more for the gradients of its inputs, if these are
    not the pixels, and once more for those of its weights, if they are trained.

    Args:
        trainable: parts that are trained; the head is trained with `language_model`.
        gradient_checkpointing: count the second forward pass of the tower's and the LLM's layers
            that the gradient reaches. MFU leaves it out, as it is no useful work.
        has_lora: whether low-rank adapters are trained in place of the parts' weights; their own
            operations are too few to count.
        has_reference: whether a frozen model computes the row as well, forward alone. It shares the
            output of a tower that is not trained.
    """
    total = 0.0
    is_reached = False
    parts = forward_flops(config, num_tokens, num_tiles, num_labels, branches)
    for name, part in parts.items():
        is_shared = OWNERS.get(name, name) == "vision_tower" and "vision_tower" not in trainable
        if has_reference and not is_shared:
            total += part.total
        is_trained = OWNERS.get(name, name) in trainable
        is_reached = is_reached or is_trained
        total += part.total
        if not is_reached:
            continue
        gradients = (name != "patch_embedding") + (is_trained and not has_lora)
        total += part.linear * gradients + 2 * part.attention
        if gradient_checkpointing:
            total += part.recomputed
    return total


def _layers(uses: float, *, weights: int, last: int, attention: float) -> PartFlops:
    """Layers whose matrices have `weights` elements, the last of them `last`."""
    return PartFlops(
        linear=uses * weights, attention=attention, recomputed=uses * (weights - last) + attention
    )


def _projector_weights(config: FlashVLConfig) -> int:
    hidden = [config.projector_hidden_size] * (config.projector_num_layers - 1)
    sizes = [config.projector_input_size, *hidden, config.text_config.hidden_size]
    return sum(sizes[i] * sizes[i + 1] for i in range(len(sizes) - 1))


def _query_width(config: FlashVLConfig) -> int:
    text = config.text_config
    return text.num_attention_heads * head_dim(text)


def _text_block_weights(config: FlashVLConfig) -> int:
    """Weights of the matrices of one layer of the LLM (SwiGLU, grouped-query attention)."""
    text = config.text_config
    queries = _query_width(config)
    keys = queries // text.num_attention_heads * text.num_key_value_heads
    mlp = 3 * text.hidden_size * text.intermediate_size
    return text.hidden_size * (2 * queries + 2 * keys) + mlp
