"""Files of the Hugging Face Hub, by its own client and in its own cache; its failures in segzoo's words."""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import constants, errors

from ..._errors import WeightsError, first_line
from .cache import (
    DISK_FULL,
    Wanted,
    check_room,
    disk_error,
    folder_of_call,
    may_fetch,
    obtain,
    offline_error,
    patiently,
)

if TYPE_CHECKING:
    from ...models.rows import PretrainedCfg

_log = logging.getLogger("segzoo")


def hub_file(
    name: str,
    repo_id: str,
    files: Sequence[str],
    revision: str | None,
    row: PretrainedCfg | None,
    *,
    force: bool = False,
) -> Path:
    """The first of `files` that a repository has, in the Hub's cache.

    Args:
        name: of the model, for messages.
        revision: full commit id, branch or tag; None follows "main".
        row: knows the file's licence and, where recorded, its sha256 and size.
        force: download it even if it is there.
    """
    revision = revision or "main"
    wanted = Wanted(
        name=name,
        file=" or ".join(files),
        source=f"{repo_id} @ {revision}",
        terms=(row.license_url if row else None) or f"{constants.ENDPOINT}/{repo_id}",
        sha256=row.sha256 if row else None,
        size=row.size if row else None,
    )
    try:
        return obtain(HubFile(wanted, repo_id, tuple(files), revision), force=force)
    except WeightsError:
        raise
    except (ValueError, OSError) as error:  # a name that is none for the client, or for the disk
        raise wanted.error(first_line(error), "write the repository as organisation/name") from error


@dataclasses.dataclass(frozen=True)
class HubFile:
    """The first of `files` that a repository has at a revision."""

    wanted: Wanted
    repo_id: str
    files: tuple[str, ...]
    revision: str

    def cached(self) -> Path | None:
        # A commit never changes; what a branch stands for has to be asked, if asking is allowed.
        is_commit = re.fullmatch("[0-9a-f]{40}", self.revision) is not None
        return self._probe() if is_commit or constants.HF_HUB_OFFLINE or not may_fetch() else None

    def download(self, *, force: bool = False) -> Path:
        progress = _Progress()
        try:
            return patiently(self.wanted, lambda: self._fetch(force, progress), _status_of)
        except (WeightsError, errors.HFValidationError):
            raise
        except Exception as error:
            path = self._probe() if _is_unreachable(error) and not force else None
            if path is None:
                raise _refusal(self.wanted, self.repo_id, _Failure.of(error, progress.downloading)) from error
            _log.warning(
                "%s: %s cannot be asked (%s); the cached copy is used",
                self.wanted.name,
                self.repo_id,
                first_line(error),
            )
            return path

    def _fetch(self, force: bool, progress: _Progress) -> Path:
        progress.downloading = False
        file, size = self._locate()
        check_room(self.wanted, size, _cache(), "HF_HOME")
        progress.downloading = True
        options = {"revision": self.revision, "force_download": force, "cache_dir": _cache()}
        return Path(huggingface_hub.hf_hub_download(self.repo_id, file, **options))

    def _probe(self) -> Path | None:
        for file in self.files:
            path = huggingface_hub.try_to_load_from_cache(self.repo_id, file, _cache(), self.revision)
            if isinstance(path, str):
                return Path(path)
        return None

    def _locate(self) -> tuple[str, int | None]:
        """The first file that exists and its size in bytes, asked without the client's long retries."""
        for file in self.files[:-1]:
            try:
                return file, self._size(file)
            except errors.EntryNotFoundError:
                continue
        return self.files[-1], self._size(self.files[-1])

    def _size(self, file: str) -> int | None:
        url = huggingface_hub.hf_hub_url(self.repo_id, file, revision=self.revision)
        return huggingface_hub.get_hf_file_metadata(url).size


def _cache() -> Path:
    """Where the client keeps files, in its own layout."""
    return folder_of_call() or Path(constants.HF_HUB_CACHE)


@dataclasses.dataclass
class _Progress:
    """How far an attempt has come."""

    downloading: bool = False  # the file itself is on its way


def _status_of(error: Exception) -> int | None:
    """The status that the Hub answered, if it answered at all."""
    return _Failure.of(error, False).status


