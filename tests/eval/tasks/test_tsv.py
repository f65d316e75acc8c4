"""The reader of benchmarks' files: what pandas writes comes back, and what is broken is told."""

import base64
import tracemalloc
from pathlib import Path

import pandas as pd
import pytest

from flashvl.data.limits import ImageLimits
from flashvl.data.storage import locate
from flashvl.errors import ConfigError
from flashvl.eval.tasks.tsv import MissingImageError, Row, open_table, read_list
from tests.support.benchmarks import encoded, picture, write_tsv

RED, BLUE = picture("red"), picture("blue")


def rows_of(path: Path) -> list[Row]:
    return list(open_table(locate(str(path))).rows())


def test_cells_come_back_as_pandas_wrote_them(tmp_path: Path) -> None:
    texts = [
        'a "quoted" word',
        "a\ttab",
        "two\nlines\n\nand a blank one",
        '"',
        "\u56fe\u4e2d\u662f\u4ec0\u4e48\uff1f",
        "ends with a backslash\\",
        "\r\nWindows",
        "'",
    ]
    rows = [
        {"index": n, "question": text, "A": text, "image": encoded("red")}
        for n, text in enumerate(texts)
    ]
    path = write_tsv(tmp_path / "t.tsv", rows)
    found = rows_of(path)
    assert [row.fields["question"] for row in found] == texts
    assert [row.fields["A"] for row in found] == texts
    assert [row.id for row in found] == [str(n) for n in range(len(texts))]
    assert all(row.images == [RED] for row in found)
    again = pd.read_csv(path, sep="\t")
    assert [row.fields["question"] for row in found] == list(again["question"])


def test_images_are_in_the_row_in_another_row_in_lists_and_in_files(tmp_path: Path) -> None:
    (tmp_path / "images" / "Some").mkdir(parents=True)
    (tmp_path / "images" / "Some" / "blue.png").write_bytes(BLUE)
    (tmp_path / "red.png").write_bytes(RED)
    both = str([encoded("red"), encoded("blue")])
    path = write_tsv(
        tmp_path / "Some.tsv",
        [
            {"index": 7, "question": "?", "image": encoded("red")},
            {"index": 1000007, "question": "?", "image": "7"},
            {"index": 8, "question": "?", "image": both},
            {"index": 1000008, "question": "?", "image": "8"},
            {"index": 9, "question": "?", "image": "10"},
            {"index": 10, "question": "?", "image": encoded("blue")},
        ],
    )
    assert [row.images for row in rows_of(path)] == [
        [RED],
        [RED],
        [RED, BLUE],
        [RED, BLUE],
        [BLUE],
        [BLUE],
    ]
    path = write_tsv(
        tmp_path / "Some_local.tsv",
        [
            {"index": 0, "question": "?", "image_path": "blue.png"},
            {"index": 1, "question": "?", "image_path": str(tmp_path / "red.png")},
            {"index": 2, "question": "?", "image_path": f"['blue.png', '{tmp_path}/red.png']"},
            {"index": 3, "question": "?", "image_path": "lost.png"},
        ],
    )
    *whole, lost = rows_of(path)
    assert [row.images for row in whole] == [[BLUE], [RED], [BLUE, RED]]
    assert "lost.png" in str(lost.problem)


def test_broken_rows_are_told_and_others_stay(tmp_path: Path) -> None:
    rows = [
        {"index": "0", "question": "?", "image": encoded("red")},
        {"index": "1", "question": "?", "image": None},
        {"index": "2", "question": "?", "image": "no-such-row"},
        {"index": "3", "question": "?", "image": "1"},
        {"index": "4", "question": "?", "image": "not base64! " * 10},
        {"index": "5", "question": "?", "image": "['" + "A" * 99},
        {"index": "6", "question": "?", "image": "nan"},
        {"index": "7", "question": "?", "image": "0"},
    ]
    path = write_tsv(tmp_path / "t.tsv", rows)
    with path.open("ab") as file:
        file.write(b"8\tcut off\n")
        file.write(b"9\tnot UTF-8 \xff\t" + encoded("red").encode() + b"\n\n")
        file.write(b'10\tin a foreign hand: 5" pipe\t' + encoded("blue").encode() + b"\r\n")
        file.write(b'11\t"never closed\t' + encoded("red").encode() + b"\n12\t?\tA\n")
    found = rows_of(path)
    assert [row.row for row in found] == list(range(12))
    good = {row.id: row.images for row in found if row.problem is None}
    assert good == {"0": [RED], "7": [RED], "10": [BLUE]}
    assert found[10].fields["question"] == 'in a foreign hand: 5" pipe'
    reasons = {row.id: str(row.problem) for row in found if row.problem is not None}
    assert [isinstance(found[n].problem, MissingImageError) for n in (1, 6, 2)] == [1, 1, 0]
    assert "'no-such-row', which the file lacks" in reasons["2"]
    assert "'1', which has no image" in reasons["3"]
    assert "not valid base64" in reasons["4"]
    assert "not valid base64" in reasons["5"] or "not a list" in reasons["5"]
    assert "2 cells and the header 3" in reasons["8"]
    assert "not UTF-8" in str(found[9].problem)
    assert "never closed" in str(found[11].problem)
    assert all("\n" not in reason for reason in reasons.values())


def test_files_that_are_no_benchmark_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    with pytest.raises(ConfigError, match="not a file"):
        open_table(locate(str(path)))
    for text, reason in (
        ("", "no column 'index'"),
        ("index\tanswer\timage\n", "no column 'question'"),
        ("index\tquestion\tanswer\n", "neither a column 'image'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            open_table(locate(str(path)))


def test_words_for_missing_values_are_options_and_empty_cells_are_not(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("index\tquestion\tA\tB\tC\tD\timage\n0\t?\tNone\tNA\tnan\t\t" + encoded("red"))
    assert rows_of(path)[0].fields == {"index": "0", "question": "?", "A": "None", "B": "NA"}


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    image = base64.b64encode(b"\x89PNG" + bytes(2**20)).decode()
    path = tmp_path / "t.tsv"
    with path.open("w") as file:
        file.write("index\tquestion\timage\n")
        for index in range(24):
            file.write(f"{index}\t?\t{image}\n")
    tracemalloc.start()
    assert sum(len(row.images[0]) for row in open_table(locate(str(path))).rows()) > 24 * 2**20
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * len(image)


def test_chosen_rows_come_in_the_order_given(tmp_path: Path) -> None:
    rows = [{"index": n, "question": "?", "image": encoded("red")} for n in range(5)]
    table = open_table(locate(str(write_tsv(tmp_path / "t.tsv", rows))))
    assert [row.row for row in table.rows([3, 1])] == [3, 1]
    small = open_table(locate(str(tmp_path / "t.tsv")), ImageLimits(max_image_bytes=8))
    assert "max_image_bytes=8" in str(next(small.rows()).problem)


def test_lists_of_answers() -> None:
    assert read_list("['a', \"b\", 3]") == ["a", "b", "3"]
    assert read_list("plain") == ["plain"]
