"""Zip archives that may lie: opened only if their list of files is of bearable length and means one thing alone."""

from __future__ import annotations

import os
import struct
import zipfile
from pathlib import Path

# The records at the end: signature, numbers of disks and entries, then size and place of the list of files, comment.
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
UNKNOWN = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)  # entries, size and place, where they stand in the large record
LOCATOR64 = struct.Struct("<4sLQL")
MAX_LIST = 2 << 20  # bytes; the list of ten thousand tensors takes about one million


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive with its list of files.

    Raises:
        BadZipFile: no archive, a list that is too long, or two files of one name.
    """
    size = _list_size(path)
    if size > MAX_LIST:
        raise zipfile.BadZipFile(f"its list of files takes {size:,} bytes")
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    if len(set(names)) != len(names):
        archive.close()
        raise zipfile.BadZipFile("two files in it have one name")
    return archive


def _list_size(path: Path) -> int:
    """Bytes of the list of files. The end record has to end the file, so that all readers find the same one."""
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - END.size - LOCATOR64.size - END64.size))
        tail = file.read()
    if tail[-END.size : -END.size + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as an archive does")
    count, size, place = END.unpack(tail[-END.size :])[4:7]
    if tail[-END.size - LOCATOR64.size :][:4] == b"PK\6\7":
        if len(tail) < END64.size + LOCATOR64.size + END.size or tail[:4] != b"PK\6\6":
            raise zipfile.BadZipFile("it does not end as a large archive does")
        large = END64.unpack(tail[: END64.size])[7:]
        if any(a not in (b, most) for a, b, most in zip((count, size, place), large, UNKNOWN, strict=True)):
            raise zipfile.BadZipFile("its end names two lists of files")
        size = large[1]
    return size
