"""The import rule: an import only points down the list of rooms, and few files may touch the network or timm.

All imports count: inside functions, relative ones, under TYPE_CHECKING, and `import_module` with a literal name. A
file that is in no room fails by name, so a new file has to be given its place here first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "segzoo"

# From top to bottom. A room may import itself and every room below it. A name is a module or a sub-package of segzoo.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("",),  # segzoo/__init__.py: lazy public names, may name anything and is imported by nothing
    ("__main__", "cli"),
    ("prediction",),
    ("training", "data"),
    ("conversion",),
    ("interop",),
    ("tuning",),
    ("preprocess",),
    ("costing", "folding", "keypoints", "masks", "twins", "visualize"),
    ("models",),
    ("layers",),
    ("labels", "weights", "_version"),
    ("_errors", "_json"),  # tiny leaves that any file may use
)

# Inside models/, from top to bottom: the package itself, segmenters, encoders, helpers. A segmenter never imports
# another segmenter; an encoder may build on another encoder; helpers know no family.
SEGMENTERS = ("edaformer", "segformer", "rtformer", "segvit")
ENCODERS = ("eft", "mit", "vit")

DOWNLOADER = "segzoo.models._weights"
UPLOADER = "segzoo.conversion"

# Modules that can fetch a file (urllib.parse and urllib.error cannot).
NETWORK = (
    *("urllib.request", "urllib3", "requests", "httpx", "aiohttp", "http.client", "ftplib", "socket", "wget"),
    *("torch.hub", "torch.utils.model_zoo", "torchvision.datasets.utils"),
)
HUB = "huggingface_hub"
# Of huggingface_hub, what sends and what fetches. HfApi and HfFileSystem do both; only the uploader may have the first.
HUB_UPLOAD = (
    *(
        "HfApi",
        "create_repo",
        "create_commit",
        "create_branch",
        "create_tag",
        "create_pull_request",
        "push_to_hub_mixin",
    ),
    *("upload_file", "upload_folder", "upload_large_folder", "delete_file", "delete_repo", "metadata_update"),
    *("ModelHubMixin", "PyTorchModelHubMixin", "Repository", "save_torch_model", "HfFileSystem", "hf_api"),
)
HUB_DOWNLOAD = (
    *("hf_hub_download", "snapshot_download", "cached_download", "hf_hub_url", "get_hf_file_metadata", "get_session"),
    *("HfFileSystem", "load_torch_model", "file_download", "_snapshot_download"),
)


@dataclass(frozen=True)
class Use:
    """One name that a file takes from elsewhere: `from a.b import c` and `a.b.c` after `import a` both are "a.b.c"."""

    name: str
    line: int


def module_name(root: Path, path: Path) -> str:
    parts = (root.name, *path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def uses(tree: ast.Module, module: str, is_package: bool) -> Iterator[Use]:
    """Every name that the file imports, and every dotted use of an imported module."""
    package = module if is_package else module.rpartition(".")[0]
    bound: dict[str, str] = {}  # what a name of this file stands for

    def absolute(name: str | None, level: int) -> str:
        if level == 0:
            return name or ""
        base = package.split(".")
        base = base[: len(base) - (level - 1)]
        return ".".join([*base, name] if name else base)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                yield Use(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node.module, node.level)
            for alias in node.names:
                name = base if alias.name == "*" else f"{base}.{alias.name}"
                bound[alias.asname or alias.name] = name
                yield Use(name, node.lineno)
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0] if node.args else None
            if function in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                if isinstance(argument.value, str):
                    bare = argument.value.lstrip(".")
                    yield Use(absolute(bare, len(argument.value) - len(bare)), node.lineno)

    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:  # the whole of a.b.c, not a.b again
            parts, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                parts, value = [value.attr, *parts], value.value
            if isinstance(value, ast.Name) and value.id in bound:
                yield Use(".".join([bound[value.id], *parts]), node.lineno)


def room_of(module: str) -> int | None:
    """The index in ROOMS, 0 at the top; None if the module is in no room."""
    name = module.partition(".")[2].partition(".")[0]
    return next((index for index, names in enumerate(ROOMS) if name in names), None)


def models_rank(module: str) -> int | None:
    """Inside models/: 0 package, 1 segmenter, 2 encoder, 3 helper; None if the file has no place there."""
    name = module.removeprefix("segzoo.models").removeprefix(".").partition(".")[0]
    if name == "":
        return 0
    if name in SEGMENTERS:
        return 1
    if name in ENCODERS:
        return 2
    return 3 if name.startswith("_") else None


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def own_complaint(module: str, target: str) -> str | None:
    """Why `module` of segzoo may not import `target` of segzoo, or None."""
    here, there = room_of(module), room_of(target)
    if here == 0 or here is None:
        return None  # segzoo/__init__.py may name anything; a file in no room is reported once, by its name
    if there is None:
        return f"imports {target}, which is in no room"
    if there == 0:
        return f"imports {target}, the top of the package"
    if there < here:
        return f"imports {target}, a room above its own"
    if not (within(module, "segzoo.models") and within(target, "segzoo.models")):
        return None
    here, there = models_rank(module), models_rank(target)
    if here is None or here == 0:
        return None
    if there is None:
        return f"imports {target}, which has no place in models/"
    if there == 0:
        return f"imports {target}, the package that imports every family"
    if there < here:
        kinds = ("package", "segmenter", "encoder", "helper")
        return f"imports {target}: a model {kinds[here]} never imports a {kinds[there]}"
    if here == there == 1 and module != target:
        return f"imports {target}: a segmenter never imports another segmenter"
    return None


def foreign_complaint(module: str, use: Use) -> str | None:
    """Why `module` may not use this name of another library, or None."""
    name = use.name
    if any(within(name, blocked) for blocked in NETWORK) and module != DOWNLOADER:
        return f"uses {name}: only {DOWNLOADER} downloads"
    if within(name, HUB):
        return hub_complaint(module, name.split("."))
    if within(name, "timm") and not within(module, "segzoo.interop"):
        return timm_complaint(module, use)
    return None


def hub_complaint(module: str, parts: list[str]) -> str | None:
    if module not in (DOWNLOADER, UPLOADER):
        return f"uses {'.'.join(parts)}: only {DOWNLOADER} downloads and only {UPLOADER} uploads"
    if module != UPLOADER and any(part in HUB_UPLOAD for part in parts):
        return f"uses {'.'.join(parts)}: only {UPLOADER} uploads"
    if module != DOWNLOADER and any(part in HUB_DOWNLOAD for part in parts):
        return f"uses {'.'.join(parts)}: only {DOWNLOADER} downloads"
    return None


def timm_complaint(module: str, use: Use) -> str | None:
    segvit = module == "segzoo.models.segvit"
    if use.name in ("timm", "timm.layers") or (segvit and use.name == "timm.create_model"):
        return None
    name = use.name.removeprefix("timm.layers.").partition(".")[0]
    if within(use.name, "timm.layers") and not name.startswith("_") and exported_by_timm_layers(name):
        return None
    extra = " (and timm.create_model)" if segvit else ""
    return f"uses {use.name}: only the public names of timm.layers{extra} may be used outside segzoo/interop"


def exported_by_timm_layers(name: str) -> bool:
    """False for the files inside timm.layers, which timm may move or rename."""
    import timm.layers

    return hasattr(timm.layers, name) and not isinstance(getattr(timm.layers, name), ModuleType)


def violations(root: Path) -> list[str]:
    """Every break of the rule under the package folder `root`, as "file:line: what"."""
    paths = sorted(root.rglob("*.py"))
    modules = {module_name(root, path): path for path in paths}
    found: dict[str, None] = {}  # ordered, without repetition
    for module, path in modules.items():
        where = path.relative_to(root.parent).as_posix()
        if room_of(module) is None:
            found[f"{where}: is in no room; give it a place in tests/test_rooms.py"] = None
        elif within(module, "segzoo.models") and models_rank(module) is None:
            found[f"{where}: is no known segmenter, encoder or helper; give it a place in tests/test_rooms.py"] = None
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        for use in uses(tree, module, path.name == "__init__.py"):
            if within(use.name, "segzoo"):
                target = module_of(use.name, modules)
                complaint = own_complaint(module, target) if target else None
            else:
                complaint = foreign_complaint(module, use)
            if complaint:
                found[f"{where}:{use.line}: {complaint}"] = None
    return list(found)


def module_of(name: str, modules: dict[str, Path]) -> str:
    """The module of segzoo that a dotted name lies in: the longest beginning that is a file or has a known place."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        beginning = ".".join(parts[:length])
        if beginning in modules or (length == 3 and parts[1] == "models" and models_rank(beginning) is not None):
            return beginning
    # What is left is a room without a file, or a public name of the package (`from segzoo import predict`).
    return ".".join(parts[:2]) if len(parts) > 1 and room_of(".".join(parts[:2])) else "segzoo"


