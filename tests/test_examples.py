"""examples/: the notebook quickstart.ipynb has no outputs, and its cells run in their order; serve.py gives every
client the mask of its own picture."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import segzoo
from segzoo.data import scenes

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text())


def code_cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_kept():
    assert NOTEBOOK["nbformat"] == 4
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell.get("outputs", []) == [] for cell in NOTEBOOK["cells"])


def test_cells_are_python():
    for i, cell in enumerate(code_cells()):
        compile(cell, f"cell {i}", "exec")


@pytest.mark.slow
def test_cells_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict = {}
    for i, cell in enumerate(code_cells()):
        exec(compile(cell, f"cell {i}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "base     2.282 GMACs, 0.00% of the pixels changed" in printed
    assert "fast     1.872 GMACs" in printed
    assert "fresh classifier" in printed
    assert sorted(path.name for path in Path("masks").iterdir()) == [
        *("scene.png", "scene_classes.json", "scene_overlay.png")
    ]
    assert namespace["result"]._repr_png_().startswith(b"\x89PNG")


@pytest.fixture
def server(tmp_path):
    """The address of examples/serve.py, on a port of its own; nothing of it is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, str(EXAMPLES / "serve.py"), "--reduction", "fast", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, env=environ, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        while not healthy(port):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.2)
        yield port
    finally:
        left = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        for child in psutil.wait_procs(left, timeout=10)[1]:
            child.kill()
        assert not psutil.wait_procs(left, timeout=60)[1]


def healthy(port: int) -> bool:
    try:
        return ask(port, "GET", "/health")[0] == 200
    except OSError:
        return False


def ask(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, body, {"Content-Type": "image/png"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


@pytest.mark.slow
def test_clients_of_the_server_do_not_disturb_each_other(server):
    pictures = [scenes.render(seed=5_000_000 + i, size=(64, 96))[0] for i in range(16)]
    bodies = []
    for picture_HWC in pictures:
        stream = io.BytesIO()
        Image.fromarray(picture_HWC).save(stream, format="PNG")
        bodies.append(stream.getvalue())
    for broken in (3, 8, 9):
        bodies[broken] = bodies[broken][:200] if broken == 8 else b"no picture"
    with ThreadPoolExecutor(len(bodies)) as clients:
        answers = list(clients.map(lambda body: ask(server, "POST", "/predict", body), bodies))
    model = segzoo.create_model("edaformer_t.scenes", pretrained=True)
    model.set_inference_reduction("fast")
    expected = [result.mask for result in segzoo.predict(model, pictures)]
    for i, (status, kind, content) in enumerate(answers):
        if i in (3, 8, 9):
            assert (status, kind) == (422, "application/json")
            assert json.loads(content)["detail"].startswith("the body "), content
            continue
        assert (status, kind) == (200, "image/png"), content
        mask_HW = np.asarray(Image.open(io.BytesIO(content)))
        alike = [(mask_HW == other_HW).mean() for other_HW in expected]
        assert alike[i] > 0.999  # several together are sums in another order
        assert max(alike[:i] + alike[i + 1 :]) < 0.99, "the pictures do not tell clients apart"
    assert ask(server, "POST", "/predict")[0] == 422
    assert ask(server, "POST", "/predict", bytes(31 * 2**20))[0] == 413
