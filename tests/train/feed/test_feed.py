"""The feed: the same rows in each step at any number of workers, and a hole for each bad row."""

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flashvl.data.schema import CONVERSATIONS, PREFERENCES, PROMPTS
from flashvl.errors import ConfigError, FlashVLError
from flashvl.model.loading import load_processor
from flashvl.train.feed.feed import Feed, build_feed, read_shares, read_steps
from flashvl.train.feed.mixture import TrainingData
from flashvl.train.feed.shares import Share, decode_share
from tests.support.images import encode
from tests.support.stores import s3_bucket

STEP_ROWS = 6
PICTURE = encode(Image.new("RGB", (40, 30), "red"))
QUESTION = {"role": "user", "content": "<image>\nWhat is this?"}
ANSWER = {"role": "assistant", "content": "a large red circle"}


def conversation(row: int, images: int = 1, **changes: Any) -> dict[str, Any]:
    """A row whose answer tells its number."""
    question = {"role": "user", "content": "<image>\n" * images + "Describe"}
    answer = {"role": "assistant", "content": f"row {row}" + " the" * (row % 9)}
    return {"row": row, "images": [PICTURE] * images, "messages": [question, answer]} | changes


def write(path: Path, rows: Iterable[dict[str, Any]], rows_per_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows), schema=CONVERSATIONS)
    # No dictionary: the values' bytes are in the pages, where a test can damage them.
    pq.write_table(
        table, path, row_group_size=rows_per_group, use_dictionary=False, write_page_checksum=True
    )
    return path


