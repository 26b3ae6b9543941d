"""Evaluation: what is counted, under which protocol and reduction, and the files that it leaves."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import golden_arrays, golden_json, golden_state_dict
from PIL import Image

import segzoo
from segzoo import prediction
from segzoo._errors import SegzooError
from segzoo.data.car_corners import car_crops
from segzoo.data.classification import ClassificationData, open_classification
from segzoo.data.coco_keypoints import open_coco_keypoints
from segzoo.data.segmentation import Sample, SegmentationData, open_data
from segzoo.keypoints import Keypoints
from segzoo.labels import generic_labels, load_labels
from segzoo.models.rows import PretrainedCfg, PublishedScore
from segzoo.prediction import viewing
from segzoo.preprocess import to_input
from segzoo.training.evaluation import centre_crop, evaluate, published_figure
from segzoo.training.metrics import SMALL_CLASSES, ConfusionMatrix
from segzoo.training.protocols import PROTOCOLS, NamedProtocol
from segzoo.training.reports import write_results
from segzoo.visualize import bar_chart

SCORES = (PublishedScore(value=40.5, protocol="single scale"),)
ROW = PretrainedCfg(dataset="scenes", label_set="scenes", num_classes=13, test_size=(32, 64))


@dataclasses.dataclass(frozen=True)
class Made(SegmentationData):
    samples: tuple[Sample, ...] = ()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def scenes(count=3):
    return dataclasses.replace(open_data("scenes").first(count), size=(32, 64))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=13).eval()
    model.pretrained_cfg = ROW
    return model


def by_hand(data, mask_of):
    matrix = ConfusionMatrix(13)
    for sample in data:
        matrix.update(mask_of(sample.image), sample.labels)
    return matrix


def test_the_figures_are_those_of_the_masks(model):
    data = scenes()
    result = evaluate(model, data)
    matrix = by_hand(data, lambda image: segzoo.predict(model, image).mask)
    assert result.confusion.counts_TP.tolist() == matrix.counts_TP.tolist()
    assert result.confusion.counts_TP.dtype == np.int64
    small = [data.labels.classes.index(name) for name in SMALL_CLASSES["scenes"]]
    assert result.metrics == {
        "mIoU": matrix.miou(),
        "small mIoU": matrix.miou(small),
        "pixel accuracy": matrix.pixel_accuracy(),
        "mean accuracy": pytest.approx(np.nanmean(matrix.class_accuracy())),
    }
    assert (result.samples, result.data, result.split) == (3, "scenes", "val")


def test_paired_classes_have_a_figure():
    """Six classes by hand; a model of chance gets some of the others, too, which do not count."""
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=17).eval()
    model.pretrained_cfg = PretrainedCfg(dataset="context", label_set="context", num_classes=17, test_size=(32, 64))
    result = evaluate(model, dataclasses.replace(open_data("context").first(2), size=(32, 64)))
    assert result.metrics["paired mIoU"] == result.confusion.miou([11, 12, 13, 14, 15, 16])
    assert result.metrics["small mIoU"] == result.confusion.miou([6, 7, 8, 9, 10])


def test_several_views_are_averaged(model):
    """The mean of the probabilities of six scales and their mirror images, computed step by step."""
    data = scenes(2)

    def mask_of(image):
        total = 0
        for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
            x = to_input(image, (math.ceil(32 * scale), math.ceil(64 * scale)), ROW, torch.zeros(1))
            for view in (x, x.flip(-1)):
                with torch.no_grad():
                    scores = model.forward_head(model.forward_features(view))
                scores = F.interpolate(scores, (32, 64), mode="bilinear").softmax(1)
                total = total + (scores.flip(-1) if view is not x else scores)
        return total.argmax(1)[0].numpy()

    found = evaluate(model, data, protocol="row+ms").confusion.counts_TP
    assert np.abs(found - by_hand(data, mask_of).counts_TP).sum() <= 4  # ties within rounding
    assert found.tolist() != evaluate(model, data).confusion.counts_TP.tolist()
    assert evaluate(model, data, protocol="row+flip").confusion.counts_TP.tolist() != found.tolist()


def test_the_protocol_is_what_the_model_sees(model, monkeypatch):
    """ "ade20k" shows a scene of 32 x 64 at 512 x 1024; the model's own row comes back."""
    seen = []
    monkeypatch.setattr(
        viewing, "to_input", lambda image, size, *rest: seen.append(size) or to_input(image, (32, 64), *rest)
    )
    result = evaluate(model, scenes(1), protocol="ade20k")
    assert seen == [(512, 1024)]
    assert model.pretrained_cfg is ROW
    assert result.protocol == "ade20k"
    assert result.protocol_text == (
        "short side up to 512, long side up to 2048, sides rounded up to multiples of 32; whole image; single scale"
    )


