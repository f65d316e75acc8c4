"""What decides a job's captions, kept beside them: a job goes on only as it began.

_manifest.json    written first, before any row
"""

import functools
import hashlib
import json
from pathlib import Path

from flashvl.data.storage import Location
from flashvl.errors import ConfigError

MANIFEST = "_manifest.json"

Fingerprint = dict[str, str | int | float]
"""By name: settings as they are, contents as their hash."""


def hash_folder(folder: Path) -> str:
    """Of the contents of the files in a model's folder, and of their names."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return _hash_files(
        tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    )


@functools.lru_cache(maxsize=4)
def _hash_files(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Asked again before the job starts, and then known: the weights of a 2B model take seconds."""
    whole = hashlib.blake2b(digest_size=16)
    for path, _, _ in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").digest()
        whole.update(path.name.encode() + digest)
    return whole.hexdigest()


def has_begun(folder: Location) -> bool:
    """`folder` holds a job's output, finished or not."""
    return (folder / MANIFEST).is_file()


def check_same(folder: Location, fingerprint: Fingerprint) -> None:
    """Refuse to go on with another job than the one that `folder` holds.

    Raises:
        ConfigError: naming what differs, with both values.
    """
    try:
        stored = json.loads((folder / MANIFEST).read())
    except ValueError:
        raise ConfigError(
            f"{folder / MANIFEST} is not readable; give --restart to throw {folder} away"
        ) from None
    names = [*fingerprint, *(name for name in stored if name not in fingerprint)]
    differing = [name for name in names if stored.get(name) != fingerprint.get(name)]
    if differing:
        told = "; ".join(
            f"{name} was {stored.get(name)!r} and is {fingerprint.get(name)!r}"
            for name in differing
        )
        raise ConfigError(
            f"output {folder} holds another job's captions: {told}. Name another output, or give"
            " --restart to throw them away"
        )


def claim(folder: Location, fingerprint: Fingerprint) -> None:
    """Say what the captions of `folder`, which is held, are made of, or see that it is the same.

    Raises:
        ConfigError: as `check_same`.
    """
    if has_begun(folder):
        check_same(folder, fingerprint)
    else:
        (folder / MANIFEST).write((json.dumps(fingerprint, indent=2) + "\n").encode())
