"""The process that runs reward functions of one's own, which may raise, hang or crash."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from flashvl.data.isolated import serve
from flashvl.errors import one_line


def build() -> Callable[[Any], dict[str, Any]]:
    """The function that answers `{"function": path, "arguments": {...}}`; without arguments, the
    function is only imported."""
    return run


def run(question: dict[str, Any]) -> dict[str, Any]:
    """`{"rewards": [...]}`, or `{"error": text}`."""
    try:
        function = find(question["function"])
        if "arguments" not in question:
            return {"rewards": []}
        rewards = function(**question["arguments"])
        return {"rewards": [None if each is None else float(each) for each in rewards]}
    except Exception as error:  # a stranger's function may raise anything
        return {"error": one_line(f"{type(error).__name__}: {error}")}


def find(path: str) -> Callable[..., Any]:
    """The function at an import path, as `package.module.function`.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, name = path.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


if __name__ == "__main__":
    serve(build, wall_seconds=float(sys.argv[1]))
