"""Decoding steps on a GPU as CUDA graphs: recorded once, then one launch instead of a thousand.

A graph has fixed shapes. So a batch is filled up to a power of two with idle rows, and attention
reaches up to the next multiple of `LENGTH_STEP`; what that costs is less than what launching does.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashvl.engine.cache import KVCache

LENGTH_STEP = 256
MAX_GRAPHS = 64
"""Those that were not replayed for longest are forgotten."""

Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(ids of the rows' new tokens, their positions, length to attend to) -> (rows, vocabulary)."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step of fixed shape: fill the inputs, replay, read the logits before the next replay."""

    ids: torch.Tensor
    positions: torch.Tensor
    replay: Callable[[], None]
    logits: torch.Tensor


class DecodingGraphs:
    """Every graph is recorded when its shape is first needed."""

    def __init__(self, step: Step, cache: KVCache):
        """`step` must not wait for the GPU, nor look at the numbers in its tensors."""
        self.step, self.cache = step, cache
        self._recorded: OrderedDict[tuple[int, int, int], Recorded] = OrderedDict()
        self._pool: Any = None
        """Memory that all recordings share, as only one is replayed at a time."""
        self._stream: torch.cuda.Stream | None = None
        """Libraries keep a workspace for each; so it is one for all recordings."""

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """As `Runner.decode`."""
        count = len(token_ids)
        num_rows = min(1 << (count - 1).bit_length(), self.cache.num_rows)
        steps = -(-(max(lengths) + 1) // LENGTH_STEP)
        length = min(steps * LENGTH_STEP, self.cache.row_length)
        shape = (num_rows, length, self.cache.row_length)
        if shape not in self._recorded:
            self._recorded[shape] = self._record(num_rows, length)
        recorded = self._recorded[shape]
        self._recorded.move_to_end(shape)
        if len(self._recorded) > MAX_GRAPHS:
            self._recorded.popitem(last=False)
        num_idle = num_rows - count
        recorded.ids.copy_(torch.tensor([*token_ids, *[0] * num_idle]))
        recorded.positions.copy_(torch.tensor([*lengths, *[self._idle_cell] * num_idle]))
        recorded.replay()
        return recorded.logits[:count]

    @property
    def _idle_cell(self) -> int:
        """Where idle rows write: the last cell, which no answer fills, for its last token is not
        stored. So a row that is being prefilled may serve as an idle one."""
        return self.cache.row_length - 1

    def _record(self, num_rows: int, length: int) -> Recorded:
        device = self.cache.keys.device
        ids = torch.zeros(num_rows, dtype=torch.long, device=device)
        # While it is recorded every row is idle, so that none is overwritten.
        positions = torch.full_like(ids, self._idle_cell)
        replay, logits = self._capture(lambda: self.step(ids, positions, length))
        return Recorded(ids, positions, replay, logits)

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """`run` once more on each call of the first, its result in the second."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up outside of the recording
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = run()
        return graph.replay, logits
