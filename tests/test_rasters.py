"""Rasters: the class map is that of `predict` on the same windows, in the raster's coordinates, whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

import segzoo
from segzoo._errors import ImageError, SaveError
from segzoo.cli import main
from segzoo.scale import RasterMap, SavedRaster, is_raster, rasters, segment_raster

WHERE = {"crs": "EPSG:32632", "transform": Affine(10, 0, 500_000, 0, -10, 5_400_000)}
WINDOWS = {"crop": (32, 48), "stride": (20, 30)}


@pytest.fixture(scope="module")
def model():
    return make("test_edaformer")


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return segzoo.create_model(name).eval()


def noise(size: tuple[int, int] = (70, 140), bands: int = 3, dtype: str = "uint8", high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(1, high, (bands, *size)).astype(dtype)


def write(path: Path, values_CHW: np.ndarray, **options) -> Path:
    interpretation = options.pop("colorinterp", None)
    points = options.pop("gcps", None)
    C, H, W = values_CHW.shape
    options = {"driver": "GTiff", **WHERE, **options}
    with rasterio.open(path, "w", height=H, width=W, count=C, dtype=values_CHW.dtype, **options) as dataset:
        if interpretation:
            dataset.colorinterp = interpretation
        if points:
            dataset.gcps = points
        dataset.write(values_CHW)
    return path


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def expected(model, image_HWC: np.ndarray) -> np.ndarray:
    image_HWC = np.ascontiguousarray(image_HWC)
    return segzoo.predict(model, image_HWC, mode="slide", resize=image_HWC.shape[:2], **WINDOWS).mask


# --- the map --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_edaformer", "test_segvit"])  # one a kind of score
@pytest.mark.parametrize("size", [(70, 140), (20, 140), (80, 30)])  # the last two lower and narrower than a window
def test_the_map_is_that_of_predict_seams_included(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr(rasters, "TILE", 64)
    monkeypatch.setattr(rasters, "SCORE_BYTES", 1)  # parts of one tile's width
    model = make(name)
    values = noise(size)
    looks: list[tuple[int, int]] = []
    source = write(tmp_path / "scene.tif", values)
    result = segment_raster(
        model, source, tmp_path / "map.tif", **WINDOWS, on_look=lambda done, total: looks.append((done, total))
    )
    assert np.array_equal(read(tmp_path / "map.tif"), expected(model, values.transpose(1, 2, 0)))
    assert looks == [(done, len(looks) - 1) for done in range(len(looks))]
    assert len(looks) >= 4
    assert sum(result.pixels) == size[0] * size[1]


def test_the_map_keeps_coordinates_and_is_tiled_and_compressed(model, tmp_path):
    source = write(tmp_path / "scene.tif", noise())
    result = segment_raster(model, source, tmp_path / "out" / "map.tif", **WINDOWS)
    with rasterio.open(tmp_path / "out" / "map.tif") as dataset:
        assert dataset.crs.to_epsg() == 32632
        assert dataset.transform == WHERE["transform"]
        assert (dataset.count, dataset.dtypes, dataset.nodata) == (1, ("uint8",), 255)
        assert (dataset.block_shapes, dataset.compression.value) == ([(512, 512)], "DEFLATE")
        assert dataset.colormap(1)[1][:3] == result.label_set.palette[1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["map.tif", "map_classes.json"]
    assert isinstance(result, RasterMap)
    about = json.loads((tmp_path / "out" / "map_classes.json").read_text())
    assert about == result.to_dict()
    assert (about["size"], about["bands"], about["transform"][:3]) == ([70, 140], [1, 2, 3], [10, 0, 500_000])
    assert "UTM zone 32N" in about["crs"]
    mask = read(tmp_path / "out" / "map.tif")
    for record in about["classes"]:
        assert record["pixels"] == (mask == record["index"]).sum()
    assert sum(area.share for area in result.areas().values()) == pytest.approx(1)


def test_control_points_are_kept(model, tmp_path):
    points = [GroundControlPoint(row, col, 8 + col, 48 - row, 0) for row, col in ((0, 0), (0, 60), (40, 0))]
    options = {"crs": None, "transform": None, "gcps": (points, "EPSG:4326")}
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        source = write(tmp_path / "scene.tif", noise((40, 60)), **options)
    segment_raster(model, source, tmp_path / "map.tif", **WINDOWS)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        kept, crs = dataset.gcps
    assert [(point.row, point.col, point.x, point.y) for point in kept] == [
        (point.row, point.col, point.x, point.y) for point in points
    ]
    assert crs.to_epsg() == 4326


def test_more_than_255_classes_take_16_bits(tmp_path):
    model = segzoo.create_model("test_edaformer", num_classes=256)
    source = write(tmp_path / "scene.tif", noise((40, 60)))
    segment_raster(model, source, tmp_path / "map.tif", **WINDOWS)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.dtypes, dataset.nodata) == (("uint16",), 65535)


# --- bands and values -----------------------------------------------------------------------------------------------


def test_bands_are_chosen(model, tmp_path):
    values = noise((40, 60), bands=5)
    source = write(tmp_path / "scene.tif", values)
    segment_raster(model, source, tmp_path / "map.tif", bands=(4, 3, 2), **WINDOWS)
    assert np.array_equal(read(tmp_path / "map.tif"), expected(model, values[[3, 2, 1]].transpose(1, 2, 0)))
    for bands, words in (
        (None, "has 5 bands and the model takes 3; say which"),
        ((1, 2), "takes 3 bands, not 2"),
        ((1, 2, 6), "no band 6, but 1 to 5"),
    ):
        with pytest.raises(ImageError, match=words):
            segment_raster(model, source, tmp_path / "refused.tif", bands=bands)
    assert not (tmp_path / "refused.tif").exists()


def test_one_band_serves_for_all(model, tmp_path):
    values = noise((40, 60), bands=1)
    segment_raster(model, write(tmp_path / "scene.tif", values), tmp_path / "map.tif", **WINDOWS)
    assert np.array_equal(read(tmp_path / "map.tif"), expected(model, np.repeat(values, 3, 0).transpose(1, 2, 0)))


def test_pixels_without_data_are_255_and_seen_in_the_mean_colour(model, tmp_path):
    values = noise((60, 90))
    values[:, 5:40, 10:70] = 0
    values[0, 50, 50] = 0  # in one band only: that is a colour
    source = write(tmp_path / "scene.tif", values, nodata=0)
    result = segment_raster(model, source, tmp_path / "map.tif", **WINDOWS)
    image = values.transpose(1, 2, 0).copy()
    image[5:40, 10:70] = (124, 116, 104)  # ImageNet's mean
    wanted = expected(model, image)
    wanted[5:40, 10:70] = 255
    assert np.array_equal(read(tmp_path / "map.tif"), wanted)
    assert result.no_data == 35 * 60
    assert sum(result.pixels) == 60 * 90 - 35 * 60
    assert sum(area.share for area in result.areas().values()) == pytest.approx(1)


def test_opacity_is_no_band_of_the_picture_but_says_where_data_is(model, tmp_path):
    values = noise((60, 90), bands=4)
    values[3] = 255
    values[3, 20:30] = 0
    kinds = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    segment_raster(model, write(tmp_path / "scene.tif", values, colorinterp=kinds), tmp_path / "map.tif", **WINDOWS)
    mask = read(tmp_path / "map.tif")
    assert np.array_equal((mask == 255).any(axis=1).nonzero()[0], np.arange(20, 30))
    assert (mask[20:30] == 255).all()


def test_other_values_than_bytes_need_their_range(model, tmp_path):
    values = noise((40, 60), dtype="uint16", high=3000)
    source = write(tmp_path / "scene.tif", values)
    with pytest.raises(ImageError, match="type uint16, of which no file says .* --range LOW HIGH"):
        segment_raster(model, source, tmp_path / "map.tif", **WINDOWS)
    for value_range in ((5, 5), (9, 5), (float("nan"), 5)):
        with pytest.raises(segzoo.SegzooError, match="the lower first"):
            segment_raster(model, source, tmp_path / "map.tif", value_range=value_range)
    segment_raster(model, source, tmp_path / "map.tif", value_range=(480, 2520), **WINDOWS)
    bytes_HWC = np.clip((values.transpose(1, 2, 0) - 480.0) / 8, 0, 255).round().astype(np.uint8)
    assert np.array_equal(read(tmp_path / "map.tif"), expected(model, bytes_HWC))


def test_what_is_no_number_is_no_data(model, tmp_path):
    values = noise((40, 60)).astype("float32") / 256
    values[:, 7] = np.nan
    source = write(tmp_path / "scene.tif", values)
    result = segment_raster(model, source, tmp_path / "map.tif", value_range=(0, 1), **WINDOWS)
    assert (read(tmp_path / "map.tif") == 255).nonzero()[0].tolist() == [7] * 60
    assert result.no_data == 60


def test_a_palette_is_no_picture(model, tmp_path):
    Image.fromarray(noise((40, 60))[0]).convert("P").save(tmp_path / "scene.png")
    with pytest.raises(ImageError, match="numbers of colours in a table"):
        segment_raster(model, tmp_path / "scene.png", tmp_path / "map.tif")


# --- what is refused, and what stays ----------------------------------------------------------------------------------


def test_nothing_is_overwritten_or_half_written(model, tmp_path):
    source = write(tmp_path / "scene.tif", noise())
    old = tmp_path / "map.tif"
    old.write_bytes(b"mine")
    with pytest.raises(SaveError, match="map.tif exists"):
        segment_raster(model, source, old, **WINDOWS)
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes(write(tmp_path / "tiled.tif", noise((600, 600)), tiled=True).read_bytes()[:-300_000])
    with pytest.raises(ImageError, match=r"damaged.tif is truncated or damaged \("):
        segment_raster(model, damaged, old, overwrite=True, crop=(256, 256), stride=(256, 256))
    assert old.read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.tif", "map.tif", "scene.tif", "tiled.tif"]
    segment_raster(model, source, old, overwrite=True, **WINDOWS)
    assert read(old).shape == (70, 140)


def test_what_is_no_raster_is_refused(model, tmp_path):
    (tmp_path / "text.tif").write_text("no picture")
    (tmp_path / "elsewhere.vrt").write_text("<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>")
    for name in ("text.tif", "elsewhere.vrt"):
        with pytest.raises(ImageError, match=f"{name} cannot be read as a raster"):
            segment_raster(model, tmp_path / name, tmp_path / "map.tif")
    for source in (tmp_path / "none.tif", "https://example.org/scene.tif", "/vsicurl/https://example.org/scene.tif"):
        with pytest.raises(ImageError, match="no such file"):
            segment_raster(model, source, tmp_path / "map.tif")
    source = write(tmp_path / "scene.tif", noise((40, 60)))
    with pytest.raises(SaveError, match="the raster itself"):
        segment_raster(model, source, source, overwrite=True)
    with pytest.raises(SaveError, match="saved as .tif"):
        segment_raster(model, source, tmp_path / "map.png")


def test_without_rasterio(model, tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "scene.tif", noise((40, 60)))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(segzoo.SegzooError, match=r"pip install 'segzoo\[geo\]'"):
        segment_raster(model, source, tmp_path / "map.tif")
    assert main(["predict", str(source), "-o", str(tmp_path / "out")]) == 2
    assert "--no-raster" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_which_files_are_rasters(tmp_path, monkeypatch):
    assert is_raster(write(tmp_path / "geo.tif", noise((40, 60))))
    assert is_raster(write(tmp_path / "big.tif", noise((40, 60), bands=8, dtype="uint16"), bigtiff="yes"))
    Image.fromarray(noise((40, 60))[0]).save(tmp_path / "plain.tif")
    Image.fromarray(noise((40, 60))[0]).save(tmp_path / "plain.png")
    (tmp_path / "damaged.tif").write_bytes((tmp_path / "geo.tif").read_bytes()[:12])
    for name in ("plain.tif", "plain.png", "damaged.tif", "none.tif"):
        assert not is_raster(tmp_path / name)
    monkeypatch.setenv("SEGZOO_MAX_PIXELS", "2399")
    assert is_raster(tmp_path / "plain.tif")


# --- the command line -----------------------------------------------------------------------------------------------


def test_predict_takes_rasters_and_images_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("scene.tif"), noise((64, 96)))
    Image.fromarray(noise((64, 96)).transpose(1, 2, 0)).save("scene.png")
    command = ["predict", "scene.tif", "scene.png"]
    assert main([*command, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    files = {line["image"].rpartition("/")[2]: line["files"] for line in lines}
    assert files["scene.tif"] == {
        "mask": "segzoo_masks/scene.tif",
        "classes": "segzoo_masks/scene_classes.json",
    }
    assert files["scene.png"]["mask"] == "segzoo_masks/scene-2.png"
    with rasterio.open("segzoo_masks/scene.tif") as dataset:
        assert dataset.crs.to_epsg() == 32632
    assert main(command) == 0
    assert "2 skipped" in capsys.readouterr().err
    assert main(["predict", "scene.tif", "--no-raster", "-o", "images"]) == 0
    assert sorted(path.name for path in Path("images").iterdir()) == [
        *("scene.png", "scene_classes.json", "scene_overlay.png")
    ]
    assert main(["predict", "scene.png", "--raster", "--bands", "3", "2", "1", "-o", "maps"]) == 0
    assert SavedRaster.of(Path("maps/scene.png")).mask.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["scene.tif", "--resize", "32", "32"], "--resize is not of rasters, such as scene.tif"),
        (["scene.tif", "--flip"], "--flip is not of rasters"),
        (["scene.tif", "--mode", "whole"], "--mode whole is not of rasters"),
        (["plain.png", "--bands", "1", "2", "3"], "--bands is of rasters"),
        (["plain.png", "--no-raster", "--range", "0", "9"], "--range is of rasters"),
        (["https://example.org/scene.tif", "--raster"], "fetch it first"),
        (["scene.tif", "--raster", "--model", "segformer_b0_keypoints"], "--raster is of masks"),
    ],
)
def test_options_that_do_not_fit(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(Path("scene.tif"), noise((40, 60)))
    Image.fromarray(noise((40, 60))[0]).save("plain.png")
    assert main(["predict", *options]) == 2
    assert words in capsys.readouterr().err
    assert not Path("segzoo_masks").exists()


# --- memory ---------------------------------------------------------------------------------------------------------

CHILD = r"""
import re, sys
import torch
import segzoo
from segzoo.scale import segment_raster
torch.set_num_threads(1)
torch.manual_seed(0)
model = segzoo.create_model("test_edaformer", num_classes=19).eval()
segment_raster(model, sys.argv[1], sys.argv[2], crop=(512, 512), stride=(512, 512))
print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])  # ru_maxrss has the parent's, too
"""


@pytest.mark.slow
def test_12000_x_6000_pixels_within_1_gib(tmp_path):
    """All scores of the picture would be 5.1 GiB, and those of one row of windows 0.4 GiB."""
    strip = noise((600, 12_000))
    options = {"driver": "GTiff", "dtype": "uint8", "count": 3, "tiled": True, **WHERE}
    with rasterio.open(tmp_path / "scene.tif", "w", width=12_000, height=6_000, **options) as dataset:
        for top in range(0, 6_000, 600):
            dataset.write(strip, window=rasterio.windows.Window(0, top, 12_000, 600))
    paths = [str(tmp_path / name) for name in ("scene.tif", "map.tif")]
    child = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 2**20
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.shape == (6_000, 12_000)
        assert (dataset.read(1) != 255).all()
