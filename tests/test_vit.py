"""The plain ViT encoder: timm's function with timm's weights, any grid, down-sampling and reduction leaves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import segzoo
from segzoo._errors import WeightsError
from segzoo.models.vit import DownsamplingBlock, ViT, ViTConfig

SMALL = ViTConfig(img_size=(64, 144), embed_dim=48, depth=6, num_heads=3, stages=tuple(range(6)))


def timm_vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"img_size": (64, 144), "class_token": False, "global_pool": "avg"} | options
    model = VisionTransformer(embed_dim=48, depth=6, num_heads=3, num_classes=7, **options)
    for parameter in model.parameters():  # norms and biases too, which start as ones and zeros
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def image(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_same_weights_give_the_same_block_outputs_as_timm():
    reference, model = timm_vit(), ViT(SMALL).double().eval()
    segzoo.load_weights(model, reference.state_dict())
    outputs = []
    for block in reference.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    x = image(64, 144)
    with torch.no_grad():
        reference(x)
        features = model.forward_features(x)
    assert len(features) == len(outputs) == 6
    for feature, output in zip(features, outputs, strict=True):
        assert feature.shape == (1, 48, 4, 9)
        torch.testing.assert_close(feature.flatten(2).transpose(1, 2), output, rtol=0, atol=1e-6)


def test_the_class_token_and_its_position_are_dropped():
    reference, model = timm_vit(class_token=True, global_pool="token"), ViT(SMALL).double()
    segzoo.load_weights(model, reference.state_dict())
    assert torch.equal(model.pos_embed.flatten(1, 2), reference.pos_embed[:, 1:])
    assert not any("cls" in name for name, _ in model.named_parameters())


def test_a_left_over_key_is_refused():
    state = timm_vit().state_dict() | {"reg_token": torch.zeros(1, 4, 48)}
    with pytest.raises(WeightsError, match="left over: reg_token"):
        segzoo.load_weights(ViT(SMALL), state)


def test_positions_of_another_training_size_are_resized_bicubically_without_antialias():
    reference = timm_vit(img_size=(128, 128))
    model = ViT(SMALL).double()
    segzoo.load_weights(model, reference.state_dict())
    square = reference.pos_embed.unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(4, 9), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(model.pos_embed, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-12)


def test_own_weights_carry_their_grid():
    """6x6 and 4x9 have as many positions; a flat list of 36 could not tell them apart."""
    square = ViT(dataclasses.replace(SMALL, img_size=(96, 96)))
    wide = ViT(SMALL)
    segzoo.load_weights(wide, square.state_dict())
    expected = F.interpolate(square.pos_embed.permute(0, 3, 1, 2), size=(4, 9), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(wide.pos_embed, expected)


def test_positions_that_are_no_square_ask_for_img_size():
    state = timm_vit(img_size=(64, 128)).state_dict()
    with pytest.raises(WeightsError, match="32 positions.*img_size="):
        segzoo.load_weights(ViT(SMALL), state)


def test_the_image_is_padded_with_zeros_at_the_bottom_and_right():
    model, x = ViT(SMALL).double().eval(), image(50, 71)
    with torch.no_grad():
        odd, padded = model.forward_features(x), model.forward_features(F.pad(x, (0, 9, 0, 14)))
    assert all(torch.equal(a, b) for a, b in zip(odd, padded, strict=True))
    assert (odd.image_size, odd.padded_size) == ((50, 71), (64, 80))


@pytest.mark.parametrize(("depth", "levels"), [(12, [4, 4, 4]), (24, [8, 8, 8]), (4, [2, 1, 1])])
def test_sites_are_thirds_of_the_depth(depth, levels):
    with torch.device("meta"):
        model = ViT(dataclasses.replace(SMALL, depth=depth, stages=(depth - 1,)))
    sites = segzoo.reduction_sites(model)
    assert {site for site in sites if not site.endswith(".q")} == {"encoder.0", "encoder.1", "encoder.2"}
    assert [len(sites[f"encoder.{level}"]) for level in range(3)] == levels
    assert [len(sites[f"encoder.{level}.q"]) for level in range(3)] == levels


def test_pooled_keys_and_values_are_means_of_patch_tokens():
    model = ViT(dataclasses.replace(SMALL, depth=1, stages=(0,))).double().eval()
    block, x = model.blocks[0], torch.randn(1, 4, 9, 48, dtype=torch.float64)
    segzoo.set_inference_reduction(model, {"encoder.0": 2})
    normed = block.norm1(x)
    pooled = normed[:, :4, :8].unflatten(1, (2, 2)).unflatten(3, (4, 2)).mean(dim=(2, 4)).flatten(1, 2)
    q, k, v = block.attn.qkv.weight.chunk(3)
    bias = block.attn.qkv.bias.chunk(3)
    heads = [
        t.unflatten(-1, (3, 16)).transpose(1, 2)
        for t in (normed.flatten(1, 2) @ q.T + bias[0], pooled @ k.T + bias[1], pooled @ v.T + bias[2])
    ]
    weights = (heads[0] @ heads[1].transpose(-2, -1) / 4).softmax(-1)
    expected = block.attn.proj((weights @ heads[2]).transpose(1, 2).flatten(2)).unflatten(1, (4, 9))
    torch.testing.assert_close(block.attn(normed, normed), expected)


@pytest.mark.parametrize(
    "entry", [2, segzoo.Pool(3, "max"), segzoo.OverlapPool(2), segzoo.Bipartite(0.5, 2), segzoo.Neighbour2d(2)]
)
@pytest.mark.parametrize("downsample_block", [None, 2])
def test_every_entry_runs_and_none_restores(entry, downsample_block):
    model = ViT(dataclasses.replace(SMALL, downsample_block=downsample_block)).double().eval()
    x = image(64, 144)
    with torch.no_grad():
        before = model.forward_features(x)
        segzoo.set_inference_reduction(model, {"encoder": entry})
        assert not torch.allclose(before[-1], model.forward_features(x)[-1])
        segzoo.set_inference_reduction(model, {"encoder.q": segzoo.Bipartite(0.5, 2)})
        assert not torch.allclose(before[-1], model.forward_features(x)[-1])
        segzoo.set_inference_reduction(model, None)
        assert all(torch.equal(a, b) for a, b in zip(before, model.forward_features(x), strict=True))


@pytest.mark.parametrize("tokens", ["q", "qkv"])
def test_downsampling_queries_are_every_second_token_of_every_second_row(tokens):
    cfg = dataclasses.replace(SMALL, depth=1, stages=(0,), downsample_block=0, downsample_tokens=tokens)
    model = ViT(cfg).double().eval()
    (block,) = model.blocks
    assert isinstance(block, DownsamplingBlock)
    plain = ViT(dataclasses.replace(cfg, downsample_block=None)).double().eval().blocks[0]
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 5, 9, 48, dtype=torch.float64)
    with torch.no_grad():
        # Every token of a plain block has its own query, so the sampled block is a sample of the plain one.
        expected = plain(x)[:, ::2, ::2] if tokens == "q" else plain(x[:, ::2, ::2])
        torch.testing.assert_close(block(x), expected)
    assert block(x).shape == (2, 3, 5, 48)


def test_downsampling_by_convolution_learns():
    cfg = dataclasses.replace(SMALL, downsample_block=3, downsample="conv")
    model = ViT(cfg)
    features = model.forward_features(image(64, 144).float())
    assert [tuple(f.shape[2:]) for f in features] == [(4, 9)] * 3 + [(2, 5)] * 3
    features[-1].sum().backward()
    assert model.blocks[3].downsample.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": (5, 2)}, "rising block numbers from 0 to 5"),
        ({"stages": (2, 6)}, "rising block numbers from 0 to 5"),
        ({"stages": ()}, "rising block numbers from 0 to 5"),
        ({"downsample_block": 6}, "downsample_block=6"),
        ({"downsample": "max"}, "'nearest' or 'conv'"),
        ({"downsample_tokens": "k"}, "'q' or 'qkv'"),
        ({"num_heads": 5}, "num_heads=5 must divide embed_dim=48"),
        ({"img_size": 64}, "img_size must be"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        ViT(dataclasses.replace(SMALL, **options))
