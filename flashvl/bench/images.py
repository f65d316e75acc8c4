"""JPEGs a second, from bytes to pixels for the vision tower, on one core: ours and transformers'.

    flashvl bench images

Ours ends with uint8 tiles, which are normalised on the accelerator; transformers' ends with float
pixels. Both have the settings of SigLIP2-so400m-patch16-512.
"""

import io
import statistics
import time
from dataclasses import dataclass

import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flashvl.bench.contenders import make_photo
from flashvl.data.images import decode_reduced
from flashvl.model import FlashVLImageProcessor
from flashvl.progress import ShowProgress, ignore_progress

NUM_IMAGES = 8
"""Different images in a round; they are too many for a cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpeed:
    """The speed of one way from bytes to pixels."""

    name: str
    images_per_s: float
    """Median over the rounds."""
    relative: float
    """Speed as a multiple of the last way's; median of the rounds' own ratios."""


def compare_image_processing(
    rounds: int = 20, on_progress: ShowProgress = ignore_progress
) -> list[ImageSpeed]:
    """Time each way on the same JPEGs, in turn, `rounds` times after one round to warm up."""
    files = [make_photo(seed) for seed in range(NUM_IMAGES)]
    ours = FlashVLImageProcessor()
    theirs = SiglipImageProcessorPil(
        size=ours.size, resample=ours.resample, image_mean=ours.image_mean, image_std=ours.image_std
    )

    def cut(data: bytes) -> None:
        ours.cut_tiles(*decode_reduced(data, ours.least_size))

    def process(data: bytes) -> None:
        theirs(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"].float()

    ways = {"flashvl": cut, "transformers SiglipImageProcessorPil": process}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                for data in files:
                    way(data)
                if number:
                    seconds[name].append(time.perf_counter() - start)
            on_progress(number, rounds)
    finally:
        torch.set_num_threads(threads)
    *_, last = seconds.values()
    return [
        ImageSpeed(
            name=name,
            images_per_s=NUM_IMAGES / statistics.median(times),
            relative=statistics.median(b / a for a, b in zip(times, last, strict=True)),
        )
        for name, times in seconds.items()
    ]
