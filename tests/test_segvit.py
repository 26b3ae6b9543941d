"""SegViT against the official numbers, published costs, a per-token reference, and its own promises about sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import GOLDEN, golden_arrays, golden_input, golden_json, golden_state_dict
from torch.utils.flop_counter import FlopCounterMode

import segzoo
from segzoo._errors import WeightsError
from segzoo.prediction import windows
from segzoo.training.losses import ATMLoss
from segzoo.zoo.checkpoint import to_own_layout

GOLDENS = {
    "segvit_b_ade_s128": ("segvit_base", {"img_size": (128, 128)}),
    "segvit_l_lite6_s96": ("segvit_large", {"img_size": (96, 96), "depth": 6, "stages": (1, 3, 5)}),
    "segvit_shrunk_l_lite6_s96": (
        "segvit_large_shrunk",
        {"img_size": (96, 96), "depth": 6, "stages": (1, 5), "downsample_block": 2},
    ),
}
TINY = ["test_segvit", "test_segvit_shrunk"]


def on_meta(name: str, **options):
    with torch.device("meta"):
        return segzoo.create_model(name, **options)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape))


# --- golden numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GOLDENS)
def golden(request):
    """A model with the golden weights, loaded through `load_weights`, and one training pass in eval mode."""
    name, options = GOLDENS[request.param]
    record = golden_json(request.param)
    # Built without initialisation: every value comes from the checkpoint.
    model = on_meta(name, **options).double().to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    segzoo.load_weights(model, golden_state_dict(record["state_dict"]))
    train = model.forward_train(golden_input(record["input_shape"]))
    return SimpleNamespace(
        name=request.param, record=record, arrays=golden_arrays(request.param), model=model, train=train
    )


def close(golden, key: str, actual: torch.Tensor) -> None:
    expected = torch.from_numpy(golden.arrays[key]).double()
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=2e-6, msg=lambda m: f"{key}: {m}")


def test_features_logits_masks_and_scores(golden):
    x = golden_input(golden.record["input_shape"])
    size = tuple(x.shape[2:])
    with torch.no_grad():
        features = golden.model.forward_features(x)
        output = golden.model.forward_head(features)
    for i, feature in enumerate(features):
        if f"feat{i}_c8" in golden.arrays:
            close(golden, f"feat{i}_c8", feature[:, ::8])
        else:
            close(golden, f"feat{i}_tok_c8", feature.flatten(2).transpose(1, 2)[:, :, ::8])
    close(golden, "pred_logits", output.class_logits)
    masks = F.interpolate(output.mask_logits, size=size, mode="bilinear")
    close(golden, "pred_masks_strided", masks[:, ::10, ::4, ::4])
    scores = golden.model.to_size(output, size)
    close(golden, "pred_strided", scores[:, ::10, ::4, ::4])
    close(golden, "pred_class_mean", scores.mean(dim=(2, 3)))


def test_the_training_pass_has_the_auxiliary_predictions(golden):
    close(golden, "pred_strided", golden.train["scores"][:, ::10, ::4, ::4])
    close(golden, "pred_logits", golden.train["output"].class_logits)
    assert len(golden.train["auxiliary"]) == 2
    for i, auxiliary in enumerate(golden.train["auxiliary"]):
        close(golden, f"aux{i}_logits", auxiliary.class_logits[:, ::5])
        close(golden, f"aux{i}_masks", auxiliary.mask_logits[:, ::2])


@pytest.mark.parametrize("case", ["A", "B"])
def test_losses(golden, case):
    labels = torch.from_numpy(golden.arrays[f"label_{case}"]).long()
    expected = golden.record["losses"][case]
    terms = ATMLoss().terms(golden.train, labels)
    for kind, official in (("class", "loss_ce"), ("focal", "loss_mask"), ("dice", "loss_dice")):
        for prefix, suffix in (("", ""), ("auxiliary.0.", "_0"), ("auxiliary.1.", "_1")):
            assert terms[prefix + kind].item() == pytest.approx(expected[official + suffix], abs=1e-6), prefix + kind
    assert ATMLoss()(golden.train, labels).item() == pytest.approx(expected["total_backprop"], abs=2e-6)


def test_gradient_norms(golden):
    model = golden.model
    labels = torch.from_numpy(golden.arrays["label_A"]).long()
    model.zero_grad()
    ATMLoss()(golden.train, labels).backward(retain_graph=True)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    # A key's rank, carried through the key rules in place of its weight, tells where its gradient is.
    keys = [key for key, _ in golden.record["state_dict"]]
    ranks = {key: torch.tensor(float(i)).expand(shape) for i, (key, shape) in enumerate(golden.record["state_dict"])}
    parts: dict[str, list[str]] = {key: [] for key in keys}
    for name, rank in to_own_layout(model, ranks).items():
        parts[keys[int(rank.flatten()[0])]].append(name)
    for key, norm in golden.record["grad_norms_case_A"].items():
        total = sum(grads[name].square().sum().item() for name in parts[key]) ** 0.5
        assert total == pytest.approx(norm, rel=1e-7, abs=2e-6), f"{key} -> {parts[key]}"
    assert parts["backbone.cls_token"] == []


@pytest.mark.parametrize("golden", ["segvit_b_ade_s128"], indirect=True)
def test_sliding_window(golden):
    x = noise(1, 1, 3, 160, 200)
    total, count = torch.zeros(1, 150, 160, 200, dtype=torch.float64), torch.zeros(160, 200)
    with torch.no_grad():
        for rows, columns in windows((160, 200), (128, 128), (85, 85)):
            total[:, :, rows, columns] += golden.model(x[:, :, rows, columns])
            count[rows, columns] += 1
    mean = total / count
    close(golden, "slide_pred_strided", mean[:, ::10, ::4, ::4])
    rescaled = F.interpolate(mean, size=(120, 150), mode="bilinear")
    close(golden, "slide_rescaled_strided", rescaled[:, ::10, ::4, ::4])


@pytest.mark.parametrize("golden", ["segvit_b_ade_s128"], indirect=True)
def test_an_image_that_is_not_square(golden):
    x = noise(3, 1, 3, 96, 160)
    with torch.no_grad():
        features = golden.model.forward_features(x)
        output = golden.model.forward_head(features)
        close(golden, "ns_feat2_c8", features[-1][:, ::8])
        close(golden, "ns_masks_low", output.mask_logits)
        close(golden, "ns_pred_strided", golden.model(x)[:, ::10, ::4, ::4])


@pytest.mark.parametrize("golden", ["segvit_b_ade_s128"], indirect=True)
def test_official_answers_at_the_training_size(golden):
    """The official code answers a 96x96 image at its training size, 128x128, and resizes the scores."""
    with torch.no_grad():
        features = golden.model.forward_features(noise(2, 1, 3, 96, 96))
        scores = golden.model.to_size(golden.model.forward_head(features), (128, 128))
    close(golden, "sq96_feat2_c8", features[-1][:, ::8])
    close(golden, "sq96_head_pred_strided", scores[:, ::10, ::4, ::4])
    resized = F.interpolate(scores, size=(96, 96), mode="bilinear")
    close(golden, "sq96_encode_decode_strided", resized[:, ::10, ::4, ::4])


# --- checkpoints ----------------------------------------------------------------------------------------------------

CHECKPOINTS = {
    "ade_51.3": "segvit_base.ade20k",
    "ade_54.6": "segvit_large.ade20k",
    "COCOstuff_49.9": "segvit_large.coco_stuff10k",
    "PC59cls_64.1": "segvit_large.pascal_context",
    "ade_shrunk_53.9": "segvit_large_shrunk.ade20k",
    "COCOstuff10k_shrunk_49.1": "segvit_large_shrunk.coco_stuff10k",
    "PC59cls_62.3": "segvit_large_shrunk.pascal_context",
}
# Met in some files according to the manifests, and never part of the function.
EXTRA = {
    "decode_head.conv_seg.weight": (150, 768, 1, 1),
    "decode_head.conv_seg.bias": (150,),
    "decode_head.conv_0.weight": (8, 8, 1, 1),
    "decode_head.conv_1.bias": (8,),
    "decode_head.syncbn_fc_0.running_mean": (8,),
    "backbone.ln1.weight": (1024,),
    "backbone.ln1.bias": (1024,),
}


def manifest(name: str) -> dict:
    return json.loads((GOLDEN / "manifests" / f"manifest_segvit_{name}.json").read_text())


def test_every_released_file_has_a_row():
    rows = {name: segzoo.model_info(name).pretrained_cfg for name in segzoo.list_pretrained("segvit_*")}
    files = {name: row.hf_hub_filename for name, row in rows.items() if row.state == "hub"}
    assert files == {name: f"{file}.pth" for file, name in CHECKPOINTS.items()}
    others = {name: row for name, row in rows.items() if name not in files}
    assert set(others) == {"segvit_large.pascal_context_60", "segvit_large_shrunk.pascal_context_60"}
    for row in others.values():
        assert (row.num_classes, row.label_set, row.published, row.loadable) == (60, "pascal_context_60", (), False)


@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "extra keys"])
@pytest.mark.parametrize("file", CHECKPOINTS)
def test_released_layouts_load_strictly(file, extra):
    """Names and shapes, on the meta device: the tag's number of classes and image size fit its file."""
    model = on_meta(CHECKPOINTS[file])
    state = {key: torch.empty(shape, device="meta") for key, shape in [*manifest(file)["state_dict"], *extra.items()]}
    segzoo.load_weights(model, {"meta": {"iter": 160000}, "state_dict": state, "optimizer": {"state": {}}})
    first = next(key for key in state if "decoder_1" in key)
    with pytest.raises(WeightsError, match="missing"):
        segzoo.load_weights(model, {key: value for key, value in state.items() if key != first})
    with pytest.raises(WeightsError, match="left over"):
        segzoo.load_weights(model, {**state, "decode_head.unknown": torch.empty(1)})


