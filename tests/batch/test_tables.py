"""Image tables of all types, texts and damage: each row is read once or has a reason why not."""

import decimal
import io
import os
import random
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvl.batch.captioner import CAPTIONED
from flashvl.batch.outputs import RESULTS
from flashvl.data.inputs import row_groups
from flashvl.data.inputs.find import find_source
from flashvl.data.inputs.parquet import ParquetFiles, _partition
from flashvl.data.inputs.row_groups import PIECE, read_row_groups
from flashvl.data.ledger.outputs import OutputFolder
from flashvl.data.storage import Location, locate
from flashvl.errors import ConfigError, FlashVLError

NUM_ROWS = 3
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def read(source: Any, is_done: Any = None) -> pa.Table:
    """The rows, as Ray's tasks read them."""
    assert isinstance(source, ParquetFiles)
    is_done = np.zeros(source.num_rows, bool) if is_done is None else is_done
    pieces = pa.Table.from_pylist(list(source._pieces(is_done)), schema=PIECE)
    schema = source.tables[0].schema
    tables = read_row_groups(pieces, store=source.store, columns=source.columns, schema=schema)
    return pa.concat_tables(tables, promote_options="default")


def write(file: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    if "image" not in columns:
        table = table.append_column("image", pa.array([b"i"] * table.num_rows))
    pq.write_table(table, file)
    return file


def not_utf8(text_type: pa.DataType, *texts: bytes | None) -> pa.Array:
    """A column whose type is text, whatever its bytes."""
    layouts = {pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    data = pa.array(texts, pa.binary()).cast(layouts.get(text_type, pa.binary()))
    return pa.Array.from_buffers(text_type, len(texts), data.buffers())


# Images and ids

BYTES = [b"one", None, b"three"]
PAIRS = [{"bytes": b"one", "path": "a.png"}, None, {"bytes": None, "path": "b.png"}]
PATHS = ["a.png", None, "s3://bucket/b.png"]
FSB = pa.binary(3)


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(BYTES, each) for each in (pa.binary(), pa.large_binary(), pa.binary_view())),
        pa.array(BYTES).dictionary_encode(),
        pa.array([b"one", None, b"two"], FSB),
        pa.array([each and {"bytes": each} for each in BYTES]),
        pa.array([{"bytes": each, "path": None} for each in (b"one", None, b"two")],
                 pa.struct([("bytes", FSB), ("path", pa.string())])),
        pa.StructArray.from_arrays([pa.array(BYTES).dictionary_encode()], ["bytes"]),
    ],
    ids=lambda column: str(column.type),
)  # fmt: skip
def test_images_of_every_layout(column: pa.Array, tmp_path: Path) -> None:
    rows = read(find_source(str(write(tmp_path / "t.parquet", image=column)))).to_pylist()
    wanted = [each["bytes"] if isinstance(each, dict) else each for each in column.to_pylist()]
    assert [row["image"] for row in rows] == wanted
    assert [row["path"] for row in rows] == [None] * NUM_ROWS


@pytest.mark.parametrize(
    "column",
    [
        *(pa.array(PATHS, each) for each in (pa.string(), pa.large_string(), pa.string_view())),
        pa.array(PATHS).dictionary_encode(),
        pa.array([{"bytes": None, "path": path} for path in PATHS],
                 pa.struct([("bytes", pa.null()), ("path", pa.string())])),
        pa.array([{"bytes": None, "path": path} for path in PATHS], HF_IMAGE),
        pa.array([{"path": path} for path in PATHS], pa.struct([("path", pa.string_view())])),
    ],
    ids=lambda column: str(column.type),
)  # fmt: skip
def test_paths_of_every_layout(column: pa.Array, tmp_path: Path) -> None:
    source = find_source(str(write(tmp_path / "t.parquet", image=column)))
    rows = read(source).to_pylist()
    folder = os.fsencode(tmp_path)
    assert [row["path"] for row in rows] == [folder + b"/a.png", None, b"s3://bucket/b.png"]
    assert [row["image"] for row in rows] == [None] * NUM_ROWS


