"""The rules of the rooms hold for the package, and the checker of `tests/rooms.py` finds each kind of break."""

from __future__ import annotations

from pathlib import Path

import pytest
from rooms import PACKAGE, circles, violations

import segzoo


def test_imports_only_point_down() -> None:
    assert violations(PACKAGE) == []


def test_no_circle_of_imports() -> None:
    assert circles(PACKAGE) == []


def test_no_file_has_the_name_of_a_public_function() -> None:
    assert sorted(path.stem for path in PACKAGE.iterdir() if path.stem in segzoo.__all__) == []


# ---- the checker itself, on tiny trees

GOOD = {
    "__init__.py": "from segzoo.prediction import predict\nimport segzoo.interop.timm\n",
    "__main__.py": "from segzoo.cli import main\n",
    "cli/__init__.py": "from ._arguments import parser\n",
    "cli/_arguments.py": "",
    "cli/predict.py": "def run():\n    from .. import prediction, _version\n    from ..zoo import create_model\n",
    "prediction.py": "from segzoo.zoo import create_model\nfrom segzoo import labels, masks\nimport torch\n",
    "sharing/card.py": "from huggingface_hub import ModelCard\nfrom ..interop import timm\n",
    "sharing/uploading.py": "from huggingface_hub import HfApi\nfrom ._card import text\n",
    "sharing/_card.py": "",
    "interop/__init__.py": "",
    "interop/timm.py": "import timm\nfrom timm.models import register_model\nfrom ..models import eft\n",
    "masks.py": "from .models import base\n",
    "visualize.py": "from .labels import LabelSet\nLabelSet._make\n",
    "zoo/__init__.py": "from .. import models\nfrom .recipe import create_model\n",
    "zoo/recipe.py": "from .download.hub import hub_file\nfrom ._names import parse\n",
    "zoo/_names.py": "from ..models.family import FAMILIES\n",
    "zoo/download/__init__.py": "",
    "zoo/download/hub.py": "from huggingface_hub import hf_hub_download\nfrom .._names import parse\n",
    "zoo/download/url.py": "import urllib.request\n",
    "models/__init__.py": "from . import eft, edaformer, segvit\n",
    "models/base.py": "from .._errors import Refusal\nfrom ..plans import Plan\n",
    "models/family.py": "from .rows import Row\n",
    "models/rows.py": "",
    "models/keys.py": "",
    "models/eft.py": "from timm.layers import DropPath\nfrom ..layers import mlp\nfrom . import base, eft_weights\n",
    "models/eft_weights.py": "from .keys import Rename\nfrom .rows import Row\nfrom . import mit_weights\n",
    "models/mit_weights.py": "import dataclasses\n",
    "models/edaformer.py": "from .eft import EFT\nfrom urllib.parse import urlparse\n",
    "models/segvit.py": "import timm\nfrom . import segvit_decoder, swin\ndrop = timm.layers.DropPath\n",
    "models/segvit_decoder.py": "from ..layers import mlp\n",
    "models/rtformer.py": "from .rtformer_backbone import Backbone\n",
    "models/rtformer_backbone.py": "from . import rtformer_baselines\n",
    "models/rtformer_baselines.py": "",
    "models/segvit_ablations.py": "from .segvit import SegViT\n",
    "models/swin.py": "",
    "plans.py": "from .layers.mlp import Mlp\n",
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
        ("visualize.py", "from .masks import class_map", "imports segzoo.masks, a room beside its own"),
        ("plans.py", "from .models.base import Model", "imports segzoo.models.base, a room above"),
        ("data/scenes.py", "from ..training import losses", "imports segzoo.training, a room above"),
        # models/
        ("models/rows.py", "from ..zoo.recipe import create_model", "imports segzoo.zoo.recipe, a room above"),
        ("models/edaformer.py", "from .segvit import SegViT", "a segmenter never imports another segmenter"),
        ("models/edaformer.py", "from .segvit_decoder import X", "a segmenter never imports another segmenter"),
        ("models/edaformer.py", "from .segvit_ablations import X", "a segmenter never imports another segmenter"),
        ("models/eft.py", "from . import segvit_decoder", "a model encoder never imports a segmenter"),
        ("models/eft.py", "from . import edaformer", "a model encoder never imports a segmenter"),
        ("models/rtformer_backbone.py", "from . import rtformer", "a model encoder never imports a segmenter"),
        ("models/base.py", "from .eft import EFT", "a model foundation never imports a encoder"),
        ("models/rows.py", "from .eft_weights import ROWS", "a model foundation never imports a record of weights"),
        ("models/eft_weights.py", "from .eft import EFT", "imports only keys, rows and other records"),
        ("models/eft_weights.py", "from ..layers import mlp", "imports only keys, rows and other records"),
        ("models/eft_weights.py", "from .base import Model", "imports only keys, rows and other records"),
        ("models/eft.py", "from segzoo.models import create_model", "the package that imports every family"),
        ("models/eft.py", "from . import *", "the package that imports every family"),
        # names with an underscore
        ("cli/predict.py", "from ..zoo._names import parse", "belongs to segzoo.zoo alone"),
        ("cli/predict.py", "from ..zoo import _names", "belongs to segzoo.zoo alone"),
        ("cli/predict.py", "from ..zoo.recipe import _assemble", "belongs to segzoo.zoo alone"),
        ("cli/predict.py", "from .. import prediction\nprediction._walk()", "belongs to segzoo.prediction alone"),
        ("zoo/recipe.py", "from .download.url import _receive", "belongs to segzoo.zoo.download alone"),
        ("sharing/card.py", "from ..prediction import _eval_mode", "imports segzoo.prediction, a room above"),
        # network
        ("models/eft.py", "import urllib.request", "only segzoo.zoo.download downloads"),
        ("models/eft.py", "from urllib import request", "only segzoo.zoo.download downloads"),
        ("zoo/recipe.py", "import gdown", "only segzoo.zoo.download downloads"),
        ("sharing/card.py", "import requests", "only segzoo.zoo.download downloads"),
        ("app.py", "import torch\ntorch.hub.load_state_dict_from_url('x')", "only segzoo.zoo.download downloads"),
        ("app.py", "from huggingface_hub import hf_hub_download", "only segzoo.zoo.download downloads"),
        ("sharing/uploading.py", "from huggingface_hub import snapshot_download", "only segzoo.zoo.download downloads"),
        (
            "sharing/uploading.py",
            "import huggingface_hub as h\nh.hf_hub_download('x')",
            "only segzoo.zoo.download downloads",
        ),
        ("sharing/card.py", "from huggingface_hub import HfApi", "only segzoo.sharing.uploading uploads"),
        ("zoo/download/hub.py", "from huggingface_hub import HfApi", "only segzoo.sharing.uploading uploads"),
        (
            "zoo/download/hub.py",
            "import huggingface_hub\nhuggingface_hub.upload_file()",
            "only segzoo.sharing.uploading uploads",
        ),
        # timm
        ("models/eft.py", "from timm.models import vision_transformer", "only the public names of timm.layers"),
        ("models/eft.py", "import timm\ntimm.create_model('x')", "only the public names of timm.layers"),
        ("models/eft.py", "from timm import create_model", "only the public names of timm.layers"),
        ("models/segvit.py", "import timm\ntimm.create_model('swin')", "only the public names of timm.layers"),
        ("models/eft.py", "from timm.layers.helpers import to_2tuple", "only the public names of timm.layers"),
        ("models/eft.py", "import timm.data", "only the public names of timm.layers"),
        # no place
        ("utils.py", "", "segzoo/utils.py: is in no room"),
        ("helpers/things.py", "", "segzoo/helpers/things.py: is in no room"),
        ("models/unet.py", "", "segzoo/models/unet.py: is no known segmenter, encoder or foundation"),
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


def test_checker_finds_a_circle(tmp_path: Path) -> None:
    assert circles(write(tmp_path, GOOD)) == []
    files = {
        "zoo/a.py": "from . import b\n",
        "zoo/b.py": "def f():\n    from .c import g\n",
        "zoo/c.py": "from .a import h\n",
    }
    found = circles(write(tmp_path, {**GOOD, **files}))
    assert found == [["segzoo.zoo.a", "segzoo.zoo.b", "segzoo.zoo.c", "segzoo.zoo.a"]]
