"""Our scorers and VLMEvalKit's own agree on each of 200 random answers to every benchmark.

VLMEvalKit (`ms-vlmeval`) is installed into a folder of its own, and run in a process of its own.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from flashvl.eval.tasks.catalogue import TASKS
from flashvl.eval.tasks.score import figures_of
from flashvl.eval.tasks.task import JudgedTask, Marked, Task
from tests.support.benchmarks import encoded, items_of, mark_by_rule, write_tsv

pytestmark = pytest.mark.slow

NUM_ANSWERS = 200
HARNESS = ("ms-vlmeval==0.0.20", "sty", "tabulate", "timeout-decorator", "tqdm", "validators")
RED = encoded("red")
WORDS = ["a cat", "a catfish", "a dog", "the dog", "blue", "dark blue", "42 cm", "none of these"]
HAN = ["\u732b", "\u72d7", "\u9ed1\u732b", "\u7ea2\u8272", "\u84dd\u8272", "\u4e94\u4e2a"]
Row = dict[str, Any]


def answer_a_choice(rng: random.Random, row: Mapping[str, Any]) -> str:
    """An answer as models give them: letters, texts, both, several, none."""
    options = {key: str(row[key]) for key in "ABCDEFGHIJ" if row.get(key) is not None}
    if not options:
        options = {"A": str(row["answer"]), "B": "13"}
    (one, text), (other, more) = rng.choice([*options.items()]), rng.choice([*options.items()])
    return rng.choice(
        [
            one,
            f"{one}.",
            f"({one})",
            f"**{one}**",
            f"{one}: {text}",
            f"{one}) {text}",
            f"The answer is {one}.",
            f"The correct option is {one} because it is there and nothing else is",
            f"I think that it must be {text}",
            text,
            text.upper(),
            f"{text} or {more}",
            f"{one} or {other}",
            f"not {one}, but {other}",
            f"option-{one}",
            f"{one}\n{text}",
            f"\u7b54\u6848\u662f{one}",
            f"\u7b54\u6848\u662f {one} \u3002",
            f"{text}\u3002",
            "Z",
            "unclear",
            "it could be anything " * 9,
            f"It is a picture of {text}, " * 12,
            one.lower(),
            f"A picture: {one}",
        ]
    )


def answer_yes_or_no(rng: random.Random, row: Mapping[str, Any]) -> str:
    one, other = rng.choice([("yes", "no"), ("Yes", "No"), ("NO", "YES")])
    return rng.choice(
        [
            one,
            f"{one}.",
            f"{one}, there is.",
            f"{one},there is",
            f"{one}/{other}",
            f"**{one}**",
            f"Answer {one}",
            f"{one}!",
            f"{one}: it is",
            f"non-{one}",
            f"({one})",
            f"{one}-{other}",
            f"{one} - in all 1,000 cases",
            f"{one} not {other}",
            f'"{one}"',
            f"I say {one}; it is 3.5 m",
            "nothing known",
            "\u662f\u7684",
            f"{one}...",
            f"_{one}_",
        ]
    )


def choices(rng: random.Random, count: int, han: bool = False) -> Row:
    texts = rng.sample(HAN if han else WORDS, count)
    return dict(zip("ABCDEFGHIJ", texts, strict=False)) | {
        "answer": rng.choice("ABCDEFGHIJ"[:count])
    }


def plain_choice(rng: random.Random, index: int) -> Row:
    return {"category": rng.choice("xy"), **choices(rng, rng.choice([2, 4, 5]), index % 5 == 0)}


def mmmu(rng: random.Random, index: int) -> Row:
    row = {"category": rng.choice("xy"), "split": rng.choice(["dev", "validation", "validation"])}
    if index % 4 == 0:
        return row | {"A": None, "B": None, "answer": rng.choice(["12", "steel pipe", "B-52"])}
    return row | choices(rng, 4)


def circle(rng: random.Random, index: int) -> Row:
    """A rotation of question `index // 4`; its random numbers are those of the question."""
    number, turn = divmod(index, 4)
    base = choices(random.Random(number), 4, number % 3 == 0)
    texts = [base[letter] for letter in "ABCD"]
    right = texts["ABCD".index(base["answer"])]
    turned = texts[turn:] + texts[:turn]
    return {
        "index": number + 1_000_000 * turn,
        "category": "xyz"[number % 3],
        "l2-category": "uv"[number % 2],
        "split": "dev",
        **dict(zip("ABCD", turned, strict=True)),
        "answer": "ABCD"[turned.index(right)],
    }


def answer_a_circle(rng: random.Random, row: Mapping[str, Any]) -> str:
    """Mostly right, as a circle is else hardly ever."""
    if rng.random() < 0.8:
        return rng.choice([row["answer"], str(row[row["answer"]]), f"{row['answer']}."])
    return answer_a_choice(rng, row)


def mme(rng: random.Random, index: int) -> Row:
    categories = ["existence", "OCR", "code_reasoning", "text_translation"]
    category = categories[index // 2 % 4]
    image = f"{category}/{index // 2}.jpg"
    return {"category": category, "image_path": image, "answer": ["Yes", "No"][index % 2]}


def hallusionbench(rng: random.Random, index: int) -> Row:
    kind = ["chart", "map"][index % 2]
    numbers = f"{index // 40}_{index // 2 % 4}_{index // 8 % 5}"
    return {
        "index": f"hb_VS_{kind}_{numbers}",
        "category": "VS",
        "l2-category": kind,
        "answer": rng.choice(["Yes", "No"]),
    }


OCR_KINDS = ["Doc-oriented VQA", "Handwritten Mathematical Expression Recognition"]


def ocrbench(rng: random.Random, index: int) -> Row:
    texts = ["Main St", "12.5", "x ^ 2 + Y", "two\nlines", "\u5317\u4eac"]
    return {"category": rng.choice(OCR_KINDS), "answer": str(rng.sample(texts, 2))}


def answer_a_text(rng: random.Random, row: Mapping[str, Any]) -> str:
    text = rng.choice(["Main St", "main st.", "12.5", "x^2+Y", "x ^ 2 + y", "two\nLines", "12,5"])
    return rng.choice([text, f"It says {text}", f"{text}\n", text.upper(), "\u5728\u5317\u4eac"])


def mathvista(rng: random.Random, index: int) -> Row:
    row: Row = {"task": rng.choice("xy"), "skills": "['algebra']", "choices": "[]"}
    if index % 3 == 0:
        texts = rng.sample(WORDS, 4)
        letter = rng.choice("ABCD")
        row |= {"question_type": "multi_choice", "answer_type": "text", "choices": str(texts)}
        return row | {"answer_option": letter, "answer": texts["ABCD".index(letter)]}
    kind, answer = [("integer", "14"), ("float", "1.5")][index % 2]
    return row | {"question_type": "free_form", "answer_type": kind, "answer": answer}


def answer_mathvista(rng: random.Random, row: Mapping[str, Any]) -> str:
    if row["question_type"] == "multi_choice":
        texts = dict(zip("ABCD", json.loads(row["choices"].replace("'", '"')), strict=True))
        return answer_a_choice(rng, texts)
    return rng.choice(["14", "15", "1.5", "about fifteen", "1.50", "it is 2.5", "none"])


def mathvision(rng: random.Random, index: int) -> Row:
    if index % 2:
        return {"category": "x", "choices": str(list("12345")), "answer": rng.choice("ABCDE")}
    return {"category": "y", "choices": "[]", "answer": rng.choice(["7", "0.5", "\\frac{1}{2}"])}


def answer_mathvision(rng: random.Random, row: Mapping[str, Any]) -> str:
    if row["choices"] != "[]":
        return answer_a_choice(rng, dict(zip("ABCDE", "12345", strict=True)))
    return rng.choice(["7", "7.0", "8", "\\frac{1}{2}", "0.5", "1/2", "one half", "\\frac{2}{4}"])


def mathverse(rng: random.Random, index: int) -> Row:
    about = {"subject": rng.choice(["Plane", "Solid"]), "subfield": "Area", "source": "geo"}
    return {
        "problem_version": rng.choice(["Vision Only", "Text Lite"]),
        "question_for_eval": "How much?",
        "metadata": str(about),
        "answer": rng.choice(["A", "B", "2x"]),
    }


def answer_mathverse(rng: random.Random, row: Mapping[str, Any]) -> str:
    """What a judge would have copied out: VLMEvalKit asks one before it compares."""
    return rng.choice(["A", "B", "C", "2x", "3x", "0.5"])


def mmvet(rng: random.Random, index: int) -> Row:
    return {
        "category": rng.choice(["ocr,math", "rec", "rec,know,gen", "ocr,spat"]),
        "answer": "two",
    }


def dynamath(rng: random.Random, index: int) -> Row:
    kinds = [("float", "1.571"), ("multiple choice", "B"), ("text", "even function")]
    kind, answer = kinds[index % 3]
    return {
        "qid": index // 10,
        "varid": index % 10 + 1,
        "subject": "algebra",
        "knowledge_level": "school",
        "answer_type": kind,
        "answer": answer,
    }


def answer_dynamath(rng: random.Random, row: Mapping[str, Any]) -> str:
    short = rng.choice(
        ["1.571", "1.5714 m", "2", "b", "B", "C", "even", "Even Function", "0.5\u03c0"]
    )
    said = json.dumps({"solution": "see", "short answer": short})
    return rng.choice([short, said, f"So: {said}", f"It is {short}", "(B", "I do not know", "14"])


def wemath(rng: random.Random, index: int) -> Row:
    """Problems of two and three steps in turn: 28 rows are eight problems."""
    eight, place = divmod(index, 28)
    steps, place = (2, place) if place < 12 else (3, place - 12)
    number, part = divmod(place, steps + 1)
    key = f"{steps}steps_{'multi' if part == steps else part + 1}"
    return {"ID": 4 * eight + number, "key": key, **choices(rng, 4)}


MAKERS: dict[str, tuple[Callable[..., Row], Callable[..., str]]] = {
    "mmmu": (mmmu, answer_a_choice),
    "mmbench_en": (circle, answer_a_circle),
    "mmbench_cn": (circle, answer_a_circle),
    "mmstar": (plain_choice, answer_a_choice),
    "mathvista": (mathvista, answer_mathvista),
    "ai2d": (plain_choice, answer_a_choice),
    "mmvet": (mmvet, answer_a_text),
    "hallusionbench": (hallusionbench, answer_yes_or_no),
    "ocrbench": (ocrbench, answer_a_text),
    "mme": (mme, answer_yes_or_no),
    "seedbench": (plain_choice, answer_a_choice),
    "dynamath": (dynamath, answer_dynamath),
    "mathvision": (mathvision, answer_mathvision),
    "mathverse": (mathverse, answer_mathverse),
    "mmmu_pro": (plain_choice, answer_a_choice),
    "wemath": (wemath, answer_a_circle),
}
REPLIES: dict[str, list[str]] = {
    "mathvista": ["A", "D", "14", "15", "1.5", "1.50", "None"],
    # Not "A" or "B": VLMEvalKit finds "a" equal to any number, the name of a variable of its own.
    "mathvision": ["C", "D", "7", "8", "0.5", "1/2", "\\frac{1}{2}"],
    "mathverse": ["1", "0"],
    "mmvet": ["0.0", "0.4", "1.0", "1", "2", "good"],
    "dynamath": ["1.571", "1.6", "B", "c", "even", "odd", "unclear"],
    "hallusionbench": ["Yes", "No", "Unknown"],
    "mme": ["Yes", "No", "Unknown"],
    "mmmu": ["A", "B", "Z"],
}
LETTERS = ["A", "B", "Z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    for name, task in TASKS.items():
        rng = random.Random(name)
        make, answer = MAKERS[name]
        rows = []
        for index in range(NUM_ANSWERS // 28 * 28 if name == "wemath" else NUM_ANSWERS):
            row = {"index": index, "question": "What is it?", "image": RED} | make(rng, index)
            row["prediction"] = answer(rng, row)
            row["reply"] = rng.choice(REPLIES.get(name, LETTERS))
            rows.append(row)
        write_tsv(folder / f"{task.file}.tsv", rows)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What VLMEvalKit says, by the benchmarks' files."""
    place = tmp_path_factory.mktemp("harness")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    installed = subprocess.run([*command, str(place), *HARNESS], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"VLMEvalKit cannot be installed: {installed.stderr[-300:]}")
    script = Path(__file__).parents[2] / "support" / "vlmeval_scores.py"
    run = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env=os.environ | {"PYTHONPATH": str(place)},
        cwd=place,
        timeout=500,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def ours(task: Task, folder: Path) -> tuple[list[Marked], list[Marked]]:
    """What we say by the rule alone, and with the judge's replies."""
    items, dead = items_of(task, folder / f"{task.file}.tsv")
    assert not dead
    exact = mark_by_rule(task, items, [item.fields["prediction"] for item in items])
    judged = []
    for each in exact:
        verdict = each.verdict
        if verdict.by == "nobody":
            assert isinstance(task, JudgedTask)
            fields = each.fields
            verdict = task.judged(fields, fields["prediction"], fields["reply"])
        judged.append(Marked(fields=each.fields, verdict=verdict))
    return exact, judged


