"""Reduction of models of timm and transformers, against the same models with a pool built in, or against formulas."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

import segzoo
from segzoo.interop import timm_reduction
from segzoo.models.swin import TEST_SWIN, Swin
from segzoo.twins import eval_twin

WINDOWS = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, "num_classes": 3}


def pvt(**options) -> nn.Module:
    dims = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
    return timm.create_model("pvt_v2_b0", num_classes=3, **dims, **options)


def mvit(**options) -> nn.Module:
    cfg = MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=8, num_heads=1, **options)
    return MultiScaleVit(cfg, img_size=64, num_classes=3)


def swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=96, always_partition=True, **WINDOWS)


def davit() -> nn.Module:
    dims = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
    return timm.create_model("davit_tiny", num_classes=3, **dims)


def vit(**options) -> nn.Module:
    options = {"dynamic_img_size": False} | options  # which timm's own test_vit has
    return timm.create_model("test_vit", img_size=(48, 112), num_classes=3, **options)


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16
    )
    return SegformerForSemanticSegmentation(config)


def slow(*names: str) -> list:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


# Model, its input, and its sites.
FOREIGN = {
    "pvt": (pvt, (1, 3, 96, 128), 4),
    "pvt linear": (lambda: pvt(linear=True), (1, 3, 96, 128), 4),
    "mvit": (mvit, (2, 3, 64, 64), 4),
    "mvit with a class token": (lambda: mvit(use_cls_token=True), (2, 3, 64, 64), 4),
    "swin": (swin, (2, 3, 96, 96), 4),
    "davit": (davit, (2, 3, 72, 100), 4),
    "vit": (vit, (2, 3, 48, 112), 3),
    "vit of any size": (lambda: vit(dynamic_img_size=True), (2, 3, 64, 96), 3),
    "vit with registers": (lambda: vit(reg_tokens=2, qk_norm=True), (2, 3, 48, 112), 3),
    "segformer": (segformer, (1, 3, 96, 128), 4),
}


def build(name: str) -> tuple[nn.Module, torch.Tensor, int]:
    make, shape, sites = FOREIGN[name]
    torch.manual_seed(0)
    model = make().double().eval()
    for parameter in model.parameters():  # biases and norms, too
        nn.init.normal_(parameter, std=0.2)
    return model, torch.randn(*shape, dtype=torch.float64), sites


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def parts(model: nn.Module) -> list:
    """Everything in which a model can differ but tensors."""
    return [
        (name, type(part), sorted(part.__dict__), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in model.named_modules()
    ]


VARIANTS = ("pvt linear", "mvit with a class token", "vit of any size", "vit with registers", "segformer")
ONE_EACH = ("pvt", "mvit", "swin", "davit", "vit")


@pytest.mark.parametrize("name", [*ONE_EACH, *slow(*VARIANTS)])
def test_reduced_in_place_and_restored_to_the_bit(name):
    model, x, sites = build(name)
    before, made_of, keys = run(model, x), parts(model), list(model.state_dict())
    plan = segzoo.reduce(model, {"encoder": 2})
    assert list(plan) == [f"encoder.{i}" for i in range(sites)] == list(segzoo.reduction_sites(model))
    reduced = run(model, x)
    assert not torch.equal(before, reduced)
    assert list(model.state_dict()) == keys
    with segzoo.inference_reduction(model, 1):  # the leaves are there and neutral
        assert torch.equal(run(model, x), before)
    assert torch.equal(run(model, x), reduced)
    model.train()
    assert all(leaf.in_force == segzoo.Pool(1) for leaf in segzoo.reduction_sites(model)["encoder.0"])
    model.eval()
    assert segzoo.reduce(model, None).is_neutral
    assert parts(model) == made_of
    assert torch.equal(run(model, x), before)


@pytest.mark.parametrize("name", ["pvt", "vit", *slow("mvit", "swin", "segformer")])
def test_copies_and_twins_are_reduced_too_and_restore_by_themselves(name):
    model, x, _ = build(name)
    segzoo.reduce(model, 2)
    # transformers' models cannot be pickled once they have run, whether they are reduced or not.
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), eval_twin(model)]
    reduced = run(model, x)
    segzoo.reduce(model, None)
    before = run(model, x)
    assert not torch.equal(before, reduced)
    for other in copies:
        assert torch.equal(run(other, x), reduced)
        segzoo.reduce(other, 1)
        assert torch.equal(run(other, x), before)


def test_a_twin_of_a_model_in_training_is_reduced():
    """As `predict` needs it: mode and plan are the twin's own, also where a hook or a forward finds its leaf."""
    for name in ("pvt", "vit"):
        model, x, _ = build(name)
        segzoo.reduce(model, 2)
        reduced = run(model, x)
        assert torch.equal(run(eval_twin(model.train()), x), reduced)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_EACH, "vit of any size", "segformer"])
