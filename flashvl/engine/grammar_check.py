"""Checks in a process of its own that an answer's grammar can be compiled.

llguidance bounds most of what a grammar may cost, but not all: some would compile for hours, or
exhaust the stack and end the service. This file is run as a program, so it imports nothing but
llguidance and starts in a moment. It reads `{"kind": ..., "text": ...}` from its standard input and
writes `{"grammar": ..., "error": ...}`.
"""

import functools
import json
import resource
import subprocess
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

MAX_CHARACTERS = 100_000
MAX_CPU_S = 2
"""CPU seconds that a grammar may take to compile."""
MAX_BYTES = 2**29
"""Address space of the process that compiles a grammar."""
MAX_WAIT_S = 120
"""Seconds after which the check is given up, on a machine too busy to give it `MAX_CPU_S`."""
LIMITS = LLParserLimits(
    max_lexer_states=20_000,  # each takes up to 2 kB
    step_max_items=20_000,  # these take a millisecond
    verbose_errors=False,
)
JSON_STYLE: Any = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
}
"""White space as `json.dumps` writes it; weak models would write nothing else if any were valid."""


class GrammarError(ValueError):
    """The grammar has an error or costs too much; the message is one line."""


_one_at_a_time = threading.Lock()


@functools.lru_cache(maxsize=256)
def checked(kind: str, text: str) -> str:
    """The grammar `text` in llguidance's own form; results are kept for the next caller.

    Args:
        kind: json, regex, choice (a JSON list) or grammar (Lark's or GBNF).

    Raises:
        GrammarError: the grammar cannot be compiled within the limits.
    """
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(f"{len(text)} characters are more than {MAX_CHARACTERS}; shorten it")
    command = [sys.executable, "-P", __file__]  # without this folder, whose modules it would find
    asked = json.dumps({"kind": kind, "text": text})
    with _one_at_a_time:
        try:
            child = subprocess.run(
                command, input=asked, capture_output=True, text=True, timeout=MAX_WAIT_S
            )
        except subprocess.TimeoutExpired:
            raise GrammarError("it took too long; make it simpler") from None
    if child.returncode != 0:
        raise GrammarError(
            f"it is too deep, or takes more than {MAX_CPU_S} s or {MAX_BYTES // 2**20} MiB to"
            " compile; make it simpler"
        )
    answer = json.loads(child.stdout)
    if answer["error"]:
        raise GrammarError(" ".join(answer["error"].split())[:500])
    return answer["grammar"]


# All below runs in the child.


class _Bytes:
    """A vocabulary of single bytes; the cost of compiling does not depend on the vocabulary."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([byte]) for byte in range(256)), b""]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _check(kind: str, text: str) -> dict[str, str]:
    try:
        grammar = _as_llguidance(kind, text)
    except Exception as error:  # the parsers raise many kinds, RecursionError among them
        return {"grammar": "", "error": str(error)}
    matcher = LLMatcher(
        LLTokenizer(TokenizerWrapper(_Bytes())), grammar, log_level=0, limits=LIMITS
    )
    matcher.compute_bitmask()
    return {"grammar": grammar, "error": _explain(matcher.get_error())}


def _explain(error: str) -> str:
    if error.startswith("NoExtension"):
        return "nothing satisfies it"
    if error.startswith("panic"):
        return "it breaks the compiler; name no control tokens, which are not text"
    return error


def _as_llguidance(kind: str, text: str) -> str:
    if kind == "json":
        # Parsed here, as llguidance would put the text unread into its own grammar.
        schema = json.dumps(json.loads(text, parse_constant=_refuse_constant))
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        texts = ("".join(map(_literal, each)) for each in json.loads(text))
        return LLMatcher.grammar_from_regex("|".join(texts))
    return LLMatcher.grammar_from_lark(any_to_lark(text))


def _literal(character: str) -> str:
    """A character as a regex writes it; strings of Lark cannot hold every one."""
    is_plain = character.isascii() and character.isalnum()
    return character if is_plain else f"\\x{{{ord(character):x}}}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(_check(**json.load(sys.stdin))))
