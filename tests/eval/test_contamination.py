"""Copies of pictures and questions are found in tables for training, and others are not."""

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.data import synthetic
from flashvl.data.limits import DEFAULT_LIMITS
from flashvl.data.schema import CONVERSATIONS, PREFERENCES
from flashvl.errors import ConfigError
from flashvl.eval.contamination import job as contamination
from flashvl.eval.contamination.config import ContaminationJob
from flashvl.eval.contamination.outcome import Counts
from flashvl.eval.contamination.pictures import (
    CUTS,
    MAX_DISTANCE,
    MIN_DETAIL,
    NUM_BANDS,
    Fingerprints,
    HashIndex,
    PictureIndex,
    fingerprints_of,
    read_fingerprints,
)
from flashvl.eval.contamination.texts import QuestionIndex, split_words
from tests.support.benchmarks import write_tsv
from tests.support.images import base64_of, encode
from tests.support.jobs import Interrupted


def encoded_at(quality: int) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.open(io.BytesIO(encode(image, "JPEG", quality=quality)))


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def cropped(image: Image.Image) -> Image.Image:
    """Without 3 % of each side, half of it at each edge."""
    cut = [round(0.015 * side) for side in image.size]
    return image.crop((*cut, image.width - cut[0], image.height - cut[1]))


def cropped_at_a_corner(image: Image.Image) -> Image.Image:
    return image.crop((round(0.03 * image.width), round(0.03 * image.height), *image.size))


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def all_at_once(image: Image.Image) -> Image.Image:
    return encoded_at(50)(grey(cropped(halved(image))))


COPIES: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {
    "the same": (lambda image: image, 1),
    "JPEG of quality 30": (encoded_at(30), 0.98),
    "half the size": (halved, 0.95),
    "grey": (grey, 1),
    "cropped": (cropped, 0.97),
    "cropped at a corner": (cropped_at_a_corner, 0.98),
    "all at once": (all_at_once, 0.92),
}
"""Ways in which a picture is copied, and the share of the procedural world's pictures whose copies
are found, at least; its thin lines on 128 pixels suffer more than a photograph."""
MAX_FALSE = 0.015
"""Share of other pictures of the procedural world that are taken for one of 300, at most: its
scenes are made of few shapes in few places, so that some differ in one hue or one bar."""


def index_of(images: Sequence[Image.Image]) -> tuple[PictureIndex, list[int]]:
    """The index of pictures, and which of them have enough detail to be in it."""
    prints = [fingerprints_of(image, CUTS) for image in images]
    kept = [n for n, each in enumerate(prints) if each.details[0] >= MIN_DETAIL]
    joined = Fingerprints.join([prints[n] for n in kept])
    return PictureIndex(joined.codes, joined.thumbnails), kept


def pictures_of(split: synthetic.Split, count: int) -> list[Image.Image]:
    return [drawn.image() for drawn in synthetic.samples(split, 0, count)]


def test_copies_are_found_and_other_pictures_hardly_ever() -> None:
    images = pictures_of("heldout", 300)
    index, kept = index_of(images)
    assert len(kept) >= 0.95 * len(images)
    for name, (copy, least) in COPIES.items():
        prints = Fingerprints.join([fingerprints_of(copy(images[n])) for n in kept])
        found = index.search(prints)
        right = sum(place == picture for place, picture, _ in found)
        assert right >= least * len(kept), f"{name}: {right} of {len(kept)}"
    others = Fingerprints.join([fingerprints_of(image) for image in pictures_of("train", 1000)])
    false = {place for place, _, _ in index.search(others)}
    assert len(false) <= MAX_FALSE * 1000, len(false)


def test_textures_are_never_taken_for_each_other() -> None:
    draw = synthetic.scenes.draw_texture
    index, kept = index_of([draw(seed, 128) for seed in range(200)])
    assert len(kept) > 100
    others = Fingerprints.join([fingerprints_of(draw(seed, 128)) for seed in range(200, 1200)])
    assert index.search(others) == []


