"""Which sequences wait, which hold a row of the cache, and what is prefilled next.

It knows lengths and rows, no tensors.
"""

import itertools
from collections import deque

from flashvl.engine.cache import KVCache
from flashvl.engine.sequence import Sequence


class Scheduler:
    """First come, first served; but those of the same prompt length are prefilled together.

    Rows 0 to D-1 are the decoding sequences', the next P the prefilling ones'.
    """

    def __init__(self, cache: KVCache, max_prefill_tokens: int):
        self.cache, self.max_prefill_tokens = cache, max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.decoding or self.prefilling)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give rows to the next group, if none is being prefilled; returns those that got one.

        The first that waits, and others with prompts of its length that fit such a row: as many as
        there are rows for, and of no more than `max_prefill_tokens` together.
        """
        if self.prefilling or not self.waiting:
            return []
        first = self.waiting[0]
        length = len(first.prompt)
        free = self._free_rows(first.max_length)
        if not free:
            return []
        size = min(free, max(self.max_prefill_tokens // length, 1))
        alike = (
            sequence
            for sequence in self.waiting
            if len(sequence.prompt) == length and sequence.max_length <= self.cache.row_length
        )
        group = list(itertools.islice(alike, size))
        chosen = set(group)
        self.waiting = deque(sequence for sequence in self.waiting if sequence not in chosen)
        self.prefilling = group
        return group

    def _free_rows(self, length: int) -> int:
        """Rows for sequences of up to `length`; where they are too short or too few, cut anew.

        So many sequences share the cache as have room in it at the length of the longest.
        """
        cache, in_use = self.cache, len(self.decoding)
        needed = max([length, *(sequence.max_length for sequence in self.decoding)])
        is_few_or_loose = cache.num_rows <= in_use if in_use else cache.row_length > 2 * needed
        is_good = cache.row_length >= needed and not is_few_or_loose
        if not is_good and cache.rows_of(needed) > in_use:
            cache.resize_rows(needed, [sequence.num_cached for sequence in self.decoding])
        return cache.num_rows - in_use if cache.row_length >= needed else 0

    def start_decoding(self) -> None:
        """The prefilling sequences are prefilled: they decode from now on, in their rows."""
        self.decoding += self.prefilling
        self.prefilling = []

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and close the gap that its row leaves."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        rows = self.decoding + self.prefilling
        row = rows.index(sequence)
        if row < len(self.decoding):
            self._fill(row, len(self.decoding) - 1, self.decoding)
            row = len(self.decoding) - 1
            self.decoding.pop()
            if self.prefilling:  # theirs begin one row further up now
                last = self.prefilling.pop()
                self.cache.move(row + 1 + len(self.prefilling), row, last.num_cached)
                self.prefilling.insert(0, last)
            return
        first = len(self.decoding)
        self._fill(row - first, len(self.prefilling) - 1, self.prefilling, first)
        self.prefilling.pop()

    def _fill(self, gap: int, last: int, sequences: list[Sequence], first_row: int = 0) -> None:
        """Move the last of `sequences` into the gap."""
        if gap != last:
            self.cache.move(first_row + last, first_row + gap, sequences[last].num_cached)
            sequences[gap] = sequences[last]
