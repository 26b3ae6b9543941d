"""SegFormer and Segformer++: official numbers, the four key layouts, transformers and smp as peers, costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from golden_data import golden_arrays, golden_input, golden_json, golden_state_dict
from test_mit import SLOW, stored_like

import segzoo
from segzoo.interop.transformers import save_for_transformers, to_transformers_config, to_transformers_state_dict
from segzoo.layers import merging
from segzoo.models.mit import TEST_MIT
from segzoo.models.segformer import AllMLPDecoder, ConvDecoder

NVIDIA = golden_json("manifests/segformer_manifests_nvlabs")["models"]
HUB = golden_json("manifests/hf_segformer_manifests_v4_hub")["models"]
TRANSFORMERS_5 = golden_json("manifests/hf_segformer_manifests_v5")["models"]
COSTS = golden_json("flops_SegFormer")


def head_output(model: torch.nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(x_BCHW))


# --- official numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("size", ["b0", pytest.param("b2", marks=SLOW)])
def test_parity(size, dtype, atol):
    record, arrays = golden_json(f"segformer_{size}"), golden_arrays(f"segformer_{size}")
    compared = set()
    for setting in record["settings"]:
        variant, x = setting["name"].split("_")[0], golden_input(setting["input_shape"]).to(dtype)
        model = segzoo.create_model(f"segformer_{size}", num_classes={"city": 19, "ade": 150}[variant])
        model.to(dtype).eval()
        segzoo.load_weights(model, golden_state_dict(record["variants"][variant]["state_dict"]))
        logits = head_output(model, x)
        outputs = {"logits": logits[:, ::3] if variant == "ade" else logits}  # ADE20K: every third class is stored
        with torch.no_grad():
            outputs["full_crop"] = model(x)[:, :, 40:72, 90:122]
        for name, output in outputs.items():
            key = f"{setting['name']}.{name}"
            if key in arrays:
                torch.testing.assert_close(output, torch.from_numpy(arrays[key]).to(dtype), rtol=0, atol=atol)
                compared.add(key)
    assert compared == set(arrays)


def preset_of(setting: dict) -> str | None:
    name = setting["preset"].split("_")[0]
    return None if name == "none" else name


# In float32 the smallest margin of these matchings, 9.5e-6, is still above the rounding.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 5e-5)])
def test_parity_of_segformerpp_decoder(dtype, atol):
    record, arrays = golden_json("segformerpp_b0_official"), golden_arrays("segformerpp_b0_official")
    model = segzoo.create_model("segformer_b0", decoder="segformerpp", num_classes=19).to(dtype).eval()
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    assert {f"{setting['name']}.logits" for setting in record["settings"]} == set(arrays)
    for setting in record["settings"]:
        model.set_inference_reduction(preset_of(setting))
        logits = head_output(model, golden_input(setting["input_shape"]).to(dtype))
        expected = torch.from_numpy(arrays[f"{setting['name']}.logits"]).to(dtype)
        torch.testing.assert_close(logits, expected, rtol=0, atol=atol)


@pytest.fixture
def matchings(monkeypatch):
    """Every bipartite matching of a forward pass: (B, N), the merged row that each token comes back from."""
    rows = []

    def recorded(metric_BNC, grid, **options):
        merge, unmerge = bipartite_2d(metric_BNC, grid, **options)
        B, M, _ = merge(metric_BNC).shape
        rows.append(unmerge(torch.arange(M, dtype=torch.float64).expand(B, M)[..., None])[..., 0].long())
        return merge, unmerge

    bipartite_2d = merging.bipartite_2d
    monkeypatch.setattr(merging, "bipartite_2d", recorded)
    return rows


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 5e-5)])
def test_parity_of_merging(dtype, atol, matchings):
    """Maps, logits, and which tokens each matching of the official code puts into one group."""
    name = "segformerpp_b0_nvlabs_weights"
    record, arrays = golden_json(name), golden_arrays(name)
    model = segzoo.create_model("segformer_b0", num_classes=19).to(dtype).eval()
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    compared = set()
    for setting in record["settings"]:
        matchings.clear()
        model.set_inference_reduction(preset_of(setting))
        with torch.no_grad():
            maps = model.forward_features(golden_input(setting["input_shape"]).to(dtype))
            outputs = {f"stage{i + 1}": feature for i, feature in enumerate(maps)}
            outputs["logits"] = model.forward_head(maps)
        for key, array in arrays.items():
            prefix, _, what = key.partition(".")
            if prefix != setting["name"]:
                continue
            expected = torch.from_numpy(array)
            if what.startswith("assign"):
                row_BN = matchings[int(what.removeprefix("assign"))]
                assert torch.equal(row_BN[:, :, None] == row_BN[:, None], expected[:, :, None] == expected[:, None]), (
                    key
                )
            else:
                output = stored_like(outputs[what], expected)
                torch.testing.assert_close(
                    output, expected.to(dtype), rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
                )
            compared.add(key)
    assert compared == set(arrays)


# --- key layouts ----------------------------------------------------------------------------------------------------


def meta_model(name: str, **options):
    with torch.device("meta"):
        return segzoo.create_model(name, **options)


def load_manifest(model, manifest: list) -> None:
    """Strict loading of names and shapes, without any numbers."""
    segzoo.load_weights(model, {key: torch.empty(shape, device="meta") for key, shape in manifest})


def cityscapes(manifest: list) -> list:
    """The manifests of ADE20K and Cityscapes differ in the classifiers' first axis only."""
    return [[key, [19, *shape[1:]] if re.search(r"conv_seg|linear_pred", key) else shape] for key, shape in manifest]


