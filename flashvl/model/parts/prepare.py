"""Prepares the model that a user names at an entry point, so that everything below can load it.

Loading knows only shipped names and Flash-VL folders; this module downloads and converts.
"""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download

from flashvl.errors import CheckpointError, ConfigError, one_line
from flashvl.model.checks import read_json
from flashvl.model.loading import is_published
from flashvl.model.parts.released import import_released

OWNER = "FlashVL/"
"""Beginning of the names under which the published repositories are on the hub."""
IMPORTED = Path.home() / ".cache" / "flashvl" / "imported"
"""Folder of the published checkpoints that `prepare_model` has converted."""
IMPORT_VERSION = 2
"""Number of the format that an import writes; raise it when older imports must be made again."""
FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
"""Files of a repository that are downloaded: weights, settings and tokenizer, no code."""


def prepare_model(model: str | Path) -> Path:
    """A shipped model's name, a folder, or a published FlashVL/* name -> what `load_model` takes.

    A published checkpoint, on the hub or in a folder, is converted the first time, to a folder of
    the same name in `IMPORTED`. This takes about a minute, and as much disk as the weights (4 GB
    for a 2B model). On a cluster every node must see that folder; if not, run `flashvl import` to
    a shared one. Any other `model` is returned unchanged.

    Raises:
        CheckpointError: the published checkpoint cannot be downloaded, or is broken.
        ConfigError: the converted model cannot be written.
    """
    folder = fetch_folder(str(model)) if str(model).startswith(OWNER) else Path(model)
    try:
        model_type = read_json(folder / "config.json").get("model_type")
    except CheckpointError:  # loading says what is wrong with it
        return folder
    if not is_published(model_type):
        return folder
    return _import_once(folder, Path(os.path.abspath(model)).name)


def _import_once(source: Path, name: str) -> Path:
    """The import of the published checkpoint in `source`, made unless `IMPORTED` has it already."""
    source = source.resolve()
    digest = hashlib.sha256(f"{IMPORT_VERSION} {source}".encode())
    for path in sorted(source.glob("*.json")) + sorted(source.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    output = IMPORTED / digest.hexdigest()[:12] / name
    if not output.is_dir():
        try:
            import_released(source, output)
        except ConfigError:
            if not output.is_dir():  # else another process was faster
                raise
    return output


def fetch_folder(name: str) -> Path:
    """The folder `name`, or the hub repository `name` downloaded to the hub's own cache.

    Raises:
        CheckpointError: it is not a folder, and the repository cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(
            f"no folder {name!r}; name one, or a repository of huggingface.co as OWNER/NAME"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # of the hub's own kinds, of its HTTP library's, of the disk
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else one_line(error)
        raise CheckpointError(
            f"{name} is no folder here and cannot be downloaded ({reason}); on a machine with"
            f" network run `hf download {name} --local-dir DIR`, then name the folder DIR"
        ) from None
