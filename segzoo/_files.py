"""Files that appear whole or not at all, and that take the place of others only where that is asked for."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from ._errors import SaveError, SegzooError

# Of a folder, the files that are taken for images.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2", ".avif", ".heic")
)


def write_files(writers: Mapping[Path, Callable[[Path], object]], *, overwrite: bool) -> None:
    """Write files that belong together, with the folders that they need: all of them, or none.

    Any number of threads and processes may write the same places: each file is then one writer's, whole.

    Args:
        writers: place of a file -> what writes its content to the path that it is given.
        overwrite: take the place of files that exist; each is replaced in one step.

    Raises:
        SaveError: a file exists, or cannot be written.
        SegzooError: as a writer raises it.
    """
    if not overwrite and (taken := next((path for path in writers if os.path.lexists(path)), None)):
        raise _exists(taken)
    partials: dict[Path, Path] = {}
    path = Path()
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Short, so that a name which the disk can hold is not too long while it is written.
            partials[path] = path.with_name(f".{uuid.uuid4().hex}.partial")
            write(partials[path])
        if overwrite:
            for path, partial in partials.items():
                partial.replace(path)
        else:
            _place_all(partials)
    except (OSError, ValueError) as error:  # ValueError: a character that no name can have
        if isinstance(error, SegzooError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise SaveError(f"{path} cannot be written ({reason}); choose another place") from error
    finally:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _place_all(partials: Mapping[Path, Path]) -> None:
    """Move files to places that must be free; if one is not, those already there are taken back."""
    placed: list[Path] = []
    try:
        for path, partial in partials.items():
            _place(partial, path)
            placed.append(path)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise


def _place(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # unlike a rename, never over a file that has appeared meanwhile
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise _exists(path) from None
        partial.replace(path)


def _exists(path: Path) -> SaveError:
    return SaveError(f"{path} exists; choose another place, or pass overwrite=True")
