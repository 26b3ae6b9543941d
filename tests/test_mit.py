"""MiT against the official numbers, through load_weights, so that key rules are proven too."""

from __future__ import annotations

import pytest
import torch
from golden_data import golden_arrays, golden_input, golden_json, golden_state_dict

import segzoo

SLOW = pytest.mark.slow
SIZES = ["b0", *(pytest.param(f"b{i}", marks=SLOW) for i in range(1, 6))]


def stored_like(map_BCHW: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Some golden maps are stored with every second or fourth row and column only."""
    return next(part for step in (1, 2, 4) if (part := map_BCHW[:, :, ::step, ::step]).shape[2:] == expected.shape[2:])


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("size", ["b0", pytest.param("b2", marks=SLOW)])
def test_parity(size, dtype, atol):
    record, arrays = golden_json(f"mit_{size}_encoder"), golden_arrays(f"mit_{size}_encoder")
    model = segzoo.create_model(f"mit_{size}", features_only=True).to(dtype).eval()
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    compared = set()
    for setting in record["settings"]:
        with torch.no_grad():
            maps = model(golden_input(setting["input_shape"]).to(dtype))
        for key, array in arrays.items():
            if key.startswith(f"{setting['name']}.stage"):
                expected = torch.from_numpy(array).to(dtype)
                output = stored_like(maps[int(key.split(".stage")[1][0]) - 1], expected)
                torch.testing.assert_close(output, expected, rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}")
                compared.add(key)
    assert compared == set(arrays)


def imagenet_state_dict(in_features: int = 256) -> dict[str, torch.Tensor]:
    """An ImageNet checkpoint in the original names: the encoder and a head."""
    manifest = golden_json("mit_b0_encoder")["state_dict"]
    return golden_state_dict([*manifest, ["head.weight", [1000, in_features]], ["head.bias", [1000]]])


def test_imagenet_checkpoints_load_with_and_without_the_head():
    state = imagenet_state_dict()
    classifier = segzoo.create_model("mit_b0").double().eval()
    segzoo.load_weights(classifier, state)
    pyramid = segzoo.create_model("mit_b0", features_only=True).double().eval()
    segzoo.load_weights(pyramid, state)
    segmenter = segzoo.create_model("segformer_b0").double().eval()
    segzoo.load_weights(segmenter.encoder, state)
    x = golden_input([1, 3, 64, 96])
    with torch.no_grad():
        maps = pyramid(x)
        logits = maps[-1].mean(dim=(2, 3)) @ state["head.weight"].T + state["head.bias"]
        torch.testing.assert_close(classifier(x), logits, rtol=0, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(segmenter.forward_features(x), maps, strict=True))


@pytest.mark.parametrize("size", ["b0"])
def test_a_head_of_another_model_is_refused(size):
    with pytest.raises(segzoo.SegzooError, match=r"head.weight is \(1000, 512\)"):
        segzoo.load_weights(segzoo.create_model(f"mit_{size}"), imagenet_state_dict(in_features=512))


@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (8, 2), (7, 7)])
def test_small_maps_are_extended_by_their_border(shape):
    """A constant map gives the same keys and values whatever its size."""
    torch.manual_seed(0)
    layer = segzoo.create_model("test_mit").double().stages[0].blocks[0].attn.kv_downsample
    x_C = torch.randn(8, dtype=torch.float64)
    with torch.no_grad():
        small, large = layer(x_C.expand(1, *shape, 8)), layer(x_C.expand(1, 8, 8, 8))
    assert small.shape == (1, 1, max(1, shape[1] // 8), 8)
    torch.testing.assert_close(small[:, :, :1], large)


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    """Of the encoder as in NVIDIA's manifests, and a Linear from the pooled features to 1000 classes."""
    models = golden_json("manifests/segformer_manifests_nvlabs")["models"]
    with torch.device("meta"):
        model = segzoo.create_model(f"mit_{size}")
    expected = models[size.upper()]["ade"]["params_backbone"] + (model.num_features + 1) * 1000
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert segzoo.model_info(f"mit_{size}").params == expected