def test_compiled(name):
    model, x, _ = build(name)
    segzoo.reduce(model, 2)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=0, atol=1e-12)
    segzoo.set_inference_reduction(model, 3)
    torch.testing.assert_close(run(compiled, x), run(model, x), rtol=0, atol=1e-12)


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pvt_pools_after_its_strided_convolution_or_before_kv(linear):
    model, x, _ = build("pvt linear" if linear else "pvt")
    reference = copy.deepcopy(model)
    for stage in reference.stages:
        attn = stage.blocks[0].attn
        if attn.sr is None:
            attn.norm = nn.Identity()
        attn.sr = nn.AvgPool2d(2) if attn.sr is None else nn.Sequential(attn.sr, nn.AvgPool2d(2))
    segzoo.reduce(model, 2)
    torch.testing.assert_close(run(model, x), run(reference, x), rtol=0, atol=1e-12)


def test_mvit_pools_after_its_pooling():
    model, x, _ = build("mvit")
    reference = copy.deepcopy(model)
    for stage in reference.stages:
        for block in stage.blocks:
            for name in ("pool_k", "pool_v"):
                setattr(block.attn, name, nn.Sequential(getattr(block.attn, name), nn.AvgPool2d(2)))
    segzoo.reduce(model, {"encoder": (2, 2, 2, 1)})
    for block in reference.stages[3].blocks:
        block.attn.pool_k, block.attn.pool_v = block.attn.pool_k[0], block.attn.pool_v[0]
    torch.testing.assert_close(run(model, x), run(reference, x), rtol=0, atol=1e-12)


class PoolTokens(nn.Module):
    def forward(self, x, height, width):
        return F.avg_pool2d(x.transpose(1, 2).unflatten(2, (height, width)), 2).flatten(2).transpose(1, 2)


@pytest.mark.slow
def test_transformers_segformer_pools_like_pvt():
    model, x, _ = build("segformer")
    reference = copy.deepcopy(model)
    attentions = [part for part in reference.modules() if type(part).__name__ == "SegformerAttention"]
    assert len(attentions) == 4
    for attention in attentions:
        if attention.sequence_reduction_ratio > 1:
            inner = attention.sequence_reduction
            inner.sequence_reduction = nn.Sequential(inner.sequence_reduction, nn.AvgPool2d(2))
        else:
            attention.sequence_reduction_ratio, attention.sequence_reduction = 2, PoolTokens()
    segzoo.reduce(model, 2)
    torch.testing.assert_close(run(model, x), run(reference, x), rtol=0, atol=1e-12)


