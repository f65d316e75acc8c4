"""Keys and values of the conversations that are being answered: a row for each.

It knows rows and lengths; which request has which row is the scheduler's to know.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

ROW_STEP = 64
"""Tokens by which row lengths grow: each is a multiple of this."""


class KVCache:
    """Memory for `num_tokens` tokens, allocated once and cut into rows of equal length.

    The scheduler chooses the length of the rows, and so their number, by `resize_rows`. The rows in
    use are the first ones, so that a batch is a slice, never a copy.
    """

    keys: torch.Tensor
    """(layers, rows, key-value heads, row_length, head_dim); so are `values`."""
    values: torch.Tensor

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_tokens: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """
        Args:
            config: the LLM's configuration.
            num_tokens: tokens in all rows together, rounded up to a multiple of `ROW_STEP`.
            max_rows: rows at most, however short they are.
        """
        self.num_tokens, self.max_rows = _round_up(num_tokens), max_rows
        self._row_shape = (config.num_key_value_heads, head_dim(config))
        layer_size = self.num_tokens * config.num_key_value_heads * head_dim(config)
        # Zeroed, since a NaN in uninitialised memory would pass through the mask.
        self._memory = torch.zeros(
            2, config.num_hidden_layers, layer_size, dtype=dtype, device=device
        )
        self._cut(self.num_tokens)

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def row_length(self) -> int:
        return self.keys.shape[3]

    def rows_of(self, length: int) -> int:
        """Rows of at least `length` tokens that there is room for."""
        return min(self.max_rows, self.num_tokens // _round_up(length))

    def resize_rows(self, length: int, used: Sequence[int]) -> None:
        """Cut the memory into `rows_of(length)` rows of `length` tokens, or a little more.

        Args:
            used: tokens to keep at the beginning of each of the first rows.
        """
        before, old_length = (self.keys, self.values), self.row_length
        self._cut(_round_up(length))
        # Rows are moved in an order that overwrites none which is still to be moved.
        rows = range(len(used)) if self.row_length < old_length else reversed(range(len(used)))
        for row in rows:
            for old, new in zip(before, (self.keys, self.values), strict=True):
                new[:, row, :, : used[row]] = old[:, row, :, : used[row]].clone()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]

    def _cut(self, row_length: int) -> None:
        num_rows, (heads, dim) = self.rows_of(row_length), self._row_shape
        used = self._memory[..., : num_rows * heads * row_length * dim]
        self.keys, self.values = used.unflatten(-1, (num_rows, heads, row_length, dim))


def _round_up(length: int) -> int:
    return -(-length // ROW_STEP) * ROW_STEP


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the cache that one token takes (28,672 with Qwen2.5-1.5B in bf16)."""
    per_layer = 2 * config.num_key_value_heads * head_dim(config) * dtype.itemsize
    return config.num_hidden_layers * per_layer


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of an attention head; Llama's configuration has them, Qwen2's does not."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
