"""Visual tokens of images, kept for when an image comes again, as in a conversation's next turn."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

Encode = Callable[[npt.NDArray[np.uint8]], torch.Tensor]


class ImageFeatures:
    """Encodes images, and keeps their tokens by content; the least recently used are dropped."""

    def __init__(self, encode: Encode, max_bytes: int):
        """
        Args:
            encode: (tiles, 3, height, width) -> (tokens, hidden), equally many for each tile.
            max_bytes: bytes of tokens to keep, at most.
        """
        self.encode, self.max_bytes = encode, max_bytes
        self.num_bytes = 0
        self.num_hits = self.num_misses = 0
        """Images so far whose tokens were found, and images that were encoded."""
        self.kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __call__(
        self, images: Sequence[npt.NDArray[np.uint8]], keep: bool = True
    ) -> list[torch.Tensor]:
        """The tokens of each image; unknown images are encoded together, once each.

        Args:
            keep: whether to keep the tokens of unknown images.
        """
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        found = {key: self.kept[key] for key in keys if key in self.kept}
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in found}
        if new:
            tiles = np.concatenate(list(new.values()))
            features = self.encode(tiles)
            per_tile = len(features) // len(tiles)
            sizes = [len(image) * per_tile for image in new.values()]
            found |= dict(zip(new, features.split(sizes), strict=True))
        self.num_misses += len(new)
        self.num_hits += len(keys) - len(new)
        for key in keys:
            if keep or key not in new:
                self._keep(key, found[key], is_new=key in new)
        return [found[key] for key in keys]

    def clear(self) -> None:
        """Drop all tokens that are kept."""
        self.kept.clear()
        self.num_bytes = 0

    def _keep(self, key: bytes, features: torch.Tensor, is_new: bool) -> None:
        if key not in self.kept:
            # A copy, as a view would keep the whole batch in memory.
            self.kept[key] = features.clone() if is_new else features
            self.num_bytes += features.nbytes
        self.kept.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            _, dropped = self.kept.popitem(last=False)
            self.num_bytes -= dropped.nbytes
