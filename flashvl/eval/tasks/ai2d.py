"""AI2D, test: diagrams of school science, with letters in place of the words that are asked for."""

from flashvl.eval.tasks.multiple_choice import MultipleChoice


class AI2D(MultipleChoice):
    name = "ai2d"
    title = "AI2D"
    file = "AI2D_TEST"
