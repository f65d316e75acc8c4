"""Captions with fields: `flashvl caption --json-schema FILE`."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashvl.batch.job import check_caption_job, run_caption_job
from flashvl.cli import main
from flashvl.data import synthetic
from flashvl.data.images import decode_image
from flashvl.engine import Engine, Request, StructuredOutputs
from flashvl.errors import ConfigError
from tests.support.images import encode
from tests.support.jobs import make_job, rows_of

SCHEMA = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "cross", "triangle"]},
        "words": {"type": "string", "maxLength": 8},
    },
    "required": ["shape", "words"],
    "additionalProperties": False,
}


def scenes(count: int) -> list[bytes]:
    return [encode(synthetic.sample("heldout", 0, number).image()) for number in range(count)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"image": [*scenes(6), b"no image"]}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


def test_every_caption_is_valid_and_the_engines(
    ray_cluster: None, table: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "max_error_rate": 0.5}
    job = make_job(Path("tiny"), table, tmp_path / "out", json_schema=json.dumps(SCHEMA), **options)
    run_caption_job(job)
    engine = Engine.from_pretrained("tiny", "float32")
    rows = rows_of(tmp_path / "out")
    assert rows[6]["step"] == "decode"
    for number, scene in enumerate(scenes(6)):
        (expected,) = engine.generate(
            [
                Request(
                    messages=[{"role": "user", "content": "<image>\nDescribe the image."}],
                    images=[decode_image(scene)],
                    max_new_tokens=60,
                    structured_outputs=StructuredOutputs(json=json.dumps(SCHEMA)),
                )
            ]
        )
        assert rows[number]["caption"] == expected.text
        assert rows[number]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(rows[number]["caption"]), SCHEMA)

    # With other white space the schema is the same; another schema, or none, is another job's.
    check_caption_job(job.model_copy(update={"json_schema": json.dumps(SCHEMA, indent=4)}))
    for other in (None, json.dumps(SCHEMA | {"required": []})):
        with pytest.raises(ConfigError, match="json_schema was"):
            check_caption_job(job.model_copy(update={"json_schema": other}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"nope", "json_schema cannot be used"),
        (b'{"type": "objekt"}', "objekt"),
        (b"false", "json_schema cannot be used"),
        (b"\xff\xfe", "UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_schema_that_will_not_do_is_refused_before_anything_starts(
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    text: bytes | None,
    said: str,
) -> None:
    file = tmp_path / "schema.json"
    if text is not None:
        file.write_bytes(text)
    line = ["flashvl", "caption", str(table), f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", [*line, f"--json-schema={file}"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told, told
    assert not (tmp_path / "out").exists()
