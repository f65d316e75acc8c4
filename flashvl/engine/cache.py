"""Keys and values of the conversations that are being answered: a row for each.

It knows rows and lengths, not whose they are; the scheduler says.
"""

import torch
from transformers import PreTrainedConfig


class KVCache:
    """(layers, rows, key-value heads, row_length, head_dim) of keys, and as much of values.

    Allocated once. The rows in use are the first ones, so that a batch is a slice, never a copy.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        num_rows: int,
        row_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """`config`: the LLM's."""
        self.num_rows, self.row_length = num_rows, row_length
        shape = (
            config.num_hidden_layers,
            num_rows,
            config.num_key_value_heads,
            row_length,
            head_dim(config),
        )
        # Zeros, not whatever is there: masked scores of a NaN would still be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What one token of one conversation takes (28,672 bytes with Qwen2.5-1.5B in bf16)."""
    per_layer = 2 * config.num_key_value_heads * head_dim(config) * dtype.itemsize
    return config.num_hidden_layers * per_layer


def head_dim(config: PreTrainedConfig) -> int:
    """Of the LLM's attention; Llama's configuration names it, Qwen2's does not."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
