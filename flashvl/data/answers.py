"""Whether an answer is right: the one rule that evaluation and rewards share."""


def is_exact(answer: str, reference: str) -> bool:
    """Whether the answer equals the reference, character by character."""
    return answer == reference
