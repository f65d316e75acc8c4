"""Whoever may read a saved folder's settings may read all of it."""

import os
from pathlib import Path


def share_mode(folder: str | os.PathLike[str], settings: str) -> None:
    """Give weights and code in `folder` the mode of its file `settings`, which the umask made.

    safetensors makes files that are their owner's alone, and the library copies code with the mode
    that it has where it is installed.
    """
    path = Path(folder) / settings
    if path.is_file():  # else this process saves no settings, as one of many does
        for file in [*path.parent.glob("model*.safetensors"), *path.parent.glob("*.py")]:
            file.chmod(path.stat().st_mode & 0o777)