@pytest.mark.parametrize("color", ["white", "black", "#7f8081"])
def test_flat_pictures_are_not_compared(color: str) -> None:
    """An encoder's noise, and a gradient over the picture, are no detail."""
    flat = Image.new("RGB", (300, 200), color)
    gradient = Image.linear_gradient("L").resize((300, 200))
    for image in (flat, encoded_at(10)(flat), Image.blend(flat, gradient.convert("RGB"), 0.1)):
        assert fingerprints_of(image).details[0] < MIN_DETAIL


def test_a_jpeg_is_decoded_at_a_fraction_with_nearly_the_same_hash() -> None:
    """Noise of 24 x 18 grains at 1280 x 960, as a photograph has its detail."""
    grains = np.random.default_rng(0).integers(0, 256, (18, 24, 3), dtype=np.uint8)
    image = Image.fromarray(grains).resize((1280, 960), Image.Resampling.BICUBIC)
    reduced = read_fingerprints(encode(image, "JPEG", quality=90), DEFAULT_LIMITS)
    different = np.bitwise_count(reduced.codes ^ fingerprints_of(image).codes).sum()
    assert different <= 6


def test_the_hash_is_that_of_the_formula() -> None:
    """Sums over all pixels for each of the lowest frequencies, without a transform."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    waves = [[math.cos(math.pi * k * (2 * x + 1) / 128) for x in range(64)] for k in range(1, 17)]
    sums = [float((np.outer(down, right) * pixels).sum()) for down in waves for right in waves]
    bits = np.array(sums) > np.median(sums)
    found = fingerprints_of(Image.fromarray(pixels))
    assert np.array_equal(np.unpackbits(found.codes.view(np.uint8)), bits)
    assert found.details[0] == pytest.approx(np.median(np.abs(sums)) / 32, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    flips=st.lists(st.integers(0, 60), min_size=1, max_size=20),
    num_kinds=st.integers(1, 8),
)
def test_the_search_finds_what_brute_force_finds(
    seed: int, flips: list[int], num_kinds: int
) -> None:
    """Hashes of a few kinds, which crowd in the same bands, with some of their bits turned."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 2, (num_kinds, 256), dtype=np.uint8)

    def draw(counts: Sequence[int]) -> np.ndarray:
        drawn = kinds[rng.integers(num_kinds, size=len(counts))].copy()
        for bits, count in zip(drawn, counts, strict=True):
            bits[rng.choice(256, count, replace=False)] ^= 1
        return drawn

    kept, asked = draw(rng.integers(0, 40, 50)), draw(flips)
    distances = (asked[:, None] != kept[None]).sum(-1)
    expected = {
        (int(query), int(place), int(distances[query, place]))
        for query, place in np.argwhere(distances <= MAX_DISTANCE)
    }
    index = HashIndex(np.packbits(kept, axis=1).view(np.uint16))
    found = index.search(np.packbits(asked, axis=1).view(np.uint16))
    assert set(zip(*(each.tolist() for each in found), strict=True)) == expected


def test_a_crowded_search_is_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvl.eval.contamination.pictures.MAX_CANDIDATES", 100)
    index = HashIndex(np.zeros((90, NUM_BANDS), np.uint16))
    queries, places, distances = index.search(np.zeros((7, NUM_BANDS), np.uint16))
    assert len(queries) == 7 * 90 and set(distances.tolist()) == {0}
    assert len(set(zip(queries.tolist(), places.tolist(), strict=True))) == 7 * 90


ENGLISH = "Which of the two rivers on this old map flows through more than three countries?"
CHINESE = (
    "\u56fe\u4e2d\u7684\u4e24\u6761\u6cb3\u6d41\u54ea\u4e00\u6761"
    "\u6d41\u7ecf\u7684\u56fd\u5bb6\u66f4\u591a\u8bf7\u9009\u62e9"
)
"""Which of the two rivers in the picture flows through more countries, please choose: 21 words."""
SHORT = "What is on the map?"