MEASURE = """
import sys, threading, time
import torch, segzoo
name, path, trained = sys.argv[1:]
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
with torch.device("meta"):
    model = segzoo.create_model(name)
peak, done, before = 0, threading.Event(), anonymous()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = model.to_empty(device="cpu")
segzoo.load_weights(model, path)
done.set()
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
assert all((p == float(trained)).all() for p in model.parameters())
print(max(peak, anonymous()) - before, weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", CHECKPOINTS)
def test_released_files_load_with_little_memory(file, tmp_path):
    """A file as mmcv saves it, optimizer and all; memory beyond the file's own pages is the model's."""
    path = tmp_path / f"{file}.pth"
    value = 0.125
    state = {key: torch.full(shape, value) for key, shape in manifest(file)["state_dict"]}
    # One moment of AdamW, each tensor stored once more: half of what mmcv stores, and as large as the weights.
    moments = {i: {"step": 1, "exp_avg": torch.zeros_like(tensor)} for i, tensor in enumerate(state.values())}
    meta = {"env_info": "", "seed": 0, "CLASSES": ["wall"], "PALETTE": [[120, 120, 120]], "epoch": 1, "iter": 160000}
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": moments, "param_groups": []}}, path)
    del state, moments
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, CHECKPOINTS[file], path, str(value)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    path.unlink()
    assert result.returncode == 0, result.stderr
    peak, weights = map(int, result.stdout.split())
    assert peak <= 1.1 * weights, f"{peak / weights:.3f} times the weights"


# Of the official code at small sizes, under the names of its goldens.
MANIFESTS = {
    "segvit_l_ade_s160": ("segvit_large", 160),
    "segvit_shrunk_b_ade_s128": ("segvit_base_shrunk", 128),
    "segvit_shrunk_l_ade_s160": ("segvit_large_shrunk", 160),
}


@pytest.mark.parametrize("file", MANIFESTS)
def test_official_layouts_of_small_sizes_load_strictly(file):
    name, side = MANIFESTS[file]
    model = on_meta(name, img_size=(side, side))
    record = golden_json(f"manifests/{file}")["state_dict"]
    state = {key: torch.empty(shape, device="meta") for key, shape in record}
    segzoo.load_weights(model, state)
    first = next(key for key in state if "decoder_1" in key)
    with pytest.raises(WeightsError, match="missing"):
        segzoo.load_weights(model, {key: value for key, value in state.items() if key != first})


@pytest.mark.parametrize("name", TINY)
def test_weights_of_another_img_size(name):
    square, wide = segzoo.create_model(name, img_size=(96, 96)), segzoo.create_model(name, img_size=(64, 144))
    segzoo.load_weights(wide, square.state_dict())
    assert wide.encoder.pos_embed.shape == (1, 4, 9, 24)
    expected = F.interpolate(square.encoder.pos_embed.permute(0, 3, 1, 2), size=(4, 9), mode="bicubic")
    torch.testing.assert_close(wide.encoder.pos_embed, expected.permute(0, 2, 3, 1))
    if name == "test_segvit_shrunk":
        expected = F.interpolate(square.decoder.upsample.queries.permute(2, 0, 1)[None], size=(4, 9), mode="bicubic")
        torch.testing.assert_close(wide.decoder.upsample.queries, expected[0].permute(1, 2, 0))


def test_a_checkpoint_of_other_classes_renews_what_exists_once_a_class(tmp_path):
    trained = segzoo.create_model("test_segvit")
    path = tmp_path / "trained.pth"
    torch.save(trained.state_dict(), path)
    model = segzoo.create_model("test_segvit", num_classes=5, checkpoint_path=path)
    own = model.state_dict()
    assert own["decoder.atm.class_queries"].shape == (5, 16)
    assert own["decoder.atm.class_embed.weight"].shape == (6, 16)
    for key, tensor in trained.state_dict().items():
        assert key in model.classifier_parameters() or torch.equal(own[key], tensor), key


# --- cost -----------------------------------------------------------------------------------------------------------

COSTS = [
    ("SegViT-B 512 (3 stages x 3 layers)", "segvit_base", 512, {}),
    ("B, single stage ATM (out_indices [11], use_stages 1, 3 layers)", "segvit_base", 512, {"stages": (11,)}),
    (
        "B naive shrunk: vit_shrink idx 6, ATM single stage on the last (1/32) output",
        "segvit_base_shrunk",
        512,
        {"stages": (11,), "upsample": False},
    ),
    ("B shrunk: vit_shrink idx 6, out [5,11], TPNATMHead 2 stages x 3 layers", "segvit_base_shrunk", 512, {}),
    ("L 640 ADE", "segvit_large", 640, {}),
    ("Shrunk-L 640 (idx 8)", "segvit_large_shrunk", 640, {}),
    ("L 512 COCO 171", "segvit_large.coco_stuff10k", 512, {}),
    ("Shrunk-L 512 COCO 171", "segvit_large_shrunk.coco_stuff10k", 512, {}),
    ("L 480 PC 59 classes", "segvit_large.pascal_context", 480, {}),
    ("L 480 PC 60 classes (as in config)", "segvit_large.pascal_context_60", 480, {}),
    ("Shrunk-L 480 PC 59", "segvit_large_shrunk.pascal_context", 480, {}),
    ("Shrunk-L 480 PC 60", "segvit_large_shrunk.pascal_context_60", 480, {}),
]
NOT_OURS = {"B, 3 stages x 1 layer (does NOT match)", "SETR-like linear head: 1x1 conv 768->150 + bilinear x16"}
ROWS = {row: figures for row, *figures in golden_json("flops_SegViT_RTFormer")["segvit"]["rows"]}


def fvcore_extra(model, size: int) -> float:
    """What fvcore counts beyond multiply-accumulates: 5 a LayerNorm element, 4 an upsampled element, class masks."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += 5 * output.numel()

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return total + 4 * model.num_classes * size * size


