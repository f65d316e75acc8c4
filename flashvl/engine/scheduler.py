"""Decides which sequences wait, which hold a row of the cache, and which are prefilled next.

It knows lengths and rows, but no tensors.
"""

import itertools
import math
from collections import Counter, deque

from flashvl.engine.cache import KVCache
from flashvl.engine.prompts import Prompt, SharedPrompt
from flashvl.engine.sequence import Sequence


class Scheduler:
    """First come, first served, except that equal prompts, or some of the same length, go together.

    Only sequences of the same `priority` are admitted together, those of the lowest number first.

    The decoding sequences have the first rows of the cache, the prefilling ones the next. A prompt
    that several sequences wait with is held once for all of them, as long as one of them is here;
    those that come or are admitted later join.
    """

    def __init__(
        self,
        cache: KVCache,
        max_prefill_tokens: int,
        shares_prompts: bool = True,
        small_prefill_tokens: int = 128,
    ):
        """
        Args:
            max_prefill_tokens: prompt tokens in one step, at most.
            shares_prompts: whether sequences with the same prompt share it.
            small_prefill_tokens: prompt tokens in one step, at most, of sequences whose `priority`
                is above 0.
        """
        self.cache, self.max_prefill_tokens = cache, max_prefill_tokens
        self.small_prefill_tokens = min(small_prefill_tokens, max_prefill_tokens)
        self.shares_prompts = shares_prompts
        self.waiting: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self._sharing: list[Prompt] = []
        """Prompts that the cache holds for several sequences."""

    @property
    def is_idle(self) -> bool:
        """Whether there is no sequence at all."""
        return not (self.waiting or self.decoding or self.prefilling)

    def add(self, sequence: Sequence) -> None:
        """Append a sequence to those that wait."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give rows to the next sequences, unless some are being prefilled; returns them.

        They are the first sequence that waits and others with the same prompt, which share it. If
        there are none, they are others with prompts of the same length that fit the rows: as many
        as there are rows, and at most `prefill_tokens` together. If those that are being prefilled
        have a higher `priority`, they are set aside.
        """
        if not self.waiting or len(self.decoding) >= self.cache.max_rows:
            return []
        priority = min(sequence.request.priority for sequence in self.waiting)
        if self.prefilling:
            if self.prefilling[0].request.priority <= priority:
                return []
            self._set_aside()
        waiting = [each for each in self.waiting if each.request.priority == priority]
        counts = Counter(sequence.prompt for sequence in waiting if not sequence.num_cached)
        first = waiting[0]
        if self._can_share(first, counts):
            admitted = self._admit_group(first, waiting)
        else:
            admitted = self._admit_alike(first, waiting, counts)
        chosen = set(admitted)
        if chosen:
            self.waiting = deque(each for each in self.waiting if each not in chosen)
        self.prefilling = admitted
        return admitted

    def prefill_tokens(self, sequence: Sequence) -> int:
        """Prompt tokens in one step, at most, of sequences with the `priority` of this one."""
        is_small = sequence.request.priority > 0
        return self.small_prefill_tokens if is_small else self.max_prefill_tokens

    @property
    def is_decoding_first(self) -> bool:
        """Whether a sequence decodes whose `priority` none that is to be prefilled precedes."""
        to_prefill = itertools.chain(self.waiting, self.prefilling)
        lowest = min((each.request.priority for each in to_prefill), default=math.inf)
        return any(sequence.request.priority <= lowest for sequence in self.decoding)

    def _set_aside(self) -> None:
        """Let the sequences that are being prefilled wait, before others, with what is cached."""
        for row, sequence in enumerate(self.prefilling, len(self.decoding)):
            sequence.shared = None
            if sequence.num_cached:
                sequence.set_aside = self.cache.copy_row(row, sequence.num_cached)
        self.waiting.extendleft(reversed(self.prefilling))
        self.prefilling = []

    def _can_share(self, sequence: Sequence, counts: Counter[Prompt]) -> bool:
        """Whether a sequence that waits shares its prompt with others, running or waiting.

        A new copy of a prompt must leave room for two rows, which alone would hold it twice.
        """
        prompt, cache = sequence.prompt, self.cache
        if sequence.num_cached:
            return False  # it was set aside with a part of a prompt of its own
        if prompt.shared is not None:
            return True
        length = sequence.request.max_new_tokens
        is_group = self.shares_prompts and counts[prompt] > 1
        return is_group and cache.can_hold(len(prompt), length, 2)

    def _admit_group(self, first: Sequence, waiting: list[Sequence]) -> list[Sequence]:
        """Those of `waiting` that share the prompt of `first`, as many as there are rows for."""
        prompt, length = first.prompt, first.request.max_new_tokens
        is_new = prompt.shared is None
        free = self._find_rows(length, len(prompt) if is_new else 0, keep=prompt)
        if not free:
            if is_new or self._num_running(prompt):
                return []
            self._drop(prompt)  # too long for what its copy leaves; next time it will be alone
            return []
        if prompt.shared is None:
            prompt.shared = SharedPrompt(held=self.cache.hold_prompt(len(prompt)))
            self._sharing.append(prompt)
        group = itertools.islice(
            (
                sequence
                for sequence in waiting
                if sequence.prompt is prompt
                and not sequence.num_cached
                and sequence.request.max_new_tokens <= self.cache.row_length
            ),
            free,
        )
        admitted = list(group)
        for sequence in admitted:
            sequence.shared = prompt.shared
        return admitted

    def _admit_alike(
        self, first: Sequence, waiting: list[Sequence], counts: Counter[Prompt]
    ) -> list[Sequence]:
        """`first` and others of `waiting` with prompts as long as its own, each for itself."""
        length = len(first.prompt)
        free = self._find_rows(first.max_length)
        size = min(free, max(self.prefill_tokens(first) // length, 1))
        alike = (
            sequence
            for sequence in waiting
            if (len(sequence.prompt), sequence.num_cached) == (length, first.num_cached)
            and sequence.max_length <= self.cache.row_length
            and (sequence is first or not self._can_share(sequence, counts))
        )
        admitted = list(itertools.islice(alike, size))
        for row, sequence in enumerate(admitted, len(self.decoding)):
            if sequence.set_aside is not None:
                self.cache.fill_row(row, sequence.set_aside)
                sequence.set_aside = None
        return admitted

    def _find_rows(self, length: int, prompt_tokens: int = 0, keep: Prompt | None = None) -> int:
        """`_free_rows`, for which shared prompts that only waiting sequences need are dropped."""
        free = self._free_rows(length, prompt_tokens)
        if not free:
            idle = [each for each in self._sharing if each is not keep]
            idle = [each for each in idle if not self._num_running(each)]
            for prompt in idle:
                self._drop(prompt)
            if idle:
                free = self._free_rows(length, prompt_tokens)
        return free

    def _free_rows(self, length: int, prompt_tokens: int) -> int:
        """Number of free rows for sequences of up to `length` tokens in their rows.

        If the rows are too short, or none is free, the cache is cut anew, into as many rows of the
        longest sequence's length as it has room for.

        Args:
            prompt_tokens: tokens of a shared prompt that the cache is to hold besides.
        """
        cache, in_use = self.cache, len(self.decoding)
        needed = max([length, *(sequence.row_length for sequence in self.decoding)])
        is_few_or_loose = cache.num_rows <= in_use if in_use else cache.row_length > 2 * needed
        is_good = (
            cache.row_length >= needed
            and not is_few_or_loose
            and cache.rows_of(cache.row_length, prompt_tokens) > in_use
        )
        if not is_good and cache.rows_of(needed, prompt_tokens) > in_use:
            held = [sequence.num_cached for sequence in self.decoding]
            cache.resize_rows(needed, held, prompt_tokens)
        if cache.row_length < needed:
            return 0
        with_room = cache.rows_of(cache.row_length, prompt_tokens)
        return max(min(cache.num_rows, with_room) - in_use, 0)

    def _num_running(self, prompt: Prompt) -> int:
        """Sequences that share the copy of a prompt."""
        rows = itertools.chain(self.decoding, self.prefilling)
        return sum(sequence.shared is prompt.shared for sequence in rows)

    def _drop(self, prompt: Prompt) -> None:
        """Free the copy of a prompt, which no running sequence needs."""
        assert prompt.shared is not None
        self.cache.drop_prompt(prompt.shared.held)
        self._sharing.remove(prompt)
        prompt.shared = None

    def start_decoding(self) -> None:
        """Move the prefilling sequences, which are prefilled now, to the decoding ones."""
        self.decoding += self.prefilling
        self.prefilling = []

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, waiting or not; the last that needs a shared prompt frees it."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self._free_row(sequence)
        prompt = sequence.prompt
        if prompt.shared is None or self._num_running(prompt):
            return
        if not any(each.prompt is prompt for each in self.waiting):
            self._drop(prompt)

    def _free_row(self, sequence: Sequence) -> None:
        """Move another sequence into the row that one leaves."""
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
