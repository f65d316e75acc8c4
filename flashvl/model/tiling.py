"""The geometry of tiling: how an image is cut into tiles, and which patches of a tile are kept.

    static   the whole image becomes one square tile (paper, Figure 3a)
    dynamic  a grid of tiles that fits the image's shape, after an overview (3b, MiniCPM-V's rule)
    overlap  the same grid with overlapping tiles, all patches kept (3c)
    iss      Implicit Semantic Stitching: overlapping tiles of the image in a black frame; after the
             tower the overlapping patches are dropped, so that those kept, put side by side, show
             every part of the image once (3d)

It computes with sizes only and never sees an image. Sizes and boxes are in pixels; boxes are
(left, top, right, bottom), like PIL's.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

TilingMode = Literal["static", "dynamic", "overlap", "iss"]
TileFit = Literal["resize", "center_crop"]
Size = tuple[int, int]
"""(width, height)."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class View:
    """One step of cutting: a part of the image is resized, framed in black, and cut into tiles."""

    source: Box
    """Box of the part, in the pixels of the whole image."""
    resized: Size
    """Size to which the part is resized."""
    frame: int
    """Width of the black frame around the resized part."""
    boxes: tuple[Box, ...]
    """Boxes of the tiles in row-major order, in the framed part; each has the size of a tile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """The rule by which a model's images are cut; the defaults are those of the published models.

    `has_overview`, `tile_fit` and `grid_size` are options because the published code does not show
    what those models use.
    """

    mode: TilingMode = "static"
    tile_size: int = 448
    """Side of a tile: the tower's `image_size`."""
    patch_size: int = 14
    """Side of a patch: the tower's `patch_size`."""
    margin: int = 0
    """Half of the overlap of neighbouring tiles in `overlap` and `iss`. The paper's 12.5% of a tile
    are 56 pixels of 448."""
    max_tiles: int = 4
    """Tiles of the grid at most; the overview is not counted."""
    has_overview: bool = True
    """Whether the whole image in one tile precedes a grid of two tiles or more."""
    tile_fit: TileFit = "resize"
    """How a part that is not square becomes a tile: it is squeezed, or its centre is taken."""
    grid_size: int | None = None
    """Side of the square of the image that should get one tile: the area of the image, divided by
    that of the square, is the wanted number of tiles. None: `tile_size`; ISS may use its stride."""

    def __post_init__(self) -> None:
        if self.tile_size % self.patch_size:
            raise ValueError(
                f"tile_size ({self.tile_size}) must be a multiple of patch_size ({self.patch_size})"
            )
        if self.margin % self.patch_size or not 0 <= 2 * self.margin < self.tile_size:
            raise ValueError(
                f"margin ({self.margin}) must be a multiple of patch_size ({self.patch_size}) and"
                f" less than half of tile_size ({self.tile_size})"
            )
        if self.margin and self.tile_fit != "resize":
            raise ValueError("overlapping tiles need tile_fit 'resize'; set it, or set margin to 0")
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles ({self.max_tiles}) must be at least 1")

    @property
    def stride(self) -> int:
        """Pixels from the beginning of one tile to that of the next."""
        overlaps = self.mode in ("overlap", "iss")
        return self.tile_size - 2 * self.margin if overlaps else self.tile_size

    @property
    def dropped_patches(self) -> int:
        """Patches that are dropped on each side of a tile after the tower."""
        return self.margin // self.patch_size if self.mode == "iss" else 0

    @property
    def kept_patches(self) -> int:
        """Patches that are kept along each side of a tile."""
        return self.tile_size // self.patch_size - 2 * self.dropped_patches

    def num_tiles(self, size: Size) -> int:
        """Number of tiles of an image of `size`, the overview included."""
        return sum(len(view.boxes) for view in self.views(size))

    def needed_size(self, size: Size) -> Size:
        """The least size to which an image of `size` may be shrunk before its tiles are cut.

        An image shrunk further would have to be enlarged for some tile.
        """
        views = self.views(size)
        width = max(v.resized[0] / (v.source[2] - v.source[0]) for v in views) * size[0]
        height = max(v.resized[1] / (v.source[3] - v.source[1]) for v in views) * size[1]
        return math.ceil(width), math.ceil(height)

    def views(self, size: Size) -> tuple[View, ...]:
        """The steps that cut an image of `size`: the overview first, then the grid."""
        cols, rows = self.grid(size)
        if cols * rows == 1:
            return self._cut(size, 1, 1)
        overview = self._cut(size, 1, 1) if self.has_overview else ()
        return overview + self._cut(size, cols, rows)

    def grid(self, size: Size) -> tuple[int, int]:
        """(columns, rows) of the tiles: the rule of MiniCPM-V's `slice_image`.

        The number of tiles is that of the `grid_size` squares in the image's area, or one more or
        less. Of all grids with these numbers, the first whose shape is nearest to the image's wins.
        """
        if self.mode == "static":
            return 1, 1
        width, height = size
        area = (self.grid_size or self.tile_size) ** 2
        wanted = min(math.ceil(width * height / area), self.max_tiles)
        if wanted <= 1:
            return 1, 1
        counts = (n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= self.max_tiles)
        grids = [(cols, n // cols) for n in counts for cols in range(1, n + 1) if n % cols == 0]
        shape = math.log(width / height)
        return min(grids, key=lambda grid: abs(shape - math.log(grid[0] / grid[1])))

    def _cut(self, size: Size, cols: int, rows: int) -> tuple[View, ...]:
        """The steps that cut the image into `cols` x `rows` tiles."""
        if self.tile_fit == "center_crop":
            return self._cut_centers(size, cols, rows)
        side, stride = self.tile_size, self.stride
        boxes = tuple(
            (left, top, left + side, top + side)
            for top in range(0, rows * stride, stride)
            for left in range(0, cols * stride, stride)
        )
        frame = self.margin if self.mode == "iss" else 0
        # Without a frame, the outer tiles end at the image's borders.
        width, height = (n * stride + side - stride - 2 * frame for n in (cols, rows))
        return (View((0, 0, *size), (width, height), frame, boxes),)

    def _cut_centers(self, size: Size, cols: int, rows: int) -> tuple[View, ...]:
        """The steps that take the largest square in the centre of each part of the image."""
        part_width, part_height = size[0] / cols, size[1] / rows
        square = max(int(min(part_width, part_height)), 1)
        tile = (self.tile_size, self.tile_size)
        corners = [
            (
                round((col + 0.5) * part_width - square / 2),
                round((row + 0.5) * part_height - square / 2),
            )
            for row in range(rows)
            for col in range(cols)
        ]
        return tuple(
            View((x, y, x + square, y + square), tile, 0, ((0, 0, *tile),)) for x, y in corners
        )


def describe_tiles(size: Size, rule: Tiling, image_seq_length: int) -> dict[str, Any]:
    """How an image of `size` is cut, in numbers for JSON; sizes and boxes are in pixels.

    Args:
        image_seq_length: tokens that the LLM gets of each tile.
    """
    num_tiles = rule.num_tiles(size)
    return {
        "image_size": size,
        "mode": rule.mode,
        "tile_size": rule.tile_size,
        "patch_size": rule.patch_size,
        "stride": rule.stride,
        "kept_patches": rule.kept_patches,
        "dropped_patches": rule.dropped_patches,
        "grid": rule.grid(size),
        "views": [asdict(view) for view in rule.views(size)],
        "num_tiles": num_tiles,
        "image_seq_length": image_seq_length,
        "num_image_tokens": num_tiles * image_seq_length,
    }
