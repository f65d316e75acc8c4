"""Each benchmark on a small file in its own layout, against figures computed by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from flashvl.errors import DataError
from flashvl.eval.tasks.catalogue import GENERAL, REASONING, TASKS
from flashvl.eval.tasks.multiple_choice import MultipleChoice
from flashvl.eval.tasks.score import Score, score
from flashvl.eval.tasks.task import DeadLetter, Item, JudgedTask, Task
from tests.support.benchmarks import encoded, items_of, mark_by_rule, picture, write_tsv

RED = encoded("red")
HALF = 50.0


def evaluate(
    name: str, folder: Path, rows: Sequence[Mapping[str, object]], answers: Sequence[str | None]
) -> tuple[Score, list[Item], list[DeadLetter]]:
    """The rule's score of the answers to the rows that can be asked."""
    task = TASKS[name]
    items, dead = items_of(task, write_tsv(folder / f"{task.file}.tsv", rows))
    marked = mark_by_rule(task, items, answers)
    left_out = sum(letter.is_left_out for letter in dead)
    found = score(task, marked, num_lost=len(dead) - left_out, num_left_out=left_out, judge=None)
    return found, items, dead


def approx(**figures: float) -> dict[str, float]:
    return {name: pytest.approx(value) for name, value in figures.items()}


def test_there_are_sixteen_benchmarks() -> None:
    assert len(GENERAL) == 11 and len(REASONING) == 5 and len(TASKS) == 16
    assert len({task.file for task in TASKS.values()}) == 16


def choice(index: int, answer: str, **more: object) -> dict[str, object]:
    options = {"A": "a cat", "B": "a dog", "C": "a fish", "D": "a bird"}
    return {"index": index, "question": "What is it?", "image": RED, "answer": answer} | (
        options | more
    )


@pytest.mark.parametrize("name", ["mmstar", "ai2d", "seedbench", "mmmu_pro"])
def test_plain_multiple_choice(name: str, tmp_path: Path) -> None:
    rows = [
        choice(0, "B", category="animals"),
        choice(1, "A", category="animals", C=None, D=None, hint="Look closely."),
        choice(2, "D", category="birds", image=None),
        choice(3, "C", category="birds", image=str([RED, encoded("blue")])),
        choice(4, "C", category="birds", image="0"),
        choice(5, "C", category="birds", image="no-such"),
    ]
    found, items, dead = evaluate(name, tmp_path, rows, ["B.", "It is a dog", "", "a fish"])
    assert found.figure == HALF
    assert found.figures == {"accuracy": HALF, "animals": HALF, "birds": HALF}
    assert (found.items, found.num_undecided, found.num_judged) == (4, 1, 0)
    assert (found.num_left_out, found.num_lost) == (1, 1)
    assert [(letter.id, letter.step) for letter in dead] == [("2", "read"), ("5", "read")]
    assert items[2].images == [picture("red"), picture("blue")]
    assert items[3].images == [picture("red")]
    assert items[0].prompt == (
        "What is it?\nA. a cat\nB. a dog\nC. a fish\nD. a bird\nAnswer with the option's letter"
        " from the given choices directly."
    )
    assert items[1].prompt == (
        "Look closely.\nWhat is it?\nA. a cat\nB. a dog\nAnswer with the option's letter from the"
        " given choices directly."
    )


def test_mmmu(tmp_path: Path) -> None:
    rows = [
        choice(0, "B", split="validation", category="Art", question="<image 1> or <image 2>?"),
        choice(1, "B", split="dev", category="Art"),
        choice(2, "12", split="validation", category="Math", A=None, B=None, C=None, D=None),
        choice(3, "12", split="validation", category="Math", A=None, B=None, C=None, D=None),
        choice(4, "C", split="validation", category="Math"),
    ]
    rows[0]["image"] = str([RED, encoded("blue")])
    found, items, _ = evaluate("mmmu", tmp_path, rows, ["B", "It is 12.", "13", None])
    assert [item.id for item in items] == ["0", "2", "3", "4"]
    assert found.figures == approx(accuracy=50, Art=100, Math=100 / 3)
    assert items[0].prompt.startswith("<image 1> or <image 2>?\nA. a cat")
    assert len(items[0].images) == 2
    assert items[1].prompt == "What is it?\nAnswer the question directly."