def test_questions_are_found_in_longer_conversations() -> None:
    index = QuestionIndex([ENGLISH, CHINESE, SHORT, None])
    assert (index.num_ngrams > 0).tolist() == [True, True, False, False]
    planted = (
        "<image>\nLook closely.  WHICH of the two rivers, on this old map,\nflows through more"
    )
    rows = [
        ["Hello!", "How are you?"],
        ["A map.", f"{planted} than three countries? (a) one (b) both", "Both."],
        [f"\u4f60\u597d\u3002{CHINESE[:10]}\uff0c{CHINESE[10:]}\uff1f A. \u7532 B. \u4e59"],
        [SHORT],
        [ENGLISH[:40], ENGLISH[40:]],  # in two turns: fewer than 70 % of the n-grams
        [" ".join(reversed(ENGLISH.split()))],
    ]
    assert index.search(rows) == [(1, 0, 1.0), (2, 1, 1.0)]


def test_the_share_of_ngrams_is_palms() -> None:
    """15 words are 8 n-grams of 8; each word that is cut off at the end costs one."""
    words = split_words(ENGLISH)
    assert len(words) == 15
    index = QuestionIndex([ENGLISH])
    for num_cut in range(5):
        found = index.search([[" ".join(words[: 15 - num_cut])]])
        share = (8 - num_cut) / 8
        assert found == ([(0, 0, share)] if share >= 0.7 else [])


def test_a_template_says_nothing() -> None:
    """What more than ten questions have in common does not count; the rest of each does."""
    hint = "Please answer the question and give the letter of the right option at the end."
    questions = [
        f"{hint} What is number {n} of the rivers on this old map called?" for n in range(12)
    ]
    index = QuestionIndex([*questions, *[ENGLISH] * 11])
    assert index.num_ngrams[0] == 8 and index.num_ngrams[12] == 0
    assert index.search([[hint], [ENGLISH]]) == []
    assert [(row, item) for row, item, _ in index.search([[questions[3]]])] == [(0, 3)]


def photo(seed: int) -> Image.Image:
    """Smooth grains of colour, all different, which have detail as a photograph has."""
    grains = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(grains).resize((320, 240), Image.Resampling.BICUBIC)


def talk(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


def write_benchmarks(folder: Path) -> Path:
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"question": ENGLISH, "image": base64_of(encode(photo(0)))},
        {"question": SHORT, "image": base64_of(encode(photo(1)))},
        {"question": CHINESE, "image": base64_of(encode(photo(2)))},
        {"question": SHORT, "image": base64_of(encode(Image.new("RGB", (90, 80), "white")))},
        {"question": SHORT, "image": base64_of(b"\xff\xd8" + b"not a picture" * 9)},
        {"question": SHORT, "image": "no-such-row"},
        {"question": SHORT},  # is left out, as it has no image
        {"question": f"{SHORT} A house, a river, a mountain or a desert?", "image": "0"},
    ]
    options = dict(zip("ABCD", ["one", "two", "three", "four"], strict=True))
    write_tsv(
        folder / "MMStar.tsv",
        [{"index": n, "answer": "A", **options, **row} for n, row in enumerate(rows)],
    )
    return folder


NUM_CONVERSATIONS = 24


def write_tables(folder: Path) -> list[str]:
    """Conversations, among which rows 7, 11 and 15 hold something, and preferences."""
    messages = talk("<image>\nWhat is this?", "Grains of colour.")
    rows = [
        {"row": n, "images": [encode(photo(100 + n), "JPEG")], "messages": messages}
        for n in range(NUM_CONVERSATIONS)
    ]
    planted = talk("<image>\nHello.", "Hello!", f"{ENGLISH}\nA. one B. two", "A")
    rows[7] |= {"images": [encode(photo(0), "JPEG", quality=30)], "messages": planted}
    rows[11] |= {"images": [b"no picture"]}
    rows[15] |= {"images": [], "messages": talk(f"\u8bf7\u95ee\uff1a{CHINESE}", "A")}
    (folder / "made" / "conversations").mkdir(parents=True)
    (folder / "made" / "dead_letters").mkdir()
    path = folder / "made" / "conversations" / "part-00000.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=CONVERSATIONS), path, row_group_size=3)
    copy = {
        "row": 40,
        "images": [encode(photo(200)), encode(cropped(grey(halved(photo(1)))), "JPEG")],
        "prompt": talk("<image><image>\nWhich is better?"),
        "chosen": talk("", "The first.")[1:],
        "rejected": talk("", "The second.")[1:],
    }
    pairs = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist([copy], schema=PREFERENCES), pairs)
    return [str(folder / "made"), str(pairs)]


