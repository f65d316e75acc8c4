"""Problems with pictures, and completions of them, for tests of reinforcement learning."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from flashvl.data.schema import PROMPTS
from flashvl.model import FlashVLProcessor
from flashvl.train.feed.feed import build_feed, read_steps
from flashvl.train.feed.shares import Share, decode_share
from flashvl.train.grpo.groups import Rollout
from flashvl.train.recipe import GrpoRecipe
from tests.support.images import encode


def picture(seed: int, width: int, height: int) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    corner = (rng.randrange(40), rng.randrange(40))
    color = tuple(rng.randrange(256) for _ in range(3))
    ImageDraw.Draw(image).rectangle((*corner, 80, 80), fill=color)
    return image


def problems(count: int, with_text_only: bool = False) -> list[dict[str, Any]]:
    """Rows of `PROMPTS`, whose pictures have different sizes; every third may have none."""
    rows = []
    for row in range(count):
        images = [] if with_text_only and row % 3 == 2 else [picture(row, 90 + 70 * row % 300, 96)]
        question = "<image>\n" * len(images) + f"How many {'big ' * (row % 4)}circles?"
        rows.append(
            {
                "row": row,
                "images": [encode(image) for image in images],
                "prompt": [{"role": "user", "content": question}],
                "answer": str(row % 7),
            }
        )
    return rows


def write_problems(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), PROMPTS)
    pq.write_table(table, path / "part-0.parquet", row_group_size=8)
    return path


def completion(processor: FlashVLProcessor, row: int, number: int) -> Rollout:
    """Some tokens, the same each time, of one to nine, most with an end token."""
    rng = random.Random(1000 * row + number)
    tokenizer = processor.tokenizer
    usual = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    ids = [rng.choice(usual) for _ in range(rng.randint(1, 9))]
    is_cut = number % 5 == 4
    tokens = ids if is_cut else [*ids, tokenizer.eos_token_id]
    logprobs = [-rng.random() for _ in tokens]
    return Rollout(token_ids=tokens, logprobs=logprobs, text=tokenizer.decode(ids), is_cut=is_cut)


def read_share(recipe: GrpoRecipe, rank: int = 0, num_ranks: int = 1) -> Share:
    """A worker's share of the first step, in which every row can be used."""
    feed = build_feed(
        recipe.data,
        model=recipe.init_from,
        global_batch_size=recipe.global_batch_size,
        max_length=recipe.max_length,
        token_budget=recipe.token_budget,
        seed=0,
        kind="grpo",
        num_generations=recipe.num_generations,
    )
    share = decode_share(list(read_steps(feed, range(1), num_ranks))[rank])
    assert not share.dead
    return share