def test_swin_is_as_segzoos_own():
    """Which `test_swin.py` compares with loops; windows of 4 leave border cells at 3."""
    model, x, _ = build("swin")
    own = Swin(TEST_SWIN).double().eval()
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("head.")}
    own.reset_classifier(0)
    segzoo.load_weights(own, state)
    plan = {"encoder": (2, 3, 2, 1)}
    segzoo.reduce(model, plan)
    own.set_inference_reduction(plan)
    with torch.no_grad():
        theirs = model.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(own.forward_features(x), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def expected_attention(attn, x, reduce) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v with keys and values made fewer by `reduce`: (B, N, C) -> (B, M, C)."""
    q, k, v = attn.qkv(x).chunk(3, dim=-1)
    heads = [t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, reduce(k), reduce(v))]
    scores = heads[0] @ heads[1].transpose(-2, -1) / heads[0].shape[-1] ** 0.5
    return attn.proj((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2))


def test_davit_averages_the_cells_of_a_window():
    model, _, _ = build("davit")
    attn = model.stages[1].blocks[0][0].attn  # windows of 7
    x = torch.randn(3, 49, 16, dtype=torch.float64)

    def cells(t):
        pooled = F.avg_pool2d(t.transpose(1, 2).unflatten(2, (7, 7)), 2, ceil_mode=True, count_include_pad=False)
        assert pooled.shape[2:] == (4, 4)
        return pooled.flatten(2).transpose(1, 2)

    expected = expected_attention(attn, x, cells)
    segzoo.reduce(model, {"encoder.1": 2})
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-12)


def test_vit_keeps_its_class_token_and_pools_the_grid():
    model, _, _ = build("vit")  # 3 x 7 patches of 16 pixels
    attn = model.blocks[0].attn
    x = torch.randn(2, 22, attn.qkv.in_features, dtype=torch.float64)

    def pooled(t):
        grid = F.max_pool2d(t[:, 1:].transpose(1, 2).unflatten(2, (3, 7)), 2)  # 1 x 3: remainders go
        return torch.cat((t[:, :1], grid.flatten(2).transpose(1, 2)), dim=1)

    expected = expected_attention(attn, x, pooled)
    segzoo.reduce(model, {"encoder.0": segzoo.Pool(2, "max")})
    torch.testing.assert_close(attn(x), expected, rtol=0, atol=1e-12)


def test_vit_of_another_size_asks_for_it():
    model, _, _ = build("vit")
    segzoo.reduce(model, 2)
    model.set_input_size((64, 64))
    assert run(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 3)
    with pytest.raises(segzoo.SegzooError, match="21 patch tokens where its patch_embed says 4x4.*set_input_size"):
        model.blocks[0].attn(torch.zeros(1, 22, 64, dtype=torch.float64))


@pytest.mark.parametrize("name", ["pvt", *slow("vit", "segformer")])
def test_tokens_may_be_merged_as_well(name):
    model, x, _ = build(name)
    plain = run(model, x)
    for entry in (segzoo.Bipartite(0.5, 2), segzoo.Neighbour2d(2), segzoo.GridMerge(1.5)):
        segzoo.reduce(model, {"encoder.0": entry})
        assert not torch.equal(run(model, x), plain)


# --- cost -------------------------------------------------------------------------------------------------------------


def test_cost_counts_what_is_left():
    model, _, _ = build("vit")
    C, depth = model.blocks[0].attn.qkv.in_features, len(model.blocks)
    full = segzoo.cost(model, (48, 112))
    segzoo.reduce(model, 2)
    reduced = segzoo.cost(model, (48, 112))
    # Of 21 patches 3 are left (1 x 3 cells of 2 x 2); two products of 22 queries, in every block.
    assert full.macs - reduced.macs == depth * 2 * 22 * 18 * C
    assert list(reduced.sites) == ["encoder.0", "encoder.1", "encoder.2"]
    assert reduced.params == full.params


@pytest.mark.slow
def test_transformers_segformer_costs_what_segzoos_does():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    theirs = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150)).eval()
    own = segzoo.create_model("segformer_b0").eval()
    for plan in (None, {"encoder": (2, 2, 1, 1)}, {"encoder": 2}):
        segzoo.reduce(theirs, plan)
        segzoo.reduce(own, plan)
        assert segzoo.cost(theirs, (512, 512)).macs == segzoo.cost(own, (512, 512)).macs


@pytest.mark.slow
def test_the_table_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "interop.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text, flags=re.MULTILINE)
    assert len(rows) >= 5
    for name, *expected in rows:
        model = timm.create_model(name).eval()
        measured = [segzoo.cost(model, (224, 224)).macs]
        optimal = (2, 2, 1) if name.startswith("vit") else (2, 2, 1, 1)
        for plan in ({"encoder": optimal}, {"encoder": 2}):
            segzoo.reduce(model, plan)
            measured.append(segzoo.cost(model, (224, 224)).macs)
        assert [f"{macs / 1e9:.3f}" for macs in measured] == expected, name


# --- where it is found ------------------------------------------------------------------------------------------------


def test_inside_other_models():
    backbone = timm.create_model("pvt_v2_b0", features_only=True)
    assert list(segzoo.reduce(backbone, {"encoder": (2, 2, 1, 1)})) == [f"encoder.{i}" for i in range(4)]
    assert segzoo.reduction_sites(backbone)["encoder.1"][0].entry == segzoo.Pool(2)
    whole = nn.ModuleDict({"encoder": backbone, "own": segzoo.create_model("test_edaformer")})
    assert "decoder.0" in segzoo.reduce(whole, {"decoder": 2})
    segzoo.reduce(whole, None)
    assert not segzoo.reduction_sites(backbone)
    assert segzoo.reduction_sites(whole)


def test_a_model_of_segzoo_is_set():
    model = segzoo.create_model("test_edaformer")
    assert segzoo.reduce(model, "fast") == model.set_inference_reduction("fast")


class Mean(nn.Module):
    """An attention of somebody's: every token gets the mean of the map."""

    def forward(self, x_BHWC):
        return x_BHWC.mean(dim=(1, 2), keepdim=True).expand_as(x_BHWC)


def reduced_mean(module, leaf, x_BHWC):
    return leaf(x_BHWC).mean(dim=1)[:, None, None].expand_as(x_BHWC)


def test_a_registered_attention(monkeypatch):
    monkeypatch.setattr(timm_reduction, "ADAPTERS", dict(timm_reduction.ADAPTERS))
    timm_reduction.register_adapter(Mean, reduced_mean, level=lambda name: int(name))
    model, x = nn.Sequential(Mean(), Mean()).eval(), torch.arange(16.0).reshape(1, 4, 4, 1)
    assert list(segzoo.reduce(model, {"encoder.1": segzoo.Pool(4, "max")})) == ["encoder.0", "encoder.1"]
    assert (model[0](x) == 7.5).all()
    assert (model[1](x) == 15).all()
    assert (pickle.loads(pickle.dumps(model))[1](x) == 15).all()
    segzoo.reduce(model, None)
    assert (model[1](x) == 7.5).all()


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, match: str, plan: object = 2) -> None:
    before = parts(model)
    with pytest.raises(segzoo.SegzooError, match=match):
        segzoo.reduce(model, plan)
    assert parts(model) == before


