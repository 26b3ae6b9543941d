"""What every source of files shares: obtain once, verify always, lock against others, and refuse a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock

from ..._errors import WeightsError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger("segzoo")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A file to get: what messages and checks need to know about it."""

    name: str  # of the model
    file: str  # its name, or names to be tried in order
    source: str  # "org/name @ revision", or URL
    terms: str  # page of the licence
    sha256: str | None = None
    size: int | None = None  # bytes

    def error(self, cause: str, next_step: str) -> WeightsError:
        return WeightsError(
            f"cannot get the weights of {self.name}: {cause}. File: {self.file} of {self.source}; "
            f"licence: {self.terms}. Next step: {next_step}"
        )


class Place(Protocol):
    """Where one wanted file comes from."""

    @property
    def wanted(self) -> Wanted: ...

    def cached(self) -> Path | None:
        """The file, if it is here and need not be asked for."""
        ...

    def download(self) -> Path:
        """Fetch it into the cache."""
        ...


def obtain(place: Place) -> Path:
    """The file, from the cache or downloaded once however many threads and processes want it; always checked."""
    wanted = place.wanted
    path = place.cached()
    if path is not None and problem_of(path, wanted) is None:
        return path
    with _locked(wanted):
        path = place.cached()  # another process may have downloaded it meanwhile
        if path is not None:
            problem = problem_of(path, wanted)
            if problem is None:
                return path
            _remove(path)
            _log.warning(
                "%s: the cached file %s %s; it was removed and is downloaded again", wanted.name, path, problem
            )
        path = place.download()
        problem = problem_of(path, wanted)
        if problem is not None:
            _remove(path)
            raise wanted.error(
                f"the downloaded file {problem}, so it was removed",
                "try again; if it stays so, the file at its source is not the recorded one and must not be trusted",
            )
    return path


def cache_dir() -> Path:
    """Where segzoo keeps files from URLs and what it has checked: SEGZOO_CACHE, or under the torch hub's directory."""
    return Path(os.environ.get("SEGZOO_CACHE") or Path(torch.hub.get_dir()) / "segzoo").expanduser()


# --- verify ---------------------------------------------------------------------------------------------------------


def problem_of(path: Path, wanted: Wanted) -> str | None:
    """What is wrong with a file, None if nothing. A hash that was right is remembered by size and time stamp."""
    real = path.resolve()
    try:
        state = real.stat()
    except FileNotFoundError:  # removed by a process that found it wrong
        return "has vanished"
    if wanted.size is not None and state.st_size != wanted.size:
        return f"has {state.st_size} bytes instead of {wanted.size}"
    # The Hub's cache names a large file by its sha256.
    expected = wanted.sha256 or (real.name if re.fullmatch("[0-9a-f]{64}", real.name) else None)
    if expected is None:
        return None
    known = {"path": str(real), "size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": expected}
    memory = cache_dir() / "verified" / f"{digest_of_text(str(real))}.json"
    try:
        if json.loads(memory.read_text()) == known:
            return None
    except (OSError, ValueError):
        pass  # not checked yet
    digest = _sha256(real)
    if digest != expected:
        return f"has sha256 {digest} instead of {expected}"
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        scratch = memory.with_name(f"{memory.name}.{os.getpid()}.{threading.get_ident()}")
        scratch.write_text(json.dumps(known))
        scratch.replace(memory)
    except OSError as error:
        _log.debug("%s cannot be written (%s); the file will be checked again next time", memory, error)
    return None


def digest_of_text(text: str) -> str:
    """A short name for what may be long and hold any character."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Take a wrong file out of use: the name in the cache, and the file that it points to."""
    real = path.resolve()
    path.unlink(missing_ok=True)
    real.unlink(missing_ok=True)


# --- lock -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(wanted: Wanted) -> Iterator[None]:
    path = cache_dir() / "locks" / f"{digest_of_text(wanted.source + wanted.file)}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    except OSError as error:
        raise disk_error(wanted, error, cache_dir(), "SEGZOO_CACHE") from error
    try:
        yield
    finally:
        lock.release()


# --- the disk -------------------------------------------------------------------------------------------------------


def check_room(wanted: Wanted, size: int | None, folder: Path, variable: str) -> None:
    """Refuse before the download what cannot fit on the disk of `folder`, which `variable` sets; `size` in bytes."""
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        full = OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free")
        raise disk_error(wanted, full, folder, variable)


def disk_error(wanted: Wanted, error: OSError, folder: Path, variable: str) -> WeightsError:
    """A disk that is full or refuses writing, in segzoo's words."""
    if error.errno in DISK_FULL:
        return wanted.error(f"the disk of {folder} is full ({error})", f"make room, or set {variable} to a larger disk")
    return wanted.error(f"{folder} cannot be written ({error})", f"set {variable} to a folder that you may write to")


def offline_error(wanted: Wanted, manually: str) -> WeightsError:
    """HF_HUB_OFFLINE is set, and the file is not here."""
    return wanted.error(
        "it is not in the cache, and offline mode is on (HF_HUB_OFFLINE)",
        f"unset HF_HUB_OFFLINE and run again once with a network, {manually}",
    )
