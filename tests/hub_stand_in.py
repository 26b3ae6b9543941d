"""A stand-in for the Hugging Face Hub on loopback, for the real huggingface_hub client: standard library only.

    with HubStandIn() as hub:
        commit = hub.add("org/name", {"model.safetensors": data})
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "cache"))
        assert hub.count("GET", "/resolve/") == 1

The client reads HF_ENDPOINT at import, so it has to run in a process of its own, which also keeps the tests' process
free of it. Serves downloads (with Range), the repository's information and file tree, uploads as commits, plain URL
files under `/files/`, access control, and any fault that `fail` injects. As on the Hub, weights are kept apart (LFS):
named by their sha256, uploaded on their own, and downloaded by a redirect; small files are named by git's hash.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

LFS = re.compile(r"\.(safetensors|bin|pt|pth|pdparams|zip)$|/weights$|^weights$")


@dataclasses.dataclass
class Fault:
    """What goes wrong with the requests that `pattern` matches, for `times` of them (None: all)."""

    pattern: str  # searched in "METHOD /path"
    status: int | None = None  # answer with this status instead
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of that answer
    truncate: int | None = None  # announce the whole body, send so many bytes of it, and close
    body: bytes | None = None  # send this instead, as if it were the file
    length: str | None = None  # announce this length instead, send the whole body, and close
    refuse: bool = False  # close the connection without an answer
    times: int | None = 1

    def applies(self, request: str) -> bool:
        if self.times == 0 or not re.search(self.pattern, request):
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclasses.dataclass
class Repository:
    """Commits by id, each a whole tree of files; branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False  # needs the server's token and tells why
    private: bool = False  # looks as if it did not exist without the token

    def commit(self, files: Mapping[str, bytes], commit: str | None, branch: str) -> str:
        tree = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        if commit is None:
            digest = hashlib.sha1(f"{len(self.commits)}".encode())
            for name in sorted(tree):
                digest.update(name.encode() + hashlib.sha1(tree[name]).digest())
            commit = digest.hexdigest()
        self.commits[commit] = tree
        self.refs[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


class HubStandIn:
    """The server, in a thread of this process. `requests` records "METHOD /path" of all that was asked."""

    token = "hf_stand_in"  # opens gated and private repositories, and is needed for uploads

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}  # path -> body of plain URLs
        self.large: dict[str, bytes] = {}  # sha256 -> body of an uploaded LFS file
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []  # Range headers received
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        commit: str | None = None,
        branch: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Put files on a branch as a new commit, with the id `commit` if given; returns the id."""
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository())
            repository.gated, repository.private = gated, private
            return repository.commit({name: _bytes(body) for name, body in files.items()}, commit, branch)

    def add_file(self, path: str, body: bytes | Path) -> str:
        """Serve a plain file; returns its URL."""
        self.files[f"/files/{path}"] = _bytes(body)
        return f"{self.endpoint}/files/{path}"

    def fail(self, pattern: str, **what: object) -> None:
        """Inject a `Fault` into the requests "METHOD /path" that `pattern` matches; the oldest one goes first."""
        self.faults.append(Fault(pattern, **what))

    def reset(self) -> None:
        """Forget faults and recorded requests; keep the files."""
        with self.lock:
            self.faults, self.requests, self.ranges = [], [], []

    def count(self, method: str = "", part: str = "") -> int:
        """How many requests had this method and this text in their path."""
        return sum(request.startswith(method) and part in request for request in self.requests)

    def environment(self, cache: Path, *, token: str | None = None, **more: str) -> dict[str, str]:
        """Variables for a client process: this server, caches of its own, no credentials but `token`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "SEGZOO_", "HUGGING"))}
        kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(cache / "hf"),
            "TORCH_HOME": str(cache / "torch"),
            "SEGZOO_CACHE": str(cache / "segzoo"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    hub: HubStandIn

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Silence; `HubStandIn.requests` is the record."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # --- answers ---

    def _answer(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        content = self._read()
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            if "Range" in self.headers:
                hub.ranges.append(self.headers["Range"])
            self.fault = next((fault for fault in hub.faults if fault.applies(f"{self.command} {path}")), None)
        if self.fault is not None and self.fault.refuse:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
        elif self.fault is not None and self.fault.status is not None:
            self._error(self.fault.status, **self.fault.headers)
        elif path in hub.files:
            body = hub.files[path]
            self._send_file(body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"'})
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), content)
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            self._offer_upload(content)
        elif self.command == "PUT" and path.startswith("/upload/"):
            hub.large[path.removeprefix("/upload/")] = content
            self._json({})
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            body = hub.repositories[match[1]].commits[match[2]][match[3]]
            self._send_file(body, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self._error(404)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._open(repo_id, revision)
        if found is None:
            return
        repository, commit = found
        if name not in repository.commits[commit]:
            self._error(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        body = repository.commits[commit][name]
        if not LFS.search(name):
            self._send_file(body, {"X-Repo-Commit": commit, "ETag": f'"{_oid(body)}"'})
            return
        self.send_response(302)
        # By another name of this host: the client itself follows what stays on the Hub's.
        elsewhere = self.server.hub.endpoint.replace("127.0.0.1", "localhost")
        self.send_header("Location", f"{elsewhere}/cdn/{repo_id}/resolve/{commit}/{name}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(body)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _offer_upload(self, content: bytes) -> None:
        if not self._authorised:
            self._error(401)
            return
        objects = json.loads(content)["objects"]
        endpoint = self.server.hub.endpoint
        offers = [
            {**file, "actions": {"upload": {"href": f"{endpoint}/upload/{file['oid']}", "header": {}}}}
            for file in objects
        ]
        self._json({"transfer": "basic", "objects": offers})

    def _api(self, path: str, content: bytes) -> None:
        hub = self.server.hub
        if self.command == "POST":
            if path == "validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif not self._authorised:
                self._error(401)
            elif path == "repos/create":
                asked = json.loads(content)
                repo_id = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                if repo_id in hub.repositories:
                    self._json({"url": f"{hub.endpoint}/{repo_id}", "error": "You already created this repo"}, 409)
                else:
                    hub.add(
                        repo_id,
                        {".gitattributes": b""},
                        private=asked.get("visibility") == "private" or bool(asked.get("private")),
                    )
                    self._json({"url": f"{hub.endpoint}/{repo_id}", "id": repo_id})
            elif match := re.fullmatch(r"models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
                self._upload(*match.groups(), content)
            elif (match := re.fullmatch(r"models/([^/]+/[^/]+)/branch/([^/]+)", path)) and match[1] in hub.repositories:
                refs = hub.repositories[match[1]].refs
                taken = match[2] in refs
                refs.setdefault(match[2], refs["main"])
                self._json({}, 409 if taken else 200)
            else:
                self._error(404)
            return
        if path == "whoami-v2":
            user = {"type": "user", "name": "tester", "orgs": []}
            self._json(user) if self._authorised else self._error(401)
        elif match := re.fullmatch(r"models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?", path):
            repo_id, what, revision = match.groups()
            found = self._open(repo_id, revision or "main")
            if found is None:
                return
            repository, commit = found
            files = repository.commits[commit]
            if what == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])} for name in files
                ]
                self._json(tree)
            else:
                siblings = [{"rfilename": name} for name in files]
                info = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
                self._json({**info, "private": repository.private, "gated": repository.gated, "downloads": 0})
        else:
            self._error(404)

    def _upload(self, repo_id: str, verb: str, revision: str, content: bytes) -> None:
        hub = self.server.hub
        if repo_id not in hub.repositories:
            self._error(404, **{"X-Error-Code": "RepoNotFound"})
            return
        repository = hub.repositories[repo_id]
        if verb == "preupload":
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = {name: "lfs" if LFS.search(name) else "regular" for name in names}
            files = [{"path": name, "uploadMode": modes[name], "shouldIgnore": False, "oid": None} for name in names]
            self._json({"files": files})
            return
        new: dict[str, bytes] = {}
        deleted: list[str] = []
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                new[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                new[entry["value"]["path"]] = hub.large[entry["value"]["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(entry["value"]["path"])
        with hub.lock:
            commit = repository.commit(new, None, revision)
            for name in deleted:
                repository.commits[commit].pop(name, None)
        url = f"{hub.endpoint}/{repo_id}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.hub.token}"

    def _open(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit that is meant; None if an error has been sent instead."""
        repository = self.server.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self._authorised):
            # The Hub does not tell a stranger whether a repository exists.
            self._error(404 if self._authorised else 401, **{"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not self._authorised:
            status = 403 if "Authorization" in self.headers else 401
            self._error(
                status, **{"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo_id} is restricted."}
            )
        elif (commit := repository.resolve(revision)) is None:
            self._error(404, **{"X-Error-Code": "RevisionNotFound"})
        else:
            return repository, commit
        return None

    # --- the wire ---

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send_file(self, body: bytes, headers: Mapping[str, str]) -> None:
        fault = self.fault
        if fault is not None and fault.body is not None:
            body = fault.body
        start, status = 0, 200
        unchanged = self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]
        if unchanged and (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            start, status = int(match[1]), 206
            if start >= len(body):
                self._error(416, **{"Content-Range": f"bytes */{len(body)}"})
                return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        wrong_length = fault.length if fault is not None else None
        self.send_header("Content-Length", wrong_length or str(len(body) - start))
        self.end_headers()
        self.close_connection = self.close_connection or wrong_length is not None
        if self.command == "HEAD":
            return
        if fault is not None and fault.truncate is not None:
            body = body[: max(fault.truncate, start)]
            self.close_connection = True
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(memoryview(body)[start:])

    def _json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, **headers: str) -> None:
        body = json.dumps({"error": headers.get("X-Error-Message", f"status {status}")}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _bytes(body: bytes | Path) -> bytes:
    return body.read_bytes() if isinstance(body, Path) else body


def _oid(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
