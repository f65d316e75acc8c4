"""The one shape of a progress callback: long work calls it, entry points draw it."""

from typing import Protocol


class ShowProgress(Protocol):
    """Shows how far long work is."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """
        Args:
            done: pieces of work that are finished.
            total: pieces of work in all.
            note: further figures, separated by commas; a narrow terminal shows the first ones.
        """


def ignore_progress(done: int, total: int, note: str = "") -> None:
    """A `ShowProgress` for callers that show nothing."""
