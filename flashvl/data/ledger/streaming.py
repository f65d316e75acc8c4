"""Rows as Ray Data makes them, for a job that counts them itself."""

from collections.abc import Generator

import pyarrow as pa
import ray.data
from ray.exceptions import RayTaskError

from flashvl.errors import FlashVLError


def stream_tables(rows: ray.data.Dataset) -> Generator[pa.Table, None, None]:
    """Run the steps of `rows`; yields its blocks as they come.

    Raises:
        Exception: the error of a step, as it was raised there.
    """
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    rows.context.raise_original_map_exception = True
    try:
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, FlashVLError):
            # Ray appends advice of its own to the message.
            raise type(error.cause)(str(error.cause).splitlines()[0]) from None
        raise
