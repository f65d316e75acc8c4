"""A job whose input and output overlap is refused, whatever names they are given."""

import os
from pathlib import Path

import pytest

from flashvl.batch.config import CaptionJob
from flashvl.batch.job import run_caption_job
from flashvl.data.ledger.apart import check_apart
from flashvl.errors import ConfigError
from tests.support.jobs import picture


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "[x]").mkdir()
    (tmp_path / "in" / "a.parquet").touch()
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in", "in/out"),
        ("in", "in"),
        ("in", "in/deep/../out/deeper"),
        ("in", "nowhere/../in/out"),
        ("link", "in/out"),
        ("in", "link/out"),
        ("in/deep", "in"),
        ("in/a.parquet", "in"),
        ("in/a.parquet", "."),
        (".", "out"),
        ("[x]", "[x]/out"),
        ("in/**/*.parquet", "in/out"),
        ("link/**", "in/out"),
        ("in/*/*/*.parquet", "in/out"),
        ("*/*/*.parquet", "out"),
        ("in/*.parquet", "."),
        ("file://{here}/in", "in/out"),
        ("in", "file://{here}/in/out"),
        ("in/", "in//out/"),
    ],
)
def test_refuses_one_in_the_other(source: str, output: str) -> None:
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError, match=r" in the (input|output) .* name a") as error:
        check_apart(source.format(here=os.getcwd()), output.format(here=os.getcwd()), "captions")
    assert "\n" not in str(error.value)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("in", "out"),
        ("in", "in2"),
        ("in", "in/../out"),
        ("in/a.parquet", "in/out"),
        ("in/*.parquet", "in/out"),
        ("*.parquet", "out"),
        ("in/**/*.png", "in/out"),
        ("*/*.parquet", "out"),
    ],
)
def test_takes_what_the_next_run_would_not_find(source: str, output: str) -> None:
    check_apart(source, output, "captions")


def test_the_job_itself_refuses_it(tiny_random: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture(0))
    job = CaptionJob(input="photos", output="photos/out", model=str(tiny_random))
    with pytest.raises(ConfigError, match="lies in the input 'photos'"):
        run_caption_job(job)
    assert not (tmp_path / "photos" / "out").exists()
