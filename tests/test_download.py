"""What a download promises and a finished one no longer shows: nothing copied, nothing begun that cannot be kept, and
no cached answer in place of a refusal. In process; `test_hub_loading.py` has the real client."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_stand_in import HubStandIn
from huggingface_hub import errors

import segzoo
from segzoo.models.rows import PretrainedCfg
from segzoo.zoo.download import hub as hub_room
from segzoo.zoo.download import is_here
from segzoo.zoo.download.cache import fetching_nothing
from segzoo.zoo.download.hub import hub_file
from segzoo.zoo.download.url import url_file

BODY = bytes(range(256)) * 4000
ROW = PretrainedCfg(state="url", sha256=hashlib.sha256(BODY).hexdigest(), size=len(BODY))
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(scope="module")
def server():
    with HubStandIn() as server:
        yield server


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEGZOO_CACHE", str(tmp_path))
    return tmp_path


def test_the_finished_file_is_the_partial_one(server, cache):
    """A rename, which is whole or not at all: what arrived first and what is there in the end are one file on disk."""
    url = server.add_file("renamed/weights.safetensors", BODY)
    server.fail("GET /files/renamed", truncate=300_000)
    with pytest.raises(segzoo.SegzooError, match="broke off after 300,000"):
        url_file("name", url, ROW)
    (partial,) = cache.rglob("*.partial")
    number = partial.stat().st_ino
    path = url_file("name", url, ROW)
    assert path.read_bytes() == BODY
    assert path.stat().st_ino == number
    assert [file for file in path.parent.iterdir() if file.name != path.name] == []


def test_no_name_of_the_cache_ever_has_half_a_file(server, cache, monkeypatch):
    """Looked at while it arrives: whatever has the file's name is the whole file."""
    url = server.add_file("watched/weights.safetensors", BODY)
    seen = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append(target.exists())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    monkeypatch.setattr(shutil, "copyfile", None)
    monkeypatch.setattr(shutil, "copyfileobj", None)
    path = url_file("name", url, ROW)
    assert path.read_bytes() == BODY
    assert seen and not any(seen)


Usage = collections.namedtuple("Usage", "total used free")


def test_a_full_disk_is_refused_before_anything_is_received(server, cache, monkeypatch):
    url = server.add_file("full/weights.safetensors", BODY)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, len(BODY) - 1))
    with pytest.raises(segzoo.SegzooError, match=r"is full \(.*1,024,000 bytes are needed, 1,023,999 are free"):
        url_file("name", url, ROW)
    assert not list(cache.rglob("*weights.safetensors*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, len(BODY)))
    assert url_file("name", url, ROW).read_bytes() == BODY


@pytest.mark.parametrize("room", [len(BODY) - 1, len(BODY)])
def test_a_full_disk_of_the_hub_is_refused_before_the_download(cache, monkeypatch, room):
    whole = cache / "whole"
    whole.write_bytes(BODY)
    asked = []

    def download(*args, **kwargs) -> str:
        asked.append(args)
        return str(whole)

    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, room))
    monkeypatch.setattr(hub_room.HubFile, "_size", lambda self, file: len(BODY))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    if room < len(BODY):
        with pytest.raises(segzoo.SegzooError, match=r"is full \(.*set HF_HOME"):
            hub_file("name", "org/name", ("model.safetensors",), COMMIT, ROW)
        assert not asked
    else:
        assert hub_file("name", "org/name", ("model.safetensors",), COMMIT, ROW) == whole


@pytest.mark.parametrize(("status", "served"), [(401, False), (403, False), (404, False), (410, False), (500, True)])
def test_a_refusal_is_never_answered_from_the_cache(cache, monkeypatch, status, served):
    """A branch that is in the cache: a server that says no is believed, one that says nothing of use is not."""
    whole = cache / "whole"
    whole.write_bytes(BODY)
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    error = errors.HfHubHTTPError("no", response=response, server_message=None)

    def refuse(self: hub_room.HubFile, file: str) -> int:
        raise error

    monkeypatch.setattr(hub_room.HubFile, "_size", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(whole))
    if served:
        assert hub_file("name", "org/name", ("model.safetensors",), None, ROW) == whole
    else:
        with pytest.raises(segzoo.SegzooError, match=rf"\({status}\)|answered {status}"):
            hub_file("name", "org/name", ("model.safetensors",), None, ROW)


def test_a_file_of_another_size_is_not_taken(server, cache):
    """Where no hash is known, the recorded size is what shows that a file is another one."""
    url = server.add_file("size/weights.safetensors", BODY)
    row = PretrainedCfg(state="url", size=len(BODY) + 1)
    with pytest.raises(segzoo.SegzooError, match=f"has {len(BODY)} bytes instead of {len(BODY) + 1}"):
        url_file("name", url, row)
    assert url_file("name", url, PretrainedCfg(state="url", size=len(BODY))).read_bytes() == BODY


@pytest.mark.parametrize(("revision", "asked"), [(COMMIT, 0), ("main", 1), (None, 1)])
def test_a_branch_is_asked_and_a_commit_is_not(cache, monkeypatch, revision, asked):
    whole = cache / "whole"
    whole.write_bytes(BODY)
    requests = []

    def download(self: hub_room.HubFile, **kwargs) -> Path:
        requests.append(self.revision)
        return whole

    monkeypatch.setattr(hub_room.HubFile, "download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: str(whole))
    assert hub_file("name", "org/name", ("model.safetensors",), revision, ROW) == whole
    assert len(requests) == asked


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_what_is_here_is_known_without_asking(server, cache, monkeypatch, revision):
    """Of a URL, and of the Hub, a branch too; a file that is not whole counts as none, and stays."""
    monkeypatch.setattr(hub_room.HubFile, "download", lambda *args, **kwargs: pytest.fail("asked"))
    hub_row = PretrainedCfg(state="hub", hf_hub_id="org/name", hf_revision=revision, sha256=ROW.sha256)
    whole = cache / "whole"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: whole.exists() and str(whole))
    assert not is_here("name", hub_row, None)
    whole.write_bytes(BODY[1:])
    assert not is_here("name", hub_row, None) and whole.exists()
    whole.write_bytes(BODY)
    assert is_here("name", hub_row, None)

    row = dataclasses.replace(ROW, url=server.add_file(f"here-{revision}/weights.safetensors", BODY))
    with fetching_nothing(), pytest.raises(segzoo.SegzooError, match="not on this machine"):
        url_file("name", row.url, row)
    assert not is_here("name", row, None) and server.count("GET", f"here-{revision}") == 0
    url_file("name", row.url, row)
    assert is_here("name", row, None)
    assert not is_here("name", PretrainedCfg(), None) and is_here("name", PretrainedCfg(state="bundled"), None)
