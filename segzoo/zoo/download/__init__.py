"""Where weights come from: the file that a weights row or a saved model's name stands for, downloaded and checked.

No failure is swallowed: it ends in a WeightsError that names the file, its source and the way out, never in a model
without its weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..._errors import WeightsError
from ..._version import __version__
from ..checkpoint import build_with_weights, first_line
from ..config import read_config

if TYPE_CHECKING:
    from ...models.base import Model
    from ...models.rows import PretrainedCfg

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # tried in this order where a row names no file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger("segzoo")
_said: set[str] = set()  # licence pages whose terms have been said in this process


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A file to get: what messages and checks need to know about it."""

    name: str  # of the model
    file: str  # its name, or names to be tried in order
    source: str  # "org/name @ revision", or URL
    terms: str  # page of the licence
    sha256: str | None = None
    size: int | None = None

    def error(self, cause: str, next_step: str) -> WeightsError:
        return WeightsError(
            f"cannot get the weights of {self.name}: {cause}. File: {self.file} of {self.source}; "
            f"licence: {self.terms}. Next step: {next_step}"
        )


def load_row(build: Callable[[], Model], name: str, row: PretrainedCfg, cfg: Any) -> Model:
    """Build a model and load the weights of a row into it.

    Args:
        build: makes the model; runs on the meta device where the model allows it.
        name: "variant.tag", for messages and the repository of published weights.
        row: where the weights are.
        cfg: config that the weights of this row belong to; a published folder with another one is refused.
    """
    namespace = os.environ.get("SEGZOO_HUB_NAMESPACE")
    if row.state == "unpublished" and not namespace:
        raise WeightsError(
            f"the weights of {name} are not published in a loadable form yet: {row.how_to_get}. "
            f"Or convert them once with `segzoo convert FILE {name} -o DIR`, publish the folder with "
            f"`segzoo publish DIR ORGANISATION/{name}`, and set SEGZOO_HUB_NAMESPACE=ORGANISATION (the project's own "
            f"place for them, still empty, is segzoo/{name})"
        )
    say_terms(name, row)
    if row.state == "bundled":
        with resources.as_file(resources.files("segzoo.weights") / row.file) as path:
            return build_with_weights(build, path, keep_mapped=False)
    if row.state == "unpublished":
        config, path = saved_files(f"hf-hub:{namespace}/{name}", row)
        saved = read_config(config)
        if saved.variant != name.partition(".")[0] or saved.cfg != cfg:
            raise WeightsError(
                f"{namespace}/{name} on the Hub holds another model, {saved.name}: {saved.cfg}, not {cfg}; "
                f"publish the right one there, or build this one with create_model('hf-hub:{namespace}/{name}')"
            )
    elif row.state == "url":
        path = _url_file(name, row)
    else:
        files = (row.hf_hub_filename,) if row.hf_hub_filename else HUB_FILES
        path = _hub_file(name, row.hf_hub_id, files, row.hf_revision, row)
    try:
        return build_with_weights(build, path, keep_mapped=True)
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}. It came from {row.url or row.hf_hub_id or 'the Hub'}") from error


def saved_files(name: str, row: PretrainedCfg | None = None) -> tuple[Path, Path]:
    """config.json and the weights of "local-dir:/path" or "hf-hub:org/name@revision"."""
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise WeightsError(f"{folder} is no folder; save a model there with segzoo.save_pretrained")
        weights = next((folder / file for file in HUB_FILES if (folder / file).exists()), folder / HUB_FILES[0])
        return folder / "config.json", weights
    repo_id, _, revision = place.partition("@")
    unchecked = dataclasses.replace(row, sha256=None, size=None) if row else None  # those are the weights'
    config = _hub_file(name, repo_id, ("config.json",), revision or None, unchecked)
    # The weights of the same commit, even if the branch moves on in between.
    return config, _hub_file(name, repo_id, HUB_FILES, config.parent.name, row)


def say_terms(name: str, row: PretrainedCfg) -> None:
    """Say once in a process, through logging, that weights under this licence are not for commercial use."""
    page = row.license_url or row.origin
    if row.commercial_use is False and page not in _said:
        _said.add(page)
        _log.warning("the weights of %s must not be used commercially; their licence: %s", name, page)


def cache_dir() -> Path:
    """Where segzoo keeps files from URLs and what it has checked: SEGZOO_CACHE, or under the torch hub's directory."""
    return Path(os.environ.get("SEGZOO_CACHE") or Path(torch.hub.get_dir()) / "segzoo").expanduser()


def _obtain(wanted: Wanted, cached: Callable[[], Path | None], download: Callable[[], Path]) -> Path:
    """The file, from the cache or downloaded once however many threads and processes want it; always checked."""
    path = cached()
    if path is not None and _problem(path, wanted) is None:
        return path
    with _locked(wanted):
        path = cached()
        if path is not None:
            problem = _problem(path, wanted)
            if problem is None:
                return path
            _remove(path)
            _log.warning(
                "%s: the cached file %s %s; it was removed and is downloaded again", wanted.name, path, problem
            )
        path = download()
        problem = _problem(path, wanted)
        if problem is not None:
            _remove(path)
            raise wanted.error(
                f"the downloaded file {problem}, so it was removed",
                "try again; if it stays so, the file at its source is not the recorded one and must not be trusted",
            )
    return path


