"""The rows that a stage has used, one bit each: 3 MB for 24 million rows.

The bits come from the rows that the workers report, never from the order that they were meant to
follow; comparing the two is the audit.
"""

import numpy as np
import numpy.typing as npt

from flashvl.errors import FlashVLError
from flashvl.train.feed.feed import Feed

STEPS_AT_ONCE = 1000
"""Steps whose rows an audit computes at once."""


class Consumed:
    """A bitmap in the layout of `np.packbits`."""

    def __init__(self, num_rows: int, data: bytes | None = None):
        """
        Args:
            data: bits of a checkpoint; None: no row is used yet.
        """
        size = -(-num_rows // 8)
        self._bits = (
            np.zeros(size, np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
        )
        if len(self._bits) != size:
            raise FlashVLError(
                f"audit failed: the checkpoint has bits of {len(self._bits) * 8} rows, the stage"
                f" {num_rows} rows; remove the checkpoint to resume from the one before"
            )

    def mark(self, rows: npt.NDArray[np.int64]) -> None:
        """Note that rows are used.

        Raises:
            FlashVLError: a row was used before, or is given twice.
        """
        bits = np.left_shift(1, 7 - (rows & 7)).astype(np.uint8)
        again = rows[(self._bits[rows >> 3] & bits) != 0]
        if not len(again):
            unique, counts = np.unique(rows, return_counts=True)
            again = unique[counts > 1]
        if len(again):
            raise FlashVLError(
                f"audit failed: row {again[0]} was used twice; run the same command again, which"
                " resumes from the last checkpoint, and report this fault of the feed"
            )
        np.bitwise_or.at(self._bits, rows >> 3, bits)

    @property
    def num_rows(self) -> int:
        """Number of rows that are used."""
        return int(np.bitwise_count(self._bits).sum())

    def to_bytes(self) -> bytes:
        return self._bits.tobytes()

    def check(self, feed: Feed, num_steps: int) -> None:
        """Compare with the rows of the first `num_steps` steps of the order.

        Raises:
            FlashVLError: a row is used that is not one of them, or one of them is not used.
        """
        expected = Consumed(feed.num_numbers)
        for start in range(0, num_steps, STEPS_AT_ONCE):
            expected.mark(feed.rows_of_steps(start, min(start + STEPS_AT_ONCE, num_steps)))
        differing = np.flatnonzero(self._bits != expected._bits)
        if len(differing):
            place = int(differing[0])
            wrong = np.unpackbits(self._bits[place : place + 1] ^ expected._bits[place : place + 1])
            row = place * 8 + int(np.flatnonzero(wrong)[0])
            raise FlashVLError(
                f"audit failed: after {num_steps} steps row {row} was"
                f" {'not ' if self.num_rows <= expected.num_rows else ''}used as the order says;"
                " remove the newest checkpoint to resume from the one before"
            )
