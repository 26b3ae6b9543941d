"""Which images a command line names: files, folders, wildcards that the shell left alone, URLs, and lists on stdin."""

from __future__ import annotations

import dataclasses
import glob
import os
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from .._errors import SegzooError
from .._files import IMAGE_SUFFIXES


@dataclasses.dataclass(frozen=True)
class Input:
    """An image that was named."""

    source: str  # path or URL
    place: PurePath  # of its results in the folder of results, without suffix
    raster: bool = False  # read in windows by `segzoo.scale.segment_raster`


def find_inputs(arguments: Sequence[str], *, recursive: bool, output: Path) -> list[Input]:
    """The images that the arguments name, in their order; those of a folder and of wildcards by name.

    Args:
        recursive: also take what lies in the folders of a folder; the results then lie in such folders, too.
        output: folder of results, which is no folder of images.

    Raises:
        SegzooError: a folder, a wildcard or a list without images.
    """
    return [item for argument in arguments for item in _expand(argument, recursive, output)]


def _expand(argument: str, recursive: bool, output: Path) -> Iterator[Input]:
    if argument == "-":
        for line in _listed_on_stdin():
            yield from _expand(line, recursive, output)
    elif is_url(argument):
        yield Input(argument, PurePath(_stem_of_url(argument)))
    elif os.path.isdir(argument):
        yield from _in_folder(argument, recursive, output)
    elif not os.path.lexists(argument) and any(character in argument for character in "*?["):
        found = sorted(path for path in glob.glob(argument, recursive=True) if not os.path.isdir(path))
        if not found:
            raise SegzooError(f"{argument} matches no file; check the path")
        yield from map(_file, found)
    else:
        yield _file(argument)


def is_url(argument: str) -> bool:
    return argument.lower().startswith(("http://", "https://"))


def _file(path: str) -> Input:
    return Input(path, PurePath(Path(path).stem or "image"))


def _stem_of_url(url: str) -> str:
    try:
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    except ValueError:  # no address; fetching it will say so
        path = ""
    return PurePath(path.replace("\0", "")).stem or "image"


def _listed_on_stdin() -> list[str]:
    """Lines, or what `find -print0` separates by zeros, as names of files of any bytes."""
    data = sys.stdin.buffer.read()
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    names = [os.fsdecode(line) for line in lines if line.strip()]
    if not names:
        raise SegzooError("-: no paths came on standard input; give one a line")
    if "-" in names:
        raise SegzooError("-: the list on standard input names itself")
    return names


def _in_folder(folder: str, recursive: bool, output: Path) -> Iterator[Input]:
    results = os.path.realpath(output)
    empty = True
    for parent, folders, files in os.walk(folder):
        inside = (name for name in folders if not name.startswith("."))
        wanted = sorted(name for name in inside if os.path.realpath(os.path.join(parent, name)) != results)
        folders[:] = wanted if recursive else []
        below = PurePath(os.path.relpath(parent, folder))
        for name in sorted(files):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                continue
            empty = False
            yield Input(os.path.join(parent, name), below / PurePath(name).stem)
    if empty:
        hint = "" if recursive else "; --recursive looks into the folders in it, too"
        raise SegzooError(f"{folder} has no image files{hint}")
