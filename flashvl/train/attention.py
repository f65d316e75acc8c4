"""Attention within each document of a packed row, by transformers' own SDPA, one after the other.

Where transformers finds several documents in a row, its SDPA computes all pairs of their tokens and
masks those of different documents. Here, as with flash attention, they are not computed at all: the
time grows with the length of the documents, not with that of the row.

The branches of a document (see `flashvl.train.branches`) see its prompt and themselves, and are
computed one after the other as well: padded to the longest and computed side by side, two or 24 of
them take as long on a CPU if they are alike, and up to 1.8 times as long if they are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BY_DOCUMENT = "sdpa_by_document"
"""Name of this attention in transformers, as `set_attn_implementation` takes it. A name for which
transformers knows no mask gets none."""


def attend_by_document(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    document_parts: Sequence[Sequence[int]],
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one row, (1, heads, L, channels) each, to (1, L, heads, channels).

    Args:
        document_parts: for each document, tokens of its prompt and of each of its branches; the
            model hands its own argument of this name on.
    """
    lengths = [length for parts in document_parts for length in parts]
    split = (each.split(lengths, dim=2) for each in (query, key, value))
    pieces = list(zip(*split, strict=True))
    found, place = [], 0
    for parts in document_parts:
        prompt, *branches = pieces[place : place + len(parts)]
        place += len(parts)
        found.append(sdpa_attention_forward(module, *prompt, None, **options)[0])
        found += [_attend_branch(module, prompt, branch, **options) for branch in branches]
    return torch.cat(found, dim=1), None


Piece = tuple[torch.Tensor, ...]
"""Queries, keys and values of a part of a document, (1, heads, L, channels) each."""


def _attend_branch(module: nn.Module, prompt: Piece, branch: Piece, **options: Any) -> torch.Tensor:
    """Attention of a branch to its prompt and itself, (1, L, heads, channels)."""
    query = branch[0]
    key, value = (torch.cat(pair, dim=2) for pair in zip(prompt[1:], branch[1:], strict=True))
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    mask = mask.tril(num_keys - num_queries)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


AttentionInterface.register(BY_DOCUMENT, attend_by_document)
