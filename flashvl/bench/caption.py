"""Images a second that a captioning job answers from a Parquet file of JPEGs, beside its limit.

    flashvl bench caption

The limit is the rate of the engine alone, which gets tiles that are ready in a process of its own,
less the time that decoding takes on the same cores. The comparison is the program that one would
write first: Ray Data's `map_batches` over the processor and `generate`. Rates leave out the start:
they are measured from the first rows to the last.
"""

import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import run_caption_job
from flashvl.bench.contenders import make_photo
from flashvl.config import DEFAULT_PROMPT
from flashvl.data.features import Tiles, ask_about_image, decode_tiles
from flashvl.data.images import decode_image
from flashvl.engine import Engine, Request
from flashvl.model.loading import inference_dtype, load_model, load_processor
from flashvl.progress import ShowProgress, ignore_progress

MAX_NEW_TOKENS = 64
NAIVE_BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionSpeed:
    """Images a second, medians over the rounds."""

    engine: float
    """The engine alone on all cores, from tiles."""
    decoding: float
    """Decoding alone on one core, from JPEG bytes to tiles."""
    limit: float
    """`1 / (1 / engine + 1 / (decoding * cores))`: engine and decoding on the same cores."""
    job: float
    """`flashvl caption`."""
    naive: float
    """`map_batches` over the processor and `generate`."""
    of_limit: float
    """`job / limit`, the median of the rounds' own ratios."""
    times_naive: float
    """`job / naive`, likewise."""
    cores: int
    """CPU cores that this process may use."""


def measure_captioning(
    model: str,
    num_images: int,
    rounds: int,
    on_progress: ShowProgress = ignore_progress,
) -> CaptionSpeed:
    """Time all four in turn, `rounds` times; Ray must be started already."""
    cores = len(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = folder / "images.parquet"
        photos = [make_photo(seed) for seed in range(num_images)]
        pq.write_table(
            pa.table({"id": range(num_images), "image": photos}), table, row_group_size=256
        )
        for number in range(rounds):
            rates = {}
            for name, measure in (
                ("engine", lambda: _engine(model, photos)),
                ("decoding", lambda: _decoding(model, photos)),
                ("job", lambda number=number: _job(model, table, folder / f"out-{number}")),
                ("naive", lambda: _naive(model, table)),
            ):
                on_progress(number, rounds, name)
                rates[name] = measure()
            limit = 1 / (1 / rates["engine"] + 1 / (rates["decoding"] * cores))
            found.append(
                rates
                | {
                    "limit": limit,
                    "of_limit": rates["job"] / limit,
                    "times_naive": rates["job"] / rates["naive"],
                }
            )
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    return CaptionSpeed(cores=cores, **medians)


def _engine(model: str, photos: list[bytes]) -> float:
    return ray.get(ray.remote(num_cpus=0)(_run_engine).remote(model, photos))


def _run_engine(model: str, photos: list[bytes]) -> float:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    engine = Engine.from_pretrained(model)
    tiles = [decode_tiles([photo], engine.processor) for photo in photos]
    engine.generate([_request(each) for each in tiles[:8]])
    engine.image_features.clear()
    start_s = time.perf_counter()
    engine.generate([_request(each) for each in tiles])
    return len(photos) / (time.perf_counter() - start_s)


def _request(tiles: Tiles) -> Request:
    return Request(
        messages=ask_about_image(DEFAULT_PROMPT), images=tiles, max_new_tokens=MAX_NEW_TOKENS
    )


def _decoding(model: str, photos: list[bytes]) -> float:
    processor = load_processor(model)
    start_s = time.perf_counter()
    for photo in photos:
        decode_tiles([photo], processor)
    return len(photos) / (time.perf_counter() - start_s)


def _job(model: str, table: Path, output: Path) -> float:
    seen: list[tuple[float, int]] = []

    def on_progress(done: int, total: int, note: str = "") -> None:
        seen.append((time.perf_counter(), done))

    job = CaptionJob(
        input=str(table),
        output=str(output),
        model=model,
        prompt=DEFAULT_PROMPT,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    run_caption_job(job, on_progress)
    return _steady(seen)


def _naive(model: str, table: Path) -> float:
    rows = ray.data.read_parquet(str(table)).map_batches(
        _Naive,
        fn_constructor_args=(model,),
        batch_size=NAIVE_BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    rows.context.enable_progress_bars = False
    # `take_all` returns all rows at the end, so each row carries the time at which it was done.
    times, counts = np.unique([row["done_s"] for row in rows.take_all()], return_counts=True)
    return _steady(list(zip(times.tolist(), counts.cumsum().tolist(), strict=True)))


class _Naive:
    """Captions batches in the way that the libraries' own pages show."""

    def __init__(self, model: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.processor = load_processor(model)
        self.model = load_model(model, inference_dtype())

    def __call__(self, batch: dict[str, list[object]]) -> dict[str, list[object]]:
        images = [decode_image(data) for data in batch["image"]]  # type: ignore[arg-type]
        content = [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(
            images=[[image] for image in images], text=[text] * len(images), return_tensors="pt"
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers = output[:, inputs["input_ids"].shape[1] :]
        captions = self.processor.batch_decode(answers, skip_special_tokens=True)
        return {
            "id": batch["id"],
            "caption": captions,
            "done_s": [time.time()] * len(captions),
        }


def _steady(seen: list[tuple[float, int]]) -> float:
    """Rows a second from the first report to the last; `seen` has (time, rows done)."""
    (first_s, first), (last_s, last) = seen[0], seen[-1]
    return (last - first) / (last_s - first_s)
