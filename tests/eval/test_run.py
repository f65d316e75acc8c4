"""An evaluation: every question answered once, marked by its rule, and resumed where it stopped."""

import io
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from flashvl.cli import app
from flashvl.data.features import ask_about_image
from flashvl.data.storage import locate
from flashvl.engine import Engine, Request
from flashvl.errors import ConfigError
from flashvl.eval.comparison import compare
from flashvl.eval.config import EvaluationJob
from flashvl.eval.job import VERDICTS, answer_questions, check_evaluation, mark_questions
from flashvl.eval.tasks.catalogue import TASKS
from tests.support.benchmarks import items_of, write_tsv
from tests.support.images import base64_of
from tests.support.jobs import Interrupted, picture

LETTERS = "ABCD"


def choice(index: int, answer: str, image: Any = None, **more: Any) -> dict[str, Any]:
    row = {
        "index": index,
        "question": f"What is it, number {index}?",
        "answer": answer,
        "image": base64_of(picture(index)) if image is None else image,
    }
    return row | dict(zip(LETTERS, ["a cat", "a dog", "a fish", "a bird"], strict=True)) | more


def write_data(folder: Path) -> Path:
    """Three benchmarks: rotations, images of other rows, two images, and rows that are broken."""
    folder.mkdir()
    circles = [
        choice(number + 1_000_000 * turn, LETTERS[turn], str(number) if turn else None, split="dev")
        for turn in range(3)
        for number in range(6)
    ]
    write_tsv(folder / "MMBench_DEV_EN.tsv", circles)
    rows = [choice(index, "A", category="x") for index in range(8)]
    rows[2]["image"] = base64_of(b"\xff\xd8" + b"not a picture" * 9)
    rows[3]["image"] = "no-such-row"
    rows[4]["image"] = None  # is left out
    rows[5]["answer"] = None  # is lost
    write_tsv(folder / "MMStar.tsv", rows)
    both = str([base64_of(picture(50)), base64_of(picture(51))])
    rows = [choice(0, "A", both, split="validation"), choice(1, "A", split="dev")]
    write_tsv(folder / "MMMU_DEV_VAL.tsv", rows)
    (folder / "notes.txt").write_text("not a benchmark")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("benchmarks") / "data")


