"""The fast form of a folded model computes what its plain form computes, and only where its operators may be used."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import segzoo
from segzoo.layers import fast
from segzoo.layers.fast import FastDepthwise, FastLayer, FastLinear, FastPointwise

SEGMENTERS = [name for name in segzoo.list_models("test_*") if not name.endswith("keypoints")]

needs_operators = pytest.mark.skipif(
    not fast._operators_work(torch.float32), reason="this build of torch has not the operators"
)


class Operators(TorchDispatchMode):
    """Names of oneDNN's operators as they are called."""

    def __init__(self):
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mkldnn":
            self.called.append(func._schema.name.removeprefix("mkldnn::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def everywhere(monkeypatch):
    """The operators are used for layers of any size, on every maker's processor."""
    monkeypatch.setattr(fast, "MIN_MACS", 0)
    monkeypatch.setattr(fast, "_blas_leads", lambda: False)


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model's plain and its fast form."""
    torch.manual_seed(0)
    model = segzoo.create_model(name, **options).eval()
    return segzoo.fold(model, fast=False), segzoo.fold(model)


def assert_equal_to_rounding(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def called(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, set[str]]:
    with torch.no_grad(), Operators() as operators:
        return model(x), set(operators.called)


# ---- layers

LAYERS = {
    "linear": (nn.Linear(12, 20), nn.Identity(), FastLinear, (2, 5, 7, 12)),
    "linear without bias": (nn.Linear(12, 20, bias=False), nn.Identity(), FastLinear, (2, 5, 12)),
    "linear, relu": (nn.Linear(12, 20), nn.ReLU(), FastLinear, (2, 12)),
    "linear, gelu": (nn.Linear(12, 20), nn.GELU(), FastLinear, (2, 5, 12)),
    "linear, tanh gelu": (nn.Linear(12, 20), nn.GELU(approximate="tanh"), FastLinear, (2, 5, 12)),
    "1x1": (nn.Conv2d(12, 20, 1), nn.Identity(), FastPointwise, (2, 12, 5, 7)),
    "1x1 without bias, relu": (nn.Conv2d(12, 20, 1, bias=False), nn.ReLU(), FastPointwise, (2, 12, 5, 7)),
    "depthwise, gelu": (nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.GELU(), FastDepthwise, (2, 12, 5, 7)),
    "depthwise with stride, relu": (nn.Conv2d(12, 12, 5, 2, 1, groups=12), nn.ReLU(), FastDepthwise, (2, 12, 9, 7)),
}


@needs_operators
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("layer", "act", "kind", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_activation_are_one_operator(layer, act, kind, shape, dtype):
    if dtype == torch.bfloat16 and not fast._operators_work(dtype):
        pytest.skip("this processor has not the operators for bfloat16")
    plain = segzoo.fold(nn.Sequential(copy.deepcopy(layer), nn.Dropout(), act).eval(), fast=False).to(dtype)
    quick = segzoo.fold(plain)
    assert type(quick[0]) is kind
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if len(shape) == 4 and kind is not FastLinear:
        x = x.contiguous(memory_format=torch.channels_last)
    out, operators = called(quick, x)
    assert len(operators) == 1
    assert out.dtype == dtype
    with torch.no_grad():
        assert_equal_to_rounding(out.float(), plain(x).float(), 1e-5 if dtype == torch.float32 else 2e-2)


OTHERS = {
    "3x3": nn.Conv2d(6, 6, 3),
    "1x1 with stride": nn.Conv2d(6, 6, 1, stride=2),
    "1x1 with padding": nn.Conv2d(6, 6, 1, padding=1),
    "grouped": nn.Conv2d(6, 6, 1, groups=3),
    "depthwise alone": nn.Conv2d(6, 6, 3, groups=6),
    "depthwise, reflecting": nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect"), nn.GELU()),
}


@pytest.mark.parametrize("layer", OTHERS.values(), ids=OTHERS)
def test_other_layers_stay_as_they_are(layer):
    folded = segzoo.fold(nn.Sequential(layer).eval())
    assert not any(isinstance(part, FastLayer) for part in folded.modules())


def test_an_activation_elsewhere_is_not_taken():
    class Backwards(nn.Sequential):
        def forward(self, x):
            return self[0](self[1](x))

    model = Backwards(nn.Linear(6, 6), nn.ReLU()).eval()
    assert type(segzoo.fold(model)[1]) is nn.ReLU


# ---- models


@needs_operators
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", SEGMENTERS)
@pytest.mark.parametrize("size", [(96, 128), (61, 83), (1, 1)])
def test_every_model_computes_the_same(name, size):
    plain, quick = pair(name)
    x = torch.randn(2, 3, *size)
    out, operators = called(quick, x)
    expected, none = called(plain, x)
    assert operators
    assert not none
    assert_equal_to_rounding(out, expected)


@pytest.mark.slow
@needs_operators
@pytest.mark.parametrize("name", ["segformer_b0", "edaformer_t", "rtformer_slim", "segvit_small"])
@pytest.mark.parametrize("size", [(256, 256), (187, 251)])
def test_full_sizes_compute_the_same(name, size, monkeypatch):
    monkeypatch.setattr(fast, "_blas_leads", lambda: False)
    plain, quick = pair(name)
    x = torch.randn(1, 3, *size)
    out, operators = called(quick, x)
    assert operators
    assert_equal_to_rounding(out, called(plain, x)[0])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("hide", ["probe", "switch"])
@pytest.mark.parametrize("name", SEGMENTERS)
def test_without_operators_the_plain_form_runs(name, hide, monkeypatch):
    plain, quick = pair(name)
    x = torch.randn(1, 3, 61, 83)
    if hide == "probe":
        monkeypatch.setattr(fast, "_operators_work", lambda dtype: False)
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    out, operators = called(quick, x)
    assert not operators
    assert_equal_to_rounding(out, called(plain, x)[0])


def test_a_build_without_the_operators_is_recognised(monkeypatch):
    class Nothing:
        def __getattr__(self, name):
            raise AttributeError(name)

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing())
    assert not fast._operators_work.__wrapped__(torch.float32)


@needs_operators
@pytest.mark.usefixtures("everywhere")
def test_what_takes_the_plain_form():
    layer = segzoo.fold(nn.Sequential(nn.Linear(8, 8), nn.GELU()).eval())
    x = torch.randn(4, 8)
    assert called(layer, x)[1]
    assert not called(copy.deepcopy(layer).double(), x.double())[1]
    with Operators() as operators:
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), operators:
        assert layer(x).dtype == torch.bfloat16
    assert not operators.called


@needs_operators
@pytest.mark.usefixtures("everywhere")
def test_gradients_of_the_image_are_those_of_the_plain_form():
    plain, quick = pair("test_segformer")
    grads = []
    for model in (plain, quick):
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    assert_equal_to_rounding(grads[1], grads[0])


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", SEGMENTERS)
def test_exporters_see_torchs_own_operators(name):
    _, quick = pair(name)
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(quick, (x,))
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]


# ---- the copy


@pytest.mark.usefixtures("everywhere")
def test_the_copy_is_copied_saved_and_converted():
    _, quick = pair("test_edaformer")
    x = torch.randn(1, 3, 64, 64)
    expected, _ = called(quick, x)
    file = io.BytesIO()
    torch.save(quick, file)
    file.seek(0)
    for other in (copy.deepcopy(quick), torch.load(file, weights_only=False), quick.double().float()):
        assert torch.equal(called(other, x)[0], expected)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_fast_and_plain_turn_into_each_other(name):
    plain, quick = pair(name)
    assert any(isinstance(module, FastLayer) for module in quick.modules())
    again = segzoo.fold(quick, fast=False)
    assert not any(isinstance(module, FastLayer) for module in again.modules())
    x = torch.randn(1, 3, 64, 64)
    assert_equal_to_rounding(called(again, x)[0], called(plain, x)[0])
    assert torch.equal(called(segzoo.fold(quick), x)[0], called(quick, x)[0])


@needs_operators
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", SEGMENTERS)
def test_the_cost_is_the_same(name):
    plain, quick = pair(name)
    assert segzoo.cost(quick, (64, 96)).macs == segzoo.cost(plain, (64, 96)).macs
    counts = []
    for model in (plain, quick):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 64, 96))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@needs_operators
@pytest.mark.usefixtures("everywhere")
def test_plans_change_as_before():
    plain, quick = pair("test_edaformer")
    x = torch.randn(1, 3, 96, 96)
    base, _ = called(quick, x)
    for model in (plain, quick):
        model.set_inference_reduction(2)
    assert list(segzoo.reduction_sites(quick)) == list(segzoo.reduction_sites(plain))
    assert_equal_to_rounding(called(quick, x)[0], called(plain, x)[0])
    quick.set_inference_reduction(None)
    assert torch.equal(called(quick, x)[0], base)
