"""What a result can be turned into, and that saving it loses nothing: neither the image nor a file that exists."""

from __future__ import annotations

import io
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from segzoo import SegzooError, results
from segzoo._errors import SaveError
from segzoo.labels import load_labels
from segzoo.plans import Plan
from segzoo.results import Segmentation, write_png

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own

LABELS = load_labels("camvid")


def segmentation(mask: np.ndarray | None = None, **fields) -> Segmentation:
    if mask is None:
        mask = np.array([[0, 0, 0, 3], [0, 0, 2, 2]], np.uint8)
    values = {
        "mask": mask,
        "label_set": LABELS,
        "image": np.full((*mask.shape, 3), 100, np.uint8),
        "source": "photos/street.jpg",
        "model": "edaformer_t.scenes",
        "weights_state": "pretrained",
        "plan": Plan(),
        "_full_scores": None,
    }
    return Segmentation(**{**values, **fields})


# --- forms ------------------------------------------------------------------------------------------------------------


def test_areas_and_dict():
    result = segmentation()
    names = [LABELS.classes[i] for i in (0, 2, 3)]
    assert [(name, *area) for name, area in result.areas().items()] == [
        (names[0], 5, 0.625),
        (names[1], 2, 0.25),
        (names[2], 1, 0.125),
    ]
    found = json.loads(json.dumps(result.to_dict()))
    classes = found.pop("classes")
    assert found == {
        "image": "photos/street.jpg",
        "size": [2, 4],
        "model": "edaformer_t.scenes",
        "weights_state": "pretrained",
        "reduction": {},
    }
    assert classes[1] == {"index": 2, "name": names[1], "colour": list(LABELS.palette[2]), "pixels": 2, "share": 0.25}


def test_shapes_are_by_name():
    result = segmentation()
    name = LABELS.classes[2]
    assert np.array_equal(coco.decode(result.to_rle()[name]), result.mask == 2)
    assert [ring.tolist() for ring in result.polygons()[name]] == [[[2, 1], [4, 1], [4, 2], [2, 2]]]


def test_repr_is_one_line():
    text = repr(segmentation())
    first, second, third = (LABELS.classes[i] for i in (0, 2, 3))
    # 0.625 rounds half to even
    assert text == (
        f"<Segmentation of street.jpg (2x4) by edaformer_t.scenes: {first} 62 %, {second} 25 %, {third} 12 %>"
    )
    many = segmentation(np.arange(8, dtype=np.uint8).reshape(2, 4), weights_state="untrained")
    assert repr(many).endswith(", 5 more; untrained>")
    rare = np.zeros((20, 20), np.uint8)
    rare[0, 0] = 1
    assert "<1 %" in repr(segmentation(rare))


def test_what_a_notebook_shows(monkeypatch):
    shown = Image.open(io.BytesIO(segmentation()._repr_png_()))
    assert shown.format == "PNG"
    assert shown.height > 2  # a legend is below
    monkeypatch.setattr(results, "SHOWN_PIXELS", 50)
    large = segmentation(np.zeros((300, 100), np.uint8))
    assert max(Image.open(io.BytesIO(large._repr_png_())).size) == 50
    opened = []
    monkeypatch.setattr(Image.Image, "show", lambda image: opened.append(image.size))
    segmentation().show()
    assert opened == [shown.size]


def test_overlay_draws_borders_that_show_on_any_ground():
    mask = np.zeros((6, 40), np.uint8)
    mask[:, 20:] = 1
    for grey, line in ((0, 255), (255, 0)):  # white on dark, black on light
        result = segmentation(mask, image=np.full((6, 40, 3), grey, np.uint8))
        drawn = np.asarray(result.overlay(0.01))
        assert (drawn[:, 20] == line).all()
        assert not (drawn[:, [0, 19, 21, 39]] == line).any(axis=(1, 2)).any() or grey != line
        assert np.array_equal(np.asarray(result.overlay(0)), result.image)
    assert (np.asarray(result.overlay(1))[:, :20] == LABELS.palette[0]).all()


