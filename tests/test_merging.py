"""Token merging: properties of the pure functions, a plain reference, the memory bound, and merging in models."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import segzoo
from segzoo import (
    Bipartite,
    EnergyProtected,
    GridMerge,
    LocalGlobal,
    Neighbour1d,
    Neighbour2d,
    OverlapPool,
    Pool,
    Window,
)
from segzoo.layers.merging import (
    bipartite_2d,
    energy_protected,
    identity,
    local_then_global,
    merge_grid,
    neighbour_1d,
    neighbour_2d,
)
from segzoo.layers.reduction import KeyValueReduction, QueryReduction, reduce_map

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)

PLAIN = settings(deadline=None, max_examples=12, derandomize=True)  # the plain forms compare token by token

SIDES = st.integers(1, 9)
STRIDES = st.integers(1, 4)
RATIOS = st.one_of(st.sampled_from([0.0, 0.5, 0.6, 0.9, 1.0]), st.floats(0, 1))
SEEDS = st.integers(0, 2**31)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def all_pairs(x_BNC: torch.Tensor, H: int, W: int, ratio: float, stride: int):
    """(merge, unmerge) of every function, by name."""
    size = (-(-H // stride), -(-W // stride))
    return {
        "bipartite_2d": bipartite_2d(x_BNC, (H, W), ratio=ratio, stride=stride),
        "neighbour_2d": neighbour_2d((H, W), stride=stride),
        "neighbour_1d": neighbour_1d(H * W, stride=stride),
        "local_then_global": local_then_global(x_BNC, (H, W), window=stride, local=ratio, ratio=ratio),
        "energy_protected": energy_protected(x_BNC, ratio=ratio, margin=0.3),
        "merge_grid": merge_grid(x_BNC, (H, W), size=size),
        "merge_grid by magnitude": merge_grid(x_BNC, (H, W), size=size, kind="magnitude"),
    }


def plain_bipartite(x_NC: torch.Tensor, H: int, W: int, ratio: float, stride: int) -> torch.Tensor:
    """The paper's words token by token, for one image: token n -> the token whose group it ends in."""
    destinations = [
        r * W + c for r in range(0, H // stride * stride, stride) for c in range(0, W // stride * stride, stride)
    ]
    sources = [n for n in range(H * W) if n not in destinations]
    group = torch.arange(H * W)
    if not destinations or not sources:
        return group
    unit_NC = x_NC / x_NC.norm(dim=1, keepdim=True)
    similarity = unit_NC[sources] @ unit_NC[destinations].T
    best, partner = similarity.max(dim=1)
    for s in best.argsort(descending=True)[: min(int(H * W * ratio), len(sources))].tolist():
        group[sources[s]] = destinations[partner[s]]
    return group


def cosine(a_C: torch.Tensor, b_C: torch.Tensor) -> float:
    return float(a_C @ b_C / (a_C.norm() * b_C.norm()))


def merge_in_turn(x: list[torch.Tensor], count: int) -> dict[int, int]:
    """Of tokens that are destination and source in turn, the `count` sources most similar to their destination."""
    choice = []
    for s in range(1, len(x), 2):
        similarity, partner = max((cosine(x[s], x[d]), d) for d in range(0, len(x), 2))
        choice.append((similarity, s, partner))
    return {s: partner for _, s, partner in sorted(choice, reverse=True)[:count]}


def plain_local_then_global(x_NC, H: int, W: int, window: int, local: float, ratio: float) -> torch.Tensor:
    """ALGM's two steps, token by token, for one image: token n -> the token whose group it ends in."""
    group = torch.arange(H * W)
    cells = []
    for r in range(0, H // window * window, window):
        for c in range(0, W // window * window, window):
            cell = [(r + i) * W + c + j for i in range(window) for j in range(window)]
            pairs = [(a, b) for a in cell for b in cell if a < b]
            cells.append((sum(cosine(x_NC[a], x_NC[b]) for a, b in pairs) / max(1, len(pairs)), cell))
    if window > 1:
        for _, cell in sorted(cells, reverse=True)[: int(len(cells) * local)]:
            group[cell] = cell[0]
    left = sorted(set(group.tolist()))
    merged = merge_in_turn([x_NC[group == n].mean(dim=0) for n in left], min(int(len(left) * ratio), len(left) // 2))
    for source, destination in merged.items():
        group[group == left[source]] = left[destination]
    return group


def plain_energy_protected(x_NC, ratio: float, margin: float) -> torch.Tensor:
    """PiToMe, token by token."""
    N = len(x_NC)
    energy = []
    for a in x_NC:
        similarities = [cosine(a, b) for b in x_NC]
        energy.append(sum(s if s >= margin else math.exp(s - margin) - 1 for s in similarities) / N)
    count = min(int(N * ratio), N // 2)
    common = sorted(range(N), key=lambda n: -energy[n])[: 2 * count]
    group = torch.arange(N)
    for source, destination in merge_in_turn([x_NC[n] for n in common], count).items():
        group[common[source]] = common[destination]
    return group


def plain_line(tokens: list[torch.Tensor], left: int) -> list[int]:
    """The group of each token of a line after the most similar adjacent pairs have grown together."""
    edges = sorted(range(len(tokens) - 1), key=lambda e: -cosine(tokens[e], tokens[e + 1]))[: len(tokens) - left]
    groups = [0]
    for e in range(len(tokens) - 1):
        groups.append(groups[-1] + (e not in edges))
    return groups


def plain_merge_grid(x_NC, H: int, W: int, size: tuple[int, int]) -> torch.Tensor:
    """Rows, then columns: token n -> row-major index in the smaller grid."""
    column = [plain_line(list(x_NC[r * W : (r + 1) * W]), size[1]) for r in range(H)]
    group = torch.empty(H * W, dtype=torch.long)
    for w in range(size[1]):
        members = [[r * W + c for c in range(W) if column[r][c] == w] for r in range(H)]
        for r, new_row in enumerate(plain_line([x_NC[cell].mean(dim=0) for cell in members], size[0])):
            group[members[r]] = new_row * size[1] + w
    return group


def rows_of(pair, B: int, N: int) -> torch.Tensor:
    """(B, N): the row of the merged tokens that each token comes back from."""
    merge, unmerge = pair
    M = merge(torch.zeros(B, N, 1)).shape[1]
    return unmerge(torch.arange(M, dtype=torch.float64).expand(B, M)[..., None])[..., 0].long()


@PROPERTY
@given(B=st.integers(1, 3), H=SIDES, W=SIDES, ratio=RATIOS, stride=STRIDES, seed=SEEDS)
def test_bipartite_is_the_plain_form(B, H, W, ratio, stride, seed):
    x_BNC = tokens(B, H * W, 5, seed=seed)
    pair = bipartite_2d(x_BNC, (H, W), ratio=ratio, stride=stride)
    row_BN, merged_BMC = rows_of(pair, B, H * W), pair[0](x_BNC)
    for b in range(B):
        group_N = plain_bipartite(x_BNC[b], H, W, ratio, stride)
        assert torch.equal(row_BN[b, :, None] == row_BN[b], group_N[:, None] == group_N)
        for group in group_N.unique():
            expected = x_BNC[b, group_N == group].mean(dim=0)
            torch.testing.assert_close(merged_BMC[b, row_BN[b, group]], expected, rtol=0, atol=1e-12)


def assert_groups(pair, x_BNC: torch.Tensor, group_BN: torch.Tensor) -> None:
    """The pair puts tokens of one group, and no others, into one row, which holds their mean."""
    B, N, _ = x_BNC.shape
    row_BN, merged_BMC = rows_of(pair, B, N), pair[0](x_BNC)
    for b in range(B):
        assert torch.equal(row_BN[b, :, None] == row_BN[b], group_BN[b, :, None] == group_BN[b])
        for group in group_BN[b].unique():
            expected = x_BNC[b, group_BN[b] == group].mean(dim=0)
            torch.testing.assert_close(merged_BMC[b, row_BN[b, group_BN[b] == group][0]], expected, rtol=0, atol=1e-12)


@PLAIN
@given(B=st.integers(1, 2), H=SIDES, W=SIDES, window=STRIDES, local=RATIOS, ratio=RATIOS, seed=SEEDS)
def test_local_then_global_is_the_plain_form(B, H, W, window, local, ratio, seed):
    x_BNC = tokens(B, H * W, 5, seed=seed)
    pair = local_then_global(x_BNC, (H, W), window=window, local=local, ratio=ratio)
    assert_groups(
        pair, x_BNC, torch.stack([plain_local_then_global(x_NC, H, W, window, local, ratio) for x_NC in x_BNC])
    )


@PLAIN
@given(
    B=st.integers(1, 2), N=st.integers(1, 40), ratio=RATIOS, margin=st.sampled_from([-1.0, 0.0, 0.5, 0.9]), seed=SEEDS
)
def test_energy_protected_is_the_plain_form(B, N, ratio, margin, seed):
    x_BNC = tokens(B, N, 5, seed=seed)
    pair = energy_protected(x_BNC, ratio=ratio, margin=margin)
    assert_groups(pair, x_BNC, torch.stack([plain_energy_protected(x_NC, ratio, margin) for x_NC in x_BNC]))


@PLAIN
@given(B=st.integers(1, 2), H=SIDES, W=SIDES, data=st.data(), seed=SEEDS)
def test_merge_grid_is_the_plain_form(B, H, W, data, seed):
    size = (data.draw(st.integers(1, H)), data.draw(st.integers(1, W)))
    x_BNC = tokens(B, H * W, 5, seed=seed)
    pair = merge_grid(x_BNC, (H, W), size=size)
    group_BN = torch.stack([plain_merge_grid(x_NC, H, W, size) for x_NC in x_BNC])
    assert_groups(pair, x_BNC, group_BN)
    assert torch.equal(rows_of(pair, B, H * W), group_BN)  # row-major in the smaller grid, too
    by_magnitude = merge_grid(x_BNC, (H, W), size=size, kind="magnitude")[0](x_BNC)
    for b in range(B):
        for group in range(size[0] * size[1]):
            members_NC = x_BNC[b, group_BN[b] == group]
            farthest_C = members_NC.gather(0, members_NC.abs().argmax(dim=0)[None])[0]
            assert torch.equal(by_magnitude[b, group], farthest_C)


def test_rare_tokens_are_protected_and_busy_places_stay_fine():
    """Golden by hand: six tokens of a uniform region and two that stand alone."""
    x_N2 = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    merge, unmerge = energy_protected(x_N2[None], ratio=0.375, margin=0.5)  # three go, all of the six
    assert merge(x_N2[None]).shape == (1, 5, 2)
    assert torch.equal(unmerge(merge(x_N2[None]))[0], x_N2)
    line = torch.tensor([0.0, 0.1, 0.2, 1.5, 3.0])  # angles; the edge between busy and uniform is kept
    x_1NC = torch.stack([line.cos(), line.sin()], dim=-1)[None]
    assert rows_of(merge_grid(x_1NC, (1, 5), size=(1, 3)), 1, 5).tolist() == [[0, 0, 0, 1, 2]]


@PROPERTY
@given(H=SIDES, W=SIDES, stride=STRIDES, seed=SEEDS)
def test_neighbours_are_averages_of_cells(H, W, stride, seed):
    map_BHWC = tokens(2, H, W, 3, seed=seed)
    merge, unmerge = neighbour_2d((H, W), stride=stride)
    back_BHWC = unmerge(merge(map_BHWC.flatten(1, 2))).unflatten(1, (H, W))
    merge, unmerge = neighbour_1d(H * W, stride=stride)
    back_BNC = unmerge(merge(map_BHWC.flatten(1, 2)))
    for r in range(H):
        for c in range(W):
            r0, c0, n0 = r // stride * stride, c // stride * stride, (r * W + c) // stride * stride
            cell = map_BHWC[:, r0 : r0 + stride, c0 : c0 + stride].flatten(1, 2)
            group = map_BHWC.flatten(1, 2)[:, n0 : n0 + stride]
            cell = map_BHWC[:, r, c, None] if H < stride and W < stride else cell
            group = map_BHWC[:, r, c, None] if H * W < stride else group
            torch.testing.assert_close(back_BHWC[:, r, c], cell.mean(dim=1), rtol=0, atol=1e-12)
            torch.testing.assert_close(back_BNC[:, r * W + c], group.mean(dim=1), rtol=0, atol=1e-12)


@PROPERTY
@given(
    H=SIDES, W=SIDES, ratio=RATIOS, stride=STRIDES, seed=SEEDS, dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_constant_tokens_come_back_exactly(H, W, ratio, stride, seed, dtype):
    x_BNC = tokens(2, 1, 6, seed=seed, dtype=dtype).repeat(1, H * W, 1)
    for name, (merge, unmerge) in all_pairs(x_BNC, H, W, ratio, stride).items():
        assert torch.equal(unmerge(merge(x_BNC)), x_BNC), name


@PROPERTY
@given(H=SIDES, W=SIDES, ratio=RATIOS, stride=STRIDES)
def test_token_counts(H, W, ratio, stride):
    N = H * W
    x_BNC = tokens(1, N, 4)
    counts = {name: merge(x_BNC).shape[1] for name, (merge, _) in all_pairs(x_BNC, H, W, ratio, stride).items()}
    destinations = (H // stride) * (W // stride)
    assert counts["bipartite_2d"] == (N - min(int(N * ratio), N - destinations) if destinations else N)
    too_small = H < stride and W < stride
    assert counts["neighbour_2d"] == (N if too_small else -(-H // stride) * -(-W // stride))
    assert counts["neighbour_1d"] == (N if N < stride else -(-N // stride))
    left = N - int(destinations * ratio) * (stride**2 - 1)
    assert counts["local_then_global"] == left - min(int(left * ratio), left // 2)
    assert counts["energy_protected"] == N - min(int(N * ratio), N // 2)
    assert counts["merge_grid"] == counts["merge_grid by magnitude"] == -(-H // stride) * -(-W // stride)
    for name, (merge, unmerge) in all_pairs(x_BNC, H, W, ratio, stride).items():
        # Other channels than the metric's go through, too.
        assert unmerge(merge(x_BNC[..., :2])).shape == (1, N, 2), name


@PROPERTY
@given(H=SIDES, W=SIDES, ratio=RATIOS, stride=STRIDES, seed=SEEDS)
def test_images_of_a_batch_do_not_mix(H, W, ratio, stride, seed):
    x_BNC, other_BNC = tokens(3, H * W, 4, seed=seed), tokens(3, H * W, 4, seed=seed + 1)
    other_BNC[1] = x_BNC[1]
    pairs, other_pairs = all_pairs(x_BNC, H, W, ratio, stride), all_pairs(other_BNC, H, W, ratio, stride)
    for name in pairs:
        (merge, unmerge), (other_merge, other_unmerge) = pairs[name], other_pairs[name]
        assert torch.equal(unmerge(merge(x_BNC))[1], other_unmerge(other_merge(other_BNC))[1]), name


@PROPERTY
@given(H=SIDES, W=SIDES, ratio=RATIOS, stride=STRIDES, seed=SEEDS, order=st.permutations(range(4)))
def test_permuting_the_batch_commutes(H, W, ratio, stride, seed, order):
    x_BNC = tokens(4, H * W, 4, seed=seed)
    pairs, permuted_pairs = all_pairs(x_BNC, H, W, ratio, stride), all_pairs(x_BNC[order], H, W, ratio, stride)
    for name in pairs:
        (merge, unmerge), (permuted_merge, permuted_unmerge) = pairs[name], permuted_pairs[name]
        merged, permuted = merge(x_BNC), permuted_merge(x_BNC[order])
        assert torch.equal(merged[order], permuted), name
        assert torch.equal(unmerge(merged)[order], permuted_unmerge(permuted)), name


@PROPERTY
@given(H=SIDES, W=SIDES, stride=STRIDES)
def test_ratio_0_and_stride_1_are_the_identity(H, W, stride):
    x_BNC = tokens(2, H * W, 4)
    assert bipartite_2d(x_BNC, (H, W), ratio=0, stride=stride) == (identity, identity)
    for ratio, forms in ((0.9, ("bipartite_2d", "neighbour_2d", "neighbour_1d", "merge_grid")), (0.0, None)):
        pairs = all_pairs(x_BNC, H, W, ratio, 1)
        assert all(pairs[name] == (identity, identity) for name in forms or pairs)
    assert identity(x_BNC) is x_BNC


@PROPERTY
@given(H=st.integers(1, 4), W=st.integers(1, 4), ratio=RATIOS)
def test_a_grid_smaller_than_the_stride_merges_nothing(H, W, ratio):
    x_BNC = tokens(1, H * W, 4)
    pairs = all_pairs(x_BNC, H, W, ratio, 5)
    assert pairs["bipartite_2d"] == pairs["neighbour_2d"] == (identity, identity)
    assert neighbour_1d(4, stride=5) == (identity, identity)
    assert bipartite_2d(tokens(1, 4 * 9, 2), (4, 9), ratio=0.9, stride=5) == (identity, identity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [(24, 36), (13, 17)])
def test_chunks_change_nothing(grid, dtype):
    x_BNC = tokens(2, grid[0] * grid[1], 32, dtype=dtype)
    merge, _ = bipartite_2d(x_BNC, grid, ratio=0.8, stride=4, chunk_bytes=2**40)
    for chunk_bytes in (2**12, 2**14, 2**16, 2**18):
        chunked_merge, _ = bipartite_2d(x_BNC, grid, ratio=0.8, stride=4, chunk_bytes=chunk_bytes)
        assert torch.equal(merge(x_BNC), chunked_merge(x_BNC))


def test_chunks_change_nothing_of_energies_and_of_matching():
    x_BNC = tokens(2, 13 * 17, 16)
    for make in (
        lambda chunk: energy_protected(x_BNC, ratio=0.4, margin=0.2, chunk_bytes=chunk),
        lambda chunk: local_then_global(x_BNC, (13, 17), window=2, local=0.5, ratio=0.4, chunk_bytes=chunk),
    ):
        expected = rows_of(make(2**40), 2, 13 * 17)
        for chunk_bytes in (2**10, 2**14, 2**18):
            assert torch.equal(rows_of(make(chunk_bytes), 2, 13 * 17), expected)


PEAK = """
import ctypes, pathlib, torch
from segzoo.layers.merging import bipartite_2d

def resident(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 2**10

torch.set_num_threads(1)
bipartite_2d(torch.randn(1, 64, 8), (8, 8), ratio=0.5, stride=2)  # libraries load
torch.randn(500, 500) @ torch.randn(500, 500)
for grid, chans, options in {calls}:
    metric = torch.randn(1, grid[0] * grid[1], chans)
    ctypes.CDLL(None).malloc_trim(0)  # what the heap still holds would hide a small peak
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident now
    before = resident("VmRSS")
    pair = bipartite_2d(metric, grid, **options)
    print(resident("VmHWM") - before)
    del pair, metric
"""


@pytest.mark.slow
def test_matching_of_the_largest_images_fits_in_64_mib():
    """SegFormer-B5 at 3840x2160: every matching of the presets hq and fast, and queries of the second stage."""
    keys_values, queries = [(67, 120), (67, 120)], {1: (270, 480), 2: (135, 240), 3: (68, 120)}
    calls = [(keys_values[i], (64, 128)[i], ratio, stride) for i in (0, 1) for ratio, stride in ((0.6, 2), (0.9, 4))]
    calls += [(queries[i], (64, 128, 320, 512)[i], ratio, 4) for i in (2, 3) for ratio in (0.8, 0.9)]
    calls += [(queries[1], 128, 0.8, 4), ((90, 120), 64, 0.6, 2)]
    calls = [(grid, chans, {"ratio": ratio, "stride": stride}) for grid, chans, ratio, stride in calls]
    grid, chans, options = calls[-1]
    calls.append((grid, chans, {**options, "chunk_bytes": 2**40}))
    root = Path(__file__).resolve().parent.parent
    code = PEAK.format(calls=calls)
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    *peaks, unchunked = [float(line) for line in result.stdout.split()]
    assert len(peaks) == len(calls) - 1
    assert max(peaks) < 64
    # 8100 sources against 2700 destinations take 83 MiB at once: a measurement that misses them proves nothing.
    assert unchunked > 80


@pytest.mark.parametrize(
    "call",
    [
        lambda x: bipartite_2d(x, (2, 2), ratio=-0.1, stride=2),
        lambda x: bipartite_2d(x, (2, 2), ratio=1.1, stride=2),
        lambda x: bipartite_2d(x, (2, 2), ratio=float("nan"), stride=2),
        lambda x: bipartite_2d(x, (2, 2), ratio=0.5, stride=0),
        lambda x: bipartite_2d(x, (2, 2), ratio="half", stride=2),
        lambda x: bipartite_2d(x, (2, 2), ratio=0.5, stride=1.5),
        lambda x: bipartite_2d(x, (2, 3), ratio=0.5, stride=2),
        lambda x: bipartite_2d(x, (2, 2), ratio=0.5, stride=2)[0](x[:, :3]),
        lambda x: neighbour_2d((2, 2), stride=0),
        lambda x: neighbour_2d((2, 2), stride=1.5),
        lambda x: neighbour_2d((2, 3), stride=2)[0](x),
        lambda x: neighbour_1d(4, stride=0),
        lambda x: neighbour_1d(4, stride="2"),
        lambda x: neighbour_1d(6, stride=2)[0](x),
        lambda x: local_then_global(x, (2, 2), window=0, local=0.5, ratio=0.5),
        lambda x: local_then_global(x, (2, 2), window=2, local=1.5, ratio=0.5),
        lambda x: local_then_global(x, (2, 2), window=2, local=0.5, ratio=-1),
        lambda x: local_then_global(x, (2, 3), window=2, local=0.5, ratio=0.5),
        lambda x: local_then_global(x, (2, 2), window=2, local=0.5, ratio=0.5)[0](x[:, :3]),
        lambda x: energy_protected(x, ratio=1.5, margin=0.5),
        lambda x: energy_protected(x, ratio=0.5, margin=2),
        lambda x: energy_protected(x, ratio=0.5, margin=0.5)[0](x[:, :3]),
        lambda x: merge_grid(x, (2, 3), size=(1, 1)),
        lambda x: merge_grid(x, (2, 2), size=(3, 1)),
        lambda x: merge_grid(x, (2, 2), size=(1, 0)),
        lambda x: merge_grid(x, (2, 2), size=(1, 1), kind="max"),
        lambda x: merge_grid(x, (2, 2), size=(1, 1))[0](x[:, :3]),
    ],
)
def test_functions_refuse_by_name(call):
    functions = "bipartite_2d|neighbour_2d|neighbour_1d|local_then_global|energy_protected|merge_grid"
    with pytest.raises(segzoo.SegzooError, match=f"({functions}): .*(ratio|stride|grid|window|local|margin|size|kind)"):
        call(tokens(1, 4, 3))


# --- in models ------------------------------------------------------------------------------------------------------

LATER = [LocalGlobal(2, 0.5, 0.3), EnergyProtected(0.4), GridMerge(1.5), GridMerge(2, "magnitude")]
ENTRIES = [
    Bipartite(0.6, 2),
    Neighbour2d(2),
    Neighbour1d(3),
    Pool(2),
    Pool(2, "max"),
    OverlapPool(2),
    Window(9),
    *LATER,
]

MERGING = ["test_eft", "test_edaformer", "test_mit", "test_segformer", "test_segvit", "test_segvit_shrunk"]


@pytest.fixture
def image():
    return tokens(2, 3, 96, 160, dtype=torch.float32)


@pytest.mark.parametrize("entry", ENTRIES, ids=repr)
@pytest.mark.parametrize("name", MERGING)
def test_every_layer_with_a_leaf_merges(name, entry, image):
    torch.manual_seed(0)
    model = segzoo.create_model(name).eval()
    with torch.no_grad():
        before = model(image)
        for site, (leaf, *_) in segzoo.reduction_sites(model).items():
            if leaf.side == "q" and entry in (Pool(2, "max"), OverlapPool(2), Window(9)):
                continue  # queries are averaged, each once
            with segzoo.inference_reduction(model, {site: entry}):
                merged = model(image)
            assert merged.isfinite().all()
            assert not torch.equal(merged, before), site
        assert torch.equal(model(image), before)


@pytest.mark.parametrize("preset", ["hq", "fast", "n2d"])
def test_merging_in_training(preset, image):
    torch.manual_seed(0)
    model = segzoo.create_model("test_segformer", drop_path_rate=0.0, dropout=0.0)
    scores = model(image)
    model.set_inference_reduction(preset)
    assert torch.equal(model(image), scores)  # neutral in training ...
    model.set_inference_reduction(preset, during_training=True)
    merged = model(image)
    assert not torch.equal(merged, scores)  # ... unless asked for
    merged.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_of_merging():
    """The average is differentiated as an average; the matching is a constant."""
    x_BNC = tokens(2, 24, 3).requires_grad_()
    for merge, unmerge in all_pairs(x_BNC, 4, 6, 0.7, 2).values():
        assert torch.autograd.gradcheck(lambda x, merge=merge, unmerge=unmerge: unmerge(merge(x).sin()), x_BNC)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hq", "fast", "isr", "n2d"])
def test_presets_compile_and_export(preset, image):
    model = segzoo.create_model("test_segformer").eval()
    model.set_inference_reduction(preset)
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image), expected)
        exported = torch.export.export(model, (image,)).module()
        torch.testing.assert_close(exported(image), expected)
        meta = model.to("meta")
        assert meta(image.to("meta")).shape == expected.shape


class BothLeaves(torch.nn.Module):
    """Queries there and back, and what keys and values would be."""

    def __init__(self):
        super().__init__()
        self.q_reduction = QueryReduction(part="encoder", level=0)
        self.kv_reduction = KeyValueReduction(part="encoder", level=0, trained=2)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        q_BNC, restore = self.q_reduction(x_BHWC)
        return restore(q_BNC.sin()) + self.kv_reduction(x_BHWC).sum(dim=1)[:, None, None]


@pytest.mark.parametrize("entry", [*LATER, Window(3)], ids=repr)
def test_entries_compile_export_and_take_bfloat16(entry):
    torch.manual_seed(0)
    leaves, x_BHWC = BothLeaves().eval(), torch.randn(2, 12, 10, 4)
    plan = {"encoder": entry} if entry == Window(3) else {"encoder": entry, "encoder.q": entry}
    segzoo.set_inference_reduction(leaves, plan)
    expected = leaves(x_BHWC)
    torch.testing.assert_close(torch.compile(leaves, fullgraph=True, backend="eager")(x_BHWC), expected)
    torch.testing.assert_close(torch.export.export(leaves, (x_BHWC,)).module()(x_BHWC), expected)
    assert leaves(x_BHWC.bfloat16()).isfinite().all()
    assert leaves(x_BHWC.to("meta")).shape == expected.shape


def test_cost_of_the_matching_is_what_the_docstrings_say():
    """The leaf alone, so that all that is counted is the matching of 12 x 16 = 192 tokens of 10 channels."""
    leaf = QueryReduction(part="encoder", level=0).eval()
    x_BHWC = torch.empty(1, 12, 16, 10, device="meta")
    left = 192 - 24 * 3  # half of the 48 windows of four
    for entry, macs in (
        (LocalGlobal(2, 0.5, 0.3), (left // 2) ** 2 * 10),
        (EnergyProtected(0.25), 192**2 * 10 + 48**2 * 10),
        (GridMerge(2), 0),
        (Bipartite(0.5, 2), 48 * 144 * 10),
    ):
        leaf.entry = entry
        with FlopCounterMode(display=False) as counter:
            leaf(x_BHWC)
        assert counter.get_total_flops() == 2 * macs, entry


def test_what_keeps_a_grid_feeds_a_strided_convolution():
    torch.manual_seed(0)
    x_BHWC = torch.randn(2, 11, 14, 6)
    depthwise = torch.nn.Conv2d(6, 6, 3, 2, 1, groups=6)
    for entry, grid in ((GridMerge(2), (6, 7)), (GridMerge(1.5), (8, 10)), (Window(3), (3, 4)), (Pool(2), (5, 7))):
        map_BHWC = reduce_map(entry, x_BHWC)
        assert map_BHWC.shape == (2, *grid, 6)
        assert depthwise(map_BHWC.permute(0, 3, 1, 2)).shape == (2, 6, -(-grid[0] // 2), -(-grid[1] // 2))


@pytest.mark.parametrize("preset", ["hq", "fast", "n2d"])
def test_merging_in_low_precision(preset, image):
    model = segzoo.create_model("test_segformer").eval()
    model.set_inference_reduction(preset)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(image).isfinite().all()
        scores = model.bfloat16()(image.bfloat16())
    assert scores.dtype == torch.bfloat16
    assert scores.isfinite().all()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("hp", "hp.*presets: base, hq, fast, n2d"),
        ({"encoder": "hq"}, "no reduction entry"),
        ({"encoder": {"type": "Tripartite", "ratio": 0.5, "stride": 2}}, "no reduction entry"),
        ({"encoder": {"type": "Bipartite", "ratio": 1.5, "stride": 2}}, "ratio"),
        ({"encoder": {"type": "Bipartite", "ratio": -0.5, "stride": 2}}, "ratio"),
        ({"encoder": {"type": "Bipartite", "ratio": 0.5, "stride": 0}}, "stride"),
        ({"encoder": {"type": "Neighbour2d", "stride": 0}}, "stride"),
        ({"encoder.q": {"type": "Neighbour1d", "stride": -1}}, "stride"),
        ({"encoder.q": {"type": "Pool", "factor": 2, "kind": "max"}}, "average"),
        ({"encoder.q": {"type": "OverlapPool", "factor": 2}}, "encoder.0.q takes"),
        ({"encoder": {"type": "LocalGlobal", "window": 2, "local": 2, "ratio": 0.5}}, "LocalGlobal: local"),
        ({"encoder": {"type": "LocalGlobal", "window": 2, "ratio": 0.5}}, "no reduction entry"),
        ({"encoder": {"type": "EnergyProtected", "ratio": 0.5, "margin": 3}}, "EnergyProtected: margin"),
        ({"encoder": {"type": "GridMerge", "factor": 0.5}}, "GridMerge: factor"),
        ({"encoder.q": {"type": "Window", "side": 3}}, "encoder.0.q takes"),
        ("[16,8,2,1]", "trained pooling windows"),
        ({"encoder.4": 2}, "encoder.4"),
        ({"encoder": (2, 2)}, "4 levels"),
    ],
)
def test_plans_refused_by_name_before_anything_changes(plan, message):
    model = segzoo.create_model("test_segformer")
    before = model.set_inference_reduction("hq")
    with pytest.raises(segzoo.SegzooError, match=message):
        model.set_inference_reduction(plan)
    assert segzoo.plans.current_plan(model) == before


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), True, "half"])
def test_entries_refuse_a_ratio(ratio):
    with pytest.raises(segzoo.SegzooError, match="Bipartite: ratio"):
        Bipartite(ratio, 2)


@pytest.mark.parametrize("make", [lambda s: Bipartite(0.5, s), Neighbour2d, Neighbour1d])
@pytest.mark.parametrize("stride", [0, -1, 1.5, True])
def test_entries_refuse_a_stride(make, stride):
    with pytest.raises(segzoo.SegzooError, match="stride"):
        make(stride)
