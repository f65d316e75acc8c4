"""The pages name tests and files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FILE = re.compile(r"\b((?:ray_jobs|serve_configs)/[\w/.-]+\.(?:py|yaml))\b")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_exists(path: Path) -> None:
    page = path.read_text()
    missing = [
        f"{file}::{name}"
        for file, name in TEST.findall(page)
        if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text()
    ]
    missing += [file for file in FILE.findall(page) if not (ROOT / file).is_file()]
    assert not missing
