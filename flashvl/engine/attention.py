"""The LLM's attention over a `KVCache`, as one of transformers' attention implementations.

A model set to `CACHED` works as before where it is called without `metadata`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flashvl.engine.cache import HeldPrompt, KVCache

CACHED = "rows_of_kv_cache"
"""Name of the implementation; transformers would look for one with `flash` in it on the hub."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptGroup:
    """Rows that go on from one shared prompt."""

    prompt: HeldPrompt
    rows: slice | torch.Tensor
    """Numbers of the rows; a slice where they are neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """Where the tokens of a forward pass are stored in the cache, and what they attend to."""

    cache: KVCache | HeldPrompt
    rows: slice
    """Rows of the cache that the pass works on."""
    start: int
    """Prefill: position of the first token, the same in every row."""
    cells: tuple[torch.Tensor, torch.Tensor] | None = None
    """Decoding: (rows,) row numbers and (rows,) positions of the new tokens. None: prefill."""
    length: int = 0
    """Decoding: positions to attend to, at least those of the longest row with its new token."""
    mask: torch.Tensor | None = None
    """What is added to the scores: 0, or -inf where a token must not be seen. Decoding: (rows, 1,
    1, length). Prefill from a `start` above 0: (1, 1, tokens, start + tokens). None: causal."""
    groups: tuple[PromptGroup, ...] = ()
    """Decoding: the shared prompts to which rows attend as well, besides their own tokens."""
    is_recorded: bool = False
    """Whether the pass is recorded as a CUDA graph."""


def cached_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    metadata: AttentionMetadata | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Store `key` and `value` in the cache, as `metadata` says, and attend to what the rows hold.

    Args:
        query: (rows, heads, tokens, head_dim).
        key, value: (rows, key-value heads, tokens, head_dim).

    Returns:
        (rows, tokens, heads, head_dim), and None for the attention weights.
    """
    if metadata is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys = metadata.cache.keys[layer, metadata.rows]
    values = metadata.cache.values[layer, metadata.rows]
    if metadata.cells is not None:
        rows, positions = metadata.cells
        keys[rows, :, positions] = key[:, :, 0]
        values[rows, :, positions] = value[:, :, 0]
        if metadata.groups:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return _attend_with_prompts(query, keys, values, metadata, layer, scale), None
        return _attend_one(query, keys, values, metadata, scaling), None
    end = metadata.start + query.shape[2]
    keys[:, :, metadata.start : end] = key
    values[:, :, metadata.start : end] = value
    attended = F.scaled_dot_product_attention(
        query,
        keys[:, :, :end],
        values[:, :, :end],
        attn_mask=metadata.mask,
        is_causal=metadata.mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return attended.transpose(1, 2), None


def _attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    metadata: AttentionMetadata,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of one token in each row to all that the row holds."""
    # The heads that share a key become the rows of one small matrix, so that no key is copied.
    num_rows, heads, _, head_dim = query.shape
    grouped = query.view(num_rows, keys.shape[1], heads // keys.shape[1], head_dim)
    attended = F.scaled_dot_product_attention(
        grouped,
        keys[:, :, : metadata.length],
        values[:, :, : metadata.length],
        attn_mask=metadata.mask,
        scale=scaling,
    )
    return attended.reshape(num_rows, 1, heads, head_dim)


def _attend_with_prompts(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    metadata: AttentionMetadata,
    layer: int,
    scaling: float,
) -> torch.Tensor:
    """Attention of one token in each row to all that the row holds, and to the prompt it shares.

    Both are computed alone, and weighted by the sums of their exponentials. All rows of a prompt
    are one matrix for each of its heads, so that its keys and values are read once.
    """
    num_rows, heads, _, head_dim = query.shape
    length, key_heads = metadata.length, keys.shape[1]
    grouped = query.view(num_rows, key_heads, heads // key_heads, head_dim)
    attended, sums = attend_with_sums(
        grouped, keys[:, :, :length], values[:, :, :length], metadata.mask, scaling
    )
    for group in metadata.groups:
        asked = grouped[group.rows].transpose(0, 1)
        to_prompt, prompt_sums = attend_with_sums(
            asked.reshape(1, key_heads, -1, head_dim),
            group.prompt.keys[layer],
            group.prompt.values[layer],
            None,
            scaling,
        )
        to_prompt = to_prompt.view(asked.shape).transpose(0, 1)
        prompt_sums = prompt_sums.view(asked.shape[:-1]).transpose(0, 1)
        own_share = (sums[group.rows] - prompt_sums).sigmoid()[..., None]
        to_own = attended[group.rows]
        attended[group.rows] = (to_prompt + own_share * (to_own - to_prompt)).to(attended.dtype)
    return attended.reshape(num_rows, 1, heads, head_dim)


def attend_with_sums(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the logarithm of the sum of the exponentials that it was divided by.

    Args:
        query: (rows, heads, queries, head_dim).
        keys, values: (rows, heads, tokens, head_dim).
        mask: what is added to the scores, of their type, and as many dimensions; None: nothing.

    Returns:
        (rows, heads, queries, head_dim) and, in fp32, (rows, heads, queries).
    """
    if query.device.type == "cpu":
        # What `scaled_dot_product_attention` calls here; it does not hand the sums on.
        found: tuple[torch.Tensor, torch.Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, attn_mask=mask, scale=scaling
            )
        )
        return found
    return attend_plainly(query, keys, values, mask, scaling)


def attend_plainly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_with_sums` by two matrix products in fp32, on any device."""
    scores = query.float() @ keys.float().mT * scaling
    if mask is not None:
        scores = scores + mask
    attended = scores.softmax(-1) @ values.float()
    return attended.to(query.dtype), scores.logsumexp(-1)


AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, sdpa_mask)
