"""Other people's harnesses score `tiny`, over HTTP and in their own process, as we do.

Each is installed into an environment of its own, which takes minutes and gigabytes; a folder named
by FLASHVL_TEST_ENVIRONMENTS keeps them.
"""

import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from flashvl.data.features import ask_about_image
from flashvl.engine import Engine, Request
from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.score import figures_of
from flashvl.eval.tasks.task import Item, Marked, group_by
from tests.support.benchmarks import items_of, mark_by_rule
from tests.support.images import data_url
from tests.support.serving import serving
from tests.support.world_benchmarks import (
    write_dataset,
    write_letters,
    write_mmbench,
    write_ocrbench,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "support" / "run_harness.py"
TORCH = "torch==2.13.0"
GRAMMARS = "llguidance>=1.9"  # what flashvl needs, and the harnesses do not
MAX_TOKENS = 48
NUM_RETRIES = 2
FILES = {"ocrbench": "OCRBench_MINI", "mmbench_en": "MMBench_V11_MINI"}
"""Names under which VLMEvalKit takes a file for its own, without comparing its hash."""


@pytest.fixture(scope="module")
def vlmevalkit(make_environment: Callable[..., Path]) -> Path:
    return make_environment("ms-vlmeval==0.0.20", TORCH, GRAMMARS)


@pytest.fixture(scope="module")
def evalscope(make_environment: Callable[..., Path]) -> Path:
    return make_environment("evalscope==1.14.1")


@pytest.fixture(scope="module")
def lmms_eval(make_environment: Callable[..., Path]) -> Path:
    # lmms-eval imports a module that filelock no longer has.
    return make_environment("lmms-eval==0.7.3", TORCH, GRAMMARS, "filelock<4")


@pytest.fixture(scope="module")
def url(starts_ray: None) -> Iterator[str]:
    with serving("--dtype=float32") as service:
        yield f"{service.url}/v1"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("tiny", "float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("LMUData")
    write_ocrbench(folder / f"{FILES['ocrbench']}.tsv", 48)
    write_mmbench(folder / f"{FILES['mmbench_en']}.tsv", 24)
    write_letters(folder / "letters.tsv", 12)
    return folder


def run(place: Path, *line: str | Path, **environment: str) -> str:
    """What a command says that a user would run, in the folder `place`."""
    allowed = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        line,
        env=allowed | {"HF_HOME": str(place / "hub"), "HF_HUB_OFFLINE": "1"} | environment,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def questions(name: str, data: Path, file: str | None = None) -> list[Item]:
    items, dead = items_of(TASKS[name], data / f"{file or FILES[name]}.tsv")
    assert not dead
    return items


def ask(engine: Engine, items: list[Item], prompts: list[str]) -> list[str]:
    """The engine's answers to these prompts about the items' pictures."""
    requests = []
    for item, prompt in zip(items, prompts, strict=True):
        image = Image.open(io.BytesIO(item.images[0])).convert("RGB")
        messages = ask_about_image(prompt)
        requests.append(Request(messages=messages, images=[image], max_new_tokens=MAX_TOKENS))
    return [completion.text for completion in engine.generate(requests)]


def read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)


def run_vlmevalkit(
    python: Path, place: Path, data: Path, module: str | Path, *options: str, **environment: str
) -> str:
    """VLMEvalKit on both files; its results are in `place/out/MODEL`."""
    line = [python, RUN, module, "--data", *FILES.values(), "--judge", "exact_matching"]
    forms = {"LMUData": str(data), "PRED_FORMAT": "tsv", "EVAL_FORMAT": "csv"}
    return run(place, *line, "--work-dir", "out", *options, **forms, **environment)


OCRBENCH_ROW_BY_ROW = """
import json, sys
import pandas as pd
from vlmeval.dataset import OCRBench

table = pd.read_csv(sys.argv[1], sep="\\t", dtype=str, keep_default_na=False)
marks = {}
for number in range(len(table)):
    row = table.iloc[[number]]
    row.to_csv("row.tsv", sep="\\t", index=False)
    marks[row["index"].item()] = OCRBench.evaluate("row.tsv")["Final Score"]
print(json.dumps(marks))
"""


def check_vlmevalkit(python: Path, place: Path, data: Path, model: str) -> dict[str, list[str]]:
    """Compare VLMEvalKit's verdicts on the answers that it got with ours on the same answers.

    Returns:
        The answers of each benchmark, in the order of the questions.
    """
    answers = {}
    marked: dict[str, list[Marked]] = {}
    for name, file in FILES.items():
        table = read_table(place / "out" / model / f"{model}_{file}.tsv")
        found = dict(zip(table["index"], table["prediction"], strict=True))
        items = questions(name, data)
        answers[name] = [found[item.fields["index"]] for item in items]
        marked[name] = mark_by_rule(TASKS[name], items, answers[name])
        assert 0 < sum(each.is_right for each in marked[name]) < len(items)
    # OCRBench: VLMEvalKit only writes sums, so its scorer is asked for each row.
    script = place / "rows.py"
    script.write_text(OCRBENCH_ROW_BY_ROW)
    told = run(
        place,
        *(python, RUN, script, place / "out" / model / f"{model}_{FILES['ocrbench']}.tsv"),
        PRED_FORMAT="tsv",
    )
    theirs = json.loads(told.splitlines()[-1])
    ours = {each.fields["index"]: each.verdict.mark for each in marked["ocrbench"]}
    assert ours == theirs
    file = place / "out" / model / f"{model}_{FILES['ocrbench']}_score.json"
    score = json.loads(file.read_text())
    assert score["Final Score"] == sum(ours.values())
    # MMBench: a question counts if all its rotations are answered right.
    file = place / "out" / model / f"{model}_{FILES['mmbench_en']}_exact_matching_result.tsv"
    table = read_table(file)
    circles = group_by(marked["mmbench_en"], TASKS["mmbench_en"].unit)
    rights = {index: all(each.is_right for each in circle) for index, circle in circles.items()}
    assert rights == {row["index"]: row["hit"] == "1" for _, row in table.iterrows()}
    assert 0 < sum(rights.values()) < len(rights)
    figures = pd.read_csv(place / "out" / model / f"{model}_{FILES['mmbench_en']}_acc.csv")
    circular = figures_of(TASKS["mmbench_en"], marked["mmbench_en"])["circular"]
    assert circular == pytest.approx(100 * figures["Overall"].item())
    return answers


def test_vlmevalkit_scores_the_service(
    vlmevalkit: Path, url: str, data: Path, tmp_path: Path
) -> None:
    options = ["--model", "tiny", "--base-url", url, "--max-tokens", str(MAX_TOKENS)]
    options += ["--temperature", "0", "--retry", str(NUM_RETRIES), "--api-nproc", "16", "--verbose"]
    said = run_vlmevalkit(vlmevalkit, tmp_path, data, "vlmeval", *options)
    answers = check_vlmevalkit(vlmevalkit, tmp_path, data, "tiny")
    # VLMEvalKit takes an empty answer for a failure, and asks again; the service refused nothing.
    failed = [text for texts in answers.values() for text in texts if text.startswith("Failed to")]
    tries = re.findall(r"RetCode: (.*)\nAnswer: (.*)", said)
    assert failed and tries == [("0", "")] * (NUM_RETRIES * len(failed))


IN_PROCESS = """
from vlmeval.run import main
from flashvl.eval.adapters.vlmevalkit import register

register("flashvl", model="tiny", dtype="float32", max_new_tokens={max_tokens})
main()
"""


def test_vlmevalkit_runs_the_model_in_its_own_process(
    vlmevalkit: Path, data: Path, engine: Engine, tmp_path: Path
) -> None:
    """With Flash-VL's prompts, so that its answers are those of `flashvl eval run`."""
    script = tmp_path / "evaluate.py"
    script.write_text(IN_PROCESS.format(max_tokens=MAX_TOKENS))
    options = ("--model", "flashvl", "--api-nproc", "16")
    run_vlmevalkit(vlmevalkit, tmp_path, data, script, *options, PYTHONPATH=str(ROOT))
    answers = check_vlmevalkit(vlmevalkit, tmp_path, data, "flashvl")
    for name in FILES:
        items = questions(name, data)
        assert answers[name] == ask(engine, items, [item.prompt for item in items])


def run_evalscope(
    python: Path, url: str, datasets: Mapping[str, Any], place: Path
) -> dict[str, list[dict[str, Any]]]:
    """EvalScope's reviews of each benchmark's answers."""
    line = [python.with_name("evalscope"), "eval", "--model", "tiny", "--api-url", url]
    line += ["--api-key", "any", "--eval-type", "openai_api", "--eval-batch-size", "16"]
    line += ["--datasets", *datasets, "--dataset-args", json.dumps(datasets)]
    limits = {"max_tokens": MAX_TOKENS, "temperature": 0}
    line += ["--generation-config", json.dumps(limits), "--work-dir", "out", "--no-timestamp"]
    run(place, *line)
    found = {}
    for name in datasets:
        files = (place / "out" / "reviews" / "tiny").glob(f"{name}_*.jsonl")
        found[name] = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return found


def test_evalscope_scores_the_service(
    evalscope: Path, url: str, data: Path, engine: Engine, tmp_path: Path
) -> None:
    ocrbench = write_dataset("ocrbench", data / f"{FILES['ocrbench']}.tsv", tmp_path / "ocrbench")
    letters = write_dataset("mmbench_en", data / "letters.tsv", tmp_path / "letters")
    only_the_question = {"subset_list": ["en"], "prompt_template": "{question}"}
    datasets = {
        "ocr_bench": {"dataset_id": str(ocrbench)},
        "mm_bench": {"dataset_id": str(letters)} | only_the_question,
    }
    reviews = run_evalscope(evalscope, url, datasets, tmp_path)

    items = questions("ocrbench", data)
    answers = ask(engine, items, [item.fields["question"] for item in items])
    marked = mark_by_rule(TASKS["ocrbench"], items, answers)
    assert 0 < sum(each.is_right for each in marked) < len(items)
    ours = {
        data_url(item.images[0], "image/jpeg"): (answer, each.verdict.mark)
        for item, answer, each in zip(items, answers, marked, strict=True)
    }
    theirs = {}
    for review in reviews["ocr_bench"]:
        (image,) = (part["image"] for part in review["messages"][0]["content"] if "image" in part)
        score = review["sample_score"]["score"]
        theirs[image] = (score["prediction"], score["value"]["acc"])
    assert ours == theirs

    # MMBench: EvalScope does not count circles, and takes an answer's last capital letter for its
    # option; so the verdicts are ours where an answer's capitals stand alone.
    cells = {item.fields["index"]: item.fields for item in questions("mmbench_en", data, "letters")}
    assert len(reviews["mm_bench"]) == len(cells) == 48
    rights = []
    for review in reviews["mm_bench"]:
        score = review["sample_score"]["score"]
        fields = cells[review["sample_score"]["sample_metadata"]["index"]]
        answer, mark = score["prediction"], score["value"]["accuracy"]
        if re.search("[A-Z]{2}", answer):
            letter = re.findall("[A-Z]", answer)[-1]
            assert mark == (letter == fields["answer"])
        else:
            assert mark == TASKS["mmbench_en"].verdict(fields, answer).mark
            rights.append(mark)
    assert 0 < sum(rights) < len(rights) and len(rights) > len(cells) / 3


def test_lmms_eval_runs_the_model_in_its_own_process(
    lmms_eval: Path, data: Path, engine: Engine, tmp_path: Path
) -> None:
    """Its model `flashvl` is an entry point of the installed package."""
    source = tmp_path / "source"  # pip builds where it reads
    shutil.copytree(ROOT / "flashvl", source / "flashvl")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [lmms_eval, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run(tmp_path, *pip, "--target", tmp_path / "installed", source)
    (tasks,) = lmms_eval.parents[1].glob("lib/*/site-packages/lmms_eval/tasks")
    dataset = write_dataset("ocrbench", data / f"{FILES['ocrbench']}.tsv", tmp_path / "ocrbench")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "world.yaml").write_text(
        f"include: {tasks}/ocrbench/ocrbench.yaml\ntask: world\ndataset_path: {dataset}\n"
        "dataset_kwargs: {}\n"
    )
    line = [lmms_eval, RUN, "lmms_eval", "--model", "flashvl", "--batch_size", "16"]
    line += ["--model_args", "model=tiny,dtype=float32", "--tasks", "world"]
    line += ["--include_path", "tasks", "--log_samples", "--output_path", "out"]
    run(tmp_path, *line, PYTHONPATH=str(tmp_path / "installed"))
    (samples,) = (tmp_path / "out").rglob("*_samples_world.jsonl")
    told = {each["doc_id"]: each for each in map(json.loads, samples.read_text().splitlines())}

    items = questions("ocrbench", data)
    answers = ask(engine, items, [item.fields["question"] for item in items])
    marked = mark_by_rule(TASKS["ocrbench"], items, answers)
    assert [told[item.row]["filtered_resps"] for item in items] == answers
    theirs = [told[item.row]["ocrbench_accuracy"]["score"] for item in items]
    assert theirs == [each.verdict.mark for each in marked]
    assert 0 < sum(theirs) < len(theirs)
