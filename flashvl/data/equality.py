"""The process that tells whether two mathematical expressions are equal.

SymPy can compute for hours, or fill the memory, on a few characters; `flashvl.data.answers` starts
this module apart.
"""

import logging
from collections.abc import Callable
from typing import Any

from flashvl.data.isolated import serve

CPU_SECONDS = 2.0
"""Computing time for a pair; usual ones take a few milliseconds."""
WALL_SECONDS = 30.0
MEMORY_BYTES = 4 * 2**30


def build() -> Callable[[Any], bool | None]:
    """The function that compares a reference with an answer."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its own limits of time are off

    def are_equal(pair: tuple[str, str]) -> bool | None:
        try:
            gold, answer = (parse(text, parsing_timeout=None) for text in pair)
            return bool(verify(gold, answer, timeout_seconds=None))
        except Exception:  # SymPy's faults on what a model writes are of many types
            return None

    return are_equal


if __name__ == "__main__":
    serve(build, cpu_seconds=CPU_SECONDS, wall_seconds=WALL_SECONDS, memory_bytes=MEMORY_BYTES)
