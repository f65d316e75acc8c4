"""Which pixels of an image the tower sees, and which of its patches the LLM: pure geometry.

    static   the whole image becomes one square tile (paper, Figure 3a)
    dynamic  a grid of tiles that fits the image's shape, an overview first (3b, MiniCPM-V's rule)
    overlap  the same grid, its tiles overlapping, nothing dropped (3c)
    iss      Implicit Semantic Stitching: overlapping tiles of the image in a black frame; behind
             the tower the patches that overlap are dropped, so that those kept, side by side, are
             the image's own, each once (3d)

It knows no pixels, only sizes: every size and box is in pixels, and boxes are PIL's
(left, top, right, bottom).
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
    """The image (or a part of it) resized, in a black frame, and the tiles cut out of it."""

    source: Box
    """The part of the image, in the image's own pixels."""
    resized: Size
    """What that part is resized to."""
    frame: int
    """Black pixels on each side, around the resized image."""
    boxes: tuple[Box, ...]
    """Tiles in row-major order, in coordinates of the framed image; each of the tile's size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """The rule by which every image of a model is cut; the defaults are the published models'.

    What the published code does not show is a switch: `has_overview`, `tile_fit`, `grid_size`.
    """

    mode: TilingMode = "static"
    tile_size: int = 448
    """Side of a tile: the tower's `image_size`."""
    patch_size: int = 14
    margin: int = 0
    """`overlap` and `iss`: a tile shares twice so many pixels with its neighbour. The paper's 12.5%
    of a tile is 56 of 448."""
    max_tiles: int = 4
    """Of the grid; the overview comes on top."""
    has_overview: bool = True
    """A grid of two tiles or more is preceded by the whole image in one tile."""
    tile_fit: TileFit = "resize"
    """How a part of the image that is not square becomes a tile: squeezed, or its centre."""
    grid_size: int | None = None
    """The grid has about as many tiles as squares of this side cover the image. None: the tile's
    side; ISS may have meant its stride."""

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
            raise ValueError("tiles that overlap need tile_fit 'resize': they are to join")
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles ({self.max_tiles}) must be at least 1")

    @property
    def stride(self) -> int:
        """Pixels from one tile to the next."""
        overlaps = self.mode in ("overlap", "iss")
        return self.tile_size - 2 * self.margin if overlaps else self.tile_size

    @property
    def dropped_patches(self) -> int:
        """Patches that are dropped on each side of a tile, behind the tower."""
        return self.margin // self.patch_size if self.mode == "iss" else 0

    @property
    def kept_patches(self) -> int:
        """Patches a side that are left of a tile."""
        return self.tile_size // self.patch_size - 2 * self.dropped_patches

    def num_tiles(self, size: Size) -> int:
        """Tiles of an image, the overview among them."""
        return sum(len(view.boxes) for view in self.views(size))

    def needed_size(self, size: Size) -> Size:
        """The least size that an image of `size` may have been shrunk to, for its tiles to be cut.

        Below it a tile would be enlarged that need not be.
        """
        views = self.views(size)
        width = max(v.resized[0] / (v.source[2] - v.source[0]) for v in views) * size[0]
        height = max(v.resized[1] / (v.source[3] - v.source[1]) for v in views) * size[1]
        return math.ceil(width), math.ceil(height)

    def views(self, size: Size) -> tuple[View, ...]:
        """How an image of `size` is resized and cut: the overview first, then the grid."""
        cols, rows = self.grid(size)
        if cols * rows == 1:
            return self._cut(size, 1, 1)
        overview = self._cut(size, 1, 1) if self.has_overview else ()
        return overview + self._cut(size, cols, rows)

    def grid(self, size: Size) -> tuple[int, int]:
        """(columns, rows) of the tiles: the rule of MiniCPM-V's `slice_image`.

        As many tiles as squares of `grid_size` have the image's area, or one more or less, and
        among their grids the first whose shape is nearest to the image's.
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
        """The image in `cols` x `rows` tiles."""
        if self.tile_fit == "center_crop":
            return self._cut_centers(size, cols, rows)
        side, stride = self.tile_size, self.stride
        boxes = tuple(
            (left, top, left + side, top + side)
            for top in range(0, rows * stride, stride)
            for left in range(0, cols * stride, stride)
        )
        frame = self.margin if self.mode == "iss" else 0
        # Where there is no frame, the outer tiles end with the image.
        width, height = (n * stride + side - stride - 2 * frame for n in (cols, rows))
        return (View((0, 0, *size), (width, height), frame, boxes),)

    def _cut_centers(self, size: Size, cols: int, rows: int) -> tuple[View, ...]:
        """The largest square in the middle of each part of the image."""
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
    """How an image of `size` is cut, in numbers; sizes and boxes as in `Tiling`, in pixels.

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
