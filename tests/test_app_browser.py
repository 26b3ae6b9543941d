"""The page in a real browser: Debian's Chromium, or the one that SEGZOO_CHROMIUM names, driven by Playwright.

Each test begins with a page of its own, on one server that offers a tiny model and the bundled one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segzoo
from segzoo.data import scenes

pytestmark = pytest.mark.slow

CHROMIUM = os.environ.get("SEGZOO_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = ("--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
PATIENCE = 240_000  # milliseconds, on a busy machine
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
BUNDLED = "edaformer_t.scenes"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`segzoo app` in a process of its own, and where it may put files."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder / "temporary"
        self.folder.mkdir()
        self.port = free_port()
        command = [sys.executable, "-m", "segzoo", "app", "--json", "--port", str(self.port), *arguments]
        environment = {**os.environ, "TMPDIR": str(self.folder), "HF_HOME": str(folder), "SEGZOO_CACHE": str(folder)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.ready = json.loads(line)

    def files(self) -> list[Path]:
        """What lies in its folder for temporary files, beside folders."""
        return [path for path in self.folder.rglob("*") if not path.is_dir()]

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Exit code, and what it said on the way."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=4)
    with torch.no_grad():
        model.get_classifier().weight.mul_(50)  # so that a reduction changes pixels
    model.mark_loaded()
    folder = tmp_path_factory.mktemp("page")
    row = {"test_size": (64, 128), "resize": "exact", "label_names": ("ground", "roof", "tree", "sky")}
    segzoo.save_pretrained(model, folder / "run", pretrained_cfg_overlay=row)
    server = Server(folder, "--model", f"local-dir:{folder / 'run'}")
    yield server
    code, errors = server.end()
    assert code == 0 and "Traceback" not in errors, errors
    assert list(server.folder.iterdir()) == []


@pytest.fixture(scope="module")
def browser():
    """A missing browser is a failure where CI is set, for CI installs it."""
    if CHROMIUM is None and not os.environ.get("CI"):
        pytest.skip("no Chromium here; install Debian's package, or name one in SEGZOO_CHROMIUM")
    assert CHROMIUM is not None, "CI has no Chromium: apt-get install chromium"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield browser
        browser.close()


class Visit:
    """A tab with the page, and every request that it has made."""

    def __init__(self, browser, server: Server, viewport=WIDE):
        self.tab = browser.new_page(viewport=viewport)
        self.tab.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(server.ready["address"])
        self.answered("optimal")

    def answered(self, reduction: str, *, about: str = "") -> None:
        """Wait for the answer with this reduction, of a picture that the code names so."""
        self.tab.wait_for_function(
            """([reduction, about]) => {
                const read = id => (document.querySelector(id) || {innerText: ''}).innerText
                return read('#summary').includes(`With ${reduction} the model`) && read('#areas').length > 0 &&
                    read('#code').includes(about) && document.querySelector('#overlay img') !== null
            }""",
            arg=[reduction, about],
        )

    def refused(self, words: str) -> str:
        """Wait for a sentence with these words; nothing else is shown then."""
        alert = self.tab.locator("#summary [role=alert]", has_text=words)
        alert.wait_for()
        for part in ("#areas", "#legend", "#overlay img", "#changes img", "#summary table"):
            self.tab.wait_for_function("part => !(document.querySelector(part) || {}).innerText", arg=part)
        assert "Traceback" not in self.tab.content()
        return alert.inner_text()

    def upload(self, path: Path) -> None:
        self.tab.set_input_files("#picture input[type=file]", path)

    def choose(self, label: str) -> None:
        self.tab.get_by_label(label, exact=True).check()

    def type_model(self, name: str) -> None:
        box = self.tab.locator("#model input")
        box.fill(name)
        box.press("Enter")

    def code(self) -> str:
        return "\n".join(line.inner_text() for line in self.tab.locator("#code .cm-line").all())

    def text(self, part: str) -> str:
        return self.tab.inner_text(part)

    def picture(self, part: str) -> str:
        """What an image shows, as text."""
        return self.tab.locator(f"{part} img").get_attribute("src") or ""

    def gmacs(self) -> list[float]:
        """As trained and reduced."""
        return [float(number) for number in re.findall(r"GMACs\s+([\d.]+)\s+([\d.]+)", self.text("#summary"))[0]]


@pytest.fixture
def visit(browser, server) -> Iterator[Visit]:
    visit = Visit(browser, server)
    yield visit
    visit.tab.close()
    outside = [url for url in visit.requests if not re.match(r"(http://127\.0\.0\.1:|data:|blob:)", url)]
    assert outside == [], "the page asks nobody but this machine"


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "my photo.tif"
    Image.fromarray(scenes.render(seed=7, size=(100, 150))[0]).save(path)
    return path


def test_upload_reduction_sliders_and_code(visit, server, photo, monkeypatch):
    """The walk of a visitor; in the end the page's Python gives what the page shows, and nothing is kept."""
    visit.upload(photo)
    visit.answered("optimal", about="my photo.tif")
    assert visit.picture("#picture").startswith("data:image/png")
    assert server.files() == []
    mask, before = visit.picture("#overlay"), visit.gmacs()
    assert before[1] < before[0]

    visit.choose("by site")
    visit.answered("your factors")
    assert visit.gmacs() == before, "the sliders begin where the preset has them"
    slider = visit.tab.locator("#sites .block", has_text="decoder.1").first.locator("input[type=range]")
    slider.fill("1")
    visit.answered("your factors", about="'decoder.0': 2, 'decoder.2': 2")
    assert visit.gmacs()[0] == before[0] and visit.gmacs()[1] > before[1]
    assert visit.picture("#overlay") != mask

    monkeypatch.chdir(photo.parent)
    made: dict = {}
    exec(compile(visit.code(), "the page's code", "exec"), made)
    shown = {name: share for name, _, share, _ in table(visit.text("#areas"))[1:]}
    expected = {name: f"{100 * area.share:.2f} %" for name, area in made["result"].areas().items()}
    assert shown == expected
    assert visit.gmacs()[1] == float(f"{segzoo.cost(made['model'], (64, 128)).macs / 1e9:.3g}")
    plan = made["model"].set_inference_reduction(None)
    assert plan.is_neutral
    changed = np.count_nonzero(segzoo.predict(made["model"], photo.name).mask != made["result"].mask)
    assert changed > 0 and f"{changed:,} of 15,000 pixels" in visit.text("#changes-legend")
    assert server.files() == []


