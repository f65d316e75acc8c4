"""What inference is planned for, and what is taken for granted: options of `flashvl plan`."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from flashvl.config import Replicas, StrictModel


class EngineAssumptions(StrictModel):
    """The engines of a fleet, and the requests that they answer."""

    preset: str = "static"
    """Preset of the model, by which its work is counted."""
    gpu: str | None = None
    """Kind of the GPUs: a100-40g, a100-80g, h100, h200, l40 or l40s. By default every kind that
    `prices` names, or else a100-80g."""
    prices: str | None = None
    """YAML file with the price of a GPU for an hour, one KIND: PRICE a line; the plan then has a
    cost, and compares the kinds."""
    gpus_per_replica: float = Field(default=1.0, gt=0, le=1)
    """GPUs of each engine; with 0.5, two engines share a GPU and its speed."""
    max_num_seqs: PositiveInt = 64
    """Requests that an engine answers at once."""
    images: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Images of a request, of 1024 x 768 pixels."""
    text_tokens: NonNegativeInt = 100
    """Tokens of text in a prompt."""
    answer_tokens: int = Field(default=128, gt=1)
    """Mean number of an answer's tokens."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of the GPU's peak that encoding images and reading prompts reach."""
    bandwidth_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the bandwidth of the GPU's memory that decoding reaches."""
    measured: str | None = None
    """JSON file that flashvl bench throughput, serve or caption has written on such a GPU; its
    rates take the place of those that the GPU's peaks allow."""
    rate: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Requests that one engine answers a second with all its slots in use, in place of what the
    GPU's peaks allow."""

    @model_validator(mode="after")
    def _has_one_source(self) -> "EngineAssumptions":
        if self.measured is not None and self.rate is not None:
            raise ValueError("measured and rate both say how fast an engine is; give one of them")
        return self


class ServingDemand(EngineAssumptions):
    """What a service must bear."""

    requests_per_s: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Requests a second at the peak, for a fixed number of replicas."""
    trace: str | None = None
    """CSV or YAML file with the requests of each hour, one hour a line, for a number of replicas
    that follows the load."""
    wait_ms: PositiveFloat = Field(default=500.0, allow_inf_nan=False)
    """Milliseconds that 99% of the requests may wait until an engine reads their prompt."""
    ttft_ms: PositiveFloat | None = Field(default=None, allow_inf_nan=False)
    """Milliseconds within which 99% of the requests must have their first token."""
    replicas: Replicas = "1:1000"
    """Engines: MIN:MAX, between which their number follows a trace."""

    @model_validator(mode="after")
    def _has_one_load(self) -> "ServingDemand":
        if (self.requests_per_s is None) == (self.trace is None):
            raise ValueError("give either requests_per_s or trace")
        return self


class CaptioningDemand(EngineAssumptions):
    """What a captioning job must do."""

    rows: PositiveInt
    """Images to caption, one caption each."""
    hours: PositiveFloat = Field(default=24.0, allow_inf_nan=False)
    """Hours in which they must be captioned; with 24, ROWS is the number of images a day."""
    gpus: PositiveInt | None = None
    """Number of GPUs, in place of `hours`; the plan then says how long the job takes."""