@pytest.mark.parametrize(("row", "name", "size", "options"), COSTS, ids=[row[0] for row in COSTS])
def test_costs(row, name, size, options):
    model = on_meta(name, **options).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    macs = counter.get_total_flops() / 2
    fvcore, flop_counter, _ = ROWS[row]
    assert macs / 1e9 == pytest.approx(flop_counter, rel=1e-3)
    assert (macs + fvcore_extra(model, size)) / 1e9 == pytest.approx(fvcore, rel=1e-2)


def test_every_row_of_the_cost_table_is_taken():
    assert {row for row, *_ in COSTS} == set(ROWS) - NOT_OURS


def test_cost_of_the_setr_head():
    """Table 4: the row that the paper prints, 107.3 G, which is fvcore's count."""
    fvcore, _, paper = ROWS["SETR-like linear head: 1x1 conv 768->150 + bilinear x16"]
    model = on_meta("segvit_base", decoder="setr").eval()
    exact = segzoo.cost(model, (512, 512)).macs / 1e9
    # Without the linear projection, the decoder and the classes of attention-to-mask; with one classifier.
    assert exact == pytest.approx(fvcore, rel=3e-3)
    assert exact == pytest.approx(paper, rel=0.03)


@pytest.mark.parametrize(("block", "stages"), [(6, (5, 11)), (4, (3, 11))])
def test_query_down_sampling_at_half_and_at_a_third_of_the_depth(block, stages):
    """Table 8: the blocks after it have a quarter of the tokens, so that each block earlier saves as much again."""
    full = segzoo.cost(on_meta("segvit_base", decoder="setr"), (512, 512)).macs
    shrunk = on_meta("segvit_base", decoder="setr", stages=stages, downsample_block=block)
    assert [info["reduction"] for info in shrunk.feature_info] == [16, 32]
    after = 12 - block - 1  # whole blocks on 256 of 1024 tokens, of 768 channels
    whole, quarter = (12 * 768**2 * n + 2 * 768 * n * n for n in (1024, 256))
    half = 256 * 768**2 * 10 + 2 * 1024 * 768**2 + 2 * 768 * 256 * 1024  # its keys and values are all tokens
    classifier = 768 * 150 * (1024 - 256)
    assert segzoo.cost(shrunk, (512, 512)).macs == full - after * (whole - quarter) - (whole - half) - classifier


