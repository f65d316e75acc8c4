"""Packed linear layers compute what `F.linear` does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flashvl.engine.packed import PackedLinear, can_pack, pack_linear_layers

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="no bf16 on this processor"
)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 5, 48), (1, 1, 48), (0, 48)], ids=str)
def test_they_equal_the_product_in_fp32_but_for_rounding(
    shape: tuple[int, ...], has_bias: bool
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 33, bias=has_bias, dtype=torch.bfloat16)
    inputs = torch.randn(shape, dtype=torch.bfloat16)
    exact = F.linear(
        inputs.float(), linear.weight.float(), linear.bias.float() if has_bias else None
    )
    with torch.inference_mode():
        packed = PackedLinear(linear)(inputs)
    assert packed.dtype == torch.bfloat16
    # One rounding at the end: half a unit in the last of eight bits.
    torch.testing.assert_close(packed.float(), exact, rtol=2**-8, atol=1e-6)


def test_every_layer_is_replaced_and_a_tied_embedding_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8, dtype=torch.bfloat16)
            self.body = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.GELU())
            self.head = nn.Linear(8, 11, bias=False, dtype=torch.bfloat16)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.embedding(ids)))

    model, ids = Tied(), torch.arange(11)
    with torch.inference_mode():
        expected = model(ids)
        pack_linear_layers(model)
        assert not any(isinstance(module, nn.Linear) for module in model.modules())
        torch.testing.assert_close(model(ids), expected, rtol=2**-6, atol=1e-3)
    assert list(dict(model.named_parameters())) == ["embedding.weight"]


def test_fp32_and_other_devices_are_left_alone() -> None:
    assert not can_pack(torch.device("cpu"), torch.float32)
    assert not can_pack(torch.device("cuda"), torch.bfloat16)