@pytest.mark.parametrize(
    "layout",
    [pa.list_, pa.large_list, pa.list_view, pa.large_list_view],
    ids=lambda layout: layout.__name__,
)
def test_several_images_a_row(layout: Callable[..., pa.DataType], tmp_path: Path) -> None:
    image_b = {"image": None, "path": os.fsencode(tmp_path / "b.png")}
    one = {"image": b"one", "path": None}
    for values, item, wanted in (
        ([PAIRS[:1], None, [], [PAIRS[2], PAIRS[0], None]], HF_IMAGE, [one, image_b]),
        ([BYTES[:1], None, [], [b"two", b"one", None]], pa.binary(),
         [one, one | {"image": b"two"}]),
        ([["s3://x/y"], None, [], ["b.png", "s3://x/y", None]], pa.string_view(),
         [one | {"image": None, "path": b"s3://x/y"}, image_b]),
    ):  # fmt: skip
        file = write(tmp_path / "t.parquet", image=pa.array(values, layout(item)))
        first, other = wanted
        nothing = {"image": None, "path": None}
        assert read(find_source(str(file)))["images"].to_pylist() == [
            *([first], None, []),
            [other, first, nothing],
        ]


UUIDS = [uuid.UUID(int=n * 10**37) for n in range(1, 3)]


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([UUIDS[0].bytes, None, UUIDS[1].bytes], pa.uuid()), list(map(str, UUIDS))),
        (pa.array([b"\x01\xff", None, b"ab"], pa.binary(2)), ["01ff", "6162"]),
        (pa.array(["a", None, "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", None, "b"], pa.string_view()), ["a", "b"]),
        (pa.array(["a", None, "b"], pa.large_string()), ["a", "b"]),
        (pa.array([b"a\xffb", None, "\u00fc".encode()]), [r"a\xffb", "\u00fc"]),
        (pa.array([2**64 - 1, None, 0], pa.uint64()), [str(2**64 - 1), "0"]),
        (pa.array([decimal.Decimal(10**30), None, decimal.Decimal(-1)]), [str(10**30), "-1"]),
        (pa.array([0, None, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
        (pa.array([0, None, 1], pa.timestamp("ms")), ["1970-01-01 00:00:00.000",
                                                      "1970-01-01 00:00:00.001"]),
    ],
    ids=lambda each: str(getattr(each, "type", "")),
)  # fmt: skip
def test_ids_of_every_type(column: pa.Array, texts: list[str], tmp_path: Path) -> None:
    source = find_source(str(write(tmp_path / "t.parquet", id=column)))
    assert read(source)["id"].to_pylist() == [texts[0], None, texts[1]]


def test_a_column_of_hashes_is_not_taken_for_the_images(tmp_path: Path) -> None:
    table = {"phash": pa.array([b"ab"], pa.binary(2)), "id": [b"a"], "jpg": [b"picture"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    assert read(find_source(str(tmp_path / "t.parquet"))).to_pylist()[0]["image"] == b"picture"


def test_paths_may_not_be_followed_whatever_their_layout(tmp_path: Path) -> None:
    for column in (pa.array(PATHS, pa.string_view()), pa.array([[path] for path in PATHS])):
        file = write(tmp_path / "t.parquet", image=column)
        with pytest.raises(ConfigError, match="may not be followed"):
            find_source(str(file), follow_paths=False)
    file = write(tmp_path / "t.parquet", image=pa.array([PAIRS], pa.list_(HF_IMAGE)))
    (row,) = read(find_source(str(file), follow_paths=False)).to_pylist()
    assert [image["path"] for image in row["images"]] == [None] * NUM_ROWS


# Partitions


def test_partitions_begin_below_the_input(tmp_path: Path) -> None:
    folder = tmp_path / "image=raw" / "id=7" / "t"
    (folder / "day=1").mkdir(parents=True)
    write(folder / "day=1" / "a.parquet", image=[b"i"], id=["x"])
    for text in (folder, folder / "*" / "*.parquet", folder / "day=1", folder / "day=1/a.parquet"):
        source = find_source(str(text))
        assert isinstance(source, ParquetFiles)
        is_above = "day=1" in str(text)
        assert source.tables[0].partition == ({} if is_above else {"day": "1"})
        assert read(source)["image"].to_pylist() == [b"i"]
    pq.write_table(pa.table({"jpg": [b"i"]}), folder / "day=1" / "a.parquet")
    rows = read(find_source(str(folder.parent.parent), keep=["id", "day"])).to_pylist()
    assert rows[0]["kept"] == {"day": "1"} and rows[0]["id"] == "7" and rows[0]["image"] == b"i"
    rows = read(find_source(str(tmp_path)))  # below the input, but not an image
    assert rows["image"].to_pylist() == [b"i"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("a=%F/.\ufffd _", min_size=1), min_size=1, max_size=3))
def test_folders_of_any_name_tell_something_or_nothing(folders: list[str]) -> None:
    for name, value in _partition("/".join([*folders, "a.parquet"])).items():
        assert name and (value is None or isinstance(value, str))
    assert _partition("a=1/b=%C3%BC %/c=__HIVE_DEFAULT_PARTITION__/d/e=f=g/h=1.parquet") == {
        **{"a": "1", "b": "\u00fc %", "c": None, "e": "f=g"}
    }


# Text that is not UTF-8


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_bytes_that_are_no_text(text_type: pa.DataType, tmp_path: Path) -> None:
    column = not_utf8(text_type, b"one", b"t\xffwo", None)
    listed = pa.ListArray.from_arrays([0, 1, 2, 3], column)
    file = write(
        tmp_path / "t.parquet", id=column, ask=column, image=column, kept=column, many=listed,
        one=pa.StructArray.from_arrays([column], ["x"]),
    )  # fmt: skip
    keep = ("kept", "many", "one")
    rows = read(find_source(str(file), prompt_column="ask", keep=keep))
    rows.validate(full=True)
    good, bad, null = rows.to_pylist()
    assert good["id"] == good["prompt"] == "one" and null["id"] is None
    assert good["step"] is None and null["step"] is None
    assert bad["id"] == r"t\xffwo" and bad["step"] == "read"
    assert bad["reason"].startswith(r"id is not UTF-8: b't\xffwo'")
    assert bad["path"] == os.fsencode(tmp_path) + b"/t\xffwo"  # as file names on a disk
    mended = "t\N{REPLACEMENT CHARACTER}wo"
    assert bad["kept"] == {"kept": mended, "many": [mended], "one": {"x": mended}}
    assert good["kept"] == {"kept": "one", "many": ["one"], "one": {"x": "one"}}
    source = find_source(str(file), id_column="kept", prompt_column=None, keep=())
    assert read(source)["step"].to_pylist() == [None, "read", None]


def test_a_prompt_that_is_no_text_costs_its_row(tmp_path: Path) -> None:
    values = not_utf8(pa.string(), b"what", b"w\xe4s")
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), values)
    file = write(tmp_path / "t.parquet", id=[1, 2, 3], ask=column)
    rows = read(find_source(str(file), prompt_column="ask")).to_pylist()
    assert [row["step"] for row in rows] == [None, "read", None]
    assert rows[1]["reason"].startswith("prompt is not UTF-8") and rows[1]["id"] == "2"


