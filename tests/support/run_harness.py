"""Runs a module or a script of an environment whose torchvision does not fit its torch.

python run_harness.py MODULE_OR_SCRIPT ARGUMENTS...

PyPI's torchvision is built for the torch that has CUDA. Beside a torch for CPUs it lacks its
operators, and cannot be imported, as it registers shapes for operators that are not there.
Harnesses import it for its transforms alone.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch

register_fake = torch.library.register_fake


def register_if_there(name: str, *arguments: Any, **options: Any) -> Any:
    space, _, operator = name.partition("::")
    if hasattr(getattr(torch.ops, space), operator):
        return register_fake(name, *arguments, **options)

    def leave_alone(function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    return leave_alone


torch.library.register_fake = register_if_there
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
run(sys.argv[0], run_name="__main__")
