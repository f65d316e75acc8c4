"""The elements of a JSON array, one at a time: sets of a million conversations come as one array.

The text is scanned as Latin-1, in which each byte is a character: a place in the text is the place
in the file, and JSON's own signs are the same in UTF-8.
"""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

BYTES_PER_SCAN = 2**20
"""Bytes that are read at once."""

_SCANNER = json.JSONDecoder(strict=False)  # what a string holds is checked where it is read
_OPENING = re.compile(r"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")
_AFTER = tuple(" \t\r\n,]")
"""Characters that may follow an element."""
_BETWEEN = re.compile(r"[ \t\r\n,]*")


class BrokenArrayError(Exception):
    """What follows an element is neither another element nor the end of the array."""


def starts_array(stream: BinaryIO) -> bool:
    """Whether the first character of a stream is an array's; the stream is at its start again."""
    start = stream.read(2**16)
    stream.seek(0)
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_elements(
    stream: BinaryIO, max_bytes: int, end: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """The array's elements from the stream's position, its start or the end of an element.

    Args:
        max_bytes: size of an element at most; a longer one counts as damage.
        end: place in the stream where the last element that is wanted ends.

    Yields:
        The place where the element ends, and its text.

    Raises:
        BrokenArrayError: the array is damaged, or cut off.
    """
    text = _Window(stream)
    if text.place == 0:
        text.skip(_OPENING)
        if text.cursor == 0:
            raise BrokenArrayError("it does not begin with [")
    while end is None or text.place < end:
        text.skip(_BETWEEN)
        if text.is_at("]"):
            return
        if text.is_at(""):
            raise BrokenArrayError("it has no end")
        element = text.take_value(max_bytes)
        yield text.place, element


class _Window:
    """The part of a stream that is being scanned."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._first = stream, stream.tell()
        self._text, self._is_last = "", False
        self.cursor = 0

    @property
    def place(self) -> int:
        """The cursor's place in the stream."""
        return self._first + self.cursor

    def is_at(self, sign: str) -> bool:
        """Whether the cursor is at a sign, or, where that is empty, at the stream's end."""
        return self._text[self.cursor : self.cursor + 1] == sign

    def skip(self, pattern: re.Pattern[str]) -> None:
        """Move the cursor past what the pattern matches there, if it does."""
        while True:
            found = pattern.match(self._text, self.cursor)
            if self._is_last or (found is not None and found.end() < len(self._text)):
                self.cursor = found.end() if found else self.cursor
                return
            self._read_more()

    def take_value(self, max_bytes: int) -> bytes:
        """The JSON value at the cursor, which moves to its end.

        Raises:
            BrokenArrayError: there is no value, or it is too long.
        """
        while True:
            try:
                _, stop = _SCANNER.raw_decode(self._text, self.cursor)
                if self._text[stop : stop + 1] in _AFTER:
                    break
                problem = "a value does not end where it should"  # or a number's digits follow
            except RecursionError as error:
                raise BrokenArrayError(str(error)) from None
            except ValueError as error:
                problem = str(error)
            if self._is_last or len(self._text) - self.cursor > max_bytes:
                raise BrokenArrayError(problem)
            self._read_more()
        value = self._text[self.cursor : stop]
        self.cursor = stop
        return value.encode("latin-1")

    def _read_more(self) -> None:
        rest = self._text[self.cursor :]
        # As much again as there is, so that a long value is not scanned for each piece of it.
        data = self._stream.read(max(BYTES_PER_SCAN, len(rest)))
        self._first, self.cursor = self._first + self.cursor, 0
        self._text, self._is_last = rest + data.decode("latin-1"), not data
