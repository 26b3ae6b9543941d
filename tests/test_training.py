"""The engine: every family learns, a stopped training goes on exactly, nothing is lost on a full disk, the run folder
is a model, and what cannot work is refused before it starts."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import random
import resource
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import segzoo
from segzoo._errors import SaveError, SegzooError
from segzoo.data import scenes
from segzoo.data.classification import open_classification
from segzoo.data.drawing import write_drawn
from segzoo.data.segmentation import Sample, SegmentationData, open_data
from segzoo.labels import load_labels
from segzoo.layers.reduction import NEUTRAL
from segzoo.plans import current_plan, reduction_sites
from segzoo.training import runs
from segzoo.training.engine import evaluation_steps, random_state, set_random_state, train, update_average
from segzoo.training.evaluation import evaluate
from segzoo.training.recipes import Recipe

TINY = Recipe(
    steps=6, batch_size=2, crop=(32, 32), size=None, lr=1e-3, log_every=1, save_every=2, evaluations=1, ema_decay=0.9
)
PLAN = {"encoder": (2, 1, 1, 1)}


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    """Eight pictures for training, two for validation."""
    folder = tmp_path_factory.mktemp("data") / "street"
    write_drawn("scenes", folder, counts={"train": 8, "val": 2}, size=(48, 96))
    return folder


@pytest.fixture
def data(street):
    return open_data(street, split="train")


@pytest.fixture
def held_out(street):
    return open_data(street, split="val")


def made(name: str = "test_edaformer", **options) -> segzoo.models.base.Model:
    torch.manual_seed(0)
    return segzoo.create_model(name, num_classes=13, **options)


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@dataclasses.dataclass(frozen=True)
class Windows(SegmentationData):
    """The middle of eight scenes, 64 pixels square."""

    samples: tuple[Sample, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


@pytest.fixture(scope="module")
def windows() -> Windows:
    samples = []
    for seed in range(8):
        image_HWC, labels_HW = scenes.render(seed=seed, size=(256, 512))
        part = np.s_[96:160, 40 * seed + 20 : 40 * seed + 84]
        samples.append(Sample(image_HWC[part], labels_HW[part], f"scene {seed}"))
    return Windows(name="windows", split="train", labels=load_labels("scenes"), samples=tuple(samples))


# Steps, and what else the recipe needs; options of the model. SegViT's tiny variant is widened, with smaller patches.
STILL = {"drop_path_rate": 0.0, "dropout": 0.0}
WIDE = {"patch_size": 8, "embed_dim": 128, "num_heads": 4, "decoder_dim": 128, "decoder_num_heads": 4}
FAMILIES = {
    "test_edaformer": ({"steps": 180}, {**STILL, "decoder_drop_path": 0.0}),
    "test_segformer": ({"steps": 160}, STILL),
    "test_rtformer": ({"steps": 180}, {"drop_path_rate": 0.0}),
    "test_segvit": (
        {"steps": 360, "loss": "atm", "lr": 2e-3, "schedule": "cosine", "warmup_steps": 20, "clip_grad": None},
        {**STILL, **WIDE},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_overfits_eight_scenes(name, windows, tmp_path):
    values, model_options = FAMILIES[name]
    own_size = {"crop": (64, 64), "size": None, "scale": (1.0, 1.0), "max_class_share": 1.0, "distort": False}
    common = {"batch_size": 8, "lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 10, "clip_grad": 5.0, "evaluations": 1}
    recipe = Recipe().with_values({**own_size, **common, **values})
    options = {"validation": windows, "recipe": recipe, "folder": tmp_path / "run", "cpu": True}
    trained = train(made(name, **model_options), windows, **options)
    assert trained.metrics["pixel accuracy"] > 0.95


class StoppedError(Exception):
    pass


def stop_at(step: int):
    def watch(row):
        if row["step"] == step:
            raise StoppedError

    return watch


def test_goes_on_exactly(data, held_out, tmp_path):
    """Dropout, drop path, augmentation, moving averages of gradients and of weights: all go on."""
    recipe = dataclasses.replace(TINY, evaluations=2, clip_grad=1.0)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(made(), data, validation=held_out, recipe=recipe, folder=whole, cpu=True)
    for step in (1, 3, 5):  # after which there is no checkpoint, that of step 2, that of step 4
        with pytest.raises(StoppedError):
            options = {"validation": held_out, "recipe": recipe, "folder": stopped, "cpu": True}
            train(made(), data, watch=stop_at(step), **options)
    train(made(), data, validation=held_out, recipe=recipe, folder=stopped, cpu=True)
    assert log_of(stopped) == log_of(whole) and len(log_of(whole)) == 6
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (stopped / "README.md").read_bytes() == (whole / "README.md").read_bytes()


def test_accumulated_parts_are_one_batch(data, tmp_path):
    options = {"optimizer": "sgd", "lr": 0.05, "batch_size": 4, "steps": 2, "freeze_batch_norm": True}
    recipe = dataclasses.replace(TINY, ema_decay=None, **options)
    weights = []
    for accumulation in (1, 2):
        model = made(drop_path_rate=0.0, decoder_drop_path=0.0, dropout=0.0).double()
        recipe = dataclasses.replace(recipe, accumulation=accumulation)
        train(model, data, recipe=recipe, folder=tmp_path / str(accumulation), cpu=True)
        weights.append(model.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[1][name], weights[0][name], rtol=1e-9, atol=1e-12)


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """As on a full disk: what is written beyond so many bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [100_000, 500_000])  # the model has 234,172 bytes, the checkpoint some 800,000
def test_full_disk_leaves_the_last_checkpoint(room, data, tmp_path):
    recipe, folder = dataclasses.replace(TINY, steps=4), tmp_path / "run"
    with pytest.raises(StoppedError):
        train(made(), data, recipe=recipe, folder=folder, cpu=True, watch=stop_at(3))
    names = ("last.pt", "model.safetensors", "config.json", "README.md", "run.json")
    before = {name: (folder / name).read_bytes() for name in names}
    with (
        no_file_beyond(room),
        pytest.raises(SaveError, match=r"of step 4 cannot be written \(.+\); what was saved before"),
    ):
        train(made(), data, recipe=recipe, folder=folder, cpu=True)
    assert (folder / "last.pt").read_bytes() == before["last.pt"]
    if room == 100_000:
        assert {name: (folder / name).read_bytes() for name in names} == before
    assert segzoo.create_model(f"local-dir:{folder}").weights_state == "pretrained"
    assert not list(folder.glob(".*.partial"))
    train(made(), data, recipe=recipe, folder=folder, cpu=True)
    train(made(), data, recipe=recipe, folder=tmp_path / "whole", cpu=True)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_content_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = runs.RunFolder(tmp_path, ())
    folder.save_last({"step": 1}, 1)
    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(SaveError, match=r"the checkpoint of step 2 cannot be written \(.*No space left on device\)"):
        folder.save_last({"step": 2}, 2)
    assert folder.load_last() == {"step": 1}


