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
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ..._errors import WeightsError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
BUSY = (429, 500, 502, 503, 504)  # what a server answers that may soon answer otherwise
WAITS = (0.5, 1.0, 2.0)  # seconds before each further try
# How files of weights begin; a page that asks to log in, answered in their place, does not.
BEGINNINGS = {".pdparams": (b"\x80",), ".zip": (b"PK\x03\x04",)}
PAGE = re.compile(rb"\s*<[!?a-z]", re.IGNORECASE)

# How the name of a file begins that says the sha256 of its content, or the hash that git gives it.
NAMED_BY_HASH = re.compile("([0-9a-f]{64})(?:-|$)|([0-9a-f]{40})$")

_log = logging.getLogger("segzoo")
_Answer = TypeVar("_Answer")
_of_call: ContextVar[Path | None] = ContextVar("the cache of this call", default=None)
_may_fetch: ContextVar[bool] = ContextVar("whether what is not here may be fetched", default=True)


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

    def download(self, *, force: bool) -> Path:
        """Fetch it into the cache, `force`d to even if it is there."""
        ...


def obtain(place: Place, *, force: bool = False) -> Path:
    """The file, from the cache or downloaded once however many threads and processes want it; always checked.

    Args:
        force: download it even if it is here.
    """
    wanted = place.wanted
    path = None if force else place.cached()
    if path is not None and problem_of(path, wanted) is None:
        return path
    if not may_fetch():
        raise wanted.error("it is not on this machine", f"segzoo.create_model({wanted.name!r}, pretrained=True)")
    with _locked(wanted):
        path = None if force else place.cached()  # another process may have downloaded it meanwhile
        if path is not None:
            problem = problem_of(path, wanted)
            if problem is None:
                return path
            _remove(path, wanted, problem)
            _log.warning(
                "%s: the cached file %s %s; it was removed and is downloaded again", wanted.name, path, problem
            )
        path = place.download(force=force)
        problem = problem_of(path, wanted)
        if problem is not None:
            _remove(path, wanted, problem)
            raise wanted.error(
                f"the downloaded file {problem}, so it was removed",
                "try again; if it stays so, the file at its source is not the recorded one and must not be trusted",
            )
    return path


def set_aside(path: Path) -> Path | None:
    """Take a file that cannot be read out of the cache and keep it; returns where, None where nothing may be moved."""
    aside = path.with_name(f"{path.name}.unreadable")
    try:
        path.replace(aside)
    except OSError:
        return None
    return aside


@contextlib.contextmanager
def caching_in(folder: str | Path | None) -> Iterator[None]:
    """Inside, files of every source are kept and looked for in this folder; None: where the environment says."""
    try:
        token = _of_call.set(None if folder in (None, "") else Path(folder).expanduser())
    except (RuntimeError, TypeError) as error:  # the home of nobody, or no path
        raise WeightsError(f"cache_dir={folder!r} is no folder ({error}); give a path") from error
    try:
        yield
    finally:
        _of_call.reset(token)


@contextlib.contextmanager
def fetching_nothing() -> Iterator[None]:
    """Inside, nothing is asked for over the network: what no cache holds whole is a WeightsError."""
    token = _may_fetch.set(False)
    try:
        yield
    finally:
        _may_fetch.reset(token)


def may_fetch() -> bool:
    """False inside `fetching_nothing`."""
    return _may_fetch.get()


def folder_of_call() -> Path | None:
    """The folder that `caching_in` has set, None outside."""
    return _of_call.get()


def cache_dir() -> Path:
    """Where segzoo keeps files from URLs and Drive folders and what it has checked: the call's, SEGZOO_CACHE, or under
    the torch hub's directory."""
    if (of_call := folder_of_call()) is not None:
        return of_call
    folder = os.environ.get("SEGZOO_CACHE")
    try:
        return Path(folder or Path(torch.hub.get_dir()) / "segzoo").expanduser()
    except RuntimeError as error:  # the home of nobody
        raise WeightsError(f"SEGZOO_CACHE={folder} is no folder ({error}); set it to one") from error