def test_the_row_comes_back_after_an_error(model):
    bad = Made(
        name="bad", split="val", labels=None, samples=(Sample(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 13), "x"),)
    )
    with pytest.raises(SegzooError, match=r"x: labels \[13\] are no classes of the model, which has 13"):
        evaluate(model, bad, protocol="ade20k")
    assert model.pretrained_cfg is ROW


@pytest.mark.parametrize("size", [(160, 200), pytest.param((120, 150), marks=pytest.mark.slow)])
def test_sliding_window_is_the_official_one(size, monkeypatch):
    """The golden scores of SegViT's own sliding window, at the input's size and resized to the image's."""
    record, arrays = golden_json("segvit_b_ade_s128"), golden_arrays("segvit_b_ade_s128")
    model = segzoo.create_model("segvit_base", img_size=(128, 128), num_classes=150).double().eval()
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    noise = torch.from_numpy(np.random.Generator(np.random.PCG64(1)).standard_normal((1, 3, 160, 200)))
    monkeypatch.setattr(viewing, "to_input", lambda *_: noise)
    result = segzoo.predict(
        model, np.zeros((*size, 3), np.uint8), resize=(160, 200), mode="slide", crop=(128, 128), stride=(85, 85)
    )
    expected = arrays["slide_pred_strided" if size == (160, 200) else "slide_rescaled_strided"]
    np.testing.assert_allclose(result.scores()[::10, ::4, ::4].numpy(), expected[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("row", "short side up to 32, long side up to 64; whole image; single scale"),
        ("slide+flip", "short side up to 32, long side up to 64; window 512x512 stride 341x341; single scale and flip"),
        (
            "cityscapes+ms",
            "short side up to 1024, long side up to 2048, sides rounded up to multiples of 32; window 1024x1024 stride "
            "768x768; scales 0.5, 0.75, 1.0, 1.25, 1.5, 1.75 and flip",
        ),
        ("rtformer-cityscapes", "short side up to 1024, long side up to 2048; whole image; single scale"),
        (
            "segvit-ade20k-640",
            "short side up to 640, long side up to 2048; window 640x640 stride 608x608; single scale",
        ),
        (
            "segvit-pascal-context",
            "short side up to 520, long side up to 520, both sides at least 480; window 480x480 stride 320x320; single "
            "scale",
        ),
        ("transformers-512", "resized to 512x512; whole image; single scale"),
    ],
)
def test_protocols_in_words(name, words):
    """As the official test configurations of SegFormer, EDAFormer, RTFormer and SegViT have them."""
    assert str(NamedProtocol.of(name, ROW)) == words


def test_published_rows_are_tested_by_named_protocols():
    rows = {name: segzoo.model_info(name).pretrained_cfg for name in segzoo.list_pretrained()}
    covered = ("ade20k", "cityscapes", "coco_stuff10k", "pascal_context", "camvid")
    rows = {name: row for name, row in rows.items() if row.dataset in covered}
    papers = [name for name in PROTOCOLS if name not in ("row", "whole", "slide")]
    assert len(rows) > 30
    assert [n for n, row in rows.items() if all(NamedProtocol.of(p, row).row != row for p in papers)] == []


@pytest.mark.parametrize("labels", [None, generic_labels(13)])
def test_the_model_names_the_classes_that_the_data_do_not(model, labels):
    named = evaluate(model, scenes(1))
    bare = Made(name="bare", split="val", labels=labels, samples=tuple(scenes(1)))
    result = evaluate(model, bare)
    assert result.class_names == named.class_names and result.metrics == named.metrics
    own = dataclasses.replace(generic_labels(13), name="mine", classes=tuple("abcdefghijklm"))
    result = evaluate(model, dataclasses.replace(bare, labels=own))
    assert result.class_names == tuple("abcdefghijklm") and "small mIoU" not in result.metrics