@pytest.mark.parametrize("options", [{}, {"stages": (3,)}, {"stages": (3,), "downsample_block": 2}])
def test_the_setr_head_classifies_the_last_map(options):
    torch.manual_seed(0)
    model = segzoo.create_model("test_segvit", decoder="setr", **options).double().eval()
    x = image(2, 3, 64, 96)
    last = model.forward_features(x)[-1]
    with torch.no_grad():
        cells = torch.einsum("bchw,kc->bkhw", last, model.get_classifier().weight[:, :, 0, 0])
        cells = cells + model.get_classifier().bias[:, None, None]
        expected = F.interpolate(cells, size=(64, 96), mode="bilinear")
        torch.testing.assert_close(model(x), expected)
        assert model(image(1, 3, 37, 50)).shape == (1, 13, 37, 50)
    assert model.score_kind == "logits"
    model.reset_classifier(5)
    model.train()(x).mean().backward()
    assert model.get_classifier().weight.grad is not None
    assert segzoo.predict(model.float().eval(), np.zeros((30, 40, 3), np.uint8)).mask.shape == (30, 40)


def test_the_setr_head_takes_a_vit_of_another_img_size():
    state = segzoo.create_model("test_segvit", decoder="setr").state_dict()
    model = segzoo.create_model("test_segvit", decoder="setr", img_size=96)
    segzoo.load_weights(model, state)
    assert model.encoder.pos_embed.shape[1:3] == (6, 6)
    assert torch.equal(model.encoder.blocks[0].attn.qkv.weight, state["encoder.blocks.0.attn.qkv.weight"])


