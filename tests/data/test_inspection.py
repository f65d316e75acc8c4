"""What `flashvl data inspect` says of a table equals what was put into it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.data.features import decode_tiles, encode_conversation
from flashvl.data.inspection import inspect_table, open_table, sample_rows
from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS
from flashvl.data.sheet import draw_sheet
from flashvl.errors import ConfigError
from flashvl.model.loading import load_processor
from tests.support.jobs import picture

NUM_ROWS = 100


def write_table(folder: Path) -> list[dict[str, object]]:
    """A hundred rows in two files: text alone, one image and two images in turn; one is broken."""
    rows = [
        {
            "row": n,
            "images": [picture(n, "JPEG" if n % 2 else "PNG")] * (n % 3),
            "messages": [
                {"role": "user", "content": "<image>\n" * (n % 3) + "What is it? " * (1 + n % 7)},
                {"role": "assistant", "content": "A blob."},
            ],
            "source": "odd" if n % 2 else "even",
        }
        for n in range(NUM_ROWS)
    ]
    rows[50]["images"] = [b"broken"] * 2
    schema = pa.schema([*CONVERSATIONS, ("source", pa.string())])
    folder.mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2], schema=schema)
        pq.write_table(table, folder / f"part-{part:05d}.parquet", row_group_size=16)
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The output of a conversion."""
    (tmp_path / "dead_letters").mkdir()
    write_table(tmp_path / "conversations")
    return tmp_path


def test_all_figures_of_a_small_table_are_exact(folder: Path) -> None:
    table = open_table(str(folder))
    rows = list(sample_rows(table))
    processor = load_processor("tiny")
    found = inspect_table(table, rows, processor)
    assert (found.kind, found.files, found.rows, found.row_groups) == ("conversations", 2, 100, 8)
    assert found.sampled_rows == 100
    assert found.roles == {"user": 100, "assistant": 100}
    assert found.images == {0: 34, 1: 33, 2: 33}
    assert found.sources == {"even": 50, "odd": 50}
    assert found.unusable == 1 and found.example is not None and "row 50: " in found.example
    lengths = []
    for row in rows:
        if row["row"] != 50:
            counts = decode_tiles(row["images"], processor).counts
            lengths.append(len(encode_conversation(row["messages"], counts, processor, 10**6)[0]))
    assert found.tokens is not None
    assert found.tokens.mean == pytest.approx(sum(lengths) / len(lengths), abs=0.06)
    assert (found.tokens.least, found.tokens.greatest) == (min(lengths), max(lengths))
    assert sum(found.token_histogram.values()) == 99
    for label, count in found.token_histogram.items():
        end = int(label.removeprefix("up to "))
        assert count == sum(end // 2 < length <= end for length in lengths)


def test_a_sample_is_spread_over_the_table(folder: Path) -> None:
    table = open_table(str(folder / "conversations"))
    rows = [row["row"] for row in sample_rows(table, 30)]
    assert 20 <= len(rows) < 60 and min(rows) < 20 and max(rows) > 80
    assert len(set(rows)) == len(rows)


def test_the_command_prints_and_draws(folder: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    line = ["data", "inspect", str(folder), "--output", str(sheet)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "100 in 2 files, 8 row groups" in result.stdout
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.getcolors(2**24) or ()) > 1000
    told = json.loads(CliRunner().invoke(app, [*line, "--json"]).stdout)
    assert told["rows"] == 100


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (PREFERENCES, {"chosen": [{"role": "assistant", "content": "a"}], "rejected": []}),
        (PROMPTS, {"answer": "7"}),
    ],
)
def test_other_tables_for_training_are_known(
    tmp_path: Path, schema: pa.Schema, values: dict[str, object]
) -> None:
    row = {"row": 0, "images": [], "prompt": [{"role": "user", "content": "?"}]} | values
    pq.write_table(pa.Table.from_pylist([row], schema=schema), tmp_path / "a.parquet")
    table = open_table(str(tmp_path / "a.parquet"))
    found = inspect_table(table, list(sample_rows(table)), load_processor("tiny"))
    assert found.rows == 1 and found.unusable == 0 and found.roles == {"user": 1, "assistant": 1}
    assert draw_sheet(list(sample_rows(table))).width > 0


def test_what_is_no_table_for_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        open_table(str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="holds no"):
        open_table(str(tmp_path))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="columns image, which are no schema that training"):
        open_table(str(tmp_path))


def test_an_empty_table_is_inspected(tmp_path: Path) -> None:
    pq.write_table(CONVERSATIONS.empty_table(), tmp_path / "a.parquet")
    table = open_table(str(tmp_path))
    found = inspect_table(table, list(sample_rows(table)), load_processor("tiny"))
    assert found.rows == 0 and found.tokens is None
