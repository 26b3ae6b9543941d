"""Engines in a model's place: the same scores and masks at sizes of any kind, and every refusal.

The fast tier runs tiny models by one engine each; every family by every engine is in the slow tier.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion

import segzoo
from segzoo.cli import main
from segzoo.engines import runners
from segzoo.engines.engine import check_engine
from segzoo.engines.forms import EXAMPLE_SIZE, HeadForm, dynamic_program
from segzoo.engines.runners import BySize, OnnxRunners, OpenVINORunners
from segzoo.layers.grids import max_pool_to_grid
from segzoo.layers.shapes import ceil_div, resize_image_part
from segzoo.models.segmenter import SegmentationModel
from segzoo.models.swin import TEST_SWIN
from segzoo.twins import eval_twin

PHOTO = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
SEGMENTERS = ["test_edaformer", "test_segformer", "test_segvit", "test_segvit_shrunk", "test_rtformer"]
SHAPES = [(1, 3, 128, 224), (2, 3, 161, 99), (1, 3, 64, 64)]  # none of them the size of recording, one odd
REDUCED = {"test_segformer": "n2d"}  # others: 2


def tiny(name: str, plan: object = None) -> SegmentationModel:
    torch.manual_seed(0)
    model = segzoo.create_model(name).eval()
    for module in model.modules():  # statistics that do something
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    model.set_inference_reduction(plan)
    return model


def assert_scores(model: SegmentationModel, run, shapes=SHAPES, tolerance: float = 1e-4) -> None:
    """The scores of `run`(images) -> tensors of the head, brought to input size, are the model's."""
    for shape in shapes:
        x_BCHW = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = model(x_BCHW)
            found = model.to_size(model.head_output_of(run(x_BCHW), tuple(shape[2:])), shape[2:])
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), shape
        assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.9999


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEGMENTERS)
def test_an_eager_engine_is_the_model(name):
    model = tiny(name, 2)
    engine = segzoo.compile(model, engine="eager")
    assert_scores(model, engine.runner)
    result, expected = segzoo.predict(engine, PHOTO), segzoo.predict(model, PHOTO)
    assert (result.mask == expected.mask).mean() >= 0.9999
    assert (result.plan, result.label_set) == (expected.plan, expected.label_set)
    assert engine.row == (model.pretrained_cfg or segzoo.models.PretrainedCfg())
    assert (engine.name, engine.num_classes, engine.in_chans) == (name, model.num_classes, 3)
    slide = {"mode": "slide", "crop": (64, 64), "stride": (40, 40)}
    for options in (slide, {"scales": (1.0, 0.5), "flip": True}):
        ours, theirs = (segzoo.predict(maker, PHOTO, **options).mask for maker in (engine, model))
        assert (ours == theirs).mean() >= 0.9999


def test_the_plan_is_the_one_at_compile_time():
    model = tiny("test_edaformer", 2)
    engine = segzoo.compile(model, engine="eager")
    model.set_inference_reduction(None)
    assert segzoo.predict(engine, PHOTO).plan["encoder.0"] == segzoo.Pool(2)
    with pytest.raises(segzoo.SegzooError, match="compile again"):
        engine.set_inference_reduction(None)


def test_the_model_is_never_touched():
    model = tiny("test_rtformer").train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    engine = segzoo.compile(model, engine="eager", precision="bf16")
    mask = segzoo.predict(engine, PHOTO).mask
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    # bf16 is another precision, and of the same model
    assert 0.8 < (mask == segzoo.predict(model, PHOTO).mask).mean()


def test_heads_come_back_from_their_tensors():
    for name in SEGMENTERS:
        model = tiny(name)
        x_BCHW = torch.randn(1, 3, 50, 70)
        with torch.inference_mode():
            head = model.forward_head(model.forward_features(x_BCHW))
            again = model.head_output_of(model.head_tensors(head), (50, 70))
            assert torch.equal(model.to_size(again, (61, 83)), model.to_size(head, (61, 83)))
        assert len(model.head_names) == len(model.head_tensors(head))