def test_reduction_saves_multiply_accumulates():
    model = on_meta("segvit_base")
    full = segzoo.cost(model, (512, 512)).macs
    model.set_inference_reduction({"encoder": 2})
    # Per block: keys and values of a quarter of the 1024 tokens, in projection and in both attention products.
    saved = 12 * (3 * 1024 // 4) * (2 * 768 * 768 + 2 * 1024 * 768)
    assert full - segzoo.cost(model, (512, 512)).macs == saved


# --- per-token reference --------------------------------------------------------------------------------------------


def attention(q, k, v, heads: int):
    """Plain attention over lists of tokens: output, and the mean over heads of the scaled scores."""
    split = [t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v)]
    scores = split[0] @ split[1].transpose(-2, -1) / split[0].shape[-1] ** 0.5
    return (scores.softmax(-1) @ split[2]).transpose(0, 1).flatten(1), scores.mean(0)


def reference_scores(model, x: torch.Tensor) -> torch.Tensor:
    """SegViT for one image, token by token: every token carries its place, and their order is random."""
    cfg, encoder, decoder = model.cfg, model.encoder, model.decoder
    vit = cfg.encoder
    H, W = x.shape[2] // 16, x.shape[3] // 16
    places = [(r, c) for r in range(H) for c in range(W)]
    places = [places[i] for i in torch.randperm(len(places), generator=torch.Generator().manual_seed(1))]

    def grid(learned_BHWC):
        if learned_BHWC.shape[1:3] == (H, W):
            return learned_BHWC[0]
        return F.interpolate(learned_BHWC.permute(0, 3, 1, 2), size=(H, W), mode="bicubic")[0].permute(1, 2, 0)

    positions = grid(encoder.pos_embed)
    conv = encoder.patch_embed.proj
    tokens = torch.stack(
        [
            (conv.weight * x[0, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16]).sum(dim=(1, 2, 3))
            + conv.bias
            + positions[r, c]
            for r, c in places
        ]
    )
    maps = []
    for i, block in enumerate(encoder.blocks):
        memory = block.norm1(tokens)
        if i == vit.downsample_block:
            kept = [n for n, (r, c) in enumerate(places) if r % 2 == 0 and c % 2 == 0]
            tokens, places = tokens[kept], [places[n] for n in kept]
        q = block.attn.qkv(block.norm1(tokens)).chunk(3, -1)[0]
        _, k, v = block.attn.qkv(memory).chunk(3, -1)
        tokens = tokens + block.attn.proj(attention(q, k, v, vit.num_heads)[0])
        tokens = tokens + block.mlp(block.norm2(tokens))
        if i in vit.stages:
            maps.append((places, tokens))

    def stage(queries, module, memory):
        memory = module.norm(module.proj(memory))
        for layer in module.layers:
            out, _ = attention(*layer.self_attn.qkv(queries).chunk(3, -1), cfg.decoder_num_heads)
            queries = layer.norm1(queries + layer.self_attn.proj(out))
            cross = layer.cross_attn
            out, masks = attention(cross.q(queries), cross.k(memory), cross.v(memory), cfg.decoder_num_heads)
            queries = layer.norm2(queries + cross.proj(out))
            queries = layer.norm3(queries + layer.linear2(layer.linear1(queries).relu()))
        return queries, masks

    if cfg.upsample:
        places = [(r, c) for c in range(W) for r in range(H)]
        learned = grid(decoder.upsample.queries[None])
        spatial = torch.stack([learned[r, c] for r, c in places])
        for module, (_, memory) in zip(decoder.upsample.stages, maps, strict=True):
            spatial, _ = stage(spatial, module, memory)
        maps = [(places, spatial)]
    queries, total = decoder.atm.class_queries, torch.zeros(cfg.num_classes, H, W, dtype=x.dtype)
    for module, (places, memory) in zip(decoder.atm.stages, reversed(maps), strict=True):
        queries, masks = stage(queries, module, memory)
        for n, (r, c) in enumerate(places):
            total[:, r, c] += masks[:, n]
    probability = decoder.atm.class_embed(queries).softmax(-1)[:, :-1]
    masks = F.interpolate(total[None], size=x.shape[2:], mode="bilinear")[0].sigmoid()
    return torch.einsum("qc,qhw->chw", probability, masks)[None]


