"""The image processor against transformers' own processors for the same towers."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flashvl.model import FlashVLImageProcessor
from flashvl.model.parts.assembly import PREPROCESSING
from flashvl.model.tiling import Size

SIGLIP2: dict[str, Any] = {
    "size": {"height": 512, "width": 512},
    "resample": Image.Resampling.BILINEAR,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
SIDE = 448
DYNAMIC = {"mode": "dynamic"}
OVERLAP = {"mode": "overlap", "margin": 56}
ISS = {"mode": "iss", "margin": 56}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image as smooth as a photograph at the scale of a resize: noise of 12 waves a side."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return noise.resize((width, height), Image.Resampling.BICUBIC)


def aimv2(tiling: dict[str, Any] | None) -> FlashVLImageProcessor:
    return FlashVLImageProcessor(
        size={"height": SIDE, "width": SIDE},
        patch_size=14,
        tiling=tiling,
        **PREPROCESSING["aimv2_vision_model"],
    )


def clip_tile(image: Image.Image, **options: Any) -> np.ndarray:
    """The pixels of CLIP's processor for `image` before it scales: (3, height, width) uint8."""
    clip = CLIPImageProcessorPil(do_rescale=False, do_normalize=False, **options)
    return np.asarray(clip(image, return_tensors="np")["pixel_values"][0])


def assert_within(actual: np.ndarray, expected: np.ndarray, grey_levels: float) -> None:
    assert actual.shape == expected.shape
    difference = np.abs(actual.astype(float) - expected.astype(float))
    assert difference.max() <= grey_levels, difference.max()


@pytest.mark.parametrize("size", [(512, 512), (1024, 768), (37, 600), (3, 2)], ids=str)
def test_static_is_siglips_own(size: Size) -> None:
    image = picture(*size)
    ours = FlashVLImageProcessor()
    siglip = SiglipImageProcessorPil(**SIGLIP2)
    raw = SiglipImageProcessorPil(**SIGLIP2, do_rescale=False, do_normalize=False)
    expected = raw(image, return_tensors="np")["pixel_values"]
    assert_within(ours.cut_tiles(image), np.asarray(expected), 1)
    np.testing.assert_allclose(
        ours(image, return_tensors="np")["pixel_values"],
        siglip(image, return_tensors="np")["pixel_values"],
        rtol=0,
        atol=1e-2,
    )


@pytest.mark.parametrize("size", [(1024, 768), (1800, 500), (500, 1500)], ids=str)
def test_dynamic_tiles_are_clips_resize_of_each_part(size: Size) -> None:
    image, processor = picture(*size), aimv2(DYNAMIC)
    cols, rows = processor.tiling_rule.grid(size)
    width, height = size[0] // cols, size[1] // rows
    assert (
        width * cols,
        height * rows,
    ) == size  # parts of whole pixels, so that they can be cut by hand
    squeeze = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    overview, *tiles = processor.cut_tiles(image)
    assert_within(overview, clip_tile(image, **squeeze), 1)
    assert len(tiles) == cols * rows
    for index, tile in enumerate(tiles):
        left, top = index % cols * width, index // cols * height
        part = image.crop((left, top, left + width, top + height))
        # Ours resizes before it cuts, so that pixels near a seam depend on those beyond it.
        inner = (slice(None), slice(8, -8), slice(8, -8))
        # Pillow rounds twice, and differently for a part than for the whole.
        assert_within(tile[inner], clip_tile(part, **squeeze)[inner], 2)


@pytest.mark.parametrize("size", [(1024, 768), (1800, 500), (500, 1500), (400, 300)], ids=str)
def test_center_crop_is_clips_own_on_each_part(size: Size) -> None:
    image, processor = picture(*size), aimv2({**DYNAMIC, "tile_fit": "center_crop"})
    cols, rows = processor.tiling_rule.grid(size)
    width, height = size[0] // cols, size[1] // rows
    parts = [
        image.crop((left, top, left + width, top + height))
        for top in range(0, rows * height, height)
        for left in range(0, cols * width, width)
    ]
    whole = [image] if len(parts) > 1 else []
    tiles = processor.cut_tiles(image)
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    for tile, part in zip(tiles, whole + parts, strict=True):
        expected = clip_tile(part, **crop).astype(float)
        # CLIP's middle is in whole pixels of the resized part, ours in whole pixels of the image.
        one_pixel = max(np.abs(np.diff(expected, axis=axis)).mean() for axis in (1, 2))
        enlarged = max(SIDE / min(part.size), 1)
        assert np.abs(tile - expected).mean() < one_pixel * enlarged + 0.5


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (4001, 2), (2, 3)], ids=str)
def test_center_crop_of_a_line_is_a_tile(size: Size) -> None:
    image, processor = picture(*size), aimv2({**DYNAMIC, "tile_fit": "center_crop"})
    assert processor.cut_tiles(image).shape == (1, 3, SIDE, SIDE)
    smaller = image.resize((max(size[0] // 8, 1), max(size[1] // 8, 1)))  # like a decoded JPEG
    assert processor.cut_tiles(smaller, size).shape == (1, 3, SIDE, SIDE)


def test_normalising_is_clips() -> None:
    image = picture(SIDE, SIDE)
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    ours = aimv2(DYNAMIC)(image, return_tensors="np")["pixel_values"]
    expected = clip(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-2)


def test_iss_tiles_are_the_framed_image() -> None:
    image, processor = picture(1024, 768), aimv2(ISS)
    tiles = processor.cut_tiles(image)
    framed = Image.new("RGB", (784, 784))
    framed.paste(image.resize((672, 672), Image.Resampling.BICUBIC), (56, 56))
    corners = [(0, 0), (336, 0), (0, 336), (336, 336)]
    for tile, (left, top) in zip(tiles[1:], corners, strict=True):
        cut = np.asarray(framed.crop((left, top, left + SIDE, top + SIDE)))
        assert_within(tile, cut.transpose(2, 0, 1), 1)
    is_frame = np.ones((SIDE, SIDE), bool)
    is_frame[56:-56, 56:-56] = False
    assert not tiles[0][:, is_frame].any()  # the overview has a frame on all sides


@pytest.mark.parametrize("tiling", [None, DYNAMIC, OVERLAP, ISS], ids=str)
def test_counts_of_several_images(tiling: dict[str, Any] | None) -> None:
    processor = aimv2(tiling)
    images = [picture(1024, 768, 0), picture(300, 200, 1), picture(600, 1300, 2)]
    outputs = processor(images, return_tensors="np")
    expected = [1, 1, 1] if tiling is None else [5, 1, 4]
    assert outputs["num_patches"].tolist() == expected
    assert outputs["image_grid_thw"].shape == (3, 3)
    assert outputs["image_grid_thw"].prod(-1).tolist() == expected
    assert outputs["pixel_values"].shape == (sum(expected), 3, SIDE, SIDE)
    starts = np.cumsum([0, *expected])
    for index, image in enumerate(images):
        alone = processor(image, return_tensors="np")["pixel_values"]
        together = outputs["pixel_values"][starts[index] : starts[index + 1]]
        np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("tiling", [DYNAMIC, ISS], ids=str)
def test_without_patches_an_image_is_one_tile(tiling: dict[str, Any]) -> None:
    images = [picture(1024, 768), picture(600, 1300)]
    outputs = aimv2(tiling)(images, crop_to_patches=False, return_tensors="np")
    assert outputs["num_patches"].tolist() == [1, 1]
    expected = aimv2(None)(images, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(outputs["pixel_values"], expected)
