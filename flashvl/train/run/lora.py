"""Low-rank adapters by PEFT (LoRA, Hu et al. 2021): put into the model, merged at the end."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from flashvl.train.recipe import LoraSettings

NAME = "default"


def add_adapters(model: nn.Module, settings: LoraSettings, trainable: Collection[str]) -> LoraModel:
    """Put adapters on the linear layers of some parts of the model, and let only these learn.

    Returns:
        PEFT's handle of the adapters, for `merge`; the model itself is changed in place.
    """
    names = [
        f"model.{part}.{name}"
        for part in trainable
        for name, layer in model.get_submodule(f"model.{part}").named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith("attention.out_proj")
    ]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=names,
    )
    return LoraModel(model, {NAME: config}, NAME)


@contextmanager
def turned_off(adapters: LoraModel) -> Iterator[None]:
    """While the block runs, the model computes as without its adapters.

    PEFT's own switch sets `requires_grad` of the adapters as well, which DeepSpeed relies on.
    """
    layers = [layer for layer in adapters.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge(adapters: LoraModel) -> None:
    """Add the adapters to the weights of their layers, and take them out of the model."""
    adapters.merge_and_unload()