@pytest.mark.parametrize("size", [f"b{i}" for i in range(6)])
def test_manifests_load(size):
    original = NVIDIA[size.upper()]["state_dict_ade150"]
    load_manifest(meta_model(f"segformer_{size}"), original)
    load_manifest(meta_model(f"segformer_{size}.nvidia_cityscapes_1024"), cityscapes(original))
    load_manifest(meta_model(f"segformer_{size}"), HUB[size.upper()]["state_dict"])
    if TRANSFORMERS_5[size.upper()]["state_dict"] is not None:
        load_manifest(meta_model(f"segformer_{size}"), TRANSFORMERS_5[size.upper()]["state_dict"])
    encoder = [[key.removeprefix("backbone."), shape] for key, shape in original if key.startswith("backbone.")]
    load_manifest(meta_model(f"mit_{size}", num_classes=0), encoder)


def test_manifests_of_transformers_5_are_not_all_empty():
    assert sum(model["state_dict"] is not None for model in TRANSFORMERS_5.values()) >= 1


@pytest.mark.parametrize(
    ("manifest", "name", "options"),
    [
        ("segformerpp_b2_nvlabs_weights", "segformerpp_b2_hq", {}),
        ("segformerpp_b5_nvlabs_weights", "segformerpp_b5_fast", {}),
        ("segformerpp_b2_official", "segformerpp_b2_n2d", {"decoder": "segformerpp"}),
    ],
)
def test_manifests_of_segformerpp_load(manifest, name, options):
    load_manifest(meta_model(name, num_classes=19, **options), golden_json(f"manifests/{manifest}")["state_dict"])


