"""The Swin encoder: timm's function with timm's weights, at any size, and windows with fewer keys and values."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import timm
import torch
import torch.nn.functional as F

import segzoo
from segzoo.models.keys import apply_rules
from segzoo.models.swin import SWIN_TINY, TEST_SWIN, ShiftedWindowAttention, Swin, SwinConfig
from segzoo.models.swin_weights import SWIN_RULES

SHALLOW = dataclasses.replace(TEST_SWIN, num_classes=0)
DEEP = dataclasses.replace(SHALLOW, depths=(2, 2, 2, 2))  # every stage moves its windows
NARROW = dataclasses.replace(DEEP, window_size=5, in_chans=4)  # windows of an odd side


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@functools.cache
def pair(cfg: SwinConfig) -> tuple[torch.nn.Module, Swin]:
    """timm's Swin with random weights, biases and norms too, and ours with the same, both in float64."""
    torch.manual_seed(0)
    reference = timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=cfg.embed_dim,
        depths=cfg.depths,
        num_heads=cfg.num_heads,
        window_size=cfg.window_size,
        in_chans=cfg.in_chans,
        num_classes=0,
        strict_img_size=False,
        always_partition=True,
    )
    for name, parameter in reference.named_parameters():
        if parameter.ndim == 1 or "bias" in name:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    model = Swin(cfg)
    segzoo.load_weights(model, reference.state_dict())
    return reference.double().eval(), model.double().eval()


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        (SHALLOW, (64, 96)),
        (DEEP, (97, 131)),
        (DEEP, (17, 300)),
        (NARROW, (160, 161)),
        (DEEP, (1, 1)),
        (SWIN_TINY, (100, 68)),
    ],
)
def test_features_are_timms(cfg, size):
    reference, model = pair(cfg)
    x = image(2, cfg.in_chans, *size)
    padded = F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32))
    with torch.no_grad():
        expected = reference.forward_intermediates(padded, intermediates_only=True)
        features = model.forward_features(x)
    assert features.padded_size == tuple(padded.shape[2:])
    for own, theirs in zip(features, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (256, 200), (301, 517)])
