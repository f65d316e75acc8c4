"""The record of everything that decides a job's results, so that it resumes only unchanged.

_manifest.json          written first, before any row
_files-HASH.parquet     the input's files in the order of their rows; HASH is the manifest's `input`

An input may grow by files, whose rows follow those that were there. As the manifest names the list
of files that counts, writing it adds all the new files at once.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from flashvl.data.inputs.listing import ListedFile
from flashvl.data.storage import Location
from flashvl.errors import ConfigError

MANIFEST = "_manifest.json"
FILES = "_files-"

Fingerprint = dict[str, str | int | float]
"""What decides the results, by name: settings as they are, contents as hashes."""

GROWING = ("input", "num_rows")
"""Names in a fingerprint whose values change when the input grows."""

_FILE = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("stamp", pa.string())])


def hash_listed(files: Sequence[ListedFile]) -> str:
    """A hash of the files' paths, sizes and stamps; reading 50 million images takes too long."""
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        line = f"{file.path}\0{file.size}\0{file.stamp}\n"
        whole.update(line.encode(errors="surrogateescape"))
    return whole.hexdigest()


def has_begun(folder: Location) -> bool:
    """Whether `folder` holds a job's output, finished or not."""
    return (folder / MANIFEST).is_file()


def read_files(folder: Location) -> list[ListedFile]:
    """The files whose rows the job of `folder` answers, in the order of their rows.

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
    """Check that the files that a job knows are there, unchanged.

    Args:
        files: the input's files now.
        may_grow: the input may have further files.

    Raises:
        ConfigError: a file is missing, changed or new; the error names it.
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
            f"output {folder} holds results of other files: {problem}. Restore it, name another"
            " output, or give --restart to throw them away"
        )
    num_new = len(files) - len(known)
    if num_new and not may_grow:
        raise ConfigError(
            f"the input has {num_new} new files, as {files[len(known)].path}; give --append to"
            f" add their rows, or name another output than {folder}"
        )


def check_same(
    folder: Location,
    fingerprint: Mapping[str, Any],
    may_differ: Sequence[str] = (),
    remedy: str = "Name another output, or give --restart to throw them away",
) -> None:
    """Refuse to resume the job in `folder` as another job.

    Args:
        may_differ: names whose values may differ.
        remedy: what the user can do.

    Raises:
        ConfigError: the fingerprints differ; the error names where, with both values.
    """
    stored = _read(folder)
    names = [*fingerprint, *(name for name in stored if name not in fingerprint)]
    differing = [
        name
        for name in names
        if stored.get(name) != fingerprint.get(name) and name not in may_differ
    ]
    if differing:
        told = "; ".join(
            f"{name} was {stored.get(name)!r} and is {fingerprint.get(name)!r}"
            for name in differing
        )
        raise ConfigError(f"output {folder} holds another job's results: {told}. {remedy}")


def claim(
    folder: Location,
    fingerprint: Fingerprint,
    files: Sequence[ListedFile],
    known: Sequence[ListedFile] = (),
) -> None:
    """Write the manifest of `folder`, whose lock this job holds, or check that it is the same.

    Args:
        files: the input's files, whose hash `fingerprint` has.
        known: files that the manifest named when the job was checked; the others are added to it.

    Raises:
        ConfigError: the folder holds another job, or another job has added files meanwhile.
    """
    if has_begun(folder):
        has_grown = _read(folder).get("input") == hash_listed(known)
        check_same(folder, fingerprint, GROWING if has_grown else ())
    list_name = f"{FILES}{fingerprint['input']}.parquet"
    if not has_begun(folder) or len(files) > len(known):
        _write(folder, list_name, fingerprint, files)
    _remove_lists(folder, except_for=list_name)


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
    write_manifest(folder, fingerprint)


def write_manifest(folder: Location, fingerprint: Mapping[str, Any]) -> None:
    """Begin the job of `folder`, whose lock this job holds."""
    (folder / MANIFEST).write((json.dumps(fingerprint, indent=2) + "\n").encode())


def remove(folder: Location) -> None:
    """Remove the manifest of `folder` and its lists of files."""
    (folder / MANIFEST).remove()
    _remove_lists(folder)


def _remove_lists(folder: Location, except_for: str = "") -> None:
    for name in folder.names():
        if name.startswith(FILES) and name != except_for:
            (folder / name).remove()


def _read(folder: Location) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / MANIFEST).read()))
    except (ValueError, TypeError):
        raise _unreadable(folder / MANIFEST, folder) from None


def _unreadable(file: Location, folder: Location) -> ConfigError:
    return ConfigError(f"{file} is not readable; give --restart to throw {folder} away")
