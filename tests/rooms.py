"""The rooms of the package, and a reader of imports that says which file breaks their rules.

All imports count: inside functions, relative ones, under TYPE_CHECKING, and `import_module` with a literal name. A
file that is in no room fails by name, so a new file has to be given its place here first.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent.parent / "segzoo"

# Floors from top to bottom. A room is a module or a sub-package of segzoo; it may import itself and every floor below
# its own. Rooms on one floor do not know each other.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("",),  # segzoo/__init__.py: lazy public names, may name anything and is imported by nothing
    ("__main__",),
    ("cli",),
    ("app",),
    ("scale",),
    ("tuning",),
    ("training",),
    ("data",),
    ("explaining",),
    ("prediction",),
    ("results",),
    ("engines",),
    ("sharing",),
    ("interop",),
    ("preprocess", "masks", "regions", "visualize", "keypoints"),
    ("zoo",),
    ("costing", "folding", "twins"),
    ("models",),
    ("plans",),
    ("layers",),
    ("labels", "weights"),
    ("_files",),
    ("_errors", "_json", "_version"),  # tiny leaves that any file may use
)
LEAVES = ROOMS[-1]

# Inside models/, from top to bottom: the package itself, segmenters, encoders, the records of their weights, and what
# every family stands on. `<family>_weights.py` is a record; any other `<family>_....py` is a part of its family: of
# SegViT the segmenter's, which no other segmenter may import, and of RTFormer the encoder's.
SEGMENTERS = ("edaformer", "segformer", "rtformer", "segvit")
ENCODERS = ("eft", "mit", "pvt", "vit", "swin", "rtformer_backbone", "rtformer_baselines")
FOUNDATIONS = ("base", "segmenter", "family", "rows", "keys", "config", "features", "fields")
RECORDS_MAY_IMPORT = ("segzoo.models.keys", "segzoo.models.rows", "segzoo._errors")
KINDS = ("package", "segmenter", "encoder", "record of weights", "foundation")

DOWNLOADER = "segzoo.zoo.download"  # the package
SHARING = "segzoo.sharing"
UPLOADER = "segzoo.sharing.uploading"

# Modules that can fetch a file (urllib.parse and urllib.error cannot).
NETWORK = (
    *("urllib.request", "urllib3", "requests", "httpx", "aiohttp", "http.client", "ftplib", "socket", "wget", "gdown"),
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


def room_of(module: str) -> str | None:
    """The name of the room that a module is in; None if it is in no room."""
    name = module.partition(".")[2].partition(".")[0]
    return name if floor_of(name) is not None else None


def floor_of(room: str) -> int | None:
    """The index in ROOMS, 0 at the top; None if there is no such room."""
    return next((index for index, names in enumerate(ROOMS) if room in names), None)


def models_rank(module: str) -> int | None:
    """Inside models/: the index in KINDS; None if the file has no place there."""
    name = module.removeprefix("segzoo.models").removeprefix(".").partition(".")[0]
    family, _, part = name.partition("_")
    if name in ("", *FOUNDATIONS):
        return 0 if name == "" else 4
    if family not in SEGMENTERS + ENCODERS:
        return None
    if part == "weights":
        return 3
    return 2 if name in ENCODERS or family in ENCODERS else 1


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def own_complaint(module: str, target: str) -> str | None:
    """Why `module` of segzoo may not import `target` of segzoo, or None."""
    here, there = room_of(module), room_of(target)
    if here == "" or here is None:
        return None  # segzoo/__init__.py may name anything; a file in no room is reported once, by its name
    if there is None:
        return f"imports {target}, which is in no room"
    if there == "":
        return f"imports {target}, the top of the package"
    if floor_of(there) < floor_of(here):
        return f"imports {target}, a room above its own"
    if floor_of(there) == floor_of(here) and there != here:
        return f"imports {target}, a room beside its own"
    return models_complaint(module, target) if here == "models" else None


def models_complaint(module: str, target: str) -> str | None:
    """Why a file of models/ may not import `target`, which is no room above it, or None."""
    here, there = models_rank(module), models_rank(target)
    if here is None or here == 0:
        return None
    if here == 3:
        if target in RECORDS_MAY_IMPORT or (within(target, "segzoo.models") and there == 3):
            return None
        return f"imports {target}: a record of weights imports only keys, rows and other records"
    if not within(target, "segzoo.models"):
        return None
    if there is None:
        return f"imports {target}, which has no place in models/"
    if there == 0:
        return f"imports {target}, the package that imports every family"
    if there < here:
        return f"imports {target}: a model {KINDS[here]} never imports a {KINDS[there]}"
    if here == there == 1 and family_of(module) != family_of(target):
        return f"imports {target}: a segmenter never imports another segmenter"
    return None


def family_of(module: str) -> str:
    return module.rpartition(".")[2].partition("_")[0]


def underscore_complaint(module: str, name: str, modules: Mapping[str, Path]) -> str | None:
    """Why `module` may not take the dotted `name` of segzoo, whose owner keeps it for its own package, or None."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        owner, part = ".".join(parts[:length]), parts[length]
        if owner not in modules:
            return None  # an attribute of something in a module, such as a method
        if not part.startswith("_") or part.startswith("__"):
            continue
        is_package = modules[owner].name == "__init__.py"
        package = owner if is_package else owner.rpartition(".")[0]
        if package == "segzoo" and not is_package:
            package = owner  # a module at the top has no package of its own
        if not within(module, package):
            return f"imports {name}: a name with an underscore belongs to {package} alone"
    return None


