"""EFT and EDAFormer against the official numbers, through load_weights, so that key rules are proven too."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden_arrays, golden_input, golden_json, golden_state_dict

import segzoo

CASES = [
    ("eft_t_encoder", "eft_t"),
    ("eft_b_encoder", "eft_b"),
    ("edaformer_t_ade", "edaformer_t"),
    pytest.param("edaformer_b_ade", "edaformer_b", marks=pytest.mark.slow),
]


def outputs_of(model, setting) -> dict[str, torch.Tensor]:
    """The golden file's outputs: maps of an encoder, logits and full-size crop of a segmenter."""
    x = golden_input(setting["input_shape"]).to(next(model.parameters()).dtype)
    with torch.no_grad():
        if isinstance(model, segzoo.models.FeaturePyramid):
            model.set_inference_reduction({"encoder": tuple(setting["reduction_ratios"])})
            outputs = {f"stage{i + 1}": feature for i, feature in enumerate(model(x))}
            return {**outputs, "stage1_sub2": outputs["stage1"][:, :, ::2, ::2]}
        # The official decoder option counts from fine to coarse, the paper and segzoo from coarse to fine.
        decoder = tuple(reversed(setting["decoder_reduction_ratios"]))
        model.set_inference_reduction({"encoder": tuple(setting["backbone_reduction_ratios"]), "decoder": decoder})
        logits = model.forward_head(model.forward_features(x))
        return {"logits": logits, "full_crop": model(x)[:, ::10, 40:72, 100:132]}


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize(("golden", "name"), CASES)
def test_parity(golden, name, dtype, atol):
    record, arrays = golden_json(golden), golden_arrays(golden)
    model = segzoo.create_model(name, features_only=golden.endswith("encoder")).to(dtype).eval()
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    compared = set()
    for setting in record["settings"]:
        for key, output in outputs_of(model, setting).items():
            full_key = f"{setting['name']}.{key}"
            if full_key in arrays:
                expected = torch.from_numpy(arrays[full_key]).to(dtype)
                torch.testing.assert_close(output, expected, rtol=0, atol=atol, msg=lambda m, k=full_key: f"{k}: {m}")
                compared.add(full_key)
    assert compared == set(arrays)


