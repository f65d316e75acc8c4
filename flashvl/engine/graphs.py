"""Steps on a GPU as CUDA graphs: recorded once, then one launch instead of a thousand."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

MAX_GRAPHS = 128
"""Graphs that are kept; the least recently replayed ones are dropped."""

Step = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded step: fill `inputs`, replay, read `output` before any other replay."""

    inputs: tuple[torch.Tensor, ...]
    replay: Callable[[], None]
    output: torch.Tensor


class Graphs:
    """Runs steps by graphs, each of which is recorded when its kind and shape first come."""

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._pool: Any = None
        """Memory that all graphs share, since only one is replayed at a time."""
        self._stream: torch.cuda.Stream | None = None
        """Stream of all recordings; libraries keep a workspace for each stream."""

    @torch.inference_mode()
    def __call__(self, key: Hashable, step: Step, *inputs: torch.Tensor) -> torch.Tensor:
        """What `step(*inputs)` returns.

        Args:
            key: tells steps apart that differ in more than the values of their inputs.
            step: must not wait for the GPU. A graph knows addresses alone, so whatever the step
                reads or writes that it neither makes itself nor gets as an input must stay where it
                is; and what it writes there, it writes twice when it is recorded.
        """
        if key not in self._recorded:
            self._recorded[key] = self._record(step, inputs)
        recorded = self._recorded[key]
        self._recorded.move_to_end(key)
        if len(self._recorded) > MAX_GRAPHS:
            self._recorded.popitem(last=False)
        for held, given in zip(recorded.inputs, inputs, strict=True):
            held.copy_(given)
        recorded.replay()
        return recorded.output.clone()

    def _record(self, step: Step, inputs: tuple[torch.Tensor, ...]) -> Recorded:
        held = tuple(given.clone() for given in inputs)
        replay, output = self._capture(lambda: step(*held))
        return Recorded(held, replay, output)

    def _capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A function that repeats `run`, and the tensor that then holds its result."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise, and compile, before the recording
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = run()
        return graph.replay, output
