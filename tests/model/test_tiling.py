"""Tiling: grids against exact arithmetic, stitching against a tower that only copies pixels."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashvl.model.presets import build_config
from flashvl.model.tiling import Size, Tiling, View

DYNAMIC = Tiling(mode="dynamic")
ISS = Tiling(mode="iss", margin=56)

# The grid


def all_sides(tile_size: int) -> np.ndarray:
    """Sides from 1 to 4,000 pixels: evenly spread, and near those at which the rule changes."""
    turns = [tile_size * n**0.5 for n in (0.5, 1, 2, 3, 4, 5, 6, 9, 16)] + [1, 2, 14, 4000]
    near = {int(turn) + step for turn in turns for step in (-1, 0, 1)}
    return np.array(sorted({*range(1, 4001, 29), *near} & set(range(1, 4001))))


def grid_error(sides: np.ndarray, cols: Any, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """How many times a grid of cols x rows squares is wider or narrower than width x height.

    As a fraction: (numerators, denominators), of every width x height, (n, n).
    """
    widths, heights = np.meshgrid(sides, sides, indexing="ij")
    across, down = widths * rows, heights * cols
    return np.maximum(across, down), np.minimum(across, down)


def exact_grids(sides: np.ndarray, max_tiles: int, tile_size: int) -> np.ndarray:
    """MiniCPM-V's rule in integers: [columns, rows] for every width x height, (n, n, 2)."""
    widths, heights = np.meshgrid(sides, sides, indexing="ij")
    wanted = np.minimum(-(-widths * heights // tile_size**2), max_tiles)
    best = np.ones((*wanted.shape, 2), np.int64)
    # The error of the best grid as a fraction; it begins as infinity.
    error = np.ones_like(wanted), np.zeros_like(wanted)
    for count_offset in (-1, 0, 1):
        for cols in range(1, max_tiles + 1):
            for rows in range(1, max_tiles + 1):
                count = wanted + count_offset
                allowed = (wanted > 1) & (count > 1) & (count <= max_tiles) & (cols * rows == count)
                over, under = grid_error(sides, cols, rows)
                better = allowed & (over * error[1] < error[0] * under)
                best[better] = cols, rows
                error = np.where(better, over, error[0]), np.where(better, under, error[1])
    return best


@pytest.mark.parametrize(("max_tiles", "tile_size"), [(4, 448), (4, 512), (3, 448), (9, 448)])
def test_grid_is_minicpmvs_in_exact_arithmetic(max_tiles: int, tile_size: int) -> None:
    rule = Tiling(mode="dynamic", tile_size=tile_size, patch_size=1, max_tiles=max_tiles)
    sides = all_sides(tile_size)
    grids = np.array(
        [[rule.grid((width, height)) for height in sides.tolist()] for width in sides.tolist()]
    )
    expected = exact_grids(sides, max_tiles, tile_size)
    if max_tiles <= 4:
        np.testing.assert_array_equal(grids, expected)
    # The published rule compares rounded logarithms, so that beyond four tiles rounding decides
    # between grids that suit an image equally, such as 2x3 and 3x2 a square.
    errors = [
        grid_error(sides, cols, rows)
        for cols, rows in (np.moveaxis(grids, -1, 0), np.moveaxis(expected, -1, 0))
    ]
    (over, under), (least_over, least_under) = errors
    np.testing.assert_array_equal(over * least_under, least_over * under)
    np.testing.assert_array_equal(grids.prod(-1) == 1, expected.prod(-1) == 1)
    found = {(cols, rows) for cols, rows in grids.reshape(-1, 2).tolist()}
    counts = range(1, max_tiles + 1)
    assert found == {(cols, n // cols) for n in counts for cols in range(1, n + 1) if n % cols == 0}


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((449, 449), (1, 2)),  # two tiles are wanted; the first of two equally bad grids wins
        ((640, 480), (2, 1)),
        ((1024, 768), (2, 2)),
        ((2000, 600), (3, 1)),
        ((2000, 500), (4, 1)),
        ((600, 1300), (1, 3)),
        ((4000, 1), (1, 1)),  # less than the area of a tile
        ((1, 4000), (1, 1)),
        ((4000, 60), (3, 1)),
        ((4000, 4000), (2, 2)),
    ],
    ids=str,
)
def test_grids_by_hand(size: Size, grid: tuple[int, int]) -> None:
    assert DYNAMIC.grid(size) == ISS.grid(size) == grid
    assert replace(DYNAMIC, mode="static").grid(size) == (1, 1)


def test_grid_size_replaces_the_tiles_side() -> None:
    by_stride = replace(ISS, grid_size=ISS.stride)
    assert (ISS.grid((440, 440)), by_stride.grid((440, 440))) == ((1, 1), (1, 2))
    smaller = Tiling(mode="dynamic", tile_size=336)
    assert [by_stride.grid((w, 500)) for w in range(1, 3000, 50)] == [
        smaller.grid((w, 500)) for w in range(1, 3000, 50)
    ]


# Tokens

SIZES = {1: (400, 300), 2: (640, 480), 3: (600, 1300), 4: (1024, 768)}
"""The size of an image whose grid has `num_tiles` tiles."""


@pytest.mark.parametrize(
    ("preset", "with_overview", "without"),
    [
        ("dynamic", [256, 768, 1024, 1280], [256, 512, 768, 1024]),
        ("overlap", [256, 768, 1024, 1280], [256, 512, 768, 1024]),
        ("iss", [576, 1728, 2304, 2880], [576, 1152, 1728, 2304]),
        ("static", [256] * 4, [256] * 4),
    ],
)
def test_image_tokens_of_the_presets(
    preset: str, with_overview: list[int], without: list[int]
) -> None:
    config = build_config(preset)
    rule, tokens = config.tiling_rule, config.image_seq_length
    bare = replace(rule, has_overview=False)
    assert [rule.num_tiles(size) * tokens for size in SIZES.values()] == with_overview
    assert [bare.num_tiles(size) * tokens for size in SIZES.values()] == without


def test_iss_has_the_papers_numbers() -> None:
    rule = build_config("iss").tiling_rule
    assert rule == ISS
    assert rule.margin / rule.tile_size == 0.125
    assert (rule.stride, rule.kept_patches, rule.dropped_patches) == (336, 24, 4)
    whole, grid = rule.views((1024, 768))
    assert whole == View((0, 0, 1024, 768), (336, 336), 56, ((0, 0, 448, 448),))
    assert (grid.resized, grid.frame) == ((672, 672), 56)
    assert grid.boxes == (
        (0, 0, 448, 448),
        (336, 0, 784, 448),
        (0, 336, 448, 784),
        (336, 336, 784, 784),
    )


# Stitching, with a tower that copies pixels


@st.composite
def rules(draw: st.DrawFn, mode: str, min_margin: int = 0) -> Tiling:
    """Strategy for rules of `mode`; `min_margin` is in patches."""
    patch_size = draw(st.integers(1, 6))
    patches = draw(st.integers(2 * min_margin + 1, 9))
    margin = draw(st.integers(min_margin, (patches - 1) // 2))
    return Tiling(
        mode=mode,  # type: ignore[arg-type]
        tile_size=patches * patch_size,
        patch_size=patch_size,
        margin=margin * patch_size,
        max_tiles=draw(st.integers(1, 9)),
        has_overview=draw(st.booleans()),
        grid_size=draw(st.none() | st.integers(1, 60)),
    )


SIDE = st.integers(1, 300)


def numbered(view: View) -> np.ndarray:
    """The resized image, (height, width), whose pixels are numbered from 1."""
    width, height = view.resized
    return np.arange(1, width * height + 1).reshape(height, width)


def patches_of(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """(height, width) -> (rows, columns, patch_size, patch_size)."""
    rows, cols = (side // patch_size for side in pixels.shape)
    assert (rows * patch_size, cols * patch_size) == pixels.shape
    return pixels.reshape(rows, patch_size, cols, patch_size).swapaxes(1, 2)


def kept_of_grid(rule: Tiling, size: Size) -> tuple[View, list[np.ndarray]]:
    """The view of the grid, and the patches of each tile that are kept after the tower."""
    view = rule.views(size)[-1]
    framed = np.pad(numbered(view), view.frame)  # the frame is 0
    kept = []
    for left, top, right, bottom in view.boxes:
        tokens = patches_of(framed[top:bottom, left:right], rule.patch_size)
        first, count = rule.dropped_patches, rule.kept_patches
        kept.append(tokens[first : first + count, first : first + count])
    return view, kept


def side_by_side(tiles: list[np.ndarray], cols: int) -> np.ndarray:
    """The patches of tiles in row-major order, put side by side."""
    rows = [tiles[start : start + cols] for start in range(0, len(tiles), cols)]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


@settings(deadline=None)
@given(rule=rules("iss") | rules("dynamic") | rules("static"), size=st.tuples(SIDE, SIDE))
def test_kept_patches_side_by_side_are_the_image(rule: Tiling, size: Size) -> None:
    view, kept = kept_of_grid(rule, size)
    stitched = side_by_side(kept, rule.grid(size)[0])
    # Equal to the patches of the image: each occurs once, and none of the frame.
    np.testing.assert_array_equal(stitched, patches_of(numbered(view), rule.patch_size))


@settings(deadline=None, max_examples=50)
@given(rule=rules("overlap", min_margin=1), size=st.tuples(SIDE, SIDE))
def test_without_dropping_patches_are_repeated(rule: Tiling, size: Size) -> None:
    cols, rows = rule.grid(size)
    assume(cols * rows > 1)
    view, kept = kept_of_grid(rule, size)
    corners = np.concatenate([tile[:, :, 0, 0].ravel() for tile in kept])  # the number of a patch
    seen, times = np.unique(corners, return_counts=True)
    everything = patches_of(numbered(view), rule.patch_size)[:, :, 0, 0]
    np.testing.assert_array_equal(seen, np.sort(everything.ravel()))
    assert times.max() > 1
    # Neighbours share twice the margin, and the image ends where the tiles end.
    shared = 2 * rule.margin // rule.patch_size
    side = rule.tile_size // rule.patch_size
    assert everything.shape == tuple(n * side - (n - 1) * shared for n in (rows, cols))


# Boxes

ANY_RULE = (
    rules("static")
    | rules("dynamic")
    | rules("overlap")
    | rules("iss")
    | rules("dynamic").map(lambda rule: replace(rule, margin=0, tile_fit="center_crop"))
)


@settings(deadline=None)
@given(rule=ANY_RULE, size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_every_box_is_a_tile_of_the_framed_image(rule: Tiling, size: Size) -> None:
    views = rule.views(size)
    cols, rows = rule.grid(size)
    assert cols * rows <= rule.max_tiles
    boxes = sum(len(view.boxes) for view in views)
    assert boxes == rule.num_tiles(size) == cols * rows + (rule.has_overview and cols * rows > 1)
    for view in views:
        width, height = (side + 2 * view.frame for side in view.resized)
        for left, top, right, bottom in view.boxes:
            assert 0 <= left and 0 <= top and right <= width and bottom <= height
            assert (right - left, bottom - top) == (rule.tile_size, rule.tile_size)
        left, top, right, bottom = view.source
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@settings(deadline=None)
@given(rule=rules("dynamic"), size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)))
def test_center_crop_takes_the_middle_square_of_each_part(rule: Tiling, size: Size) -> None:
    rule = replace(rule, margin=0, tile_fit="center_crop", has_overview=False)
    cols, rows = rule.grid(size)
    square = max(int(min(size[0] / cols, size[1] / rows)), 1)
    views = rule.views(size)
    assert len(views) == cols * rows
    for index, view in enumerate(views):
        left, top, right, bottom = view.source
        assert (right - left, bottom - top) == (square, square)
        middle_x = (index % cols + 0.5) * size[0] / cols
        middle_y = (index // cols + 0.5) * size[1] / rows
        assert abs((left + right) / 2 - middle_x) < 0.5 + 1e-6  # a box is in whole pixels
        assert abs((top + bottom) / 2 - middle_y) < 0.5 + 1e-6


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 450}, r"tile_size \(450\) must be a multiple of patch_size \(14\)"),
        ({"margin": 50}, r"margin \(50\) must be a multiple of patch_size \(14\)"),
        ({"margin": 224}, r"margin \(224\) .* less than half of tile_size \(448\)"),
        ({"margin": -14}, r"margin \(-14\)"),
        ({"margin": 56, "tile_fit": "center_crop"}, r"tile_fit 'resize'"),
        ({"max_tiles": 0}, r"max_tiles \(0\) must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Tiling(mode="iss", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