def marks(marked: list[Marked]) -> dict[str, float]:
    return {each.fields["index"]: float(each.verdict.mark) for each in marked}


def differences(mine: dict[str, float], other: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {
        index: (mark, float(other[index]))
        for index, mark in mine.items()
        if float(other[index]) != mark
    }


CIRCULAR = ["mmbench_en", "mmbench_cn"]
BY_RULE = [
    name
    for name in MAKERS
    if name
    in ("mmmu", "mmstar", "ai2d", "seedbench", "mmmu_pro", "hallusionbench", "mme", "ocrbench")
]
BY_JUDGE = [name for name in MAKERS if name not in (*CIRCULAR, "ocrbench")]


@pytest.mark.parametrize("name", BY_RULE)
def test_each_answer_is_marked_alike_by_the_rule(
    name: str, folder: Path, theirs: dict[str, Any]
) -> None:
    exact, _ = ours(TASKS[name], folder)
    assert not differences(marks(exact), theirs[TASKS[name].file]["exact"])
    assert 0 < sum(marks(exact).values()) < len(exact)


@pytest.mark.parametrize("name", BY_JUDGE)
def test_each_answer_is_marked_alike_with_a_judge(
    name: str, folder: Path, theirs: dict[str, Any]
) -> None:
    _, judged = ours(TASKS[name], folder)
    assert not differences(marks(judged), theirs[TASKS[name].file]["judge"])
    assert any(each.verdict.by == "judge" for each in judged)
    assert 0 < sum(marks(judged).values()) < len(judged)


def theirs_by_name(records: list[dict[str, Any]], key: str, value: str) -> dict[str, float]:
    return {record[key]: float(record[value]) for record in records}


@pytest.mark.parametrize("name", CIRCULAR)
def test_circles_are_counted_alike(name: str, folder: Path, theirs: dict[str, Any]) -> None:
    exact, _ = ours(TASKS[name], folder)
    (record,) = theirs[TASKS[name].file]["figures"]
    found = figures_of(TASKS[name], exact)
    assert 0 < found["circular"] < 100
    for mine, other in {"circular": "Overall", "x": "x", "y": "y", "z": "z", "u": "u"}.items():
        assert found[mine] == pytest.approx(100 * float(record[other]))


def test_the_figures_of_other_benchmarks_are_computed_alike(
    folder: Path, theirs: dict[str, Any]
) -> None:
    def figures(name: str, is_judged: bool = False) -> dict[str, float]:
        return figures_of(TASKS[name], ours(TASKS[name], folder)[is_judged])

    for name in ("mmmu", "mmstar", "ai2d", "seedbench", "mmmu_pro"):
        records = theirs[TASKS[name].file]["figures"]
        whole = next(each for each in records if each["split"] in ("none", "validation"))
        for mine, other in {"accuracy": "Overall", "x": "x", "y": "y"}.items():
            assert figures(name)[mine] == pytest.approx(100 * float(whole[other]))
    (whole,) = theirs["MME"]["figures"]
    for part in ("perception", "reasoning", "existence", "OCR", "code_reasoning"):
        assert figures("mme")[part] == pytest.approx(float(whole[part]))
    whole = theirs["HallusionBench"]["figures"][0]
    for part in ("aAcc", "fAcc", "qAcc"):
        assert figures("hallusionbench")[part] == pytest.approx(float(whole[part]))
    final = theirs["OCRBench"]["figures"][0]["Final Score"]
    assert figures("ocrbench")["score"] == pytest.approx(1000 * final / NUM_ANSWERS)
    found = theirs_by_name(theirs["MMVet"]["figures"], "Category", "acc")
    assert figures("mmvet", True)["mean"] == pytest.approx(found["Overall"])
    assert figures("mmvet", True)["ocr"] == pytest.approx(found["ocr"])
    found = theirs_by_name(theirs["MathVerse_MINI"]["figures"], "split", "Overall")
    for version, figure in found.items():
        assert figures("mathverse", True)[version] == pytest.approx(figure)
    (record,) = theirs["WeMath"]["figures"]
    # VLMEvalKit divides by the 525 problems of the whole benchmark.
    num_problems = NUM_ANSWERS // 28 * 8
    for mine, other in {"strict": "Score (Strict)", "loose": "Score (Loose)"}.items():
        lost = 525 * (1 - float(record[other]["0"].rstrip("%")) / 100)
        expected = 100 * (1 - lost / num_problems)
        assert figures("wemath", True)[mine] == pytest.approx(expected, abs=0.1)
