"""The benchmarks by name, and the paper's average of them."""

from collections.abc import Mapping

from flashvl.errors import ConfigError
from flashvl.eval.tasks.ai2d import AI2D
from flashvl.eval.tasks.dynamath import DynaMath
from flashvl.eval.tasks.hallusionbench import HallusionBench
from flashvl.eval.tasks.mathverse import MathVerse
from flashvl.eval.tasks.mathvision import MathVision
from flashvl.eval.tasks.mathvista import MathVista
from flashvl.eval.tasks.mmbench import MMBenchChinese, MMBenchEnglish
from flashvl.eval.tasks.mme import MME
from flashvl.eval.tasks.mmmu import MMMU
from flashvl.eval.tasks.mmmu_pro import MMMUPro
from flashvl.eval.tasks.mmstar import MMStar
from flashvl.eval.tasks.mmvet import MMVet
from flashvl.eval.tasks.ocrbench import OCRBench
from flashvl.eval.tasks.seedbench import SEEDBench
from flashvl.eval.tasks.task import Task
from flashvl.eval.tasks.wemath import WeMath

GENERAL: tuple[Task, ...] = (
    MMMU(),
    MMBenchEnglish(),
    MMBenchChinese(),
    MMStar(),
    MathVista(),
    AI2D(),
    MMVet(),
    HallusionBench(),
    OCRBench(),
    MME(),
    SEEDBench(),
)
"""The eleven benchmarks of the paper's Tables 2 to 6 and 8 to 10, in their order."""
REASONING: tuple[Task, ...] = (DynaMath(), MathVision(), MathVerse(), MMMUPro(), WeMath())
"""The five benchmarks of the paper's Table 7, in their order."""
TASKS: dict[str, Task] = {task.name: task for task in (*GENERAL, *REASONING)}
"""All benchmarks by their names."""

UNITS = {"ocrbench": 10, "mme": 28}
"""What a benchmark's figure is divided by to be in percent."""


def general_average(figures: Mapping[str, float]) -> float:
    """The average of the paper's tables: the mean of the eleven benchmarks, each in percent.

    Args:
        figures: figure of each benchmark by its name, OCRBench's out of 1000 and MME's of 2800.

    Raises:
        ConfigError: a benchmark is missing.
    """
    return _mean(figures, GENERAL)


def reasoning_average(figures: Mapping[str, float]) -> float:
    """The average of the paper's Table 7: the mean of the five benchmarks.

    Raises:
        ConfigError: a benchmark is missing.
    """
    return _mean(figures, REASONING)


def _mean(figures: Mapping[str, float], tasks: tuple[Task, ...]) -> float:
    if missing := [task.name for task in tasks if task.name not in figures]:
        raise ConfigError(
            f"the average needs all of {len(tasks)} benchmarks, and {missing[0]} is missing;"
            " evaluate it as well"
        )
    return sum(figures[task.name] / UNITS.get(task.name, 1) for task in tasks) / len(tasks)
