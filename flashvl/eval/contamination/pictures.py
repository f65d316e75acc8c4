"""Copies of pictures: a perceptual hash, and the search for hashes that differ in few bits.

The hash has 256 bits: whether each of the 16 x 16 lowest frequencies of the grey picture, shrunk to
64 x 64, is above their median. So does PDQ (J. Dalins, C. Wilson, D. Boudry, "PDQ & TMK + PDQF",
2019), which takes pictures with up to 31 different bits for copies; an encoder's losses, another
size and grey leave the lowest frequencies as they are. Cropping does not, so the pictures of
benchmarks, which are few, are also kept as if they were cropped, in `CUTS`.

Flat pictures, such as an empty page, have no frequencies whose signs mean anything: those with less
than `MIN_DETAIL` are not compared. Drawings and charts of one style may have nearly the same hash,
so a copy must look like the picture as a thumbnail, too: see `MIN_CORRELATION`. Hues are not
compared, since a copy may be grey.

Copies that are found, in percent of the pictures that have enough detail: 998 scenes and 238
textures of the procedural world, 414 parts of photographs and screenshots, 600 charts and pages.

copy                              scenes  textures  photographs  charts, pages
JPEG of quality 30                  99.6      87.0         94.4          100.0
half the size                       96.7     100.0         99.8          100.0
grey                               100.0     100.0        100.0          100.0
3 % cropped                         99.3     100.0        100.0          100.0
half, grey, cropped, quality 50     92.5      86.6         95.7          100.0

Other pictures that are taken for copies: 2.9 % of 1,000 scenes for one of 1,000 others, which
differ from it in a hue or in the height of a bar (3.7 % without the thumbnails); among textures,
photographs, charts and pages none but versions of the same picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from flashvl.data.images import decode_reduced
from flashvl.data.limits import ImageLimits

SIDE = 64
"""Pixels of the sides of the picture that is hashed."""
DECODED_SIDE = 96
"""Pixels of a picture's shorter side at which it is decoded, at least, if it has as many."""
NUM_FREQUENCIES = 16
NUM_BANDS = 16
"""Parts of a hash, of 16 bits each, by which hashes are looked up."""
MAX_DISTANCE = 31
"""Bits in which the hashes of copies differ, at most. With more, two hashes need not have a band in
which they differ in one bit at most, as 32 bits are two in each of 16 bands."""
THUMBNAIL_SIDE = 16
MIN_CORRELATION = 0.95
"""Correlation of the thumbnails of copies, at least."""
MIN_DETAIL = 2.0
"""Median of the frequencies' amplitudes, in grey levels of 255, below which the signs that make the
hash are an encoder's noise."""
_EDGE = 0.03
_HALF = _EDGE / 2
CUTS = (
    (0.0, 0.0, 0.0, 0.0),
    (_HALF, _HALF, _HALF, _HALF),
    (_EDGE, _EDGE, _EDGE, _EDGE),
    (_EDGE, 0.0, 0.0, 0.0),
    (0.0, _EDGE, 0.0, 0.0),
    (0.0, 0.0, _EDGE, 0.0),
    (0.0, 0.0, 0.0, _EDGE),
    (_EDGE, _EDGE, 0.0, 0.0),
    (0.0, _EDGE, _EDGE, 0.0),
    (0.0, 0.0, _EDGE, _EDGE),
    (_EDGE, 0.0, 0.0, _EDGE),
)
"""What is cut off at the left, top, right and bottom, as shares of the picture's sides; a copy that
is cropped otherwise is as near to one of these as its hash allows."""
MAX_CANDIDATES = 2**19
"""Candidates that are compared at once, so that a search takes tens of MB."""

Codes = npt.NDArray[np.uint16]
"""(hashes, NUM_BANDS)."""
Thumbnails = npt.NDArray[np.uint8]
"""(pictures, THUMBNAIL_SIDE * THUMBNAIL_SIDE)."""
Places = npt.NDArray[np.int64]


def _cosines() -> npt.NDArray[np.float32]:
    """(NUM_FREQUENCIES, SIDE): the lowest rows of the orthonormal DCT-II, without the constant."""
    frequencies, places = np.arange(1, NUM_FREQUENCIES + 1)[:, None], np.arange(SIDE)[None]
    angles = np.pi * frequencies * (2 * places + 1) / (2 * SIDE)
    return (np.sqrt(2 / SIDE) * np.cos(angles)).astype(np.float32)


_COSINES = _cosines()


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprints:
    """What is kept of some pictures to compare them by."""

    codes: Codes
    thumbnails: Thumbnails
    details: npt.NDArray[np.float32]
    """(pictures,): the median of the frequencies' amplitudes, in grey levels."""

    @classmethod
    def join(cls, parts: Sequence["Fingerprints"]) -> "Fingerprints":
        """The fingerprints of several pictures, in their order."""
        return cls(
            codes=np.concatenate([part.codes for part in parts]),
            thumbnails=np.concatenate([part.thumbnails for part in parts]),
            details=np.concatenate([part.details for part in parts]),
        )


def read_fingerprints(
    data: bytes | None, limits: ImageLimits, cuts: Sequence[tuple[float, ...]] = CUTS[:1]
) -> Fingerprints:
    """The fingerprints of an encoded picture, one for each of `cuts`.

    Raises:
        DataError: the picture cannot be decoded, or is outside `limits`.
    """
    least = (DECODED_SIDE, DECODED_SIDE)
    image, _ = decode_reduced(data, lambda _: least, limits)
    return fingerprints_of(image, cuts)


