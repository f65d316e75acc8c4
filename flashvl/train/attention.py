"""Attention within each document of a packed row, by transformers' own SDPA, one after the other.

Where transformers finds several documents in a row, its SDPA computes all pairs of their tokens and
masks those of different documents. Here, as with flash attention, they are not computed at all: the
time grows with the length of the documents, not with that of the row.
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
    document_lengths: Sequence[int],
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one row, (1, heads, L, channels) each, to (1, L, heads, channels).

    Args:
        document_lengths: tokens of each document; the model hands its own argument of this name on.
    """
    split = (each.split(list(document_lengths), dim=2) for each in (query, key, value))
    found = [
        sdpa_attention_forward(module, *document, None, **options)[0]
        for document in zip(*split, strict=True)
    ]
    return torch.cat(found, dim=1), None


AttentionInterface.register(BY_DOCUMENT, attend_by_document)