def to_layout(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """NVIDIA's names in another layout, told independently of the package's rules: whole names, token by token."""
    block = {
        "hub": "segformer.encoder.block.{s}.{b}.",
        "transformers 5": "segformer.stages.{s}.blocks.{b}.",
        "smp": "encoder.block{n}.{b}.",
    }[layout]
    part = {
        "hub": {
            "norm1": "layer_norm_1",
            "norm2": "layer_norm_2",
            "attn.q": "attention.self.query",
            "attn.k": "attention.self.key",
            "attn.v": "attention.self.value",
            "attn.sr": "attention.self.sr",
            "attn.norm": "attention.self.layer_norm",
            "attn.proj": "attention.output.dense",
            "mlp.fc1": "mlp.dense1",
            "mlp.fc2": "mlp.dense2",
        },
        "transformers 5": {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.q": "attention.q_proj",
            "attn.k": "attention.k_proj",
            "attn.v": "attention.v_proj",
            "attn.sr": "attention.sequence_reduction.sequence_reduction",
            "attn.norm": "attention.sequence_reduction.layer_norm",
            "attn.proj": "attention.o_proj",
        },
        "smp": {},
    }[layout]
    embed = {
        "hub": ("segformer.encoder.patch_embeddings.{s}.", "layer_norm"),
        "transformers 5": ("segformer.stages.{s}.patch_embeddings.", "layer_norm"),
        "smp": ("encoder.patch_embed{n}.", "norm"),
    }[layout]
    stage_norm = {
        "hub": "segformer.encoder.layer_norm.{s}.",
        "transformers 5": "segformer.stages.{s}.layer_norm.",
        "smp": "encoder.norm{n}.",
    }[layout]
    transformers_head = ("decode_head.linear_fuse.", "decode_head.batch_norm.", "decode_head.classifier.")
    head = {
        "hub": ("decode_head.linear_c.{i}.proj.", *transformers_head),
        "transformers 5": ("decode_head.linear_projections.{i}.proj.", *transformers_head),
        "smp": (
            "decoder.mlp_stage.{r}.linear.",
            "decoder.fuse_stage.0.",
            "decoder.fuse_stage.1.",
            "segmentation_head.0.",
        ),
    }[layout]

    result = {}
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        if match := re.fullmatch(r"backbone\.block(\d)\.(\d+)\.(.+)", name):
            prefix = block.format(s=int(match[1]) - 1, n=match[1], b=match[2])
            if match[3] == "attn.kv" and part:
                dim = len(tensor) // 2
                result[f"{prefix}{part['attn.k']}.{leaf}"] = tensor[:dim]
                result[f"{prefix}{part['attn.v']}.{leaf}"] = tensor[dim:]
            else:
                result[f"{prefix}{part.get(match[3], match[3])}.{leaf}"] = tensor
        elif match := re.fullmatch(r"backbone\.patch_embed(\d)\.(proj|norm)", name):
            prefix = embed[0].format(s=int(match[1]) - 1, n=match[1])
            result[f"{prefix}{embed[1] if match[2] == 'norm' else 'proj'}.{leaf}"] = tensor
        elif match := re.fullmatch(r"backbone\.norm(\d)", name):
            result[stage_norm.format(s=int(match[1]) - 1, n=match[1]) + leaf] = tensor
        elif match := re.fullmatch(r"decode_head\.linear_c(\d)\.proj", name):
            result[head[0].format(i=int(match[1]) - 1, r=4 - int(match[1])) + leaf] = tensor
        elif name != "decode_head.conv_seg":
            names = {"linear_fuse.conv": head[1], "linear_fuse.bn": head[2], "linear_pred": head[3]}
            result[names[name.removeprefix("decode_head.")] + leaf] = tensor
    return result


@pytest.mark.parametrize("layout", ["hub", "transformers 5", "smp"])
def test_layouts_give_the_same_scores(layout):
    original = golden_state_dict(NVIDIA["B0"]["state_dict_ade150"])
    converted = to_layout(original, layout)
    if layout != "smp":  # the golden manifests know these names
        manifest = {"hub": HUB, "transformers 5": TRANSFORMERS_5}[layout]["B0"]["state_dict"]
        assert {key: list(tensor.shape) for key, tensor in converted.items()} == dict(map(tuple, manifest))
    model, other = (segzoo.create_model("segformer_b0").double().eval() for _ in range(2))
    segzoo.load_weights(model, original)
    segzoo.load_weights(other, converted)
    x = golden_input([1, 3, 64, 96])
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("layout", ["hub", "transformers 5"])
def test_layouts_of_imagenet_checkpoints(layout):
    """transformers' classifiers: the encoder with the same prefix, the head named `classifier`."""
    state = golden_state_dict(golden_json("mit_b0_encoder")["state_dict"])
    head = golden_state_dict([["head.weight", [1000, 256]], ["head.bias", [1000]]])
    converted = to_layout({f"backbone.{key}": tensor for key, tensor in state.items()}, layout)
    converted |= {key.replace("head.", "classifier."): tensor for key, tensor in head.items()}
    model, other = (segzoo.create_model("mit_b0").double().eval() for _ in range(2))
    segzoo.load_weights(model, {**state, **head})
    segzoo.load_weights(other, converted)
    x = golden_input([1, 3, 64, 64])
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_half_a_layout_is_refused_by_name():
    state = dict(HUB["B0"]["state_dict"])
    del state["segformer.encoder.block.1.0.attention.self.value.weight"]
    with pytest.raises(
        segzoo.SegzooError, match=r"missing: encoder.stages.1.blocks.0.attn.kv.weight; left over: .*key"
    ):
        load_manifest(meta_model("segformer_b0"), list(state.items()))


@pytest.mark.parametrize(("own", "other"), [("segformer", "segformerpp"), ("segformerpp", "segformer")])
def test_weights_of_the_other_decoder_are_refused_with_the_way_out(own, other):
    manifest = {
        "segformer": cityscapes(NVIDIA["B0"]["state_dict_ade150"]),
        "segformerpp": golden_json("segformerpp_b0_official")["state_dict"],
    }
    load_manifest(meta_model("segformer_b0", num_classes=19, decoder=own), manifest[own])
    with pytest.raises(segzoo.SegzooError, match=f"decoder='{other}'"):
        load_manifest(meta_model("segformer_b0", num_classes=19, decoder=own), manifest[other])


# --- transformers and smp as peers ----------------------------------------------------------------------------------


def randomised(name: str, seed: int = 0, **options) -> torch.nn.Module:
    """A model with statistics, norms and biases that are not at their initial zeros and ones."""
    model = segzoo.create_model(name, **options).eval()
    state = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    segzoo.load_weights(model, golden_state_dict(list(state.items())))
    return model


def peer_class(name: str):
    import transformers

    if "mit" in name:
        return transformers.SegformerForImageClassification
    return transformers.SegformerForSemanticSegmentation


PEERS = ["test_segformer", "segformer_b0", *(pytest.param(f"segformer_b{i}", marks=SLOW) for i in range(1, 6))]


@pytest.mark.parametrize("name", [*PEERS, "test_mit", pytest.param("mit_b0", marks=SLOW)])
def test_round_trip_through_transformers(name, tmp_path):
    model = randomised(name)
    peer, report = peer_class(name).from_pretrained(
        save_for_transformers(model, tmp_path / "to"), output_loading_info=True
    )
    assert not any(report.values()), report
    peer.eval()
    x = golden_input([1, 3, 96, 128]).float()
    with torch.no_grad():
        expected = head_output(model, x)
        scale = float(expected.abs().max())
        difference = float((peer(x).logits - expected).abs().max())
        assert difference <= 2e-5 * max(1.0, scale), (difference, scale)
        # With transformers' eps the same numbers come out.
        eps = {"norm_eps": 1e-5}
        same = segzoo.create_model(name, **(eps if "mit" in name else {"encoder": eps})).eval()
        segzoo.load_weights(same, model.state_dict())
        torch.testing.assert_close(peer(x).logits, head_output(same, x), rtol=0, atol=4e-6 * max(1.0, scale))
    # Back from the names in memory, and from the file that transformers writes.
    peer.save_pretrained(tmp_path / "back")
    for weights in (peer.state_dict(), tmp_path / "back" / "model.safetensors"):
        back = segzoo.create_model(name).eval()
        segzoo.load_weights(back, weights)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
        )


