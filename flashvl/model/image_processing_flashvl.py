"""Image processor of Flash-VL: image -> tiles -> `pixel_values`, without torchvision.

Pixels stay uint8 until they are scaled: `cut_tiles` is all that a CPU has to do for each image, and
the scaling can wait until the tiles are on the accelerator.
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
    """What a call may set on top of the library's own."""

    patch_size: int
    tiling: dict[str, Any] | None
    crop_to_patches: bool
    reducing_gap: float | None


class FlashVLImageProcessor(PilBackend):
    """Cut into tiles, scale to [0, 1], normalise; SigLIP2's settings unless others are given.

    A PIL image of any mode, and a file that is named by its path, become RGB by `to_rgb`, as the
    engine does it: turned upright, transparency on white, grey of more than 8 bits scaled to 8. Of
    others the library makes RGB before they come here. A URL, base64 text, and whatever
    `pipeline(images=...)` is given as text it turns upright, but drops their transparency and clips
    their 16 bits at 255. An array or a tensor has no orientation and no palette; its fourth channel
    is laid on white.

    Returns `pixel_values`, (tiles of all images, 3, height, width); `image_grid_thw`, (images, 3),
    whose rows are (tiles of the image, 1, 1), for whoever splits `pixel_values` by image; and
    `num_patches`, (images,), InternVL's name for the same number, which TRL's GRPO asks for.

    `crop_to_patches` False makes one tile of every image, whatever `tiling` says. `reducing_gap`,
    Pillow's name for it, lets a JPEG be decoded at a fraction of its size if that is so many times
    what its tiles need, or more; None: at its whole size.
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
        """How images are cut; equals that of the model's configuration."""
        return _rule(self.size, self.patch_size, self.tiling)

    def cut_tiles(self, image: Image.Image, size: Size | None = None) -> np.ndarray:
        """RGB image -> (tiles, 3, height, width) uint8, neither scaled nor normalised.

        Args:
            size: of the image before it was decoded at a fraction of it, if it was; the tiles are
                those of that size.
        """
        return _cut(image, size or image.size, self.tiling_rule, self.resample)

    def least_size(self, size: Size) -> Size:
        """What a JPEG of `size` may be decoded at: `reducing_gap` times what its tiles need."""
        if self.reducing_gap is None:
            return size
        width, height = self.tiling_rule.needed_size(size)
        return round(width * self.reducing_gap), round(height * self.reducing_gap)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """As the library's, but files come as they are: `process_image` makes them RGB."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return Image.open(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: Any, **kwargs) -> Image.Image:
        """Whatever the library takes for an image -> RGB image, transparent parts white."""
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
    """A part of an RGB image -> (3, height, width) uint8, as Pillow resizes it."""
    if resample == PILImageResampling.BILINEAR and source == (0, 0, *image.size):
        # torch has Pillow's filter with vector instructions: half of the time, and hardly a pixel
        # differs, by one grey level. Its bicubic one is off by two.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return F.interpolate(pixels, size[::-1], mode="bilinear", antialias=True)[0]
    resized = image.resize(size, PILImageResampling(resample), box=source)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


FlashVLImageProcessor.register_for_auto_class("AutoImageProcessor")
