"""The command as a user runs it: exit codes and what is printed; in a process of its own where that is the point."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys

import pytest
from PIL import Image

import segzoo
from segzoo.cli import main
from segzoo.data import scenes


def run(*args: object) -> subprocess.CompletedProcess:
    """The command in this process: what it printed, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([*map(str, args)])
        except SystemExit as stop:  # argparse's own refusals and --help
            code = stop.code or 0
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "street.png"
    Image.fromarray(scenes.render(seed=3_000_000, size=(128, 256))[0]).save(path)
    return path


def test_help_loads_no_torch():
    code = (
        "import sys; from segzoo.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for verb in ("list", "info", "predict", "demo", "tune", "convert", "publish", "app"):
        assert verb in result.stdout


def test_help_of_the_module():
    assert "segzoo" in run("--help").stdout


def test_import_segzoo_loads_no_torch():
    code = "import sys, segzoo; dir(segzoo); assert 'torch' not in sys.modules; assert segzoo.__version__"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_list():
    result = run("list", "eda*", "--json")
    names = [row["name"] for row in json.loads(result.stdout)]
    assert names == segzoo.list_models("eda*")
    text = run("list", "edaformer_t").stdout
    assert "4,929,914" in text
    pretrained = json.loads(run("list", "--pretrained", "--json").stdout)
    assert [row["name"] for row in pretrained] == segzoo.list_pretrained()
    assert "segzoo info NAME.TAG" in run("list", "--pretrained", "eft_t.*").stdout
    assert "segzoo info" not in run("list", "--pretrained", "mit_b0.*").stdout
    refused(run("list", "nothing*"), "nothing*", "segzoo list")


def test_info():
    result = json.loads(
        run("info", "edaformer_t", "--num-classes", 150, "--size", 512, 512, "--reduction", "optimal", "--json").stdout
    )
    assert result["published_gmacs"] == 4.7
    assert result["macs"] == pytest.approx(4_664_961_024, rel=1e-3)
    assert sum(result["stages"].values()) == result["macs"]
    assert result["reduction"]["encoder.0"] == 2
    text = run("info", "edaformer_t.ade20k", "--reduction", "optimal").stdout
    assert "4.930 M parameters, 4.665 GMACs at 512x512" in text
    assert "published: 4.7 GMACs" in text
    refused(run("info", "edaformr_t"), "edaformer_t")
    refused(run("info", "edaformer_t", "--reduction", "quick"), "quick", "optimal")
    refused(run("info", "edaformer_t", "--size", 0, 5), "--size")
