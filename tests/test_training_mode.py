"""What only training mode shows: stochastic depth, dropout and the parameter groups of every model.

The expected rates are those of the papers' recipes, written down here, and not read from the configs. Everything that
needs no numbers runs on the meta device, over every name; what needs them on the tiny variants.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

import segzoo
from segzoo.layers.block import Block
from segzoo.layers.init import init_weights
from segzoo.models import Encoder, SegmentationModel
from segzoo.models.rtformer_backbone import RTFormerBlock
from segzoo.models.segvit_decoder import CrossAttention, DecoderLayer, SelfAttention
from segzoo.models.swin import SwinBlock
from segzoo.models.vit import DownsamplingBlock, ViTBlock

TINY = segzoo.list_models("test_*")
NAMES = [*segzoo.list_models(exclude_filters="test_*"), *TINY]

# Rate of the last block of an encoder, by the beginning of a name: the first that fits.
ENCODER_DROP_PATH = {
    "edaformer_mit": 0.1,
    "test_edaformer": 0.2,
    "edaformer": 0.2,
    "eft": 0.2,
    "test_eft": 0.2,
    "rtformer": 0.2,
    "test_rtformer": 0.2,
    "mit": 0.1,
    "test_mit": 0.1,
    "pvt": 0.1,
    "test_pvt": 0.1,
    "segformer": 0.1,
    "test_segformer": 0.1,
    "segvit_large": 0.3,
    "segvit": 0.1,
    "test_segvit": 0.1,
    "swin": 0.1,
    "test_swin": 0.1,
}
DECODER_DROP_PATH = 0.1  # EDAFormer's, in each of its decoder blocks
DROPOUT = 0.1  # SegFormer's and EDAFormer's of channels before the classifier; SegViT's in its decoder layers


@functools.cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return segzoo.create_model(name)


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return segzoo.create_model(name, **options)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder_of(model: nn.Module) -> Encoder:
    return model.encoder if isinstance(model, SegmentationModel) else model


def encoder_rate(name: str) -> float:
    return next(rate for start, rate in ENCODER_DROP_PATH.items() if name.startswith(start))


# --- stochastic depth -----------------------------------------------------------------------------------------------


def drop_probs(module: nn.Module) -> list[float]:
    return [part.drop_prob for part in module.modules() if isinstance(part, DropPath)]


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of an encoder in the order of the data flow."""
    kinds = (Block, ViTBlock, SwinBlock, RTFormerBlock)
    return [part for part in encoder.modules() if isinstance(part, kinds)]


def rate_of(block: nn.Module) -> float:
    rates = set(drop_probs(block))
    assert len(rates) == 1
    return rates.pop()


@pytest.mark.parametrize("name", NAMES)
def test_the_rate_of_stochastic_depth_grows_linearly(name):
    encoder, rate = encoder_of(on_meta(name)), encoder_rate(name)
    rates = [rate_of(block) for block in blocks_of(encoder)]
    if "rtformer" in name:
        expected = [rate, rate]  # the same in both blocks
    else:
        expected = [0.0] if len(rates) == 1 else list(np.linspace(0, rate, len(rates)))
    assert rates == pytest.approx(expected)
    assert len(rates) > 1


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("edaformer") and "_eda" not in name])
def test_no_other_decoder_has_stochastic_depth(name):
    model = on_meta(name)
    assert not isinstance(model, SegmentationModel) or drop_probs(model.decoder) == []


@pytest.mark.parametrize("name", [name for name in NAMES if "edaformer" in name])
def test_the_rate_of_stochastic_depth_in_the_decoder(name):
    depths = (2, 1, 1) if name == "test_edaformer" else (3, 2, 1)
    assert drop_probs(on_meta(name).decoder) == pytest.approx([DECODER_DROP_PATH] * sum(depths))


@pytest.mark.parametrize("name", ["test_eft", "test_mit", "test_segvit"])
def test_the_rate_is_an_option(name):
    """A list written down by hand: five blocks of a pyramid of depths (1, 1, 2, 1), or as many as the ViT has."""
    with torch.device("meta"):
        encoder = encoder_of(segzoo.create_model(name, drop_path_rate=0.4))
    rates = [rate_of(block) for block in blocks_of(encoder)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4] if len(rates) == 5 else np.linspace(0, 0.4, len(rates)))


