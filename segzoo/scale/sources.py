"""Which images an archive holds: files of a folder or list, members of tar shards, rows of Parquet files.

They are named one at a time and not read, so that an archive may be of any size.
"""

from __future__ import annotations

import functools
import glob
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from .._errors import ImageError, SegzooError, first_line
from .._files import IMAGE_SUFFIXES
from ..preprocess import is_url
from .batches import COLUMNS, image_columns

if TYPE_CHECKING:
    import pyarrow

PARQUET_SUFFIXES = frozenset((".parquet", ".pq"))
PACKED_SUFFIXES = frozenset((".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z"))
SHARD_SUFFIXES = PARQUET_SUFFIXES | {".tar"}


class Item(NamedTuple):
    """An image of an archive, or a shard that cannot be read. Plain values: JSON holds them."""

    image: str  # its name, which no other has
    file: str  # absolute path, or URL
    group: int = -1  # of a Parquet file, the row group
    offset: int = -1  # of a Parquet file, the row of the group; of a tar shard, the first byte
    size: int = -1  # bytes, of a tar shard
    column: str = ""  # of a Parquet file
    error: str = ""  # why there is nothing to read

    @property
    def place(self) -> PurePosixPath:
        """Of its mask: the image's name with the suffix .png, and nothing in it that leads out of a folder."""
        path = unquote("/".join(urlsplit(self.image)[1:3])) if is_url(self.image) else self.image
        parts = [part.replace("\0", "") for part in path.split("/")]
        inside = PurePosixPath(*(part for part in parts if part not in ("", ".", "..")) or ("image",))
        stem = inside.stem if inside.suffix.lower() in IMAGE_SUFFIXES else inside.name
        return inside.with_name(f"{stem}.png")


def find_items(source: str | Path, column: str | None = None) -> Iterator[Item]:
    """The images of a source in a fixed order, each named once.

    Args:
        source: folder (with all its folders), wildcard, `.parquet` file, `.tar` shard, image, or a text file that lists
            any of these but folders and wildcards, one a line, relative to the list's folder. The images of a shard
            have its name as their folder.
        column: of Parquet files, where there are several columns of images or one with another name; of tar shards,
            the ending of the images of a sample, such as "jpg" (default: all images).

    Raises:
        SegzooError: no such source; a Parquet file without the column; a shard that is compressed.
    """
    seen: set[str] = set()
    for path, root in _files(str(source)):
        for item in _in_file(path, root, column):
            if item.image not in seen:
                seen.add(item.image)
                yield item


def root_of(source: str | Path) -> str:
    """The folder below which a source lies, absolute."""
    text = str(source)
    if os.path.lexists(text):
        return os.path.abspath(text if os.path.isdir(text) else os.path.dirname(os.path.abspath(text)))
    fixed = text[: min(text.find(mark) for mark in "*?[" if mark in text)] if _is_wildcard(text) else text
    return os.path.abspath(os.path.dirname(fixed))


def read_image(item: Item) -> str | bytes:
    """What `predict` takes: a path or URL, or the bytes of the image's file.

    Raises:
        ImageError: the shard cannot be read there.
    """
    if item.error:
        raise ImageError(item.error)
    if item.offset < 0:
        return item.file
    try:
        if item.group < 0:
            return _bytes_of(item)
        value = _row_group(item.file, item.group, item.column)[item.offset].as_py()
    except (OSError, ValueError, IndexError) as error:  # pyarrow's own are of these
        raise ImageError(f"{item.image} cannot be read ({first_line(error)})") from error
    if isinstance(value, dict):  # as `datasets` stores images
        value = value.get("bytes") or value.get("path")
    if not value:
        raise ImageError(f"{item.image} is empty")
    if isinstance(value, str) and not is_url(value):
        return os.path.join(os.path.dirname(item.file), value)
    return value


def _bytes_of(item: Item) -> bytes:
    with open(item.file, "rb") as file:
        if os.fstat(file.fileno()).st_size < item.offset + item.size:  # a header may say any size
            raise ImageError(f"{item.image}: the shard ends within it")
        file.seek(item.offset)
        return file.read(item.size)


@functools.lru_cache(maxsize=1)  # the images of a group come one after the other
def _row_group(file: str, group: int, column: str) -> pyarrow.ChunkedArray:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(group, columns=[column]).column(0)


