"""PVT v2 against timm's, with drawn weights and through load_weights, and its embedding-free form by hand."""

from __future__ import annotations

import pytest
import timm
import torch

import segzoo

SIZES = ["b0", *(pytest.param(size, marks=pytest.mark.slow) for size in ("b1", "b2"))]


def timm_model(size: str, dtype: torch.dtype) -> torch.nn.Module:
    """Norms and biases drawn as well: as initialised they are ones and zeros, which would hide a swap."""
    torch.manual_seed(0)
    model = timm.create_model(f"pvt_v2_{size}").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("size", SIZES)
def test_is_timms_function(size, dtype, atol):
    theirs = timm_model(size, dtype)
    ours = segzoo.create_model(f"pvt_v2_{size}").to(dtype).eval()
    segzoo.load_weights(ours, theirs.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=atol)
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for ours_BCHW, theirs_BCHW in zip(ours.forward_features(x), maps, strict=True):
            torch.testing.assert_close(ours_BCHW, theirs_BCHW, rtol=0, atol=atol)


@pytest.mark.parametrize("size", ["b0", "b1", "b2"])
def test_parameter_counts_are_timms(size):
    with torch.device("meta"):
        expected = sum(parameter.numel() for parameter in timm.create_model(f"pvt_v2_{size}").parameters())
    assert segzoo.model_info(f"pvt_v2_{size}").params == expected


@pytest.mark.parametrize("stage", [0, 3])  # with a strided convolution of keys and values, and without
def test_embedding_free_attention_by_hand(stage):
    torch.manual_seed(0)
    model = segzoo.create_model("test_pvt_v2", embedding_free=True).double().eval()
    attn = model.stages[stage].blocks[0].attn
    heads, dim = (1, 4)[stage // 3], (8, 32)[stage // 3]
    x_BHWC = torch.randn(2, 16, 16, dim, dtype=torch.float64)
    with torch.no_grad():
        kv_BMC = (attn.kv_downsample(x_BHWC) if stage == 0 else x_BHWC).flatten(1, 2)
        q, kv = (tokens.unflatten(-1, (heads, -1)).transpose(1, 2) for tokens in (x_BHWC.flatten(1, 2), kv_BMC))
        weights = (q @ kv.mT / (dim / heads) ** 0.5).softmax(dim=-1)
        expected = attn.proj((weights @ kv).transpose(1, 2).flatten(2)).unflatten(1, (16, 16))
        torch.testing.assert_close(attn(x_BHWC), expected)
    assert kv_BMC.shape[1] == (4 if stage == 0 else 256)


def test_what_the_embedding_free_form_saves():
    """Three projections a block, of weights and of multiply-accumulates: of 64 x 64 pixels, stage by stage."""
    stages = [(1, 8, 256, 4), (1, 16, 64, 4), (2, 24, 16, 4), (1, 32, 4, 4)]  # blocks, channels, queries, keys
    plain, free = (
        segzoo.cost(segzoo.create_model("test_pvt_v2", embedding_free=option), (64, 64)) for option in (False, True)
    )
    assert plain.params - free.params == sum(blocks * 3 * dim * (dim + 1) for blocks, dim, _, _ in stages)
    assert plain.macs - free.macs == sum(n * dim * dim * (queries + 2 * keys) for n, dim, queries, keys in stages)


@pytest.mark.parametrize("embedding_free", [False, True])
@pytest.mark.parametrize("segmenter", ["test_edaformer", "test_segformer"])
def test_is_an_encoder_of_the_segmenters(segmenter, embedding_free):
    encoder = segzoo.create_model("test_pvt_v2", embedding_free=embedding_free).cfg
    options = {"decoder_num_heads": (4, 3, 2)} if segmenter == "test_edaformer" else {}
    model = segzoo.create_model(segmenter, encoder=encoder, **options).eval()
    assert {"encoder.0", "encoder.3", "encoder.0.q"} <= set(segzoo.reduction_sites(model))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        base = model(x)
        model.set_inference_reduction({"encoder": (2, 2, 1, 1)})
        assert not torch.equal(model(x), base)
        model.set_inference_reduction(None)
        assert torch.equal(model(x), base)
    model.train()(x.expand(2, -1, -1, -1)).mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_plain_file_is_refused_by_the_embedding_free_form():
    plain = segzoo.create_model("test_pvt_v2").state_dict()
    with pytest.raises(segzoo.SegzooError, match=r"stages\.0\.blocks\.0\.attn\.q\.weight"):
        segzoo.load_weights(segzoo.create_model("test_pvt_v2", embedding_free=True), plain)