class DropAll(nn.Module):
    """Stochastic depth in the unlikely case that it drops the branch of every image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def without_branches(block: nn.Module) -> nn.Module:
    block.drop_path = DropAll()
    return block


def first(name: str, kind: type) -> nn.Module:
    return next(part for part in make(name).modules() if type(part) is kind).double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_eft", "test_mit", "test_edaformer"])
def test_both_branches_of_a_pyramid_block_are_dropped(name):
    blocks = [part for part in make(name).modules() if isinstance(part, Block)]
    for block in blocks:
        x_BHWC = torch.randn(2, 4, 4, block.norm1.normalized_shape[0])
        assert not torch.equal(block.eval()(x_BHWC), x_BHWC)
        assert torch.equal(without_branches(block).train()(x_BHWC), x_BHWC)


@torch.no_grad()
def test_only_the_feed_forward_branch_of_a_vit_block_is_dropped():
    block = without_branches(first("test_segvit", ViTBlock))
    x_BHWC = torch.randn(2, 4, 4, block.attn.dim).double()
    normed = block.norm1(x_BHWC)
    assert torch.equal(block.train()(x_BHWC), x_BHWC + block.attn(normed, normed))


@torch.no_grad()
def test_only_the_feed_forward_branch_of_a_downsampling_block_is_dropped():
    block = without_branches(first("test_segvit_shrunk", DownsamplingBlock))
    x_BHWC = torch.randn(2, 4, 4, block.attn.dim).double()
    half = x_BHWC[:, ::2, ::2]
    assert torch.equal(block.train()(x_BHWC), half + block.attn(block.norm1(half), block.norm1(x_BHWC)))


@torch.no_grad()
def test_an_rtformer_block_without_its_branches():
    """What is left is the shortcuts, the fusion of the low branch into the high one, and the injection."""
    model = make("test_rtformer").double().eval()
    block = without_branches(next(part for part in model.modules() if isinstance(part, RTFormerBlock)))
    high, low = torch.randn(2, 16, 8, 8).double(), torch.randn(2, 32, 4, 4).double()
    new_high, new_low = block((high, low))
    expected_low = block.shortcut_low(low.relu())
    resized = nn.functional.interpolate(block.compress(expected_low), size=(8, 8), mode="bilinear")
    torch.testing.assert_close(new_high, high.relu() + resized)
    torch.testing.assert_close(new_low, expected_low + block.inject(new_high))


# --- the first weights ----------------------------------------------------------------------------------------------


def test_initial_weights_are_drawn_by_the_recipe():
    """PVT v2's: a Linear with 0.02, a convolution by its fan-out in its own group, norms one and zero."""
    torch.manual_seed(0)
    depthwise, dense = nn.Conv2d(4096, 4096, 3, groups=4096), nn.Conv2d(16, 512, 3)
    linear, norm = nn.Linear(512, 512), nn.LayerNorm(8)
    nn.init.constant_(norm.weight, 3)
    for module in (depthwise, dense, linear, norm):
        init_weights(module)
    assert float(depthwise.weight.detach().std()) == pytest.approx((2 / 9) ** 0.5, rel=0.02)
    assert float(dense.weight.detach().std()) == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)
    assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert norm.weight.tolist() == [1.0] * 8
    assert not any(module.bias.any() for module in (depthwise, dense, linear, norm))


# --- dropout --------------------------------------------------------------------------------------------------------


def dropouts(model: nn.Module) -> dict[str, _DropoutNd]:
    return {name: part for name, part in model.named_modules() if isinstance(part, _DropoutNd)}


def expected_dropouts(name: str, model: nn.Module) -> dict[str, tuple[type, float]]:
    """By the recipes: the name of each dropout that acts -> its kind and rate."""
    if not isinstance(model, SegmentationModel) or "rtformer" in name:
        return {}
    if "segvit" not in name:
        return {"decoder.dropout": (nn.Dropout2d, DROPOUT)}
    layers = [part for part, module in model.named_modules() if isinstance(module, DecoderLayer)]
    places = ("self_attn.attn_drop", "cross_attn.attn_drop", "dropout")
    return {f"{layer}.{place}": (nn.Dropout, DROPOUT) for layer in layers for place in places}