@pytest.mark.parametrize("size", [(64, 144), (64, 64), (144, 48)])
@pytest.mark.parametrize("name", TINY)
def test_per_token_reference(name, size):
    model = segzoo.create_model(name).double().eval()
    x = image(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference_scores(model, x), rtol=0, atol=1e-9)


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swin():
    return segzoo.create_model("segvit_swin_tiny", num_classes=5).double().eval()


def padded_model(name: str, request):
    """A tiny model, or the module's one Swin, and the multiple to which it pads images."""
    if name == "segvit_swin_tiny":
        return request.getfixturevalue("swin"), 32
    return segzoo.create_model(name).double().eval(), 16


@pytest.mark.parametrize("size", [(70, 101), (48, 48)])
@pytest.mark.parametrize("name", [*TINY, "segvit_swin_tiny"])
def test_an_odd_size_is_padded_at_the_bottom_and_right_and_cropped(name, size, request):
    model, multiple = padded_model(name, request)
    x = image(2, 3, *size)
    with torch.no_grad():
        features = model.forward_features(x)
        padded = model(F.pad(x, (0, -size[1] % multiple, 0, -size[0] % multiple)))
        torch.testing.assert_close(model(x), padded[:, :, : size[0], : size[1]], rtol=0, atol=1e-12)
    assert features.padded_size == (size[0] + -size[0] % multiple, size[1] + -size[1] % multiple)


