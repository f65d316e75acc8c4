"""Docstrings, comments and pages can be read without their neighbours."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("flashvl", "ray_jobs")
    for path in (ROOT / folder).rglob("*.py")
    if "checkpoints" not in path.parts
)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]

FRAGMENT = re.compile(
    r"(Of|That|Who|Whose|Which|Whether it|But for|As \S+ does|By name|So that|In which|To which"
    r"|From which|For which|At which|With which)\b"
)
"""Beginnings of what says something of its neighbour and nothing by itself."""

STUMBLES = re.compile(
    r"so many|so much as|will do\b|\bmends?\b|\bmended\b|go(es)? on with|gone on with|goes on where"
    r"|\bbehind (it|them|those|that|the (rows|last|first|end))\b"
    r"|\bbut for\b|\bis no usable\b",
    re.IGNORECASE,
)
"""Words at which readers stumbled, each of which has a plainer one."""


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes, functions and fields, with their lines; and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value
    for number, line in enumerate(source.splitlines(), 1):
        if found := re.search(r"(?:^|\s)# (.*)", line):
            yield number, found.group(1)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_written_in_the_code_stands_by_itself(path: Path) -> None:
    found = []
    for line, text in prose_of(path.read_text()):
        if (begins := FRAGMENT.match(text.strip())) and not text.strip().startswith("As "):
            found.append(f"{path}:{line}: begins with {begins.group(0)!r}: {text.strip()[:70]!r}")
        found += [f"{path}:{line}: {word.group(0)!r}" for word in STUMBLES.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_have_no_word_to_stumble_over(path: Path) -> None:
    found = [
        f"{path}:{line}: {word.group(0)!r}"
        for line, text in enumerate(path.read_text().splitlines(), 1)
        for word in STUMBLES.finditer(text)
    ]
    assert not found, "\n".join(found)
