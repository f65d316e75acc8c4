"""SEEDBench: the questions about single images."""

from flashvl.eval.tasks.multiple_choice import MultipleChoice


class SEEDBench(MultipleChoice):
    name = "seedbench"
    title = "SEEDBench"
    file = "SEEDBench_IMG"
