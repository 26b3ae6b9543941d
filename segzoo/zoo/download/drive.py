"""Files of a public Google Drive folder, through gdown: found by name, proven by loading, kept under their hash.

A Drive folder has no revision and says no hash, and what its files are called is not recorded anywhere: a row has a
pattern, and of the files whose path fits it the first is taken that the row's model loads strictly. That is the only
proof there is. gdown reads Drive's web pages, which may change at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from tqdm import tqdm

from ..._errors import WeightsError
from ...models.eft_weights import DRIVE_FOLDER
from ...models.family import VARIANTS
from ..checkpoint import build_with_weights
from .cache import (
    Wanted,
    cache_dir,
    check_room,
    digest_of_text,
    disk_error,
    obtain,
    offline_error,
    patiently,
    strange_beginning,
    write_note,
)

if TYPE_CHECKING:
    from ...models.rows import PretrainedCfg

OLDEST_GDOWN = (6, 5)  # the first with a timeout of the folder's page, and with a callback for progress
TIMEOUT = (10, 60)  # seconds to connect, and without a byte
SHOWN_NAMES = 40  # of a folder, in a refusal
# Folders of the rows -> the variable that names another one in its place: the authors may move theirs.
FOLDER_VARIABLES = {DRIVE_FOLDER: "SEGZOO_EDAFORMER_DRIVE_FOLDER"}

_log = logging.getLogger("segzoo")


def drive_file(name: str, row: PretrainedCfg, cfg: Any, *, force: bool = False) -> Path:
    """The file of a row in state "drive", in segzoo's cache.

    Args:
        name: "variant.tag".
        row: knows the folder, the pattern or path of the file, its licence and, where recorded, its sha256 and size.
        cfg: config of the model that must load the file strictly.
        force: ask the folder, and download the file, even if it is in the cache.
    """
    folder = _folder(name, row)
    wanted = Wanted(
        name=name,
        file=row.file or f"the checkpoint of {name}",
        source=folder if "/" in folder else f"https://drive.google.com/drive/folders/{folder}",
        terms=row.license_url or f"{row.license}, see {row.origin}",
        sha256=row.sha256,
        size=row.size,
    )
    build = VARIANTS[name.partition(".")[0]].build
    key = digest_of_text(f"{folder} {row.file or row.drive_files} {name} {cfg!r}")
    return obtain(DriveFile(wanted, row.file, row.drive_files or "", key, lambda: build(cfg)), force=force)


def _folder(name: str, row: PretrainedCfg) -> str:
    """Where the row's file is to be looked for; WeightsError where the row says too little."""
    if row.file and os.path.isabs(row.file):  # one that is there was taken before
        raise WeightsError(f"pretrained_cfg_overlay={{'file': ...}} of {name}: {row.file} is no file on this machine")
    recorded = row.drive_folder or ""
    folder = os.environ.get(FOLDER_VARIABLES.get(recorded, ""), "") or recorded
    if not folder or not (row.file or row.drive_files):
        raise WeightsError(
            f"the weights row of {name} is 'drive' and has no folder, or nothing that says which file of it; give "
            "pretrained_cfg_overlay={'drive_folder': ..., 'file': ...}"
        )
    return folder


