"""Verdicts on answers, by a table that was written by hand."""

import threading
import time

import pytest

from flashvl.data.answers import final_answer, is_exact, is_right, judge

BOTH = "<think>{}</think><answer>{}</answer>"

RIGHT = [
    # answer, reference
    ("12", "12"),
    (" 12.\n", "12"),
    ("12.0", "12"),
    ("-3", "-3"),
    ("\u22123", "-3"),  # a minus sign
    ("+3", "3"),
    ("0.5", "1/2"),
    ("1/2", "0.5"),
    ("2/4", "1/2"),
    (r"\frac{1}{2}", "1/2"),
    (r"$\frac12$", "0.5"),
    (r"\dfrac{3}{4}", "0.75"),
    ("\u00bd", "1/2"),
    ("2\u00bd", "5/2"),
    ("2 1/2", "2.5"),
    ("0.333333", "1/3"),
    ("12 cm", "12"),
    ("12cm", "12 cm"),
    ("12 cm^2", "12 cm\u00b2"),
    (r"$12\text{ cm}^2$", "12"),
    ("12 square centimeters", "12"),
    ("12\u5e73\u65b9\u5398\u7c73", "12"),
    (r"\boxed{12}", "12"),
    (r"\(12\)", "12"),
    (r"$\sqrt{12}$", r"2\sqrt{3}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("\u221a12", r"2\sqrt{3}"),
    (r"2\pi", r"$2\pi$"),
    ("2\u03c0", r"2\pi"),
    ("(x+1)^2", "x^2+2x+1"),
    ("x*2", "2x"),
    ("1 + 2x", "2x+1"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("3 + 4 = 7", "7"),
    ("The answer is 12.", "12"),
    ("The sides are 3 and 4, so the area is 12.", "12"),
    ("50%", "50%"),
    ("50 %", "0.5"),
    ("50\uff05", "1/2"),
    ("1,234", "1234"),
    ("1,234,567", "1234567"),
    ("1.2e3", "1200"),
    (r"1.2 \times 10^3", "1200"),
    ("1.2 \u00d7 10^3", "1200"),
    ("3e-2", "0.03"),
    ("30\u00b0", "30"),
    ("30 degrees", "30\u00b0"),
    (r"$30^\circ$", "30 degrees"),
    ("{2, 1}", "{1, 2}"),
    (r"\{2,1\}", r"$\{1,2\}$"),
    ("1 or 2", "2, 1"),
    ("x=1 or x=2", "1, 2"),
    ("(1, 2)", "(1,2)"),
    ("\u7b54\u6848\u662f12\u3002", "12"),
    ("\uff11\uff12", "12"),
    ("12\u3002", "12"),
    ("x\uff1d5", "5"),
    (BOTH.format("3 + 4 is 7", "7"), "7"),
    (BOTH.format("3 + 4\nis 7", "\n7\n"), "7"),
    ("reasoning without a beginning</think> <answer>7</answer>", "7"),
    ("<answer>5</answer> no: <answer>7</answer>", "7"),  # the last one counts
    ("<think>5 or 7</think> 7", "7"),
    ("Red.", "red"),
    ("yes", "Yes"),
    ("the answer is red", "red"),
    ("B", "B"),
    ("(B)", "B"),
    ("B.", "B"),
    ("B) 12 cm", "B"),
    ("The answer is B.", "B"),
    ("Option B", "B"),
    ("B: 12 cm", "B: 12 cm"),
    ("12 cm", "B: 12 cm"),
    ("\u7b54\u6848\uff1aB\u3002", "B"),
    ("\u9009B", "B"),
]
WRONG = [
    ("", "12"),
    (" . ", "12"),
    ("13", "12"),
    ("3", "-3"),
    ("-12", "12"),
    ("120", "12"),
    ("1.2", "12"),
    ("0.33", "1/3"),
    ("1/3", "1/2"),
    ("2 1/2", "21/2"),
    ("2\u00bd", "21/2"),
    ("12 m", "12 cm"),
    ("12 cm", "12 cm^2"),
    (r"$\sqrt{12}$", r"3\sqrt{2}"),
    ("(x-1)^2", "x^2+2x+1"),
    ("2", "2x"),
    ("3y", "3"),
    ("5%", "50%"),
    ("1,234", "234"),
    ("1.2e3", "1.2"),
    ("1.2e4", "1200"),
    ("60\u00b0", "30"),
    ("{1, 3}", "{1, 2}"),
    ("(2, 1)", "(1, 2)"),
    ("3 or 4", "4"),
    ("3, 4", "4"),
    ("3\u62164", "4"),
    ("1 or 2", "2"),
    ("4", "3, 4"),
    (BOTH.format("7", "8"), "7"),
    (BOTH.format("<answer>7</answer>", ""), "7"),
    ("<think>it is 7</think>", "7"),
    ("<think>it is 7", "7"),
    ("<think>it is <answer>7</answer>", "7"),
    ("<answer>7</answer> no: <answer>8</answer>", "7"),
    ("<answer>7 or 8</answer>", "8"),
    ("green", "red"),
    ("red or green", "red"),
    ("A", "B"),
    ("A or B", "B"),
    ("B or C", "B"),
    ("B, C", "B"),
    ("A B C D", "A"),
    ("B: 13 cm", "B: 12 cm"),
    ("AB", "B"),
    ("A boy", "A"),
    ("\u7b54\u6848\uff1aC", "B"),
    ("12", "twelve"),
    (r"\frac{1}{0}", "1"),
    (r"\frac{\frac{", "1/2"),
]
TABLE = [(*pair, True) for pair in RIGHT] + [(*pair, False) for pair in WRONG]
PATHOLOGICAL = ("9^{9^{9^{9}}}", r"\int_0^1 x^{x^{x^x}} dx + 7!!!!!", "9**9**9**9", "1000000000!!")


@pytest.mark.parametrize(("answer", "reference", "verdict"), TABLE)
def test_verdict(answer: str, reference: str, verdict: bool) -> None:
    assert is_right(answer, reference) is verdict


def wrong_verdicts() -> list[tuple[str, str, bool]]:
    return [line for line in TABLE if is_right(line[0], line[1]) is not line[2]]


def run_in_thread() -> tuple[list[tuple[str, str, bool]], float]:
    """The false verdicts, and the seconds that the pathological answers take, in a thread."""
    found: list[tuple[list[tuple[str, str, bool]], float]] = []

    def work() -> None:
        false = wrong_verdicts()
        start_s = time.monotonic()
        false += [(text, "12", False) for text in PATHOLOGICAL if is_right(text, "12")]
        found.append((false, time.monotonic() - start_s))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_verdicts_in_a_thread_of_a_ray_worker(ray_cluster: None) -> None:
    import ray

    false, seconds = ray.get(ray.remote(run_in_thread).remote())
    assert not false
    assert seconds < 60


def test_an_answer_that_takes_too_long_is_undecided() -> None:
    """The kernel ends the process that compares; the next question starts another."""
    start_s = time.monotonic()
    assert judge(PATHOLOGICAL[0], "12") is None
    assert time.monotonic() - start_s < 30
    assert judge("2/4 + 1", "3/2") is True


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>a</think> <answer> b </answer> c", "b"),
        ("<answer>a</answer><answer>b", "a"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<think>a</think>b", "b"),
        ("<think>a", ""),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_exact_is_exact() -> None:
    assert is_exact("a", "a")
    assert not is_exact("a", "A")
