"""The index of names: fresh, complete, and read without torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

import segzoo
from segzoo import SegzooError
from segzoo.models import family as families
from segzoo.models import rows
from segzoo.zoo import index
from segzoo.zoo.index import registered
from segzoo.zoo.names import model_info


def without_torch(code: str) -> str:
    """What a fresh process prints that must end without torch."""
    code += "\nimport sys\nassert not {'torch', 'timm', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def command(*arguments: str, code: int) -> str:
    return without_torch(
        "import contextlib, sys\n"
        "from segzoo.cli import main\n"
        "with contextlib.redirect_stderr(sys.stdout):\n"
        f"    try: assert main({list(arguments)!r}) == {code}\n"
        f"    except SystemExit as end: assert end.code == {code}\n"
    )


def test_the_index_is_fresh():
    assert index.INDEX.read_text(encoding="utf-8") == index.to_json(registered()), "run `make index`"
    assert index.read_index() == registered()


def test_it_says_what_the_registry_says():
    """Against the rows themselves, field by field, so that nothing is lost on the way through JSON."""
    listed = index.read_index()
    assert list(listed) == list(families.VARIANTS)
    seen = 0
    for name, family in families.VARIANTS.items():
        variant = family.variants[name]
        assert listed[name].family == family.name
        assert listed[name].params == variant.params
        assert [(tuple(cost["size"]), cost["gmacs"], cost["params_m"]) for cost in listed[name].published] == [
            (cost.size, cost.gmacs, cost.params_m) for cost in variant.published
        ]
        for tag, row in family.pretrained.get(name, {}).items():
            entry = listed[name].rows[tag]
            assert (entry.state, entry.from_text, entry.loadable) == (row.state, row.from_text, row.loadable)
            assert (entry.dataset, entry.num_classes, entry.license) == (row.dataset, row.num_classes, row.license)
            score = row.score(variant.reduction or "base")
            assert entry.score == (score.value if score else None)
            assert score is None or (entry.metric, entry.confirmed) == (score.metric, bool(score.confirmed_by))
            assert entry.commercial_use == row.commercial_use
            assert (entry.how_to_get, entry.origin) == (row.how_to_get, row.origin)
            seen += 1
    assert seen == len(segzoo.list_pretrained())


def test_list_loads_no_torch():
    text = command("list", "eda*", code=0)
    assert "4,929,914" in text
    assert "scenes" in text
    weights = json.loads(command("list", "--pretrained", "--json", "--source", "bundled", code=0))
    row = model_info("edaformer_t.scenes").pretrained_cfg
    assert weights == [
        {
            "name": "edaformer_t.scenes",
            "source": "bundled",
            "from": "",
            "dataset": row.dataset,
            "classes": 13,
            "miou": row.miou,
            "top1": None,
            "confirmed": True,
            "license": "apache-2.0",
            "commercial_use": True,
        }
    ]
    assert "drive" in command("list", "--pretrained", "eft_t.*", code=0)


def test_refusals_load_no_torch():
    """A typo is answered at once, in the words of the registry's own refusal."""
    for name in ("edaformr_t", "edaformer_t.ade", "nothing_like_it"):
        with pytest.raises(SegzooError) as refusal:
            model_info(name)
        assert str(refusal.value) in command("info", name, code=2)
        assert str(refusal.value) in command("predict", "x.png", "-o", "out", "--model", name, code=2)
    assert "nothing*" in command("list", "nothing*", code=2)
    assert "segformer_b0" in command("list", "SegFormer", code=0)
    assert "there are: bundled" not in command("list", "--dataset", "ade20k", code=2)
    assert "no weights have dataset 'roofs'" in command("list", "--pretrained", "--dataset", "roofs", code=2)
    assert "--reduction" in command("info", "--help", code=0)


def test_python_lists_without_torch():
    names = json.loads(
        without_torch("import json, segzoo; print(json.dumps([segzoo.list_models(), segzoo.list_pretrained()]))")
    )
    assert names == [segzoo.list_models(), segzoo.list_pretrained()]


@pytest.fixture
def own_family(monkeypatch):
    """A family that a user registers at run time; forgotten afterwards."""
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    before = dict(families.VARIANTS)
    eft = families.VARIANTS["test_eft"]
    family = families.Family(
        name="own",
        build=eft.build,
        variants={"own_tiny": eft.variants["test_eft"]},
        pretrained={"own_tiny": {"roofs": rows.PretrainedCfg(state="url", url="https://x.org/a", dataset="roofs")}},
    )
    families.register_family(family)
    yield
    families.VARIANTS.clear()
    families.VARIANTS.update(before)


def test_families_of_the_user_are_listed(own_family):
    assert "own_tiny" in segzoo.list_models()
    assert segzoo.list_pretrained("own*") == ["own_tiny.roofs"]
    assert segzoo.list_pretrained(dataset="roofs") == ["own_tiny.roofs"]
    assert segzoo.list_models("own*", pretrained=True) == ["own_tiny.roofs"]
    index.check_name("own_tiny.roofs")
    assert segzoo.create_model("own_tiny").name == "own_tiny"


def test_a_name_is_registered_once(own_family):
    with pytest.raises(segzoo.SegzooError, match="family other: own_tiny already registered"):
        families.register_family(dataclasses.replace(families.FAMILIES["own"], name="other"))
    assert "other" not in families.FAMILIES
    assert families.VARIANTS["own_tiny"].name == "own"


def test_names_are_in_natural_order(monkeypatch):
    models = {f"net_b{i}": index.ListedModel(family="net") for i in (10, 9, 1, 2)}
    monkeypatch.setattr(index, "known_models", lambda: models)
    assert segzoo.list_models() == ["net_b1", "net_b2", "net_b9", "net_b10"]


def test_saved_models_pass_the_check_of_names():
    index.check_name("local-dir:/anywhere")
    index.check_name("hf-hub:org/name@main")
    with pytest.raises(SegzooError, match="did you mean edaformer_t"):
        index.check_name("edaformr_t")
