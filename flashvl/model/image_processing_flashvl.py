"""Image processor of Flash-VL: image -> tiles -> `pixel_values`, without torchvision.

Pixels stay uint8 until they are scaled. `cut_tiles` is all that the CPU has to do for an image; the
scaling can follow when the tiles are on the accelerator.
"""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .rgb import to_rgb
from .tiling import Size, Tiling


class FlashVLImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call besides those of transformers."""

    patch_size: int
    tiling: dict[str, Any] | None
    crop_to_patches: bool
    reducing_gap: float | None


class FlashVLImageProcessor(PilBackend):
    """Cuts images into tiles, scales them to [0, 1] and normalises; by default as SigLIP2 needs it.

    PIL images of any mode, and files given by their paths, become RGB by `to_rgb`, as in the
    engine: upright, transparency on white, grey of more than 8 bits scaled to 8. transformers
    itself makes RGB of other inputs. It turns URLs, base64 texts and whatever text
    `pipeline(images=...)` is given upright, but drops transparency and clips 16 bits at 255. Arrays
    and tensors have no orientation and no palette; a fourth channel is laid on white.

    Returns `pixel_values`, (tiles of all images, 3, height, width); `image_grid_thw`, (images, 3),
    with the rows (tiles of the image, 1, 1), by which `pixel_values` can be split into images; and
    `num_patches`, (images,), the same number under InternVL's name, which TRL's GRPO expects.

    With `crop_to_patches` False every image becomes one tile, whatever `tiling` says.
    `reducing_gap` (Pillow's name) lets a JPEG be decoded at a fraction of its size, if each side
    then still has this many times the pixels that its tiles need; None decodes its whole size.
    """

    valid_kwargs = FlashVLImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 512, "width": 512}
    patch_size = 16
    tiling = None
    crop_to_patches = True
    reducing_gap = 2.0
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    @property
    def tiling_rule(self) -> Tiling:
        """The rule by which images are cut; it equals that of the model's configuration."""
        return _rule(self.size, self.patch_size, self.tiling)

    def cut_tiles(self, image: Image.Image, size: Size | None = None) -> np.ndarray:
        """RGB image -> (tiles, 3, height, width) uint8, neither scaled nor normalised.

        Args:
            size: size of the whole image, if it was decoded at a fraction of it; the tiles are
                those of the whole size.
        """
        return _cut(image, size or image.size, self.tiling_rule, self.resample)

    def least_size(self, size: Size) -> Size:
        """Least size at which a JPEG of `size` may be decoded, by `reducing_gap`."""
        if self.reducing_gap is None:
            return size
        width, height = self.tiling_rule.needed_size(size)
        return round(width * self.reducing_gap), round(height * self.reducing_gap)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Fetch images like the base class, but leave the RGB of files to `process_image`."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return Image.open(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: Any, **kwargs) -> Image.Image:
        """Any input that transformers takes for an image -> RGB image, transparent parts white."""
        if isinstance(image, Image.Image):
            return to_rgb(image)
        channels_first = super().process_image(image, **kwargs)
        return to_pil_image(channels_first, input_data_format=ChannelDimension.FIRST)

    def _preprocess(
        self,
        images: list[Image.Image],
        *,
        size,
        patch_size,
        tiling,
        crop_to_patches,
        resample,
        do_rescale,
        rescale_factor,
        do_normalize,
        image_mean,
        image_std,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        rule = _rule(size, patch_size, tiling if crop_to_patches else None)
        tiles = [_cut(image, image.size, rule, resample) for image in images]
        counts = np.array([len(tile) for tile in tiles], np.int64)
        pixels = np.concatenate(tiles)
        if do_rescale:
            pixels = pixels.astype(np.float32)
            pixels *= rescale_factor
        if do_normalize:
            pixels = pixels.astype(np.float32, copy=False)
            pixels -= np.array(image_mean, np.float32).reshape(3, 1, 1)
            pixels /= np.array(image_std, np.float32).reshape(3, 1, 1)
        grid = np.stack([counts, np.ones_like(counts), np.ones_like(counts)], axis=1)
        return BatchFeature(
            {"pixel_values": pixels, "image_grid_thw": grid, "num_patches": counts},
            tensor_type=return_tensors,
        )


def _rule(size: Any, patch_size: int, tiling: dict[str, Any] | None) -> Tiling:
    return Tiling(tile_size=size["height"], patch_size=patch_size, **(tiling or {}))


def _cut(image: Image.Image, size: Size, rule: Tiling, resample: int) -> np.ndarray:
    """RGB image -> (tiles, 3, height, width) uint8."""
    tiles = []
    for view in rule.views(size):
        left, right = (x * image.width / size[0] for x in view.source[::2])
        top, bottom = (y * image.height / size[1] for y in view.source[1::2])
        source = (left, top, right, bottom)
        framed = F.pad(_resize(image, source, view.resized, resample), [view.frame] * 4)
        tiles += [framed[:, top:bottom, left:right] for left, top, right, bottom in view.boxes]
    return torch.stack(tiles).numpy()


def _resize(
    image: Image.Image, source: tuple[float, float, float, float], size: Size, resample: int
) -> torch.Tensor:
    """The part `source` of an RGB image, resized as by Pillow -> (3, height, width) uint8."""
    if resample == PILImageResampling.BILINEAR and source == (0, 0, *image.size):
        # torch has Pillow's filter with vector instructions: it takes half of the time, and a few
        # pixels differ by one grey level. torch's bicubic filter differs by two levels.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return F.interpolate(pixels, size[::-1], mode="bilinear", antialias=True)[0]
    resized = image.resize(size, PILImageResampling(resample), box=source)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


FlashVLImageProcessor.register_for_auto_class("AutoImageProcessor")