@pytest.mark.parametrize(("name", "is_chinese"), [("mmbench_en", False), ("mmbench_cn", True)])
def test_mmbench_counts_whole_circles(name: str, is_chinese: bool, tmp_path: Path) -> None:
    texts = ["a cat", "a dog", "a fish"]
    question = "What is it?"
    if is_chinese:
        texts = ["\u732b", "\u72d7", "\u9c7c"]
        question = "\u8fd9\u662f\u4ec0\u4e48\uff1f"
    rows, answers = [], []
    for number, (right, category) in enumerate([(0, "x"), (1, "x"), (2, "y")]):
        for turn in range(3):
            turned = texts[turn:] + texts[:turn]
            rows.append(
                {
                    "index": number + 1_000_000 * turn,
                    "question": question,
                    "hint": None,
                    **dict(zip("ABC", turned, strict=True)),
                    "answer": "ABC"[turned.index(texts[right])],
                    "category": category,
                    "l2-category": "seeing",
                    "image": RED if turn == 0 else str(number),
                    "split": "dev",
                }
            )
            answers.append(texts[right])  # always right, in words
    answers[4] = "A"  # in one turn of the second question; the right letter is C there
    assert rows[4]["answer"] == "A"
    answers[4] = "C"
    answers[8] = ""  # in one turn of the third
    found, items, _ = evaluate(name, tmp_path, rows, answers)
    assert found.figures == approx(
        **{"circular": 100 / 3, "single": 100 * 7 / 9, "x": 50, "y": 0, "seeing": 100 / 3}
    )
    assert found.figure == pytest.approx(100 / 3)
    assert all(item.images == [picture("red")] for item in items)
    ending = "\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
    if is_chinese:
        assert items[1].prompt == f"{question}\nA. \u72d7\nB. \u9c7c\nC. \u732b\n{ending}"
    else:
        assert ending not in items[1].prompt


def test_mme_adds_two_accuracies_of_each_category(tmp_path: Path) -> None:
    def row(index: int, category: str, image: str, answer: str) -> dict[str, object]:
        return {
            "index": index,
            "question": "Is there a dog?",
            "category": category,
            "image_path": f"{category}/{image}",
            "image": RED,
            "answer": answer,
        }

    rows = [
        row(0, "existence", "1.jpg", "Yes"),
        row(1, "existence", "1.jpg", "No"),
        row(2, "existence", "2.jpg", "Yes"),
        row(3, "existence", "2.jpg", "No"),
        row(4, "code_reasoning", "1.jpg", "Yes"),
        row(5, "code_reasoning", "1.jpg", "No"),
    ]
    answers = ["Yes", "No, there is none.", "yes", "Maybe", None, "no"]
    found, items, _ = evaluate("mme", tmp_path, rows, answers)
    assert found.figures == approx(
        total=175, perception=125, reasoning=50, existence=75 + 50, code_reasoning=50
    )
    assert found.figure == 175 and found.num_undecided == 1
    assert items[0].prompt == ("Is there a dog? Answer the question using a single word or phrase.")


def test_hallusionbench_is_the_mean_of_three(tmp_path: Path) -> None:
    numbers = ["0_0_0", "0_0_1", "0_1_0", "0_1_1", "1_0_0"]
    rows: list[dict[str, object]] = [
        {
            "index": f"hb_VD_chart_{each}",
            "question": "Is it red?",
            "answer": "Yes",
            "category": "VD",
            "l2-category": "chart",
            "image": RED,
        }
        for each in numbers
    ]
    rows.append(rows[0] | {"index": "short"})
    rows.append(rows[0] | {"index": "hb_VD_chart_2_0_0", "image": None})
    found, items, dead = evaluate(
        "hallusionbench", tmp_path, rows, ["Yes.", "yes", "Yes", "No", "yes"]
    )
    # Figures: 0_0 is all right, 0_1 not, 1_0 is. Questions: 0_0 (of both figures) is, 0_1 not, 1_0.
    accuracies = {"aAcc": 80, "fAcc": 200 / 3, "qAcc": 200 / 3}
    assert found.figures == approx(mean=sum(accuracies.values()) / 3, **accuracies)
    assert found.figure == pytest.approx((80 + 400 / 3) / 3)
    assert [letter.is_left_out for letter in dead] == [False, True]
    assert "'short'" in dead[0].reason
    assert items[0].prompt == (
        "Is it red? Please answer yes or no. Answer the question using a single word or phrase."
    )