def test_the_run_folder_is_a_model(data, held_out, tmp_path):
    recipe, folder = dataclasses.replace(TINY, evaluations=2), tmp_path / "run"
    options = {"validation": held_out, "recipe": recipe, "folder": folder, "cpu": True, "start": "from scratch"}
    with pytest.raises(StoppedError):  # only the best so far is there
        train(made(), data, watch=stop_at(3), **options)
    assert segzoo.create_model(f"local-dir:{folder}").weights_state == "pretrained"
    trained = train(made(), data, **options)
    model = segzoo.create_model(f"local-dir:{folder}")
    assert model.name == "test_edaformer" and model.weights_state == "pretrained"
    row = model.pretrained_cfg
    assert (row.label_set, row.num_classes, row.resize, row.license) == ("scenes", 13, "none", "unknown")
    found = evaluate(model, held_out)
    assert found.metrics == pytest.approx(trained.metrics, nan_ok=True)
    assert row.published[0].value == round(100 * trained.metrics["mIoU"], 2)
    card = (folder / "README.md").read_text()
    assert "Measured by segzoo." in card and "| sky |" in card and "reduce_zero_label false" in card
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["ignore_index"] == 255 and record["data"]["classes"][0] == "sky"
    assert {"segzoo", "torch", "accelerate", "commit", "device"} <= record["conditions"].keys()
    assert Recipe().with_values(json.loads((folder / "recipe.json").read_text())) == recipe
    # The finished training is found finished, and stays as it is.
    again = train(made(), data, **options)
    assert again.metrics == pytest.approx(trained.metrics, nan_ok=True) and again.step == trained.step


