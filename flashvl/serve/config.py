"""What a service offers and admits: the `args` of a file in `serve_configs/`."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from flashvl.config import Dtype, Replicas, StrictModel
from flashvl.data.limits import ImageLimits


class ServiceConfig(StrictModel):
    """One model, and the replicas of its engine that answer for it."""

    model: str = "tiny"
    """Shipped model's name (tiny), or folder, on every node, of a Flash-VL or published FlashVL
    model; clients use the folder's name."""
    dtype: Dtype = "auto"
    """Number format of the model; auto: the machine's fastest. With float32, slower, an answer
    depends neither on the requests in the same batch nor on the machine."""
    replicas: Replicas = "1"
    """Engines: their number, or MIN:MAX, between which their number follows the load."""
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each engine; with 0.5, two engines share a GPU, and 0 uses CPUs. By default one where
    the cluster has GPUs."""
    max_num_seqs: PositiveInt = 64
    """Requests that an engine answers at once."""
    max_waiting: NonNegativeInt = 64
    """Requests that may queue for each engine; further ones get HTTP 429."""
    image_limits: ImageLimits = ImageLimits(max_image_bytes=16 * 2**20)
    """Bounds of an image, checked before it is decoded; an image outside them is refused."""
    max_images: PositiveInt = 16
    """Images in one request at most."""
    max_new_tokens: PositiveInt = 2048
    """Tokens of an answer at most; a request that asks for more is refused."""
    default_new_tokens: PositiveInt = 256
    """Tokens of an answer at most where a chat, response or caption request sets no bound."""
    max_body_bytes: PositiveInt = 32 * 2**20
    """Bytes of one HTTP request at most, its images as base64 included."""
    body_timeout_s: PositiveFloat = 20.0
    """Seconds within which a client must have sent its request."""
    request_timeout_s: PositiveFloat = 300.0
    """Seconds within which an answer must be complete; a later one ends with HTTP 504."""
    graceful_shutdown_timeout_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that answers under way have to end when the service or a replica of it stops."""
    media_hosts: tuple[str, ...] = ()
    """Hosts, as NAME or NAME:PORT, from which image URLs are fetched by https; without any, images
    must come as data URLs."""
    api_keys_file: str | None = None
    """File with one API key a line, which count with those in FLASHVL_API_KEYS, separated by
    commas; without any key, everyone may use the service."""
    batch_roots: tuple[str, ...] = ()
    """Folders and URIs below which /v1/batches may read and write; without any, it is off."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the service from a browser, such as
    https://app.example.com."""