def test_export_has_the_names_of_the_hub():
    for size in ("b0", "b3"):
        state = to_transformers_state_dict(meta_model(f"segformer_{size}"))
        assert {key: list(tensor.shape) for key, tensor in state.items()} == dict(
            map(tuple, HUB[size.upper()]["state_dict"])
        )


def test_export_keeps_the_class_names():
    config = to_transformers_config(meta_model("segformer_b0.nvidia_cityscapes_1024"))
    assert config["id2label"][13] == "car"
    assert config["label2id"]["car"] == 13
    config = to_transformers_config(meta_model("segformer_b0", num_classes=3))
    assert list(config["id2label"]) == [0, 1, 2]
    own = {"label_set": None, "label_names": ("ground", "roof")}
    config = to_transformers_config(meta_model("segformer_b0", num_classes=2, pretrained_cfg_overlay=own))
    assert config["id2label"] == {0: "ground", 1: "roof"}


def test_export_keeps_the_rates_of_training(tmp_path):
    from transformers import SegformerConfig

    model = segzoo.create_model("test_segformer", dropout=0.3, drop_path_rate=0.25)
    read = SegformerConfig.from_pretrained(save_for_transformers(model, tmp_path))
    assert (read.classifier_dropout_prob, read.drop_path_rate) == (0.3, 0.25)
    # Neither has any in its attention or feed-forward layers, where transformers would have by its own defaults.
    assert (read.hidden_dropout_prob, read.attention_probs_dropout_prob) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("segformer_b0", {"decoder": "segformerpp"}), ("edaformer_t", {}), ("mit_b0", {"num_classes": 0})],
)
def test_export_refuses_what_transformers_cannot_hold(name, options):
    with pytest.raises(segzoo.SegzooError, match=f"cannot hold {name}: it needs"):
        to_transformers_state_dict(meta_model(name, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [("b0", 256), ("b2", 768)])
def test_smp_is_a_peer(size, width):
    """At stride 4: from there smp enlarges with the corners aligned, unlike the code that trained the weights."""
    import segmentation_models_pytorch as smp

    peer = smp.Segformer(f"mit_{size}", encoder_weights=None, classes=150, decoder_segmentation_channels=width)
    peer = peer.double().eval()
    peer.load_state_dict(golden_state_dict([[key, list(tensor.shape)] for key, tensor in peer.state_dict().items()]))
    model = segzoo.create_model(f"segformer_{size}").double().eval()
    segzoo.load_weights(model, peer.state_dict())
    x = golden_input([1, 3, 96, 128])
    with torch.no_grad():
        expected = peer.segmentation_head[0](peer.decoder(peer.encoder(x)))
    torch.testing.assert_close(head_output(model, x), expected, rtol=0, atol=1e-9)


# --- costs, variants, options ---------------------------------------------------------------------------------------


def test_the_cost_table_has_all_18_rows():
    assert len(COSTS) == 18


def cost_rows() -> list:
    """The large rows of B3 to B5 take seconds each, even without numbers."""
    return [
        pytest.param(row, id=row["name"], marks=[SLOW] if re.search(r"B[345] 1024", row["name"]) else [])
        for row in COSTS
    ]


@pytest.mark.parametrize("row", cost_rows())
def test_cost_rows(row):
    size = re.search(r"B\d", row["name"])[0].lower()
    result = segzoo.cost(meta_model(f"segformer_{size}", num_classes=row["num_classes"]), tuple(row["hw"]))
    assert result.macs == pytest.approx(row["macs_exact"], rel=1e-3)
    assert result.params == row["params_no_conv_seg"]
    published = {(cost.size, cost.num_classes): cost.gmacs for cost in segzoo.model_info(f"segformer_{size}").published}
    if (tuple(row["hw"]), row["num_classes"]) in published:
        assert published[tuple(row["hw"]), row["num_classes"]] == row["paper_G"]
        assert result.macs / 1e9 == pytest.approx(row["paper_G"], rel=1e-2)


@pytest.mark.parametrize("size", [f"b{i}" for i in range(6)])
def test_segformerpp_names_are_segformer_with_a_preset(size):
    plain = segzoo.model_info(f"segformer_{size}")
    for preset in ("hq", "fast", "n2d"):
        name = f"segformerpp_{size}_{preset}"
        info = segzoo.model_info(name)
        assert sorted(info.tags) == sorted(plain.tags)
        assert segzoo.model_info(f"{name}.{plain.tag}").cfg == plain.cfg
        assert info.pretrained_cfg.dataset == "cityscapes"  # what the paper is about
        model, other = meta_model(name), meta_model(f"segformer_{size}")
        assert segzoo.plans.current_plan(model) == other.set_inference_reduction(preset)


@pytest.mark.parametrize("preset", ["hq", "fast", "n2d", "isr", "isr_fast"])
def test_presets_save_attention(preset):
    model = meta_model("segformer_b0")
    before = segzoo.cost(model, (512, 512))
    plan = model.set_inference_reduction(preset)
    after = segzoo.cost(model, (512, 512))
    reduced = {site.removesuffix(".q") for site, entry in plan.items() if entry != segzoo.Pool(1)}
    assert {
        site for site in before.sites if after.sites[site] < before.sites[site] and not site.endswith("q")
    } == reduced


def test_without_its_plan_segformerpp_is_segformer():
    plain, merged = randomised("segformer_b0"), randomised("segformerpp_b0_hq")
    x = golden_input([1, 3, 128, 160]).float()
    with torch.no_grad():
        assert not torch.equal(plain(x), merged(x))
        plain.set_inference_reduction("hq")
        assert torch.equal(plain(x), merged(x))
        plain.set_inference_reduction(None)
        merged.set_inference_reduction(None)
        assert torch.equal(plain(x), merged(x))


def test_presets_are_the_released_settings():
    model = meta_model("segformer_b0")
    low, high = segzoo.Bipartite(0.6, 2), segzoo.Bipartite(0.8, 4)
    fast, pool, neutral = segzoo.Bipartite(0.9, 4), segzoo.Neighbour2d(2), segzoo.Pool(1)
    for preset, (kv, q) in {
        "hq": ((low, low, neutral, neutral), (neutral, neutral, high, high)),
        "fast": ((fast, fast, neutral, neutral), (neutral, neutral, fast, fast)),
        "n2d": ((neutral,) * 4, (pool,) * 4),
        "isr": ((segzoo.Pool(2), segzoo.Pool(2), neutral, neutral), (neutral,) * 4),
        "isr_fast": ((segzoo.Pool(2),) * 4, (neutral,) * 4),  # [8, 4, 2, 1] becomes [16, 8, 4, 2]
    }.items():
        plan = model.set_inference_reduction(preset)
        assert tuple(plan[f"encoder.{i}"] for i in range(4)) == kv
        assert tuple(plan[f"encoder.{i}.q"] for i in range(4)) == q


def test_eps_and_width_follow_the_decoder_unless_said_otherwise():
    for options, eps, width in (
        ({}, 1e-5, 32),
        ({"decoder": "segformerpp"}, 1e-6, 24),
        ({"decoder": "segformerpp", "conv_norm_eps": 1e-5, "segformerpp_dim": 8}, 1e-5, 8),
        ({"conv_norm_eps": 1e-6, "decoder_dim": 8}, 1e-6, 8),
    ):
        model = segzoo.create_model("test_segformer", **options)
        assert {stage.patch_embed.norm.eps for stage in model.encoder.stages} == {eps}
        assert model.encoder.stages[0].blocks[0].attn.kv_downsample.norm.eps == eps
        assert model.encoder.stages[0].norm.eps == 1e-6
        assert model.get_classifier().in_channels == width


@pytest.mark.parametrize("size", [(1, 1), (17, 23), (97, 131), (33, 1025)])
@pytest.mark.parametrize("preset", ["hq", "fast", "n2d", "isr_fast"])
@pytest.mark.parametrize("decoder", ["segformer", "segformerpp"])
def test_any_size_with_merging(decoder, preset, size):
    model = segzoo.create_model("test_segformer", decoder=decoder).eval()
    model.set_inference_reduction(preset)
    with torch.no_grad():
        scores = model(torch.randn(2, 3, *size))
    assert scores.shape == (2, 13, *size)
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("tag", "decoder", "num_classes", "eps"),
    [
        ("segformerpp_cityscapes_1024", ConvDecoder, 19, 1e-6),
        ("segformerpp_ade20k_640", ConvDecoder, 150, 1e-6),
        ("nvidia_cityscapes_1024", AllMLPDecoder, 19, 1e-5),
    ],
)
@pytest.mark.parametrize("name", ["segformer_b5", "segformerpp_b5_hq"])
def test_the_weights_row_chooses_the_decoder(name, tag, decoder, num_classes, eps):
    model = meta_model(f"{name}.{tag}")
    assert type(model.decoder) is decoder
    assert model.num_classes == model.get_classifier().out_channels == num_classes
    assert {stage.patch_embed.norm.eps for stage in model.encoder.stages} == {eps}
    assert model.encoder.stages[0].blocks[0].attn.kv_downsample.norm.eps == eps


