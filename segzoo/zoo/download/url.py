"""Files of plain URLs: requested, received and finished, atomically; what an interruption leaves is resumed."""

from __future__ import annotations

import dataclasses
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from tqdm import tqdm

from ..._version import __version__
from .cache import Wanted, cache_dir, check_room, digest_of_text, disk_error, obtain, offline_error, patiently

if TYPE_CHECKING:
    from ...models.rows import PretrainedCfg


def url_file(name: str, url: str, row: PretrainedCfg, *, force: bool = False) -> Path:
    """The file of a URL, in segzoo's cache.

    Args:
        name: of the model, for messages.
        row: knows the file's licence and, where recorded, its name, sha256 and size.
        force: download it even if it is there.
    """
    wanted = Wanted(
        name=name,
        file=row.file or url.rpartition("/")[2],
        source=url,
        terms=row.license_url or row.origin,
        sha256=row.sha256,
        size=row.size,
    )
    return obtain(UrlFile(wanted, cache_dir() / "files" / f"{digest_of_text(url)}-{wanted.file}"), force=force)


@dataclasses.dataclass(frozen=True)
class Received:
    """What has arrived of a file."""

    size: int  # bytes
    total: int | None  # bytes, if the server said so
    broken: Exception | None  # what ended the connection before its time


@dataclasses.dataclass(frozen=True)
class UrlFile:
    """A URL (`wanted.source`) and its place in the cache."""

    wanted: Wanted
    path: Path

    def cached(self) -> Path | None:
        return self.path if self.path.exists() else None

    def download(self, *, force: bool = False) -> Path:
        if constants.HF_HUB_OFFLINE:
            raise offline_error(self.wanted, self._manually)
        with self._request() as response:
            received = self._receive(response)
        return self._finish(received)

    @property
    def partial(self) -> Path:
        """What arrived before an interruption."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def tag(self) -> Path:
        """The version of the file that the partial one is of, if the server names versions; else it is not resumed."""
        return self.path.with_name(f"{self.path.name}.etag")

    def _request(self) -> Any:
        """The server's response, for the rest of the file where its beginning is here."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            start = self.partial.stat().st_size if self.partial.exists() and self.tag.exists() else 0
            # If-Range: the rest, or all of it where the file has changed since.
            headers = {"Range": f"bytes={start}-", "If-Range": self.tag.read_text()} if start else {}
        except OSError as error:
            raise disk_error(self.wanted, error, self.path.parent, "SEGZOO_CACHE") from error
        try:
            return patiently(self.wanted, lambda: self._open(headers), lambda error: getattr(error, "code", None))
        except urllib.error.HTTPError as error:
            if error.code == 416:  # more was kept than there is
                self.partial.unlink(missing_ok=True)
            raise self.wanted.error(
                f"the server answered {error.code} {error.reason}", f"try again later, {self._manually}"
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: an address that is none
            reason = getattr(error, "reason", error)
            raise self.wanted.error(
                f"the server cannot be reached ({type(error).__name__}: {reason})",
                f"check the network and the proxy, {self._manually}",
            ) from error

    def _open(self, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(self.wanted.source, headers={"User-Agent": f"segzoo/{__version__}", **headers})
        try:
            return urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            error.close()
            raise

    def _receive(self, response: Any) -> Received:
        """Write the body into the partial file, behind what it holds where the server goes on from there."""
        length = response.headers.get("Content-Length", "")
        version = response.headers.get("ETag", "")
        try:
            start = self.partial.stat().st_size if response.status == 206 else 0
            total = start + int(length) if length.isdecimal() else None
            check_room(self.wanted, total - start if total else None, self.path.parent, "SEGZOO_CACHE")
            if version and not version.startswith("W/"):
                self.tag.write_text(version)
            else:
                self.tag.unlink(missing_ok=True)
            broken = self._write(response, start, total)
            return Received(self.partial.stat().st_size, total, broken)
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            raise disk_error(self.wanted, error, self.path.parent, "SEGZOO_CACHE") from error

    def _write(self, response: Any, start: int, total: int | None) -> Exception | None:
        """Append the body behind `start` bytes; returns the error that broke the connection, raises the disk's."""
        with (
            self.partial.open("r+b" if start else "wb") as file,
            # None: shown only on a terminal.
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=self.wanted.file, disable=None) as bar,
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

    def _finish(self, received: Received) -> Path:
        """The partial file becomes the file, if all of it is there."""
        if received.broken is None and received.total in (None, received.size):
            self.partial.replace(self.path)
            self.tag.unlink(missing_ok=True)
            return self.path
        of_all = f" of {received.total:,}" if received.total is not None else ""
        reason = f" ({type(received.broken).__name__}: {received.broken})" if received.broken else ""
        resumed = "run again, it goes on from there" if self.tag.exists() else "run again"
        raise self.wanted.error(
            f"the download broke off after {received.size:,}{of_all} bytes{reason}", f"{resumed}, {self._manually}"
        ) from received.broken

    @property
    def _manually(self) -> str:
        return f"or download {self.wanted.source} elsewhere and pass the file as checkpoint_path="
