"""Shards of a checkpoint: the fragments of each rank in one safetensors file.

A reader finds the slices that it needs by the files' headers, whatever number of ranks wrote them,
and reads only these, from any store (https://github.com/huggingface/safetensors, "Format").
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

import pyarrow as pa
import torch
from safetensors.torch import save

from flashvl.data.storage import Location
from flashvl.errors import CheckpointError
from flashvl.train.run.zero import Fragment

FLOAT_BYTES = 4


def copy_to_host(fragments: Sequence[Fragment]) -> dict[str, torch.Tensor]:
    """Copies of the fragments' tensors in this process's memory, by the names in a shard."""
    return {
        _key(kind, fragment.name, fragment.start): tensor.to("cpu", copy=True)
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    }


def write_shard(file: Location, tensors: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        OSError: the file cannot be written.
    """
    file.write(save(tensors))


class _Slice(NamedTuple):
    start: int
    stop: int
    file: pa.NativeFile
    offset: int
    """Place in the file, in bytes."""


class ShardReader:
    """Reads slices of parameters from shards; a context manager, which closes the files."""

    def __init__(self, files: Sequence[Location]):
        """
        Raises:
            CheckpointError: a file is missing or damaged.
        """
        self._stack = ExitStack()
        self._slices: dict[str, list[_Slice]] = defaultdict(list)
        for location in files:
            try:
                file = self._stack.enter_context(location.open())
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes))
            except (OSError, ValueError) as error:
                self._stack.close()
                raise CheckpointError(
                    f"shard {location} cannot be read ({error}); remove its checkpoint's folder to"
                    " resume from the one before"
                ) from None
            header.pop("__metadata__", None)
            for key, value in header.items():
                name, _, start = key.rpartition("/")
                place = int(start)
                offset = 8 + header_bytes + value["data_offsets"][0]
                piece = _Slice(place, place + value["shape"][0], file, offset)
                self._slices[name].append(piece)
        for slices in self._slices.values():
            slices.sort(key=lambda piece: piece.start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def fill(self, fragments: Sequence[Fragment]) -> None:
        """Copy what the shards hold into the fragments' tensors.

        Raises:
            CheckpointError: the shards do not hold all of it.
        """
        for fragment in fragments:
            for kind, tensor in fragment.tensors.items():
                self._fill(f"{kind}/{fragment.name}", fragment.start, tensor)

    def _fill(self, name: str, start: int, tensor: torch.Tensor) -> None:
        stop, done = start + len(tensor), start
        for piece in self._slices.get(name, ()):
            first, last = max(done, piece.start), min(stop, piece.stop)
            if first != done or first >= last:
                continue
            piece.file.seek(piece.offset + (first - piece.start) * FLOAT_BYTES)
            data = bytearray(piece.file.read((last - first) * FLOAT_BYTES))
            read = torch.frombuffer(data, dtype=torch.float32)
            tensor[first - start : last - start].copy_(read)
            done = last
        if done != stop:
            raise CheckpointError(
                f"the checkpoint lacks {name}, elements {done} to {stop}: it is another model's;"
                " remove its folder, or name another output_dir"
            )


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"