def test_a_column_whose_name_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", wxyz=[1])
    file.write_bytes(file.read_bytes().replace(b"wxyz", b"w\xff\xfez"))
    with pytest.raises(ConfigError, match="not a readable Parquet file") as error:
        find_source(str(file))
    assert "\n" not in str(error.value)


# Damage

GROUP = 40


def damaged(seed: int) -> tuple[bytes, int]:
    """A table of three row groups, with some bytes of a column of one changed."""
    rng = random.Random(seed)
    table = pa.table(
        {
            "id": [f"id {n}" for n in range(3 * GROUP)],
            "image": [rng.randbytes(300) for _ in range(3 * GROUP)],
            "ask": ["what", "why"] * (3 * GROUP // 2),
            "n": range(3 * GROUP),
            "many": [[n] * 3 for n in range(3 * GROUP)],
        }
    )
    file = io.BytesIO()
    pq.write_table(
        table,
        file,
        row_group_size=GROUP,
        compression=rng.choice(["snappy", "zstd", "gzip", "none", "lz4", "brotli"]),
        data_page_size=1000,
        write_batch_size=4,
        write_page_checksum=rng.random() < 0.3,
        data_page_version=rng.choice(["1.0", "2.0"]),
        use_dictionary=rng.random() < 0.5,
    )
    data = bytearray(file.getvalue())
    row_group = rng.randrange(3)
    footer = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(row_group)
    chunk = footer.column(rng.randrange(footer.num_columns))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    for _ in range(rng.choice([1, 1, 5, 30])):
        reach = chunk.total_compressed_size if rng.random() < 0.7 else 20
        data[start + rng.randrange(reach)] = rng.randrange(256)
    return bytes(data), row_group


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), is_done=st.sets(st.integers(0, 3 * GROUP - 1)))
def test_a_damaged_page_costs_its_row_group_at_most(
    seed: int, is_done: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, row_group = damaged(seed)
    file = tmp_path_factory.mktemp("in") / "t.parquet"
    file.write_bytes(data)
    source = find_source(str(file), prompt_column="ask", keep=["n", "many"])
    mask = np.isin(np.arange(3 * GROUP), list(is_done))
    rows = read(source, mask).to_pylist() if not mask.all() else []
    assert [row["row"] for row in rows] == sorted(set(range(3 * GROUP)) - is_done)
    for row in rows:
        if row["row"] // GROUP != row_group:
            assert row.get("step") is None and row["id"] == f"id {row['row']}"
        elif row.get("step") is not None:
            assert row["step"] == "read" and row["id"] is not None
            assert "\n" not in row["reason"]


def test_damage_is_told_with_file_and_row_group_and_what_else_can_be_read_is(
    tmp_path: Path,
) -> None:
    rng = random.Random(0)
    images = [rng.randbytes(2000) for _ in range(200)]
    table = pa.table({"id": [f"id {n}" for n in range(200)], "image": images, "n": range(200)})
    file = tmp_path / "t.parquet"
    pq.write_table(
        table,
        file,
        row_group_size=100,
        data_page_size=10_000,
        write_batch_size=4,
        write_page_checksum=True,
        use_dictionary=False,
    )
    data = bytearray(file.read_bytes())
    place = data.index(images[90][:100])
    data[place - 3000 : place + 3000] = bytes(6000)
    file.write_bytes(data)
    rows = read(find_source(str(file), keep=["n"])).to_pylist()
    assert [row["row"] for row in rows] == list(range(200))
    dead = [row["row"] for row in rows if row.get("step")]
    assert 0 < dead[0] <= 90 and dead == list(range(dead[0], 100))  # the pages before are whole
    for row in rows:
        assert row["id"] == f"id {row['row']}" and row["kept"] == {"n": row["row"]}
    assert rows[95]["reason"].startswith(f"{file}: row group 0 is damaged")
    assert [row["image"] for row in rows if not row.get("step")] == [
        image for n, image in enumerate(images) if n not in dead
    ]


def test_a_file_that_lost_its_middle(tmp_path: Path) -> None:
    data, _ = damaged(3)
    (tmp_path / "t.parquet").write_bytes(data[:2000] + data[4000:])
    rows = read(find_source(str(tmp_path / "t.parquet"))).to_pylist()
    assert [row["row"] for row in rows] == list(range(3 * GROUP))
    assert sum(row.get("step") is not None for row in rows) >= GROUP


def test_a_store_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = damaged(7)
    (tmp_path / "t.parquet").write_bytes(data)
    source = find_source(str(tmp_path / "t.parquet"))
    (tmp_path / "t.parquet").write_bytes(b"another")
    with pytest.raises(FlashVLError, match="cannot be read any more") as error:
        read(source)
    assert "\n" not in str(error.value)
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(FlashVLError, match="No such file.*run the same command again"):
        read(source)
    (tmp_path / "t.parquet").write_bytes(data)
    opened = Location.open

    class Broken(io.BytesIO):
        """A store that answers with the footer, and fails after it."""

        num_reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.num_reads += 1
            if self.num_reads > 1:
                raise OSError("AWS Error NETWORK_CONNECTION")
            return super().read(size)

    monkeypatch.setattr(Location, "open", lambda self: pa.PythonFile(Broken(data), mode="r"))
    with pytest.raises(FlashVLError, match="NETWORK_CONNECTION.*repair its store"):
        read(source)
    monkeypatch.setattr(Location, "open", opened)
    assert len(read(source)) == 3 * GROUP
    assert row_groups.ROWS_PER_READ < 3 * GROUP


# What is kept

D = decimal.Decimal
STRINGS = ["a", None, "a text that is longer than a view holds in place"]
KEPT: dict[str, pa.Array] = {
    **{str(each): pa.array(STRINGS, each)
       for each in (pa.string(), pa.large_string(), pa.string_view())},
    **{str(each): pa.array([text and text.encode() for text in STRINGS], each)
       for each in (pa.binary(), pa.large_binary(), pa.binary_view())},
    **{str(each): pa.array([1, None, 2], each)
       for each in (pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.time32("s"),
                    pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.duration("ns"),
                    pa.duration("s"), pa.timestamp("ns", "Europe/Berlin"), pa.timestamp("s"),
                    pa.date32())},
    **{str(each): pa.array([D("1.5"), None, D("-2")], each)
       for each in (pa.decimal32(5, 1), pa.decimal64(15, 1), pa.decimal128(25, 1),
                    pa.decimal256(65, 1))},
    **{str(each): pa.array([[1, 2], None, [3, None]], each)
       for each in (pa.list_(pa.int8()), pa.large_list(pa.int8()), pa.list_(pa.int8(), 2))},
    "bool": pa.array([True, None, False]),
    "null": pa.nulls(NUM_ROWS),
    "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "dictionary": pa.array(STRINGS).dictionary_encode(),
    "dictionary of int": pa.array([7, None, 7]).dictionary_encode(),
    "struct": pa.array([{"a": 1, "b": "x"}, None, {"a": None, "b": None}]),
    "struct of null": pa.array([{"n": None}, None, {"n": None}]),
    "list of null": pa.array([[None], None, []]),
    "struct of view": pa.array([{"a": text} for text in STRINGS],
                               pa.struct([("a", pa.string_view())])),
    "list of views": pa.array([["x"], None, [None]], pa.list_(pa.string_view())),
    "struct of dictionary": pa.StructArray.from_arrays(
        [pa.array(STRINGS).dictionary_encode()], ["d"]),
    "list of dictionary": pa.ListArray.from_arrays(
        [0, 1, 1, 3], pa.array(STRINGS).dictionary_encode()),
    "map": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int32())),
    "map of views": pa.array([[("a", b"1")], None, []],
                             pa.map_(pa.string_view(), pa.binary_view())),
    "nested": pa.array([[[{"a": ["x"]}]], None, [None]]),
    "uuid": pa.array([UUIDS[0].bytes, None, UUIDS[1].bytes], pa.uuid()),
    "list of uuid": pa.ListArray.from_arrays(
        [0, 1, 2, 3], pa.array([UUIDS[0].bytes, None, UUIDS[1].bytes], pa.uuid())),
    "json": pa.array(["{}", None, "[1]"], pa.json_(pa.large_string())),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None, 0], pa.int8())),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int32(), [2]),
        pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2))),
    "a.b": pa.array([1, None, 2]),
    "a": pa.array([{"b": 1}, None, {"b": 2}]),
}  # fmt: skip


