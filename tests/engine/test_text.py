"""From tokens to text: the bytes of single tokens, and where a stop string ends an answer."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from flashvl.data.tokenizer import SPECIAL_TOKENS
from flashvl.engine import token_bytes
from flashvl.engine.sequence import AnswerText
from flashvl.engine.tokens import TokenTable
from flashvl.model.loading import load_processor
from tests.support.texts import is_plain


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of the shipped model, in which some tokens are words."""
    return load_processor("tiny").tokenizer


def tell(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: list[str]) -> tuple[str, str]:
    """An answer's streamed pieces, joined, and its text; tokens after its end are not read."""
    answer, streamed = AnswerText(TokenTable(tokenizer), stop), ""
    for token in ids:
        if answer.add(token):
            break
        streamed += answer.take()
    answer.close()
    return streamed + answer.take(), answer.text


def cut(text: str, stop: list[str]) -> str:
    """The rule for stop strings, character by character."""
    for end in range(1, len(text) + 1):
        found = [each for each in stop if text[:end].endswith(each)]
        if found:
            return text[: end - max(map(len, found))]
    return text


TEXT = st.text(st.sampled_from("ab s\u00e9\u4e2d\U0001f600\ufffd"), max_size=24) | st.text(
    max_size=24
).filter(is_plain)


@st.composite
def text_and_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    """Strategy for texts and stop strings, of which some occur in the text."""
    text = unicodedata.normalize("NFC", draw(TEXT))  # like the tokenizer
    parts = st.tuples(st.integers(0, 24), st.integers(1, 6)).map(lambda at: text[at[0] :][: at[1]])
    stops = draw(st.lists(parts.filter(bool) | TEXT.filter(bool), max_size=4))
    return text, stops


@settings(deadline=None, max_examples=500)
@given(given=text_and_stops(), seed=st.randoms(use_true_random=False))
@example(("a large red cross and a small blue ring", ["oss and ", "s a"]), None)
@example(("abcd", ["bcd", "c"]), None)
@example(("abcd", ["d", "bcd", "cd"]), None)
def test_the_stop_string_that_is_complete_first_wins_wherever_tokens_begin(
    tokenizer: PreTrainedTokenizerBase, given: tuple[str, list[str]], seed: object
) -> None:
    text, stop = given
    expected = cut(text, stop)
    in_words = tokenizer.encode(text)
    in_bytes = [tokenizer.convert_tokens_to_ids(each) for each in _byte_tokens(tokenizer, text)]
    for ids in (in_words, in_bytes):
        assert tell(tokenizer, ids, stop) == (expected, expected)


def _byte_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    by_byte = {
        token_bytes(tokenizer, number): token
        for token, number in tokenizer.get_vocab().items()
        if token not in SPECIAL_TOKENS
    }
    return [by_byte[bytes([byte])] for byte in text.encode()]


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 511), max_size=40))
def test_any_tokens_are_the_text_that_the_tokenizer_makes_of_them(
    tokenizer: PreTrainedTokenizerBase, ids: list[int]
) -> None:
    """Strategy for token ids, also of halves of characters, of control tokens, and of no token."""
    known = [token for token in ids if token < len(tokenizer)]
    expected = tokenizer.decode(known, skip_special_tokens=True)
    assert tell(tokenizer, ids, []) == (expected, expected)


def test_a_stream_gives_what_can_be_no_stop_string_any_more_at_once(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    answer = AnswerText(TokenTable(tokenizer), ["cross and"])
    pieces = []
    for token in tokenizer.encode("a red cross"):
        answer.add(token)
        pieces.append(answer.take())
    assert "".join(pieces) == "a red "
    assert all(pieces[:-1])
    answer.close()
    assert answer.take() == "cross"


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_the_bytes_of_a_texts_tokens_are_its_own(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    joined = b"".join(token_bytes(tokenizer, token) for token in tokenizer.encode(text))
    assert joined == unicodedata.normalize("NFC", text).encode()


def test_every_token_has_bytes_of_its_own(tiny_random: Path) -> None:
    """Part of a character has some of its bytes, a control token those of its name, a gap none."""
    tokenizer = load_processor(tiny_random).tokenizer
    found = [token_bytes(tokenizer, number) for number in range(len(tokenizer))]
    assert len(set(found)) == len(found)
    assert {bytes([byte]) for byte in range(256)} <= set(found)
    assert set(found) >= {token.encode() for token in SPECIAL_TOKENS}
    assert token_bytes(tokenizer, len(tokenizer)) == b""
