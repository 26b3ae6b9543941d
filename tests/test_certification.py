"""The certificate: what it measures, on cases whose answer is known."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from test_engines import PHOTO, tiny

import segzoo
from segzoo.cli import main
from segzoo.engines import engine
from segzoo.training import certification
from segzoo.training.certification import certify, scene_pairs


def test_eager_is_exact_and_a_reduction_is_not():
    model = tiny("test_segformer", "n2d")  # what is set on the model does not count
    truth = segzoo.predict(tiny("test_segformer"), PHOTO).mask
    certificate = certify(model, [(PHOTO, truth)], engines=["eager"], precisions=["f32"], reductions=["fast"])
    exact, reduced = certificate.rows
    assert (exact.engine, exact.precision, exact.reduction) == ("eager", "f32", "none")
    assert exact.agreement >= 0.9999
    assert exact.miou == pytest.approx(1.0, abs=1e-3)
    assert exact.first_stage is None
    assert exact.deviation < 1e-4
    assert exact.time > 0
    assert reduced.reduction == "fast"
    assert reduced.agreement <= 1
    assert reduced.deviation > exact.deviation
    assert model.set_inference_reduction("n2d") == segzoo.plans.current_plan(model)


def test_the_first_stage_that_is_off():
    model = tiny("test_segformer")
    certificate = certify(
        model, [(PHOTO, None)], engines=["eager"], precisions=["f32"], reductions=["fast"], tolerance=0.0
    )
    assert [row.first_stage for row in certificate.rows] == ["map_0", "map_0"]  # folding rounds the first map, too
    assert [row.miou for row in certificate.rows] == [None, None]
    assert certificate.rows[1].deviation == pytest.approx(certificate.rows[1].to_dict()["off at the head"], rel=0.1)


def test_a_fault_in_a_stage_is_named_there(monkeypatch):
    model, make = tiny("test_segformer"), certification.make_runner
    assert row_of(model).first_stage is None

    def with_fault(value):
        def make_faulty(source, *args):
            faulty = copy.deepcopy(source)
            bias = next(b for key, b in faulty.encoder.named_parameters() if key == "stages.2.norm.bias")
            bias.data.fill_(value)
            return make(faulty, *args)

        monkeypatch.setattr(certification, "make_runner", make_faulty)
        return row_of(model)

    assert with_fault(50.0).first_stage == "map_2"
    no_number = with_fault(float("nan"))
    assert (no_number.first_stage, no_number.deviation) == ("map_2", float("inf"))
    assert json.loads(json.dumps(no_number.to_dict(), allow_nan=False))["off at the head"] is None


def row_of(model):
    certificate = certify(model, [(PHOTO, None)], engines=["eager"], precisions=["f32"], reductions=[])
    (row,) = certificate.rows
    return row


def test_what_is_left_out_is_named(monkeypatch):
    monkeypatch.setattr(engine, "PACKAGES", {"openvino": ("no_such_package",), "onnxruntime": ("another",)})
    left_out: list[str] = []
    cases = certification._cases(tiny("test_segformer"), None, ["f32"], ["fast"], left_out)
    assert {engine for engine, _, _ in cases} == {"eager", "inductor"}
    assert left_out == ["onnxruntime: another not installed", "openvino: no_such_package not installed"]
    left_out.clear()
    certification._cases(tiny("test_segformer"), ["onnxruntime"], None, [], left_out)
    assert "onnxruntime bf16" in left_out[0]
    with pytest.raises(segzoo.SegzooError, match="no image"):
        certify(tiny("test_segformer"), [])


def test_scenes_have_truth():
    ((image, truth),) = scene_pairs(1, (32, 64))
    assert image.shape == (32, 64, 3)
    assert truth is not None and truth.shape == (32, 64)
    assert truth.dtype == np.uint8


@pytest.mark.slow
def test_the_command_line(capsys):
    arguments = ["certify", "edaformer_t.scenes", "--data", "scenes", "--limit", "1", "--engine", "eager"]
    assert main([*arguments, "--precision", "bf16", "--reduction", "fast", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["precision"], row["reduction"]) for row in result["rows"]] == [("bf16", "none"), ("bf16", "fast")]
    assert 0.9 < result["rows"][0]["agreement"] <= 1
    assert result["rows"][0]["mIoU"] > 0.5
    assert main(["certify", "edaformer_t.scenes"]) == 2
    assert "--data scenes" in capsys.readouterr().err
