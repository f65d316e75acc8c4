"""What decides a job's captions, kept beside them: a job goes on only as it began.

_manifest.json    written first; locked while a job runs
"""

import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvl.errors import ConfigError

MANIFEST = "_manifest.json"

Fingerprint = dict[str, str | int]
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


def hash_stats(files: Iterable[Path]) -> str:
    """Of paths, sizes and times of change, as nobody reads 50 million images to start."""
    whole = hashlib.blake2b(digest_size=16)
    for path in files:
        stat = path.stat()
        whole.update(
            f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(
                errors="surrogateescape"
            )
        )
    return whole.hexdigest()


def has_begun(folder: Path) -> bool:
    """`folder` holds a job's output, finished or not."""
    return (folder / MANIFEST).is_file()


def check_same(folder: Path, fingerprint: Fingerprint) -> None:
    """Refuse to go on with another job than the one that `folder` holds.

    Raises:
        ConfigError: naming what differs, with both values.
    """
    text = (folder / MANIFEST).read_text()
    if not text:
        return  # a job was killed before it said what it was, and so before it wrote a row
    try:
        stored = json.loads(text)
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


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make `folder` and keep other jobs from it.

    The lock is the kernel's and ends with the process, however that ends.

    Raises:
        ConfigError: another process runs a job on it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / MANIFEST).open("a")
    except OSError as error:
        raise ConfigError(
            f"output {folder} cannot be written ({error.strerror}); name another folder"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another job is running on output {folder}; wait for it, or name another folder"
            ) from None
        yield


def claim(folder: Path, fingerprint: Fingerprint) -> None:
    """Say what the captions of `folder`, which is held, are made of, or see that it is the same.

    Raises:
        ConfigError: as `check_same`.
    """
    path = folder / MANIFEST
    if path.stat().st_size:
        check_same(folder, fingerprint)
        return
    # In place, for the lock is on this very file. A kill in the middle leaves no JSON, which is
    # refused, and no rows yet.
    path.write_text(json.dumps(fingerprint, indent=2) + "\n")


def unclaim(folder: Path) -> None:
    """Forget what the captions were made of, when they are removed."""
    os.truncate(folder / MANIFEST, 0)
