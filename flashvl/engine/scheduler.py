"""Decides which sequences wait, which hold a row of the cache, and which are prefilled next.

It knows lengths and rows, but no tensors.
"""

import itertools
from collections import deque

from flashvl.engine.cache import KVCache
from flashvl.engine.sequence import Sequence


class Scheduler:
    """First come, first served, except that prompts of the same length are prefilled together.

    The decoding sequences have the first rows of the cache, the prefilling ones the next.
    """

    def __init__(self, cache: KVCache, max_prefill_tokens: int):
        self.cache, self.max_prefill_tokens = cache, max_prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is no sequence at all."""
        return not (self.waiting or self.decoding or self.prefilling)

    def add(self, sequence: Sequence) -> None:
        """Append a sequence to those that wait."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give rows to the next group, unless one is being prefilled; returns its sequences.

        The group is the first sequence that waits, and others whose prompts have the same length
        and that fit the rows: as many as there are rows, and at most `max_prefill_tokens` together.
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
        """Number of free rows for sequences of up to `length` tokens.

        If the rows are too short, or none is free, the cache is cut anew, into as many rows of the
        longest sequence's length as it has room for.
        """
        cache, in_use = self.cache, len(self.decoding)
        needed = max([length, *(sequence.max_length for sequence in self.decoding)])
        is_few_or_loose = cache.num_rows <= in_use if in_use else cache.row_length > 2 * needed
        is_good = cache.row_length >= needed and not is_few_or_loose
        if not is_good and cache.rows_of(needed) > in_use:
            cache.resize_rows(needed, [sequence.num_cached for sequence in self.decoding])
        return cache.num_rows - in_use if cache.row_length >= needed else 0

    def start_decoding(self) -> None:
        """Move the prefilling sequences, which are prefilled now, to the decoding ones."""
        self.decoding += self.prefilling
        self.prefilling = []

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, waiting or not, and move another into the row that it leaves."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        rows = self.decoding + self.prefilling
        row = rows.index(sequence)
        if row < len(self.decoding):
            self._fill(row, len(self.decoding) - 1, self.decoding)
            row = len(self.decoding) - 1
            self.decoding.pop()
            if self.prefilling:  # their rows begin one row earlier now
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
