"""`segzoo train` and `segzoo data scenes` through `segzoo.cli.main`: what they make, say and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import segzoo
from segzoo.cli import main
from segzoo.cli.data import DRAWN_NAMES
from segzoo.cli.train import _duration, _Report
from segzoo.data.segmentation import DRAWN

SMALL = ["--cpu", "--steps", "2", "--batch-size", "2", "--crop", "32", "32", "--size", "32", "64", "--lr", "1e-3"]


@pytest.fixture
def street(tmp_path, monkeypatch, capsys) -> Path:
    monkeypatch.chdir(tmp_path)
    words = ["data", "scenes", "street", "--count", "3", "--val-count", "2", "--size", "32", "64"]
    assert main(words) == 0
    assert capsys.readouterr().out == "5 pictures with masks in street\n"
    return tmp_path / "street"


def test_from_pictures_to_a_model(street, capsys):
    words = ["train", "test_segformer", "--data", "street", "-o", "run", *SMALL, "--set", "log_every=1"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "the model of step" in said.out and "mIoU" in said.out
    assert "test_segformer from scratch, recipe segformer: 2 steps of 2 of 3 images, validated on 2" in said.err
    assert "step 2/2  loss" in said.err and "0 s left" in said.err
    assert segzoo.create_model("local-dir:run").pretrained_cfg.label_set == "scenes"
    recipe = json.loads(Path("run/recipe.json").read_text())
    assert recipe["name"] == "segformer" and recipe["lr"] == 1e-3 and recipe["size"] == [32, 64]
    assert recipe["warmup_steps"] == 0  # 1500 of 160,000
    assert json.loads(Path("run/run.json").read_text())["start"] == "from scratch"
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folder"] == "run" and 0 <= found["mIoU"] <= 100
    # The same command elsewhere gives the same weights, though they are drawn.
    assert main([*words[:4], "-o", "twin", *words[6:], "--json"]) == 0
    assert Path("twin/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    capsys.readouterr()
    # Its own recipe trains a copy further, without a word about the values; classes are the file's.
    again = ["train", "local-dir:run", "--data", "street", "-o", "more", "--recipe", "run/recipe.json", "--cpu"]
    assert main([*again, "--reduction", "n2d", "--during-training", "--limit", "2", "--val-limit", "1"]) == 0
    assert json.loads(Path("more/run.json").read_text())["start"] == "from local-dir:run"
    assert json.loads(Path("more/run.json").read_text())["data"]["samples"] == 2
    assert "Neighbour2d" in repr(segzoo.plans.current_plan(segzoo.create_model("local-dir:more")))


def test_lists_and_files(street, capsys):
    for split in ("train", "val"):
        names = [path.stem for path in sorted((street / "images" / split).iterdir())]
        lines = [f"images/{split}/{name}.png masks/{split}/{name}.png" for name in names]
        (street / f"{split}.txt").write_text("\n".join(lines))
    words = ["train", "test_segformer", "--data", "street/train.txt", "--val", "street/val.txt", "-o", "run", *SMALL]
    assert main([*words, "--checkpoint", "nowhere.pth"]) == 2
    assert main(words) == 0
    assert json.loads(Path("run/run.json").read_text())["validation"]["samples"] == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--during-training"], "--during-training says when a reduction is in force; add --reduction PLAN"),
        (["--set", "ema_deca=0.9"], "a training recipe has no 'ema_deca'; did you mean ema_decay?"),
        (["--set", "loss=dice"], "loss of a training recipe must be one of ce, ohem, atm, not 'dice'"),
        (["--recipe", "segformr"], "no recipe is called 'segformr'; recipes: edaformer"),
        (["--data", "nowhere"], "nowhere"),
        (["--split", "test"], "has no split 'test'"),
        (["--pretrained"], "test_segformer"),
        (["--workers", "-1"], "--workers must not be negative"),
        (["--set", "crop=256"], "--set crop and --crop say the same; leave one of them out"),
        (["--set", "mixup=0.2"], "mixup has no meaning in a training of masks: add --set mixup=0"),
    ],
)
def test_refusals(words, sentence, street, capsys):
    assert main(["train", "test_segformer", "--data", "street", "-o", "run", *SMALL, *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_value_without_a_name(capsys):
    with pytest.raises(SystemExit):
        main(["train", "test_segformer", "--data", "street", "-o", "run", "--set", "ema"])
    assert "argument --set: ema is not NAME=VALUE" in capsys.readouterr().err


def test_classes_that_nobody_named(street, capsys):
    (street / "dataset.json").unlink()
    words = ["train", "test_segformer", "--data", "street", "-o", "run", *SMALL]
    assert main(words) == 2
    assert "does not say how many classes there are: add --num-classes" in capsys.readouterr().err
    for path in (street / "masks/train").iterdir():
        Image.fromarray(np.full((32, 64), 40, np.uint8)).save(path)
    assert main([*words, "--num-classes", "20"]) == 2
    assert "has labels [40], which are none of the 20 classes" in capsys.readouterr().err


def test_names_without_a_recipe(street, capsys, monkeypatch):
    assert main(["train", "test_swin", "--data", "street", "-o", "run", *SMALL]) == 2
    assert "no CLASS/*.JPEG" in capsys.readouterr().err
    monkeypatch.setattr("segzoo.training.recipes.recipe_of", lambda name: None)
    assert main(["train", "test_segformer", "--data", "street", "-o", "run", *SMALL]) == 2
    assert "test_segformer has no recipe of its own; name one: --recipe edaformer or eft" in capsys.readouterr().err


def test_which_splits(street, capsys):
    """No split is trained and measured on by accident; --val brings its own splits."""
    flat = Path("flat")
    for kind in ("images", "masks"):
        shutil.copytree(street / kind / "val", flat / kind)
        shutil.rmtree(street / kind / "train")
    shutil.copy(street / "dataset.json", flat)
    words = ["train", "test_segformer", "--data", "street", "-o", "run", *SMALL]
    assert main(words) == 2
    assert "--data street has no split train, but val, all; say which with --split" in capsys.readouterr().err
    assert main([*words, "--split", "val", "--val", "flat"]) == 0
    record = json.loads(Path("run/run.json").read_text())
    assert record["data"]["split"] == "val" and record["validation"]["split"] == "all"


def test_an_interrupted_training_says_how_it_goes_on(street, capsys, monkeypatch):
    recipes = []

    def interrupted(*args, recipe, **kwargs):
        recipes.append(recipe)
        raise KeyboardInterrupt

    monkeypatch.setattr("segzoo.training.engine.train", interrupted)
    words = ["train", "test_segformer", "--data", "street", "-o", "run", "--cpu"]
    for steps in (["--steps", "16"], ["--set", "steps=16"]):  # the warm-up is a share of them either way
        assert main([*words, *steps]) == 130
        assert "stopped; the same command goes on after the last checkpoint" in capsys.readouterr().err
    assert recipes[0] == recipes[1]
    assert recipes[0].warmup_steps < recipes[0].steps == 16


def test_classifiers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")):
        Path("pets", split, name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (50, 90, 130)).save(Path("pets", split, name, "0.png"))
    words = ["train", "test_mit", "--data", "pets", "-o", "run", *SMALL]
    assert main([*words, "--num-classes", "5"]) == 2
    assert "--num-classes 5: there are 2 class folders" in capsys.readouterr().err
    assert main([*words, "--set", "loss=ohem"]) == 2
    assert "loss ohem is of pixels, and this is a classifier: add --set loss=ce" in capsys.readouterr().err
    assert main([*words, "--set", "dice_weight=1"]) == 2
    assert "dice_weight has no meaning in a training of a classifier" in capsys.readouterr().err
    Path("pets/val/dog").rename("pets/val/eel")
    assert main(words) == 2
    assert "class 1 is 'dog' in the training data and 'eel' in the validation data" in capsys.readouterr().err
    assert not Path("run").exists()
    report = _Report(as_json=False)
    report.total = 9
    report.watch({"step": 1, "loss": 1.0, "top-1": 0.5})
    report.watch({"step": 2, "loss": 1.0})
    assert capsys.readouterr().err.count(", top-1 50.00,") == 2


def test_drawing_takes_no_place(street, capsys):
    assert DRAWN_NAMES == tuple(DRAWN)
    assert main(["data", "scenes", "street"]) == 2
    assert "street exists and is not empty; choose another place" in capsys.readouterr().err
    assert main(["data", "scenes", "other", "--no-reduce-zero-label"]) == 2
    assert "--reduce-zero-label is not of `segzoo data scenes`; leave it out" in capsys.readouterr().err
    assert main(["data", "check", "street", "--count", "2"]) == 2
    assert "--count is not of `segzoo data check`; leave it out" in capsys.readouterr().err
    assert main(["data", "scenes", "other", "--count", "1", "--val-count", "1", "--size", "8", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "other", "images": 2}
    with Image.open("other/images/val/00000.png") as image:
        assert image.size == (16, 8)


def test_remaining_time_in_words():
    assert [_duration(seconds) for seconds in (3, 89, 200, 3 * 3600)] == ["3 s", "89 s", "3 min", "3.0 h"]