def fingerprints_of(
    image: Image.Image, cuts: Sequence[tuple[float, ...]] = CUTS[:1]
) -> Fingerprints:
    """The fingerprints of a decoded picture, one for each of `cuts`."""
    grey = image.convert("L")
    views = np.stack([_shrink(grey, cut) for cut in cuts])
    amplitudes = (_COSINES @ views @ _COSINES.T).reshape(len(views), -1)
    bits = amplitudes > np.median(amplitudes, axis=1, keepdims=True)
    step = SIDE // THUMBNAIL_SIDE
    means = views.reshape(-1, THUMBNAIL_SIDE, step, THUMBNAIL_SIDE, step).mean((2, 4))
    return Fingerprints(
        codes=np.packbits(bits, axis=1).view(np.uint16),
        thumbnails=means.round().astype(np.uint8).reshape(len(views), -1),
        details=np.median(np.abs(amplitudes), axis=1),
    )


def _shrink(grey: Image.Image, cut: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """(SIDE, SIDE): the picture without what is cut off."""
    width, height = grey.size
    left, top, right, bottom = cut
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    # A picture that is smaller than the hash's would get steps, which are frequencies of their own.
    is_small = min(width, height) < SIDE
    how = Image.Resampling.BILINEAR if is_small else Image.Resampling.BOX
    return np.asarray(grey.resize((SIDE, SIDE), how, box=box), np.float32)


class HashIndex:
    """Hashes that are searched for those within `MAX_DISTANCE` bits of others.

    Two hashes that differ in 31 bits at most have a band in which they differ in one bit at most;
    so looking up each band and its 16 neighbours finds them all (M. Norouzi, A. Punjani, D. Fleet,
    "Fast search in Hamming space with multi-index hashing", 2012).
    """

    def __init__(self, codes: Codes):
        self.codes = codes
        # For each band, places in the order of their values in it, and where each value begins.
        self._places = np.argsort(codes, axis=0, kind="stable").T.astype(np.int32)
        values = np.arange(2**16 + 1)
        self._starts = np.stack(
            [
                np.searchsorted(codes[places, band], values).astype(np.int32)
                for band, places in enumerate(self._places)
            ]
        )

    def search(self, queries: Codes) -> tuple[Places, Places, Places]:
        """All pairs of a query and a hash within `MAX_DISTANCE`: places of both, and distances."""
        found = [self._search_band(queries, band) for band in range(NUM_BANDS)]
        pairs = np.unique(np.concatenate(found), axis=0)
        return pairs[:, 0], pairs[:, 1], pairs[:, 2]

    def _search_band(self, queries: Codes, band: int, first: int = 0) -> npt.NDArray[np.int64]:
        """(pairs, 3): query, place and distance of those that one band finds.

        Args:
            first: place of the first of `queries` among all.
        """
        values = queries[:, band, None] ^ _NEIGHBOURS
        begins = self._starts[band][values]
        counts = self._starts[band][values.astype(np.int64) + 1] - begins
        total = int(counts.sum())
        if total > MAX_CANDIDATES and len(queries) > 1:
            half = len(queries) // 2
            parts = (queries[:half], first), (queries[half:], first + half)
            return np.concatenate([self._search_band(part, band, at) for part, at in parts])
        numbers = np.repeat(np.arange(len(queries)), counts.sum(axis=1))
        flat = counts.ravel()
        within = np.arange(total) - np.repeat(np.cumsum(flat) - flat, flat)
        places = self._places[band][np.repeat(begins.ravel(), flat) + within]
        distances = distances_of(queries[numbers], self.codes[places])
        is_near = distances <= MAX_DISTANCE
        return np.stack((first + numbers, places, distances), axis=1)[is_near]


_NEIGHBOURS = np.array([0, *(1 << bit for bit in range(16))], np.uint16)
"""What a band is combined with to differ in no bit or in one."""


def distances_of(codes: Codes, others: Codes) -> Places:
    """(hashes,): the numbers of different bits, hash by hash."""
    different = np.ascontiguousarray(codes ^ others).view(np.uint64)
    return np.bitwise_count(different).sum(axis=-1, dtype=np.int64)


def correlations_of(thumbnails: Thumbnails, others: Thumbnails) -> npt.NDArray[np.float32]:
    """(pictures,): correlation of the grey levels, whatever brightness and contrast are."""
    one, other = (
        each - each.mean(axis=1, keepdims=True, dtype=np.float32) for each in (thumbnails, others)
    )
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    correlations: npt.NDArray[np.float32] = (one * other).sum(axis=1) / np.maximum(sizes, 1e-6)
    return correlations


class PictureIndex:
    """Pictures of benchmarks in which copies are looked up."""

    def __init__(self, codes: Codes, thumbnails: Thumbnails):
        """
        Args:
            codes, thumbnails: of the pictures in their order, `CUTS` of each.
        """
        self._thumbnails, self._hashes = thumbnails, HashIndex(codes)

    def search(self, prints: Fingerprints) -> list[tuple[int, int, int]]:
        """Copies: (place among `prints`, picture's number, least distance of their hashes)."""
        queries, places, distances = self._hashes.search(prints.codes)
        alike = correlations_of(prints.thumbnails[queries], self._thumbnails[places])
        nearest: dict[tuple[int, int], int] = {}
        for n in np.flatnonzero(alike >= MIN_CORRELATION).tolist():
            key = int(queries[n]), int(places[n]) // len(CUTS)
            nearest[key] = min(int(distances[n]), nearest.get(key, MAX_DISTANCE))
        return [(*key, distance) for key, distance in sorted(nearest.items())]