def test_reduction_is_in_force_and_undone(model):
    before = model.set_inference_reduction(None)
    results = [evaluate(model, scenes(2), reduction=plan) for plan in (None, "fast", {"encoder": segzoo.Pool(4)})]
    assert [result.reduction for result in results] == ["as is", "fast", '{"encoder": 4}']
    assert [result.plan.is_neutral for result in results] == [True, False, False]
    assert results[0].confusion.counts_TP.tolist() != results[1].confusion.counts_TP.tolist()
    assert segzoo.set_inference_reduction(model, None) == before
    assert results[1].plan == model.set_inference_reduction("fast")


def test_a_model_in_training_stays_in_training(model):
    model.train()
    model.encoder.eval()
    evaluate(model, scenes(1))
    assert model.training and not model.encoder.training


def test_an_engine_is_measured_like_a_model(model):
    """Anything that `predict` takes in a model's place: here the model's own score maker."""
    model.set_inference_reduction("fast")
    engine = prediction.score_maker(model)
    result = evaluate(engine, scenes(2), protocol="whole+flip")
    expected = evaluate(model, scenes(2), protocol="whole+flip")
    assert result.confusion.counts_TP.tolist() == expected.confusion.counts_TP.tolist()
    assert result.plan == expected.plan and not result.plan.is_neutral
    assert (result.conditions["engine"], expected.conditions["engine"]) == ("ModelScores", "torch")
    with pytest.raises(SegzooError, match="keeps the reduction"):
        evaluate(engine, scenes(1), reduction="base")


def test_what_does_not_belong_together_is_refused(model):
    with pytest.raises(SegzooError, match="has 5 classes, but scenes has 13"):
        evaluate(segzoo.create_model("test_edaformer", num_classes=5), scenes(1))
    with pytest.raises(SegzooError, match="no protocol is called 'ade'; protocols: row, whole, "):
        evaluate(model, scenes(1), protocol="ade")
    with pytest.raises(SegzooError, match="no protocol is called 'row.x'"):
        evaluate(model, scenes(1), protocol="row+x")
    with pytest.raises(SegzooError, match="MiT is no segmentation model"):
        evaluate(segzoo.create_model("test_mit"), scenes(1))
    with pytest.raises(SegzooError, match="gives no mask"):
        evaluate(segzoo.create_model("test_segformer_keypoints"), scenes(1))
    with pytest.raises(SegzooError, match="is no classifier"):
        evaluate(model, ClassificationData("val", ("a",), ()))


def test_published_figures_stand_beside_their_own_conditions():
    row = PretrainedCfg(published=SCORES, label_set="ade20k")
    assert published_figure(row, "ade20k", None) == (0.405, "single scale")
    assert published_figure(row, "ade20k", "base") == (0.405, "single scale")
    assert published_figure(row, "ade20k", "fast") == (None, "")
    assert published_figure(row, "cityscapes", None) == (None, "")
    assert published_figure(None, "ade20k", None) == (None, "")


def test_the_published_figure_stands_in_the_row(model):
    model.pretrained_cfg = dataclasses.replace(ROW, published=SCORES)
    rows = [evaluate(model, scenes(1), reduction=plan).row() for plan in ("base", "fast")]
    assert [row["published mIoU"] for row in rows] == [40.5, None]
    assert [row["published protocol"] for row in rows] == ["single scale", ""]