def write_kept(file: Path) -> list[str]:
    """A table with a column of each type; their names."""
    write(file, **{f"k {name}": column for name, column in KEPT.items()})
    return [f"k {name}" for name in KEPT]


def test_what_is_kept_is_as_pyarrow_reads_it_from_the_input(tmp_path: Path) -> None:
    names = write_kept(tmp_path / "t.parquet")
    source = find_source(str(tmp_path / "t.parquet"), keep=names)
    output = OutputFolder(locate(tmp_path / "out"), NUM_ROWS, RESULTS, source.kept)
    rows = read(source)
    answers = pa.Table.from_pylist(
        [{"row": 0, "caption": "c"}, {"row": 1, "step": "read"}, {"row": 2, "caption": "c"}],
        schema=CAPTIONED,
    )
    output.write(answers.append_column("kept", rows["kept"]))
    output.finish_rows()
    wanted = pq.read_table(tmp_path / "t.parquet").select(names)
    captions, dead = (
        pq.read_table(tmp_path / "out" / name) for name in ("captions", "dead_letters")
    )
    for table, places in ((captions, [0, 2]), (dead, [1])):
        for name in names:
            assert table.schema.field(name).type == wanted.schema.field(name).type
            values = wanted[name].to_pylist()
            assert table[name].to_pylist() == [values[place] for place in places], name


