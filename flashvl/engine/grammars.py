"""Compiles the forms that answers must have, and tells which tokens they admit; by llguidance."""

import functools
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from transformers import PreTrainedTokenizerBase

from flashvl.data.features import BREAK
from flashvl.engine.grammar_check import LIMITS, GrammarError, checked
from flashvl.engine.request import StructuredOutputs
from flashvl.engine.tokens import TokenTable
from flashvl.errors import DataError


class Grammar:
    """The state of one answer's grammar; to be used by one thread."""

    def __init__(self, matcher: LLMatcher):
        self.matcher = matcher

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, so that only its end may follow."""
        return self.matcher.is_stopped()

    def add(self, token: int) -> None:
        """Advance by a token that was admitted."""
        self.matcher.consume_token(token)

    def check(self) -> None:
        """Refuse a grammar whose next tokens could not be computed.

        Raises:
            DataError: the grammar is too complex.
        """
        if self.matcher.is_error():
            line = " ".join(self.matcher.get_error().split())
            raise DataError(f"structured_outputs are too complex ({line[:200]}); make them simpler")


class Grammars:
    """Compiles grammars for the tokens of one model; safe to call from many threads."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: list[int]
    ):
        """
        Args:
            vocab_size: the model's number of tokens, which may exceed the tokenizer's.
        """
        self.tokenizer, self.vocab_size, self.end_token_ids = tokenizer, vocab_size, end_token_ids

    @functools.cached_property
    def _control_tokens(self) -> list[int]:
        """Control tokens that no answer may hold: all except the end tokens."""
        return sorted(TokenTable(self.tokenizer).control_tokens - set(self.end_token_ids))

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        """The vocabulary in llguidance's form, made when the first answer needs it.

        Qwen's takes two seconds to make, which most engines never need to spend.
        """
        return LLTokenizer(
            _without_names(self.tokenizer), n_vocab=self.vocab_size, eos_token=self.end_token_ids
        )

    def compile(self, outputs: StructuredOutputs) -> Grammar:
        """The grammar of one answer, in its initial state.

        Raises:
            DataError: the grammar has an error or is too complex.
        """
        kind, text = _as_text(outputs)
        try:
            grammar = checked(kind, text)
        except GrammarError as error:
            raise DataError(f"structured_outputs.{kind} cannot be used: {error}") from None
        compiled = Grammar(LLMatcher(self._tokens, grammar, log_level=0, limits=LIMITS))
        self.left_out([compiled])
        compiled.check()
        return compiled

    def left_out(self, grammars: Sequence[Grammar]) -> npt.NDArray[np.bool_]:
        """(grammars, vocabulary), True for tokens that may not come next.

        Control tokens are always left out, even if a grammar names them. `Grammar.check` raises for
        a grammar whose tokens could not be computed.
        """
        bits = allocate_token_bitmask(len(grammars), self.vocab_size)
        for place, each in enumerate(grammars):
            fill_next_token_bitmask(each.matcher, bits, place)
        is_in = np.unpackbits(bits.view(np.uint8), 1, self.vocab_size, bitorder="little")
        is_out = is_in == 0
        is_out[:, self._control_tokens] = True
        return is_out


def _without_names(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer's JSON, with names for its control tokens that no text can hold.

    Otherwise llguidance would admit the control token `<|im_end|>` where a grammar asks for those
    characters as text.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole |= {"padding": None, "truncation": None}
    vocab = whole["model"]["vocab"]
    for token in whole["added_tokens"]:
        if token["special"]:
            name = f"{BREAK}{token['id']}"
            if token["content"] in vocab:
                vocab[name] = vocab.pop(token["content"])
            token["content"] = name
    return json.dumps(whole)


def _as_text(outputs: StructuredOutputs) -> tuple[str, str]:
    """The `kind` and `text` that `grammar_check.checked` takes."""
    if outputs.json_object:
        return "json", '{"type": "object"}'
    if outputs.choice is not None:
        return "choice", json.dumps(list(outputs.choice))
    for kind in ("json", "regex", "grammar"):
        if (text := getattr(outputs, kind)) is not None:
            return kind, text
    raise AssertionError("exactly one is set")
