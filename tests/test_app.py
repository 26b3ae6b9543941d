"""What a click on the page computes, without a page: masks, costs, the Python that does the same, and refusals."""

from __future__ import annotations

import asyncio
import base64
import html
import importlib.util
import io
import re
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import segzoo
from segzoo.app import bench as bench_room
from segzoo.app import page, pieces, shelf
from segzoo.app.bench import Bench, Choice, Picture, decoded, take_turns
from segzoo.cli import main
from segzoo.data import scenes

BUNDLED = "edaformer_t.scenes"
SIZE = (64, 128)  # (H, W) in pixels at which the tiny model sees every picture


def png(array_HWC: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array_HWC).save(stream, **{"format": "PNG", **options})
    return stream.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """The name of a tiny model with weights, so sharp that a reduction changes pixels."""
    torch.manual_seed(0)
    row = {"test_size": SIZE, "resize": "exact"}
    model = segzoo.create_model("test_edaformer", num_classes=4, pretrained_cfg_overlay=row)
    with torch.no_grad():
        model.get_classifier().weight.mul_(50)
    model.mark_loaded()
    folder = tmp_path_factory.mktemp("models") / "run"
    segzoo.save_pretrained(model, folder)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def bench(tiny) -> Bench:
    return Bench([tiny, BUNDLED])


@pytest.fixture(scope="module")
def photo() -> Picture:
    return Picture("photo.png", png(scenes.render(seed=7, size=(100, 150))[0]))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bench_room, "ROUNDS", (1, 1))


def run(code: str) -> dict:
    """The names that a piece of Python leaves behind."""
    namespace: dict = {}
    exec(compile(code, "the page's code", "exec"), namespace)
    return namespace


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [None, "fast", {"encoder.0": 4, "decoder.1": 2}])
def test_an_answer_is_what_its_code_gives(bench, tiny, photo, reduction, tmp_path, monkeypatch):
    answer = bench.answer(photo, Choice(tiny, reduction))
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(photo.data)
    made = run(answer.code)
    assert np.array_equal(made["result"].mask, answer.reduced.result.mask)
    assert made["result"].plan == answer.reduced.result.plan
    assert answer.reduced.macs == segzoo.cost(made["model"], SIZE).macs
    made["model"].set_inference_reduction(None)
    trained = segzoo.predict(made["model"], "photo.png").mask
    assert np.array_equal(trained, answer.trained.result.mask)
    assert answer.trained.macs == segzoo.cost(made["model"], SIZE).macs
    assert answer.changed_pixels == np.count_nonzero(trained != made["result"].mask)
    assert (answer.changed > 0) == (reduction is not None)
    assert (answer.reduced.macs < answer.trained.macs) == (reduction is not None)


def test_the_code_of_a_scene_draws_it(bench, tiny):
    seed = bench_room.SCENES[1]
    picture = bench.scene(seed)
    assert np.array_equal(decoded(picture, 3), scenes.render(seed=seed)[0])
    answer = bench.answer(picture, Choice(tiny, "fast"))
    assert np.array_equal(run(answer.code)["result"].mask, answer.reduced.result.mask)
    renamed = Picture("mine.png", picture.data[:-1] + b"\0")  # any other file, whatever it is called
    assert "segzoo.predict(model, 'mine.png')" in bench.code(renamed, Choice(tiny, "fast"))


@pytest.mark.slow
def test_the_bundled_model_answers_under_its_short_name(bench, photo):
    answer = bench.answer(photo, Choice("edaformer_t", "optimal"))
    assert f"create_model('{BUNDLED}', pretrained=True)" in answer.code
    assert answer.row.advice
    # The cost at the size that its weights row gives, 256 x 512 at most: README's table.
    scene = bench.answer(bench.scene(bench_room.SCENES[0]), Choice(BUNDLED, "optimal"))
    assert (round(scene.trained.macs / 1e9, 3), round(scene.reduced.macs / 1e9, 3)) == (2.282, 2.039)


def test_windows_are_counted(tmp_path, photo):
    row = {"test_size": (64, 96), "resize": "exact", "test_mode": "slide", "crop": (64, 64), "stride": (64, 32)}
    model = segzoo.create_model("test_segformer", num_classes=3, pretrained_cfg_overlay=row)
    model.mark_loaded()
    segzoo.save_pretrained(model, tmp_path)
    name = f"local-dir:{tmp_path}"
    answer = Bench([name]).answer(photo, Choice(name))
    assert answer.sizes == {(64, 64): 2}
    assert answer.trained.macs == 2 * segzoo.cost(model, (64, 64)).macs
    assert "64x64 (2 windows)" in pieces.summary(answer)


