"""Choosing a reduction: the search against brute force, exact costs, changes and forecasts, budgets, and the record."""

from __future__ import annotations

import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import segzoo
from segzoo import Bipartite, Neighbour2d, Pool, Window
from segzoo.cli import main
from segzoo.layers.reduction import NEUTRAL
from segzoo.plans import Plan, current_plan, reduction_sites
from segzoo.tuning.candidates import entries_by_site, groups_of
from segzoo.tuning.changes import Forecast, bootstrap_interval
from segzoo.tuning.macs import Passes, only_what_saves, option_macs
from segzoo.tuning.record import Resource
from segzoo.tuning.resources import Latency, LiveBytes
from segzoo.tuning.search import Price, choose, floor, front, greedy, refined, total

# --- search ---------------------------------------------------------------------------------------------------------

OPTIONS = st.lists(st.builds(Price, st.integers(0, 9), st.integers(0, 9)), max_size=4)
TABLES = st.lists(OPTIONS.map(lambda options: [Price(10, 0), *options]), min_size=1, max_size=4)


def every_choice(groups):
    return itertools.product(*(range(len(options)) for options in groups))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(groups=TABLES, share=st.floats(0, 1))
def test_search_against_brute_force(groups, share):
    budget = share * total(groups, tuple(0 for _ in groups)).cost
    allowed = [choice for choice in every_choice(groups) if total(groups, choice).cost <= budget]
    choice = choose(groups, budget)
    assert (choice is None) == (not allowed)
    if choice is None:
        return
    assert choice in allowed
    assert total(groups, choice).weight <= total(groups, greedy(groups, budget)).weight
    if len(groups) <= 2:  # exchanging a pair is then exchanging everything
        assert total(groups, choice).weight == min(total(groups, other).weight for other in allowed)
    for first, second in itertools.combinations(range(len(groups)), 2):  # no pair can be bettered
        for other in allowed:
            if all(other[k] == choice[k] for k in range(len(groups)) if k not in (first, second)):
                assert total(groups, other).weight >= total(groups, choice).weight


def test_pairs_mend_what_greed_got_wrong():
    # The first move saves 3 for 1, the best ratio, and the second then has to go all the way.
    groups = [[Price(10, 0), Price(7, 1)], [Price(10, 0), Price(6, 2), Price(5, 8)]]
    assert greedy(groups, 16) == (1, 1)
    assert refined(groups, (1, 1), 16) == (0, 1)
    assert choose(groups, 12) == (1, 2)
    assert choose(groups, 11) is None


@settings(deadline=None, max_examples=60, derandomize=True)
@given(groups=TABLES)
def test_a_front_goes_down_and_ends_at_the_floor(groups):
    prices = [total(groups, choice) for choice in front(groups, 7)]
    assert prices == sorted(prices, reverse=True, key=lambda price: price.cost)
    assert all(one.weight < other.weight for one, other in itertools.pairwise(prices))
    assert prices[-1] == total(groups, floor(groups))


# --- costs ----------------------------------------------------------------------------------------------------------

FAMILIES = ["test_edaformer", "test_segformer", "test_rtformer", "test_segvit", "test_segvit_shrunk"]


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_of_sites_add_up_to_the_cost_of_the_plan(name):
    with torch.device("meta"):
        model = segzoo.create_model(name)
    sites = reduction_sites(model)
    queries = [Bipartite(0.5, 2)] if "encoder.0.q" in sites else []
    groups = groups_of(sites, entries_by_site(sites, {}, [2], queries))
    base, macs = option_macs(model, groups, Passes({(64, 96): 3}))
    assert base == 3 * segzoo.cost(model, (64, 96)).macs
    rng = np.random.default_rng(1)
    choice = [int(rng.integers(len(group.options))) for group in groups]
    assert any(choice) or name == "test_rtformer"
    chosen = [group.options[index] for group, index in zip(groups, choice, strict=True)]
    model.set_inference_reduction({site: entry for option in chosen for site, entry in option.items()})
    saved = sum(of_group[0] - of_group[index] for of_group, index in zip(macs, choice, strict=True))
    assert base - saved == 3 * segzoo.cost(model, (64, 96)).macs


