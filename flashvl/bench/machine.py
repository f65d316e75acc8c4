"""The limits of this machine, measured in the same run as what is compared with them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SIDE = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices that are multiplied: so large that a GPU's launch costs nothing."""
READ_BYTES = 2**30
"""Bytes of memory that are read: far more than any cache holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine's limits for the type that the model computes in."""

    device: str
    """`cpu`, or the GPU's name."""
    threads: int
    """Threads that torch computes with."""
    dtype: str
    """The type's name, such as `bfloat16`."""
    gemm_tflops: float
    """Dense matrix product, in 10^12 floating point operations a second."""
    read_gb_per_s: float
    """Reading of memory in order, in 10^9 bytes a second."""


def measure_machine(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> Machine:
    """Measure both limits: medians over `rounds`, after one round to warm up."""
    side = SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    memory = torch.ones(READ_BYTES // 4, device=device)
    gemm_s = _median_s(lambda: left @ right, device, rounds)
    read_s = _median_s(memory.sum, device, rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Machine(
        device=name,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        gemm_tflops=2 * side**3 / gemm_s / 1e12,
        read_gb_per_s=READ_BYTES / read_s / 1e9,
    )


def _median_s(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