@pytest.mark.parametrize("size", [(70, 101), (140, 202), (35, 51), (333, 40), (1, 1), (80, 112)])
@pytest.mark.parametrize("name", ["test_segvit", "segvit_swin_tiny"])
def test_any_size_shows_the_image_without_its_padding(name, size, request):
    """Pixel centres of the asked size, placed on the image, and read bilinearly from the masks."""
    (model, _), x = padded_model(name, request), image(1, 3, 70, 101)
    stride = model.feature_info[0]["reduction"]
    with torch.no_grad():
        output = model.forward_head(model.forward_features(x))
        actual = model.to_size(output, size)
    masks = output.mask_logits[0].numpy()

    def weights(out: int, side: int, cells: int) -> np.ndarray:
        matrix = np.zeros((out, cells))
        for i in range(out):
            at = min(max((i + 0.5) * side / out / stride - 0.5, 0), cells - 1)
            low = int(at)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, cells - 1)] += at - low
        return matrix

    rows, columns = masks.shape[1:]
    full = np.einsum("yr,qrc,xc->qyx", weights(size[0], 70, rows), masks, weights(size[1], 101, columns))
    probability = output.class_logits.softmax(-1)[0, :, :-1]
    expected = torch.einsum("qc,qhw->chw", probability, torch.from_numpy(full).sigmoid())[None]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TINY)
