"""The LLM's attention over a `KVCache`, as one of transformers' attention implementations.

A model that is set to `CACHED` works as ever where no cache is handed to it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flashvl.engine.cache import KVCache

CACHED = "rows_of_kv_cache"
"""The implementation's name; one with `flash` in it would be looked up on the hub."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMetadata:
    """Where in the cache the tokens of a forward pass go, and what they see."""

    cache: KVCache
    rows: slice
    start: int
    """Prefill: the first token's position, the same in every row."""
    cells: tuple[torch.Tensor, torch.Tensor] | None = None
    """Decoding: (rows,) the rows' numbers and (rows,) the position of each one's token."""
    length: int = 0
    """Decoding: at least the longest row's, its new token included."""
    mask: torch.Tensor | None = None
    """Decoding: (rows, 1, 1, length), True where a row has a token. Prefill behind `start`:
    (1, 1, tokens, start + tokens), True up to each token's own position. None: causal."""


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
    """Store `key` and `value` where `metadata` says and attend to what the rows hold.

    Args:
        query: (rows, heads, tokens, head_dim).
        key, value: (rows, key-value heads, tokens, head_dim).

    Returns:
        (rows, tokens, heads, head_dim), and no weights.
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
        return _attend_one(query, keys, values, metadata, scaling), None
    end = metadata.start + query.shape[2]
    keys[:, :, metadata.start : end] = key
    values[:, :, metadata.start : end] = value
    groups = query.shape[1] // key.shape[1]
    attended = F.scaled_dot_product_attention(
        query,
        keys[:, :, :end].repeat_interleave(groups, 1),
        values[:, :, :end].repeat_interleave(groups, 1),
        attn_mask=metadata.mask,
        is_causal=metadata.mask is None,
        scale=scaling,
    )
    return attended.transpose(1, 2), None


def _attend_one(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    metadata: AttentionMetadata,
    scaling: float | None,
) -> torch.Tensor:
    """One token a row, to what the rows hold."""
    # The heads that share a key are the rows of one small matrix, so no key is copied for them.
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


AttentionInterface.register(CACHED, cached_attention)
AttentionMaskInterface.register(CACHED, sdpa_mask)
