"""Guards the weights against steps whose loss is NaN, infinite or a spike."""

import math
import statistics
from collections import deque
from collections.abc import Iterable

from flashvl.errors import FlashVLError

NUM_RECENT = 64
"""Steps whose losses make the median that a spike is measured by."""
MIN_RECENT = 16
"""Steps before which no loss counts as a spike, as the median says little."""


class Guard:
    """Tells which steps to skip, and ends a run that skips too many in a row.

    Every rank has one, and gives it the same losses: all ranks decide alike.
    """

    def __init__(
        self,
        spike_factor: float | None,
        max_skipped_steps: int,
        recent: Iterable[float] = (),
        num_skipped: int = 0,
        num_in_a_row: int = 0,
    ):
        """
        Args:
            spike_factor: times the median of the recent losses above which a loss is a spike; None:
                no finite loss is one.
            recent: losses of the last steps that a resumed run has made.
            num_skipped: steps that it has skipped.
            num_in_a_row: how many of them were its last ones.
        """
        self.recent = deque(recent, maxlen=NUM_RECENT)
        self.num_skipped = num_skipped
        self.num_in_a_row = num_in_a_row
        self._spike_factor = spike_factor
        self._max_skipped_steps = max_skipped_steps

    def fault_of(self, loss: float) -> str | None:
        """Why a step with this loss must be skipped; None: it must not."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if self._spike_factor is not None and len(self.recent) >= MIN_RECENT:
            median = statistics.median(self.recent)
            if loss > self._spike_factor * median:
                return (
                    f"its loss of {loss:.4g} is above spike_factor ({self._spike_factor:g}) times"
                    f" {median:.4g}, the median of the last {len(self.recent)} steps"
                )
        return None

    def take(self, loss: float) -> None:
        """Note the loss of a step that was made."""
        self.recent.append(loss)
        self.num_in_a_row = 0

    def skip(self, step: int, fault: str) -> None:
        """Note a step that was skipped.

        Raises:
            FlashVLError: more than `max_skipped_steps` were skipped in a row.
        """
        self.num_skipped += 1
        self.num_in_a_row += 1
        if self.num_in_a_row > self._max_skipped_steps:
            raise FlashVLError(
                f"step {step} is the {self.num_in_a_row}th in a row that was skipped ({fault}), and"
                f" max_skipped_steps is {self._max_skipped_steps}; lower learning_rate, or correct"
                " the data, and begin anew from another output_dir"
            )