def test_sizes_are_counted_as_often_as_they_run():
    with torch.device("meta"):
        model = segzoo.create_model("test_rtformer")
    groups = groups_of(reduction_sites(model), {"encoder.grid": [Pool(2)]})
    base, ((neutral, halved),) = option_macs(model, groups, Passes({(64, 96): 2, (96, 96): 1}))
    small, large = segzoo.cost(model, (64, 96)), segzoo.cost(model, (96, 96))
    assert base == 2 * small.macs + large.macs
    assert neutral == 2 * small.sites["encoder.grid"] + large.sites["encoder.grid"]
    assert halved < neutral


def test_what_saves_nothing_is_not_tried():
    (group,) = groups_of(
        {"encoder.0": reduction_sites(segzoo.create_model("test_eft"))["encoder.0"]},
        {"encoder.0": [Pool(2), Pool(3), Pool(4), Bipartite(0.5, 2)]},
    )
    (kept,), (macs,) = only_what_saves([group], [[10, 6, 4, 4, 12]])
    assert [option["encoder.0"] for option in kept.options] == [NEUTRAL, Pool(2), Pool(3)]
    assert macs == [10, 6, 4]


def test_presets_are_tried_and_what_no_site_takes_is_refused():
    model = segzoo.create_model("test_segformer")
    sites = reduction_sites(model)
    tried = entries_by_site(sites, model.reduction_presets, [2], [])
    assert set(tried["encoder.2.q"]) == {Bipartite(0.8, 4), Bipartite(0.9, 4), Neighbour2d(2)}
    assert tried["encoder.0"][0] == Pool(2)
    for entries, queries, named in (([], [Window(3)], "Window"), ([Window(3)], [Pool(2, "max")], "max")):
        with pytest.raises(segzoo.SegzooError, match=f"no site of this model takes .*{named}"):
            entries_by_site(sites, {}, entries, queries)


# --- changes --------------------------------------------------------------------------------------------------------


def test_forecast_is_a_norm_and_its_power_is_learned():
    alone = {("a", Pool(2)): np.array([0.03, 0.0]), ("b", Pool(2)): np.array([0.04, 0.02])}
    both = Plan({"a": Pool(2), "b": Pool(2), "c": NEUTRAL})
    np.testing.assert_allclose(Forecast(alone, 1).of(both), [0.07, 0.02])
    np.testing.assert_allclose(Forecast(alone, 2).of(both), [0.05, 0.02])
    np.testing.assert_array_equal(Forecast(alone, 2).of(Plan()), [0, 0])
    assert Forecast(alone, 1).calibrated([(both, np.array([0.05, 0.02]))], 1e-9).power == 2
    assert Forecast(alone, 3).calibrated([(both, np.array([0.07, 0.02]))], 1e-9).power == 1
    assert Forecast(alone, 3).calibrated([], 1e-9).power == 3


def test_bootstrap_interval():
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values)
    # Of 400 values the interval of the mean is nearly that of the normal distribution.
    assert abs(low - (values.mean() - 1.96 * values.std() / 20)) < 0.01
    assert abs(high - (values.mean() + 1.96 * values.std() / 20)) < 0.01
    assert bootstrap_interval(values) == (low, high)


def test_live_bytes_by_hand():
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = (x + 1) * 2  # two of 4000 bytes at a time, then one
        assert live.now == 4000
        z = y.view(10, 100)[2:]  # no bytes of its own, but it keeps those of y
        x.view(10, 100)
        del y
        assert live.now == 4000
        del z
        assert live.now == 0
    assert live.peak == 8000


# --- fit_reduction --------------------------------------------------------------------------------------------------

