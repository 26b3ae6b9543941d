"""torch.hub from a local directory and from an archive: the same models, light dependencies, helpful texts."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

import segzoo

ROOT = str(Path(__file__).parents[1])


def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", f"{ROOT}/hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_is_an_entry_point():
    module = hubconf()
    entry_points = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
    assert sorted(entry_points) == sorted(segzoo.list_models(["*", "test_*"]))  # as torch.hub.list finds them
    assert "4,929,914 parameters" in module.edaformer_t.__doc__
    assert re.search(r"^Weights: .*\bscenes\b", module.edaformer_t.__doc__, re.MULTILINE)


@pytest.mark.parametrize(("name", "options"), [("edaformer_t", {"pretrained": True}), ("test_eft", {"num_classes": 3})])
def test_load_equals_create_model(name, options):
    torch.manual_seed(0)
    loaded = torch.hub.load(ROOT, name, source="local", **options)
    torch.manual_seed(0)
    created = segzoo.create_model(name, **options)
    assert loaded.name == created.name
    for (key, a), b in zip(loaded.state_dict().items(), created.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_dependencies_are_the_packages_own():
    listed = re.search(
        r"^dependencies = \[(.*?)\]", (Path(ROOT) / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    distributions = set(re.findall(r'"([\w-]+)', listed[1]))
    modules = {{"huggingface-hub": "huggingface_hub", "pillow": "PIL"}.get(name, name) for name in distributions}
    assert set(hubconf().dependencies) == modules
    assert all(importlib.util.find_spec(module) for module in modules)  # what torch.hub checks before it loads


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory):
    """A home of torch.hub that holds the repository as it unpacks an archive from GitHub: hub/OWNER_REPO_REF."""
    home = tmp_path_factory.mktemp("torch")
    archive = home / "main.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [Path(ROOT) / "hubconf.py", *(Path(ROOT) / "segzoo").rglob("*")]:
            if path.is_file() and "__pycache__" not in path.parts:
                file.write(path, Path("segzoo-main") / path.relative_to(ROOT))
    with zipfile.ZipFile(archive) as file:
        file.extractall(home / "hub")
    shutil.move(home / "hub" / "segzoo-main", home / "hub" / "someone_segzoo_main")
    archive.unlink()
    return home


IN_A_FRESH_PROCESS = """
    import json, sys
    import torch

    torch.set_num_threads(1)
    assert "segzoo" not in sys.modules
    names = torch.hub.list("someone/segzoo:main", trust_repo=True, skip_validation=True)
    options = dict(trust_repo=True, skip_validation=True, verbose=False)
    text = torch.hub.help("someone/segzoo:main", "edaformer_t", trust_repo=True, skip_validation=True)
    model = torch.hub.load("someone/segzoo:main", "edaformer_t", pretrained=True, **options).eval()
    tiny = torch.hub.load("someone/segzoo:main", "test_mit", num_classes=3, **options)

    # The archive has left sys.path, but what is imported only now must still come from it.
    assert not any("someone_segzoo_main" in path for path in sys.path)
    import segzoo
    from PIL import Image

    image = Image.linear_gradient("L").resize((160, 96)).convert("RGB")
    segzoo.set_inference_reduction(model, "fast")
    mask = segzoo.predict(segzoo.fold(model), image).mask
    macs = segzoo.cost(tiny, (64, 64)).macs
    import segzoo.cli, segzoo.interop.timm
    modules = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "segzoo"}
    print(json.dumps({"names": names, "help": text, "mask": list(mask.shape), "macs": macs, "modules": modules}))
"""


@pytest.fixture(scope="module")
def from_archive(hub_home):
    """What a process saw that got segzoo from nowhere but torch.hub, without a network."""
    environment = {"TORCH_HOME": str(hub_home), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(hub_home)}
    command = [sys.executable, "-I", "-c", textwrap.dedent(IN_A_FRESH_PROCESS)]
    result = subprocess.run(command, cwd=hub_home, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_archive_works_after_it_has_left_the_path(hub_home, from_archive):
    assert from_archive["names"] == sorted(segzoo.list_models(["*", "test_*"]))
    assert "4,929,914 parameters" in from_archive["help"]
    assert from_archive["mask"] == [96, 160]
    assert from_archive["macs"] > 0
    modules = {name: Path(file) for name, file in from_archive["modules"].items() if file is not None}
    assert {"segzoo", "segzoo.prediction", "segzoo.costing", "segzoo.folding", "segzoo.cli"} <= modules.keys()
    archive = (hub_home / "hub" / "someone_segzoo_main").resolve()
    assert {name for name, file in modules.items() if not file.resolve().is_relative_to(archive)} == set()


def test_dependencies_are_all_that_is_imported(from_archive):
    """No module that was in use asks for a package that is neither a dependency nor Python's own."""
    allowed = {*hubconf().dependencies, "segzoo", *sys.stdlib_module_names}
    top_level = {}
    for name, file in from_archive["modules"].items():
        for node in ast.parse(Path(file).read_text()).body if file else ():
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [node.module]
            top_level.update({module.partition(".")[0]: name for module in imported})
    assert {"torch", "numpy", "PIL"} <= top_level.keys()
    assert {package: name for package, name in top_level.items() if package not in allowed} == {}