def test_parity_of_the_assumed_classifier():
    record, arrays = golden_json("eft_t_cls_assumed"), golden_arrays("eft_t_cls_assumed")
    model = segzoo.create_model("eft_t").double().eval()
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    with torch.no_grad():
        features = model.forward_features(golden_input(record["input_shape"]))
        pooled, logits = model.forward_head(features, pre_logits=True), model.forward_head(features)
    torch.testing.assert_close(pooled, torch.from_numpy(arrays["pooled"]).double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(logits, torch.from_numpy(arrays["logits"]).double(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("manifest", ["edaformer_t_city", "edaformer_b_city"])
def test_official_cityscapes_keys_load(manifest):
    record = golden_json(f"manifests/{manifest}")
    name = f"{manifest.removesuffix('_city')}.cityscapes"
    model = segzoo.create_model(name)
    segzoo.load_weights(model, {"state_dict": golden_state_dict(record["state_dict"])})
    assert model.num_classes == 19


ROWS = [row for row in golden_json("flops_EDAFormer") if "hw" in row]


def test_the_cost_table_has_all_32_rows():
    assert len(ROWS) == 32


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_cost_rows(row):
    name = {"T": "edaformer_t", "B": "edaformer_b"}[row["name"][0]]
    with torch.device("meta"):
        model = segzoo.create_model(name, num_classes=row["num_classes"])
    model.set_inference_reduction({"encoder": tuple(row["backbone_rr"]), "decoder": tuple(reversed(row["decoder_rr"]))})
    result = segzoo.cost(model, tuple(row["hw"]))
    assert result.macs == pytest.approx(row["macs_exact"], rel=1e-3)
    assert result.params == row["params_no_conv_seg"]
    assert sum(result.stages.values()) == result.macs


def test_presets_are_the_papers_settings():
    """The table's settings give the same cost as the presets of their names."""
    by_name = {row["name"]: row["macs_exact"] for row in ROWS}
    with torch.device("meta"):
        model = segzoo.create_model("edaformer_t")
    names = {"base": "T 512 base", "decoder": "T 512 dec x2", "optimal": "T 512 16-8-2-1", "fast": "T 512 16-8-4-2"}
    for preset, name in names.items():
        model.set_inference_reduction(preset)
        assert segzoo.cost(model, (512, 512)).macs == pytest.approx(by_name[name], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"decoder_depths": (2, 2, 2)},
        {"decoder_depths": (1, 2, 3)},
        {"decoder_embedding_free": False},
        {"decoder_mixer": "conv"},
        {"decoder_mixer": "dwconv"},
        {"encoder": {"embedding_free": False}},
    ],
)
def test_ablations_are_configuration(options):
    model = segzoo.create_model("test_edaformer", **options)
    plain = segzoo.create_model("test_edaformer")
    count, plain_count = (sum(p.numel() for p in m.parameters()) for m in (model, plain))
    assert count != plain_count
    scores = model.train()(torch.randn(2, 3, 64, 64))
    scores.mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Table 3a: what replaces an attention of C channels in a decoder block, by its weights; on N tokens it costs N of each.
MIXERS = {"conv": lambda dim: 9 * dim * dim, "dwconv": lambda dim: 9 * dim}


@pytest.mark.parametrize("mixer", MIXERS)
def test_cost_of_a_convolution_in_the_place_of_attention(mixer):
    blocks = [(3, 256, 16 * 16), (2, 128, 32 * 32), (1, 64, 64 * 64)]  # a level: blocks, channels, tokens
    with torch.device("meta"):
        model = segzoo.create_model("edaformer_t", num_classes=150, decoder_mixer=mixer)
        attention = segzoo.create_model("edaformer_t", num_classes=150)
    result, plain = segzoo.cost(model, (512, 512)), segzoo.cost(attention, (512, 512))
    of_attention = sum(macs for site, macs in plain.sites.items() if site in ("decoder.0", "decoder.1", "decoder.2"))
    by_hand = sum(count * tokens * MIXERS[mixer](dim) for count, dim, tokens in blocks)
    assert result.macs == plain.macs - of_attention + by_hand
    # Of an attention: the Linear of keys and values, its norm, and the projection.
    assert plain.params - result.params == sum(
        count * (2 * (dim * dim + dim) + 2 * dim - MIXERS[mixer](dim) - dim) for count, dim, _ in blocks
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_convolution_in_the_place_of_attention_by_hand(mixer):
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", decoder_mixer=mixer).double().eval()
    layer = model.decoder.levels[1][0].attn
    x_BHWC = torch.randn(1, 3, 4, 24, dtype=torch.float64)
    padded = torch.nn.functional.pad(x_BHWC, (0, 0, 1, 1, 1, 1))
    weight = layer.conv.weight  # (out, in, 3, 3)
    with torch.no_grad():
        expected = layer.conv.bias.expand(1, 3, 4, 24).clone()
        for i in range(3):
            for j in range(3):
                part = padded[:, i : i + 3, j : j + 4]
                expected += part * weight[:, 0, i, j] if mixer == "dwconv" else part @ weight[:, :, i, j].T
        torch.testing.assert_close(layer(x_BHWC), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_convolutions_leave_the_encoder_s_sites_and_presets(mixer):
    model = segzoo.create_model("test_edaformer", decoder_mixer=mixer).eval()
    assert all(site.startswith("encoder.") for site in segzoo.reduction_sites(model))
    assert list(model.reduction_presets) == list(model.preset_accuracy) == ["base", "optimal", "fast"]
    for preset in model.reduction_presets:
        model.set_inference_reduction(preset)
    with pytest.raises(segzoo.SegzooError, match="decoder"):
        model.set_inference_reduction({"decoder": 2})
    with pytest.raises(segzoo.SegzooError, match="decoder_mixer must be 'attention' or 'conv' or 'dwconv'"):
        segzoo.create_model("test_edaformer", decoder_mixer="mlp")