def test_channel_attention_is_refused_by_name():
    model, _, _ = build("davit")
    refused(model.stages[0].blocks[0][1], r"timm\.models\.davit\.ChannelAttention attends from channel to channel")
    refused(model, "no part or site 'channel'.*left alone: timm.models.davit.ChannelAttention attends", {"channel": 2})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Linear(2, 2), r"Linear has no attention that can be reduced \(none at all\)"),
        (lambda: vit().blocks, "is an attention of timm's ViT in Sequential, whose grid is not known"),
        (lambda: nn.MultiheadAttention(4, 1), "MultiheadAttention is not known.*register_adapter"),
    ],
)
def test_what_is_not_known_is_refused(make, match):
    refused(make(), match)


def test_wrong_plans_are_refused():
    refused(mvit(), "encoder.0 takes Pool, OverlapPool, Window, not Bipartite", segzoo.Bipartite(0.5, 2))
    refused(pvt(), "'encoder' has 4 levels", {"encoder": (2, 2)})
    refused(pvt(), "no preset is called 'fast'", "fast")


def test_an_attention_that_is_not_as_its_adapter_knows_it_is_refused():
    model = davit()
    model.stages[2].blocks[0][0].attn.q_norm = nn.Identity()  # as a later version might
    refused(model, r"stages\.2\.blocks\.0\.0\.attn \(timm.*of version.*parts that its reduction does not know: q_norm")
    model = davit()
    del model.stages[0].blocks[0][0].attn.window_size
    refused(model, "has no window_size, which its reduction needs")
    model = mvit()
    model.stages[0].blocks[0].attn.pool_k = None
    refused(model, "has no pooling of keys and values")
    model = davit()
    attn = model.stages[0].blocks[0][0].attn
    attn.forward = lambda x: x
    refused(model, "has a forward that was put in place of its class's")


def test_a_vits_mask_is_refused():
    model, _, _ = build("vit")
    segzoo.reduce(model, 2)
    x = torch.zeros(1, 22, model.embed_dim, dtype=torch.float64)
    with pytest.raises(segzoo.SegzooError, match="with a mask cannot be reduced"):
        model.blocks[0].attn(x, attn_mask=torch.zeros(22, 22, dtype=torch.float64))
