"""The rules by which an answer names an option, or says yes or no."""

import pytest

from flashvl.eval.tasks.multiple_choice import find_option
from flashvl.eval.tasks.yes_no import find_yes_or_no

PETS = {"A": "a cat", "B": "a dog", "C": "a catfish", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B.** a dog", "B"),
        ("The answer is B.", "B"),
        ("b", None),
        ("B\nbecause it barks", "B"),  # one of the last four words
        ("B because it barks a lot", None),  # not one of the last four, nor any option's text
        ("B because a dog barks a lot, I say", "B"),  # by its text
        ("A or B", None),
        ("A DOG", "A"),  # an article is a letter as well
        ("a dog", "B"),
        ("It is A Dog, surely", "A"),
        ("a catfish", None),  # "a cat" is in it, too
        ("none of these", "D"),
        ("Z", "Z"),
        ("A Z", "A"),
        ("", None),
        ("   ", None),
        ("a dog " * 40, None),  # longer than twice all options
        ("E", None),
    ],
)
def test_an_option_by_its_letter_or_its_text(answer: str, letter: str | None) -> None:
    assert find_option(answer, PETS) == letter


def test_an_option_in_chinese() -> None:
    options = {"A": "\u4e00\u53ea\u732b", "B": "\u4e00\u53ea\u72d7"}
    assert find_option("B", options) == "B"
    assert find_option("\u56fe\u4e2d\u662f\u4e00\u53ea\u72d7", options) == "B"
    assert find_option("\u56fe\u4e2d\u662f\u4e00\u5339\u9a6c", options) is None


def test_a_question_without_options_names_none() -> None:
    assert find_option("B", {}) is None
    assert find_option("", {}) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("Yes, there is.", "Yes"),
        ("yes,there is", "Yes"),
        ("There is no dog", "No"),
        ("yes or no", None),
        ("", None),
        ("nothing", None),
        ("I know", None),
        ("'yes'", None),  # an apostrophe stays
        ("(yes)", "Yes"),
        ("non-yes", "Yes"),
        ("yes 1,000 times", "Yes"),
        ("\u662f", None),
    ],
)
def test_yes_or_no(answer: str, said: str | None) -> None:
    assert find_yes_or_no(answer) == said