@contextlib.contextmanager
def _locked(wanted: Wanted) -> Iterator[None]:
    from filelock import FileLock

    path = cache_dir() / "locks" / f"{_digest_of_text(wanted.source + wanted.file)}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire()
    except OSError as error:
        raise _disk_error(wanted, error, cache_dir(), "SEGZOO_CACHE") from error
    try:
        yield
    finally:
        lock.release()


def _problem(path: Path, wanted: Wanted) -> str | None:
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
    memory = cache_dir() / "verified" / f"{_digest_of_text(str(real))}.json"
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


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _disk_error(wanted: Wanted, error: OSError, folder: Path, variable: str) -> WeightsError:
    if error.errno in DISK_FULL:
        return wanted.error(f"the disk of {folder} is full ({error})", f"make room, or set {variable} to a larger disk")
    return wanted.error(f"{folder} cannot be written ({error})", f"set {variable} to a folder that you may write to")


def _check_room(wanted: Wanted, size: int | None, folder: Path, variable: str) -> None:
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if size is not None and size > free:
        full = OSError(errno.ENOSPC, f"{size:,} bytes are needed, {free:,} are free")
        raise _disk_error(wanted, full, folder, variable)


# --- the Hub --------------------------------------------------------------------------------------------------------


def _hub_file(name: str, repo_id: str, files: Sequence[str], revision: str | None, row: PretrainedCfg | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    revision = revision or "main"
    wanted = Wanted(
        name=name,
        file=" or ".join(files),
        source=f"{repo_id} @ {revision}",
        terms=(row and row.license_url) or f"{constants.ENDPOINT}/{repo_id}",
        sha256=row.sha256 if row else None,
        size=row.size if row else None,
    )

    def probe() -> Path | None:
        for file in files:
            path = huggingface_hub.try_to_load_from_cache(repo_id, file, revision=revision)
            if isinstance(path, str):
                return Path(path)
        return None

    def cached() -> Path | None:
        # A commit never changes; what a branch stands for has to be asked, if asking is allowed.
        return probe() if _is_commit(revision) or constants.HF_HUB_OFFLINE else None

    def locate() -> tuple[str, int | None]:
        """The first file that exists and its size, asked without the client's long retries."""
        for number, file in enumerate(files):
            url = huggingface_hub.hf_hub_url(repo_id, file, revision=revision)
            try:
                return file, huggingface_hub.get_hf_file_metadata(url).size
            except errors.EntryNotFoundError:
                if number == len(files) - 1:
                    raise
        raise AssertionError("no file asked for")

    def download() -> Path:
        stage = "asking"
        try:
            file, size = locate()
            _check_room(wanted, size, Path(constants.HF_HUB_CACHE), "HF_HOME")
            stage = "downloading"
            return Path(huggingface_hub.hf_hub_download(repo_id, file, revision=revision))
        except (WeightsError, errors.HFValidationError):
            raise
        except Exception as error:
            path = probe() if _is_unreachable(error) else None
            if path is not None:
                _log.warning("%s: %s cannot be asked (%s); the cached copy is used", name, repo_id, first_line(error))
                return path
            raise _hub_error(wanted, error, stage, repo_id) from error

    try:
        return _obtain(wanted, cached, download)
    except errors.HFValidationError as error:
        raise wanted.error(first_line(error), "write the repository as organisation/name") from error


def _is_commit(revision: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def _is_unreachable(error: Exception) -> bool:
    """No answer from the server, or none that says anything about the file."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return not isinstance(error, errors.EntryNotFoundError)


def _hub_error(wanted: Wanted, error: Exception, stage: str, repo_id: str) -> WeightsError:
    """The client's exception in segzoo's words: its messages leave out the reason, the variable or the way out."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo_id}"
    manually = f"or download the file elsewhere from {page} and pass it as checkpoint_path="
    causes = [error]
    while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(inner)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return _disk_error(wanted, cause, Path(constants.HF_HUB_CACHE), "HF_HOME")
        if isinstance(cause, PermissionError):
            return _disk_error(wanted, cause, Path(constants.HF_HUB_CACHE), "HF_HOME")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return wanted.error(
                "it is not in the cache, and offline mode is on (HF_HUB_OFFLINE)",
                f"unset HF_HUB_OFFLINE and run again once with a network, {manually}",
            )
    # GatedRepoError is a RepositoryNotFoundError, so it is asked first.
    answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    said = _server_says(answer)
    if isinstance(answer, errors.GatedRepoError):
        return wanted.error(
            f"the repository is gated{said}",
            f"accept its terms at {page} while logged in, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(answer, errors.RepositoryNotFoundError):
        return wanted.error(
            f"there is no repository {repo_id}, or it is private{said}",
            f"check the name at {page}; for a private one run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(answer, errors.RevisionNotFoundError):
        return wanted.error(
            "the repository has no such revision",
            f"look at {page}/commits/main, and give one that exists (pretrained_cfg_overlay={{'hf_revision': ...}})",
        )
    if isinstance(answer, errors.EntryNotFoundError):
        return wanted.error(
            "the repository has no such file at this revision",
            f"look at {page}/tree/main, and give one that exists (pretrained_cfg_overlay={{'hf_hub_filename': ...}})",
        )
    if answer is not None:
        status = answer.response.status_code
        if status in (401, 403):
            return wanted.error(
                f"the Hub refuses access ({status}){said}",
                f"run `hf auth login` or set HF_TOKEN to a token that may read {page}",
            )
        return wanted.error(f"the Hub answered {status}{said}", f"try again later, {manually}")
    if stage == "downloading":
        return wanted.error(
            f"the download broke off ({type(error).__name__}: {first_line(error)}); nothing of it is kept",
            f"run again, {manually}",
        )
    if any(isinstance(cause, errors.FileMetadataError) for cause in causes):
        return wanted.error(
            f"{constants.ENDPOINT} does not answer like the Hub", "check HF_ENDPOINT, the proxy and the firewall"
        )
    return wanted.error(
        f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}: {first_line(error)})",
        f"check the network, the proxy and HF_ENDPOINT, {manually}",
    )


def _server_says(answer: Any) -> str:
    text = getattr(answer, "server_message", None)
    return f": {text}" if text else ""


# --- plain URLs -----------------------------------------------------------------------------------------------------


def _url_file(name: str, row: PretrainedCfg) -> Path:
    wanted = Wanted(
        name=name,
        file=row.file or row.url.rpartition("/")[2],
        source=row.url,
        terms=row.license_url or row.origin,
        sha256=row.sha256,
        size=row.size,
    )
    path = cache_dir() / "files" / f"{_digest_of_text(row.url)}-{wanted.file}"

    def cached() -> Path | None:
        return path if path.exists() else None

    def download() -> Path:
        _download(wanted, path)
        return path

    return _obtain(wanted, cached, download)


def _download(wanted: Wanted, path: Path) -> None:
    """Get a URL into `path`, atomically. What arrived before an interruption is kept in a .partial file and resumed."""
    from huggingface_hub import constants

    url, partial, tag = wanted.source, path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.etag")
    manually = f"or download {url} elsewhere and pass the file as checkpoint_path="
    if constants.HF_HUB_OFFLINE:
        raise wanted.error(
            "it is not in the cache, and offline mode is on (HF_HUB_OFFLINE)",
            f"unset HF_HUB_OFFLINE and run again once with a network, {manually}",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if partial.exists() and tag.exists() else 0
        # If-Range: the rest, or all of it where the file has changed since.
        headers = {"Range": f"bytes={start}-", "If-Range": tag.read_text()} if start else {}
    except OSError as error:
        raise _disk_error(wanted, error, path.parent, "SEGZOO_CACHE") from error
    request = urllib.request.Request(url, headers={"User-Agent": f"segzoo/{__version__}", **headers})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # more was kept than there is
            partial.unlink(missing_ok=True)
        raise wanted.error(
            f"the server answered {error.code} {error.reason}", f"try again later, {manually}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise wanted.error(
            f"the server cannot be reached ({type(error).__name__}: {reason})",
            f"check the network and the proxy, {manually}",
        ) from error
    with response:
        start = start if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        _check_room(wanted, total - start if total else None, path.parent, "SEGZOO_CACHE")
        try:
            version = response.headers.get("ETag", "")
            tag.write_text(version) if version and not version.startswith("W/") else tag.unlink(missing_ok=True)
            broken = _receive(response, partial, start, total, wanted.file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _disk_error(wanted, error, path.parent, "SEGZOO_CACHE") from error
    received = partial.stat().st_size
    if broken is not None or (total is not None and received != total):
        of_all = f" of {total:,}" if total is not None else ""
        reason = f" ({type(broken).__name__}: {broken})" if broken else ""
        raise wanted.error(
            f"the download broke off after {received:,}{of_all} bytes{reason}",
            f"run again, it goes on from there, {manually}" if tag.exists() else f"run again, {manually}",
        ) from broken
    partial.replace(path)
    tag.unlink(missing_ok=True)


def _receive(response: Any, partial: Path, start: int, total: int | None, title: str) -> Exception | None:
    """Write the body behind the first `start` bytes; returns the error that broke the connection, raises the disk's."""
    from tqdm import tqdm

    with (
        partial.open("r+b" if start else "wb") as file,
        # None: shown only on a terminal.
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=title, disable=None) as bar,
    ):
        file.seek(start)
        while True:
            try:
                chunk = response.read(1 << 20)
            except (OSError, http.client.HTTPException) as error:
                return error
            if not chunk:
                return None
            file.write(chunk)
            bar.update(len(chunk))
