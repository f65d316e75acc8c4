"""Texts that property tests draw."""

from flashvl.data.tokenizer import SPECIAL_TOKENS


def is_plain(text: str) -> bool:
    """Whether a tokenizer alone encodes `text` as text: it holds no control token's name.

    Hypothesis draws names from the code that is loaded, so that any text may hold one.
    """
    return not any(token in text for token in SPECIAL_TOKENS)
