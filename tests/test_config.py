"""Configs: what is refused, by which name; any encoder under any decoder; flat and nested options."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import segzoo
from segzoo.models.config import EncoderConfig, SegmenterConfig
from segzoo.models.edaformer import TEST_EDAFORMER
from segzoo.models.eft import TEST_EFT
from segzoo.models.mit import TEST_MIT
from segzoo.models.pvt import TEST_PVT_V2
from segzoo.models.segformer import TEST_SEGFORMER
from segzoo.models.segvit import TEST_SEGVIT, TEST_SEGVIT_SHRUNK, TEST_VIT
from segzoo.models.swin import TEST_SWIN

FOUR_VIT = dataclasses.replace(TEST_VIT, stages=(0, 1, 2, 3))
ENCODERS = {"eft": TEST_EFT, "mit": TEST_MIT, "pvt": TEST_PVT_V2, "vit": FOUR_VIT, "swin": TEST_SWIN}
SEGMENTERS = ("test_edaformer", "test_segformer", "test_segvit")


@pytest.mark.parametrize(
    ("cfg", "changes", "message"),
    [
        # types
        (TEST_EFT, {"num_heads": "a"}, r"EFTConfig: num_heads must be tuple\[int, \.\.\.\], not 'a'"),
        (TEST_EFT, {"depths": (1, 1, 2.0, 1)}, "EFTConfig: depths"),
        (TEST_EFT, {"in_chans": True}, "EFTConfig: in_chans must be a whole number, not True"),
        (TEST_SWIN, {"embed_dim": "8"}, "SwinConfig: embed_dim must be a whole number"),
        (TEST_SEGFORMER, {"encoder": TEST_SEGFORMER}, "SegFormerConfig: encoder must be EncoderConfig"),
        (TEST_EDAFORMER, {"encoder": "mit_b0"}, "EDAFormerConfig: encoder must be EncoderConfig, not 'mit_b0'"),
        (TEST_SEGVIT, {"upsample": 1}, "SegViTConfig: upsample must be True or False, not 1"),
        # ranges
        (TEST_EFT, {"in_chans": 0}, "in_chans must be positive, not 0"),
        (TEST_EFT, {"num_classes": -1}, "num_classes must be at least 0, not -1"),
        (TEST_EFT, {"pool": (8, 4, 0, 1)}, r"pool must be positive, not \(8, 4, 0, 1\)"),
        (TEST_MIT, {"drop_path_rate": 1.0}, "drop_path_rate must be from 0 to less than 1, not 1.0"),
        (TEST_MIT, {"conv_norm_eps": 0.0}, "conv_norm_eps must be positive"),
        (TEST_EDAFORMER, {"num_classes": 0}, "num_classes must be positive, not 0"),
        (TEST_SEGFORMER, {"decoder": "mlp"}, "decoder must be 'segformer' or 'segformerpp', not 'mlp'"),
        (TEST_SWIN, {"stages": ()}, r"stages=\(\) must be rising stage numbers from 0 to 3"),
        # contradictions
        (TEST_EFT, {"depths": (1, 1, 2)}, r"depths must have 4 entries, one a stage, not \(1, 1, 2\)"),
        (TEST_PVT_V2, {"mlp_ratios": (8, 8, 4)}, r"mlp_ratios must have 4 entries, one a stage, not \(8, 8, 4\)"),
        (TEST_MIT, {"num_heads": (1, 2, 5, 4)}, r"num_heads=\(1, 2, 5, 4\) must divide embed_dims=\(8, 16, 24, 32\)"),
        (TEST_SWIN, {"num_heads": (3, 2, 2, 4)}, r"must divide the channels \[8, 16, 32, 64\] of the stages"),
        (TEST_EDAFORMER, {"decoder_depths": (1, 1)}, "decoder_depths must have 3 entries"),
        (TEST_EDAFORMER, {"encoder": TEST_VIT}, "decoder_depths must have 2 entries"),
        (TEST_EDAFORMER, {"decoder_num_heads": (5, 3, 2)}, r"must divide the encoder's channels \(32, 24, 16\)"),
        (TEST_SEGVIT_SHRUNK, {"encoder": TEST_SWIN}, "upsample=True needs a ViT as encoder"),
    ],
)
def test_refusals_name_the_config_and_the_field(cfg, changes, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        dataclasses.replace(cfg, **changes)


def test_no_segmenter_copies_a_field_of_its_encoder():
    for family in segzoo.models.family.FAMILIES.values():
        for name, variant in family.variants.items():
            if isinstance(variant.cfg, SegmenterConfig):
                own = {field.name for field in dataclasses.fields(variant.cfg)}
                theirs = {field.name for field in dataclasses.fields(variant.cfg.encoder)}
                assert own & theirs == {"num_classes"}, name


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("segmenter", SEGMENTERS)
def test_any_encoder_under_any_decoder(segmenter, encoder):
    heads = {"decoder_num_heads": (4, 2, 2)} if segmenter == "test_edaformer" else {}
    if segmenter == "test_edaformer" and encoder in ("eft", "mit", "pvt"):
        heads = {"decoder_num_heads": (4, 3, 2)}
    model = segzoo.create_model(segmenter, encoder=ENCODERS[encoder], in_chans=4, num_classes=5, **heads).eval()
    assert (model.in_chans, model.num_classes, model.encoder.num_classes) == (4, 5, 0)
    assert tuple(info["num_chs"] for info in model.feature_info) == model.cfg.encoder.map_chans
    assert dict(model.named_parameters())[model.first_conv].shape[1] == 4
    with torch.no_grad():
        for size in ((64, 96), (41, 70)):
            assert model(torch.randn(1, 4, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("encoder", ["vit", "swin"])
def test_scores_of_a_padded_image_are_the_image_s_own(encoder):
    """A decoder that answers with the horizontal place: it must run over the image alone, not over its padding."""
    model = segzoo.create_model("test_segformer", encoder=ENCODERS[encoder], num_classes=1).double().eval()
    model.decoder.forward = lambda maps: (
        (torch.arange(maps[0].shape[3]).double() + 0.5).expand(1, 1, *maps[0].shape[2:]) * stride
    )
    stride = model.feature_info[0]["reduction"]
    with torch.no_grad():
        scores = model(torch.zeros(1, 3, 50, 101, dtype=torch.float64))[0, 0, 25]
    # A cell's place in pixels, away from the borders where a bilinear resize levels off.
    inner = slice(stride, 101 - stride)
    torch.testing.assert_close(scores[inner], (torch.arange(101).double() + 0.5)[inner], rtol=0, atol=0.5)


def test_options_of_the_encoder_are_given_flat_nested_or_both():
    flat = segzoo.create_model("test_segvit", depth=6, stages=(1, 5), embed_dim=32, decoder_dim=32)
    nested = segzoo.create_model("test_segvit", encoder={"depth": 6, "stages": [1, 5]}, embed_dim=32, decoder_dim=32)
    assert flat.cfg == nested.cfg
    assert flat.cfg.encoder == dataclasses.replace(TEST_VIT, depth=6, stages=(1, 5), embed_dim=32)
    other = segzoo.create_model("test_edaformer", encoder=TEST_MIT, conv_norm_eps=1e-4)
    assert other.encoder.stages[0].patch_embed.norm.eps == 1e-4


def test_a_wrong_encoder_is_refused_beside_options_of_the_right_one():
    with pytest.raises(segzoo.SegzooError, match="encoder must be EncoderConfig, not 3"):
        segzoo.create_model("test_edaformer", encoder=3, depths=(1, 1, 1, 1))


def test_an_encoder_by_its_name():
    named = segzoo.create_model("test_edaformer", encoder="test_pvt_v2", embedding_free=True)
    assert named.cfg.encoder == dataclasses.replace(TEST_PVT_V2, embedding_free=True)
    for name in ("resnet50", "test_edaformer"):
        with pytest.raises(segzoo.SegzooError, match=f"encoder='{name}' is no encoder's name; encoders: eft_t, "):
            segzoo.create_model("test_edaformer", encoder=name)


def test_a_base_says_that_it_builds_nothing():
    with pytest.raises(NotImplementedError):
        EncoderConfig().build()