def test_a_legend_names_every_colour():
    mask = np.repeat(np.arange(4, dtype=np.uint8), 100)[None].repeat(200, axis=0)
    plain, picture = segmentation(mask).overlay(), segmentation(mask).overlay(legend=True)
    assert np.array_equal(np.asarray(picture)[:200], np.asarray(plain))
    below = np.asarray(picture)[200:]
    for colour in LABELS.palette[:4]:
        assert (below == colour).all(axis=2).sum() >= 80  # a swatch
    assert not (below == LABELS.palette[5]).all(axis=2).any()
    assert ((below < 60).all(axis=2)).sum() > 200  # letters
    # A narrow image gets a sheet that the longest name fits on.
    assert segmentation(mask[:, :20]).overlay(legend=True).width > 60


# --- saving -----------------------------------------------------------------------------------------------------------


def test_the_three_files(tmp_path):
    files = segmentation().save(tmp_path / "a" / "street.png")
    assert [file.name for file in files] == ["street.png", "street_overlay.png", "street_classes.json"]
    assert {path.name for path in (tmp_path / "a").iterdir()} == {file.name for file in files}
    assert json.loads(files.classes.read_text()) == segmentation().to_dict()
    with Image.open(files.overlay) as overlay:
        assert overlay.height > 2
    plain = segmentation().save(tmp_path / "b.png", legend=False)
    with Image.open(plain.overlay) as overlay:
        assert overlay.size == (4, 2)


@pytest.mark.parametrize("name", ["x.png", "x_overlay.png", "x_classes.json"])
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_image_itself_is_never_written_over(tmp_path, name, link):
    source = tmp_path / name
    source.write_bytes(b"the photograph")
    if link:
        source = tmp_path / "elsewhere"
        link(tmp_path / name, source)
    for overwrite in (False, True):
        with pytest.raises(SaveError, match="is the image itself"):
            segmentation(source=str(source)).save(tmp_path / "x.png", overwrite=overwrite)
    assert (tmp_path / name).read_bytes() == b"the photograph"


@pytest.mark.parametrize("name", ["x.png", "x_overlay.png", "x_classes.json"])
def test_a_file_that_exists_stays(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(SegzooError, match=f"{name} exists; .* overwrite=True"):
        segmentation().save(tmp_path / "x.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"something else")]
    segmentation().save(tmp_path / "x.png", overwrite=True)
    assert (tmp_path / name).read_bytes() != b"something else"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch):
    """Between the check and the end of writing another process makes the last of the files."""
    late = tmp_path / "x_classes.json"
    original = os.link

    def link(partial, path):
        if not late.exists():
            late.write_bytes(b"another's")
        original(partial, path)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(SaveError, match="exists"):
        segmentation().save(tmp_path / "x.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x_classes.json", b"another's")]


def test_a_disk_without_links(tmp_path, monkeypatch):
    def link(partial, path):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    segmentation().save(tmp_path / "x.png")
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(SaveError, match="exists"):
        segmentation().save(tmp_path / "x.png")


def in_threads(work, count: int = 8) -> list[Exception]:
    errors = []
    gate = threading.Barrier(count)

    def run(i: int) -> None:
        gate.wait()
        try:
            work(i)
        except SegzooError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_eight_threads_save_one_path(tmp_path):
    masks = [np.full((64, 64), i, np.uint8) for i in range(8)]
    for _ in range(3):
        assert in_threads(lambda i: segmentation(masks[i]).save(tmp_path / "x.png", overwrite=True)) == []
        with Image.open(tmp_path / "x.png") as mask:
            assert len(np.unique(np.asarray(mask))) == 1  # one thread's, whole
    assert len(list(tmp_path.iterdir())) == 3
    errors = in_threads(lambda i: segmentation(masks[i]).save(tmp_path / "new.png"))
    assert len(errors) == 7  # one was first
    assert all("exists" in str(error) for error in errors)
    with Image.open(tmp_path / "new.png") as mask:
        winner = int(np.asarray(mask)[0, 0])
    assert json.loads((tmp_path / "new_classes.json").read_text())["classes"][0]["index"] == winner


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png"])
def test_names_that_no_disk_has(tmp_path, name):
    with pytest.raises(SaveError, match="cannot be written"):
        segmentation().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_the_greatest_length(tmp_path):
    longest = "x" * (255 - len("_classes.json"))
    assert segmentation().save(tmp_path / f"{longest}.png").mask.exists()


def test_a_panel_is_written_anew(tmp_path):
    for colour in ("red", "blue"):
        write_png(Image.new("RGB", (4, 4), colour), tmp_path / "panel.png")
    with Image.open(tmp_path / "panel.png") as panel:
        assert panel.getpixel((0, 0)) == (0, 0, 255)