def make_job(model: Path, data: Path, output: Path, **options: Any) -> EvaluationJob:
    values = {"dtype": "float32", "max_new_tokens": 4, "max_num_seqs": 8} | options
    return EvaluationJob(data=str(data), output=str(output), model=str(model), **values)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Answers and dead letters, in the order of the questions; each is there once."""
    names = ("answers", "dead_letters")
    found = [row for name in names for row in pq.read_table(folder / name).to_pylist()]
    assert len({row["row"] for row in found}) == len(found)
    return sorted(found, key=lambda row: row["row"])


@pytest.fixture(scope="module")
def finished(
    ray_cluster: None, tiny_random: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationJob:
    job = make_job(tiny_random, data, tmp_path_factory.mktemp("finished") / "out")
    plan = check_evaluation(job)
    answer_questions(plan)
    mark_questions(plan)
    return job


def test_every_question_is_answered_as_the_engine_answers_it(
    finished: EvaluationJob, data: Path, tiny_random: Path
) -> None:
    found = {row["id"]: row for row in rows_of(Path(finished.output))}
    assert len(found) == 18 + 7 + 1
    engine = Engine.from_pretrained(tiny_random, "float32")
    answers = {}
    for name in ("mmbench_en", "mmstar", "mmmu"):
        items, _ = items_of(TASKS[name], data / f"{TASKS[name].file}.tsv")
        for item in items:
            if item.images[0].startswith(b"\xff\xd8"):
                continue
            image = Image.open(io.BytesIO(item.images[0])).convert("RGB")
            request = Request(
                messages=ask_about_image(item.prompt), images=[image], max_new_tokens=4
            )
            answers[f"{name}/{item.id}"] = engine.generate([request])[0].text
    assert len(set(answers.values())) > len(answers) // 3
    assert {id: row["answer"] for id, row in found.items() if "answer" in row} == answers
    dead = {id: row["step"] for id, row in found.items() if "step" in row}
    assert dead == {"mmstar/2": "decode", "mmstar/3": "read", "mmstar/5": "read"}


def test_scores_count_what_failed_as_wrong_and_say_what_is_lost(finished: EvaluationJob) -> None:
    output = Path(finished.output)
    verdicts = pq.read_table(output / "verdicts.parquet")
    assert verdicts.schema.names == VERDICTS.names
    rows = verdicts.to_pylist()
    by_task = {name: [row for row in rows if row["task"] == name] for name in TASKS}
    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert list(scores) == ["mmmu", "mmbench_en", "mmstar"]  # as in the paper's tables
    mmstar = scores["mmstar"]
    assert (mmstar["items"], mmstar["num_lost"], mmstar["num_left_out"]) == (6, 1, 1)
    right = sum(row["mark"] for row in by_task["mmstar"])
    assert mmstar["figure"] == pytest.approx(100 * right / 6)
    failed = [row for row in by_task["mmstar"] if row["answer"] is None]
    assert [(row["id"], row["mark"]) for row in failed] == [("mmstar/2", 0), ("mmstar/3", 0)]
    for row in by_task["mmstar"]:
        if row["answer"] is not None:
            verdict = TASKS["mmstar"].verdict(json.loads(row["fields"]), row["answer"])
            assert (row["mark"], row["extracted"], row["by"]) == (
                verdict.mark,
                verdict.extracted,
                verdict.by,
            )
    assert all("no judge" in score["rule"] for score in scores.values())
    assert scores["mmmu"]["items"] == 1 and scores["mmbench_en"]["items"] == 18
    page = (output / "report.html").read_text()
    assert "no judge" in page and "MMBench (en)" in page
    assert page.count("data:image/jpeg;base64,") >= 6
    assert "What is it, number 7?" in page


def test_an_interrupted_evaluation_resumes(
    ray_cluster: None,
    finished: EvaluationJob,
    data: Path,
    tiny_random: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flashvl.data.ledger.tables.BYTES_PER_FILE", 100)
    job = make_job(tiny_random, data, tmp_path / "out")

    def interrupt(done: int, total: int, note: str = "") -> None:
        if done > 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        answer_questions(check_evaluation(job), interrupt)
    begun = rows_of(tmp_path / "out")
    assert 0 < len(begun) < 26
    plan = check_evaluation(job)
    assert not plan.is_answered()
    answer_questions(plan)
    assert plan.is_answered()
    assert rows_of(tmp_path / "out") == rows_of(Path(finished.output))
    mark_questions(plan)
    for name in ("verdicts.parquet", "scores.json"):
        mine, others = (Path(out.output) / name for out in (job, finished))
        assert mine.read_bytes() == others.read_bytes()
    with pytest.raises(ConfigError, match="max_new_tokens was 4 and is 5"):
        check_evaluation(job.model_copy(update={"max_new_tokens": 5}))


def test_a_finished_evaluation_is_only_marked_again(
    finished: EvaluationJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray is not needed")

    monkeypatch.setattr("flashvl.cli.evaluation.start_ray", fail)
    options = [finished.data, "--output", finished.output, "--model", finished.model]
    options += ["--dtype", "float32", "--max-new-tokens", "4", "--max-num-seqs", "8"]
    result = CliRunner().invoke(app, ["eval", "run", *options])
    assert result.exit_code == 0, result.output
    assert "MMStar" in result.stdout and "1 lost" in result.stdout and "no judge" in result.stdout
    told = json.loads(CliRunner().invoke(app, ["eval", "run", *options, "--json"]).stdout)
    assert told == json.loads((Path(finished.output) / "scores.json").read_text())
    monkeypatch.setattr("flashvl.eval.tasks.judge.PAUSES_S", ())
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "wise"]
    judge += ["--judge-replies", str(tmp_path / "replies")]
    result = CliRunner().invoke(app, ["eval", "run", *options, *judge])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: judge wise at http://127.0.0.1:9/v1 does not reply")
    assert len(result.stderr.strip().splitlines()) == 1


def test_two_evaluations_are_compared_question_by_question(
    finished: EvaluationJob, tmp_path: Path
) -> None:
    here = locate(finished.output)
    for each in compare(here, here):
        assert (each.second - each.first, each.low, each.high) == (0, 0, 0)
        assert "undecided" in str(each)
    result = CliRunner().invoke(app, ["eval", "compare", finished.output, finished.output])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 3
    result = CliRunner().invoke(app, ["eval", "compare", finished.output, str(tmp_path)])
    assert result.exit_code == 2 and "no verdicts.parquet" in result.stderr


def write_verdicts(folder: Path, rights: list[bool]) -> Path:
    folder.mkdir()
    rows = [
        {
            "row": number,
            "id": f"mmstar/{number}",
            "task": "mmstar",
            "question": "?",
            "reference": "A",
            "answer": "A",
            "mark": float(is_right),
            "extracted": "A",
            "by": "rule",
            "fields": json.dumps({"index": str(number)}),
        }
        for number, is_right in enumerate(rights)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=VERDICTS), folder / "verdicts.parquet")
    return folder


def test_pairs_show_what_two_intervals_hide(tmp_path: Path) -> None:
    """A model that is right wherever the other is, and on 20 further ones of 1000, is better, even
    though both intervals of 6 % overlap."""
    rights = [number % 2 == 0 for number in range(1000)]
    better = [is_right or number % 100 in (1, 3) for number, is_right in enumerate(rights)]
    first = write_verdicts(tmp_path / "first", rights)
    second = write_verdicts(tmp_path / "second", better)
    (found,) = compare(locate(str(first)), locate(str(second)))
    assert (found.first, found.second, found.items) == (50, 52, 1000)
    assert 0.9 < found.low < 2 < found.high < 3.2 and found.is_clear
    error = 100 * (0.02 * 0.98 / 1000) ** 0.5
    assert found.low == pytest.approx(2 - 1.96 * error, abs=0.2)
    assert "better" in str(found)
    (back,) = compare(locate(str(second)), locate(str(first)))
    assert "worse" in str(back) and back.high == pytest.approx(-found.low)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("mmstart",)}, "there is no benchmark 'mmstart'; name one of ai2d, dynamath"),
        ({"tasks": ("mme",)}, "lacks MME.tsv, the file of mme"),
    ],
)
def test_what_is_not_there_is_refused(
    data: Path, tiny_random: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_evaluation(make_job(tiny_random, data, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_benchmarks_and_half_a_judge_are_refused(
    data: Path, tiny_random: Path, tmp_path: Path
) -> None:
    (tmp_path / "some.txt").write_text("?")
    with pytest.raises(ConfigError, match="no benchmark's file; put one there, such as MMStar.tsv"):
        check_evaluation(make_job(tiny_random, tmp_path, tmp_path.parent / "out"))
    result = CliRunner().invoke(
        app, ["eval", "run", str(data), "--output", "out", "--judge-url", "http://x/v1"]
    )
    assert result.exit_code == 2 and "belong together; give both" in result.stderr


NUM_MANY = 2000


@pytest.fixture
def many(tmp_path: Path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    rows = [choice(index, LETTERS[index % 4]) for index in range(NUM_MANY)]
    write_tsv(folder / "MMStar.tsv", rows)
    return folder


@pytest.mark.slow
def test_two_thousand_questions_killed_five_times(
    starts_ray: None, many: Path, tiny_random: Path, tmp_path: Path
) -> None:
    options = ["--model", str(tiny_random), "--dtype", "float32", "--max-new-tokens", "4"]
    options += ["--max-num-seqs", "8"]

    def command(output: Path) -> list[str]:
        code = (
            "import flashvl.data.ledger.tables as o; o.BYTES_PER_FILE = 20_000;"
            "from flashvl.cli import main; main()"
        )
        line = [sys.executable, "-c", code, "eval", "run", str(many), "--output", str(output)]
        return [*line, *options]

    whole, output = tmp_path / "whole", tmp_path / "out"
    assert subprocess.run(command(whole)).returncode == 0
    rng = random.Random(0)
    num_kills = 0
    while True:
        process = subprocess.Popen(command(output), start_new_session=True)
        num_before = -1
        while num_kills < 5 and process.poll() is None:
            written = len(list((output / "answers").glob("part-*")))
            num_before = written if num_before < 0 else num_before
            if written > num_before:
                time.sleep(rng.uniform(0, 0.5))
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
                num_kills += 1
                break
            time.sleep(0.05)
        if process.wait(timeout=300) == 0:
            break
        time.sleep(1)
    assert num_kills == 5
    assert rows_of(output) == rows_of(whole) and len(rows_of(output)) == NUM_MANY
    assert (output / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
