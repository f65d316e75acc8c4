"""Every kind of input other than Parquet: the captions are those of the plainest table."""

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import random
import ssl
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvl.batch.decoding import tile_images
from flashvl.batch.job import check_caption_job, run_caption_job
from flashvl.data import fetching, storage
from flashvl.data.inputs import jsonl
from flashvl.data.inputs.find import find_source
from flashvl.data.inputs.image_reader import ImageReader
from flashvl.data.inputs.listing import _expand, list_files
from flashvl.data.inputs.parquet import ParquetFiles
from flashvl.data.inputs.row_groups import PIECE, read_row_groups
from flashvl.data.inputs.source import Source
from flashvl.data.inputs.tar import TarFiles
from flashvl.data.ledger.apart import check_apart
from flashvl.data.limits import ImageLimits
from flashvl.data.storage import is_below, locate
from flashvl.errors import ConfigError
from tests.support.https import https_server
from tests.support.hub import REPO, hub_of
from tests.support.images import base64_of, data_url
from tests.support.jobs import (
    NUM_ROWS,
    PICTURES,
    captions_of,
    make_job,
    picture,
    rows_of,
    write_tar,
)

PROMPT = "Describe the image."


def read_all(source: Source, is_done: Any = None) -> dict[int, dict[str, Any]]:
    """The rows that Ray's tasks read, by number; each row comes once."""
    rows = source.read(np.zeros(source.num_rows, bool) if is_done is None else is_done).take_all()
    by_row = {row["row"]: row for row in rows}
    assert len(by_row) == len(rows)
    for row in rows:
        if "images" in row and row["step"] is None:
            (row["image"],) = ImageReader([row], ImageLimits(), source.store, ()).read(row)
    return by_row


def refused(text: object, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        find_source(str(text), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Paths


def test_a_local_path_is_written_in_many_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(PICTURES[0])
    (tmp_path / "c%20d.png").write_bytes(PICTURES[1])
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [str(file), "~/a b.png", f"file:{file}", f"file://{file}", f"file://localhost{file}"]
    ways += [f"FILE:{file}", file.as_uri(), f"file:{tmp_path}/a%20b.png"]
    for text in ways:
        (found,) = find_source(text).files
        assert found.path == str(file)
    assert locate(f"file://{tmp_path}/c%20d.png").path == str(tmp_path / "c%20d.png")
    assert locate("~/new").path == str(tmp_path / "new")
    assert "machine 'elsewhere'" in refused(f"file://elsewhere{file}")
    roots = [str(tmp_path)]
    assert all(is_below(text, roots) for text in ways)
    assert not is_below(f"file://{tmp_path}/%2e%2e/x", roots)
    assert not is_below(f"file://elsewhere{file}", roots)
    assert not is_below(f"{tmp_path}/{{x,.}}{{.,x}}/secret", roots)


def test_images_are_named_by_file_glob_and_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "day=1" / "deep"
    folder.mkdir(parents=True)
    for name in ("a1.png", "a2.PNG", "b1.jpg", ".a3.png", "notes.txt"):
        (folder / name).write_bytes(PICTURES[0])

    def names(pattern: str) -> list[str]:
        listing = list_files(f"{folder}/{pattern}")
        source = find_source(f"{folder}/{pattern}")
        return [listing.name(file) for file in source.files]

    assert names("a1.png") == ["a1.png"]
    assert names("*") == ["a1.png", "a2.PNG", "b1.jpg"]
    assert names("a*") == ["a1.png", "a2.PNG"]
    assert names(".a*") == [".a3.png"]
    assert names("a{1.png,2.PNG}") == ["a1.png", "a2.PNG"]
    assert names("{b,a}{1..1}.*") == ["a1.png", "b1.jpg"]
    assert names("../**/b*.jpg") == ["day=1/deep/b1.jpg"] or names("b*") == ["b1.jpg"]
    assert "a2.png does not exist" in refused(f"{folder}/a{{1..3}}.png")
    assert "notes.txt is not one" in refused(folder / "notes.txt")
    assert "does not exist" in refused(folder / "c*.png")


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 300), last=st.integers(0, 300), width=st.integers(1, 5))
def test_braces_count_as_in_the_shell(first: int, last: int, width: int) -> None:
    pattern = f"s-{{{first:0{width}d}..{last:0{width}d}}}.{{tar,tgz}}"
    shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True)
    assert list(_expand(pattern)) == shell.stdout.split()


