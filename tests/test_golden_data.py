"""The rule that draws the golden weights, and the record of where the golden numbers come from.

The normal variates below were written down once with a CRC computed bit by bit from its polynomial; the rule's
arithmetic on them is done by hand in each case.
"""

from __future__ import annotations

import re

import pytest
import torch
from golden_data import GOLDEN, golden_input, golden_json, golden_state_dict, golden_tensor

CASES = [
    # two axes or more: divided by the root of the product of all but the first
    (
        "head.weight",
        [[1.5585277775971387, -1.3351669379992768, -1.5291450573093939]],
        lambda v: v / 3**0.5,
    ),
    (
        "conv.weight",
        [[[[1.4002539675478523, 0.7291928823043049]], [[-0.27433118537072826, -0.838077064422642]]]],
        lambda v: v / 2,
    ),
    (
        "pos_embed",
        [[[1.6041581591761906, 0.5256008815384611], [0.8301797139345848, -0.6765979364563959]]],
        lambda v: v / 2,
    ),
    # one axis: around 1 for weights, around 0 for all else
    ("norm1.weight", [0.4813062745496064, -0.4919912826572172], lambda v: 1 + v / 10),
    ("norm1.bias", [-0.258619794082512, 0.6563911627217736], lambda v: v / 20),
    # running statistics, in torch's names and in paddle's
    ("bn.running_var", [-1.2512700375829469, 1.6148651578870201], lambda v: (1 + abs(v)) / 2),
    ("bn._variance", [-1.5770493752772194, -0.12526565936885686], lambda v: (1 + abs(v)) / 2),
    ("bn.running_mean", [-1.430613817956511, 0.09282942788945213], lambda v: v / 10),
    ("bn._mean", [-0.6479259064116354, 0.8304017923232934], lambda v: v / 10),
]


@pytest.mark.parametrize(("key", "drawn", "rule"), CASES, ids=[key for key, _, _ in CASES])
def test_the_rule(key, drawn, rule):
    expected = rule(torch.tensor(drawn, dtype=torch.float64))
    torch.testing.assert_close(golden_tensor(key, list(expected.shape)), expected, rtol=0, atol=1e-15)


def test_what_is_not_drawn():
    assert golden_tensor("bn.num_batches_tracked", []).tolist() == 0
    assert golden_tensor("decode_head.criterion.empty_weight", [4]).tolist() == [1, 1, 1, 0.1]


def test_the_input():
    expected = torch.tensor([0.1257302210933933, -0.1321048632913019, 0.6404226504432821], dtype=torch.float64)
    torch.testing.assert_close(golden_input([1, 1, 1, 3]).flatten(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["eft_t_encoder", "edaformer_t_ade", "mit_b0_encoder", "segformerpp_b0_official"])
def test_the_weights_are_those_of_the_official_run(name):
    record = golden_json(name)
    tensors = golden_state_dict(record["state_dict"]).values()
    assert sum(t.double().sum().item() for t in tensors) == pytest.approx(record["weights_checksum"]["sum"], abs=1e-6)
    absolute = sum(t.double().abs().sum().item() for t in tensors)
    assert absolute == pytest.approx(record["weights_checksum"]["abs_sum"], abs=1e-6)


def commit_of(name: str) -> str | None:
    """The official commit that a JSON records, whichever way it writes its source."""
    record = golden_json(name)
    source = record.get("source") if isinstance(record, dict) else None
    if isinstance(source, dict):
        return source["commit"]
    return source.partition("@")[2].partition(" ")[0] if source else None


def test_the_readme_tells_the_commit_of_every_file():
    rows = re.findall(
        r"^\| (`.*?) \| .* \| (`[0-9a-f]{40}`|not recorded) \| .* \|$", (GOLDEN / "README.md").read_text(), flags=re.M
    )
    told = {}
    for files, commit in rows:
        for pattern in re.findall(r"`([^`]+)`", files):
            stem, braces, rest = pattern.partition("{")
            choices, _, tail = rest.partition("}")
            for choice in choices.split(",") if braces else [""]:
                told[f"{stem}{choice}{tail}"] = commit.strip("`")
    names = [path.relative_to(GOLDEN).with_suffix("").as_posix() for path in sorted(GOLDEN.rglob("*.json"))]
    for name in names:
        fitting = [key for key in told if re.fullmatch(key.replace("*", ".*"), name)]
        assert fitting, f"{name} is not in tests/golden/README.md"
        assert told[max(fitting, key=len)] == (commit_of(name) or "not recorded"), name
