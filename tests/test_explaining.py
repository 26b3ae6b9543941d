"""`segzoo.explain`: attention by hand, every kind of site, masks of SegViT, pictures, and nothing left behind."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import segzoo
from segzoo.cli import main
from segzoo.explaining.explanation import _regions
from segzoo.models.swin import TEST_SWIN


def make(name: str, **options):
    torch.manual_seed(0)
    model = segzoo.create_model(name, **options)
    model.mark_loaded()  # or every prediction says that the weights are drawn at random
    return model


def picture(H: int = 64, W: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)


def test_attention_and_features_are_those_of_the_block():
    """EFT's second stage, trained windows of 4 on a map of 8 x 16: 2 x 4 keys, and with factor 2 one row of 2."""
    model = make("test_edaformer").eval()
    attn = model.encoder.stages[1].blocks[0].attn
    seen = {}
    attn.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output))
    plan = {"encoder.1": 2}
    shown = segzoo.explain(model, picture(), site="encoder.1", reduction=plan, queries=[(20, 100)], resize=(64, 128))
    assert (shown.site, shown.block, shown.queries) == ("encoder.1", "encoder.stages.1.blocks.0.attn", ((20, 100),))
    x = torch.from_numpy(picture()).permute(2, 0, 1)[None] / 255
    row = model.pretrained_cfg or segzoo.models.rows.PretrainedCfg()
    x = (x - torch.tensor(row.mean).view(3, 1, 1)) / torch.tensor(row.std).view(3, 1, 1)
    with torch.no_grad():
        for view, plan, side in ((shown.without, None, 4), (shown.reduced, {"encoder.1": 2}, 8)):
            model.set_inference_reduction(plan)
            model(x)
            pooled = F.avg_pool2d(seen["x"].permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
            k = attn.kv(pooled.flatten(1, 2))[0]
            query = seen["x"][0, 2, 12]  # pixel 20, 100 at stride 8
            d = len(query) // attn.num_heads
            heads = [slice(h * d, (h + 1) * d) for h in range(attn.num_heads)]
            weights = torch.stack([(k[:, h] @ query[h] / d**0.5).softmax(0) for h in heads]).mean(0)
            cells = weights.view(*pooled.shape[1:3]).repeat_interleave(side, 0).repeat_interleave(side, 1) / side**2
            np.testing.assert_allclose(view.attention[0], cells, rtol=1e-4)
            np.testing.assert_allclose(view.features, seen["output"][0].norm(dim=-1), rtol=1e-4)
    assert shown.reduced.keys.tolist() == [[0] * 8 + [1] * 8] * 8
    assert shown.without.queries.max() == 127


@pytest.mark.parametrize("name", ["test_segformer", "test_edaformer", "test_segvit_shrunk"])
def test_every_site_of_every_kind(name):
    model = make(name)
    plan = {"encoder": segzoo.Bipartite(0.5, 2), "encoder.q": segzoo.Bipartite(0.5, 2)}
    sites = [site for site in segzoo.reduction_sites(model) if not site.endswith(".q")]
    for site in sites[:: max(1, len(sites) - 1)]:
        shown = segzoo.explain(model, picture(70, 101), site=site, reduction=plan)
        for view in (shown.without, shown.reduced):
            np.testing.assert_allclose(view.attention.sum(axis=(1, 2)), 1, rtol=1e-5)
            assert view.features.shape == view.queries.shape
        if site == sites[0]:
            assert shown.reduced.keys.max() < shown.without.keys.max()
            assert shown.reduced.queries.max() < shown.without.queries.max()


def test_the_model_is_untouched():
    model = make("test_segformer").train()
    model.set_inference_reduction({"encoder": 2})
    segzoo.explain(model, picture(), reduction="fast")
    assert model.training
    assert segzoo.reduction_sites(model)["encoder.0"][0].entry == segzoo.Pool(2)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_similarity_maps_are_segvits_masks():
    model = make("test_segvit").eval()
    shown = segzoo.explain(model, picture(64, 64), reduction=2, resize=(64, 64))
    x = torch.from_numpy(picture(64, 64)).permute(2, 0, 1)[None] / 255
    row = segzoo.models.rows.PretrainedCfg()
    x = (x - torch.tensor(row.mean).view(3, 1, 1)) / torch.tensor(row.std).view(3, 1, 1)
    with torch.no_grad():
        masks = model.forward_head(model.forward_features(x)).mask_logits[0].sigmoid()
        found = model(x)[0].argmax(0).unique().tolist()
    assert shown.without.similarity.keys() == shown.reduced.similarity.keys() == {f"class {index}" for index in found}
    for index in found:
        np.testing.assert_allclose(shown.without.similarity[f"class {index}"], masks[index], rtol=1e-4)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_regions_have_the_mean_colour_of_their_pixels():
    image = np.zeros((256, 256, 3), dtype=np.uint8)
    image[:, :128] = (200, 100, 0)
    shown = segzoo.explain(make("test_edaformer"), image, site="encoder.0", reduction=2, resize=(256, 256))
    halves = np.asarray(_regions(shown, np.array([[0, 1]])))
    assert (halves[8, 8] == (200, 100, 0)).all()
    assert (halves[8, 200] == 0).all()
    whole = np.asarray(_regions(shown, np.array([[0, 0]])))
    assert abs(whole[8, 200].astype(int) - (100, 50, 0)).max() <= 1


def test_pictures_are_saved_once(tmp_path):
    shown = segzoo.explain(make("test_segvit"), picture(), reduction=2)
    files = shown.save(tmp_path)
    assert [file.name for file in files] == ["attention.png", "features.png", "tokens.png", "similarity.png"]
    heights = {}
    for file in files:
        with Image.open(file) as image:
            heights[file.name] = image.height
    assert heights["attention.png"] == 4 * heights["features.png"]  # four queries
    with pytest.raises(segzoo.SegzooError, match=r"attention\.png exists"):
        shown.save(tmp_path)
    shown.save(tmp_path, overwrite=True)


def test_on_the_command_line(tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    command = ["explain", "edaformer_t.scenes", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--json"]
    assert main([*command, "--site", "encoder.2", "--query", "3", "4", "--resize", "64", "128"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["block"] == "encoder.stages.2.blocks.9.attn"
    assert record["keys"] == [8, 2]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"attention.png", "features.png", "tokens.png"}
    assert main([*command, "--site", "encoder.9"]) == 2
    assert "no attention over one map at 'encoder.9'" in capsys.readouterr().err


def test_the_blocks_of_the_documentation(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "choose-a-reduction.md").read_text(encoding="utf-8")
    section = text.partition("## Seeing what it does")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (command,) = re.findall(r"```\n(segzoo .*?)\n```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(128, 256)).save("street1.png")
    exec(compile(block, "docs/choose-a-reduction.md", "exec"), {"segzoo": segzoo, "model": make("test_edaformer")})
    assert len(list(Path("explained").iterdir())) == 3
    assert main([*shlex.split(command)[1:], "--overwrite", "--resize", "64", "128"]) == 0
    assert "8 keys and values without the reduction, 2 with it" in capsys.readouterr().out


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("test_edaformer", {"site": "decoder.7"}, "no attention over one map at 'decoder.7'.*encoder.0, encoder.1"),
        ("test_edaformer", {"block": 4}, "site encoder.0 has 1 blocks; block must be from 0 to 0"),
        ("test_edaformer", {"queries": [(64, 0)]}, r"query \(64, 0\) is outside the image of 64x128 pixels"),
        ("test_edaformer", {"queries": []}, "at least one query"),
        ("test_edaformer", {"reduction": 1}, "this plan reduces nothing; sites to look at are encoder.0"),
        ("test_edaformer", {"reduction": "quick"}, "no preset is called 'quick'"),
        ("test_rtformer", {}, "no attention over one map at 'encoder.grid'; this model's sites with one: none"),
        ("test_eft", {}, "EFT is no segmentation model"),
    ],
)
def test_refused(name, options, match):
    with pytest.raises(segzoo.SegzooError, match=match):
        segzoo.explain(make(name), picture(), **options)


def test_windows_are_refused():
    with pytest.raises(segzoo.SegzooError, match="no attention over one map at 'encoder.0'"):
        segzoo.explain(make("test_segformer", encoder=TEST_SWIN), picture())
