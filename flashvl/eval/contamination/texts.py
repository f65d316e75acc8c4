"""Questions found in other texts, by word n-grams.

The rule is PaLM's (A. Chowdhery et al., "PaLM", 2022, section 8): a question counts as found where
at least 70 % of its 8-grams are, here within one row. Words are compared without case and
punctuation. Chinese has no spaces, so each of its characters is a word by itself; as it takes more
of them to say as much, a question that is mostly Chinese is compared by 13-grams, the longest that
are in use (T. Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C).

A shorter question ("What is in the picture?") is everybody's, and so is an n-gram of a template
that a benchmark puts around many questions: neither says where a text is from. Both are left out,
as that appendix leaves out texts of less than 8 words and n-grams of more than 10 documents. A
question that has nothing else is not compared.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

NUM_WORDS = 8
"""Words of an n-gram."""
NUM_CHARACTERS = 13
"""Words of an n-gram of a question that is mostly Chinese."""
MIN_OVERLAP = 0.7
"""Share of a question's n-grams that must be in a row."""
MAX_ITEMS = 10
"""Questions of the benchmarks that have an n-gram, at most; else it is a template's."""

_HAN = "\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_IS_HAN = re.compile(rf"[{_HAN}]")
_MARKER = re.compile(r"<image[ \d]*>")
"""Place of an image in a question: MMMU's `<image 1>`, and the tables' own."""

Hashes = npt.NDArray[np.uint64]
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits that look random


def split_words(text: str) -> list[str]:
    """The words of a text in their order, each Chinese character by itself."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(_MARKER.sub(" ", text).casefold())


def length_of_ngrams(words: Sequence[str]) -> int:
    """Words of the n-grams by which a question is compared."""
    num_han = sum(_IS_HAN.match(word) is not None for word in words)
    return NUM_CHARACTERS if 2 * num_han > len(words) else NUM_WORDS


class QuestionIndex:
    """Questions of benchmarks, which are looked up in texts."""

    def __init__(self, questions: Iterable[str | None]):
        """
        Args:
            questions: texts, or None for those that are not compared.
        """
        split = [split_words(question or "") for question in questions]
        words = sorted({word for each in split for word in each})
        self._numbers = {word: number for number, word in enumerate(words, 1)}
        # Random numbers, so that sums of them are different for different n-grams.
        rng = np.random.default_rng(0)
        self._values = rng.integers(1, 2**64, size=len(words) + 1, dtype=np.uint64)
        self._values[0] = 0
        found = [self._ngrams_of(each) for each in split]
        common = Counter(ngram for each in found for ngram in each)
        kept = [{ngram for ngram in each if common[ngram] <= MAX_ITEMS} for each in found]
        self.num_ngrams = np.array([len(each) for each in kept], np.int64)
        """(questions,): n-grams by which each is compared; 0: it is not."""
        pairs = sorted((ngram, item) for item, each in enumerate(kept) for ngram in each)
        ngrams = np.array([ngram for ngram, _ in pairs], np.uint64)
        self._items = np.array([item for _, item in pairs], np.int64)
        self._ngrams, self._starts = np.unique(ngrams, return_index=True)
        self._ends = np.append(self._starts[1:], len(pairs))

    def _ngrams_of(self, words: Sequence[str]) -> set[int]:
        values = self._values[[self._numbers[word] for word in words]]
        return set(_hash_windows(values, length_of_ngrams(words))[0].tolist())

    def search(self, rows: Sequence[Sequence[str]]) -> list[tuple[int, int, float]]:
        """Questions in the texts of rows: (row's place, question's number, share of n-grams)."""
        numbers: list[int] = []
        row_of_number: list[int] = []
        known = self._numbers.get
        for place, texts in enumerate(rows):
            before = len(numbers)
            for text in texts:
                numbers += [known(word, 0) for word in split_words(text)]
                numbers.append(0)  # no n-gram goes on into the next text
            row_of_number += [place] * (len(numbers) - before)
        values = self._values[numbers]
        if not len(self._ngrams):
            return []
        pairs = []
        for length in (NUM_WORDS, NUM_CHARACTERS):
            hashes, firsts = _hash_windows(values, length)
            at = np.searchsorted(self._ngrams, hashes).clip(max=len(self._ngrams) - 1)
            is_known = self._ngrams[at] == hashes
            pairs.append(
                np.stack((np.array(row_of_number)[firsts[is_known]], at[is_known]), axis=1)
            )
        return self._count(np.unique(np.concatenate(pairs), axis=0))

    def _count(self, pairs: npt.NDArray[np.int64]) -> list[tuple[int, int, float]]:
        """What rows hold of each question, from pairs of a row and an n-gram that it has."""
        counts: Counter[tuple[int, int]] = Counter()
        for row, at in pairs.tolist():
            for item in self._items[self._starts[at] : self._ends[at]].tolist():
                counts[row, item] += 1
        shares = {key: count / self.num_ngrams[key[1]] for key, count in counts.items()}
        return [(*key, share) for key, share in sorted(shares.items()) if share >= MIN_OVERLAP]


def _hash_windows(values: Hashes, length: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """A hash of each n-gram of known words, and its place; a value of 0 is an unknown word."""
    num_windows = max(len(values) - length + 1, 0)
    hashes = np.full(num_windows, length, np.uint64)
    is_whole = np.ones(num_windows, bool)
    for offset in range(length):
        part = values[offset : offset + num_windows]
        hashes = hashes * _FACTOR + part
        is_whole &= part != 0
    places = np.flatnonzero(is_whole)
    return hashes[places], places
