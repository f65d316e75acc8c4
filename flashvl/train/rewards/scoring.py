"""Scores a group of completions by several reward functions, whatever these do."""

import logging
from collections.abc import Mapping, Sequence
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


FAILED = np.inf
"""Stands for the reward of a function that failed, where NaN stands for None."""


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
    ) -> Float64s:
        """What each function gives the completions of one prompt.

        Args:
            columns: the row's columns, as `answer`.

        Returns:
            (completions, functions): NaN where a function gives None; `FAILED` where it gives what
            is no finite number, and for all completions if it raises, takes too long or gives
            another number of rewards.
        """
        count = len(completions)
        arguments = {
            "prompts": [[dict(message) for message in prompt]] * count,
            "completions": [[{"role": "assistant", "content": text}] for text in completions],
            "completion_ids": [list(ids) for ids in completion_ids],
            **{name: [value] * count for name, value in columns.items()},
        }
        parts = np.full((count, len(self.paths)), FAILED)
        for place, path in enumerate(self.paths):
            try:
                rewards = self._run(path, arguments)
                if len(rewards) != count:
                    raise ValueError(f"{len(rewards)} rewards for {count} completions")
                parts[:, place] = [_as_number(reward) for reward in rewards]
            except Exception as error:  # whatever a function does, the run goes on
                self._tell(path, error)
        return parts

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


def total_rewards(parts: Float64s, weights: Float64s) -> Float64s:
    """(completions,): the weighted sums of the rewards of a whole group; NaN: undefined.

    A completion's reward is undefined if a function failed on it or gave None. Only a function that
    gives None for all completions says nothing about this prompt, and is left out of the sums.

    Args:
        parts: (completions, functions), as `Scorer.score` gives them.
    """
    counts = ~np.isnan(parts).all(axis=0)
    if not counts.any():
        return np.full(len(parts), np.nan)
    totals = (parts[:, counts] * weights[counts]).sum(axis=1)
    return np.where(np.isfinite(parts[:, counts]).all(axis=1), totals, np.nan)


def _as_number(reward: float | None) -> float:
    if reward is None:
        return np.nan
    return float(reward) if np.isfinite(reward) else FAILED


def _shorten(paths: Sequence[str]) -> tuple[str, ...]:
    """The last parts of the paths, or whole paths where these are not distinct."""
    last = [path.rpartition(".")[2] for path in paths]
    return tuple(
        name if last.count(name) == 1 else path.replace(".", "_")
        for name, path in zip(last, paths, strict=True)
    )