def _is_wildcard(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _files(source: str) -> Iterator[tuple[str, str]]:
    """(path or URL, folder that names are relative to), in a fixed order."""
    root = root_of(source)
    if os.path.isdir(source):
        yield from ((path, root) for path in _walk(root))
    elif os.path.lexists(source):
        suffix = os.path.splitext(source)[1].lower()
        if suffix in IMAGE_SUFFIXES | SHARD_SUFFIXES | PACKED_SUFFIXES:
            yield os.path.abspath(source), root
        else:
            yield from ((path, root) for path in _listed(source, root))
    elif _is_wildcard(source):
        for path in sorted(glob.glob(source, recursive=True)):
            if not os.path.isdir(path):
                yield os.path.abspath(path), root
    else:
        raise SegzooError(f"{source}: no such folder, list file, Parquet file or tar shard; check the path")


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in IMAGE_SUFFIXES | SHARD_SUFFIXES:
                yield os.path.join(parent, name)


def _listed(source: str, root: str) -> Iterator[str]:
    with open(source, "rb") as file:
        for line in file:
            if b"\0" in line:
                raise SegzooError(f"{source} is no list of images; give a text file with a path a line")
            name = os.fsdecode(line.strip())
            if name:
                yield name if is_url(name) else os.path.normpath(os.path.join(root, name))


def _in_file(path: str, root: str, column: str | None) -> Iterator[Item]:
    suffix = os.path.splitext(path)[1].lower()
    if is_url(path):
        yield Item(path, path)
    elif suffix in PACKED_SUFFIXES:
        raise SegzooError(f"{path} is compressed; unpack it, because its images are read in any order")
    elif suffix == ".tar":
        yield from _in_tar(path, _name(path, root), column)
    elif suffix in PARQUET_SUFFIXES:
        yield from _in_parquet(path, _name(path, root), column)
    else:
        yield Item(_name(path, root), path)


def _name(path: str, root: str) -> str:
    """Of a file: its path from the root, of one elsewhere the whole; what is no text is escaped."""
    inside = os.path.relpath(path, root) if path.startswith(os.path.join(root, "")) else path.lstrip(os.sep)
    return _text(inside.replace(os.sep, "/"))


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _in_tar(path: str, name: str, ending: str | None) -> Iterator[Item]:
    """Members that are images; where the shard breaks off, an item says so."""
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                inside = PurePosixPath(member.name)
                wanted = inside.suffix.lower() in IMAGE_SUFFIXES
                if ending is not None:
                    wanted = inside.name.endswith("." + ending.lstrip("."))
                if wanted and member.isfile() and not inside.name.startswith("."):
                    image = f"{name}/{_text(member.name)}"
                    yield Item(image, path, offset=member.offset_data, size=member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Item(name, path, error=f"{path} cannot be read to its end ({first_line(error)})")


def _in_parquet(path: str, name: str, column: str | None) -> Iterator[Item]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as parquet:
            found, metadata = _image_column(parquet.schema_arrow, path, column), parquet.metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except (OSError, ValueError) as error:
        if isinstance(error, SegzooError):
            raise
        yield Item(name, path, error=f"{path} cannot be read ({first_line(error)})")
        return
    row = 0
    for group, size in enumerate(sizes):
        for offset in range(size):
            yield Item(f"{name}/{row}", path, group, offset, column=found)
            row += 1


def _image_column(schema: pyarrow.Schema, path: str, column: str | None) -> str:
    """Raises SegzooError, which is said to the user at once: there is none, or several."""
    import pyarrow.types as kinds

    def holds_images(kind: Any) -> bool:
        is_text = kinds.is_string(kind) or kinds.is_large_string(kind)
        return is_text or kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_struct(kind)

    names = [column] if column is not None else image_columns(schema.names)
    have = ", ".join(schema.names) or "none"
    if len(names) != 1 or names[0] not in schema.names:
        wanted = f"column {column}" if column is not None else f"one column of images ({', '.join(COLUMNS)})"
        raise SegzooError(f"{path} has not the {wanted}; its columns are {have}: name the one of images")
    if not holds_images(schema.field(names[0]).type):
        kind = schema.field(names[0]).type
        raise SegzooError(f"{path}: column {names[0]} is {kind}; it must hold files of images (binary) or paths")
    return names[0]