def test_strips_of_rows_are_the_whole(name):
    model = segzoo.create_model(name).double().eval()
    with torch.no_grad():
        output = model.forward_head(model.forward_features(image(2, 3, 70, 101)))
        for size in ((70, 101), (131, 90)):
            whole = model.to_size(output, size)
            strips = [model.score_rows(output, size, y, min(y + 17, size[0])) for y in range(0, size[0], 17)]
            torch.testing.assert_close(torch.cat(strips, dim=2), whole, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_one_compiled_model_takes_many_sizes(name):
    model = segzoo.create_model(name).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((64, 64), (64, 144), (50, 71)):
            x = image(1, 3, *size).float()
            torch.testing.assert_close(compiled(x), model(x))


# --- scores and configuration ---------------------------------------------------------------------------------------


def test_scores_are_sums_over_all_queries():
    model = segzoo.create_model("test_segvit").eval()
    with torch.no_grad():
        # Every query is sure of class 3 and every mask is on: 13 queries say so.
        model.decoder.atm.class_embed.weight.zero_()
        model.decoder.atm.class_embed.bias.copy_(torch.eye(14)[3] * 100)
        output = model.forward_head(model.forward_features(image(1, 3, 32, 48).float()))
        scores = model.to_size(output._replace(mask_logits=torch.full_like(output.mask_logits, 100.0)), (32, 48))
    assert model.score_kind == "product"
    torch.testing.assert_close(scores[:, 3], torch.full((1, 32, 48), 13.0))
    assert scores.sum() == pytest.approx(13 * 32 * 48)


ABLATIONS = {
    "other blocks (Table 5)": ("test_segvit", {"stages": (0, 1, 3)}),
    "two stages": ("test_segvit", {"stages": (1, 3)}),
    "four stages": ("test_segvit", {"stages": (0, 1, 2, 3)}),
    "single stage": ("test_segvit", {"stages": (3,)}),
    "deeper": ("test_segvit", {"depth": 6, "stages": (1, 3, 5)}),
    "naive shrink": ("test_segvit_shrunk", {"stages": (3,), "upsample": False}),
    "cascade over both grids": ("test_segvit_shrunk", {"upsample": False}),
    "convolution of q": ("test_segvit_shrunk", {"downsample": "conv"}),
    "convolution of q, k and v": ("test_segvit_shrunk", {"downsample": "conv", "downsample_tokens": "qkv"}),
    "nearest q, k and v": ("test_segvit_shrunk", {"downsample_tokens": "qkv"}),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablations_build_and_train_a_step(ablation):
    name, options = ABLATIONS[ablation]
    torch.manual_seed(0)
    model = segzoo.create_model(name, **options).double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, labels = image(2, 3, 64, 144), torch.randint(0, 13, (2, 64, 144))
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    outputs = model.forward_train(x)
    stages = len(model.decoder.atm.stages)
    assert len(outputs["auxiliary"]) == (stages if stages > 1 else model.cfg.decoder_layers) - 1
    ATMLoss()(outputs, labels).backward()
    optimizer.step()
    unmoved = [key for key, tensor in model.named_parameters() if torch.equal(tensor, before[key])]
    assert not unmoved
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


def test_masks_of_a_single_stage_are_not_summed():
    model = segzoo.create_model("test_segvit", stages=(3,)).double().eval()
    x = image(1, 3, 64, 64)
    outputs = model.forward_train(x)
    layer = model.decoder.atm.stages[0].layers[-1].cross_attn
    with torch.no_grad():
        layer.q.weight.zero_()
        layer.q.bias.zero_()
    again = model.forward_train(x)
    assert again["output"].mask_logits.abs().max() == 0
    torch.testing.assert_close(again["auxiliary"][0].mask_logits, outputs["auxiliary"][0].mask_logits)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_segvit", {"decoder_num_heads": 3}, "decoder_num_heads=3 must divide decoder_dim=16"),
        ("test_segvit_shrunk", {"decoder_num_heads": 0}, "decoder_num_heads=0 must divide decoder_dim=16"),
        ("test_segvit", {"num_heads": 0}, "num_heads=0 must divide embed_dim=24"),
        ("test_segvit", {"decoder": "mlp"}, "decoder must be 'atm' or 'setr', not 'mlp'"),
        ("test_segvit_shrunk", {"decoder": "setr"}, "upsample=True belongs to decoder='atm'"),
        ("segvit_swin_tiny", {"decoder_num_heads": 3}, "decoder_num_heads=3 must divide decoder_dim=256"),
        ("segvit_swin_tiny", {"encoder": {"stages": (2, 4)}}, r"\(2, 4\) must be rising stage numbers from 0 to 3"),
        ("segvit_swin_tiny", {"encoder": {"stages": (3, 1)}}, r"\(3, 1\) must be rising stage numbers from 0 to 3"),
    ],
)
def test_refused_options(name, options, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        on_meta(name, **options)


def test_position_embeddings_are_not_decayed():
    model = on_meta("test_segvit_shrunk")
    assert model.no_weight_decay() == {"encoder.pos_embed"}
    groups = model.param_groups(lr=1e-4, weight_decay=0.05)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay[id(model.encoder.pos_embed)] == 0
    assert decay[id(model.encoder.patch_embed.proj.weight)] == decay[id(model.decoder.upsample.queries)] == 0.05


# --- Swin -----------------------------------------------------------------------------------------------------------


def test_swin_segments_any_size_on_the_finest_grid(swin):
    for size, cells in (((50, 90), (16, 24)), ((48, 48), (16, 16)), ((64, 100), (16, 32))):
        x = image(1, 3, *size)
        with torch.no_grad():
            features = swin.forward_features(x)
            assert swin.forward_head(features).mask_logits.shape == (1, 5, *cells)
            assert swin(x).shape == (1, 5, *size)
        for feature, info in zip(features, swin.feature_info, strict=True):
            assert tuple(side * info["reduction"] for side in feature.shape[2:]) == features.padded_size
    assert [stage.proj.in_features for stage in swin.decoder.atm.stages] == [768, 384, 192, 96]
    assert segzoo.cost(on_meta("segvit_swin_tiny"), (512, 512)).macs / 1e9 == pytest.approx(47.5, abs=0.05)