def test_an_unknown_decoder_is_refused():
    with pytest.raises(segzoo.SegzooError, match="decoder must be 'segformer' or 'segformerpp', not 'mlp'"):
        segzoo.create_model("segformer_b0", decoder="mlp")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("segformer_b0", 8.39, 4.09),
        ("segformer_b2", 62.3, 23.7),
        pytest.param("segformer_b5", 111.5, 72.9, marks=pytest.mark.slow),
    ],
)
def test_folding_collapses_the_decoder(name, before, after):
    """Multiply-accumulates at 512x512 in units of 1e9: one matrix a level, at the level's own resolution."""
    model = meta_model(name).eval()
    assert segzoo.cost(model, (512, 512)).macs / 1e9 == pytest.approx(before, abs=0.06)
    folded = segzoo.fold(model)
    assert segzoo.cost(folded, (512, 512)).macs / 1e9 == pytest.approx(after, abs=0.06)
    assert segzoo.cost(segzoo.fold(folded), (512, 512)).macs == segzoo.cost(folded, (512, 512)).macs
    with pytest.raises(segzoo.SegzooError, match="folded"):
        to_transformers_state_dict(folded)


@pytest.mark.parametrize("decoder", ["segformer", "segformerpp"])
def test_a_folded_model_computes_the_same(decoder):
    model = randomised("segformer_b0", decoder=decoder).double()
    folded = segzoo.fold(model)
    x = golden_input([1, 3, 97, 131])
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
    assert not [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]


