"""The small tokenizer: it loses nothing, and has the ids that `tiny` relies on."""

import string
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Tokenizer

from flashvl.data.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = ["a small red circle and a large blue square", "How many shapes are there?"] * 5
BYTES = 256
VOCAB_SIZE = 320


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return train_tokenizer(TEXTS, VOCAB_SIZE)


def tokens(tokenizer: Qwen2Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Qwen2Tokenizer, text: str) -> None:
    """Qwen2 normalises to NFC first; nothing else is lost, and no byte is unknown."""
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text", ["a , b .", " it 's", "line\n\n  indent\t", "e\u0301", "\u4f60\U0001f600"]
)
def test_spaces_and_other_scripts_come_back(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_have_the_first_ids(tokenizer: Qwen2Tokenizer) -> None:
    expected = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
    assert list(SPECIAL_TOKENS) == expected
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == expected
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, *tokenizer.encode("a"), 2]
    assert tokenizer.encode("<|image_pad|>" * 3) == [3, 3, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer.bos_token is None
    assert tokenizer.unk_token is None


def test_special_tokens_can_be_left_out_of_the_text(tokenizer: Qwen2Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>a b<|image_pad|><|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"


def test_letters_that_were_never_seen_together_are_one_token_each(
    tokenizer: Qwen2Tokenizer,
) -> None:
    for letter in string.ascii_uppercase:
        assert len(tokenizer.encode(letter)) == 1
    word = "QXZBVGJKWYLMNPDF"
    assert tokens(tokenizer, word) == list(word)
    assert tokens(tokenizer, "7+2") == ["7", "+", "2"]


def test_words_that_were_seen_often_are_one_token(tokenizer: Qwen2Tokenizer) -> None:
    assert tokens(tokenizer, "a small red circle") == ["a", " small", " red", " circle"]


def test_the_vocabulary_has_the_asked_size_at_most(tokenizer: Qwen2Tokenizer) -> None:
    assert BYTES + len(SPECIAL_TOKENS) < len(tokenizer) <= VOCAB_SIZE
    assert len(train_tokenizer(TEXTS, 270)) == 270
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_the_same_texts_give_the_same_tokenizer(tokenizer: Qwen2Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), VOCAB_SIZE).get_vocab() == tokenizer.get_vocab()


def test_save_and_load(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    text = "<|im_start|>user\nHow many RED shapes?  \u00e9\U0001f600<|im_end|>\n"
    for loaded in (
        Qwen2Tokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert isinstance(loaded, Qwen2Tokenizer)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert (loaded.eos_token_id, loaded.pad_token_id) == (2, 0)