def test_features_are_timms_in_float32(size):
    reference, model = (copy.deepcopy(part).float() for part in pair(SWIN_TINY))
    x = image(1, 3, *size).float()
    with torch.no_grad():
        expected = reference.forward_intermediates(
            F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32)), intermediates_only=True
        )
        for own, theirs in zip(model.forward_features(x), expected, strict=True):
            assert (own - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_windows_are_moved_in_all_stages():
    """Of 7 x 7 tokens every second block moves its windows by 3, the last stage's too; timm's own at 224 has none."""
    with torch.device("meta"):
        model = Swin(SWIN_TINY)
    assert [part.shift for part in model.modules() if isinstance(part, ShiftedWindowAttention)] == [0, 3] * 6


def test_features_of_some_stages_end_with_the_last_of_them():
    _, model = pair(DEEP)
    some = Swin(dataclasses.replace(DEEP, stages=(0, 2))).double().eval()
    some.load_state_dict(model.state_dict())
    x = image(1, 3, 50, 70)
    calls = []
    some.stages[3].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        features = some.forward_features(x)
        assert features.padded_size == (64, 80)  # whole cells of stride 16
        whole = model.forward_features(F.pad(x, (0, 26, 0, 14)))
    assert not calls
    assert [m.shape[1:] for m in features] == [(8, 16, 20), (32, 4, 5)]
    torch.testing.assert_close(features[0][:, :, :14, :14], whole[0][:, :, :14, :14], rtol=0, atol=1e-12)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_original_files_load_too():
    """Microsoft's files have the merging of patches one stage earlier, and buffers."""
    reference, model = pair(DEEP)
    original = {}
    for key, tensor in reference.state_dict().items():
        level = int(key.split(".")[1]) if ".downsample." in key else 0
        original[key.replace(f"layers.{level}.downsample", f"layers.{level - 1}.downsample")] = tensor
    assert original.keys() != reference.state_dict().keys()
    original["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16)
    original["head.fc.bias"] = torch.zeros(1000)
    assert apply_rules(original, SWIN_RULES).keys() == model.state_dict().keys()
    loaded = Swin(DEEP).double()
    segzoo.load_weights(loaded, original)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_own_weights_load_again():
    _, model = pair(DEEP)
    loaded = Swin(DEEP).double().eval()
    segzoo.load_weights(loaded, model.state_dict())
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_position_biases_of_another_window_are_resized_bicubically():
    reference, _ = pair(DEEP)  # windows of 4
    model = Swin(dataclasses.replace(DEEP, window_size=6)).double()
    segzoo.load_weights(model, reference.state_dict())
    table = reference.layers[0].blocks[0].attn.relative_position_bias_table  # (49, 1)
    expected = F.interpolate(table.reshape(1, 7, 7, 1).permute(0, 3, 1, 2), size=(11, 11), mode="bicubic")
    torch.testing.assert_close(model.stages[0].blocks[0].attn.position_bias[None], expected.permute(0, 2, 3, 1))


def test_position_biases_are_not_decayed():
    reference, model = pair(DEEP)
    assert len(model.no_weight_decay()) == len(reference.no_weight_decay()) == 8


# --- reduction --------------------------------------------------------------------------------------------------------


def loop_attention(attn: ShiftedWindowAttention, x_HWC: torch.Tensor, cell: int) -> torch.Tensor:
    """One image, query by query: which cells it sees, with which bias."""
    H, W, C = x_HWC.shape
    S, shift, heads = attn.side, attn.shift, attn.num_heads
    h, w = -(-H // S) * S, -(-W // S) * S
    moved = F.pad(torch.roll(x_HWC, (-shift, -shift), (0, 1)), (0, 0, 0, w - W, 0, h - H))

    def part(i: int, side: int) -> int:
        return 0 if not shift or i < side - S else 1 if i < side - shift else 2

    out = torch.zeros_like(moved)
    for top in range(0, h, S):
        for left in range(0, w, S):
            cells: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for r in range(top, top + S):
                for c in range(left, left + S):
                    cells.setdefault(((r - top) // cell, (c - left) // cell), []).append((r, c))
            kv = torch.stack([torch.stack([moved[at] for at in cells[key]]).mean(0) for key in sorted(cells)])
            k, v = attn.kv(kv).chunk(2, -1)
            for r in range(top, top + S):
                for c in range(left, left + S):
                    q, own = attn.q(moved[r, c]), (part(r, h), part(c, w))
                    result = []
                    for n in range(heads):
                        d = slice(n * C // heads, (n + 1) * C // heads)
                        scores = k[:, d] @ q[d] / (C // heads) ** 0.5
                        for i, key in enumerate(sorted(cells)):
                            biases = [attn.position_bias[r - y + S - 1, c - x + S - 1, n] for y, x in cells[key]]
                            scores[i] += sum(biases) / len(biases)
                            if all((part(y, h), part(x, w)) != own for y, x in cells[key]):
                                scores[i] -= 100
                        result.append(scores.softmax(0) @ v[:, d])
                    out[r, c] = attn.proj(torch.cat(result))
    return torch.roll(out[:H, :W], (shift, shift), (0, 1))


@pytest.mark.parametrize("cell", [1, 2, 3])
@pytest.mark.parametrize("shift", [0, 2])
def test_cells_of_a_window_are_averaged_with_their_bias_and_seen_where_any_token_is(cell, shift):
    """Against loops; windows of 5 leave border cells at 2 and 3."""
    torch.manual_seed(0)
    attn = ShiftedWindowAttention(dim=4, num_heads=2, side=5, shift=shift, level=0).double().eval()
    torch.nn.init.normal_(attn.position_bias)
    segzoo.set_inference_reduction(attn, cell)
    x = image(2, 10, 7, 4)
    with torch.no_grad():
        actual = attn(x)
        for own, one in zip(actual, x, strict=True):
            torch.testing.assert_close(own, loop_attention(attn, one, cell), rtol=0, atol=1e-12)


def test_fewer_keys_in_windows_cost_less():
    model = Swin(DEEP)
    sites = [f"encoder.{i}" for i in range(4)]
    assert list(segzoo.reduction_sites(model)) == sites
    full = segzoo.cost(model, (128, 128))
    model.set_inference_reduction({"encoder.0": segzoo.Pool(2, "max")})
    reduced = segzoo.cost(model, (128, 128))
    # 64 windows in each of two blocks, of 16 tokens of 8 channels: 12 keys fewer, with two products and one projection.
    assert full.macs - reduced.macs == 2 * 64 * (2 * 16 * 12 * 8 + 12 * 8 * 16)
    assert reduced.sites["encoder.1"] == full.sites["encoder.1"]
    with pytest.raises(segzoo.SegzooError, match="encoder.0 takes Pool, Neighbour2d, not Bipartite"):
        model.set_inference_reduction(segzoo.Bipartite(0.5, 2))


def test_a_window_larger_than_any_cell_and_none_restores():
    _, model = pair(DEEP)
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        before = model(x)
        with segzoo.inference_reduction(model, 100):  # one key a window
            reduced = model(x)
        assert torch.equal(model(x), before)
        with segzoo.inference_reduction(model, 1):
            assert torch.equal(model(x), before)
    assert not torch.equal(before, reduced)