@dataclasses.dataclass(frozen=True)
class DriveFile:
    """A file of a folder (`wanted.source`) that is known by what it must be."""

    wanted: Wanted
    file: str | None  # path in the folder, or its last part; None: the pattern says which
    pattern: str
    key: str  # of the row, under which it is remembered which file it was
    build: Callable[[], Any]  # the model that must load it strictly

    def cached(self) -> Path | None:
        """The file that was taken before, unless another one is recorded: that one is no reason to remove it."""
        path = self._remembered(self.key)
        if path is not None and self.wanted.sha256 not in (None, path.name.partition("-")[0]):
            return None
        return path

    def download(self, *, force: bool = False) -> Path:
        if constants.HF_HUB_OFFLINE:
            raise offline_error(self.wanted, self._manually)
        gdown = self._gdown()
        listing = self._asked(functools.partial(_listing, gdown, self.wanted.source))
        try:
            return self._first_that_fits(gdown, listing, force=force)
        except OSError as error:
            raise disk_error(self.wanted, error, cache_dir(), "SEGZOO_CACHE") from error

    # --- which file -------------------------------------------------------------------------------------------------

    def _first_that_fits(self, gdown: Any, listing: Sequence[Any], *, force: bool) -> Path:
        """The shortest name first: what has more words in it is something more special."""
        candidates = [item for item in listing if self._fits_by_name(item.path)]
        misfits = []
        for item in sorted(candidates, key=lambda item: (len(item.path), item.path)):
            path = self._received(gdown, item, force=force)
            problem = self._problem_of(path)
            if problem is None:
                self._remember(self.key, path)
                self._say(item.path, [other.path for other in candidates if other is not item])
                return path
            misfits.append(f"{item.path}: {problem}")
        raise self._found_none(listing, misfits)

    def _fits_by_name(self, path: str) -> bool:
        if self.file is not None:
            return self.file in (path, PurePosixPath(path).name)
        return re.match(self.pattern, path, re.IGNORECASE) is not None

    def _problem_of(self, path: Path) -> str | None:
        """Why it is not the file, None if it is: it has the recorded hash, and the model takes it strictly."""
        digest = path.name.partition("-")[0]
        if self.wanted.sha256 not in (None, digest):
            return f"has sha256 {digest} instead of {self.wanted.sha256}"
        try:
            build_with_weights(self.build, path, keep_mapped=True)
        except WeightsError as error:
            return str(error).removeprefix(f"{path} ")
        return None

    def _say(self, path: str, others: Sequence[str]) -> None:
        more = f"; {_listed(others)} would fit by name, too ({self._choose})" if others else ""
        _log.warning(
            "%s: %s of %s was taken, because its name fits and the model loads it strictly, which is all that is known "
            "of it%s",
            self.wanted.name,
            path,
            self.wanted.source,
            more,
        )

    def _found_none(self, listing: Sequence[Any], misfits: Sequence[str]) -> WeightsError:
        names = _listed([item.path for item in listing])
        if misfits:
            cause = f"no file that fits by its name could be loaded ({'; '.join(misfits)}); the folder has {names}"
        elif listing:
            cause = f"no file of the folder fits by its name; it has {names}"
        else:
            cause = "the folder shows no file: it is empty or private, or its page has changed"
        return self.wanted.error(cause, f"{self._choose if listing else self._look}, {self._manually}")

    _choose = "choose one with pretrained_cfg_overlay={'file': NAME}"

    @property
    def _look(self) -> str:
        variable = next(iter(FOLDER_VARIABLES.values()))
        return f"upgrade gdown, set {variable} to the folder's id if it has moved"

    @property
    def _manually(self) -> str:
        return f"or download the file from {self.wanted.source} in a browser and pass it as checkpoint_path="

    # --- its bytes --------------------------------------------------------------------------------------------------

    def _received(self, gdown: Any, item: Any, *, force: bool) -> Path:
        """A file of the folder, downloaded if need be, in the cache under its hash."""
        item_key = digest_of_text(f"{self.wanted.source} {item.id}")
        path = None if force else self._remembered(item_key)
        if path is not None:
            return path
        folder = cache_dir() / "drive" / self.key  # of its own, for gdown goes on with whatever has the file's name
        folder.mkdir(parents=True, exist_ok=True)
        arrived = folder / PurePosixPath(item.path).name
        digest = self._arrive(gdown, item, arrived)
        problem = strange_beginning(arrived) or _damage(arrived)
        if problem is not None:
            arrived.unlink()
            raise self.wanted.error(f"{item.path} {problem}, so it was removed", f"try again later, {self._manually}")
        path = cache_dir() / "drive" / f"{digest}-{arrived.name}"
        arrived.replace(path)
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()
        self._remember(item_key, path)
        return path

    def _arrive(self, gdown: Any, item: Any, path: Path) -> str:
        """Download it there, going on with what has arrived before; returns its sha256."""
        path.unlink(missing_ok=True)
        before = {part: part.stat().st_size for part in path.parent.glob("*.part")}
        try:
            return self._asked(functools.partial(self._download, gdown, item, path))
        except WeightsError as error:
            stuck = [part for part, size in before.items() if part.stat().st_size == size]
            # Drive would not go on from there, and never will: a refusal or a lost network are other errors.
            if not stuck or type(error.__cause__) is not gdown.DownloadError:
                raise
            _log.warning("%s: %s cannot be gone on with and is downloaded anew", self.wanted.name, item.path)
            for part in stuck:
                part.unlink()
        return self._asked(functools.partial(self._download, gdown, item, path))

    def _download(self, gdown: Any, item: Any, path: Path) -> str:
        digest = hashlib.sha256()
        with tqdm(unit="B", unit_scale=True, desc=path.name, disable=None) as bar:  # None: shown only on a terminal

            def progress(size: int, total: int | None) -> None:
                if bar.total is None and total is not None:
                    check_room(self.wanted, total - size, path.parent, "SEGZOO_CACHE")
                    bar.total = total
                bar.update(size - bar.n)

            gdown.download(
                id=item.id,
                output=str(path),
                quiet=True,
                use_cookies=False,
                resume=True,
                progress=progress,
                hasher=digest,
                timeout=TIMEOUT,
            )
        return digest.hexdigest()

    # --- what is remembered -------------------------------------------------------------------------------------------

    def _remembered(self, key: str) -> Path | None:
        """The file that was remembered under a key, if it is still there."""
        try:
            path = cache_dir() / "drive" / json.loads((cache_dir() / "drive" / f"{key}.json").read_text())["file"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return path if path.is_file() else None

    def _remember(self, key: str, path: Path) -> None:
        write_note(cache_dir() / "drive" / f"{key}.json", {"file": path.name, "name": self.wanted.name})

    # --- gdown --------------------------------------------------------------------------------------------------------

    def _gdown(self) -> Any:
        try:
            gdown = importlib.import_module("gdown")
        except ImportError as error:
            raise self._needs_gdown("gdown is not installed") from error
        version = tuple(int(part) for part in re.findall(r"\d+", gdown.__version__)[:2])
        if version < OLDEST_GDOWN:
            raise self._needs_gdown(f"gdown {gdown.__version__} is too old")
        return gdown

    def _needs_gdown(self, problem: str) -> WeightsError:
        return self.wanted.error(
            f"they are on a Google Drive, and {problem}", f"pip install 'segzoo[drive]', {self._manually}"
        )

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What gdown returns; whatever it raises, Drive's refusals, the network's and the disk's, in one sentence."""
        import requests

        try:
            return patiently(self.wanted, ask, _status_of)
        except WeightsError:  # there is no room on the disk
            raise
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
                raise  # the disk's
            cause, next_step = self._refusal(error)
            raise self.wanted.error(cause, f"{next_step}, {self._manually}") from error

    def _refusal(self, error: Exception) -> tuple[str, str]:
        """What went wrong, and what to do."""
        import requests
        from gdown.exceptions import DownloadError, FileURLRetrievalError

        said = _first_sentence(error)
        if isinstance(error, requests.Timeout):
            return "Google Drive does not answer in time", "try again later"
        if isinstance(error, requests.HTTPError):
            return f"Google Drive answered {_status_of(error)}", "try again later"
        if isinstance(error, requests.RequestException):
            return f"Google Drive cannot be reached ({type(error).__name__}: {said})", "check the network and the proxy"
        if isinstance(error, FileURLRetrievalError):
            return f"Google Drive does not give it ({said})", "try again tomorrow if too many have asked for it"
        if isinstance(error, DownloadError):  # of the folder's page, or of a file that broke off
            return f"Google Drive does not give it ({said})", f"run again, {self._look}"
        # gdown reads web pages, and what it meets there may be anything.
        return f"Google Drive's pages are not as gdown knows them ({type(error).__name__}: {said})", "upgrade gdown"


def _listing(gdown: Any, folder: str) -> Sequence[Any]:
    """The files of a folder and of those in it, with `id` and `path`."""
    return gdown.download_folder(url=folder, skip_download=True, quiet=True, use_cookies=False, timeout=TIMEOUT)


def _status_of(error: Exception) -> int | None:
    response = getattr(error, "response", None)  # of requests' exceptions
    return None if response is None else response.status_code


def _damage(path: Path) -> str | None:
    """Of an archive, as torch writes: that a part of it has not its own check sum; Drive tells no hash of the whole."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                return None if damaged is None else f"is damaged at {damaged}"
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        return f"is a damaged archive ({_first_sentence(error)})"
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(name[:200] for name in names[:SHOWN_NAMES]) + more


def _first_sentence(error: BaseException) -> str:
    """The first sentence of what it says."""
    text = (" ".join(str(error).split()) or type(error).__name__).partition(". ")[0]
    return text if len(text) <= 300 else f"{text[:300]}..."