def test_imports_only_point_down() -> None:
    assert violations(PACKAGE) == []


def test_no_file_has_the_name_of_a_public_function() -> None:
    names = {
        *("create_model", "list_models", "list_pretrained", "model_info", "load_weights", "save_pretrained"),
        *("push_to_hub", "predict", "set_inference_reduction", "inference_reduction", "reduction_sites"),
        *("fit_reduction", "reduce", "fold", "cost"),
    }
    assert sorted(path.stem for path in PACKAGE.iterdir() if path.stem in names) == []


# ---- the checker itself, on tiny trees

GOOD = {
    "__init__.py": "from segzoo.prediction import predict\nimport segzoo.interop.timm\n",
    "__main__.py": "from segzoo.cli import main\n",
    "cli.py": "def main():\n    from . import prediction, _version\n    from .models import create_model\n",
    "prediction.py": "from segzoo.models import create_model\nfrom segzoo import labels\nimport torch\n",
    "conversion.py": "from huggingface_hub import HfApi, ModelCard\nfrom .interop import timm\n",
    "interop/__init__.py": "",
    "interop/timm.py": "import timm\nfrom timm.models import register_model\nfrom ..models import eft\n",
    "models/__init__.py": "from . import eft, edaformer, segvit\nfrom ._registry import create_model\n",
    "models/_registry.py": "from .._errors import Refusal\nfrom ._weights import fetch\n",
    "models/_weights.py": "import urllib.request\nfrom huggingface_hub import hf_hub_download\n",
    "models/eft.py": "from timm.layers import DropPath\nfrom ..layers.mlp import Mlp\nfrom . import _registry\n",
    "models/edaformer.py": "from .eft import EFT\nfrom . import _registry\nfrom urllib.parse import urlparse\n",
    "models/segvit.py": "import timm\nswin = timm.create_model('swin')\ndrop = timm.layers.DropPath\n",
    "layers/__init__.py": "from .mlp import Mlp\n",
    "layers/mlp.py": "from timm import layers\nnorm = layers.LayerNorm2d\n",
    "labels/__init__.py": "from segzoo._version import __version__\n",
    "_version.py": "__version__ = '0'\n",
    "_errors.py": "import difflib\n",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    root = folder / "segzoo"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_checker_accepts_a_good_tree(tmp_path: Path) -> None:
    assert violations(write(tmp_path, GOOD)) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        # rooms
        ("layers/mlp.py", "import segzoo.models.eft", "imports segzoo.models.eft, a room above"),
        ("layers/mlp.py", "from ..models.eft import EFT", "imports segzoo.models.eft, a room above"),
        ("layers/mlp.py", "from .. import models", "imports segzoo.models, a room above"),
        ("layers/__init__.py", "from ..models import eft", "imports segzoo.models.eft, a room above"),
        ("layers/mlp.py", "def f():\n    from segzoo.models import eft", "imports segzoo.models.eft, a room above"),
        ("layers/mlp.py", "if TYPE_CHECKING:\n    from ..models import eft", "imports segzoo.models.eft, a room above"),
        ("layers/mlp.py", "import_module('segzoo.models')", "imports segzoo.models, a room above"),
        ("layers/mlp.py", "importlib.import_module('..models.eft', __package__)", "imports segzoo.models.eft"),
        ("layers/mlp.py", "from ..models import *", "imports segzoo.models, a room above"),
        ("models/eft.py", "from segzoo import predict", "imports segzoo, the top"),
        ("models/eft.py", "import segzoo", "imports segzoo, the top"),
        ("models/eft.py", "from segzoo.tuning import fit", "imports segzoo.tuning, a room above"),
        ("prediction.py", "from segzoo.cli import main", "imports segzoo.cli, a room above"),
        ("_errors.py", "from segzoo import labels", "imports segzoo.labels, a room above"),
        ("prediction.py", "from segzoo.prediktion import x", "imports segzoo, the top"),
        # models/
        ("models/edaformer.py", "from .segvit import SegViT", "a segmenter never imports another segmenter"),
        ("models/eft.py", "from . import edaformer", "a model encoder never imports a segmenter"),
        ("models/_registry.py", "from .eft import EFT", "a model helper never imports a encoder"),
        ("models/eft.py", "from segzoo.models import create_model", "the package that imports every family"),
        ("models/eft.py", "from . import *", "the package that imports every family"),
        # network
        ("models/eft.py", "import urllib.request", "only segzoo.models._weights downloads"),
        ("models/eft.py", "from urllib import request", "only segzoo.models._weights downloads"),
        ("conversion.py", "import requests", "only segzoo.models._weights downloads"),
        ("cli.py", "import torch\ntorch.hub.load_state_dict_from_url('x')", "only segzoo.models._weights downloads"),
        ("cli.py", "from huggingface_hub import hf_hub_download", "only segzoo.models._weights downloads"),
        ("conversion.py", "from huggingface_hub import snapshot_download", "only segzoo.models._weights downloads"),
        (
            "conversion.py",
            "import huggingface_hub as h\nh.hf_hub_download('x')",
            "only segzoo.models._weights downloads",
        ),
        ("models/_weights.py", "from huggingface_hub import HfApi", "only segzoo.conversion uploads"),
        (
            "models/_weights.py",
            "import huggingface_hub\nhuggingface_hub.upload_file()",
            "only segzoo.conversion uploads",
        ),
        # timm
        ("models/eft.py", "from timm.models import vision_transformer", "only the public names of timm.layers"),
        ("models/eft.py", "import timm\ntimm.create_model('x')", "only the public names of timm.layers"),
        ("models/eft.py", "from timm import create_model", "only the public names of timm.layers"),
        ("models/segvit.py", "from timm import list_models", "only the public names of timm.layers"),
        ("models/eft.py", "from timm.layers.helpers import to_2tuple", "only the public names of timm.layers"),
        ("models/eft.py", "import timm.data", "only the public names of timm.layers"),
        # no place
        ("utils.py", "", "segzoo/utils.py: is in no room"),
        ("helpers/things.py", "", "segzoo/helpers/things.py: is in no room"),
        ("models/unet.py", "", "segzoo/models/unet.py: is no known segmenter, encoder or helper"),
    ],
)
def test_checker_reports(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    found = violations(write(tmp_path, {**GOOD, file: code + "\n"}))
    assert len(found) == 1, found
    assert found[0].startswith(f"segzoo/{file}:")
    assert complaint in found[0]


def test_checker_names_the_line(tmp_path: Path) -> None:
    found = violations(write(tmp_path, {**GOOD, "layers/mlp.py": "import torch\n\nimport segzoo.cli\n"}))
    assert found == ["segzoo/layers/mlp.py:3: imports segzoo.cli, a room above its own"]
