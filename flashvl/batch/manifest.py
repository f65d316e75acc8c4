"""What decides a job's captions, kept beside them: a job goes on only as it began.

_manifest.json          written first, before any row
_files-HASH.parquet     the input's files in the order of their rows; HASH is the manifest's `input`

An input may grow by files: theirs are the rows behind those that were there. The manifest is what
says so, in one write, as it names the list of files that holds.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.batch.inputs.listing import ListedFile
from flashvl.data.storage import Location
from flashvl.errors import ConfigError

MANIFEST = "_manifest.json"
FILES = "_files-"

Fingerprint = dict[str, str | int | float]
"""By name: settings as they are, contents as their hash."""

GROWING = ("input", "num_rows")
"""What of a fingerprint changes where the input has grown."""

_FILE = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("stamp", pa.string())])


def hash_listed(files: Sequence[ListedFile]) -> str:
    """Of all files' paths, sizes and stamps: nobody reads 50 million images first."""
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        line = f"{file.path}\0{file.size}\0{file.stamp}\n"
        whole.update(line.encode(errors="surrogateescape"))
    return whole.hexdigest()


def has_begun(folder: Location) -> bool:
    """`folder` holds a job's output, finished or not."""
    return (folder / MANIFEST).is_file()


def read_files(folder: Location) -> list[ListedFile]:
    """The files whose rows the job of `folder` captions, in the order of their rows.

    Raises:
        ConfigError: the manifest or the list is not readable.
    """
    name = f"{FILES}{_read(folder).get('input')}.parquet"
    try:
        with (folder / name).open() as file:
            found = pq.read_table(file, schema=_FILE).to_pydict()
    except (OSError, pa.ArrowException):
        raise _unreadable(folder / name, folder) from None
    paths = map(os.fsdecode, found["path"])
    return [ListedFile(*each) for each in zip(paths, found["size"], found["stamp"], strict=True)]


def check_files(
    folder: Location, known: Sequence[ListedFile], files: Sequence[ListedFile], may_grow: bool
) -> None:
    """See that the files that a job knows are there as they were.

    Args:
        files: those of the input as it is now.
        may_grow: others may be there, too.

    Raises:
        ConfigError: naming one that is not.
    """
    now = {file.path: file for file in files}
    for file in known:
        found = now.get(file.path)
        if found is None:
            problem = f"{file.path} is no longer in the input"
        elif found != file:
            told = (f"{each.size} bytes of {each.stamp}" for each in (file, found))
            problem = f"{file.path} changed since ({' -> '.join(told)})"
        else:
            continue
        raise ConfigError(
            f"output {folder} holds captions of other files: {problem}. Restore it, name another"
            " output, or give --restart to throw them away"
        )
    num_new = len(files) - len(known)
    if num_new and not may_grow:
        raise ConfigError(
            f"the input has {num_new} new files, as {files[len(known)].path}; give --append to"
            f" caption them, too, or name another output than {folder}"
        )


def check_same(folder: Location, fingerprint: Fingerprint, but_for: Sequence[str] = ()) -> None:
    """Refuse to go on with another job than the one that `folder` holds.

    Args:
        but_for: names that may differ.

    Raises:
        ConfigError: naming what differs, with both values.
    """
    stored = _read(folder)
    names = [*fingerprint, *(name for name in stored if name not in fingerprint)]
    differing = [
        name for name in names if stored.get(name) != fingerprint.get(name) and name not in but_for
    ]
    if differing:
        told = "; ".join(
            f"{name} was {stored.get(name)!r} and is {fingerprint.get(name)!r}"
            for name in differing
        )
        raise ConfigError(
            f"output {folder} holds another job's captions: {told}. Name another output, or give"
            " --restart to throw them away"
        )


def claim(
    folder: Location,
    fingerprint: Fingerprint,
    files: Sequence[ListedFile],
    known: Sequence[ListedFile] = (),
) -> None:
    """Say what the captions of `folder`, which is held, are made of, or see that it is the same.

    Args:
        files: the input's, of which `fingerprint` has the hash.
        known: those that the manifest named when the job was checked; the others are to be added.

    Raises:
        ConfigError: as `check_same`; or another job added files meanwhile.
    """
    if has_begun(folder):
        has_grown = _read(folder).get("input") == hash_listed(known)
        check_same(folder, fingerprint, GROWING if has_grown else ())
    list_name = f"{FILES}{fingerprint['input']}.parquet"
    if not has_begun(folder) or len(files) > len(known):
        _write(folder, list_name, fingerprint, files)
    _remove_lists(folder, but_for=list_name)


def _write(
    folder: Location, list_name: str, fingerprint: Fingerprint, files: Sequence[ListedFile]
) -> None:
    columns = [
        pa.array([os.fsencode(file.path) for file in files], pa.binary()),
        pa.array([file.size for file in files], pa.int64()),
        pa.array([file.stamp for file in files], pa.string()),
    ]
    data = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=_FILE), data)
    (folder / list_name).write(data.getvalue().to_pybytes())
    (folder / MANIFEST).write((json.dumps(fingerprint, indent=2) + "\n").encode())


def remove(folder: Location) -> None:
    """Remove what says what the captions of `folder` are made of."""
    (folder / MANIFEST).remove()
    _remove_lists(folder)


def _remove_lists(folder: Location, but_for: str = "") -> None:
    for name in folder.names():
        if name.startswith(FILES) and name != but_for:
            (folder / name).remove()


def _read(folder: Location) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / MANIFEST).read()))
    except (ValueError, TypeError):
        raise _unreadable(folder / MANIFEST, folder) from None


def _unreadable(file: Location, folder: Location) -> ConfigError:
    return ConfigError(f"{file} is not readable; give --restart to throw {folder} away")
