"""Linear layers in bf16 on a CPU, with weights in the memory layout of oneDNN's kernels.

`F.linear` gives oneDNN a plain matrix, which its kernels read with jumps. From weights that were
packed once, they read in order: a decoding step takes half to three quarters of the time.
"""

import torch
from torch import nn
from torch.nn import functional as F

MIN_ROWS = 4
"""Rows to which a smaller input is padded; the kernel for one row is a fifth slower."""


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing makes a model faster: bf16, on a CPU that multiplies it in hardware.

    For fp32, torch's kernels for plain matrices are as fast.
    """
    is_bf16_cpu = device.type == "cpu" and dtype == torch.bfloat16
    return is_bf16_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A linear layer for inference alone; its weight cannot be read back, saved or trained."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., inputs) -> (..., outputs)."""
        rows = inputs.flatten(0, -2)
        missing = MIN_ROWS - len(rows)
        if missing <= 0:
            return self._multiply(inputs)
        padded = self._multiply(F.pad(rows, (0, 0, 0, missing)))
        return padded[: len(rows)].unflatten(0, inputs.shape[:-1])

    def _multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def pack_linear_layers(model: nn.Module) -> None:
    """Replace every linear layer of `model`, which can then be used for inference alone.

    A head that is tied to the embedding gets a packed copy; the embedding stays as it is.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child))
