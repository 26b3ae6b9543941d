"""The command as a user runs it: real processes, their exit codes, what they print and the files they leave."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import segzoo
from segzoo.cli.predict import output_paths
from segzoo.data import scenes


def run(*args: object, cwd=None, env=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "segzoo", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})},
        timeout=300,
    )


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "street.png"
    Image.fromarray(scenes.render(seed=3_000_000, size=(128, 256))[0]).save(path)
    return path


def test_help_loads_no_torch():
    code = (
        "import sys; from segzoo.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb in ("list", "info", "predict", "demo", "convert", "publish"):
        assert verb in result.stdout


def test_help_of_the_module():
    assert "segzoo" in run("--help").stdout


def test_import_segzoo_loads_no_torch():
    code = "import sys, segzoo; dir(segzoo); assert 'torch' not in sys.modules; assert segzoo.__version__"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_list():
    result = run("list", "eda*", "--json")
    names = [row["name"] for row in json.loads(result.stdout)]
    assert names == segzoo.list_models("eda*")
    text = run("list", "edaformer_t").stdout
    assert "4,929,914" in text
    pretrained = json.loads(run("list", "--pretrained", "--json").stdout)
    assert [row["name"] for row in pretrained] == segzoo.list_pretrained()
    assert "segzoo info NAME.TAG" in run("list", "--pretrained", "eft_t.*").stdout
    assert "segzoo info" not in run("list", "--pretrained", "mit_b0.*").stdout
    refused(run("list", "nothing*"), "nothing*", "segzoo list")


def test_info():
    result = json.loads(
        run("info", "edaformer_t", "--num-classes", 150, "--size", 512, 512, "--reduction", "optimal", "--json").stdout
    )
    assert result["published_gmacs"] == 4.7
    assert result["macs"] == pytest.approx(4_664_961_024, rel=1e-3)
    assert sum(result["stages"].values()) == result["macs"]
    assert result["reduction"]["encoder.0"] == 2
    text = run("info", "edaformer_t.ade20k", "--reduction", "optimal").stdout
    assert "4.930 M parameters, 4.665 GMACs at 512x512" in text
    assert "published: 4.7 GMACs" in text
    refused(run("info", "edaformr_t"), "edaformer_t")
    refused(run("info", "edaformer_t", "--reduction", "quick"), "quick", "optimal")
    refused(run("info", "edaformer_t", "--size", 0, 5), "--size")


def test_predict(scene, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    other = tmp_path / "other" / "street.png"
    other.parent.mkdir()
    other.write_bytes(scene.read_bytes())
    result = run("predict", scene, bad, other, tmp_path / "missing.png", "-o", tmp_path / "out", "--reduction", "fast")
    refused(result, str(bad), str(tmp_path / "missing.png"))
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["street-2.png", "street-2_overlay.png", "street.png", "street_overlay.png"]
    assert "road" in result.stdout
    with Image.open(tmp_path / "out" / "street.png") as mask:
        assert mask.size == (256, 128)


def test_predict_with_several_views(scene, tmp_path):
    assert run("predict", scene, "-o", tmp_path, "--scales", 0.5, 1, "--flip").returncode == 0
    expected = segzoo.predict(segzoo.create_model("edaformer_t", pretrained=True), scene, scales=(0.5, 1), flip=True)
    with Image.open(tmp_path / "street.png") as mask:
        assert (np.asarray(mask) == expected.mask).mean() > 0.999  # another number of threads rounds otherwise
    refused(run("predict", scene, "-o", tmp_path, "--scales", 0), "scales", "0.75")


def test_predict_json(scene, tmp_path):
    result = run("predict", scene, "-o", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    image = json.loads(result.stdout)["images"][0]
    assert image["size"] == [128, 256]
    assert sum(label["pixels"] for label in image["labels"]) == 128 * 256
    python = segzoo.predict(segzoo.create_model("edaformer_t", pretrained=True), scene)
    with Image.open(image["mask"]) as mask:
        assert np.array_equal(np.asarray(mask), python.mask)


def test_no_image_is_overwritten(scene, tmp_path):
    for name in ("a.png", "b_overlay.png"):
        (tmp_path / name).write_bytes(scene.read_bytes())
    (tmp_path / "link").symlink_to(tmp_path)
    result = run("predict", scene, "a.png", "-o", "link", cwd=tmp_path)
    refused(result, "link/a.png is one of the images", "-o")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b_overlay.png", "link"]
    with pytest.raises(segzoo.SegzooError, match="b_overlay.png is one of the images"):
        output_paths(["other/b.png", str(tmp_path / "b_overlay.png")], tmp_path)


def test_output_names_are_distinct():
    images = ["a.png", "a_overlay.png", "b/a.png", "b_overlay.png", "b.png"]
    paths = output_paths(images, Path("out"))
    overlays = [path.with_name(f"{path.stem}_overlay.png") for path in paths]
    assert len({*paths, *overlays}) == 2 * len(images)
    assert [path.name for path in paths] == ["a.png", "a_overlay-2.png", "a-2.png", "b_overlay.png", "b-2.png"]


def test_no_untrained_classifier_segments(scene, tmp_path):
    out, file = tmp_path / "out", tmp_path / "weights.safetensors"
    save_file(segzoo.create_model("test_edaformer", num_classes=7).state_dict(), file)
    refused(run("predict", scene, "-o", out, "--num-classes", 5), "--num-classes 5", "have 13 classes", "--checkpoint")
    tiny = ("predict", scene, "-o", out, "--model", "test_edaformer", "--checkpoint", file)
    refused(run(*tiny, "--num-classes", 5), "(7, 32, 1, 1)", "--num-classes")
    assert not out.exists()
    for _ in range(2):  # results of the same command may be overwritten
        assert run(*tiny, "--num-classes", 7).returncode == 0


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_bad_checkpoints(scene, tmp_path):
    out = tmp_path / "out"
    files = {"evil.pth": pickle.dumps({"a": Malicious()}), "empty.safetensors": b"", "cut.safetensors": b"\x08" * 30}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        refused(run("predict", scene, "-o", out, "--checkpoint", tmp_path / name, cwd=tmp_path), name)
    refused(run("predict", scene, "-o", out, "--checkpoint", tmp_path / "none.pth"), "none.pth")
    refused(run("predict", scene, "-o", out, "--checkpoint", tmp_path), "is a directory")
    refused(run("predict", scene, "-o", out, "--model", "edaformer_b"), "edaformer_b", "Google Drive")
    refused(run("predict", scene, "-o", out, "--device", "warp"), "--device warp")
    refused(run("predict", scene, "-o", out, "--alpha", "2"), "--alpha")
    assert not out.exists()
    assert not (tmp_path / "executed").exists()


def test_demo(tmp_path):
    result = run("demo", "-o", tmp_path, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    table = {row["reduction"]: row for row in report["table"]}
    assert list(table) == ["base", "decoder", "optimal", "fast"]
    assert table["base"]["mIoU"] > 0.7
    assert table["optimal"]["mIoU"] > table["base"]["mIoU"] - 0.02
    assert table["base"]["GMACs"] > table["optimal"]["GMACs"] > table["fast"]["GMACs"]
    for file in report["files"]:
        with Image.open(file) as panel:
            assert panel.width == 4 * 512
    assert len(list(tmp_path.iterdir())) == 3