def test_ocrbench_is_containment_out_of_a_thousand(tmp_path: Path) -> None:
    formulas = "Handwritten Mathematical Expression Recognition"
    kinds = ["Doc-oriented VQA"] * 4 + [formulas] * 2
    lists = [
        "['Main Street', 'Main St']",
        "['7']",
        "['\u5317\u4eac']",
        "plain",
        *["['x ^ 2 + Y']"] * 2,
    ]
    rows: list[dict[str, object]] = [
        {"index": n, "question": "Read it.", "category": kind, "answer": answer, "image": RED}
        for n, (kind, answer) in enumerate(zip(kinds, lists, strict=True))
    ]
    rows.append(rows[0] | {"index": 6, "answer": "['cut off"})
    answers = ["It says\nMAIN\nST.", "", "\u5728\u5317\u4eac", "lain", "x^2+Y", "x^2+y"]
    found, items, dead = evaluate("ocrbench", tmp_path, rows, answers)
    assert found.figure == HALF * 10
    assert found.figures[formulas] == HALF and found.figures["Doc-oriented VQA"] == HALF
    assert found.num_undecided == 0
    assert items[0].prompt == "Read it. Anylyze the reason for the answer."
    assert "not a list" in dead[0].reason


def test_mmvet_without_a_judge_is_exact_match_and_says_so(tmp_path: Path) -> None:
    references = ["-1<AND>-5", "-1<AND>-5", "two<OR>2", "two<OR>2", "a long reference", "x"]
    rows = [
        {"index": n, "question": "x?", "answer": each, "category": "ocr,math", "image": RED}
        for n, each in enumerate(references)
    ]
    answers = ["-5 and -1.", "-1", "Two.", "I see two", "A long\nreference", ""]
    found, items, _ = evaluate("mmvet", tmp_path, rows, answers)
    assert found.figures == approx(mean=HALF, ocr=HALF, math=HALF)
    assert found.num_undecided == 3
    assert "exact match" in found.rule and "no judge: 3 answers" in found.rule
    assert found.rule in str(found)
    assert items[0].prompt == "x? Anylyze the reason for the answer."


def test_mathvista(tmp_path: Path) -> None:
    def row(index: int, kind: str, answer: str, letter: str | None = None) -> dict[str, object]:
        return {
            "index": index,
            "question": "Hint: give a number. Question: How many?",
            "answer": answer,
            "question_type": "multi_choice" if letter else "free_form",
            "answer_type": kind,
            "answer_option": letter,
            "choices": "['3 cm', '4 cm']" if letter else "[]",
            "task": "geometry" if letter else "counting",
            "image": RED,
        }

    rows = [
        row(0, "text", "4 cm", "B"),
        row(1, "text", "4 cm", "B"),
        row(2, "integer", "14"),
        row(3, "integer", "14"),
        row(4, "float", "1.5"),
        row(5, "text", "Paris"),
    ]
    answers = ["(B)", "3 cm", "The answer is 14.", "15", "3/2", "<answer>paris</answer>"]
    found, items, _ = evaluate("mathvista", tmp_path, rows, answers)
    assert found.figures == approx(accuracy=400 / 6, geometry=HALF, counting=75)
    assert "math-verify" in found.rule and "no judge" in found.rule
    assert items[0].prompt == rows[0]["question"]
    task = TASKS["mathvista"]
    assert isinstance(task, JudgedTask)
    for item, reply, mark in [
        (items[0], "B", 1),
        (items[0], "Z", 0),
        (items[2], "14", 1),
        (items[2], "14.0", 0),
        (items[2], "None", 0),
        (items[4], "1.50", 1),
        (items[5], "PARIS ", 1),
    ]:
        assert task.judged(item.fields, "?", reply).mark == mark


def test_mathvision_and_mathverse(tmp_path: Path) -> None:
    base = {"index": 0, "question": "How much?", "category": "algebra", "image": RED}
    rows = [
        base | {"answer": "C", "choices": "['1', '2', '3', '4', '5']"},
        base | {"answer": "\\frac{1}{2}", "choices": "[]", "index": 1},
        base | {"answer": "7", "choices": "[]", "index": 2},
    ]
    found, items, _ = evaluate("mathvision", tmp_path, rows, ["3", "$\\frac{2}{4}$", "8"])
    assert found.figure == pytest.approx(200 / 3)
    assert items[0].prompt == "How much?"
    version = {"problem_version": "Vision Only", "question_for_eval": "How much is it?"}
    rows = [base | version | {"answer": "C"}, base | {"answer": "2x", "index": 1}]
    rows[1] |= {"problem_version": "Text Lite", "question_for_eval": "f?"}
    found, items, _ = evaluate("mathverse", tmp_path, rows, ["The answer is C.", "3x"])
    assert found.figures == approx(**{"accuracy": HALF, "Text Lite": 0, "Vision Only": 100})
    task = TASKS["mathverse"]
    assert isinstance(task, JudgedTask)
    assert "How much is it?" in task.question(items[0].fields, "it is C")
    assert [task.judged(items[1].fields, "x", each).mark for each in ("1", " 0", "yes")] == [
        1,
        0,
        0,
    ]