def foreign_complaint(module: str, use: Use) -> str | None:
    """Why `module` may not use this name of another library, or None."""
    name = use.name
    if any(within(name, blocked) for blocked in NETWORK) and not within(module, DOWNLOADER):
        return f"uses {name}: only {DOWNLOADER} downloads"
    if within(name, HUB):
        return hub_complaint(module, name.split("."))
    if within(name, "timm") and not within(module, "segzoo.interop"):
        return timm_complaint(use)
    return None


def hub_complaint(module: str, parts: list[str]) -> str | None:
    downloads = within(module, DOWNLOADER)
    if not downloads and not within(module, SHARING):
        return f"uses {'.'.join(parts)}: only {DOWNLOADER} downloads and only {UPLOADER} uploads"
    if module != UPLOADER and any(part in HUB_UPLOAD for part in parts):
        return f"uses {'.'.join(parts)}: only {UPLOADER} uploads"
    if not downloads and any(part in HUB_DOWNLOAD for part in parts):
        return f"uses {'.'.join(parts)}: only {DOWNLOADER} downloads"
    return None


def timm_complaint(use: Use) -> str | None:
    if use.name in ("timm", "timm.layers"):
        return None
    name = use.name.removeprefix("timm.layers.").partition(".")[0]
    if within(use.name, "timm.layers") and not name.startswith("_") and exported_by_timm_layers(name):
        return None
    return f"uses {use.name}: only the public names of timm.layers may be used outside segzoo/interop"


def exported_by_timm_layers(name: str) -> bool:
    """False for the files inside timm.layers, which timm may move or rename."""
    import timm.layers

    return hasattr(timm.layers, name) and not isinstance(getattr(timm.layers, name), ModuleType)


def modules_of(root: Path) -> dict[str, Path]:
    return {module_name(root, path): path for path in sorted(root.rglob("*.py"))}


def uses_of(module: str, path: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return uses(tree, module, path.name == "__init__.py")


def violations(root: Path) -> list[str]:
    """Every break of the rules under the package folder `root`, as "file:line: what"."""
    modules = modules_of(root)
    found: dict[str, None] = {}  # ordered, without repetition
    for module, path in modules.items():
        where = path.relative_to(root.parent).as_posix()
        if room_of(module) is None:
            found[f"{where}: is in no room; give it a place in tests/rooms.py"] = None
        elif within(module, "segzoo.models") and models_rank(module) is None:
            found[f"{where}: is no known segmenter, encoder or foundation; give it a place in tests/rooms.py"] = None
        for use in uses_of(module, path):
            if within(use.name, "segzoo"):
                target = module_of(use.name, modules)
                complaint = own_complaint(module, target) if target else None
                complaint = complaint or underscore_complaint(module, use.name, modules)
            else:
                complaint = foreign_complaint(module, use)
            if complaint:
                found[f"{where}:{use.line}: {complaint}"] = None
    return list(found)


def module_of(name: str, modules: Mapping[str, Path]) -> str:
    """The module of segzoo that a dotted name lies in: the longest beginning that is a file or has a known place."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        beginning = ".".join(parts[:length])
        if beginning in modules or (length == 3 and parts[1] == "models" and models_rank(beginning) is not None):
            return beginning
    # What is left is a room without a file, or a public name of the package (`from segzoo import predict`).
    return ".".join(parts[:2]) if len(parts) > 1 and room_of(".".join(parts[:2])) else "segzoo"


def arrows(root: Path) -> dict[str, set[str]]:
    """Module -> the other modules of segzoo that it imports, whether at its top or inside a function."""
    modules = modules_of(root)
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = {module_of(use.name, modules) for use in uses_of(module, path) if within(use.name, "segzoo")}
        found[module] = targets - {module}
    return found


def circles(root: Path) -> list[list[str]]:
    """Circles of imports between files; the first of each that a walk meets. An `__init__` that only re-exports its own
    package, and the lazy top, are no part of one."""
    graph = {
        module: {target for target in targets if not within(module, target)}  # `from . import x` names the package
        for module, targets in arrows(root).items()
        if module != "segzoo"
    }
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                walk(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found