@pytest.mark.parametrize("during", [False, True])
def test_reduction(during, data, held_out, tmp_path):
    model, folder = made(), tmp_path / "run"
    recipe = dataclasses.replace(TINY, steps=2, ema_decay=None)
    trained = train(
        model,
        data,
        validation=held_out,
        recipe=recipe,
        folder=folder,
        reduction=PLAN,
        during_training=during,
        cpu=True,
    )
    leaves = [leaf for leaves in reduction_sites(model).values() for leaf in leaves]
    assert any(leaf.during_training for leaf in leaves) == during
    saved = segzoo.create_model(f"local-dir:{folder}")
    plan = current_plan(saved)
    assert plan.is_neutral != during
    assert (plan["encoder.0"] != NEUTRAL) == during
    measured = evaluate(saved, held_out, reduction=None if during else PLAN)
    assert measured.metrics == pytest.approx(trained.metrics, nan_ok=True)
    assert "in training and evaluation" if during else "in evaluation alone" in (folder / "README.md").read_text()


def test_a_classifier_with_mixup(tmp_path):
    draw = np.random.default_rng(0)
    from PIL import Image

    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 90, (40, 40, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{i}.png")
    torch.manual_seed(0)
    model = segzoo.create_model("test_eft", num_classes=2)
    recipe = Recipe(
        steps=12,
        batch_size=8,
        crop=(32, 32),
        scale=(0.5, 1.0),
        mixup=0.2,
        lr=3e-3,
        evaluations=1,
        label_smoothing=0.1,
        schedule="cosine",
    )
    train_data, val_data = (open_classification(tmp_path, split=split) for split in ("train", "val"))
    trained = train(model, train_data, validation=val_data, recipe=recipe, folder=tmp_path / "run", cpu=True)
    assert trained.metrics["top-1"] == 1
    saved = segzoo.create_model(f"local-dir:{tmp_path / 'run'}")
    assert saved.pretrained_cfg.label_names == ("dark", "light")
    assert evaluate(saved, val_data).metrics["top-1"] == 1


def test_what_is_on_is_used(data, tmp_path, monkeypatch):
    """Checkpointing, 16 bits, compilation and frozen statistics reach the model."""
    from accelerate.state import AcceleratorState

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    model = made()
    seen = []
    model.decoder.classifier.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    recipe = dataclasses.replace(
        TINY, steps=1, precision="bf16", compile=True, grad_checkpointing=True, freeze_batch_norm=True
    )
    statistics = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        train(model, data, recipe=recipe, folder=tmp_path / "run", cpu=True)
        with pytest.raises(SegzooError, match="one process trains with one precision"):
            train(made(), data, recipe=TINY, folder=tmp_path / "other", cpu=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert compiled == [model.forward_train] and seen == [torch.bfloat16]
    assert any(getattr(module, "checkpointing", False) for module in model.modules())
    assert statistics and all(torch.equal(model.state_dict()[name], value) for name, value in statistics.items())


def test_average_by_hand():
    average, model = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    model.weight.data.fill_(3.0)
    model.running_mean.fill_(10.0)
    model.num_batches_tracked.fill_(7)
    update_average(average, model, 0.75)
    assert average.weight.item() == 1.5 and average.running_mean.item() == 2.5 and average.num_batches_tracked == 7


def test_when_it_is_evaluated():
    assert evaluation_steps(Recipe(steps=10, evaluations=3)) == {3, 7, 10}
    assert evaluation_steps(Recipe(steps=2, evaluations=10)) == {1, 2}


def test_random_states_come_back(tmp_path):
    state = random_state(torch.device("cpu"))
    torch.save(state, tmp_path / "state.pt")
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), torch.device("cpu"))
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == drawn