def test_what_cannot_be_kept_is_refused_in_one_line(tmp_path: Path) -> None:
    column = pa.array([["x"], None, [None]], pa.list_view(pa.string()))
    for each in (column, pa.StructArray.from_arrays([column], ["x"])):
        file = write(tmp_path / "t.parquet", views=each)
        with pytest.raises(ConfigError, match="'views' of type .* cannot be kept") as error:
            find_source(str(file), keep=["views"])
        assert "\n" not in str(error.value)


def test_a_damaged_column_is_kept_as_null_although_it_says_that_it_is_never(tmp_path: Path) -> None:
    never_null = pa.field("n", pa.int64(), nullable=False)
    table = pa.table(
        {"image": [b"i"] * 9, "n": pa.array(range(9))},
        schema=pa.schema([("image", pa.binary()), never_null]),
    )
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "t.parquet").read_bytes()
    chunk = pq.read_metadata(tmp_path / "t.parquet").row_group(0).column(1)
    start = chunk.data_page_offset
    (tmp_path / "t.parquet").write_bytes(data[:start] + bytes(40) + data[start + 40 :])
    source = find_source(str(tmp_path / "t.parquet"), keep=["n"])
    rows = read(source)
    assert rows["kept"].to_pylist() == [{"n": None}] * 9
    output = OutputFolder(locate(tmp_path / "out"), 9, RESULTS, source.kept)
    answers = pa.Table.from_pylist(rows.select(["row", "step"]).to_pylist(), schema=CAPTIONED)
    output.write(answers.append_column("kept", rows["kept"]))
    output.finish_rows()
    assert output.num_dead == 9
