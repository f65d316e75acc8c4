"""The input of a captioning job, which is found, counted and checked before anything starts.

A source takes the number of its rows from Parquet footers, tar headers, lines or the list of files,
never from the pipeline, so that the closing audit compares two independent counts.
"""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from flashvl.data.inputs.images import IMAGE_SUFFIXES, ImageFiles
from flashvl.data.inputs.jsonl import find_lines
from flashvl.data.inputs.kept import check_keepable
from flashvl.data.inputs.listing import REMEDY, ListedFile, Listing, list_files
from flashvl.data.inputs.parquet import ParquetFiles, check_alike, read_footers
from flashvl.data.inputs.source import Source
from flashvl.data.inputs.tar import find_tars
from flashvl.data.limits import DEFAULT_LIMITS, ImageLimits
from flashvl.data.schema import find_image_columns, is_paths
from flashvl.errors import ConfigError

_COMPRESSED = ("", ".gz", ".bz2", ".xz")
SUFFIXES = {
    "parquet": (".parquet",),
    "tar": (*(f".tar{end}" for end in _COMPRESSED), ".tgz", ".tbz2", ".txz"),
    "image": IMAGE_SUFFIXES,
    "jsonl": tuple(f"{start}{end}" for start in (".jsonl", ".ndjson") for end in _COMPRESSED),
}
"""Names' endings of each kind of input; in a folder with several kinds, the first one is read."""
NAMED_SUFFIXES = tuple(f".json{end}" for end in _COMPRESSED)
"""Endings of JSON Lines where files are named; in a folder, such files may hold anything."""


def find_source(
    text: str,
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    prompt_column: str | None = None,
    keep: Sequence[str] = (),
    follow_paths: bool = True,
    image_limits: ImageLimits = DEFAULT_LIMITS,
    known: Sequence[ListedFile] = (),
) -> Source:
    """The rows of the input that `text` names.

    `text` is a file, a folder, a glob or a brace pattern. A folder is read as the first kind of
    which it holds a file, at any depth: Parquet, tars, image files, JSON Lines. Names that begin
    with a dot (and, except for images, with `_`) are left out, as is usual.

    Args:
        follow_paths: read the files that a table's rows name, wherever they are.
        image_limits: images beyond these need not be read.
        known: files whose rows come first, in this order, where they still exist.

    Raises:
        ConfigError: `text` names no input, an ambiguous one, or one that is not an image table.
    """
    kind, listing = _choose(text, list_files(text).in_order_of(known))
    names = {"image": image_column, "id": id_column, "prompt": prompt_column}
    if kind == "image":
        if any(names.values()) or keep:
            raise ConfigError(
                f"input {text!r} is image files, which have no columns; leave out"
                " --image-column, --id-column, --prompt-column and --keep"
            )
        return ImageFiles(listing=listing)
    if kind == "tar":
        return find_tars(listing, **names, kept=keep, image_limits=image_limits)
    if kind == "jsonl":
        return find_lines(
            listing, **names, kept=keep, follow_paths=follow_paths, image_limits=image_limits
        )
    tables = read_footers(listing)
    first = tables[0]
    columns = find_image_columns(
        first.schema, source=first.path, **names, kept=keep, partition=first.partition
    )
    check_alike(tables, columns)
    check_keepable(pa.schema(map(first.schema.field, columns.kept)), first.path)
    if not follow_paths and is_paths(first.schema.field(columns.image or "").type):
        raise ConfigError(
            f"{first.path}: column {columns.image!r} holds paths, which may not be followed"
            " here; put the images' bytes into the table"
        )
    columns = replace(columns, follows_paths=follow_paths)
    return ParquetFiles(listing=listing, tables=tables, columns=columns)


def _choose(text: str, listing: Listing) -> tuple[str, Listing]:
    """The kind of input, and its files.

    Raises:
        ConfigError: there are no files to read, or tars beside files of another kind.
    """
    found: dict[str, list[ListedFile]] = {}
    for file in listing.files:
        if (kind := _kind(file, listing)) is not None:
            found.setdefault(kind, []).append(file)
    if not found:
        first = f" ({listing.files[0].path} is not one)" if listing.is_named else ""
        raise ConfigError(
            f"input {text!r} holds no *.parquet, *.tar or *.jsonl and no image file"
            f" ({', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}){first}; {REMEDY}"
        )
    if "tar" in found and (rival := next((kind for kind in found if kind != "tar"), None)):
        counts = f"{len(found['tar'])} tars and {len(found[rival])} files of {rival}"
        raise ConfigError(
            f"input {text!r} holds {counts}: which are meant? Name them by a glob, as"
            f" {listing.root}/*.tar"
        )
    first_kind = next(kind for kind in SUFFIXES if kind in found)
    return first_kind, listing.only(found[first_kind])


def _kind(file: ListedFile, listing: Listing) -> str | None:
    """A file's kind, by its name; None: it is not read, or it or its folder is hidden."""
    name = file.path.lower()
    kind = next((kind for kind, suffixes in SUFFIXES.items() if name.endswith(suffixes)), None)
    if listing.is_named:
        return kind or ("jsonl" if name.endswith(NAMED_SUFFIXES) else None)
    is_hidden = kind != "image" and "/_" in f"/{listing.name(file)}"
    return None if is_hidden else kind
