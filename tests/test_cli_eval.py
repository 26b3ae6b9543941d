"""`segzoo eval` and `segzoo data check` through `segzoo.cli.main`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segzoo
from segzoo.cli import main
from segzoo.data import scenes
from segzoo.models.rows import PretrainedCfg


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny model of the scenes' classes, saved."""
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=13)
    model.pretrained_cfg = PretrainedCfg(dataset="scenes", label_set="scenes", num_classes=13, test_size=(32, 64))
    folder = tmp_path_factory.mktemp("model")
    segzoo.save_pretrained(model, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def street(tmp_path) -> Path:
    """Two small scenes in a folder of images and one of masks."""
    for i in range(2):
        image, labels = scenes.render(seed=i, size=(32, 64))
        for folder, array in (("images", image), ("masks", labels)):
            (tmp_path / "street" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "street" / folder / f"{i}.png")
    (tmp_path / "street/dataset.json").write_text('{"label_set": "scenes"}')
    return tmp_path / "street"


def refused(capsys, *argv: object) -> str:
    assert main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("segzoo: error: ")
    return message


def test_eval_prints_a_table(model, street, capsys):
    assert main(["eval", model, "--data", str(street), "--reduction", "base", "fast"]) == 0
    out = capsys.readouterr().out
    assert "on folder all, 2 samples: short side up to 32, long side up to 64; whole image; single scale" in out
    lines = out.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("reduction"))
    assert lines[heading].split()[1:3] == ["mIoU", "small"] and "published mIoU" in lines[heading]
    assert lines[heading + 1].startswith("base") and lines[heading + 2].startswith("fast")
    assert any(line.startswith("traffic light") for line in lines)