def test_dynamath_averages_variants_and_takes_the_worst(tmp_path: Path) -> None:
    kinds = [("float", "1.571"), ("multiple choice", "B"), ("text", "even function")]
    rows: list[dict[str, object]] = [
        {
            "index": 3 * variant + qid,
            "qid": qid,
            "varid": variant + 1,
            "question": "?",
            "answer_type": kind,
            "answer": answer,
            "subject": "algebra" if qid else "geometry",
            "knowledge_level": "high school",
            "image": RED,
        }
        for variant in range(2)
        for qid, (kind, answer) in enumerate(kinds)
    ]
    answers = [
        "1.5715 rad",  # within 0.001
        "b",
        '{"solution": "...", "short answer": "even"}',
        "0.5\u03c0",
        "C",
        "",
    ]
    found, items, _ = evaluate("dynamath", tmp_path, rows, answers)
    assert found.figures == approx(
        **{
            "average": 400 / 6,
            "worst case": 100 / 3,
            "algebra": 50,
            "geometry": 100,
            "high school": 400 / 6,
        }
    )
    assert items[0].prompt == "?\nAnswer the question using a single word or phrase."
    task = TASKS["dynamath"]
    assert isinstance(task, JudgedTask)
    assert task.judged(items[1].fields, "B) as A is wrong", "unclear").mark == 1
    assert task.judged(items[1].fields, "I say so", "b").mark == 1
    assert task.judged(items[0].fields, "about", "none").mark == 0


def test_wemath_scores_problems_strictly_and_loosely(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    answers: list[str | None] = []

    def problem(number: int, rights: str) -> None:
        """Questions of a problem; `rights` has a 1 for each that is answered right, whole last."""
        steps = len(rights) - 1
        for place, is_right in enumerate(rights, 1):
            part = place if place <= steps else "multi"
            rows.append(choice(len(rows), "A", ID=number, key=f"{steps}steps_{part}"))
            answers.append("A" if is_right == "1" else "B")

    problem(1, "111")  # mastery
    problem(2, "110")  # inadequate generalization
    problem(3, "101")  # rote memorization where strict, mastery where loose
    problem(4, "000")  # insufficient knowledge
    problem(1, "0001")  # three steps, its number is used twice; rote memorization
    problem(5, "1111")
    rows.append(choice(99, "A", ID=9, key="whole"))
    found, _, dead = evaluate("wemath", tmp_path, rows, answers)
    assert found.figures == approx(
        **{
            "accuracy": 100 * 12 / 20,
            "strict": 100 * 2.5 / 6,
            "loose": 100 * 3.5 / 6,
            "1 step": 100 * 8 / 14,
            "2 steps": 50,
            "3 steps": 100,
        }
    )
    assert "'whole'" in dead[0].reason


def test_a_row_without_an_answer_is_a_dead_letter(tmp_path: Path) -> None:
    _, items, dead = evaluate("ai2d", tmp_path, [choice(0, "A"), choice(1, "")], ["A"])
    assert len(items) == 1
    assert dead[0].reason == "row has no 'answer'; fill in the cell"
    assert not dead[0].is_left_out


def test_a_failed_answer_counts_as_wrong_and_an_empty_score_is_an_error(tmp_path: Path) -> None:
    found, *_ = evaluate("ai2d", tmp_path, [choice(0, "A"), choice(1, "B")], ["A", None])
    assert (found.figure, found.num_undecided) == (HALF, 0)
    with pytest.raises(DataError, match="ai2d has no marked answer"):
        score(TASKS["ai2d"], [], num_lost=1, num_left_out=0, judge=None)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_score_says_how_answers_were_marked(task: Task) -> None:
    assert task.rule.startswith(("exact match", "containment"))
    if isinstance(task, MultipleChoice):
        assert "option" in task.rule
