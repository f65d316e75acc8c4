"""File permissions of a saved folder: its weights and code become as readable as its settings."""

import os
from pathlib import Path


def share_mode(folder: str | os.PathLike[str], settings: str) -> None:
    """Give weights and code in `folder` the mode of its file `settings`, which follows the umask.

    safetensors makes files that only their owner can read, and transformers copies code with the
    mode that it is installed with.
    """
    path = Path(folder) / settings
    if path.is_file():  # in a distributed save only one process writes settings
        for file in [*path.parent.glob("model*.safetensors"), *path.parent.glob("*.py")]:
            file.chmod(path.stat().st_mode & 0o777)
