"""A small Qwen2-style tokenizer for models that are trained from random weights (`tiny`).

Models assembled from published parts have Qwen2.5's own tokenizer instead.
"""

from collections.abc import Iterable

from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
"""Names of Qwen2.5's control tokens; their ids here are 0, 1, 2, 3."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Byte-level BPE with Qwen2's pre-tokenization, merges learnt from `texts`.

    Bytes that `texts` never holds (those of capital letters, say) stay tokens of their own.
    """
    blank = Qwen2Tokenizer()
    backend = blank.backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Qwen2Tokenizer(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS),
    )


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