def _is_unreachable(error: Exception) -> bool:
    """No answer from the server, or none that says anything about the file."""
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        return status >= 500 or status == 429
    return not isinstance(error, errors.EntryNotFoundError)


# --- failures -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An exception of the client and what lies behind it."""

    error: Exception
    causes: tuple[BaseException, ...]  # the exception itself first
    answer: errors.HfHubHTTPError | None  # the Hub's own refusal, if it answered at all
    downloading: bool  # the file itself was on its way

    @classmethod
    def of(cls, error: Exception, downloading: bool) -> _Failure:
        causes: list[BaseException] = [error]
        while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(inner)
        answer = next((cause for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
        return cls(error, tuple(causes), answer, downloading)

    @property
    def status(self) -> int | None:
        return self.answer.response.status_code if self.answer is not None else None


def _raised(kind: type[Exception], failure: _Failure) -> bool:
    return any(isinstance(cause, kind) for cause in failure.causes)


def _answered(kind: type[Exception], failure: _Failure) -> bool:
    return isinstance(failure.answer, kind)


# What went wrong -> the sentence that says it -> what to do. The first that holds; the client's own messages leave out
# the reason, the variable or the way out.
_FAILURES: tuple[tuple[Callable[[_Failure], bool], str, str], ...] = (
    (
        # A GatedRepoError is a RepositoryNotFoundError, so it is asked first.
        functools.partial(_answered, errors.GatedRepoError),
        "the repository is gated{said}",
        "accept its terms at {page} while logged in, then run `hf auth login` or set HF_TOKEN",
    ),
    (
        functools.partial(_answered, errors.RepositoryNotFoundError),
        "there is no repository {repo_id}, or it is private{said}",
        "check the name at {page}; for a private one run `hf auth login` or set HF_TOKEN",
    ),
    (
        functools.partial(_answered, errors.RevisionNotFoundError),
        "the repository has no such revision",
        "look at {page}/commits/main, and give one that exists (pretrained_cfg_overlay={{'hf_revision': ...}})",
    ),
    (
        functools.partial(_answered, errors.EntryNotFoundError),
        "the repository has no such file at this revision",
        "look at {page}/tree/main, and give one that exists (pretrained_cfg_overlay={{'hf_hub_filename': ...}})",
    ),
    (
        lambda failure: failure.status in (401, 403),
        "the Hub refuses access ({status}){said}",
        "run `hf auth login` or set HF_TOKEN to a token that may read {page}",
    ),
    (
        lambda failure: failure.status is not None,
        "the Hub answered {status}{said}",
        "try again later, {manually}",
    ),
    (
        lambda failure: failure.downloading,
        "the download broke off ({error}); nothing of it is kept",
        "run again, {manually}",
    ),
    (
        functools.partial(_raised, errors.FileMetadataError),
        "{endpoint} does not answer like the Hub",
        "check HF_ENDPOINT, the proxy and the firewall",
    ),
    (
        lambda failure: True,
        "{endpoint} cannot be reached ({error})",
        "check the network, the proxy and HF_ENDPOINT, {manually}",
    ),
)


def _refusal(wanted: Wanted, repo_id: str, failure: _Failure) -> WeightsError:
    page = f"{constants.ENDPOINT}/{repo_id}"
    manually = f"or download the file elsewhere from {page} and pass it as checkpoint_path="
    for cause in failure.causes:
        of_disk = isinstance(cause, (PermissionError, NotADirectoryError, FileExistsError))
        if of_disk or (isinstance(cause, OSError) and cause.errno in (*DISK_FULL, errno.EROFS)):
            return disk_error(wanted, cause, _cache(), "HF_HOME")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return offline_error(wanted, manually)
    said = getattr(failure.answer, "server_message", None)
    filled = {
        "repo_id": repo_id,
        "page": page,
        "manually": manually,
        "endpoint": constants.ENDPOINT,
        "status": failure.status,
        "said": f": {said}" if said else "",
        "error": f"{type(failure.error).__name__}: {first_line(failure.error)}",
    }
    sentence, next_step = next(texts for holds, *texts in _FAILURES if holds(failure))
    return wanted.error(sentence.format(**filled), next_step.format(**filled))