def test_what_may_mean_two_things_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": PICTURES[:1]}), tmp_path / "0.parquet")
    write_tar(tmp_path / "0.tar", {"a.png": PICTURES[0]})
    assert "1 tars and 1 files of parquet" in refused(tmp_path)
    assert find_source(f"{tmp_path}/*.tar").num_rows == 1
    assert find_source(f"{tmp_path}/*.parquet").num_rows == 1
    (tmp_path / "0.tar").unlink()
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "a.jsonl").write_text('{"image": "a.png"}\n')
    assert find_source(str(tmp_path)).describe().startswith("Parquet")
    (tmp_path / "0.parquet").unlink()
    assert find_source(str(tmp_path)).describe().startswith("image files")


# Tars


def sample(row: int) -> dict[str, bytes]:
    """Write a tar as WebDataset does."""
    return {
        f"./{row:03d}.jpg": PICTURES[row],
        f"./{row:03d}.json": json.dumps({"url": f"http://x/{row}", "size": [row]}).encode(),
        f"./{row:03d}.txt": f"{PROMPT}\n".encode(),
    }


def samples(*rows: int) -> dict[str, bytes]:
    return {name: data for row in rows for name, data in sample(row).items()}


def test_tars_of_samples(plain: dict[int, str], tiny_random: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_tar(shards / "0.tar", samples(0, 1, 2))
    write_tar(shards / "1.tar.gz", samples(3, 4, 5), "w:gz")
    write_tar(shards / "2.tar", samples(6, 7), "w:xz")  # compression goes by content, not by name
    with tarfile.open(shards / "3.tar", "w") as tar:
        for name, data in {
            "a/8.left.PNG": PICTURES[8],  # two images of one key
            "a/8.right.png": PICTURES[9],
            "a/8.txt": b"Describe the image.",
            "a/._8.png": b"what macOS adds",
            "README": b"no sample",
            "b/10.webp": PICTURES[10],  # without a prompt
            "b/11.png": PICTURES[11],
            "b/11.txt": b"\xff",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (("b/12.png", "a/8.left.PNG"), ("b/13.png", "gone.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.LNKTYPE, target
            tar.addfile(link)
        prompt = tarfile.TarInfo("b/12.txt")
        prompt.size = len(PROMPT)
        tar.addfile(prompt, io.BytesIO(PROMPT.encode()))

    job = make_job(
        tiny_random,
        shards,
        tmp_path / "out",
        prompt_column="txt",
        keep=("json", "json.url", "json.size"),
    )
    plan = check_caption_job(job).describe()
    assert (plan["rows"], plan["files"]) == (14, 4)
    assert plan["columns"] == (
        "tars: images, id from the key, prompt from .txt, kept json, json.url, json.size"
    )
    run_caption_job(job)
    rows = rows_of(tmp_path / "out")
    assert {place: rows[place].get("caption") for place in range(10)} == {
        place: plain[place] for place in range(10)
    }
    assert rows[12]["caption"] == plain[8]
    assert [rows[place]["id"] for place in range(14)] == [
        *(f"{place:03d}" for place in range(8)),
        *("a/8.left.png", "a/8.right.png", "b/10", "b/11", "b/12", "b/13"),
    ]
    assert rows[5]["json.url"] == "http://x/5" and rows[5]["json.size"] == "[5]"
    assert json.loads(rows[5]["json"])["size"] == [5] and rows[8]["json"] is None
    assert rows[10]["reason"].startswith("prompt is null")
    assert "member .txt is not UTF-8" in rows[11]["reason"]
    assert "link to 'gone.png'" in rows[13]["reason"]


def test_tars_in_a_store_by_a_pattern(
    plain: dict[int, str], tiny_random: Path, s3: str, tmp_path: Path
) -> None:
    store, _ = pa.fs.FileSystem.from_uri(s3.format("x"))
    for number in range(3):
        write_tar(tmp_path / "shard.tar", samples(*range(4 * number, 4 * number + 4)))
        with store.open_output_stream(f"bucket/shards/{number:02d}.tar") as file:
            file.write((tmp_path / "shard.tar").read_bytes())
    with store.open_output_stream("bucket/lines/a.jsonl.gz", compression=None) as file:
        lines = [json.dumps({"image": f"../images/{row}.png"}) for row in range(NUM_ROWS)]
        file.write(gzip.compress("\n".join(lines).encode()))
    for row, data in enumerate(PICTURES):
        with store.open_output_stream(f"bucket/images/{row}.png") as file:
            file.write(data)
    run_caption_job(make_job(tiny_random, s3.format("shards/{00..02}.tar"), tmp_path / "out"))
    assert captions_of(tmp_path / "out") == plain
    run_caption_job(make_job(tiny_random, s3.format("lines"), tmp_path / "out2"))
    assert captions_of(tmp_path / "out2") == plain


def test_refuses_tars_that_are_none_and_columns_that_are_not_there(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    for data in (b"", b"hello" * 1000, b"\x28\xb5\x2f\xfd" + bytes(600)):
        path.write_bytes(data)
        assert "0.tar" in refused(path)
    write_tar(path, {"a.txt": b"a"})
    assert "no member of the 1 tars is an image" in refused(path)
    write_tar(path, sample(0))
    assert "has no column 'q'; columns: image" in refused(path, prompt_column="q")
    assert "json.url" in refused(path, keep=("json.ulr",))
    assert "no member" in refused(path, image_column="webp")
    assert find_source(str(path), image_column="jpg", id_column="json.url").num_rows == 1


_FILE = io.BytesIO()
with tarfile.open(fileobj=_FILE, mode="w") as _tar:
    for _name, _data in samples(*range(6)).items():
        _info = tarfile.TarInfo(_name)
        _info.size = len(_data)
        _tar.addfile(_info, io.BytesIO(_data))
WHOLE = _FILE.getvalue().rstrip(b"\0")
WHOLE += bytes(-len(WHOLE) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE)
COMPRESSORS: list[Callable[[bytes], bytes]] = [bytes, gzip.compress, bz2.compress, lzma.compress]


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_of_a_broken_tar_what_is_whole_is_read(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A tar cut short or with a bad header gives every row before the break, and a dead letter."""
    compress = data.draw(st.sampled_from(COMPRESSORS))
    if data.draw(st.booleans()):
        content = compress(WHOLE)
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        with tarfile.open(fileobj=io.BytesIO(WHOLE)) as tar:
            header = data.draw(st.sampled_from(tar.getmembers())).offset
        content = compress(WHOLE[:header] + b"garbage!" * 64 + WHOLE[header + 512 :])
    path = tmp_path_factory.mktemp("in") / "0.tar"
    path.write_bytes(content)
    try:
        source = find_source(str(path))
    except ConfigError as error:  # not even the first header is there
        assert "0.tar" in str(error)
        return
    rows = read_all(source)
    assert sorted(rows) == list(range(source.num_rows))
    broken = [row for row in rows.values() if row["step"] is not None]
    assert len(broken) <= 1 and all("0.tar is broken" in row["reason"] for row in broken)
    for place in range(source.num_rows - len(broken)):
        assert rows[place]["id"] == f"{place:03d}" and rows[place]["image"] == PICTURES[place]
    assert broken or source.num_rows == 6


@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_tars_and_lines_are_read_from_where_a_job_is(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("in")
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    kind = data.draw(st.sampled_from(["tar", "tar.gz", "jsonl", "jsonl.gz"]))
    starts = np.cumsum([0, *sizes])
    for number, size in enumerate(sizes):
        rows = range(starts[number], starts[number] + size)
        path = folder / f"{number}.{kind}"
        if kind.startswith("tar"):
            members = {f"{row:03d}.png": picture(row) for row in rows}
            write_tar(path, members, "w:gz" if kind.endswith("gz") else "w")
        else:
            text = "".join(
                json.dumps({"id": f"{row:03d}", "image": base64_of(picture(row))})
                + data.draw(st.sampled_from(["\n", "\r\n", "\n \n\n"]))
                for row in rows
            ).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    total = int(starts[-1])
    if total == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "ROWS_PER_PIECE", data.draw(st.integers(1, 4)))
        patch.setattr("flashvl.data.inputs.tar.ROWS_PER_TASK", data.draw(st.integers(1, 4)))
        source = find_source(str(folder))
        assert source.num_rows == total
        is_done = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), bool)
        is_done[data.draw(st.integers(0, total - 1))] = False
        rows_left = read_all(source, is_done)
    assert sorted(rows_left) == np.flatnonzero(~is_done).tolist()
    for place, row in rows_left.items():
        assert row["id"] == f"{place:03d}" and row["image"] == picture(place)


# JSON Lines


def test_lines_with_images_in_every_form(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    for row, data in enumerate(PICTURES):
        (tmp_path / "pictures" / f"{row} é.png").write_bytes(data)
    encoded = [base64_of(data) for data in PICTURES]
    file = tmp_path / "pictures" / "11 é.png"
    images: list[Any] = [
        "pictures/0 é.png",
        str(tmp_path / "pictures" / "1 é.png"),
        f"file://{tmp_path}/pictures/2 é.png",
        f"data:image/png;base64,{encoded[3]}",
        f"DATA:;base64,{base64.encodebytes(PICTURES[4]).decode()}",
        encoded[5],
        base64.urlsafe_b64encode(PICTURES[6]).decode().rstrip("="),
        {"bytes": encoded[7], "path": "lost.png"},
        {"bytes": None, "path": "pictures/8 é.png"},
        {"url": f"data:image/jpeg;base64,{encoded[9]}"},
        base64.encodebytes(PICTURES[10]).decode(),
        file.as_uri(),
    ]
    good = [
        {"name": f"n{row}", "pic": image, "q": PROMPT, "size": {"w": row}}
        for row, image in enumerate(images)
    ]
    bad = [
        '{"name": "a", "pic": ',
        "[1]",
        "1" * 5000,
        json.dumps({"name": "b", "pic": None, "q": PROMPT}),
        json.dumps({"name": "c", "pic": 3.5, "q": PROMPT}),
        json.dumps({"name": "d", "pic": "pictures/lost.png", "q": PROMPT}),
        json.dumps({"name": "e", "pic": "https://example.com/x.png?secret=1", "q": PROMPT}),
        json.dumps({"name": "f", "pic": "data:image/png;base64,%%%%", "q": PROMPT}),
        json.dumps({"pic": encoded[0], "q": PROMPT}),
        json.dumps({"name": "g", "pic": encoded[0], "q": None}),
        '{"name": "h", "pic": "\\ud800.png", "q": "why"}',
        '{"name": "i", "pic": "a\\u0000b.png", "q": "why"}',
        "[" * 100_000,
    ]
    text = "\ufeff" + "\n".join([*map(json.dumps, good), "", "  ", *bad])
    (tmp_path / "in.jsonl").write_bytes(text.encode() + b'\n{"name": "\xff"}')
    job = make_job(
        tiny_random,
        tmp_path / "in.jsonl",
        tmp_path / "out",
        image_column="pic",
        id_column="name",
        prompt_column="q",
        keep=("size", "q"),
        max_error_rate=1,
    )
    summary = run_caption_job(job)
    assert (summary.written, summary.dead) == (NUM_ROWS, len(bad) + 1)
    rows = rows_of(tmp_path / "out")
    assert {place: rows[place]["caption"] for place in range(NUM_ROWS)} == plain
    assert (rows[3]["id"], rows[3]["size"], rows[3]["q"]) == ("n3", '{"w": 3}', PROMPT)
    reasons = [rows[place]["reason"] for place in range(NUM_ROWS, NUM_ROWS + len(bad) + 1)]
    for reason, words in zip(
        reasons,
        [
            "not JSON",
            "not a JSON object",
            "no",
            "image is null",
            "type float",
            "lost.png",
            "--media-host",
            "not valid base64",
            "id is null",
            "prompt is null",
            "surrogate",
            "a\\x00b.png",
            "not JSON",
            "not UTF-8",
        ],
        strict=True,
    ):
        assert words in reason
    assert "secret" not in str(reasons)
    assert rows[NUM_ROWS]["id"] == "in.jsonl:12"


def test_refuses_what_is_not_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text('[\n{"image": "a.png"}\n]\n')
    assert "an array: `jq -c '.[]' FILE` makes lines of it" in refused(path)
    path.write_text('{\n"image": "a.png"\n}\n')
    assert "not hold JSON objects, one a line" in refused(path)
    path.write_text('{"img": "a.png", "n": 1}\n')
    assert "has no column 'image'; columns: img (string), n (string)" in refused(path)
    path.write_text('{"file_name": "a.png"}\n')
    assert find_source(str(path)).describe().startswith("JSON Lines: image from field file_name")
    path.write_text("")
    assert find_source(str(path)).num_rows == 0


def test_broken_files_whose_names_are_no_text_are_told_of(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    tar, lines = folder / os.fsdecode(b"\xfe.tar"), folder / os.fsdecode(b"\xfe.jsonl.gz")
    tar.write_bytes(WHOLE[:-3000])
    lines.write_bytes(gzip.compress(random.Random(0).randbytes(10**5))[:-9])
    source = find_source(str(tar))
    assert isinstance(source, TarFiles)
    assert "\ufffd.tar is broken" in source.tars[0].rows["problem"].to_pylist()[-1]
    (piece,) = source._pieces(np.arange(source.num_rows) < source.num_rows - 1)
    assert piece["id"].to_pylist() == ["\ufffd.tar"]
    problem = jsonl.count_lines(locate(lines), ImageLimits()).problem
    assert problem is not None and "\ufffd.jsonl.gz is broken" in problem
    problem.encode()


def test_a_line_longer_than_any_image_is_a_dead_letter_and_not_held(tmp_path: Path) -> None:
    limits = ImageLimits(max_image_bytes=1000)
    long = json.dumps({"image": "x" * 3_000_000})
    lines = [json.dumps({"image": "a.png"}), long, json.dumps({"image": "b.png"}), long]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines))
    counted = jsonl.count_lines(locate(path), limits)
    assert counted.num_rows == 4 and counted.offsets[-1] == path.stat().st_size
    with path.open("rb") as file:
        found = [line and len(line) for _, line in jsonl._read_lines(file, limits)]
    assert found == [len(lines[0]) + 1, None, len(lines[2]) + 1, None]


def test_of_broken_compressed_lines_what_is_whole_is_read(
    ray_cluster: None, tmp_path: Path
) -> None:
    lines = [json.dumps({"image": base64_of(data)}) for data in PICTURES]
    whole = gzip.compress("\n".join(lines).encode())
    (tmp_path / "0.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.jsonl.gz").write_bytes(whole)
    source = find_source(str(tmp_path))
    rows = read_all(source)
    assert sorted(rows) == list(range(source.num_rows))
    (broken,) = (place for place, row in rows.items() if row["step"] is not None)
    assert 0 < broken < NUM_ROWS and f"broken after line {broken}" in rows[broken]["reason"]
    images = [rows[place]["image"] for place in range(source.num_rows) if place != broken]
    assert images == [*PICTURES[:broken], *PICTURES]


# URLs


class Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/")
        if not name.isdigit():
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PICTURES[int(name)])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def pictures_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    is_public = fetching.is_public
    monkeypatch.setattr(
        fetching, "is_public", lambda address: address == "127.0.0.1" or is_public(address)
    )
    with https_server(Pictures, tmp_path) as (port, certificate):
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert str(certificate) in ssl.get_default_verify_paths().cafile  # type: ignore[operator]
        yield f"localhost:{port}"


def test_urls_of_rows_are_fetched_from_allowed_hosts_only(
    tiny_random: Path, pictures_host: str
) -> None:
    urls = [f"https://{pictures_host}/{row}?sig=x" for row in range(NUM_ROWS)]
    urls += [f"https://{pictures_host}/lost", f"http://{pictures_host}/1", "https://e.x/1"]
    rows = pa.table(
        {
            "id": [str(row) for row in range(len(urls))],
            "row": range(len(urls)),
            "image": pa.nulls(len(urls), pa.large_binary()),
            "path": [url.encode() for url in urls],
        }
    )
    step = {"model": str(tiny_random), "image_limits": ImageLimits(), "store": locate("/").store}
    tiled = tile_images(rows, **step, media_hosts=(pictures_host,))
    inline = rows.slice(0, NUM_ROWS).set_column(2, "image", pa.array(PICTURES, pa.large_binary()))
    inline = inline.set_column(3, "path", pa.nulls(NUM_ROWS, pa.binary()))
    assert tiled["tiles"].to_pylist()[:NUM_ROWS] == tile_images(inline, **step)["tiles"].to_pylist()
    reasons = tiled["reason"].to_pylist()
    assert reasons[:NUM_ROWS] == [None] * NUM_ROWS
    assert "status 404" in reasons[-3] and "must begin with https://" in reasons[-2]
    assert "host 'e.x'" in reasons[-1] and "--media-host HOST" in reasons[-1]
    reasons = tile_images(rows, **step)["reason"].to_pylist()
    assert all("--media-host HOST" in reason for reason in reasons)
    assert set(tiled["step"].to_pylist()[NUM_ROWS:]) == {"read"}


def test_data_urls_in_a_column_of_paths_are_pictures(tiny_random: Path, tmp_path: Path) -> None:
    urls = [data_url(data) for data in PICTURES[:2]]
    pq.write_table(pa.table({"image": [*urls, "data:image/png;base64,*"]}), tmp_path / "a.parquet")
    source = find_source(str(tmp_path))
    assert isinstance(source, ParquetFiles)
    pieces = pa.Table.from_pylist(list(source._pieces(np.zeros(3, bool))), schema=PIECE)
    (rows,) = read_row_groups(
        pieces, store=source.store, columns=source.columns, schema=source.tables[0].schema
    )
    step = {"model": str(tiny_random), "image_limits": ImageLimits(), "store": source.store}
    assert [reason is None for reason in tile_images(rows, **step)["reason"].to_pylist()] == [
        *(True, True, False),
    ]


URL_JOB = """
import json, os, subprocess, sys
from pathlib import Path
from tests.support.jobs import NUM_ROWS
from tests.batch.test_kinds import Pictures
from tests.support.https import https_server

folder, model, address = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
with https_server(Pictures, folder, address) as (port, certificate):
    host = f"{address}:{port}"
    urls = [f"https://{host}/{row}" for row in range(NUM_ROWS)]
    urls += [f"https://{host}/lost", f"https://127.0.0.1:{port}/1", "https://example.com/1"]
    (folder / "in.jsonl").write_text("\\n".join(json.dumps({"image": url}) for url in urls))
    command = [sys.executable, "-m", "flashvl", "caption", str(folder / "in.jsonl")]
    command += ["--output", str(folder / "out"), "--model", model, "--dtype", "float32"]
    command += ["--max-new-tokens", "4", "--max-num-seqs", "8"]
    command += ["--media-host", host, "--media-host", f"127.0.0.1:{port}"]
    environment = {**os.environ, "SSL_CERT_FILE": str(certificate)}
    sys.exit(subprocess.run(command, env=environment).returncode)
"""


@pytest.mark.slow
def test_the_command_fetches_urls_from_a_public_address(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path
) -> None:
    """Run in a network of its own, where a public address is this machine's."""
    address = "93.184.216.34"
    shell = (
        f"ip link set lo up && ip addr add {address}/32 dev lo || exit 77;"
        f' exec {sys.executable} -c "$0" {tmp_path} {tiny_random} {address}'
    )
    made = subprocess.run(
        ["unshare", "-rn", "sh", "-c", shell, URL_JOB], capture_output=True, text=True
    )
    if "unshare" in made.stderr or made.returncode == 77:
        pytest.skip("no right to make a network")
    assert made.returncode == 0, made.stderr
    rows = rows_of(tmp_path / "out")
    assert {place: rows[place].get("caption") for place in range(NUM_ROWS)} == plain
    reasons = [rows[place]["reason"] for place in range(NUM_ROWS, NUM_ROWS + 3)]
    for reason, words in zip(
        reasons, ["status 404", "at a public address", "host 'example.com'"], strict=True
    ):
        assert words in reason


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of a dataset on a hub that runs on this machine."""
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    half = NUM_ROWS // 2
    pq.write_table(pa.table({"image": PICTURES[:half]}), folder / "data" / "0.parquet")
    pq.write_table(pa.table({"image": PICTURES[half:]}), folder / "data" / "1.parquet")
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "0.tar", samples(0, 1, 2))
    with hub_of(folder) as endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        HfFileSystem.clear_instance_cache()
        storage._open_store.cache_clear()
        yield folder
    HfFileSystem.clear_instance_cache()
    storage._open_store.cache_clear()


def test_an_input_on_the_hub_is_listed_and_told_by_its_content(hub: Path) -> None:
    repo = f"hf://datasets/{REPO}"
    source = find_source(f"{repo}/data")
    assert source.num_rows == NUM_ROWS
    assert [file.path for file in source.files] == [
        f"datasets/{REPO}/data/{n}.parquet" for n in (0, 1)
    ]
    stamps = [file.stamp for file in source.files]
    assert len(set(stamps)) == 2 and "None" not in stamps
    assert find_source(f"{repo}/data/1.parquet").num_rows == NUM_ROWS // 2
    assert find_source(f"{repo}@main/data/*.parquet").num_rows == NUM_ROWS
    tars = find_source(f"{repo}/shards/{{0..0}}.tar", prompt_column="txt")
    assert isinstance(tars, TarFiles) and tars.tars[0].rows["id"].to_pylist() == [
        *("000", "001", "002"),
    ]
    assert "does not exist" in refused(f"{repo}/lost")
    assert "does not exist" in refused("hf://datasets/no/repo")
    assert "cannot be reached" in refused("hf://x")


def test_a_hub_that_does_not_answer_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    HfFileSystem.clear_instance_cache()
    storage._open_store.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("hf://datasets/a/b")
    check_apart("hf://datasets/a/b", "out", "captions")


@pytest.mark.slow
def test_the_command_captions_from_the_hub(
    plain: dict[int, str], tiny_random: Path, tmp_path: Path, hub: Path
) -> None:
    command = [sys.executable, "-m", "flashvl", "caption", f"hf://datasets/{REPO}/data"]
    command += ["--output", str(tmp_path / "out"), "--model", str(tiny_random)]
    command += ["--dtype", "float32", "--max-new-tokens", "4", "--max-num-seqs", "8"]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert captions_of(tmp_path / "out") == plain
