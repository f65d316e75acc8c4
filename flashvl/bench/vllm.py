"""vLLM as a contender: its Transformers backend, run by the Python of an environment that has it.

vLLM reads the same model from a folder, as its users do, and draws random weights of its own. Its
process lives while the other contenders are measured, but only waits for input.
"""

import base64
import ctypes.util
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from flashvl.bench import vllm_answers
from flashvl.bench.contenders import GenerateContender, Work
from flashvl.config import DEFAULT_PROMPT
from flashvl.errors import ConfigError
from flashvl.model import FlashVLForConditionalGeneration, FlashVLProcessor

NAME = "vLLM"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    # GiB, which hold far more than 16 answers of 128 tokens.
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # One process instead of three: on few cores, two would take turns with the one that computes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM sets this itself for its workers where it has several processes.
    "KMP_BLOCKTIME": "5",
}
"""Environment variables of vLLM's process; our own environment's values come first."""
PRELOADED = ("tcmalloc_minimal", "iomp5")
"""Libraries for LD_PRELOAD by vLLM's guide for CPUs; vLLM's packages bring the second."""
EXIT_S = 60.0
"""Seconds in which vLLM may end by itself, before it is killed."""


def check_vllm(python: Path) -> None:
    """Refuse a `python` that cannot run vLLM.

    Raises:
        ConfigError: `python` cannot be run, or cannot import vLLM.
    """
    remedy = "--vllm names the Python of an environment with vLLM, such as ENVIRONMENT/bin/python"
    try:
        done = subprocess.run(
            [str(python), "-P", "-c", "from vllm import LLM"],
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ConfigError(f"{python} cannot be run: {error.strerror}; {remedy}") from None
    if done.returncode:
        raise ConfigError(f"{python} cannot import vLLM: {_reason(done.stderr)}; {remedy}")


def _environment() -> dict[str, str]:
    """Our environment variables without the path on which this package may lie."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _settings(python: Path) -> dict[str, str]:
    """`SETTINGS`, as many threads as our own process has, and the libraries that are there."""
    libraries = [path for name in PRELOADED if (path := _find_library(python, name))]
    settings = SETTINGS | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    if libraries:
        settings["LD_PRELOAD"] = ":".join(libraries)
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def _find_library(python: Path, name: str) -> str | None:
    """The library of `python`'s environment, where pip puts Intel's OpenMP, or of the system."""
    own = sorted((python.absolute().parent.parent / "lib").glob(f"lib{name}.so*"))
    return str(own[0]) if own else ctypes.util.find_library(name)


def _reason(log: str) -> str:
    """The last line of a log that names an exception, or its last line where none does."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (named or lines)[-1]


@dataclass(kw_only=True, slots=True)
class VllmContender:
    """vLLM with the model of `twin`."""

    process: subprocess.Popen[str]
    log: IO[str]
    """Everything that vLLM prints."""
    prompt: str
    """The question in the model's chat format, with one placeholder for the image."""
    twin: GenerateContender
    """The same model in this process, on which the work is counted."""
    settings: dict[str, str]
    """Environment variables that vLLM's process got."""
    name: str = NAME
    version: str = ""

    def prepare(self, jpeg: bytes) -> int:
        """Have vLLM's process prepare and keep its engine's input; returns the input's number."""
        return int(self._prepare(jpeg)["prepared"])

    def answer(self, prepared: int, num_tokens: int) -> list[float]:
        [times] = self.answer_all([prepared], [num_tokens])
        return times

    def answer_all(self, prepared: Sequence[int], lengths: Sequence[int]) -> list[list[float]]:
        """Answer several at once; returns each one's token times by `perf_counter`."""
        times: list[list[float]] = self._ask(prepared=list(prepared), lengths=list(lengths))[
            "times"
        ]
        return times

    def count_work(self, jpeg: bytes) -> Work:
        """The twin's work; vLLM's own prompt must have as many tokens."""
        work = self.twin.count_work(jpeg)
        prompt_tokens = self._prepare(jpeg)["prompt_tokens"]
        assert prompt_tokens == work.prompt_tokens, (prompt_tokens, work.prompt_tokens)
        return work

    def start(self) -> None:
        """Wait until vLLM has loaded its model."""
        self.version = self._read()["version"]

    def __str__(self) -> str:
        settings = (f"{name}={value}" for name, value in self.settings.items())
        return " ".join([f"{self.name} {self.version}:", *settings])

    def _prepare(self, jpeg: bytes) -> dict[str, Any]:
        return self._ask(prompt=self.prompt, jpeg=base64.b64encode(jpeg).decode())

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `_read` tells the reason
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise ConfigError(
                f"vLLM ended: {_reason(self.log.read())}; repair its packages, or leave out --vllm"
            )
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def run_vllm(
    python: Path,
    plain: GenerateContender,
    processor: FlashVLProcessor,
    *,
    options: Sequence[str] = (),
) -> Iterator[VllmContender]:
    """vLLM with the model of `plain`; its process ends with the `with` block.

    Args:
        options: further arguments of the script `vllm_answers`.

    Raises:
        ConfigError: vLLM ends before the block does.
    """
    content = [{"type": "image"}, {"type": "text", "text": DEFAULT_PROMPT}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile("w+") as log:
        folder = Path(home) / "model"
        _save_without_weights(plain.model, processor, folder)
        dtype = str(plain.model.dtype).removeprefix("torch.")
        settings = _settings(python)
        process = subprocess.Popen(
            [str(python), "-P", vllm_answers.__file__, str(folder), f"--dtype={dtype}", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # A cache of its own, as the model's code is copied there and another run might find it.
            env=_environment() | settings | {"HF_MODULES_CACHE": f"{home}/modules"},
        )
        contender = VllmContender(
            process=process, log=log, prompt=prompt, twin=plain, settings=settings
        )
        try:
            contender.start()
            yield contender
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    try:
        process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _save_without_weights(
    model: FlashVLForConditionalGeneration, processor: FlashVLProcessor, folder: Path
) -> None:
    """Write everything that `save_pretrained` writes except the weights, which vLLM draws."""
    folder.mkdir()
    config = model.config
    config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
