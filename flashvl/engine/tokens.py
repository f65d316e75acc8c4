"""Single tokens -> the bytes that they add to a text."""

import functools

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """The bytes of one token: one character, several, or a part of one.

    A control token gives the bytes of its name; an id that the tokenizer does not know gives none.

    Args:
        tokenizer: a byte-level one, like those of Qwen2 and Llama 3.
    """
    token: str | None = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return b""
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()  # an added token, which is stored as its text


@functools.cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


class TokenTable:
    """The tokens of one tokenizer, and which of them are control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.control_tokens = frozenset(number for number, token in added if token.special)

    def text_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to an answer's text; none for a control token."""
        if token_id in self.control_tokens:
            return b""
        return token_bytes(self.tokenizer, token_id)
