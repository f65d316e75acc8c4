"""From what an answer must look like to the tokens that may come next, by llguidance."""

import json
from typing import Any, NoReturn

import llguidance.hf
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark
from transformers import PreTrainedTokenizerBase

from flashvl.engine.request import StructuredOutputs
from flashvl.errors import DataError

JSON_STYLE: Any = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
}
"""As `json.dumps` writes it. Where any white space is admitted, a weak model says nothing else."""


class Grammars:
    """Compiles for the tokens of one model; any number of threads may ask at once."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_token_ids: list[int]
    ):
        """
        Args:
            vocab_size: the model's, which may be greater than the tokenizer's.
        """
        self.tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=vocab_size, eos_token=end_token_ids
        )
        self.limits = LLParserLimits(verbose_errors=False)

    def compile(self, outputs: StructuredOutputs) -> LLMatcher:
        """What follows one answer, from its beginning on.

        Raises:
            DataError: it has an error, or is too much.
        """
        name, text = _as_llguidance(outputs)
        matcher = LLMatcher(self.tokenizer, text, log_level=0, limits=self.limits)
        if matcher.is_error():
            _refuse(name, matcher.get_error())
        return matcher


def _as_llguidance(outputs: StructuredOutputs) -> tuple[str, str]:
    """The field that is set, and what it says in llguidance's own form.

    Raises:
        DataError: it has an error.
    """
    if outputs.json is not None:
        return "json", _from_schema(outputs.json)
    if outputs.json_object:
        return "json_object", _from_schema('{"type": "object"}')
    if outputs.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(outputs.regex)
    if outputs.choice is not None:
        texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in outputs.choice)
        return "choice", LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    assert outputs.grammar is not None
    try:
        return "grammar", LLMatcher.grammar_from_lark(any_to_lark(outputs.grammar))
    except Exception as error:  # of GBNF; it has classes of its own for some
        _refuse("grammar", str(error))


def _from_schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse("json", f"not valid JSON: {error}")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE)


def _refuse(name: str, reason: str) -> NoReturn:
    line = " ".join(reason.split()) or "unknown"
    raise DataError(f"structured_outputs.{name} cannot be used: {line[:500]}; mend it") from None
