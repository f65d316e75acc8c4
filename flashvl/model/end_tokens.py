"""The tokens at which an answer ends, in `generate` and in the engine.

From an LLM's own generation_config.json the end tokens and the pad token are taken. Its defaults of
sampling (temperature, top_p, repetition_penalty, lengths) are meant for chats, not for answers
about images, and are dropped: an answer is the likeliest one unless the request says otherwise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from flashvl.errors import CheckpointError
from flashvl.model.chat_formats import CHAT_FORMATS
from flashvl.model.checks import read_json
from flashvl.model.configuration_flashvl import FlashVLConfig

FILE = "generation_config.json"


def build_generation_config(
    config: FlashVLConfig, tokenizer: PreTrainedTokenizerBase, llm: Path | None = None
) -> GenerationConfig:
    """A generation config whose answers end at the chat template's end token, or at the LLM's own.

    Args:
        tokenizer: the processor's; its end token is the chat template's.
        llm: folder of the language model; its generation_config.json overrides its config.json.

    Raises:
        CheckpointError: that file is unreadable, or a token is outside the vocabulary.
    """
    stored: dict[str, Any] = {}
    if llm is not None and (llm / FILE).is_file():
        stored = read_json(llm / FILE)
    ends = stored.get("eos_token_id", config.text_config.eos_token_id)
    pad = stored.get("pad_token_id", tokenizer.pad_token_id)
    vocab_size = config.text_config.vocab_size
    for token in _as_list(ends) + ([] if pad is None else [pad]):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise CheckpointError(
                f"{llm}: its configuration names the end or pad token {token!r}, but its vocabulary"
                f" has the tokens 0 to {vocab_size - 1}; correct {FILE} or config.json"
            )
    return GenerationConfig(
        eos_token_id=end_at(tokenizer.eos_token_id, ends),
        pad_token_id=tokenizer.pad_token_id if pad is None else pad,
    )


def end_at(token: int, others: int | Sequence[int] | None) -> list[int]:
    """End tokens: `token` first, then the others, each once."""
    return list(dict.fromkeys([token, *_as_list(others)]))


def find_end_token(folder: Path, llm_type: str) -> int | None:
    """The id of the chat template's end token; None if the folder's tokenizer does not have it."""
    try:
        tokens = read_json(folder / "tokenizer.json")["added_tokens"]
        ids: dict[str, int] = {token["content"]: token["id"] for token in tokens}
        return ids.get(CHAT_FORMATS[llm_type].end_token)
    except (CheckpointError, KeyError, TypeError):  # `load_processor` reports the error
        return None


def _as_list(tokens: Any) -> list[Any]:
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]