# --- composition ----------------------------------------------------------------------------------------------------


def test_edaformer_on_mit():
    """EDAFormer's Table 10: 4.6 G at 512x512."""
    result = segzoo.cost(meta_model("edaformer_mit_b0"), (512, 512))
    assert round(result.macs / 1e9, 1) == 4.6
    assert result.params == segzoo.model_info("edaformer_mit_b0").params
    assert result.sites.keys() >= {"encoder.0", "encoder.0.q", "decoder.2"}


def test_any_pair_of_encoder_and_decoder_trains():
    model = segzoo.create_model("test_edaformer", encoder=TEST_MIT, decoder_num_heads=(4, 3, 2))
    assert type(model.encoder).__name__ == "MiT"
    model.set_inference_reduction(
        {"encoder": 2, "decoder": 2, "encoder.q": segzoo.Bipartite(0.5, 2)}, during_training=True
    )
    scores = model(torch.randn(2, 3, 64, 96))
    assert scores.shape == (2, 13, 64, 96)
    scores.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_contributing_guide_builds_such_a_pair():
    guide = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = guide.split("## Combining an encoder with a decoder", 1)[1].split("\n## ", 1)[0]
    names: dict = {}
    counts = []
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
        counts.append(sum(parameter.numel() for parameter in names["model"].parameters()))
        with torch.no_grad():
            assert names["model"].eval()(torch.randn(1, 3, 64, 64)).shape == (1, 19, 64, 64)
    assert len(counts) == 2
    assert counts[0] == counts[1]