def write_all(folder: Path, count: int, changes: Mapping[int, Any] = MappingProxyType({})) -> Path:
    """A table of two files with `count` rows of none to two images."""
    rows = [conversation(row, row % 3) | changes.get(row, {}) for row in range(count)]
    write(folder / "part-0.parquet", rows[: count // 2])
    write(folder / "part-1.parquet", rows[count // 2 :])
    return folder


Build = Callable[..., Feed]


@pytest.fixture
def build(tiny_iss_random: Path) -> Build:
    def build(data: dict[str, Any], **changes: Any) -> Feed:
        settings = {
            "model": str(tiny_iss_random),
            "global_batch_size": STEP_ROWS,
            "max_length": 300,
            "token_budget": 400,
            "seed": 3,
        }
        return build_feed(TrainingData.model_validate(data), **(settings | changes))

    return build


def steps_of(
    feed: Feed, num_workers: int, first_step: int = 0
) -> dict[int, tuple[list[int], list[int]]]:
    """For each step its rows, those that are trained and those that are dead."""
    shares = [
        decode_share(table)
        for table in read_steps(feed, range(first_step, feed.num_steps), num_workers)
    ]
    return gather(shares, num_workers)


def gather(shares: list[Share], num_workers: int) -> dict[int, tuple[list[int], list[int]]]:
    found: dict[int, tuple[list[int], list[int]]] = {}
    for share in shares:
        rows, dead = found.setdefault(share.step, ([], []))
        rows += share.rows.tolist()
        dead += [each["row"] for each in share.dead]
        sizes = [len(micro_batch.lengths) for micro_batch in share.micro_batches]
        assert sum(sizes) == len(share.own_rows)
    assert len(shares) == len(found) * num_workers
    return {step: (sorted(rows), sorted(dead)) for step, (rows, dead) in found.items()}


def test_a_step_has_the_rows_of_the_order_at_any_number_of_workers(
    build: Build, tmp_path: Path
) -> None:
    feed = build({"parquet": str(write_all(tmp_path / "table", 50))})
    assert (feed.num_rows, feed.num_steps) == (50, 9)
    expected = {
        step: (sorted(feed.rows_of_steps(step, step + 1).tolist()), []) for step in range(9)
    }
    for num_workers in (1, 2, 3, 7):
        assert steps_of(feed, num_workers) == expected
    rest = {step: rows for step, rows in expected.items() if step >= 5}
    assert steps_of(feed, 2, first_step=5) == rest


def test_a_share_holds_what_the_rows_hold(build: Build, tmp_path: Path) -> None:
    feed = build({"parquet": str(write_all(tmp_path / "table", 30))})
    tokenizer = load_processor(feed.model).tokenizer
    for table in read_steps(feed, range(feed.num_steps), 2):
        share = decode_share(table)
        rows = iter(share.rows.tolist())
        for batch in share.micro_batches:
            assert len(batch.input_ids) == len(batch.labels) == batch.lengths.sum() <= 400
            assert len(batch.tiles) == batch.num_tiles.sum()
            assert (batch.tiles.dtype, batch.tiles.shape[1:]) == (np.uint8, (3, 96, 96))
            ends = np.cumsum(batch.lengths)
            for end, length, num_tiles in zip(ends, batch.lengths, batch.num_tiles, strict=True):
                row = next(rows)
                labels = batch.labels[end - length : end]
                answer = tokenizer.decode(labels[labels != -100])
                assert answer == f"row {row}" + " the" * (row % 9) + "<|im_end|>"
                assert num_tiles >= row % 3 and (num_tiles == 0) == (row % 3 == 0)


BAD: dict[int, tuple[dict[str, Any], str, str]] = {
    2: ({"images": [b"no image"], "messages": [QUESTION, ANSWER]}, "decode", "image"),
    7: ({"images": [PICTURE], "messages": [QUESTION]}, "encode", "no assistant turn"),
    9: ({"images": [], "messages": [QUESTION, ANSWER]}, "encode", "1 <image>, but 0 images"),
    20: ({"images": None, "messages": None}, "encode", "message 0 has no role or no content"),
    21: (
        {"images": [], "messages": [{"role": "user", "content": None}, ANSWER]},
        "encode",
        "message 0 has no role or no content",
    ),
    31: (
        {"images": [], "messages": [{"role": "assistant", "content": "the " * 400}]},
        "encode",
        "more than max_length=300",
    ),
}


def test_a_bad_row_leaves_a_hole_and_nothing_else_moves(build: Build, tmp_path: Path) -> None:
    good = build({"parquet": str(write_all(tmp_path / "good", 50))})
    bad = build({"parquet": str(write_all(tmp_path / "bad", 50, {n: BAD[n][0] for n in BAD}))})
    expected = steps_of(good, 1)
    for num_workers in (1, 2, 3):
        found = steps_of(bad, num_workers)
        for step, (rows, _) in expected.items():
            assert found[step][0] == [row for row in rows if row not in BAD]
            assert found[step][1] == [row for row in rows if row in BAD]
    letters = [
        letter
        for table in read_steps(bad, range(bad.num_steps), 2)
        for letter in decode_share(table).dead
    ]
    assert len(letters) == len(BAD)
    for letter in letters:
        _, step, reason = BAD[letter["row"]]
        assert letter["step"] == step and reason in letter["reason"]
        assert letter["id"] == f"{tmp_path / 'bad'}:{letter['row']}"


def test_a_damaged_page_costs_rows_and_not_the_run(build: Build, tmp_path: Path) -> None:
    folder = write_all(tmp_path / "table", 40)
    part = folder / "part-0.parquet"
    feed = build({"parquet": str(folder)})
    chunk = pq.read_metadata(part).row_group(2).column(1)
    data = bytearray(part.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 0xFF
    part.write_bytes(bytes(data))
    found = steps_of(feed, 2)
    assert sorted(row for rows, _ in found.values() for row in rows) == [
        row for row in range(40) if not 8 <= row < 12
    ]
    (letter, *_) = [
        each for table in read_steps(feed, range(7), 1) for each in decode_share(table).dead
    ]
    assert letter["step"] == "read" and "row group 2 is damaged" in letter["reason"]


def test_a_file_that_changes_stops_the_run(build: Build, tmp_path: Path) -> None:
    folder = write_all(tmp_path / "table", 40)
    feed = build({"parquet": str(folder)})
    write(folder / "part-1.parquet", [conversation(1)])
    with pytest.raises(FlashVLError, match="its rows have changed"):
        steps_of(feed, 1)
    (folder / "part-1.parquet").unlink()
    with pytest.raises(FlashVLError, match="cannot be read any more"):
        steps_of(feed, 1)


def test_a_converters_record_beside_a_table_is_not_its_part(build: Build, tmp_path: Path) -> None:
    write_all(tmp_path / "conversations", 20)
    for name in ("dead_letters", "_old"):
        write(tmp_path / name / "part-0.parquet", [conversation(1)])
    assert build({"parquet": str(tmp_path)}).num_rows == 20


def test_row_groups_too_large_to_shuffle_are_refused(build: Build, tmp_path: Path) -> None:
    row = conversation(0, images=0)
    table = write(tmp_path / "rows.parquet", [row] * 16385, rows_per_group=20000)
    with pytest.raises(ConfigError, match="row group of 16385 rows, more than 16384; write it"):
        build({"parquet": str(table)})


# Pairs and prompts


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    table = pa.Table.from_pylist(
        [{"row": n, "images": [PICTURE]} | row for n, row in enumerate(rows)], schema
    )
    pq.write_table(table, path)
    return path


def test_a_pair_is_a_document_with_two_branches(build: Build, tmp_path: Path) -> None:
    """The answers may begin with a line's end, which is one token with that before it."""
    prompt = user("<image>\nLook") + say("a circle") + user("Which?")
    rows = [
        {"prompt": prompt, "chosen": say("a red circle"), "rejected": say("the blue square")},
        {"prompt": prompt, "chosen": say("\n\nred"), "rejected": say("a square")},
        {"prompt": prompt, "chosen": say("red"), "rejected": say("red")},
        {"prompt": prompt, "chosen": say("the " * 140), "rejected": say("the " * 150)},
        {"prompt": prompt, "chosen": None, "rejected": say("red")},
    ]
    path = write_rows(tmp_path / "pairs.parquet", rows, PREFERENCES)
    feed = build({"parquet": str(path)}, kind="dpo", global_batch_size=5)
    share = decode_share(next(read_steps(feed, range(1), 1)))
    reasons = {each["row"]: each["reason"] for each in share.dead}
    assert "chosen and rejected are the same" in reasons[2]
    assert "prompt and both answers have" in reasons[3] and "max_length=300" in reasons[3]
    assert "message 0 has no role" in reasons[4]
    tokenizer = load_processor(feed.model).tokenizer
    (batch,) = share.micro_batches
    answers, end = {}, 0
    for number, row in enumerate(share.rows.tolist()):
        lengths = batch.branches[2 * number : 2 * number + 2].tolist()
        start, end = end, end + int(batch.lengths[number])
        assert (batch.labels[start : end - sum(lengths)] == -100).all()
        labels = np.split(batch.labels[end - sum(lengths) : end], [lengths[0]])
        answers[row] = [tokenizer.decode(each[each != -100]) for each in labels]
    assert answers[0] == ["a red circle<|im_end|>", "the blue square<|im_end|>"]
    assert [each.lstrip("\n") for each in answers[1]] == ["red<|im_end|>", "a square<|im_end|>"]


@pytest.mark.parametrize(
    ("num_workers", "counts"), [(1, [24]), (2, [12, 12]), (5, [4, 5, 5, 5, 5])]
)
def test_prompts_are_given_to_who_makes_their_completions(
    build: Build, tmp_path: Path, num_workers: int, counts: list[int]
) -> None:
    rows = [{"prompt": user(f"<image>\n{n} + 1"), "answer": str(n + 1)} for n in range(4)]
    path = write_rows(tmp_path / "prompts.parquet", rows, PROMPTS)
    feed = build({"parquet": str(path)}, kind="grpo", global_batch_size=4, num_generations=6)
    shares = [decode_share(table) for table in read_steps(feed, range(1), num_workers)]
    made: set[tuple[int, int]] = set()
    found = []
    for share in shares:
        extras = [json.loads(extra) for extra in share.extras]
        assert [each["id"] for each in extras] == share.rows.tolist()
        for each in extras:
            assert each["answer"] == str(each["id"] + 1)
            assert each["prompt"] == user(f"<image>\n{each['id']} + 1")
            first = each["first_completion"]
            made |= {(each["id"], first + n) for n in range(each["num_completions"])}
        found.append(sum(each["num_completions"] for each in extras))
        (batch,) = share.micro_batches
        assert len(batch.lengths) == len(extras) and (batch.labels == -100).all()
    assert found == counts
    assert len(made) == 24
    assert sorted(row for share in shares for row in share.own_rows.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_table_of_conversations_is_neither_of_pairs_nor_of_prompts(
    build: Build, tmp_path: Path, kind: str
) -> None:
    name = {"dpo": "preferences", "grpo": "prompts"}[kind]
    with pytest.raises(ConfigError, match=f"not those of {name}"):
        build({"parquet": str(write_all(tmp_path / "table", 4))}, kind=kind)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_procedural_world_has_pairs_and_prompts(build: Build, kind: str) -> None:
    feed = build({"synthetic": {"count": 40}}, kind=kind, global_batch_size=40)
    share = decode_share(next(read_steps(feed, range(1), 1)))
    assert not share.dead and len(share.rows) == 40


# Mixtures


def write_mixture(folder: Path, *tables: str) -> dict[str, Any]:
    (folder / "mixture.yaml").write_text("tables:\n" + "".join(f"- {{{t}}}\n" for t in tables))
    return {"mixture": str(folder / "mixture.yaml")}


def test_a_mixture_takes_counts_and_weights(build: Build, tmp_path: Path) -> None:
    paths = [write_all(tmp_path / f"table{count}", count) for count in (40, 30, 20, 10)]
    data = write_mixture(
        tmp_path,
        f"path: {paths[0]}, count: 7",
        f"path: {paths[1]}, weight: 2",
        f"path: {paths[2]}, weight: 1",
        f"path: {paths[3]}",
    )
    feed = build(data)
    assert feed.sources == tuple(map(str, paths))
    counts = np.zeros(4, int)
    for table in read_steps(feed, range(feed.num_steps), 1):
        for batch in decode_share(table).micro_batches:
            counts += np.bincount(batch.sources, minlength=4)
    assert counts.tolist() == [7, 30, 15, 10]
    assert feed.num_rows == 62


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path: /no/such/table", "/no/such/table"),
        ("path: EMPTY", "empty has no row"),
        ("path: OTHER", "has columns id (int64), not those of conversations"),
        ("path: GOOD, count: 41", "has 40 rows, of which 41 are to be taken"),
        ("path: GOOD, count: 3, weight: 1", "has a count and a weight; leave out one"),
        ("path: GOOD, wait: 1", "unknown key 'tables.1.wait'. Did you mean 'weight'?"),
        ("path: FIRST", "is named twice"),
    ],
)
def test_a_wrong_mixture_is_refused_in_one_line(
    build: Build, tmp_path: Path, table: str, message: str
) -> None:
    first, good = (write_all(tmp_path / name, 40) for name in ("first", "good"))
    write(tmp_path / "empty" / "part.parquet", [])
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other" / "part.parquet")
    for name in ("first", "good", "empty", "other"):
        table = table.replace(name.upper(), str(tmp_path / name))
    with pytest.raises(ConfigError) as raised:
        build(write_mixture(tmp_path, f"path: {first}", table))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_table_in_a_store_is_the_table_on_disk(build: Build, tmp_path: Path) -> None:
    here = build({"parquet": str(write_all(tmp_path / "table", 20))})
    with s3_bucket() as (_, uri):
        store, _ = pyarrow.fs.FileSystem.from_uri(uri.format("x"))
        pyarrow.fs.copy_files(str(tmp_path / "table"), "bucket/table", destination_filesystem=store)
        there = build({"parquet": uri.format("table")})
        assert steps_of(there, 2) == steps_of(here, 2)
        assert there.fingerprint()["order"] == here.fingerprint()["order"]


# Ray Data


@pytest.mark.parametrize(("num_workers", "first_step"), [(1, 0), (3, 4)])
def test_each_worker_gets_its_shares_in_turn(
    ray_cluster: None, build: Build, tmp_path: Path, num_workers: int, first_step: int
) -> None:
    """As Ray Train deals them: by `streaming_split` with equal parts in their order."""
    feed = build({"parquet": str(write_all(tmp_path / "table", 100, {11: BAD[2][0]}))})
    object.__setattr__(feed.order, "steps_per_window", 3)  # several tasks
    dataset = feed.dataset(first_step, num_workers)
    dataset.context.execution_options.preserve_order = True
    shards = dataset.streaming_split(num_workers, equal=True)
    shares: list[list[Share]] = [[] for _ in shards]

    def read(rank: int) -> None:
        shares[rank] = list(read_shares(shards[rank], rank, first_step))

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(num_workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(own) for own in shares} == {feed.num_steps - first_step}
    found = gather([share for own in shares for share in own], num_workers)
    assert found == steps_of(feed, num_workers, first_step)


def test_a_share_of_another_step_is_refused(ray_cluster: None, build: Build) -> None:
    feed = build({"synthetic": {"count": 20}})
    (shard,) = feed.dataset(0, 1).streaming_split(1, equal=True)
    with pytest.raises(
        FlashVLError, match="worker 0 got the share of worker 0 in step 0 in step 1"
    ):
        next(read_shares(shard, 0, first_step=1))
