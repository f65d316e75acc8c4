"""Whether an answer's grammar can be compiled at all, tried in a process of its own.

llguidance bounds most of what a grammar may cost, but not all: some would be compiled for hours, or
exhaust the stack, and take the service with them. This file is run as a program, so it knows
nothing but llguidance, and starts in a moment: `{"kind": ..., "text": ...}` comes in, `{"grammar":
..., "error": ...}` goes out.
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
MAX_BYTES = 2**29
"""Of address space; whoever asks again with the same grammar is answered from memory."""
MAX_WAIT_S = 120
"""On a machine that is too busy to give `MAX_CPU_S` before."""
LIMITS = LLParserLimits(
    max_lexer_states=20_000,  # of up to 2 kB
    step_max_items=20_000,  # a millisecond
    verbose_errors=False,
)
JSON_STYLE: Any = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
}
"""As `json.dumps` writes it. Where any white space is admitted, a weak model says nothing else."""


class GrammarError(ValueError):
    """It has an error, or is too much; one line."""


_one_at_a_time = threading.Lock()


@functools.lru_cache(maxsize=256)
def checked(kind: str, text: str) -> str:
    """What `text` says in llguidance's own form.

    Args:
        kind: json, regex, choice (a JSON list) or grammar (Lark's or GBNF).

    Raises:
        GrammarError: it cannot be compiled, or not within the limits.
    """
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(f"{len(text)} characters are more than {MAX_CHARACTERS}; shorten it")
    command = [sys.executable, "-I", __file__]
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
    """A vocabulary of bytes: what a grammar costs to compile is the same with any other."""

    eos_token_id, bos_token_id = 256, None
    tokens = [*(bytes([byte]) for byte in range(256)), b""]
    special_token_ids = [256]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _check(kind: str, text: str) -> dict[str, str]:
    try:
        grammar = _as_llguidance(kind, text)
    except Exception as error:  # GBNF's and JSON's parsers have many, RecursionError among them
        return {"grammar": "", "error": str(error)}
    matcher = LLMatcher(
        LLTokenizer(TokenizerWrapper(_Bytes())), grammar, log_level=0, limits=LIMITS
    )
    matcher.compute_bitmask()
    return {"grammar": grammar, "error": _told(matcher.get_error())}


def _told(error: str) -> str:
    if error.startswith("NoExtension"):
        return "nothing satisfies it"
    if error.startswith("panic"):
        return "it breaks the compiler; control tokens are none of an answer's text"
    return error


def _as_llguidance(kind: str, text: str) -> str:
    if kind == "json":
        # Parsed, as what is put into its own form unread could end it.
        schema = json.dumps(json.loads(text, parse_constant=_refuse_constant))
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        texts = ("".join(map(_literal, each)) for each in json.loads(text))
        return LLMatcher.grammar_from_regex("|".join(texts))
    return LLMatcher.grammar_from_lark(any_to_lark(text))


def _literal(character: str) -> str:
    """As a regex writes it; Lark's strings do not take every one."""
    is_plain = character.isascii() and character.isalnum()
    return character if is_plain else f"\\x{{{ord(character):x}}}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(_check(**json.load(sys.stdin))))
