"""Whether an answer is right: the one rule that evaluation and rewards share."""

import functools
import importlib.util
import re
import unicodedata

from flashvl.data.isolated import Isolated
from flashvl.errors import ConfigError

MAX_CHARACTERS = 500
"""Characters of an answer that are compared, its last ones; a longer reference must be
the same text."""

_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
_END_OF_REASONING = "</think>"
_LEAD_IN = re.compile(
    r"^(?:so|thus|therefore|hence)?,?\s*(?:the\s+)?(?:final\s+|correct\s+)?"
    r"(?:answer|option|choice|result)\s*(?:is|are|=|:)*\s*(?:option\s+|choice\s+)?:?\s*"
    r"|^(?:\u6240\u4ee5|\u56e0\u6b64)?,?\s*(?:\u6700\u7ec8)?"
    r"(?:\u7b54\u6848|\u9009\u9879|\u9009|\u7ed3\u679c)\s*(?:\u662f|\u4e3a|:)*\s*:?\s*",
    re.IGNORECASE,
)
"""Words that only lead to an answer, in English and Chinese."""
_CHOICE = re.compile(r"^\(?([A-Z])(?:\)|(?=[.:,]\s*\S)|$)[.:,]?\s*(.*)$", re.DOTALL)
"""A letter of a choice, perhaps in brackets, and perhaps the choice's text after it."""
_MIXED = re.compile(r"(?<![\d.])(-?)(\d+) (\d+)/(\d+)(?![\d.])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_EXPONENT = re.compile(r"(?<=\d)[eE]([+-]?\d+)\b")
_TIMES_TEN = re.compile(r"(\d)\s*(?:\*|x|\\times|\\cdot)\s*10\s*\^\s*\{?\s*\(?([+-]?\d+)\)?\s*\}?")
_QUANTITY = re.compile(r"^(?:[A-Za-z]\s*=\s*)?[-+]?[$]?[\d./]+\s*([^\d\s,;]\S*)?$")
"""A number with perhaps a unit, alone."""
_SEPARATORS = re.compile(r"\s*(?:,|;|\bor\b|\band\b|\u6216\u8005|\u6216|\u548c|\u4e0e)\s*")
_UNIT = re.compile(r"^[-+]?[\d.,/ ]*\d\s*([a-zA-Z\u03bc]+)\s*\^?\s*([23])?$")
_UNITS = {"mm", "cm", "dm", "m", "km", "mg", "g", "kg", "ml", "l", "s", "min", "h"}
"""Units that are compared; others are left out of a comparison."""
_TERM = re.compile(r"(?<![A-Za-z])(?:\d\s*[a-cknx-z]|[a-cknx-z]\s*\*\s*\d)(?![A-Za-z])")
"""A number times a variable, which math-verify takes for the number alone outside of formulas."""
_IS_LATEX = re.compile(r"\\[A-Za-z({[]|\^|_")


def is_exact(answer: str, reference: str) -> bool:
    """Whether the answer equals the reference, character by character."""
    return answer == reference


def is_right(text: str, reference: str) -> bool:
    """Whether the final answer in `text` is the reference; where it cannot be told, it is not."""
    return judge(text, reference) is True


def judge(text: str, reference: str) -> bool | None:
    """Whether the final answer in `text` is the reference; None: it took too long to tell.

    An answer is right if it is the same text, whatever its case, spaces and final stop; if it names
    the same letter of a multiple choice, and no other; or if math-verify finds it equal. Units of
    length, weight and time must not differ where both are given.

    Raises:
        ConfigError: math-verify is not installed.
    """
    answer, gold = _tidy(final_answer(text)), _tidy(reference)
    if not answer or not gold:
        return False
    if answer.casefold() == gold.casefold():
        return True
    if choice := _CHOICE.match(gold):
        return _is_same_choice(answer, choice[1], choice[2])
    if not _is_mathematical(gold) or len(gold) > MAX_CHARACTERS or _units_differ(answer, gold):
        return False
    return _are_equal(_as_mathematics(gold), _as_mathematics(answer))


def final_answer(text: str) -> str:
    """What the last complete <answer>...</answer> holds, or else the whole text, in both cases
    without the reasoning in <think>...</think>; reasoning without an end goes to the end of the
    text."""
    _, end, rest = text.rpartition(_END_OF_REASONING)
    rest = rest if end else text.partition("<think>")[0]
    found = _ANSWER.findall(rest)
    return (found[-1] if found else rest).strip()


def _tidy(answer: str) -> str:
    """The answer in plain characters, on one line, without words that only lead to it."""
    answer = answer[-MAX_CHARACTERS:] if len(answer) > MAX_CHARACTERS else answer
    answer = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", answer)  # 2 1/2, not 21/2
    answer = answer.replace("\u00b2", "^2").replace("\u00b3", "^3")
    answer = unicodedata.normalize("NFKC", answer.replace("\u3002", ".").replace("\u3001", ","))
    answer = answer.translate(str.maketrans("\u2044\u2212\u2013\u00d7\u00f7\u00b7", "/--*/*"))
    answer = re.sub(r"(?<=[\u4e00-\u9fff])(?=[-\d])|(?<=\d)(?=[\u4e00-\u9fff])", " ", answer)
    answer = " ".join(answer.replace("**", " ").split())
    answer = _LEAD_IN.sub("", answer, count=1)
    return answer.rstrip(" .,;:!?").strip()


def _is_same_choice(answer: str, letter: str, meaning: str) -> bool:
    """Whether the answer names this choice, by its letter or its text, and no other."""
    if meaning and answer.casefold() == meaning.casefold():
        return True
    found = _CHOICE.match(answer)
    if found is None or found[1] != letter:
        return False
    others = re.findall(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", found[2])
    names_another = bool(others) and (not meaning or found[2].casefold() != meaning.casefold())
    contradicts = bool(meaning and found[2]) and found[2].casefold() != meaning.casefold()
    return not names_another and not contradicts


def _is_mathematical(text: str) -> bool:
    return bool(re.search(r"[\d\\^=+*/\u221a\u03c0\u221e<>]", text))


def _units_differ(answer: str, gold: str) -> bool:
    """Whether both end in a unit, and these differ."""
    found = [_unit_of(text) for text in (answer, gold)]
    return None not in found and found[0] != found[1]


def _unit_of(text: str) -> tuple[str, str] | None:
    """The unit behind a number and its power, if it is one that is compared."""
    plain = re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}|[$\\{}~]", r" \1 ", text)
    match = _UNIT.match(" ".join(plain.split()).replace(" ^ ", "^").replace("^ ", "^"))
    if match is None or match[1].lower() not in _UNITS:
        return None
    return match[1].lower(), match[2] or "1"


def _as_mathematics(text: str) -> str:
    """The expression in the forms that math-verify reads; a list of quantities becomes a set."""
    text = re.sub(r"\u00b0|\bdegrees?\b", " ", text)
    text = text.replace("\u03c0", r"\pi ").replace("\u221a", r"\sqrt")
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*(\d+)", r"\\sqrt{\1}", text)
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _EXPONENT.sub(r"*10^\1", text)
    text = _TIMES_TEN.sub(r"\1 \\times 10^{\2}", text)
    text = _MIXED.sub(r"\1(\2+\3/\4)", text).strip().removeprefix("+")
    inner = text[1:-1] if re.fullmatch(r"\{[^{}]*\}", text) else text
    pieces = _SEPARATORS.split(inner.strip())
    if (len(pieces) > 1 or inner != text) and all(map(_QUANTITY.match, pieces)):
        numbers = [re.sub(r"^[A-Za-z]\s*=\s*", "", piece) for piece in pieces]
        numbers = [re.sub(r"(?<=[\d.])\s*[^\d\s./]\S*$", "", piece) for piece in numbers]
        return rf"$\{{{', '.join(numbers)}\}}$"
    if re.fullmatch(r"[(\[][^()\[\]]*,[^()\[\]]*[)\]]", text):  # a point, or an interval
        return f"${text}$"
    if (_IS_LATEX.search(text) or _TERM.search(text)) and not re.search(
        r"\$|\\\(|\\\[|\\boxed", text
    ):
        return f"${text}$"
    return text


@functools.lru_cache(maxsize=2**14)
def _are_equal(gold: str, answer: str) -> bool | None:
    """Whether two expressions are equal by math-verify; None: it took too long to tell.

    Raises:
        ConfigError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "comparing answers needs math-verify, which is not installed; run pip install"
            " 'flashvl[train]'"
        )
    verdict: bool | None = _EQUALITY.ask([gold, answer])
    return verdict


_EQUALITY = Isolated("flashvl.data.equality")
