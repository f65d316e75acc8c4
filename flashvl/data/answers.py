"""Whether an answer is right: the one judge of evaluation and of rewards."""


def is_exact(answer: str, reference: str) -> bool:
    """Whether the answer is the reference, letter by letter."""
    return answer == reference