def test_files(model, tmp_path):
    results = [evaluate(model, scenes(2), reduction=plan) for plan in ("base", "fast")]
    paths = write_results(results, tmp_path / "out")
    assert [path.name for path in paths] == ["results.json", "results.csv", "classes.csv", "classes.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in paths)
    record = json.loads(paths[0].read_text())
    assert [r["reduction"] for r in record] == ["base", "fast"]
    assert record[0]["confusion"] == results[0].confusion.counts_TP.tolist()
    assert record[0]["mIoU"] == round(100 * results[0].metrics["mIoU"], 2)
    assert record[0]["torch"] == torch.__version__ and record[0]["segzoo"] == segzoo.__version__
    assert len(record[0]["commit"] or "x" * 40) >= 40 and record[0]["dtype"] == "float32"
    assert "NaN" not in paths[0].read_text()
    table = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert [row["reduction"] for row in table] == ["base", "fast"]
    assert float(table[1]["mIoU"]) == record[1]["mIoU"]
    classes = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert len(classes) == 26 and classes[0]["name"] == "sky"
    assert int(classes[0]["pixels"]) == sum(results[0].confusion.counts_TP[0])
    with Image.open(paths[3]) as chart:
        assert chart.format == "PNG" and chart.width > 500


def test_all_ignored_gives_no_figure(model, tmp_path):
    sample = Sample(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255, np.uint8), "x")
    data = Made(name="made", split="val", labels=load_labels("scenes"), samples=(sample,))
    result = evaluate(model, data)
    assert all(math.isnan(value) for value in result.metrics.values())
    assert result.row()["mIoU"] is None
    write_results([result], tmp_path)


def test_a_classifier(tmp_path):
    torch.manual_seed(0)
    model = segzoo.create_model("test_mit", num_classes=6).eval()
    model.pretrained_cfg = PretrainedCfg(dataset="imagenet", num_classes=6, resize="exact", test_size=(32, 32))
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / f"val/n{i % 6}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (48, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    data = open_classification(tmp_path)
    logits = []
    with torch.no_grad():
        for path, _ in data.items:
            image = Image.open(path).resize((46, 37), Image.Resampling.BICUBIC).crop((7, 2, 39, 34))
            logits.append(model(to_input(np.asarray(image), (32, 32), model.pretrained_cfg, torch.zeros(1)))[0])
    ranks = [
        row.argsort(descending=True).tolist().index(truth) for row, (_, truth) in zip(logits, data.items, strict=True)
    ]
    result = evaluate(model, data)
    assert result.metrics == {
        "top-1": pytest.approx(sum(rank < 1 for rank in ranks) / 12),
        "top-5": pytest.approx(sum(rank < 5 for rank in ranks) / 12),
    }
    assert result.main == "top-1" and result.class_rows() == []
    assert [path.name for path in write_results([result], tmp_path)] == ["results.json", "results.csv"]
    with pytest.raises(SegzooError, match="has 3 classes, but there are 6 class folders"):
        evaluate(segzoo.create_model("test_mit", num_classes=3), data)
    with pytest.raises(SegzooError, match="is for segmentation"):
        evaluate(model, data, protocol="slide")


def test_centre_crop():
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, 90:110] = 255
    cut = centre_crop(image, (70, 70))  # to 80 x 160, then the centre
    assert cut.shape == (70, 70, 3)
    columns = np.flatnonzero(cut[35, :, 0] > 127)
    assert (columns[0], columns[-1]) == (27, 42)
    assert centre_crop(np.zeros((10, 10, 1), np.uint8), (64, 32)).shape == (64, 32, 1)


def test_car_corners():
    torch.manual_seed(0)
    model = segzoo.create_model("test_segformer_keypoints", num_classes=4).eval()
    crops = list(car_crops(3, side=32))
    result = evaluate(model, crops)
    near = []
    for crop in crops:
        xy = prediction.predict_keypoints(model, crop.image).xy.numpy()
        near += list((np.linalg.norm(xy - crop.xy, axis=1) <= 0.2 * crop.length)[crop.visible])
    assert result.metrics["PCK@0.2"] == pytest.approx(np.mean(near))
    assert list(result.metrics) == ["PCK@0.05", "PCK@0.1", "PCK@0.2"]
    with pytest.raises(SegzooError, match="has 5 keypoints, the data 4"):
        evaluate(segzoo.create_model("test_segformer_keypoints", num_classes=5), crops)


