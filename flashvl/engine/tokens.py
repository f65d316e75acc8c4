"""What a single token is, apart from its neighbours."""

import functools

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bytes:
    """A token's own bytes: a character's, several characters', or a part of one's.

    A control token's are its name's; an id that the model has and the tokenizer does not has none.

    Args:
        tokenizer: byte-level, as Qwen2's and Llama 3's are.
    """
    token: str | None = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return b""
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()  # added as it is


@functools.cache
def _byte_of_character() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


class TokenTable:
    """The tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.control_tokens = frozenset(number for number, token in added if token.special)

    def text_bytes(self, token_id: int) -> bytes:
        """A token's part of an answer's text, in which a control token has none."""
        if token_id in self.control_tokens:
            return b""
        return token_bytes(self.tokenizer, token_id)