def test_visitors_do_not_meet_each_others_reductions(bench, tiny, photo):
    """Eight clicks at once, of four choices: each gets what it gets alone."""
    choices = [Choice(tiny, plan) for plan in (None, "fast", {"decoder.0": 2}, {"decoder.2": 2})]
    alone = [bench.answer(photo, choice) for choice in choices]
    assert len({answer.reduced.result.mask.tobytes() for answer in alone}) == 4
    found: list = [None] * 8
    start = threading.Barrier(8)

    def visit(place: int) -> None:
        start.wait()
        found[place] = bench.answer(photo, choices[place % 4])

    threads = [threading.Thread(target=visit, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, answer in enumerate(found):
        expected = alone[place % 4]
        assert np.array_equal(answer.reduced.result.mask, expected.reduced.result.mask)
        assert answer.reduced.macs == expected.reduced.macs
        assert np.array_equal(answer.trained.result.mask, expected.trained.result.mask)


def test_few_models_are_kept(tiny, bench, photo, monkeypatch):
    made = []
    original = bench_room._trained_model
    monkeypatch.setattr(bench_room, "_trained_model", lambda name: made.append(name) or original(name))
    folder = Path(tiny.partition(":")[2])
    names = [f"local-dir:{folder}{'/.' * i}" for i in range(bench_room.MODELS_KEPT + 1)]
    crowded = Bench(names)
    for name in [*names, names[-1], names[0]]:
        crowded.sites(name)
    assert made == [*names, names[0]], "the one used longest ago was let go, and none other made twice"


def test_forms_take_turns_in_both_directions():
    now, order = [0.0], []

    def form(name: str, seconds: float):
        def work() -> None:
            order.append(name)
            now[0] += seconds

        return work

    bench_room.ROUNDS = (2, 4)
    forms = [form("a", 0.3), form("b", 0.2)]
    assert take_turns(forms, clock=lambda: now[0]) == pytest.approx([0.3, 0.2])
    assert "".join(order) == "abbaabba"
    order.clear()
    take_turns([form("a", 30), form("b", 20)], clock=lambda: now[0])
    assert "".join(order) == "abba", "slow ones no more often than has to be"


def test_factors_of_a_preset(bench, tiny):
    model = segzoo.create_model(tiny)
    plan = model.set_inference_reduction("fast")
    assert bench.factors(tiny, "fast") == {site: entry.factor for site, entry in plan.items()}
    assert set(bench.factors(tiny, None).values()) == {1}
    sites = bench.sites(tiny)
    assert sorted(sites) == sorted(segzoo.reduction_sites(model))
    assert [site.endswith(".q") for site in sites] == sorted(site.endswith(".q") for site in sites)


@pytest.mark.parametrize(
    "name", ["test_edaformer", "test_segformer", "test_rtformer", "test_segvit", "edaformer_mit_b0"]
)
def test_there_are_sliders_for_all_sites(name):
    assert len(segzoo.reduction_sites(segzoo.zoo.recipe.blueprint(name))) <= page.SLIDERS


# --- pictures ---------------------------------------------------------------------------------------------------------


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose head promises so many pixels, and which has none of them."""
    data = bytearray(png(np.zeros((1, 1, 3), np.uint8)))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xd8\xff\xe0 nonsense" * 9, "photo.jpg is truncated or damaged"),
        (b"no picture", "photo.jpg is no image that Pillow can read"),
        (b"", "empty"),
        (huge_png(5001, 5000), "photo.jpg has more than 25,000,000 pixels"),
        (huge_png(50_000, 50_000), "photo.jpg has more than 25,000,000 pixels"),
        (b"\0" * (bench_room.MAX_BYTES + 1), "photo.jpg has 20 MiB, and the page takes 20"),
    ],
)
def test_what_is_no_picture_is_refused(bench, tiny, data, words, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded")) if "pixels" in words else None
    picture = Picture("photo.jpg", data)
    kept, refusal = page.take(picture)
    assert kept is None and words in refusal
    about, summary, *rest = page.click(bench, kept, refusal, tiny, "fast", "torch")
    assert 'role="alert"' in summary and words in html.unescape(summary)
    assert about == "" and not any(rest)
    with pytest.raises(segzoo.SegzooError, match=re.escape(words)):
        bench.answer(picture, Choice(tiny))


def test_a_picture_is_kept_as_it_came_where_browsers_show_it(photo):
    assert page.take(photo) == (photo, "")
    array_HWC = decoded(photo, 3)
    tiff = Picture("photo.tif", png(array_HWC, format="TIFF"))
    kept, refusal = page.take(tiff)
    assert refusal == "" and kept.name == "photo.tif" and kept.data.startswith(b"\x89PNG")
    assert np.array_equal(decoded(kept, 3), array_HWC)


def test_a_picture_that_grows_beyond_what_is_taken_is_refused(photo, monkeypatch):
    tiff = Picture("photo.tif", png(decoded(photo, 3), format="TIFF", compression="jpeg"))
    monkeypatch.setattr(page, "MAX_BYTES", len(tiff.data))
    kept, refusal = page.take(tiff)
    assert kept is None and "photo.tif" in refusal and "JPEG" in refusal


def test_a_turned_picture_is_upright(bench, tiny):
    exif = Image.Exif()
    exif[274] = 6  # turn by a quarter to the right
    turned = Picture("turned.jpg", png(np.zeros((20, 50, 3), np.uint8), format="JPEG", exif=exif))
    assert bench.answer(turned, Choice(tiny)).reduced.result.mask.shape == (50, 20)


def test_an_upload_is_read_once_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "received"))
    file = tmp_path / "received" / "a-hash" / "x.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"data")
    payload = SimpleNamespace(path=str(file), url="http://127.0.0.1/file", orig_name="../../x y.png")
    assert page.received(payload) == Picture("x y.png", b"data")
    assert list((tmp_path / "received").iterdir()) == []


def test_a_file_that_was_not_uploaded_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "received").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "received"))
    other = tmp_path / "secret.png"
    other.write_bytes(b"data")
    for path in (other, tmp_path / "received" / ".." / "secret.png"):
        assert page.received(SimpleNamespace(path=str(path), url=None, orig_name=None)) is None
    assert other.exists()


def test_an_address_in_place_of_a_picture_is_not_fetched(tmp_path):
    import gradio
    from gradio import processing_utils

    image = gradio.Image()
    with page.fetching_nothing(), pytest.raises(ValueError, match="fetches nothing, and so not http://127.0.0.1:9/a"):
        asyncio.run(image.async_move_resource_to_block_cache("http://127.0.0.1:9/a.png"))
    assert "refuse" not in processing_utils.async_ssrf_protected_download.__qualname__


def test_a_picture_as_text_needs_no_file():
    text = f"data:image/png;base64,{base64.b64encode(b'data').decode()}"
    assert page.received(SimpleNamespace(path=None, url=text, orig_name="x.png")) == Picture("x.png", b"data")
    assert page.received(None) is None


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "rtformer_slim.cityscapes",
            "`segzoo app --model rtformer_slim.cityscapes` fetches them once (licence: apache-2.0",
        ),
        ("segformer_b0.nvidia_ade20k_512", "15 MB, licence: nvidia-source-code-license, not for commercial use"),
        ("edaformer_mit_b0.ade20k", "not published in a loadable form yet"),
        ("mit_b0", "mit_b0.imagenet makes no masks"),
        ("segformer_b0_keypoints", "makes no masks"),
        ("test_eft", "makes no masks"),
        ("test_segformer", "test_segformer has no weights"),
        ("edaformer_x", "nknown model 'edaformer_x'"),
        ("edaformer_t.scen", "has no weights tagged 'scen'"),
        ("local-dir:/etc", "`segzoo app --model local-dir:/etc`"),
    ],
)
def test_a_name_that_is_not_here_says_how_to_get_it(bench, photo, name, words):
    _, summary, *_ = page.click(bench, photo, "", name, "optimal", "torch")
    assert 'role="alert"' in summary
    assert words.replace("`", "") in html.unescape(re.sub("</?code>", "", summary))


def test_what_is_bundled_is_offered_first_and_each_name_once(monkeypatch):
    monkeypatch.setattr(shelf, "is_here", lambda name, row, cfg: row.state in ("bundled", "url") or "mit_b0" in name)
    names = shelf.names_here()
    assert names[0] == BUNDLED and "rtformer_slim.cityscapes" in names
    assert not any(name.startswith(("segformerpp", "mit_", "eft_")) for name in names)
    assert shelf.offer(["edaformer_t", "local-dir:x"], names)[:2] == [BUNDLED, "local-dir:x"]
    assert shelf.offer(["edaformer_t"], names).count(BUNDLED) == 1


def test_a_reduction_of_another_model_is_a_sentence(bench, tiny, photo):
    _, summary, *_ = page.click(bench, photo, "", tiny, "n2d", "torch")
    assert "no preset is called" in summary


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_click_shows_mask_changes_and_costs(bench, tiny, photo):
    factors = [2] * page.SLIDERS
    about, summary, overlay, legend, changes, changes_legend, areas, code = page.click(
        bench, photo, "", tiny, page.BY_SITE, "torch", *factors
    )
    answer = bench.answer(photo, Choice(tiny, dict.fromkeys(bench.sites(tiny), 2)))
    assert code == answer.code
    assert np.array_equal(np.asarray(overlay), np.asarray(answer.reduced.result.overlay()))
    # Where the masks agree the picture of the changes is grey, but for the neighbours of a change.
    changed_HW = np.ptp(np.asarray(changes), axis=2) > 0
    masks = (answer.trained.result.mask, answer.reduced.result.mask)
    assert changed_HW[masks[0] != masks[1]].all() and answer.changed_pixels <= changed_HW.sum()
    assert f"{answer.trained.macs / 1e9:.3g}</td><td>{answer.reduced.macs / 1e9:.3g}" in summary
    assert f"{answer.changed_pixels:,} of 15,000 pixels" in changes_legend
    for name, area in answer.reduced.result.areas().items():
        assert name in legend
        assert f"{100 * area.share:.2f} %" in areas or area.share < 0.00005
    assert tiny in about


def test_large_pictures_are_shown_smaller_with_their_own_areas(bench, tiny):
    wide = Picture("wide.png", png(scenes.render(seed=3, size=(100, 3200))[0]))
    answer = bench.answer(wide, Choice(tiny, "fast"))
    assert answer.reduced.result.mask.shape == (100, 3200)
    assert pieces.overlay(answer.reduced.result).size == pieces.changes(answer).size == (1600, 50)


def test_names_of_classes_are_no_html(tmp_path, photo):
    model = segzoo.create_model("test_segformer", num_classes=2)
    model.mark_loaded()
    row = {"label_names": ("<script>alert(1)</script>", "<i>b</i>"), "test_size": SIZE, "resize": "exact"}
    segzoo.save_pretrained(model, tmp_path, pretrained_cfg_overlay={**row, "advice": "<b>x</b>"})
    name = f"local-dir:{tmp_path}"
    shown = page.click(Bench([name]), photo, "", name, "base", "torch")
    text = "".join(part for part in shown[:-1] if isinstance(part, str))
    assert "&lt;" in text and not re.search("<(script|i)>|<b>x", text)
    assert "<img" not in pieces.problem("a <img src=x> name")


def test_small_shares_are_not_shown_as_none():
    assert [pieces.percent(share) for share in (0, 1e-6, 0.0001, 0.5)] == ["0.00 %", "<0.01 %", "0.01 %", "50.00 %"]


def update(**changed):
    """In place of Gradio's."""
    return changed


def test_sliders_follow_the_model_and_the_preset(bench, tiny):
    reduction, *sliders = page.follow_model(bench, update, tiny)
    sites = bench.sites(tiny)
    assert reduction == {"choices": [*bench.presets(tiny), page.BY_SITE], "value": "optimal"}
    assert [slider["label"] for slider in sliders[: len(sites)]] == sites
    assert not any(slider["visible"] for slider in sliders) and len(sliders) == page.SLIDERS
    by_site = page.follow_reduction(bench, update, tiny, page.BY_SITE)
    assert [slider["visible"] for slider in by_site] == [i < len(sites) for i in range(page.SLIDERS)]
    factors = bench.factors(tiny, "fast")
    preset = page.follow_reduction(bench, update, tiny, "fast")
    assert [slider["value"] for slider in preset[: len(sites)]] == [factors[site] for site in sites]
    unknown, *hidden = page.follow_model(bench, update, "rtformer_slim.cityscapes")
    assert unknown["choices"] == [page.NONE] and not any(slider["visible"] for slider in hidden)


# --- serving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "length", "status"),
    [
        ("POST", "/gradio_api/upload", b"100", 200),
        ("POST", "/gradio_api/upload", str(page.MAX_BODY + 1).encode(), 413),
        ("POST", "/gradio_api/queue/join", None, 411),
        ("GET", "/", None, 200),
        ("GET", "/gradio_api/file=/tmp/x.png", None, 404),
        ("HEAD", "/file=https://example.com", None, 404),
    ],
)
def test_what_the_gate_lets_in(method, path, length, status):
    pytest.importorskip("starlette")
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    headers = [] if length is None else [(b"content-length", length)]
    scope = {"type": "http", "method": method, "headers": headers, "path": path}
    asyncio.run(page.Gate(app)(scope, lambda: pytest.fail("received"), send))
    assert sent[0]["status"] == status


def test_a_missing_package_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["app"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'segzoo[app]'" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--port", "70000"], ["--port", "x"]])
def test_what_is_no_port_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["app", *arguments])
    assert "--port" in capsys.readouterr().err


def test_a_mistyped_model_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(page, "check_installed", lambda: pytest.fail("too late"))
    assert main(["app", "--model", "edaformer_x"]) == 2
    assert "unknown model 'edaformer_x'" in capsys.readouterr().err


def test_engines_are_those_that_are_installed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest))
    assert "onnxruntime" not in bench_room.installed_engines() and "torch" in bench_room.installed_engines()