@pytest.fixture
def coco(tmp_path) -> Path:
    """Two people in two images, the second with a hidden half; a crowd and a person without keypoints beside them."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    rng = np.random.default_rng(0)
    annotations = []
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (80, 100, 3), dtype=np.uint8)).save(tmp_path / f"val2017/{i}.jpg")
        xy = np.column_stack([rng.integers(20, 60, 17), rng.integers(10, 70, 17)])
        visible = np.where(np.arange(17) < 17 - 8 * i, 2, 0)
        points = np.column_stack([xy * (visible > 0)[:, None], visible]).ravel().tolist()
        person = {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [15, 5, 50, 70], "area": 2500, "iscrowd": 0}
        annotations.append({**person, "keypoints": points, "num_keypoints": int((visible > 0).sum())})
    annotations.append({**annotations[0], "id": 8, "iscrowd": 1})
    annotations.append({**annotations[0], "id": 9, "num_keypoints": 0, "keypoints": [0] * 51})
    record = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 80, "width": 100} for i in range(2)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": annotations,
    }
    (tmp_path / "annotations/person_keypoints_val2017.json").write_text(json.dumps(record))
    return tmp_path


def test_coco_keypoints_are_read(coco, capsys):
    data = open_coco_keypoints(coco)
    assert len(data) == 2 and capsys.readouterr().out == ""
    assert data[0].box == (15, 5, 65, 75) and data[0].length == 70
    assert data[1].visible.tolist() == [True] * 9 + [False] * 8
    first = data.coco.anns[1]["keypoints"][:2]
    assert data[0].xy[0].tolist() == [first[0] + 0.5, first[1] + 0.5]
    assert len(data.first(1)) == 1
    with pytest.raises(SegzooError, match="person_keypoints_train2017.json"):
        open_coco_keypoints(coco, split="train")


@pytest.mark.parametrize(("offset", "ap", "pck"), [(0.0, 1.0, 1.0), (300.0, 0.0, 0.0)])
def test_average_precision(coco, monkeypatch, offset, ap, pck):
    """A model that finds every keypoint, and one that is far off."""
    data = open_coco_keypoints(coco)
    answers = iter(data.people)
    boxes = []

    def answer(model, image, *, box):
        boxes.append(box)
        return Keypoints(torch.from_numpy(next(answers).xy) + offset, torch.ones(17))

    monkeypatch.setattr("segzoo.training.evaluation.predict_keypoints", answer)
    model = segzoo.create_model("test_segformer_keypoints")
    model.pretrained_cfg = PretrainedCfg(input_size=(64, 48))
    result = evaluate(model, data)
    assert result.metrics["AP"] == pytest.approx(ap) and result.metrics["PCK@0.1"] == pck
    assert list(result.metrics)[:4] == ["AP", "AP50", "AP75", "AR"]
    # 70 high needs 52.5 of width at 4:3; both 1.25 times as large, about (40, 40)
    assert boxes[0] == pytest.approx((40 - 32.8125, 40 - 43.75, 40 + 32.8125, 40 + 43.75))


def test_coco_keypoints_through_a_model(coco):
    torch.manual_seed(0)
    result = evaluate(segzoo.create_model("test_segformer_keypoints").eval(), open_coco_keypoints(coco))
    assert all(0 <= value <= 1 for value in result.metrics.values())


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        ("torchmetrics", lambda folder: evaluate(segzoo.create_model("test_edaformer", num_classes=13), scenes(1))),
        ("matplotlib", lambda folder: bar_chart({"a": [1.0]}, ["x"], folder / "x.png", title="", unit="")),
        ("pycocotools", open_coco_keypoints),
        ("torchvision", lambda folder: importlib.import_module("segzoo.data.transforms")),
    ],
)
def test_a_missing_extra_is_named(missing, use, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing or name == "segzoo.data.transforms"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SegzooError, match=rf"needs? {missing}: pip install 'segzoo\[train\]'"):
        use(tmp_path)


def in_two_processes(rank: int, address: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=13).eval()
    model.pretrained_cfg = ROW
    counts = evaluate(model, scenes(3)).confusion.counts_TP
    np.save(Path(folder) / f"{rank}.npy", counts)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_every_sample_once(model, tmp_path):
    """Three samples over two processes: none is repeated to make the shares equal."""
    torch.multiprocessing.spawn(in_two_processes, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    expected = evaluate(model, scenes(3)).confusion.counts_TP.tolist()
    assert [np.load(tmp_path / f"{rank}.npy").tolist() for rank in range(2)] == [expected] * 2
