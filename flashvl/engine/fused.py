"""The LLM's layers with a third of the kernels, for inference on a GPU.

A decoding step is so short there that the number of its kernels decides how long it takes. Layers
of one input become one matrix, and what is computed element by element becomes one kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache

from flashvl.engine.attention import AttentionMetadata, cached_attention


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (RoFormer, equation 34) of (tokens, heads, head_dim).

    Args:
        cos, sin: (tokens, head_dim), whose halves are equal, as transformers makes them.
    """
    first, second = heads.chunk(2, -1)
    return heads * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def add_and_normalize(
    hidden: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` plus `update`, (tokens, channels), and the RMSNorm of the sum."""
    total = hidden + update
    return total, F.rms_norm(total, weight.shape, weight, eps)


def gate(both: torch.Tensor) -> torch.Tensor:
    """SwiGLU's product: (tokens, 2 * channels), the gate first -> (tokens, channels)."""
    opened, values = both.chunk(2, -1)
    return F.silu(opened) * values


class FusedLayer(nn.Module):
    """A decoder layer of Qwen2 or Llama for inference; called as transformers' own layers are."""

    def __init__(self, layer: Any):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_heads: int = self.config.num_attention_heads
        self.num_key_heads: int = self.config.num_key_value_heads
        self.num_key_value_groups = attention.num_key_value_groups
        self.is_causal = True
        self.qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out: nn.Linear = attention.o_proj
        self.gate_and_up = _join(mlp.gate_proj, mlp.up_proj)
        self.down: nn.Linear = mlp.down_proj
        self.first_norm = _fuse_norm(layer.input_layernorm)
        self.second_norm = _fuse_norm(layer.post_attention_layernorm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        metadata: AttentionMetadata | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(rows, tokens, hidden) -> the same; `metadata` is as for `cached_attention`."""
        shape = hidden_states.shape
        is_recorded = metadata is not None and metadata.is_recorded
        hidden = hidden_states.flatten(0, 1)
        projected = self.qkv(self.first_norm(hidden)).unflatten(-1, (-1, self.head_dim))
        num_rotated = self.num_heads + self.num_key_heads
        # `generate` may have one row of them for all.
        cos, sin = (each.expand(shape[0], -1, -1).flatten(0, 1) for each in position_embeddings)
        rotated = _choose(rotate, is_recorded)(projected[:, :num_rotated], cos, sin)
        query, key, value = (
            each.unflatten(0, shape[:2]).transpose(1, 2)
            for each in (
                rotated[:, : self.num_heads],
                rotated[:, self.num_heads :],
                projected[:, num_rotated:],
            )
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attended, _ = cached_attention(
            self, query, key, value, attention_mask, self.scaling, metadata, **kwargs
        )
        norm = self.second_norm
        hidden, normalized = _choose(add_and_normalize, is_recorded)(
            hidden, self.out(attended.reshape(len(hidden), -1)), norm.weight, norm.eps
        )
        gated = _choose(gate, is_recorded)(self.gate_and_up(normalized))
        return (hidden + self.down(gated)).view(shape)


def fuse_layers(language_model: Any) -> None:
    """Replace the decoder layers of a Qwen2 or Llama, which can then be used for inference alone.

    The memory of the layers' own matrices is freed, unless something else holds them.
    """
    for number, layer in enumerate(language_model.layers):
        language_model.layers[number] = FusedLayer(layer)
    language_model.norm = _fuse_norm(language_model.norm)


def _choose(function: Callable[..., Any], is_recorded: bool) -> Callable[..., Any]:
    """`function` itself, or compiled where its kernels are recorded.

    To call a compiled function takes longer than to launch its kernels one by one.
    """
    return _compile(function) if is_recorded else function


@functools.cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """What imports the compiler, for seconds; processes without a GPU do not need it."""
    return torch.compile(function, dynamic=True)


def _join(*layers: nn.Linear) -> nn.Linear:
    """One linear layer whose outputs are those of `layers`, one after the other."""
    joined = nn.Linear(1, 1, bias=layers[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(torch.cat([each.weight.detach() for each in layers]), False)
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([each.bias.detach() for each in layers]), False)
    return joined


def _fuse_norm(norm: Any) -> nn.RMSNorm:
    """torch's own RMSNorm, which is one kernel, with the weight of transformers'."""
    fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
    fused.weight = norm.weight
    return fused