@pytest.mark.parametrize("name", NAMES)
def test_dropouts_are_the_recipes(name):
    model = on_meta(name)
    found = {place: (type(part), part.p) for place, part in dropouts(model).items() if part.p > 0}
    assert found == expected_dropouts(name, model)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_edaformer", {}),
        ("test_segformer", {}),
        ("test_segformer", {"decoder": "segformerpp"}),
        ("test_segformer_keypoints", {}),
    ],
)
def test_whole_channels_are_dropped_before_the_classifier(name, options):
    model = make(name, dropout=0.5, **options)
    assert isinstance(model.decoder.dropout, nn.Dropout2d)
    seen = {}
    model.decoder.dropout.register_forward_hook(lambda part, inputs, output: seen.update(x=inputs[0], out=output))
    model.train()(image(2, 3, 64, 64))
    ratio = (seen["out"] / seen["x"])[seen["x"].abs().sum(dim=(2, 3)) > 0]  # (channels that are not all zero, H, W)
    kept = {tuple(channel.nan_to_num(nan=-1).unique().tolist()) for channel in ratio}
    # A ReLU makes zeros, whose ratio is not defined (-1 here); all others of a channel share their fate.
    assert {tuple(value for value in values if value >= 0) for values in kept} == {(0.0,), (2.0,)}
    model.eval()(image(2, 3, 64, 64))
    assert torch.equal(seen["x"], seen["out"])


def quiet(model: nn.Module) -> nn.Module:
    """No dropout and no stochastic depth."""
    for part in model.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
    return model


@pytest.mark.parametrize("name", segzoo.list_models("test_*", exclude_filters=["*_eft", "*_mit", "*_swin"]))
def test_every_dropout_acts_in_training_and_in_no_other_mode(name):
    """Of one dropout at a time: two training passes differ; without any they are equal, and so they are in eval."""
    model = quiet(make(name)).train()
    x = image(2, 3, 64, 64)

    def differ() -> bool:
        with torch.no_grad():
            return not torch.equal(*(model(x) for _ in range(2)))

    assert not differ()
    for place, part in dropouts(model).items():
        if place not in expected_dropouts(name, model):
            continue
        part.p = 0.5
        assert differ(), place
        model.eval()
        assert not differ(), place
        model.train()
        part.p = 0.0


@torch.no_grad()
@pytest.mark.parametrize("want_masks", [False, True])
def test_attention_weights_are_dropped(want_masks):
    """Of one token, whose weight is 1, an attention gives its value or nothing: two times it, or zero."""
    torch.manual_seed(0)
    cross = CrossAttention(dim=4, num_heads=4, dropout=0.5).train()
    itself = SelfAttention(dim=4, num_heads=4, dropout=0.5).train()
    for attention in (cross, itself):
        nn.init.eye_(attention.proj.weight)
        nn.init.zeros_(attention.proj.bias)
    x, memory = torch.randn(64, 1, 4), torch.randn(64, 1, 4)
    value = cross.v(memory)
    ratio = cross(x, memory, want_masks=want_masks)[0] / value
    assert sorted(set(ratio.flatten().round(decimals=3).abs().tolist())) == [0.0, 2.0]
    ratio = itself(x) / itself.qkv(x).chunk(3, dim=-1)[2]
    assert sorted(set(ratio.flatten().round(decimals=3).abs().tolist())) == [0.0, 2.0]
    torch.testing.assert_close(cross.eval()(x, memory, want_masks=want_masks)[0], value)


# --- parameter groups -----------------------------------------------------------------------------------------------


def expected_groups(model: nn.Module) -> dict[str, set[str]]:
    """By the kind of module that owns a parameter, where the package goes by its shape.

    The recipes of mmsegmentation name "norm" and "head": a head's norms and biases are decayed too, because "head"
    wins; an encoder's norms and biases are not, nor its position embedding.
    """
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    groups: dict[str, set[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            is_head = name.startswith("decoder." if isinstance(model, SegmentationModel) else "head.")
            spared = isinstance(module, norms) or leaf.endswith("bias") or leaf == "pos_embed"
            kind = "head" if is_head else "encoder_no_decay" if spared else "encoder"
            groups.setdefault(kind, set()).add(name)
    return groups


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups_have_exactly_their_members(name):
    model = on_meta(name)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = model.param_groups(lr=1e-4, weight_decay=0.05, head_lr_multiplier=10)
    found = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    expected = expected_groups(model)
    assert found == expected
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    rates = {"head": (1e-3, 0.05), "encoder": (1e-4, 0.05), "encoder_no_decay": (1e-4, 0.0)}
    assert settings == {key: pytest.approx(rates[key]) for key in expected}


def test_frozen_parameters_are_in_no_group():
    model = make("test_segformer")
    model.encoder.requires_grad_(False)
    assert {group["name"] for group in model.param_groups(lr=1.0, weight_decay=0.1)} == {"head"}
