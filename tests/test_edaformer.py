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
    ("edaformer_b_ade", "edaformer_b"),
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
