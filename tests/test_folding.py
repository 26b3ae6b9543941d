"""A folded model computes the same function, has only the norms left that cannot be folded, and is for inference."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import segzoo
from segzoo import SegzooError
from segzoo.layers.conv import ConvBNReLU, FuseLevels


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms that do something: the statistics of a new model would hide every mistake. Float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                with torch.no_grad():
                    tensor.uniform_(low, high, generator=generator)
    return model.double().eval()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def assert_same(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    folded = segzoo.fold(model, fast=False)
    with torch.no_grad():
        torch.testing.assert_close(folded(*inputs), model(*inputs), rtol=1e-9, atol=1e-11)
    return folded


MAP = (2, 6, 7, 9)
FOLDABLE = {
    "conv, norm": (nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)),
    "conv with bias, norm": (nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)),
    "grouped conv, norm": (nn.Conv2d(6, 12, 3, groups=3, padding=1), nn.BatchNorm2d(12)),
    "depthwise conv, norm": (nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6)),
    "norm, 1x1 conv": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1, bias=False)),
    "norm, 1x1 conv with stride": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1, stride=2)),
    "norm, unpadded 3x3 conv": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)),
    "norm, grouped conv": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, groups=2)),
    "norm, reflecting conv": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect")),
    "norm, conv, norm": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)),
    "conv, norm, conv": (nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
    "dropout between": (nn.Conv2d(6, 8, 3), nn.Identity(), nn.Dropout2d(0.5), nn.BatchNorm2d(8), nn.ReLU()),
    "norm without weights": (nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, affine=False)),
    "nested": (nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()),
}


@pytest.mark.parametrize("parts", FOLDABLE.values(), ids=FOLDABLE)
def test_pairs_of_convolutions(parts):
    sequence = nn.Sequential(*copy.deepcopy(parts))
    torch.manual_seed(0)
    for module in sequence.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.affine:
            module.running_var.uniform_(0.5, 2.0)
            module.running_mean.uniform_(-0.5, 0.5)
            sequence = sequence.double().eval()
            break
    else:
        sequence = lively(sequence)
    folded = assert_same(sequence, torch.randn(MAP).double())
    assert norms(folded) == []
    assert list(dict(folded.named_modules())) == list(dict(sequence.named_modules()))


@pytest.mark.parametrize(
    "parts",
    [(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)), (nn.BatchNorm1d(6), nn.Linear(6, 8))],
    ids=["linear, norm", "norm, linear"],
)
def test_pairs_of_linear_layers(parts):
    assert norms(assert_same(lively(nn.Sequential(*copy.deepcopy(parts))), torch.randn(5, 6).double())) == []


UNFOLDABLE = {
    "zero padding behind the norm": (nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)),
    "activation between": (nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1)),
    "batch statistics": (nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
    "layer norm": (nn.Conv2d(6, 9, 1), nn.LayerNorm(9)),
}


@pytest.mark.parametrize("parts", UNFOLDABLE.values(), ids=UNFOLDABLE)
def test_what_cannot_be_folded_stays(parts):
    torch.manual_seed(0)
    sequence = nn.Sequential(*copy.deepcopy(parts)).double().eval()
    for module in sequence.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-0.5, 0.5)
    folded = assert_same(sequence, torch.randn(MAP).double())
    assert norms(folded) == norms(sequence)
    assert [type(part) for part in folded] == [type(part) for part in sequence]


def test_a_padded_convolution_takes_a_norm_that_shifts_nothing():
    sequence = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1)).double().eval()
    sequence[0].running_var.uniform_(0.5, 2.0)
    assert norms(assert_same(sequence, torch.randn(MAP).double())) == []


def test_a_sequence_with_its_own_forward_is_left_alone():
    class Backwards(nn.Sequential):
        def forward(self, x):
            for part in reversed(self):
                x = part(x)
            return x

    model = lively(Backwards(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)))
    assert norms(assert_same(model, torch.randn(MAP).double())) == ["1"]


def test_a_module_that_defines_folded_replaces_itself_after_its_children():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 6, 1), bn=nn.BatchNorm2d(6)))

        def forward(self, x):
            return self.inner(x) + self.inner(x)

        def folded(self):
            assert isinstance(self.inner.bn, nn.Identity)
            with torch.no_grad():
                self.inner.conv.weight *= 2
                self.inner.conv.bias *= 2
            return self.inner.conv

    model = lively(nn.Sequential(Doubled(), nn.ReLU()))
    folded = assert_same(model, torch.randn(MAP).double())
    assert isinstance(folded[0], nn.Conv2d)
    assert isinstance(model[0], Doubled)


def test_fused_levels_run_at_their_own_resolution():
    torch.manual_seed(0)
    model = lively(FuseLevels(level_chans=(8, 6, 4), out_chans=5))
    maps = [torch.randn(2, 8, 3, 4), torch.randn(2, 6, 5, 7), torch.randn(2, 4, 10, 13)]
    maps = [x.double() for x in maps]
    folded = segzoo.fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(maps, (10, 13)), model(maps, (10, 13)), rtol=1e-9, atol=1e-11)
    assert [tuple(level.weight.shape[:2]) for level in folded.levels] == [(5, 8), (5, 6), (5, 4)]


def test_projections_before_the_fusion_are_multiplied_into_it():
    torch.manual_seed(0)
    model = lively(FuseLevels(level_chans=(8, 8), out_chans=5))
    projections = [nn.Linear(12, 8).double(), nn.Linear(6, 8, bias=False).double()]
    maps = [torch.randn(2, 12, 3, 4).double(), torch.randn(2, 6, 6, 7).double()]
    projected = [layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for layer, x in zip(projections, maps, strict=True)]
    folded = model.folded().after(projections)
    with torch.no_grad():
        torch.testing.assert_close(folded(maps, (6, 7)), model(projected, (6, 7)), rtol=1e-9, atol=1e-11)


def test_conv_bn_relu_folds():
    model = lively(ConvBNReLU(in_chans=6, out_chans=8, kernel_size=3))
    assert norms(assert_same(model, torch.randn(MAP).double())) == []


# ---- models


@pytest.mark.parametrize("name", segzoo.list_models("test_*"))
@pytest.mark.parametrize("size", [(96, 128), (61, 83), (1, 1)])
def test_models_compute_the_same(name, size):
    torch.manual_seed(0)
    model = lively(segzoo.create_model(name))
    assert_same(model, torch.randn(2, 3, *size).double())


def test_edaformer_has_no_norm_left_and_costs_less():
    model = lively(segzoo.create_model("edaformer_t")).float()
    folded = segzoo.fold(model)
    assert len(norms(model)) == 1
    assert norms(folded) == []
    assert segzoo.cost(folded, (512, 512)).macs < segzoo.cost(model, (512, 512)).macs


# Behind each of these norms comes a ReLU, or a convolution that pads with zeros, or the queries of an attention.
RTFORMER_LEFT = {
    "encoder.compress3.bn",
    *(f"encoder.blocks.{i}.{name}" for i in (0, 1) for name in ("compress.bn", "inject.0")),
    *(f"encoder.blocks.{i}.{name}.norm" for i in (0, 1) for name in ("mlp_low", "mlp_high", "attn_high")),
    *(f"decoder.context.{name}.bn" for name in ("point", "compress", "shortcut")),
    *(f"decoder.context.{name}.{i}.bn" for name in ("scales", "process") for i in range(4)),
    *("decoder.head.bn1", "decoder.aux_heads.0.bn1"),
}


def test_rtformer_keeps_only_the_norms_that_cannot_be_folded():
    model = lively(segzoo.create_model("rtformer_slim"))
    folded = segzoo.fold(model)
    assert len(norms(model)) == 51
    assert set(norms(folded)) == RTFORMER_LEFT
    for name in RTFORMER_LEFT:
        parent = model.get_submodule(name.rpartition(".")[0])
        parts = list(parent.children())
        follower = parts[parts.index(model.get_submodule(name)) + 1]
        padded = isinstance(follower, nn.Conv2d) and any(follower.padding)
        assert isinstance(follower, nn.ReLU) or padded or name.endswith("attn_high.norm"), name


def test_a_negative_scale_keeps_the_norm_before_the_pool():
    model = lively(segzoo.create_model("test_rtformer"))
    with torch.no_grad():
        model.encoder.blocks[0].attn_high.kv_norm.weight[3] = -1.0
        model.encoder.blocks[1].attn_high.kv_norm.weight[3] = 0.0
        model.encoder.blocks[0].attn_high.kv.weight.mul_(50)
    folded = assert_same(model, torch.randn(2, 3, 96, 128).double())
    assert [name for name in norms(folded) if "kv_norm" in name] == ["encoder.blocks.0.attn_high.kv_norm"]


@pytest.mark.parametrize("name", ["test_rtformer", "test_edaformer"])
def test_the_copy_predicts_and_takes_plans(name):
    model = segzoo.create_model(name).eval()
    before = copy.deepcopy(model.state_dict())
    folded = segzoo.fold(model)
    assert folded.cfg == model.cfg
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert segzoo.predict(folded, image).mask.shape == (60, 80)
    x = torch.randn(1, 3, 64, 96)
    plan = folded.set_inference_reduction(2)
    assert plan == model.set_inference_reduction(2)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-3)  # float32
    # The model is as it was, and keeps its own plan.
    folded.set_inference_reduction(None)
    assert segzoo.plans.current_plan(model) == plan
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_plan_that_is_set_stays_set():
    model = segzoo.create_model("test_rtformer").eval()
    model.set_inference_reduction(2)
    assert not segzoo.plans.current_plan(segzoo.fold(model)).is_neutral


@pytest.mark.parametrize("name", ["test_edaformer", "test_rtformer"])
def test_a_folded_model_is_frozen(name):
    folded = segzoo.fold(segzoo.create_model(name).eval())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(part.training for part in folded.modules())


def test_training_is_refused():
    model = segzoo.create_model("test_rtformer")
    with pytest.raises(SegzooError, match=r"model\.eval\(\)"):
        segzoo.fold(model)
    model.eval().encoder.blocks[1].train()
    with pytest.raises(SegzooError, match=r"encoder\.blocks\.1 is in training mode"):
        segzoo.fold(model)


def test_other_precisions_and_compilers():
    model = segzoo.create_model("test_rtformer").eval()
    folded = segzoo.fold(model.to(torch.bfloat16))
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    folded = segzoo.fold(model.float())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(folded, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), folded(x))
