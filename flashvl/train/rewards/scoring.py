"""Scores a group of completions by several reward functions, whatever these do."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flashvl.data.isolated import Isolated
from flashvl.errors import ConfigError, one_line
from flashvl.train.rewards.functions import FUNCTIONS

logger = logging.getLogger(__name__)

GROUP_SECONDS = 60.0
"""Time for the rewards of a group, by a function of one's own."""

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Rewards of a group."""

    parts: Float64s
    """(completions, functions): what each function gave; NaN where it did not tell."""
    totals: Float64s
    """(completions,): the weighted sums; NaN where a completion's reward is undefined."""


class Scorer:
    """Runs the reward functions of a recipe: those of one's own in a process apart."""

    def __init__(self, rewards: Mapping[str, float], group_seconds: float = GROUP_SECONDS):
        """
        Args:
            rewards: weights of the functions, by names in `FUNCTIONS` or by import paths.
            group_seconds: time for the rewards of a group, by a function of one's own.
        """
        self.paths = tuple(rewards)
        self.weights = np.array(list(rewards.values()), np.float64)
        self.names = _shorten(self.paths)
        """Names for figures."""
        self._process = Isolated("flashvl.train.rewards.worker", [str(group_seconds)])
        self._told: set[str] = set()

    def check(self) -> None:
        """
        Raises:
            ConfigError: a function cannot be imported.
        """
        for path in self.paths:
            if path in FUNCTIONS:
                continue
            answer = self._process.ask({"function": path}) or {"error": "the import takes too long"}
            if "error" in answer:
                raise ConfigError(
                    f"rewards: {path} cannot be imported ({answer['error']}); write"
                    f" package.module.function, or one of {', '.join(FUNCTIONS)}"
                )

    def score(
        self,
        prompt: Sequence[Mapping[str, str]],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
    ) -> Scores:
        """The rewards of the completions of one prompt.

        A function that raises, takes too long or gives something else than a number for each
        completion leaves the rewards of all undefined, and one that gives None or NaN that
        completion's. Only a function that gives None for all says nothing about the prompt: its
        part is left out of the sums, as in TRL.

        Args:
            columns: the row's columns, as `answer`.
        """
        count = len(completions)
        arguments = {
            "prompts": [[dict(message) for message in prompt]] * count,
            "completions": [[{"role": "assistant", "content": text}] for text in completions],
            "completion_ids": [list(ids) for ids in completion_ids],
            **{name: [value] * count for name, value in columns.items()},
        }
        parts = np.full((count, len(self.paths)), np.nan)
        counts_nothing = np.zeros(len(self.paths), bool)
        for place, path in enumerate(self.paths):
            try:
                rewards = self._run(path, arguments)
                if len(rewards) != count:
                    raise ValueError(f"{len(rewards)} rewards for {count} completions")
                parts[:, place] = [np.nan if each is None else float(each) for each in rewards]
                counts_nothing[place] = all(each is None for each in rewards)
            except Exception as error:  # whatever a function does, the run goes on
                self._tell(path, error)
        parts[~np.isfinite(parts)] = np.nan
        weighted = parts[:, ~counts_nothing] * self.weights[~counts_nothing]
        totals = weighted.sum(axis=1) if weighted.shape[1] else np.full(count, np.nan)
        return Scores(parts=parts, totals=totals)

    def _run(self, path: str, arguments: dict[str, Any]) -> Sequence[float | None]:
        if path in FUNCTIONS:
            return FUNCTIONS[path](**arguments)
        answer = self._process.ask({"function": path, "arguments": arguments})
        if answer is None:
            raise TimeoutError("it took too long, or ended its process")
        if "error" in answer:
            raise RuntimeError(answer["error"])
        rewards: Sequence[float | None] = answer["rewards"]
        return rewards

    def _tell(self, path: str, error: Exception) -> None:
        """Log the first fault of a function; the rewards that it leaves undefined are counted."""
        if path not in self._told:
            self._told.add(path)
            logger.warning("reward %s failed: %s", path, one_line(error))


def _shorten(paths: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the paths, or whole paths where these are not distinct."""
    last = [path.rpartition(".")[2] for path in paths]
    return tuple(
        name if last.count(name) == 1 else path.replace(".", "_")
        for name, path in zip(last, paths, strict=True)
    )