# --- forms that convert at any size -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 4, 12])
def test_the_grid_of_any_size_is_the_adaptive_pool(side, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for H, W in ((1, 1), (3, 2), (9, 11), (12, 12), (40, 33)):
        map_BCHW = torch.randn(2, 3, H, W)
        expected = torch.nn.functional.adaptive_max_pool2d(map_BCHW, side)
        assert torch.equal(max_pool_to_grid(map_BCHW, side), expected)


@pytest.mark.parametrize("size", [(50, 70), (200, 333)])
def test_the_image_s_part_of_any_size(size, monkeypatch):
    map_BCHW = torch.randn(2, 5, 4, 5)
    sizes = {"image_size": (50, 70), "padded_size": (64, 80)}
    expected = resize_image_part(map_BCHW, size, **sizes)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(resize_image_part(map_BCHW, size, **sizes), expected, rtol=0, atol=2e-5)


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0+cu124"))
    for engine in ("onnxruntime", "openvino"):
        pytest.importorskip(engine)
        with pytest.raises(segzoo.SegzooError, match=r"needs torch 2\.13 or newer, not 2\.6\.0"):
            segzoo.predict(segzoo.compile(tiny("test_edaformer"), engine=engine), PHOTO)


# Entries that merge by likeness, at the queries of a SegFormer's last two stages.
LIKENESS = [
    segzoo.Bipartite(0.5, 2),
    segzoo.LocalGlobal(2, 0.5, 0.2),
    segzoo.EnergyProtected(0.4),
    segzoo.GridMerge(1.5),
]


@pytest.mark.parametrize("entry", LIKENESS, ids=lambda entry: type(entry).__name__)
def test_what_merges_by_likeness_has_no_dynamic_program(entry):
    for site in ("encoder.2", "encoder.2.q"):
        with pytest.raises(segzoo.SegzooError, match=rf"{type(entry).__name__}\) at {site},.*n2d.*segzoo\.compile"):
            dynamic_program(HeadForm(tiny("test_segformer", {site: entry})))


def test_what_has_no_dynamic_program():
    swin = segzoo.create_model("test_segformer", encoder=TEST_SWIN).eval()
    with pytest.raises(segzoo.SegzooError, match=r"windows of Swin.*segzoo\.compile"):
        dynamic_program(HeadForm(swin))


def test_rounding_up_knows_no_negative_numbers():
    """-(-a // b) comes out one too small in ONNX, whose division rounds to zero."""
    assert [ceil_div(value, 16) for value in (1, 16, 17, 160, 161)] == [1, 1, 2, 10, 11]
    for file in ("layers", "models"):
        for path in (Path(segzoo.__file__).parent / file).glob("*.py"):
            assert not re.search(r"-\(-[HW]\b", path.read_text()), path.name


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_few_sizes_have_their_own_and_one_that_comes_again_gets_it():
    made: list[int] = []
    cache = BySize(lambda key: made.append(key) or f"own {key}", lambda: "any", most=2)
    assert [cache[key] for key in (1, 2, 1, 3, 4)] == ["own 1", "own 2", "own 1", "any", "any"]
    assert cache[3] == "own 3"  # in place of 2, the one used longest ago
    assert made == [1, 2, 3]
    assert (1 in cache, 2 in cache, 3 in cache, len(cache)) == (True, False, True, 2)


def test_without_a_fallback_every_size_is_made():
    cache = BySize(lambda key: -key, None, most=2)
    assert [cache[key] for key in (1, 2, 3, 1)] == [-1, -2, -3, -1]
    assert len(cache) == 2


def test_eight_threads_make_one():
    made: list[int] = []
    cache = BySize(lambda key: made.append(key) or key, None)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: cache[5], range(32))) == {5}
    assert made == [5]


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_openvino(monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(runners, "MAX_SIZES", 8)
    model = tiny("test_rtformer", 2)
    engine = segzoo.compile(model, engine="openvino", threads=1)
    assert_scores(model, engine.runner)
    assert engine.runner.compiler.hints["INFERENCE_PRECISION_HINT"] == "f32"
    assert engine.runner.programs.dynamic is not None
    own = engine.runner.sizes
    assert len(own.by_size) == len(SHAPES)
    own.by_size._most = len(SHAPES)  # full: the next size takes the dynamic form
    assert_scores(model, engine.runner, [(1, 3, 96, 131)])
    assert own.dynamic is not None
    small = engine.runner.programs.dynamic.smallest - 1
    assert_scores(model, engine.runner, [(1, 3, small, small)])  # recorded for itself
    expected = segzoo.predict(model, PHOTO).mask
    with ThreadPoolExecutor(4) as pool:
        masks = list(pool.map(lambda _: segzoo.predict(engine, PHOTO).mask, range(8)))
    assert all((mask == expected).mean() >= 0.9999 for mask in masks)


@pytest.mark.slow
def test_onnxruntime():
    pytest.importorskip("onnxruntime")
    model = tiny("test_segvit_shrunk")
    engine = segzoo.compile(model, engine="onnxruntime", threads=1)
    assert_scores(model, engine.runner)
    expected = segzoo.predict(model, PHOTO)
    result = segzoo.predict(engine, PHOTO)
    assert (result.mask == expected.mask).mean() >= 0.9999
    torch.testing.assert_close(result.scores(), expected.scores(), rtol=1e-3, atol=1e-5)


# Folded and not, base and reduced: two of the four in the slow tier, the others where every combination is asked for.
FORMS = [
    pytest.param(False, True, id="base-folded", marks=pytest.mark.slow),
    pytest.param(True, False, id="reduced-plain", marks=pytest.mark.slow),
    pytest.param(False, False, id="base-plain", marks=pytest.mark.exhaustive),
    pytest.param(True, True, id="reduced-folded", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("make", [OnnxRunners, OpenVINORunners], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize(("reduced", "folded"), FORMS)
@pytest.mark.parametrize("name", SEGMENTERS)
def test_every_family(name, reduced, folded, make):
    model = tiny(name, REDUCED.get(name, 2) if reduced else None)
    form = HeadForm(segzoo.fold(model, fast=False) if folded else eval_twin(model))
    options = {"precision": "f32"} if make is OpenVINORunners else {}
    run = make(form, threads=1, **options)
    assert run.programs.dynamic is not None
    assert run.programs.dynamic.smallest <= min(EXAMPLE_SIZE)
    assert_scores(model, run)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_bipartite_merging_is_recorded_for_every_size(engine):
    model = tiny("test_segformer", "hq")
    run = segzoo.compile(model, engine=engine).runner
    for shape in SHAPES[:2]:
        x_BCHW = torch.randn(shape)
        with torch.inference_mode():
            expected, found = model(x_BCHW), model.to_size(run(x_BCHW)[0], shape[2:])
        assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.99  # the matching can turn on rounding


@pytest.mark.slow
@pytest.mark.parametrize("entry", LIKENESS[1:], ids=lambda entry: type(entry).__name__)
def test_merging_by_likeness_is_recorded_for_a_size(entry):
    model = tiny("test_segformer", {"encoder.2.q": entry, "encoder.3": entry})
    x_BCHW = torch.randn(1, 3, 161, 99, generator=torch.Generator().manual_seed(1))
    run = segzoo.compile(model, engine="onnxruntime").runner
    with torch.inference_mode():
        expected, found = model(x_BCHW), model.to_size(run(x_BCHW)[0], (161, 99))
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.99


@pytest.mark.slow
def test_what_openvino_cannot_convert_is_refused():
    engine = segzoo.compile(tiny("test_segformer", {"encoder.2.q": segzoo.GridMerge(1.5)}), engine="openvino")
    with pytest.raises(segzoo.SegzooError, match=r"aten\.scatter_reduce.*GridMerge.*engine='onnxruntime'"):
        segzoo.predict(engine, PHOTO, resize=(64, 96))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTERS)
def test_inductor(name):
    model = tiny(name, REDUCED.get(name, 2))
    assert_scores(model, segzoo.compile(model, engine="inductor").runner)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tensorrt", "f32", None), "eager, inductor, onnxruntime, openvino"),
        (("openvino", "int8", None), "f32, bf16"),
        (("onnxruntime", "bf16", None), "engine='openvino'"),
        (("openvino", "f32", 0), "at least 1"),
        (("openvino", "f32", True), "at least 1"),
        (("eager", "f32", 2), r"torch\.set_num_threads"),
    ],
)
def test_combinations_that_do_not_exist(arguments, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        check_engine(*arguments)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_missing_package_is_one_sentence(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(segzoo.SegzooError, match=rf"segzoo\[{'onnx' if engine == 'onnxruntime' else engine}\]"):
        segzoo.compile(tiny("test_segformer"), engine=engine)


def test_other_models_are_refused():
    with pytest.raises(segzoo.SegzooError, match="no segmentation model"):
        segzoo.compile(segzoo.create_model("test_mit"), engine="eager")
    with pytest.raises(segzoo.SegzooError, match="bfloat16 on cpu"):
        segzoo.compile(tiny("test_segformer").bfloat16(), engine="eager")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "bf16"], "add --engine"),
        (["--engine", "onnxruntime", "--precision", "bf16"], "openvino"),
        (["--engine", "eager", "--device", "meta"], "--device meta"),
        (["--engine-file", "none.onnx"], "none.onnx: no such file"),
        (["--engine-file", "none.onnx", "--reduction", "2"], "--reduction does not go with --engine-file"),
    ],
)
def test_command_line_refusals(options, message, tmp_path, capsys):
    assert main(["predict", "photo.png", "-o", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
