"""Images of http URLs, from a server on this machine: fetched, bounded, and refused in one sentence."""

from __future__ import annotations

import contextlib
import http.server
import io
import threading
import time

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from segzoo import SegzooError
from segzoo.preprocess import load_image
from segzoo.zoo.download import image as download


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@contextlib.contextmanager
def serving(answer):
    """A server whose `answer(handler)` writes the response; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the client has gone
                answer(self)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def body(data: bytes, status: int = 200):
    def answer(handler):
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def png(photo: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, format="PNG")
    return stream.getvalue()


def refused(url: str, *words: str) -> None:
    with pytest.raises(SegzooError) as error:
        load_image(url)
    assert "\n" not in str(error.value)
    for word in (url, *words):
        assert word in str(error.value)


def test_an_image(photo):
    asked = []

    def answer(handler):
        asked.append((handler.path, handler.headers["User-Agent"]))
        if handler.path == "/old.png":
            handler.send_response(301)
            handler.send_header("Location", "/new.png")
            handler.end_headers()
        else:
            body(png(photo))(handler)

    with serving(answer) as address:
        assert np.array_equal(load_image(f"{address}/photo.png?x=1"), photo)
        assert np.array_equal(load_image(f"{address}/old.png".replace("http", "HTTP", 1)), photo)
    assert [path for path, _ in asked] == ["/photo.png?x=1", "/old.png", "/new.png"]
    assert asked[0][1].startswith("segzoo/")


def test_what_is_no_image(photo):
    with serving(body(b"<html>please log in</html>")) as address:
        refused(f"{address}/a.png", "no image that Pillow can read")
    with serving(body(b"")) as address:
        refused(f"{address}/a.png", "sent nothing")
    with serving(body(png(photo)[:-60])) as address:
        refused(f"{address}/a.png", "truncated")


def test_servers_that_refuse(photo):
    with serving(body(b"gone", status=404)) as address:
        refused(f"{address}/a.png", "answered 404")
    refused(f"{address}/a.png", "cannot be fetched", "refused")  # closed by now
    for address in ("http://", "http://[::1", "https://\0/x", "http://a b/c"):
        refused(address, "cannot be fetched")


def test_no_more_than_so_many_bytes(monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b"x" * 10_000)

    with serving(endless) as address:
        refused(f"{address}/a.png", "larger than 100,000 bytes")


def test_no_longer_than_so_many_seconds(monkeypatch):
    """Of a server that sends a byte now and then, and of one that sends none."""
    stop = threading.Event()

    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while not stop.is_set():
            handler.wfile.write(b"x")
            time.sleep(0.01)

    monkeypatch.setattr(download, "MAX_SECONDS", 0.1)
    with serving(drip) as address:
        refused(f"{address}/a.png", "seconds")
        stop.set()
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    done = threading.Event()
    with serving(lambda handler: done.wait(60)) as address:
        refused(f"{address}/a.png", "timed out")
        done.set()


def test_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("http://127.0.0.1:1/a.png", "HF_HUB_OFFLINE")