def test_eval_as_json_and_files(model, street, tmp_path, capsys):
    argv = ["eval", model, "--data", str(street), "--protocol", "slide+flip", "--limit", "1", "--json"]
    assert main([*argv, "-o", str(tmp_path / "out")]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["samples"] == 1 and record["protocol"] == "slide+flip" and record["reduction"] == "as is"
    assert sum(map(sum, record["confusion"])) == 32 * 64
    assert record["published mIoU"] is None  # the weights are the test's own
    assert json.loads((tmp_path / "out/results.json").read_text()) == [record]
    names = {"results.json", "results.csv", "classes.csv", "classes.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_eval_on_scenes(model, capsys):
    assert main(["eval", model, "--data", "scenes", "--limit", "1", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["data"] == "scenes" and record["split"] == "val" and record["small mIoU"] is not None
    assert sum(map(sum, record["confusion"])) == 256 * 512


def test_eval_of_engines(model, street, capsys):
    """What an engine computes is what the model does, under the name of the reduction."""
    argv = ["eval", "--data", str(street), "--json"]
    plans = ["--reduction", "base", "fast"]
    assert main([*argv, model, *plans]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([*argv, model, *plans, "--engine", "eager"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["reduction"] for record in records] == ["base", "fast"]
    assert [record["plan"] for record in records] == [record["plan"] for record in plain]
    for record, expected in zip(records, plain, strict=True):
        moved = np.abs(np.array(record["confusion"]) - np.array(expected["confusion"])).sum()
        assert moved <= 8  # folding rounds otherwise
        assert (record["engine"], record["dtype"]) == ("eager", "float32") and expected["engine"] == "torch"
    assert main([*argv, model, "--engine", "eager", "--precision", "bf16", "--limit", "1"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["engine"], record["dtype"], record["reduction"]) == ("eager", "bfloat16", "as is")


def test_eval_of_an_exported_file(model, street, monkeypatch, capsys):
    """The file's engine is what is measured; how it comes out of the file is for test_export.py."""
    source = segzoo.create_model(model, pretrained=True)
    source.set_inference_reduction("fast")
    asked = []

    def load_engine(*args, **options):
        asked.append((args, options))
        return segzoo.compile(source, "eager")

    monkeypatch.setattr("segzoo.engines.load_engine", load_engine)
    argv = ["eval", "--data", str(street), "--limit", "1", "--json", "--engine-file", "m.onnx"]
    assert main([*argv, "--precision", "bf16", "--threads", "1", "--trust-code"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["plan"] == json.loads(source.set_inference_reduction("fast").to_json())
    assert (record["engine"], record["reduction"], record["samples"]) == ("eager", "as is", 1)
    assert asked == [(("m.onnx",), {"precision": "bf16", "threads": 1, "trust_code": True})]


def test_eval_refuses_options_that_exclude_each_other(model, street, capsys):
    argv = ["eval", "--data", street]
    assert "name a model, or a file" in refused(capsys, *argv)
    assert "model does not go with --engine-file" in refused(capsys, *argv, model, "--engine-file", "x.onnx")
    message = refused(capsys, *argv, "--engine-file", "x.onnx", "--reduction", "base")
    assert "--reduction does not go with --engine-file" in message
    assert "add --engine openvino" in refused(capsys, *argv, model, "--precision", "bf16")
    assert "runs on the processor" in refused(capsys, *argv, model, "--engine", "eager", "--device", "cuda")
    assert "engine must be one of" in refused(capsys, *argv, model, "--engine", "abacus")


def test_eval_of_keypoints(tmp_path, capsys):
    torch.manual_seed(0)
    model = segzoo.create_model("test_segformer_keypoints", num_classes=4)
    segzoo.save_pretrained(model, tmp_path / "model")
    assert main(["eval", f"local-dir:{tmp_path / 'model'}", "--data", "car_corners", "--limit", "2", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    argv = ["eval", f"local-dir:{tmp_path / 'model'}", "--data", "car_corners", "--limit", "1", "--engine", "eager"]
    assert "leave out the engine" in refused(capsys, *argv)
    assert 0 <= record["PCK@0.2"] <= 100 and record["samples"] == 2


def test_eval_of_a_classifier(tmp_path, capsys):
    torch.manual_seed(0)
    segzoo.save_pretrained(segzoo.create_model("test_mit", num_classes=2), tmp_path / "model")
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "val" / name / "1.png")
    assert main(["eval", f"local-dir:{tmp_path / 'model'}", "--data", str(tmp_path)]) == 0
    assert "top-1" in capsys.readouterr().out


def test_eval_refuses(model, street, capsys):
    assert "no such folder" in refused(capsys, "eval", model, "--data", street / "nowhere")
    assert "protocols: row, whole" in refused(capsys, "eval", model, "--data", street, "--protocol", "x")
    assert "no preset is called 'x'" in refused(capsys, "eval", model, "--data", street, "--reduction", "x")
    (street / "dataset.json").write_text('{"classes": ["a", "b"]}')
    assert "has 13 classes, but folder has 2" in refused(capsys, "eval", model, "--data", street)


def test_data_check(street, tmp_path, capsys):
    assert main(["data", "check", str(street), "-o", str(tmp_path / "chart.png")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("folder, split all: 2 images, 13 classes, no fault found")
    assert "sky" in out and "####" in out
    with Image.open(tmp_path / "chart.png") as chart:
        assert chart.format == "PNG"


def test_data_check_says_what_is_wrong(street, capsys):
    (street / "masks/0.png").unlink()
    assert main(["data", "check", str(street), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["findings"][0]["kind"] == "missing"


def test_data_check_takes_what_the_data_do_not_say(street, capsys):
    (street / "dataset.json").unlink()
    for i in range(2):
        Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8).repeat(16, 0).repeat(32, 1)).save(
            street / f"masks/{i}.png"
        )
    assert main(["data", "check", str(street), "--num-classes", "3"]) == 2
    assert "set reduce_zero_label" in capsys.readouterr().out
    assert main(["data", "check", str(street), "--num-classes", "3", "--reduce-zero-label"]) == 0
    assert "ignored (255): 25.00 %" in capsys.readouterr().out


def test_data_check_refuses(street, tmp_path, capsys):
    assert "drawn, not read" in refused(capsys, "data", "check", "scenes")
    assert "saved as .png" in refused(capsys, "data", "check", street, "-o", tmp_path / "chart.jpg")
    assert "no split 'val'" in refused(capsys, "data", "check", street, "--split", "val")
