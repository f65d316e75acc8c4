"""Attention within each document of a packed row, by transformers' own SDPA, one after the other.

Where transformers finds several documents in a row, its SDPA computes all pairs of their tokens and
masks those of different documents. Here, as with flash attention, they are not computed at all: the
time grows with the length of the documents, not with that of the row.

The branches of a document (see `flashvl.train.branches`) see its prompt and themselves. They are
computed side by side, padded to the longest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
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
        if branches:
            found.append(_attend_branches(module, prompt, branches, **options))
    return torch.cat(found, dim=1), None


Piece = tuple[torch.Tensor, ...]
"""Queries, keys and values of a part of a document, (1, heads, L, channels) each."""


def _attend_branches(
    module: nn.Module, prompt: Piece, branches: Sequence[Piece], **options: Any
) -> torch.Tensor:
    """Attention of all branches of a document, (1, their tokens, heads, channels).

    A branch that is shorter than others is padded at its end, which causal attention hides.
    """
    query, key, value = (_stack(tensors) for tensors in zip(*branches, strict=True))
    key, value = (
        torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=2)
        for shared, own in ((prompt[1], key), (prompt[2], value))
    )
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    mask = mask.tril(num_keys - num_queries)[None, None]
    found = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    lengths = [branch[0].shape[2] for branch in branches]
    return torch.cat([row[:length] for row, length in zip(found, lengths, strict=True)])[None]


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, heads, L, channels) each -> (branches, heads, longest L, channels)."""
    rows = [tensor[0].transpose(0, 1) for tensor in tensors]
    return pad_sequence(rows, batch_first=True).transpose(1, 2)


AttentionInterface.register(BY_DOCUMENT, attend_by_document)
