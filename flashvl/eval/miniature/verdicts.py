"""Whether a comparison came out as in the paper: a sign test, and one word."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
"""Greatest p-value at which a difference counts as one."""
Word = Literal["reproduced", "not reproduced", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A claim that one model is better than another, and what the pairs say about it."""

    claim: str
    paper: str
    """What the paper has, in its own figures."""
    differences: tuple[float, ...]
    """Difference by seed, of which the claim says that it is above 0."""
    wins: int
    """Pairs in which the claim's better model alone is right, or is ahead; of all seeds."""
    losses: int
    """Pairs in which it is the other way round. Ties do not count."""

    @property
    def p_value(self) -> float:
        return sign_test(self.wins, self.losses)

    @property
    def p_text(self) -> str:
        """The p-value in two digits; the least ones are below what a float holds."""
        return f"{self.p_value:.2g}" if self.p_value else "< 1e-300"

    @property
    def word(self) -> Word:
        """A difference counts if the sign test finds one and every seed agrees with its sign."""
        if self.p_value < LEVEL:
            if all(each > 0 for each in self.differences):
                return "reproduced"
            if all(each < 0 for each in self.differences):
                return "not reproduced"
        return "undecided"


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of the exact sign test: if wins and losses were equally likely, how
    likely they would be at least as far apart."""
    total = wins + losses
    tail = sum(math.comb(total, each) for each in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def compare(
    claim: str, paper: str, better: Sequence[Sequence[bool]], worse: Sequence[Sequence[bool]]
) -> Comparison:
    """Compare two models' answers to the same questions.

    Args:
        better: by seed, whether each answer of the model that the claim favours is right.
        worse: the same of the other model.
    """
    pairs = [list(zip(*each, strict=True)) for each in zip(better, worse, strict=True)]
    return Comparison(
        claim=claim,
        paper=paper,
        differences=tuple(sum(one - other for one, other in those) / len(those) for those in pairs),
        wins=sum(one and not other for those in pairs for one, other in those),
        losses=sum(other and not one for those in pairs for one, other in those),
    )
