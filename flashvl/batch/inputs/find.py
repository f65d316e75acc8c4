"""What a captioning job reads, found, counted and checked before anything starts.

A source knows its rows' number from Parquet footers or from the file list, never from the pipeline,
so that the closing audit compares two independent counts.
"""

import glob
import posixpath
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from flashvl.batch.inputs.images import IMAGE_SUFFIXES, ImageFolder
from flashvl.batch.inputs.parquet import ParquetFiles, check_alike, read_footers
from flashvl.batch.inputs.source import Source, hash_stats
from flashvl.batch.kept import check_keepable
from flashvl.data.schema import find_image_columns, is_paths
from flashvl.data.storage import Location, locate, walk
from flashvl.errors import ConfigError

REMEDY = "name a Parquet file, a folder or glob of *.parquet, or a folder of images"


def find_source(
    text: str,
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    prompt_column: str | None = None,
    keep: Sequence[str] = (),
    follow_paths: bool = True,
) -> Source:
    """The rows that `text` names: a Parquet file, a folder or glob of them, or a folder of images.

    A folder with a `*.parquet` anywhere below it is a folder of Parquet; else its image files are
    the rows. Names that begin with a dot (and, for Parquet, `_`) are left out, as everywhere.

    Args:
        follow_paths: read the files that a table's rows name, wherever they are.

    Raises:
        ConfigError: there is nothing, or not an image table.
    """
    location = locate(text)
    store = location.store
    if location.is_folder():
        tables = [
            (path, info)
            for path, info in walk(location, hidden=(".", "_"))
            if path.lower().endswith(".parquet")
        ]
        if not tables:
            if image_column or id_column or prompt_column or keep:
                raise ConfigError(
                    f"input {text!r} is a folder of images, which has no columns; leave out"
                    " --image-column, --id-column, --prompt-column and --keep"
                )
            return _find_images(location, text)
    elif location.is_file():
        tables = [(location.path, store.info(location.path))]
    else:
        matches = store.glob(location.path) if glob.has_magic(text) else []
        tables = [(path, store.info(path)) for path in sorted(matches) if store.isfile(path)]
        if not tables:
            raise ConfigError(f"input {text!r} does not exist, nor does it match a file; {REMEDY}")
    for path, _ in tables:
        if not path.lower().endswith(".parquet"):
            raise ConfigError(f"input {text!r}: {path} does not end in .parquet; {REMEDY}")
    files = read_footers(store, tables, _root(location))
    columns = find_image_columns(
        files[0].schema,
        source=files[0].path,
        image=image_column,
        id=id_column,
        prompt=prompt_column,
        kept=keep,
        partition=files[0].partition,
    )
    check_alike(files, columns)
    check_keepable(pa.schema(map(files[0].schema.field, columns.kept)), files[0].path)
    if not follow_paths and is_paths(files[0].schema.field(columns.image).type):
        raise ConfigError(
            f"{files[0].path}: column {columns.image!r} holds paths, which may not be followed"
            " here; put the images' bytes into the table"
        )
    columns = replace(columns, follows_paths=follow_paths)
    return ParquetFiles(store=store, files=files, columns=columns)


def _root(location: Location) -> str:
    """The folder that an input names, that its glob begins in, or that its file is in."""
    if location.is_folder():
        return location.path
    steps = location.path.split("/")
    first = next((n for n, step in enumerate(steps) if glob.has_magic(step)), len(steps) - 1)
    if location.is_file():
        first = len(steps) - 1
    return "/".join(steps[:first]) or "/"


def _find_images(folder: Location, text: str) -> ImageFolder:
    files = {
        path: info
        for path, info in walk(folder, hidden=(".",))
        if posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES
    }
    if not files:
        known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        raise ConfigError(
            f"input {text!r} holds no *.parquet and no image file ({known}); {REMEDY}"
        )
    stats = ((path, info["size"], str(info["mtime"])) for path, info in files.items())
    return ImageFolder(folder=folder, files=list(files), file_hash=hash_stats(stats))