def patiently(wanted: Wanted, ask: Callable[[], _Answer], status_of: Callable[[Exception], int | None]) -> _Answer:
    """What `ask` returns, asked again after a while where the server is busy; each wait is said.

    Args:
        status_of: the server's answer that an exception of `ask` stands for, None if it stands for none.
    """
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            status = status_of(error)
            if status not in BUSY:
                raise
            _log.warning("%s: the server answered %d; trying again in %.1f s", wanted.name, status, wait)
            time.sleep(wait)
    return ask()


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
    named = NAMED_BY_HASH.match(real.name)  # of the Hub's cache a large file by its sha256, a small one by git's hash
    expected = wanted.sha256 or (named and (named[1] or named[2]))
    if expected is None:
        return strange_beginning(real)
    known = {"path": str(real), "size": state.st_size, "mtime_ns": state.st_mtime_ns, "sha256": expected}
    memory = cache_dir() / "verified" / f"{digest_of_text(str(real))}.json"
    if _is_remembered(memory, known):
        return None
    kind = "sha256" if len(expected) == 64 else "git hash"
    digest = _digest(real, hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % state.st_size))
    if digest != expected:
        return f"has {kind} {digest} instead of {expected}"
    write_note(memory, known)
    return None


def _is_remembered(memory: Path, known: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(memory.read_text()) == known)
    except (OSError, ValueError):
        return False  # not checked yet


def write_note(memory: Path, known: dict[str, Any]) -> None:
    """Remember something that can be found out again, where that can be written."""
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        scratch = memory.with_name(f"{memory.name}.{os.getpid()}.{threading.get_ident()}")
        scratch.write_text(json.dumps(known))
        scratch.replace(memory)
    except OSError as error:
        _log.debug("%s cannot be written (%s); it will be found out again next time", memory, error)


def digest_of_text(text: str) -> str:
    """A short name for what may be long and hold any character."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def strange_beginning(path: Path) -> str | None:
    """Of a file that no hash is known of: that it is no weights file at all, None if it may be one."""
    with path.open("rb") as file:
        start = file.read(200)
    if PAGE.match(start) and b"\0" not in start:
        return "is a web page, perhaps one that asks to log in, and no weights file"
    beginnings = BEGINNINGS.get(path.suffix)
    if beginnings is not None and not start.startswith(beginnings):
        return f"does not begin as a {path.suffix} file does"
    return None


def _remove(path: Path, wanted: Wanted, problem: str) -> None:
    """Take a wrong file out of use: the name in the cache, and the file that it points to."""
    real = path.resolve()
    try:
        path.unlink(missing_ok=True)
        real.unlink(missing_ok=True)
    except OSError as error:
        raise wanted.error(
            f"the cached file {path} {problem}, and it cannot be removed ({error})",
            "delete it by hand, or set HF_HOME or SEGZOO_CACHE to a folder that you may write to",
        ) from error


# --- lock -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(wanted: Wanted) -> Iterator[None]:
    from filelock import FileLock  # a dependency of huggingface_hub

    path = cache_dir() / "locks" / f"{digest_of_text(wanted.source + wanted.file)}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise disk_error(wanted, error, cache_dir(), "SEGZOO_CACHE") from error
        _log.debug("%s cannot be written (%s); what is cached is used without a lock", path, error)
        yield
        return
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
    """A disk that is full or refuses writing, in segzoo's words; `variable` sets the folder, if not the call itself."""
    variable = variable if folder_of_call() is None else "cache_dir"
    if error.errno in DISK_FULL:
        return wanted.error(f"the disk of {folder} is full ({error})", f"make room, or set {variable} to a larger disk")
    return wanted.error(f"{folder} cannot be written ({error})", f"set {variable} to a folder that you may write to")


def offline_error(wanted: Wanted, manually: str) -> WeightsError:
    """HF_HUB_OFFLINE is set, and the file is not here."""
    return wanted.error(
        "it is not in the cache, and offline mode is on (HF_HUB_OFFLINE)",
        f"unset HF_HUB_OFFLINE and run again once with a network, {manually}",
    )
