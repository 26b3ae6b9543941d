"""Inference reduction through the public API: plans, refusals, restoring, and what a leaf computes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

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
from segzoo.layers.reduction import GridReduction, KeyValueReduction, QueryReduction
from segzoo.plans import current_plan


@pytest.fixture
def model():
    torch.manual_seed(0)
    return segzoo.create_model("test_edaformer").eval()


KV_SITES = ["encoder.0", "encoder.1", "encoder.2", "encoder.3", "decoder.0", "decoder.1", "decoder.2"]


def test_sites(model):
    sites = segzoo.reduction_sites(model)
    assert [site for site in sites if not site.endswith(".q")] == KV_SITES
    assert {site.removesuffix(".q") for site in sites} == set(KV_SITES)
    assert [len(sites[f"encoder.{i}"]) for i in range(4)] == [1, 1, 2, 1]
    assert list(segzoo.reduction_sites(model.encoder)) == [site for site in sites if site.startswith("encoder")]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (2, dict.fromkeys(KV_SITES, Pool(2))),
        ("2", dict.fromkeys(KV_SITES, Pool(2))),
        (Pool(2, "max"), dict.fromkeys(KV_SITES, Pool(2, "max"))),
        ({"encoder": 2}, {f"encoder.{i}": Pool(2) for i in range(4)}),
        ({"encoder": (2, 2, 1, None)}, {"encoder.0": Pool(2), "encoder.1": Pool(2)}),
        ({"decoder": [1, 1, OverlapPool(2)]}, {"decoder.2": OverlapPool(2)}),
        ({"encoder.2": Neighbour1d(3)}, {"encoder.2": Neighbour1d(3)}),
        ({"encoder.0": 4, "encoder": 2}, {"encoder.0": Pool(4), **{f"encoder.{i}": Pool(2) for i in (1, 2, 3)}}),
        ({"encoder.q": (1, 1, 1, Bipartite(0.5, 2))}, {"encoder.3.q": Bipartite(0.5, 2)}),
        ({"encoder.1.q": Neighbour2d(2)}, {"encoder.1.q": Neighbour2d(2)}),
        (np.int64(2), dict.fromkeys(KV_SITES, Pool(2))),
        ({"decoder": (1, np.int32(2), {"type": "Neighbour1d", "stride": np.uint8(2)})},
         {"decoder.1": Pool(2), "decoder.2": Neighbour1d(2)}),
        ('{"decoder": {"type": "Bipartite", "ratio": 0.5, "stride": 2}}',
         {f"decoder.{i}": Bipartite(0.5, 2) for i in range(3)}),
        ({"encoder.0.q": LocalGlobal(2, 0.5, 0.25), "encoder.0": EnergyProtected(0.25), "encoder.1": GridMerge(1.5)},
         {"encoder.0.q": LocalGlobal(2, 0.5, 0.25), "encoder.0": EnergyProtected(0.25, 0.5),
          "encoder.1": GridMerge(1.5, "avg")}),
        ({"decoder": (3, 3, Window(9))}, {"decoder.0": Pool(3), "decoder.1": Pool(3), "decoder.2": Window(9)}),
        ("[16,8,2,1]-[2,4,8]",
         {site: Pool(2) for site in ("encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2")}),
        ("[8-4-2-1]-[3-6-9]", {"decoder.0": Pool(3), "decoder.1": Pool(3), "decoder.2": Window(9)}),
        (" [8, 4, 3, 1] [1, 2, 4] ", {"encoder.2": Window(3)}),
        ("optimal", {site: Pool(2) for site in ("encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2")}),
        ({}, {}),
        (1, {}),
        (None, {}),
    ],
)  # fmt: skip
def test_forms_of_a_plan(model, plan, expected):
    in_force = model.set_inference_reduction(plan)
    assert {site: entry for site, entry in in_force.items() if entry != Pool(1)} == expected
    assert set(in_force) == set(segzoo.reduction_sites(model))
    assert current_plan(model) == in_force
    # A plan in force is itself a plan, also as JSON.
    assert model.set_inference_reduction(in_force) == in_force
    assert model.set_inference_reduction(in_force.to_json()) == in_force
    json.loads(in_force.to_json())
    with torch.no_grad():
        assert model(torch.randn(1, 3, 70, 90)).isfinite().all()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("swift", "swift.*presets: base, decoder, optimal, fast"),
        ({"backbone": 2}, "no part or site 'backbone'.*Sites of this model: .*encoder.0.*presets"),
        ({"encoder.9": 2}, "encoder.9"),
        ({"encoder.grid": 2}, "encoder.grid"),
        ({"encoder": (2, 2)}, "4 levels.*2 entries"),
        ({"encoder": "2"}, "no reduction entry"),
        ({"encoder": 0}, "at least 1"),
        ({"encoder": -2}, "at least 1"),
        ({"encoder": 2.5}, "no reduction entry"),
        ({"encoder": True}, "no reduction entry"),
        ({"encoder": np.int64(0)}, "at least 1"),
        ({"encoder": np.float32(2)}, "no reduction entry"),
        ({"encoder": {"type": "Pool"}}, "no reduction entry"),
        ({"encoder": {"type": ["Pool"], "factor": 2}}, "no reduction entry"),
        ({"type": ["x"]}, "no reduction entry"),
        ({"encoder": {"type": "Pool", "faktor": 2}}, "no reduction entry"),
        ({"encoder.0.q": OverlapPool(2)}, "site encoder.0.q takes .*not OverlapPool"),
        ({"encoder.0.q": Pool(2, "max")}, "average only"),
        ("{nonsense", "not valid JSON"),
        ({"encoder": {"type": "GridMerge", "factor": 0}}, "factor"),
        ({"encoder.0": Window(7)}, "encoder.0 was trained with windows of 8 x 8"),
        ({"encoder.0.q": Window(9)}, "site encoder.0.q takes .*not Window"),
        ("[16,8,2,1]", r"\[8,4,2,1\]-\[1,2,4\]"),
        ("[16,8,2]-[1,2,4]", r"\[8,4,2,1\]-\[1,2,4\]"),
        ("[16,8,2,1]-[1,2,4", r"\[8,4,2,1\]-\[1,2,4\]"),
        ("[4,4,2,1]-[1,2,4]", r"encoder.0 was trained with 8.*\[8,4,2,1\]-\[1,2,4\]"),
        ("[8,4,2,0]-[1,2,4]", "window of 0"),
        (object(), "no reduction entry"),
    ],
)
def test_a_wrong_plan_is_refused_as_a_whole(model, plan, message):
    before = model.set_inference_reduction({"encoder": (2, 1, 1, 1)})
    with pytest.raises(segzoo.SegzooError, match=message):
        model.set_inference_reduction(plan)
    assert current_plan(model) == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pool(0), "factor"),
        (lambda: Pool(2, "median"), "kind"),
        (lambda: Pool(1.5), "factor"),
        (lambda: OverlapPool(0), "factor"),
        (lambda: Bipartite(1.5, 2), "ratio"),
        (lambda: Bipartite(-0.1, 2), "ratio"),
        (lambda: Bipartite(float("nan"), 2), "ratio"),
        (lambda: Bipartite(0.5, 0), "stride"),
        (lambda: Neighbour2d(0), "stride"),
        (lambda: Neighbour1d(0), "stride"),
        (lambda: Window(0), "side"),
        (lambda: LocalGlobal(0, 0.5, 0.5), "window"),
        (lambda: LocalGlobal(2, True, 0.5), "local"),
        (lambda: LocalGlobal(2, 0.5, float("nan")), "ratio"),
        (lambda: EnergyProtected(1.5), "ratio"),
        (lambda: EnergyProtected(0.5, "high"), "margin"),
        (lambda: GridMerge(0.9), "factor"),
        (lambda: GridMerge(float("inf")), "factor"),
        (lambda: GridMerge(2, "max"), "kind"),
    ],
)
def test_wrong_entries_are_refused_by_name(make, message):
    with pytest.raises(segzoo.SegzooError, match=message):
        make()


def test_numbers_of_numpy_become_pythons():
    entries = [Bipartite(np.float32(0.5), np.int64(2)), Pool(np.uint8(2)), OverlapPool(np.int32(3))]
    assert entries == [Bipartite(0.5, 2), Pool(2), OverlapPool(3)]
    values = [value for entry in entries for value in dataclasses.astuple(entry)]
    assert {type(value) for value in values} == {float, int, str}


def test_context_manager_restores_also_after_an_error(model):
    before = model.set_inference_reduction({"encoder": (2, 1, 1, 1)}, during_training=True)
    with pytest.raises(RuntimeError), segzoo.inference_reduction(model, "fast") as plan:
        assert current_plan(model) == plan
        raise RuntimeError
    assert current_plan(model) == before
    assert all(leaf.during_training for leaf in segzoo.reduction_sites(model)["encoder.0"])


def test_print_shows_every_leaf(model):
    model.set_inference_reduction({"encoder": (2, 1, 1, 1)})
    text = str(model)
    assert "site=encoder.0, factor=Pool(2, avg), trained=8" in text
    assert "site=decoder.2, factor=1, trained=4" in text


def test_a_module_without_leaves_is_refused_by_name():
    with pytest.raises(segzoo.SegzooError, match="no reduction sites"):
        segzoo.set_inference_reduction(torch.nn.Linear(2, 2), 2)


def test_pools_are_the_torch_pools_of_the_multiplied_window():
    leaf = KeyValueReduction(part="encoder", level=0, trained=2).eval()
    x_BHWC = torch.randn(2, 13, 17, 5)
    x_BCHW = x_BHWC.permute(0, 3, 1, 2)
    cases = {
        Pool(1): F.avg_pool2d(x_BCHW, 2),
        Pool(3): F.avg_pool2d(x_BCHW, 6),
        Pool(3, "max"): F.max_pool2d(x_BCHW, 6),
        OverlapPool(2): F.avg_pool2d(x_BCHW, 7, 4, 3),
        Pool(100): x_BCHW.mean(dim=(2, 3), keepdim=True),
        Window(2): F.avg_pool2d(x_BCHW, 2),
        Window(5): F.avg_pool2d(x_BCHW, 5),
        Window(15): F.avg_pool2d(x_BCHW, (13, 15)),
        Window(100): x_BCHW.mean(dim=(2, 3), keepdim=True),
        Neighbour2d(2): F.avg_pool2d(F.avg_pool2d(x_BCHW, 2), 2, ceil_mode=True),
        Neighbour1d(5): F.avg_pool1d(F.avg_pool2d(x_BCHW, 2).flatten(2), 5, ceil_mode=True)[..., None],
    }
    for entry, expected in cases.items():
        leaf.entry = entry
        torch.testing.assert_close(
            leaf(x_BHWC), expected.flatten(2).transpose(1, 2), msg=lambda m, e=entry: f"{e}: {m}"
        )


def test_queries_come_back_to_their_places():
    leaf = QueryReduction(part="encoder", level=0).eval()
    x_BHWC = torch.randn(2, 7, 9, 4)
    for entry, count in [
        (Pool(1), 63),
        (Pool(2), 20),
        (Neighbour2d(4), 6),
        (Neighbour1d(4), 16),
        (Bipartite(0.5, 2), 32),
        (LocalGlobal(3, 0.5, 0.25), 30),
        (EnergyProtected(0.25), 48),
        (GridMerge(2), 20),
    ]:
        leaf.entry = entry
        tokens_BNC, restore = leaf(x_BHWC)
        assert tokens_BNC.shape == (2, count, 4), entry
        assert restore(tokens_BNC).shape == x_BHWC.shape
        constant = torch.full_like(x_BHWC, 0.3)
        tokens_BNC, restore = leaf(constant)
        torch.testing.assert_close(restore(tokens_BNC), constant)


def test_neutral_settings_and_windows_as_trained_are_bit_exact(model):
    x_BCHW = torch.randn(1, 3, 64, 96)
    windows = {"encoder": [Window(side) for side in (8, 4, 2, 1)], "decoder": [Window(side) for side in (1, 2, 4)]}
    nothing = (LocalGlobal(3, 0, 0), EnergyProtected(0), GridMerge(1))
    with torch.no_grad():
        expected = model(x_BCHW)
        for plan in (windows, *(dict.fromkeys(("encoder", "encoder.q", "decoder"), entry) for entry in nothing)):
            model.set_inference_reduction(plan)
            assert torch.equal(model(x_BCHW), expected)


def test_notation_of_an_encoder_alone(model):
    plan = segzoo.set_inference_reduction(model.encoder, "[16,4,3,1]")
    assert {site: entry for site, entry in plan.items() if entry != Pool(1)} == {
        "encoder.0": Pool(2),
        "encoder.2": Window(3),
    }


def test_grid_shrinks_to_one_at_most():
    leaf = GridReduction(part="encoder", trained=12).eval()
    sides = []
    for factor in (1, 2, 5, 100):
        leaf.entry = Pool(factor)
        sides.append(leaf())
    assert sides == [12, 6, 2, 1]


# Tokens that are left of 16 x 24, 8 x 12, 4 x 6 and 2 x 3, counted by hand from what the entries' docstrings say.
LEFT = {
    Bipartite(0.6, 2): (154, 39, 10, 3),
    Bipartite(0.9, 4): (39, 10, 3, 6),  # 2 x 3 has no cell of 4 x 4
    Neighbour2d(2): (96, 24, 6, 2),
    Neighbour1d(2): (192, 48, 12, 3),
    LocalGlobal(2, 0.5, 0.3): (168, 42, 11, 5),
    EnergyProtected(0.4): (231, 58, 15, 4),
    GridMerge(1.5): (176, 48, 12, 4),
    GridMerge(2, "magnitude"): (96, 24, 6, 2),
}


@pytest.mark.parametrize("entry", LEFT, ids=repr)
def test_every_site_has_so_many_tokens(model, entry):
    """At 64 x 96 the pools that the model was trained with leave keys and values on 2 x 3 everywhere."""
    counts = LEFT[entry]
    expected = dict.fromkeys(KV_SITES, counts[-1])
    expected |= {f"encoder.{i}.q": count for i, count in enumerate(counts)}
    expected |= {f"decoder.{i}.q": count for i, count in enumerate(counts[:0:-1])}
    seen = {}

    def note(leaf, _, output):
        tokens_BNC = output[0] if leaf.side == "q" else output
        seen[leaf.site] = tokens_BNC.shape[1]

    sites = segzoo.reduction_sites(model)
    for leaf in (leaf for leaves in sites.values() for leaf in leaves):
        leaf.register_forward_hook(note)
    one_pixel = torch.randn(2, 3, 1, 1)
    with torch.no_grad():
        alone = model(one_pixel)
        model.set_inference_reduction(dict.fromkeys(("encoder", "decoder", "encoder.q", "decoder.q"), entry))
        model(torch.randn(2, 3, 64, 96))
        assert seen == {site: expected[site] for site in sites}
        assert torch.equal(model(one_pixel), alone)  # of one token nothing can be merged


def test_reduction_in_training_gives_gradients():
    model = segzoo.create_model("test_edaformer").train()
    model.set_inference_reduction({"encoder": Bipartite(0.6, 2), "encoder.q": Bipartite(0.6, 2)}, during_training=True)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "entry",
    [
        *(Pool(1), Pool(2), Window(3), Neighbour2d(2), Neighbour1d(3)),
        *(Bipartite(0.5, 2), LocalGlobal(2, 0.5, 0.3), EnergyProtected(0.4), GridMerge(1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("trained", [1, 2])
def test_the_assignment_names_the_token_that_each_position_went_into(entry, trained):
    """A token of keys and values is the mean of what is assigned to it; with windows first, the mean of its windows."""
    leaf = KeyValueReduction(part="encoder", level=0, trained=trained).eval()
    leaf.entry = entry
    x = torch.randn(2, 7, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, assigned = leaf(x), leaf.assignment(x)
    assert assigned.shape == (2, 7, 10)
    for b in range(2):
        for m in range(tokens.shape[1]):
            members = x[b][assigned[b] == m]
            if isinstance(entry, LocalGlobal | EnergyProtected):  # weighted, or means of means
                assert len(members)
            else:
                torch.testing.assert_close(members.mean(0), tokens[b, m])


def test_overlapping_windows_are_assigned_by_their_centres():
    leaf = KeyValueReduction(part="encoder", level=0).eval()
    leaf.entry = OverlapPool(3)
    x = torch.zeros(1, 1, 8, 1)
    assert leaf(x).shape[1] == 3  # centres at 0, 3 and 6
    assert leaf.assignment(x).tolist() == [[[0, 0, 1, 1, 1, 2, 2, 2]]]


def test_queries_are_assigned_in_cells():
    leaf = QueryReduction(part="encoder", level=0).eval()
    leaf.entry = Pool(2)
    assert leaf.assignment(torch.zeros(1, 3, 4, 1)).tolist() == [[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]]]
