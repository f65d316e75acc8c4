"""GPUs that a training may be planned for."""

from dataclasses import dataclass

from flashvl.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU's figures, as its maker states them."""

    name: str
    memory_gib: int
    """Memory that programs see; on cards with GDDR6 the error correction takes some of it."""
    bf16_tflops: float
    """Peak of dense bf16 products, without sparsity."""
    bandwidth_gb_per_s: int
    """Bandwidth of the GPU's memory."""
    source: str


GPUS = {
    name: Gpu(
        name=title,
        memory_gib=memory_gib,
        bf16_tflops=tflops,
        bandwidth_gb_per_s=bandwidth,
        source=f"NVIDIA's data sheet of the {sheet}",
    )
    for name, title, memory_gib, tflops, bandwidth, sheet in (
        ("a100-40g", "A100 40 GB", 40, 312.0, 1555, "A100 Tensor Core GPU"),
        ("a100-80g", "A100 80 GB", 80, 312.0, 2039, "A100 Tensor Core GPU"),
        ("h100", "H100 SXM", 80, 989.4, 3350, "H100 Tensor Core GPU"),
        ("h200", "H200 SXM", 140, 989.4, 4800, "H200 Tensor Core GPU"),
        ("l40", "L40", 45, 181.0, 864, "L40 GPU"),
        ("l40s", "L40S", 45, 362.05, 864, "L40S GPU"),
    )
}
"""GPUs by the names that `--gpu` takes."""


def find_gpu(name: str) -> Gpu:
    """
    Raises:
        ConfigError: no GPU has this name.
    """
    if name not in GPUS:
        raise ConfigError(f"unknown GPU {name!r}; known GPUs: {', '.join(GPUS)}")
    return GPUS[name]
