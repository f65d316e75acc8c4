"""Image processor of Flash-VL: RGB image -> `pixel_values`, with Pillow (no torchvision).

The static tiling of the paper: the whole image becomes one square tile, its aspect ratio dropped.
"""

from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling


class FlashVLImageProcessor(PilBackend):
    """Resize to the tower's square, scale to [0, 1], normalise: SigLIP2's own settings."""

    resample = PILImageResampling.BILINEAR
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 512, "width": 512}
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True


FlashVLImageProcessor.register_for_auto_class("AutoImageProcessor")
