"""Keys and values of the conversations that are being answered: a row for each.

A prompt that several conversations share is held once, at the end of the memory, and their rows
hold only what follows it. The cache knows rows and lengths; which request has which row is the
scheduler's to know.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

CopiedRow = tuple[torch.Tensor, ...]
"""Keys and values of a row: (layers, key-value heads, tokens, head_dim) each."""
ROW_STEP = 64
"""Tokens by which row lengths grow: each is a multiple of this."""


class HeldPrompt:
    """Keys and values of one prompt, held for all rows that go on from it.

    `keys` and `values` have the shape of a cache of one row that is as long as the prompt.
    """

    keys: torch.Tensor
    """(layers, 1, key-value heads, num_tokens, head_dim); so are `values`."""
    values: torch.Tensor

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and the values."""
        return self.keys.nbytes + self.values.nbytes


class KVCache:
    """Memory for `num_tokens` tokens, allocated once and cut into rows of equal length.

    The scheduler chooses the length of the rows, and so their number, by `resize_rows`. The rows in
    use are the first ones, so that a batch is a slice, never a copy. Shared prompts take the end of
    the memory, and leave the rest to the rows.
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
        self.num_tokens, self.max_rows = round_up(num_tokens, ROW_STEP), max_rows
        self._num_layers, self._dtype, self._device = config.num_hidden_layers, dtype, device
        self._row_shape = (config.num_key_value_heads, head_dim(config))
        self._prompts: list[HeldPrompt] = []
        """Shared prompts, from the end of the memory on towards its beginning."""
        self.allocate()

    def allocate(self) -> None:
        """Take the memory, as one row; the constructor does so, too."""
        heads, dim = self._row_shape
        shape = (2, self._num_layers, self.num_tokens * heads * dim)
        # Zeroed, since a NaN in uninitialised memory would pass through the mask.
        self._memory = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._cut(self.num_tokens)

    def release(self) -> None:
        """Give the memory back until `allocate`; no row and no prompt may be in use."""
        self._memory = self.keys = self.values = torch.empty(0)

    @property
    def num_rows(self) -> int:
        return self.keys.shape[1]

    @property
    def row_length(self) -> int:
        return self.keys.shape[3]

    @property
    def num_bytes(self) -> int:
        """Bytes of the memory now."""
        return self._memory.nbytes

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all shared prompts."""
        return sum(prompt.num_tokens for prompt in self._prompts)

    def rows_of(self, length: int, prompt_tokens: int = 0) -> int:
        """Rows of at least `length` tokens that there is room for.

        Args:
            prompt_tokens: tokens of one more shared prompt for which room is to be left.
        """
        room = self.num_tokens - self.num_prompt_tokens - prompt_tokens
        return min(self.max_rows, max(room, 0) // round_up(length, ROW_STEP))

    def can_hold(self, prompt_tokens: int, length: int, num_rows: int) -> bool:
        """Whether an empty cache had room for a shared prompt and rows of `length` tokens."""
        room = self.num_tokens - prompt_tokens
        return num_rows <= min(self.max_rows, room // round_up(length, ROW_STEP))

    def resize_rows(self, length: int, used: Sequence[int], prompt_tokens: int = 0) -> None:
        """Cut the memory into as many rows of `length` tokens, or a little more, as have room.

        Args:
            used: tokens to keep at the beginning of each of the first rows.
            prompt_tokens: tokens of one more shared prompt for which room is left.
        """
        before, old_length = (self.keys, self.values), self.row_length
        self._cut(round_up(length, ROW_STEP), prompt_tokens)
        # Rows are moved in an order that overwrites none which is still to be moved.
        rows = range(len(used)) if self.row_length < old_length else reversed(range(len(used)))
        for row in rows:
            for old, new in zip(before, (self.keys, self.values), strict=True):
                new[:, row, :, : used[row]] = old[:, row, :, : used[row]].clone()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one row to another."""
        for store in (self.keys, self.values):
            store[:, target, :, :length] = store[:, source, :, :length]

    def copy_row(self, row: int, length: int) -> CopiedRow:
        """A copy of the first `length` tokens of a row."""
        return tuple(store[:, row, :, :length].clone() for store in (self.keys, self.values))

    def fill_row(self, row: int, copied: CopiedRow) -> None:
        """Put the tokens that were copied from a row into a row."""
        for store, copy in zip((self.keys, self.values), copied, strict=True):
            store[:, row, :, : copy.shape[2]] = copy

    def hold_prompt(self, num_tokens: int) -> HeldPrompt:
        """Memory for a prompt, for which the rows make room; those in use must not need it."""
        prompt = HeldPrompt(num_tokens)
        self._prompts.append(prompt)
        self._place(prompt, self.num_tokens - self.num_prompt_tokens)
        if self.num_rows > self.rows_of(self.row_length):
            self._cut(self.row_length)
        return prompt

    def drop_prompt(self, prompt: HeldPrompt) -> None:
        """Free a prompt's memory; the prompts before it move to its place."""
        place = self._prompts.index(prompt)
        end = self.num_tokens - sum(each.num_tokens for each in self._prompts[:place])
        del self._prompts[place]
        for each in self._prompts[place:]:
            end -= each.num_tokens
            kept = each.keys.clone(), each.values.clone()  # old and new place may overlap
            self._place(each, end)
            each.keys[:], each.values[:] = kept

    def _place(self, prompt: HeldPrompt, start: int) -> None:
        """Let a prompt be at the place of the token `start` of a memory of one row."""
        heads, dim = self._row_shape
        first, last = start * heads * dim, (start + prompt.num_tokens) * heads * dim
        used = self._memory[..., first:last]
        prompt.keys, prompt.values = used.unflatten(-1, (1, heads, prompt.num_tokens, dim))

    def _cut(self, row_length: int, prompt_tokens: int = 0) -> None:
        num_rows, (heads, dim) = self.rows_of(row_length, prompt_tokens), self._row_shape
        used = self._memory[..., : num_rows * heads * row_length * dim]
        self.keys, self.values = used.unflatten(-1, (num_rows, heads, row_length, dim))


def round_up(length: int, step: int) -> int:
    """The least multiple of `step` that is not below `length`."""
    return -(-length // step) * step


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the cache that one token takes (28,672 with Qwen2.5-1.5B in bf16)."""
    per_layer = 2 * config.num_key_value_heads * head_dim(config) * dtype.itemsize
    return config.num_hidden_layers * per_layer


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of an attention head; Llama's configuration has them, Qwen2's does not."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
