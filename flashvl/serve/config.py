"""What a service offers and admits: the `args` of a file in `serve_configs/`."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from flashvl.config import Dtype, Replicas, StrictModel
from flashvl.data.limits import ImageLimits


class ServiceConfig(StrictModel):
    """One model, answered for by replicas that follow the load."""

    model: str = "tiny"
    """Shipped model's name, or a Flash-VL folder that every node sees; clients name it so."""
    dtype: Dtype = "auto"
    """float32: an answer is the same whoever shares its batch, on any machine."""
    replicas: Replicas = "1"
    """Engines: their number, or the least and the most, between which they follow the load."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """Of an engine; a part of one lets engines share it."""
    max_num_seqs: PositiveInt = 64
    """Requests that an engine answers at once."""
    max_waiting: NonNegativeInt = 64
    """Requests that may wait for one of its slots; the next is refused with status 429."""
    limits: ImageLimits = ImageLimits(max_image_bytes=16 * 2**20)
    """Of an image; checked before it is decoded."""
    max_images: PositiveInt = 16
    """Of one request."""
    max_new_tokens: PositiveInt = 2048
    """That a request may ask for; what it gets if it does not say is `default_new_tokens`."""
    default_new_tokens: PositiveInt = 256
    max_body_bytes: PositiveInt = 32 * 2**20
    """Of one HTTP request, base64 and all."""
    body_timeout_s: PositiveFloat = 20.0
    """In which a client must have sent it."""
    request_timeout_s: PositiveFloat = 300.0
    """For the whole answer."""
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    """For requests under way to end, when the service or a replica of it is to end."""
    media_hosts: tuple[str, ...] = ()
    """Hosts (`name`, or `name:port`) that images may be fetched from by https; none: only data URLs
    are taken."""
    api_keys_file: str | None = None
    """One key a line. The environment's FLASHVL_API_KEYS, separated by commas, count too; where
    there are none at all, none is asked for."""
    batch_roots: tuple[str, ...] = ()
    """Folders and URIs that `/v1/batches` may read and write below; none: no batches."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the service from a browser."""
