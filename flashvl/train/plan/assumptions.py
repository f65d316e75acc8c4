"""What a plan is made for, and what it takes for granted: the options of `flashvl plan`."""

from pydantic import Field, PositiveFloat, PositiveInt

from flashvl.config import StrictModel


class Assumptions(StrictModel):
    """What a plan is made for, and what it takes for granted."""

    gpus: PositiveInt | None = None
    """Number of GPUs, one for each worker. Default: the recipe's num_workers."""
    gpu: str = "a100-80g"
    """Kind of the GPUs: a100-40g, a100-80g, h100, h200, l40 or l40s."""
    price: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Price of a GPU for an hour; the plan then has a cost."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the GPU's peak that a step reaches, with its waiting for data and network. Published
    figures for models of this kind are 0.3 to 0.4."""
    reserve: float = Field(default=0.1, ge=0, lt=1)
    """Share of a GPU's memory that is left to CUDA, to NCCL, to fragmentation, and to micro-batches
    with more images than most."""
    network: PositiveFloat = Field(default=100.0, allow_inf_nan=False)
    """Bus bandwidth of an all-reduce over all GPUs, in GB/s, as nccl-tests prints it. Nodes with
    four cards of 200 Gb/s reach about 100, with one card about 25."""
    store: PositiveFloat = Field(default=2.0, allow_inf_nan=False)
    """Rate at which all workers together write a checkpoint, in GB/s."""
    rows: PositiveInt | None = None
    """Rows of the stage. Default: what its tables or its mixture's counts say."""
    text_tokens: PositiveInt = 200
    """Tokens of text in a row, while the data cannot be read."""
    images: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Images of a row, while the data cannot be read; 0 for text alone. They are taken to be JPEGs
    of 1024 x 768 pixels."""
    image_kb: PositiveFloat = Field(default=150.0, allow_inf_nan=False)
    """Size of an image file, in kilobytes."""
