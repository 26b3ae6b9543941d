"""A Google Drive in the client's own process: an adapter of requests that answers with Drive's pages and files.

What a page looks like is what gdown 6.5 reads of it; nobody has compared it with Drive itself.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
from requests.adapters import BaseAdapter
from requests.structures import CaseInsensitiveDict
from urllib3 import HTTPResponse

FOLDER = "1hiAFQcfH9qd37WOc1_HMB0vKzbY-IWrO"
CONFIRM = (  # in one line, as Drive writes it
    '<html><body><form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">'
    '<input type="hidden" name="confirm" value="t"></form></body></html>'
)
QUOTA = """<html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>"""
LOGIN = "<html><head><title>Sign in - Google Accounts</title></head><body><a href='/help'>Help</a></body></html>"


class DriveStandIn(BaseAdapter):
    """Folders and files by their ids, every request that was made, and faults.

    A fault is asked before Drive answers: given the request, it returns a response, raises, or returns None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folders: dict[str, list[str]] = {FOLDER: []}  # links, as the page has them
        self.titles: dict[str, str] = {}  # of pages of folders: their names
        self.files: dict[str, tuple[str, bytes]] = {}  # name and content
        self.requests: list[str] = []
        self.faults: list[Callable[[requests.PreparedRequest], requests.Response | None]] = []
        self.truncate: int | None = None  # break the next file off after so many bytes

    def add(self, path: str, body: bytes, *, folder: str = FOLDER) -> str:
        """Put a file there, with the folders of its path; returns its id."""
        first, _, rest = path.partition("/")
        identity = hashlib.sha1(f"{folder}/{first}".encode()).hexdigest()
        if rest:
            link = f'<a href="https://drive.google.com/drive/folders/{identity}">{first}</a>'
            if identity not in self.folders:
                self.folders[identity], self.titles[identity] = [], first
                self.folders[folder].append(link)
            return self.add(rest, body, folder=identity)
        if identity not in self.files:
            link = f'<a href="https://drive.google.com/file/d/{identity}/view?usp=drive_web"><div>{first}</div></a>'
            self.folders[folder].append(link)
        self.files[identity] = (first, body)
        return identity

    def downloads(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order."""
        asked = [parse_qs(urlsplit(url).query)["id"][0] for url in self.requests if "/download?" in url]
        return [self.files[identity][0] for identity in asked]

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        assert kwargs["timeout"] is not None, "a request without a time limit may hang for ever"
        self.requests.append(request.url)
        for fault in self.faults:
            if (response := fault(request)) is not None:
                return response
        parts = urlsplit(request.url)
        identity = parse_qs(parts.query)["id"][0]
        if (parts.netloc, parts.path) == ("drive.google.com", "/embeddedfolderview"):
            if identity not in self.folders:
                return answer(request, 404, "<html>not found</html>")
            links = "\n".join(self.folders[identity])
            title = self.titles.get(identity, "weights")
            return answer(request, 200, f"<html><head><title>{title}</title></head><body>{links}</body></html>")
        if (parts.netloc, parts.path) == ("drive.google.com", "/uc"):
            return answer(request, 200, CONFIRM.format(id=identity))
        assert (parts.netloc, parts.path) == ("drive.usercontent.google.com", "/download"), request.url
        return self._file(request, *self.files[identity])

    def _file(self, request: requests.PreparedRequest, name: str, body: bytes) -> requests.Response:
        headers = {"Content-Type": "application/octet-stream", "Content-Disposition": f'attachment; filename="{name}"'}
        status = 200
        if (wanted := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))) is not None:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            body, status = body[start:], 206
        headers["Content-Length"] = str(len(body))
        if self.truncate is not None and status == 200:
            body, self.truncate = body[: self.truncate], None
        return answer(request, status, body, headers)

    def close(self) -> None:
        pass


def answer(
    request: requests.PreparedRequest, status: int, body: str | bytes, headers: dict[str, str] | None = None
) -> requests.Response:
    body = body.encode() if isinstance(body, str) else body
    headers = {"Content-Type": "text/html; charset=utf-8"} if headers is None else headers
    response = requests.Response()
    response.status_code, response.url, response.request = status, request.url, request
    response.headers = CaseInsensitiveDict(headers)
    response.raw = HTTPResponse(io.BytesIO(body), headers=headers, status=status, preload_content=False)
    response.encoding = "utf-8"
    return response
