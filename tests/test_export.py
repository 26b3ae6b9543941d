"""Bundles: what is in the file, that it gives the model's masks at any size, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_engines import PHOTO, REDUCED, SEGMENTERS, assert_scores, tiny

import segzoo
from segzoo import Neighbour1d
from segzoo._errors import ImageError
from segzoo.cli import main
from segzoo.data import scenes
from segzoo.engines import bundles
from segzoo.plans import current_plan
from segzoo.prediction import score_maker
from segzoo.preprocess import to_input

DOCUMENT = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
SUFFIXES = [".onnx", ".xml", ".pt2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def bundle(folder) -> Path:
    """Of a reduced model, in ONNX."""
    return segzoo.export(tiny("test_edaformer", "fast"), folder / "edaformer.onnx")


@pytest.fixture(scope="module")
def masks(folder) -> Path:
    return segzoo.export(tiny("test_edaformer"), folder / "masks.onnx", with_mask=True)


def metadata_of(path: Path) -> dict:
    import onnx

    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}["segzoo"])


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_bundle_says(bundle):
    import onnx

    proto = onnx.load(bundle)
    onnx.checker.check_model(proto)
    (image,) = proto.graph.input
    assert [output.name for output in proto.graph.output] == ["scores", "head"]
    assert [bool(dim.dim_param) for dim in image.type.tensor_type.shape.dim] == [True, False, True, True]
    about = metadata_of(bundle)
    assert (about["bundle"], about["name"], about["form"]) == (1, "test_edaformer", "scores")
    assert about["mean"] == [0.485, 0.456, 0.406]
    assert len(about["labels"]) == len(about["palette"]) == proto_classes(proto)
    assert about["reduction"]["encoder.0"] == 2
    assert "approximates" in about["exactness"]
    assert about["versions"]["segzoo"] == segzoo.__version__
    assert 1 <= about["smallest_side"] <= 128


def proto_classes(proto) -> int:
    return proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value


def test_an_engine_of_the_file_is_the_model(bundle):
    model = tiny("test_edaformer", "fast")
    engine = segzoo.load_engine(bundle, threads=1)
    assert_scores(model, engine.runner)
    expected, result = segzoo.predict(model, PHOTO), segzoo.predict(engine, PHOTO)
    assert (result.mask == expected.mask).mean() >= 0.9999
    assert (result.plan, result.label_set) == (expected.plan, expected.label_set)
    about = metadata_of(bundle)
    with pytest.raises(ImageError, match="resize="):
        segzoo.predict(engine, PHOTO, resize=(about["smallest_side"] - 1, 200))


def test_scores_at_input_size(bundle):
    import onnxruntime

    model = tiny("test_edaformer", "fast")
    x_BCHW = torch.randn(2, 3, 131, 170)
    session = onnxruntime.InferenceSession(bundle, providers=["CPUExecutionProvider"])
    scores = session.run(["scores"], {"image": x_BCHW.numpy()})[0]
    with torch.inference_mode():
        expected = model(x_BCHW).numpy()
    assert np.abs(scores - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_command_line_runs_the_file(bundle, tmp_path, capsys):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    assert main(["predict", str(tmp_path / "photo.png"), "-o", str(tmp_path / "o"), "--engine-file", str(bundle)]) == 0
    with Image.open(tmp_path / "o" / "photo.png") as image:
        assert (np.asarray(image) == segzoo.predict(tiny("test_edaformer", "fast"), PHOTO).mask).mean() >= 0.9999


# --- the documented script --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_needs_no_segzoo(masks, tmp_path):
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL) if "onnxruntime" in block
    ]
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) <= 30
    (tmp_path / "segment.py").write_text(code)
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    command = [sys.executable, "-I", "segment.py", str(masks), "photo.png", "mask.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "class" in done.stdout
    model = tiny("test_edaformer")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        # Pillow rounds the resized picture to whole greys, which moves borders of noise.
        assert (np.asarray(image) == segzoo.predict(model, PHOTO).mask).mean() > 0.97


def test_masks_of_images_that_need_no_resize_are_exact(masks):
    import onnxruntime

    session = onnxruntime.InferenceSession(masks, providers=["CPUExecutionProvider"])
    model = tiny("test_edaformer")
    for size, out in (((96, 160), (90, 130)), ((131, 97), (131, 97))):
        image = np.random.default_rng(1).integers(0, 256, (1, *size, 3), dtype=np.uint8)
        (mask,) = session.run(["mask"], {"image": image, "canvas": np.empty(out, np.uint8)})
        with torch.inference_mode():
            maker = score_maker(model)
            x_BCHW = to_input(image[0], size, maker.row, maker.like)
            expected = model.to_size(maker.head_output(x_BCHW), out).argmax(1).numpy()
        assert mask.dtype == np.uint8
        assert (mask == expected).mean() >= 0.9999


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_existing_file_stays(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(segzoo.SegzooError, match="overwrite"):
        segzoo.export(tiny("test_segformer"), path)
    (tmp_path / "model.bin").write_text("mine")
    with pytest.raises(segzoo.SegzooError, match=r"model\.bin exists"):
        segzoo.export(tiny("test_segformer"), tmp_path / "model.xml")
    assert main(["export", "edaformer_t.scenes", "-o", str(path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fails(program, path, text):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "dynamic_program", lambda form: bundles.Program(None, ("image",), ("scores",), 1))
    monkeypatch.setitem(bundles.WRITERS, "pt2", fails)
    (tmp_path / "a.pt2").write_text("mine")
    with pytest.raises(segzoo.SegzooError, match="No space left"):
        segzoo.export(tiny("test_segformer"), tmp_path / "a.pt2", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]
    assert (tmp_path / "a.pt2").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.bin", {}, r"\.onnx, \.xml, \.pt2"),
        ("a.onnx", {"format": "pt2"}, r"ending \.pt2"),
        ("a.onnx", {"format": "tflite"}, "onnx, openvino, pt2"),
    ],
)
def test_names_and_formats(name, options, message, tmp_path):
    with pytest.raises(segzoo.SegzooError, match=message):
        segzoo.export(tiny("test_segformer"), tmp_path / name, **options)


def test_models_that_no_file_can_hold(tmp_path):
    with pytest.raises(segzoo.SegzooError, match=r"Bipartite.*n2d"):
        segzoo.export(tiny("test_segformer", "hq"), tmp_path / "a.onnx")
    with pytest.raises(segzoo.SegzooError, match="heatmaps"):
        segzoo.export(tiny("test_segformer_keypoints"), tmp_path / "a.onnx", with_mask=True)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_bundles(tmp_path, masks):
    with pytest.raises(segzoo.SegzooError, match="gives masks by itself"):
        segzoo.load_engine(masks)
    with pytest.raises(segzoo.SegzooError, match="no such file"):
        segzoo.load_engine(tmp_path / "a.onnx")
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix}").write_bytes(b"abc")
    for suffix, message in ((".onnx", "cannot be read"), (".xml", "cannot be read"), (".pt2", "trust_code=True")):
        with pytest.raises(segzoo.SegzooError, match=message):
            segzoo.load_engine(tmp_path / f"a{suffix}")
    with pytest.raises(segzoo.SegzooError, match="cannot be read"):
        segzoo.load_engine(tmp_path / "a.pt2", trust_code=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": 2}, "reads version 1"),
        ({"bundle": 1, "form": "scores", "config": None}, "damaged"),
        ({"form": "scores"}, "no bundle of segzoo"),
    ],
)
def test_metadata_that_is_none(change, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        bundles._parsed(Path("a.onnx"), json.dumps(change))
    with pytest.raises(segzoo.SegzooError, match="no bundle of segzoo"):
        bundles._parsed(Path("a.onnx"), "{")


# --- every family -----------------------------------------------------------------------------------------------------


# Each format once in the slow tier; the others where every combination is asked for.
FILES = [
    pytest.param(False, ".onnx", marks=pytest.mark.slow),
    pytest.param(True, ".xml", marks=pytest.mark.slow),
    pytest.param(False, ".pt2", marks=pytest.mark.slow),
    pytest.param(True, ".onnx", marks=pytest.mark.exhaustive),
    pytest.param(False, ".xml", marks=pytest.mark.exhaustive),
    pytest.param(True, ".pt2", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("reduced", "suffix"), FILES)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_family_and_format(name, reduced, suffix, tmp_path):
    model = tiny(name, REDUCED.get(name, 2) if reduced else None)
    path = segzoo.export(model, tmp_path / f"model{suffix}")
    engine = segzoo.load_engine(path, threads=None if suffix == ".pt2" else 1, trust_code=suffix == ".pt2")
    assert_scores(model, engine.runner)
    assert engine.plan == segzoo.predict(model, PHOTO).plan


# In .xml the slow tier has n2d already, above.
NEIGHBOURS = [
    pytest.param("n2d", ".onnx", id="n2d-onnx"),
    pytest.param({"encoder.q": Neighbour1d(3)}, ".onnx", id="n1d-onnx"),
    pytest.param({"encoder.q": Neighbour1d(3)}, ".xml", id="n1d-openvino"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "suffix"), NEIGHBOURS)
def test_merging_by_neighbours(plan, suffix, tmp_path):
    model = tiny("test_segformer", plan)
    engine = segzoo.load_engine(segzoo.export(model, tmp_path / f"model{suffix}"), threads=1)
    assert_scores(model, engine.runner)
    assert engine.plan == current_plan(model)
    assert not engine.plan.is_neutral


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["test_segvit", "test_rtformer"])
def test_masks_of_every_form(name, suffix, tmp_path):
    assert segzoo.export(tiny(name), tmp_path / f"model{suffix}", with_mask=True).is_file()


@pytest.mark.slow
def test_the_commands_of_the_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scenes.render(seed=1_000_000)[0]).save("photo.jpg")
    (python,) = [block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL) if "compile" in block]
    exec(compile(python, "docs/deploy.md", "exec"), {})
    lines = "".join(re.findall(r"```sh\n(.*?)```", DOCUMENT, flags=re.DOTALL)).splitlines()
    for line in lines:
        program, *words = line.split()
        if program == "segzoo":
            assert main(words) == 0, line
    assert {"street.onnx", "street_mask.onnx", "masks"} <= {path.name for path in tmp_path.iterdir()}