def test_tensorboard(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SegzooError, match=r"--tensorboard needs tensorboard: pip install 'segzoo\[tensorboard\]'"):
        train(made(), data, recipe=TINY, folder=tmp_path / "run", cpu=True, tensorboard=True)
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "run/tensorboard")

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def close(self):
            written.append("closed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    recipe = dataclasses.replace(TINY, steps=1)
    train(made(), data, recipe=recipe, folder=tmp_path / "run", cpu=True, tensorboard=True)
    assert ("loss", 1) in written and written[-1] == "closed"


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("test_segvit", {}, "is trained with loss atm, not ce: add --set loss=atm"),
        ("test_segformer", {"loss": "atm"}, "is trained with loss ce or ohem, not atm"),
        ("test_segformer_keypoints", {}, "finds keypoints, which this trains not"),
        ("test_eft", {}, "is trained on folders of classes"),
        ("test_segformer", {"precision": "fp16"}, "fp16 is for GPUs"),
        ("test_segformer", {"batch_size": 3, "accumulation": 2}, "must be a multiple of 2"),
        ("test_segformer", {"lr": 1e8, "ema_decay": None}, "the loss of step [0-9]+ is (nan|inf)"),
    ],
)
def test_refusals(name, changes, sentence, data, tmp_path):
    recipe = dataclasses.replace(TINY, **changes)
    with pytest.raises(SegzooError, match=sentence):
        train(made(name), data, recipe=recipe, folder=tmp_path / "run", cpu=True)


def test_refuses_other_data_and_folders(data, tmp_path, monkeypatch):
    with pytest.raises(SegzooError, match="the model has 4 classes, but folder has 13"):
        train(segzoo.create_model("test_segformer", num_classes=4), data, recipe=TINY, folder=tmp_path / "run")
    with pytest.raises(SegzooError, match="no site|no preset|valid"):
        train(made(), data, recipe=TINY, folder=tmp_path / "run", reduction="fastest", cpu=True)
    assert not (tmp_path / "run").exists()
    recipe = dataclasses.replace(TINY, steps=1)
    train(made(), data, recipe=recipe, folder=tmp_path / "run", cpu=True)
    other = dataclasses.replace(recipe, lr=1.0)
    with pytest.raises(SegzooError, match=r"holds another training: recipe\.lr was 0\.001 and is now 1\.0"):
        train(made(), data, recipe=other, folder=tmp_path / "run", cpu=True)
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["recipe"]["class_balance"]  # as of a version whose recipes had no such value: it had today's default
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert train(made(), data, recipe=recipe, folder=tmp_path / "run", cpu=True).step == 1
    with pytest.raises(SegzooError, match=r"recipe\.class_balance was 0\.0 and is now 0\.5"):
        train(made(), data, recipe=dataclasses.replace(recipe, class_balance=0.5), folder=tmp_path / "run", cpu=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.txt").write_text("")
    with pytest.raises(SegzooError, match="is no folder of a training"):
        train(made(), data, recipe=recipe, folder=tmp_path / "own", cpu=True)
    (tmp_path / "run/last.pt").write_bytes(b"PK")
    with pytest.raises(SegzooError, match=r"last\.pt is damaged"):
        train(made(), data, recipe=recipe, folder=tmp_path / "run", cpu=True)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SegzooError, match=r"training needs accelerate: pip install 'segzoo\[train\]'"):
        train(made(), data, recipe=recipe, folder=tmp_path / "new", cpu=True)


def test_a_folder_of_a_training_killed_at_its_first_file(data, tmp_path):
    folder, recipe = tmp_path / "run", dataclasses.replace(TINY, steps=2)
    folder.mkdir()
    (folder / ".0123.partial").write_text("half")
    train(made(), data, recipe=recipe, folder=folder, cpu=True)
    assert not list(folder.glob(".*"))
    (folder / "recipe.json").unlink()
    train(made(), data, recipe=recipe, folder=folder, cpu=True)
    assert json.loads((folder / "recipe.json").read_text())["steps"] == 2
    with pytest.raises(SegzooError, match="run holds the training of a model of other options"):
        train(made(decoder_dim=16), data, recipe=recipe, folder=folder, cpu=True)
    with pytest.raises(SaveError, match="the run's record cannot be written .*; make room, or choose another place"):
        train(made(), data, recipe=recipe, folder=folder / "recipe.json" / "run", cpu=True)