SIZE = (64, 96)
TRIED = {"entries": [2, 4], "resize": SIZE, "progress": False}


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 255, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(3)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return segzoo.create_model("test_edaformer")


def test_a_plan_for_a_share_of_the_macs(model, images):
    base = segzoo.cost(model, SIZE).macs
    model.set_inference_reduction("fast")
    fit = segzoo.fit_reduction(model, images, macs=0.95, **TRIED)
    assert model.training
    assert current_plan(model) == fit.plan
    assert set(fit.plan) == set(reduction_sites(model))
    assert segzoo.cost(model, SIZE).macs / base == fit.macs <= 0.95
    assert fit.base_gmacs * 1e9 == base
    with segzoo.inference_reduction(model, None):
        masks = [segzoo.predict(model, image, resize=SIZE).mask for image in images]
    changed = [
        (segzoo.predict(model, image, resize=SIZE).mask != mask).mean()
        for image, mask in zip(images, masks, strict=True)
    ]
    assert fit.measured_change == pytest.approx(np.mean(changed))
    assert fit.measured_interval[0] <= fit.measured_change <= fit.measured_interval[1]
    assert {point.name for point in fit.presets} == {"decoder", "optimal", "fast"}
    for point in (*fit.presets, fit.front[len(fit.front) // 2]):
        with segzoo.inference_reduction(model, point.plan):
            assert point.macs == segzoo.cost(model, SIZE).macs / base
    again = segzoo.fit_reduction(model.eval(), images, macs=0.95, **TRIED)
    assert again == fit  # the model's mode and plan before make no difference


def test_a_plan_for_a_share_of_changed_pixels(model, images):
    fit = segzoo.fit_reduction(model, images, max_change=0.02, **TRIED)
    assert fit.measured_change <= 0.02
    assert segzoo.fit_reduction(model, images[:1], max_change=0, **TRIED).measured_change == 0


@pytest.mark.slow
def test_budgets_that_are_measured(model, images):
    (image, *_) = images
    least = segzoo.fit_reduction(model, image, latency_ms=1e6, **TRIED)
    assert least.measured_change == 0
    assert least.resource.unit == "latency_ms" and least.resource.chosen > 0
    base = segzoo.fit_reduction(model, image, memory_mb=1e6, **TRIED).resource.base
    assert base > sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    for budget in ({"latency_ms": 1e-6}, {"memory_mb": base / 100}):
        with pytest.raises(segzoo.SegzooError, match=f"{next(iter(budget))}.* cannot be reached: the strongest plan"):
            segzoo.fit_reduction(model, image, **budget, **TRIED)


class StandInEngines:
    """In place of `segzoo.compile`, with a clock of their own: a pass takes 10 ms times the share of the MACs."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.compiled, self.passes = [], []  # plan and options of each; plan and size
        monkeypatch.setattr("segzoo.tuning.fitting.compile", self.compile)
        monkeypatch.setattr("segzoo.tuning.resources.time", types.SimpleNamespace(perf_counter=lambda: self.now))

    def compile(self, model, **options):
        plan, share = current_plan(model).to_json(), segzoo.cost(model, SIZE).macs
        with segzoo.inference_reduction(model, None):
            share /= segzoo.cost(model, SIZE).macs
        self.compiled.append((plan, options))
        return types.SimpleNamespace(head_output=lambda x_BCHW: self.run(plan, share, tuple(x_BCHW.shape[2:])))

    def run(self, plan, share, size):
        self.passes.append((plan, size))
        self.now += 0.010 * share


ON_ENGINE = {"engine": "openvino", "precision": "bf16", "threads": 1}


def test_a_latency_is_that_of_the_engine(model, images, monkeypatch):
    engines = StandInEngines(monkeypatch)
    budget = 9.5
    fit = segzoo.fit_reduction(model, images[:1], latency_ms=budget, **ON_ENGINE, **TRIED)
    # The front's first plan that the engine runs in time, whatever the model itself would take.
    assert fit.plan == next(point.plan for point in fit.front if 10 * point.macs <= budget)
    assert fit.macs < 1
    assert fit.resource == Resource(
        "latency_ms", pytest.approx(10), pytest.approx(10 * fit.macs), (SIZE,), "openvino", "bf16", 1
    )
    assert "latency_ms on openvino in bf16: " in str(fit)
    assert fit.to_dict()["resource"]["engine"] == "openvino"
    assert current_plan(model) == fit.plan

    plans = [plan for plan, _ in engines.compiled]
    assert len(plans) == len(set(plans)) <= 7
    assert all(options == ON_ENGINE for _, options in engines.compiled)
    neutral = plans[0]
    assert model.set_inference_reduction(None).to_json() == neutral
    # Rounds alternate: between two passes of a plan there is always one without reduction.
    for (first, _), (second, _) in zip(engines.passes[::2], engines.passes[1::2], strict=True):
        assert first == neutral != second


def test_an_engine_compiles_for_the_most_frequent_sizes(monkeypatch):
    engines = StandInEngines(monkeypatch)
    model = segzoo.create_model("test_rtformer")
    sides = [32, 64, 64, 48, 48]
    images = [np.zeros((side, side, 3), np.uint8) for side in sides]
    monkeypatch.setattr("segzoo.tuning.fitting.model_size", lambda size, *args: size)
    monkeypatch.setattr("segzoo.tuning.fitting.ENGINE_SIZES", 2)
    arguments = {"latency_ms": 100.0, "entries": [2], "progress": False}
    fit = segzoo.fit_reduction(model, images, **ON_ENGINE, **arguments)
    assert fit.resource.sizes == ((64, 64), (48, 48))
    assert {size for _, size in engines.passes} == set(fit.resource.sizes)
    assert len(fit.sizes) == 3


def test_what_else_the_machine_does_meets_both(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("segzoo.tuning.resources.time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    slowness = itertools.chain([1] * 18, itertools.repeat(3))  # after the first plan the machine is busy

    def maker_of(plan):
        seconds = 0.002 if plan.is_neutral else 0.001
        return types.SimpleNamespace(head_output=lambda _: now.__setitem__(0, now[0] + seconds * next(slowness)))

    latency = Latency(maker_of, [(torch.zeros(1, 3, 4, 4), 1)])
    first, second = Plan({"a": Pool(2)}), Plan({"a": Pool(3)})
    assert latency(first) == pytest.approx((2, 1))
    assert latency(second) == pytest.approx((6, 3))  # the busy machine is seen in both
    assert latency(first) == pytest.approx((2, 1))  # measured once
    assert latency(Plan()) == pytest.approx((6, 6))


@pytest.mark.slow
def test_a_latency_on_openvino(images):
    pytest.importorskip("openvino")
    model = segzoo.create_model("test_rtformer")
    fit = segzoo.fit_reduction(model, images[:1], latency_ms=1e6, engine="openvino", threads=1, **TRIED)
    assert fit.measured_change == 0
    assert (fit.resource.engine, fit.resource.precision, fit.resource.threads) == ("openvino", "f32", 1)
    assert fit.resource.chosen > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one budget of macs, latency_ms, memory_mb, max_change, not none"),
        ({"macs": 0.9, "max_change": 0.1}, "exactly one budget .* not macs, max_change"),
        ({"macs": 0.0}, "macs is a share"),
        ({"macs": 85}, "macs is a share"),
        ({"max_change": -0.1}, "max_change is a share"),
        ({"latency_ms": "fast"}, "latency_ms must be a positive number"),
        ({"macs": 0.01}, r"macs=0.01 cannot be reached: .* leaves 0\.\d+ of the multiply-accumulates"),
        ({"macs": 0.95, "engine": "eager"}, "engine='eager' is what latency_ms= is measured on, not macs="),
        ({"latency_ms": 9, "precision": "bf16"}, "add engine="),
        ({"latency_ms": 9, "engine": "onnxruntime", "precision": "bf16"}, "onnxruntime computes no bfloat16"),
        ({"latency_ms": 9, "engine": "tensorrt"}, "engine must be one of eager"),
        ({"latency_ms": 1e-6, "engine": "eager"}, r"latency_ms=1e-06 cannot be reached: the strongest plan"),
        ({"macs": 0.95, "queries": [Window(3)]}, "no site of this model takes Window"),
        ({"macs": 0.95, "images": []}, "at least one image"),
        ({"macs": 0.95, "images": ["missing.png"]}, "missing.png"),
    ],
)
def test_refusals_leave_the_model_as_it_was(model, images, options, message):
    before = model.set_inference_reduction({"encoder": (2, 1, 1, 1)})
    with pytest.raises(segzoo.SegzooError, match=message):
        segzoo.fit_reduction(model, **{"images": images, **TRIED, **options})
    assert current_plan(model) == before


def test_what_is_no_model_to_tune_is_refused(images):
    for module in (torch.nn.Linear(2, 2), segzoo.create_model("test_eft")):
        with pytest.raises(segzoo.SegzooError, match="no segmentation model"):
            segzoo.fit_reduction(module, images, macs=0.9)


def test_an_interruption_leaves_the_model_as_it_was(model, images, monkeypatch):
    before = model.set_inference_reduction({"encoder": (2, 1, 1, 1)})
    monkeypatch.setattr(
        "segzoo.tuning.changes.segment_one", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        segzoo.fit_reduction(model, images, macs=0.95, **TRIED)
    assert current_plan(model) == before


# --- record and command ---------------------------------------------------------------------------------------------


def test_tune_writes_plan_table_and_figure(tmp_path, model, images, capsys):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    command = [
        *("tune", "test_edaformer", str(tmp_path / "image.png"), "--macs", "0.95", "--resize", "64", "96"),
        *("--checkpoint", str(tmp_path / "weights.safetensors"), "--num-classes", "13", "-o", str(tmp_path / "out")),
    ]
    assert main(command) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "reduction.json").read_text())
    assert saved["macs"] <= 0.95
    assert model.set_inference_reduction(saved["plan"]).to_json() in printed
    assert (tmp_path / "out" / "reduction.png").read_bytes().startswith(b"\x89PNG")
    assert "predicted" in printed and "optimal" in printed
    assert main(command) == 2  # before any work: nothing is written over unasked
    assert "reduction.json exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--macs", "0.9", "--engine", "openvino"], "--engine openvino is what --latency-ms is measured on"),
        (["--latency-ms", "9", "--threads", "1"], "add --engine openvino"),
        (["--latency-ms", "9", "--engine", "eager", "--device", "cuda"], "leave out --device cuda"),
    ],
)
def test_tune_refuses_before_any_work(options, message, capsys):
    assert main(["tune", "test_edaformer", "image.png", *options]) == 2
    assert message in capsys.readouterr().err


def test_tune_on_an_engine(tmp_path, model, images, capsys):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    Image.fromarray(images[0]).save(tmp_path / "image.png")
    command = [
        *("tune", "test_edaformer", str(tmp_path / "image.png"), "--resize", "64", "96", "--json"),
        *("--checkpoint", str(tmp_path / "weights.safetensors"), "--num-classes", "13"),
    ]
    assert main([*command, "--latency-ms", "1e6", "--engine", "eager", "--precision", "bf16"]) == 0
    resource = json.loads(capsys.readouterr().out)["resource"]
    assert (resource["engine"], resource["precision"], resource["sizes"]) == ("eager", "bf16", [[64, 96]])


def test_a_missing_matplotlib_is_said(monkeypatch, tmp_path, model, images):
    fit = segzoo.fit_reduction(model, images[:1], macs=0.95, **TRIED)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(segzoo.SegzooError, match=r"segzoo\[plot\]"):
        fit.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
