"""Drawings of tiles: their numbers, their colours, and the command that draws them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.data.images import decode_image
from flashvl.data.synthetic import sample
from flashvl.demo.tiles import GRID as TILE_COLORS
from flashvl.demo.tiles import (
    KEPT,
    OUTLINE,
    OVERVIEW,
    PAPER,
    REPEATED,
    draw_tile,
    draw_tiles,
)
from flashvl.model.presets import build_config
from flashvl.model.tiling import Size, Tiling, describe_tiles

TILINGS = ("static", "dynamic", "overlap", "iss")
PURPLE = (130, 20, 200)

runner = CliRunner()


def rule_of(preset: str) -> tuple[Tiling, int]:
    config = build_config(preset)
    return config.tiling_rule, config.image_seq_length


def counts(picture: Image.Image) -> dict[tuple[int, ...], int]:
    """The number of pixels of each colour."""
    return {color: times for times, color in picture.getcolors(picture.width * picture.height)}


# The numbers


def test_numbers_of_iss() -> None:
    described = json.loads(json.dumps(describe_tiles((1024, 768), *rule_of("iss"))))
    views = described.pop("views")
    assert described == {
        "image_size": [1024, 768],
        "mode": "iss",
        "tile_size": 448,
        "patch_size": 14,
        "stride": 336,
        "kept_patches": 24,
        "dropped_patches": 4,
        "grid": [2, 2],
        "num_tiles": 5,
        "image_seq_length": 576,
        "num_image_tokens": 2880,
    }
    assert [view["resized"] for view in views] == [[336, 336], [672, 672]]
    assert [view["frame"] for view in views] == [56, 56]
    assert [len(view["boxes"]) for view in views] == [1, 4]
    assert views[1]["boxes"][3] == [336, 336, 784, 784]
    assert views[1]["source"] == [0, 0, 1024, 768]


@pytest.mark.parametrize(("preset", "tokens"), zip(TILINGS, (256, 1280, 1280, 2880), strict=True))
def test_tokens_of_each_tiling(preset: str, tokens: int) -> None:
    described = describe_tiles((1024, 768), *rule_of(preset))
    assert described["num_image_tokens"] == tokens
    assert described["num_tiles"] == sum(len(view["boxes"]) for view in described["views"])


# The pixels


@pytest.mark.parametrize("preset", ["iss", "tiny-iss", "dynamic"])
def test_kept_patches_keep_their_colours_and_dropped_ones_are_grey(preset: str) -> None:
    rule, tokens = rule_of(preset)
    cell = 10
    patches = rule.tile_size // rule.patch_size
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (patches, patches, 3), dtype=np.uint8)
    tile = np.kron(colors, np.ones((cell, cell, 1), np.uint8))  # each patch of one colour
    drawn = np.asarray(draw_tile(Image.fromarray(tile), rule, tokens))
    assert drawn.shape == tile.shape
    middles = drawn[cell // 2 :: cell, cell // 2 :: cell].astype(int)
    is_kept = np.zeros((patches, patches), bool)
    is_kept[(inner := slice(rule.dropped_patches, patches - rule.dropped_patches)), inner] = True
    assert is_kept.sum() == rule.kept_patches**2
    np.testing.assert_array_equal(middles[is_kept], colors[is_kept])
    assert np.ptp(middles[~is_kept], axis=-1).max(initial=0) == 0  # no colour is left
    # Green lies around what is kept.
    assert tuple(drawn[rule.dropped_patches * cell, patches * cell // 2]) == KEPT


@pytest.mark.parametrize("preset", TILINGS)
def test_picture_shows_every_tile_in_its_colour(preset: str) -> None:
    picture = draw_tiles(Image.new("RGB", (1024, 768), PURPLE), *rule_of(preset))
    found = counts(picture)
    assert max(found, key=found.__getitem__) in (PAPER, PURPLE)
    has_grid = preset != "static"
    for color in (OVERVIEW, *TILE_COLORS[:4]):  # around a tile, and on the whole image
        assert (found.get(color, 0) > 4 * OUTLINE * 250) == has_grid
    assert not any(color in found for color in TILE_COLORS[4:])
    assert found[KEPT] > 1000
    # Nothing is black but the frame, drawn around the whole image.
    assert (found.get((0, 0, 0), 0) > 10_000) == (preset == "iss")


def test_repeated_patches_are_marked_only_where_tiles_overlap() -> None:
    stripes = {}
    for preset in ("dynamic", "overlap", "iss"):
        pixels = np.asarray(draw_tiles(Image.new("RGB", (1024, 768)), *rule_of(preset))).astype(int)
        orange = (pixels[..., 0] > 100) & (pixels[..., 2] < 30) & (pixels[..., 1] > 50)
        stripes[preset] = int(orange.sum())
    assert stripes["overlap"] > 20_000 > 100 * stripes["dynamic"]
    assert stripes["iss"] == stripes["dynamic"] == 0
    assert REPEATED[2] < 30  # else the test looks for another colour


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (30, 20), (3000, 400)], ids=str)
@pytest.mark.parametrize("preset", ["static", "overlap", "iss", "tiny-iss"])
def test_any_image_can_be_drawn(preset: str, size: Size) -> None:
    picture = draw_tiles(Image.new("RGB", size), *rule_of(preset))
    assert picture.mode == "RGB"
    assert picture.width <= 1700 and picture.height <= 1300


def test_parts_that_are_cropped_are_drawn_on_the_image() -> None:
    rule, tokens = rule_of("dynamic")
    rule = replace(rule, tile_fit="center_crop", max_tiles=6)
    picture = draw_tiles(Image.new("RGB", (1600, 1000), PURPLE), rule, tokens)
    found = counts(picture)
    assert rule.grid((1600, 1000)) == (3, 2)
    assert all(color in found for color in (OVERVIEW, *TILE_COLORS))
    single = draw_tiles(Image.new("RGB", (400, 200), PURPLE), rule, tokens)
    assert counts(single)[PURPLE] > 100_000


# The command


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    replace(sample("heldout", 0, 0), size=1024).image().resize((1024, 768)).save(path)
    return path


def refused(*arguments: str) -> str:
    """Run a command that must fail: exit status 2, one line on stderr, which is returned."""
    result = runner.invoke(app, ["tiles", *arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_command_writes_picture_and_numbers(photo: Path, tmp_path: Path) -> None:
    output, numbers = tmp_path / "tiles.png", tmp_path / "tiles.json"
    result = runner.invoke(
        app, ["tiles", str(photo), "--output", str(output), "--json", str(numbers)]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 5 tiles, 2880 image tokens\n"
    expected = describe_tiles((1024, 768), *rule_of("iss"))  # the default
    assert json.loads(numbers.read_text()) == json.loads(json.dumps(expected))
    drawn = draw_tiles(decode_image(photo.read_bytes()), *rule_of("iss"))
    np.testing.assert_array_equal(np.asarray(Image.open(output)), np.asarray(drawn))


def test_command_explains_itself() -> None:
    result = runner.invoke(app, ["tiles", "--help"])
    assert result.exit_code == 0
    assert "Example: flashvl tiles" in result.stdout


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    line = refused("/no/such/photo.jpg", "--output", str(tmp_path / "tiles.png"))
    assert "/no/such/photo.jpg cannot be read (No such file" in line


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("no photo")
    line = refused(str(tmp_path / "photo.jpg"), "--output", str(tmp_path / "tiles.png"))
    assert "no known format" in line
    assert not (tmp_path / "tiles.png").exists()


def test_an_output_that_cannot_be_written_is_named(photo: Path, tmp_path: Path) -> None:
    assert "output /proc/no/tiles.png cannot be written" in refused(
        str(photo), "--output", "/proc/no/tiles.png"
    )
    options = ("--output", str(tmp_path / "tiles.png"), "--json", "/proc/no/tiles.json")
    assert "--json /proc/no/tiles.json" in refused(str(photo), *options)


def test_an_unknown_tiling_is_named(photo: Path, tmp_path: Path) -> None:
    line = refused(str(photo), "--tiling", "isss", "--output", str(tmp_path / "tiles.png"))
    assert "'isss'" in line and "dynamic, iss" in line
