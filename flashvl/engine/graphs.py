"""Decoding steps on a GPU as CUDA graphs: recorded once, then one launch instead of a thousand.

A graph has fixed shapes, so a batch is padded to a power of two with idle rows, and attention reads
up to the next multiple of `LENGTH_STEP`. That costs less than the launches would.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flashvl.engine.cache import KVCache

LENGTH_STEP = 256
"""Positions to which the length of attention is rounded up."""
MAX_GRAPHS = 64
"""Graphs that are kept; the least recently replayed ones are dropped."""

Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(ids of the rows' new tokens, their positions, positions to attend to) -> (rows, vocabulary)."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step: fill `ids` and `positions`, replay, read `logits` before the next replay."""

    ids: torch.Tensor
    positions: torch.Tensor
    replay: Callable[[], None]
    logits: torch.Tensor


class DecodingGraphs:
    """Decodes by graphs, each of which is recorded when its shape is first needed."""

    def __init__(self, step: Step, cache: KVCache):
        """
        Args:
            step: must not wait for the GPU, nor read the values of its tensors.
        """
        self.step, self.cache = step, cache
        self._recorded: OrderedDict[tuple[int, int, int], Recorded] = OrderedDict()
        self._pool: Any = None
        """Memory that all graphs share, since only one is replayed at a time."""
        self._stream: torch.cuda.Stream | None = None
        """Stream of all recordings; libraries keep a workspace for each stream."""

    @torch.inference_mode()
    def __call__(self, token_ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Decode one token in each of the first rows, like `Runner.decode`."""
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
        """Position that idle rows write to: the last, which no answer fills, as its last token is
        not stored. So a row that is being prefilled may serve as an idle one."""
        return self.cache.row_length - 1

    def _record(self, num_rows: int, length: int) -> Recorded:
        device = self.cache.keys.device
        ids = torch.zeros(num_rows, dtype=torch.long, device=device)
        # While a step is recorded every row is idle, so that none is overwritten.
        positions = torch.full_like(ids, self._idle_cell)
        replay, logits = self._capture(lambda: self.step(ids, positions, length))
        return Recorded(ids, positions, replay, logits)

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A function that repeats `run`, and the tensor that then holds its result."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise before the recording
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits = run()
        return graph.replay, logits
