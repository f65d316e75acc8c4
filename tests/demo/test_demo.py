"""The demo: its pictures show their scenes, and its report has all of them."""

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image
from rich.console import Console

from flashvl.data.images import decode_image
from flashvl.data.synthetic import Sample, split_of
from flashvl.demo.run import Demo, render_demo, run_demo
from flashvl.demo.table import DEMO_TABLE, KINDS, bad_rows, good_rows, write_demo_table
from flashvl.errors import ConfigError, DataError
from tests.support.jobs import Interrupted

SEED = 5


@pytest.fixture(scope="module")
def rows() -> dict[str, tuple[Sample, bytes]]:
    return {name: (drawn, data) for name, drawn, data in good_rows(SEED)}


def kind_of(name: str) -> str:
    return name.rpartition("-")[0]


def small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((64, 64), Image.Resampling.BOX)).astype(int)


def test_rows_are_as_many_and_as_various_as_they_should_be(
    rows: dict[str, tuple[Sample, bytes]],
) -> None:
    assert len(rows) + len(bad_rows()) == 200
    assert Counter(map(kind_of, rows)) == {kind.name: kind.count for kind in KINDS}
    assert all(split_of(drawn.scene) == "heldout" for drawn, _ in rows.values())
    sides = {max(decode_image(data).size) for _, data in rows.values()}
    assert min(sides) == 96 and max(sides) > 1000


def test_every_picture_decodes_to_its_scene(rows: dict[str, tuple[Sample, bytes]]) -> None:
    for name, (drawn, data) in rows.items():
        truth = replace(drawn, size=256).image()
        if kind_of(name) in ("grey", "scan16"):
            assert drawn.scene.caption().startswith(("a sign that says", "a board that says"))
            truth = truth.convert("L").convert("RGB")
        # Transparent paper becomes white, a little lighter than it was; the rest is compression.
        tolerance = 30 if kind_of(name) == "transparent" else 8
        assert np.abs(small(decode_image(data)) - small(truth)).mean() < tolerance, name


def test_rotated_photos_are_upright_only_by_their_tag(
    rows: dict[str, tuple[Sample, bytes]], tmp_path: Path
) -> None:
    orientations = set()
    for name, (drawn, data) in rows.items():
        if kind_of(name) != "rotated":
            continue
        path = tmp_path / name
        path.write_bytes(data)
        stored = Image.open(path)
        orientations.add(stored.getexif()[ExifTags.Base.Orientation])
        truth = small(replace(drawn, size=256).image())
        as_stored = np.abs(small(stored) - truth).mean()
        as_decoded = np.abs(small(decode_image(data)) - truth).mean()
        assert as_decoded < as_stored, name
    assert orientations == {3, 6, 8}


def test_pictures_are_stored_as_they_are_named(
    rows: dict[str, tuple[Sample, bytes]], tmp_path: Path
) -> None:
    modes = {}
    for name, (_, data) in rows.items():
        path = tmp_path / name
        path.write_bytes(data)
        with Image.open(path) as image:
            modes.setdefault(kind_of(name), set()).add((image.format, image.mode))
    assert modes == {
        "photo": {("JPEG", "RGB")},
        "rotated": {("JPEG", "RGB")},
        "cmyk": {("JPEG", "CMYK")},
        "grey": {("JPEG", "L")},
        "screenshot": {("PNG", "RGB")},
        "palette": {("PNG", "P")},
        "transparent": {("PNG", "RGBA")},
        "scan16": {("PNG", "I;16")},
        "web": {("WEBP", "RGB")},
        "clip": {("GIF", "P")},
        "bitmap": {("BMP", "RGB")},
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("truncated.jpg", "truncated"),
        ("text.jpg", "no known format"),
        ("pixel.gif", "min_image_side"),
        ("bomb.png", "60000000 in all"),
    ],
)
def test_bad_rows_are_bad_in_the_way_they_claim(name: str, said: str) -> None:
    data = bad_rows()[name]
    assert len(data) < 20_000
    with pytest.raises(DataError, match=said):
        decode_image(data)


def test_the_bomb_is_a_whole_picture_but_for_its_size() -> None:
    from flashvl.data.images import ImageLimits

    image = decode_image(bad_rows()["bomb.png"], ImageLimits(max_image_pixels=60_000_000))
    assert image.size == (10_000, 6_000) and image.getextrema() == ((0, 0),) * 3


@pytest.mark.long
def test_the_same_seed_gives_the_same_table(tmp_path: Path) -> None:
    first, second = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_demo_table(first, SEED)
    write_demo_table(second, SEED)
    table = pq.read_table(first)
    assert table.equals(pq.read_table(second)) and table.schema.equals(DEMO_TABLE)
    assert table.num_rows == len(set(table["id"].to_pylist())) == 200
    assert table["answer"].null_count == len(bad_rows())


# The whole demo, with a model that knows nothing


@pytest.fixture(scope="module")
def demo(ray_cluster: None, tiny_random: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    output = tmp_path_factory.mktemp("demo")
    (output / "mine.txt").write_text("mine")
    with pytest.raises(Interrupted):
        run_demo(output, model=str(tiny_random), on_progress=interrupt)
    (output / "report.html").write_text("old")
    return run_demo(output, model=str(tiny_random))  # replaces what the first one left


def interrupt(*_: object) -> None:
    raise Interrupted


def test_a_demo_accounts_for_every_row_and_leaves_other_files_alone(demo: Demo) -> None:
    ids = pq.read_table(demo.table)["id"].to_pylist()
    summary = demo.summary
    assert (summary.input, summary.written, summary.dead) == (200, 196, 4)
    assert {letter.id for letter in demo.dead_letters} == set(bad_rows())
    assert Counter(result.id for result in demo.results) == Counter(set(ids) - set(bad_rows()))
    assert (demo.table.parent / "mine.txt").read_text() == "mine"


class Page(HTMLParser):
    """What a reader of the report sees, and what a browser would load."""

    def __init__(self, html: str):
        super().__init__()
        self.text = ""
        self.loads: list[str] = []
        self.num_cards = 0
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.num_cards += "card" in (names.get("class") or "").split()
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "img":
            assert names["alt"]


def test_the_report_has_every_picture_and_loads_nothing(demo: Demo) -> None:
    html = demo.report.read_bytes().decode()  # a caption's carriage return stays one
    page = Page(html)
    assert page.num_cards == len(demo.results) == len(page.loads)
    assert all(link.startswith("data:image/jpeg;base64,") for link in page.loads)
    assert "url(" not in html and "@import" not in html and "<script" not in html
    for result in demo.results:
        assert result.id in page.text and result.answer in page.text
        assert result.caption.strip() in page.text
    for letter in demo.dead_letters:
        assert letter.id in page.text and letter.reason in page.text
    num_right = sum(result.caption == result.answer for result in demo.results)
    assert html.count("&#10003; right") == num_right
    assert html.count("&#10007; wrong") == len(demo.results) - num_right
    assert len(html) < 5_000_000


def test_the_console_shows_captions_dead_letters_and_totals(demo: Demo) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(render_demo(demo))
    text = console.export_text()
    for letter in demo.dead_letters:
        assert letter.id in text
    assert demo.results[0].id in text and "200 images: 196 captioned, 4 dead letters" in text


def test_a_demo_never_removes_captions_that_it_did_not_make(
    tiny_random: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "captions" / "captions" / "part-00000.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    for _ in range(2):
        with pytest.raises(ConfigError, match="not empty"):
            run_demo(tmp_path, model=str(tiny_random))
    assert mine.read_text() == "mine"