def table(text: str) -> list[list[str]]:
    return [re.split(r"\t+", line.strip()) for line in text.splitlines() if line.strip()]


def test_models_scenes_and_engines(visit):
    assert visit.code().count("scenes.render(seed=2000001)") == 1
    visit.tab.click("#scene-2")
    visit.answered("optimal", about="seed=2000002")
    visit.choose("openvino")
    visit.answered("optimal", about="engine='openvino'")
    visit.choose("base")
    visit.answered("base")
    assert "changes 0.00 % of the pixels" in visit.text("#summary")
    visit.choose("torch")
    visit.type_model("edaformer_t")
    visit.answered("optimal", about=BUNDLED)
    assert visit.gmacs() == [2.282, 2.039]
    assert "licence of the weights: apache-2.0" in visit.tab.content() and "road" in visit.text("#legend")


def test_what_is_refused_is_a_sentence_in_the_page(visit, server, tmp_path, photo):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 nonsense" * 50)
    visit.upload(broken)
    assert "broken.jpg is truncated or damaged" in visit.refused("broken.jpg")
    large = tmp_path / "large.png"
    Image.new("RGB", (6000, 5000)).save(large)
    visit.upload(large)
    visit.refused("large.png has more than 25,000,000 pixels")
    heavy = tmp_path / "heavy.jpg"
    heavy.write_bytes(os.urandom(21 * 2**20))
    visit.upload(heavy)
    visit.tab.get_by_text("exceed the maximum allowed size").wait_for()
    assert server.files() == []

    visit.upload(photo)
    visit.answered("optimal", about="my photo.tif")
    visit.type_model("rtformer_slim.cityscapes")
    visit.refused("segzoo app --model rtformer_slim.cityscapes")
    visit.type_model("edaformer_x")
    visit.refused("Unknown model 'edaformer_x'")
    visit.type_model(BUNDLED)
    visit.answered("optimal", about=BUNDLED)
    visit.tab.get_by_label("Remove Image").click()
    visit.refused("Choose a picture")


def test_a_camera(visit, server):
    visit.tab.get_by_label("Remove Image").click()
    visit.refused("Choose a picture")
    visit.tab.get_by_label("Capture from camera").click()
    visit.tab.get_by_text("Click to Access Webcam").click()
    visit.tab.wait_for_function("() => (document.querySelector('#picture video') || {}).readyState >= 2")  # it sees
    visit.tab.get_by_label("capture photo").click()
    visit.answered("optimal", about="segzoo.predict(model, '")
    assert server.files() == []


def test_two_tabs_get_each_its_own_answer(browser, server):
    """Both ask at once, for reductions that they change again and again."""
    tabs = [Visit(browser, server) for _ in range(2)]
    alone = {}
    for name in ("base", "fast"):
        tabs[0].choose(name)
        tabs[0].answered(name)
        alone[name] = (tabs[0].gmacs(), tabs[0].picture("#overlay"))
    assert alone["base"] != alone["fast"]
    for names in [("base", "fast"), ("fast", "base")] * 3:
        for visit, name in zip(tabs, names, strict=True):
            visit.choose(name)
        for visit, name in zip(tabs, names, strict=True):
            visit.answered(name, about=f"set_inference_reduction('{name}')")
            assert (visit.gmacs(), visit.picture("#overlay")) == alone[name]
    for visit in tabs:
        visit.tab.close()


@pytest.mark.parametrize("viewport", [WIDE, NARROW])
def test_nothing_is_cut_off(browser, server, viewport, tmp_path):
    visit = Visit(browser, server, viewport)
    visit.choose("by site")
    visit.answered("your factors")
    width, room = visit.tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width <= room
    inside = """() => [...document.querySelectorAll('#summary, #legend, #areas, #code, #sites .block, table, img')]
        .filter(part => part.offsetParent !== null)
        .filter(part => part.getBoundingClientRect().right > window.innerWidth + 1).map(part => part.outerHTML)"""
    assert visit.tab.evaluate(inside) == []
    folder = Path(os.environ.get("SEGZOO_SCREENSHOTS") or tmp_path)
    visit.tab.screenshot(path=folder / f"page_{viewport['width']}.png", full_page=True)
    visit.tab.close()


def test_a_port_that_is_taken_is_one_sentence(server):
    command = [sys.executable, "-m", "segzoo", "app", "--port", str(server.port)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert "choose others with --host and --port" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_server_that_is_told_to_end_leaves_nothing(tmp_path):
    server = Server(tmp_path)
    assert server.ready["models"] == [BUNDLED]
    assert server.end(signal.SIGTERM) == (0, "")
    assert list(server.folder.iterdir()) == []
