"""Time in which the engine samples completions: a rough figure, from what decoding must read."""

from flashvl.engine.cache import head_dim
from flashvl.model import FlashVLConfig
from flashvl.train.flops import forward_flops
from flashvl.train.plan.gpus import Gpu
from flashvl.train.plan.row_sizes import RowSize

NUMBER_BYTES = 2
"""Bytes of a weight, or of a number in the cache, in bf16."""
DECODE_SHARE = 0.5
"""Share of the GPU's memory bandwidth that decoding reaches, taken for granted."""


def rollout_seconds(
    config: FlashVLConfig, row: RowSize, num_rows: int, gpu: Gpu, mfu: float
) -> float:
    """Time to sample the branches of some rows on a GPU, all at once.

    The prompts are computed first. Then each new token of all branches together reads the weights
    of the language model and the keys and values so far, where those of a prompt are kept once.

    Args:
        num_rows: prompts on the GPU; `row.branches` are the completions of each.
    """
    longest = max(row.branches)
    prompt = row.num_tokens - sum(row.branches)
    parts = forward_flops(config, prompt, row.num_tiles, num_labels=1)
    prefill_s = (
        num_rows * sum(part.total for part in parts.values()) / (mfu * gpu.bf16_tflops * 1e12)
    )
    cached = num_rows * (prompt + sum(row.branches) / 2)  # half of the branches, on average
    read = step_bytes(config, cached)
    return prefill_s + longest * read / (DECODE_SHARE * gpu.bandwidth_gb_per_s * 1e9)


def step_bytes(config: FlashVLConfig, num_cached: float) -> float:
    """Bytes that a decoding step reads in bf16: the language model's weights, and the keys and
    values of `num_cached` tokens of all answers together."""
    text = config.text_config
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim(text) * num_cached
    token = forward_flops(config, 1, 0, num_labels=1)  # two operations for each weight
    weights = (token["language_model"].linear + token["lm_head"].linear) / 2
    return NUMBER_BYTES * (weights + cache)
