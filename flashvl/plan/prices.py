"""Prices of GPUs."""

from pathlib import Path

import yaml

from flashvl.errors import ConfigError
from flashvl.train.plan.gpus import GPUS, find_gpu


def read_prices(file: Path) -> dict[str, float]:
    """The price of a GPU for an hour, by the GPU's name.

    Raises:
        ConfigError: the file cannot be read, names an unknown GPU, or has a price that is none.
    """
    try:
        found = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; name a price table") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    is_table = isinstance(found, dict) and all(
        isinstance(price, int | float) and price > 0 for price in found.values()
    )
    if not found or not is_table:
        raise ConfigError(
            f"{file} must have the price of a GPU for an hour, one KIND: PRICE a line; known kinds:"
            f" {', '.join(GPUS)}"
        )
    for name in found:
        find_gpu(str(name))
    return {str(name): float(price) for name, price in found.items()}


def choose_gpus(gpu: str | None, prices: dict[str, float] | None) -> list[str]:
    """The kinds of GPUs to plan for.

    Raises:
        ConfigError: the GPU is unknown, or has no price where others have.
    """
    if gpu is None:
        return list(prices) if prices is not None else ["a100-80g"]
    find_gpu(gpu)
    if prices is not None and gpu not in prices:
        raise ConfigError(
            f"the price table has no {gpu}; add its price, or plan for {', '.join(prices)}"
        )
    return [gpu]