def test_the_job_finds_what_was_planted_and_resumes(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = write_tables(tmp_path / "tables")
    job = ContaminationJob(
        tables=tuple(tables),
        benchmarks=str(write_benchmarks(tmp_path / "benchmarks")),
        output=str(tmp_path / "out"),
    )
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 100)

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done > 5:
            raise Interrupted

    plan = contamination.check_contamination(job)
    benchmarks = contamination.read_questions(plan)
    with pytest.raises(Interrupted):
        contamination.compare_tables(plan, benchmarks, interrupt)
    num_found = pq.read_table(tmp_path / "out" / "rows").num_rows
    assert 0 < num_found < NUM_CONVERSATIONS

    plan = contamination.check_contamination(job)
    assert plan.finished() is None
    found = contamination.compare_tables(plan, benchmarks)
    assert (found.rows, found.dead) == (NUM_CONVERSATIONS, 1)
    assert found.benchmarks == {
        "mmstar": Counts(
            items=7,
            pictures_found=3,
            questions_found=2,
            found_together=1,
            pictures_not_compared=3,
            questions_not_compared=4,
            unreadable=2,
        )
    }
    matches = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    conversations = f"{tables[0]}/conversations"
    assert [
        (each["item"], each["kind"], each["table"], each["table_row"], each["image"])
        for each in matches
    ] == [
        ("mmstar/0", "image", conversations, 7, 0),
        ("mmstar/7", "image", conversations, 7, 0),
        ("mmstar/0", "text", conversations, 7, None),
        ("mmstar/2", "text", conversations, 15, None),
        ("mmstar/1", "image", tables[1], 40, 1),
    ]
    assert matches[0]["id"] == "part-00000.parquet:2:1" and matches[2]["overlap"] == 1
    assert all(each["distance"] <= 31 for each in matches if each["kind"] == "image")
    items = {row["item"]: row for row in pq.read_table(tmp_path / "out/items.parquet").to_pylist()}
    assert [id for id, row in items.items() if row["are_found_together"]] == ["mmstar/0"]
    assert "decoded" in items["mmstar/4"]["problem"] and items["mmstar/5"]["problem"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6 and ENGLISH in page

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray is not needed")

    monkeypatch.setattr("flashvl.cli.evaluation.start_ray", fail)
    options = [*tables, "--benchmarks", job.benchmarks, "--output", job.output]
    told = CliRunner().invoke(app, ["eval", "contamination", *options, "--json"])
    assert json.loads(told.stdout) == json.loads((tmp_path / "out/contamination.json").read_text())
    told = CliRunner().invoke(app, ["eval", "contamination", *options])
    assert "24 rows compared, 1 dead letters" in told.stdout and "MMStar" in told.stdout
    write_tsv(tmp_path / "benchmarks" / "MMStar.tsv", [{"index": 0, "question": "?", "image": "x"}])
    told = CliRunner().invoke(app, ["eval", "contamination", *options])
    assert told.exit_code == 2 and "another job's results: benchmarks was" in told.stderr


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    benchmarks = str(write_benchmarks(tmp_path / "benchmarks"))
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"row": [0], "images": [["a.jpg"]], "messages": [None]}), table)
    job = ContaminationJob(
        tables=(str(table),), benchmarks=benchmarks, output=str(tmp_path / "out")
    )
    with pytest.raises(ConfigError, match="'images' of type list<.*string>, which must be lists"):
        contamination.check_contamination(job)
    inside = job.model_copy(update={"output": f"{benchmarks}/out"})
    with pytest.raises(ConfigError, match="lies in the input"):
        contamination.check_contamination(inside)
