"""`segzoo predict` in process: which images it takes, what it says, and that neither images nor results are lost."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import sys
from pathlib import Path, PurePath

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import segzoo
from segzoo.cli import main
from segzoo.cli.inputs import Input, find_inputs
from segzoo.cli.predict import output_files
from segzoo.data import scenes
from segzoo.results import SavedFiles


@pytest.fixture(scope="session")
def street() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scenes.render(seed=3_000_000, size=(128, 256))[0]).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def place(street):
    """Puts the street at these paths."""

    def put(*paths: str) -> None:
        for path in map(Path, paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(street)

    return put


@pytest.fixture(scope="session")
def model():
    return segzoo.create_model("edaformer_t", pretrained=True)


class Outcome:
    def __init__(self, code: int, captured):
        self.code, self.out, self.err = code, captured.out, captured.err

    def refused(self, *words: str) -> None:
        assert self.code == 2
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, self.err


@pytest.fixture
def predict(capsys):
    def run(*args: object) -> Outcome:
        return Outcome(main(["predict", *map(str, args)]), capsys.readouterr())

    return run


def files_below(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def results_of(*names: str) -> list[str]:
    return sorted(f"{name}{end}" for name in names for end in (".png", "_overlay.png", "_classes.json"))


# --- what it says and writes ------------------------------------------------------------------------------------------


def test_one_image(predict, place, model):
    place("street.png")
    done = predict("street.png")
    assert done.code == 0
    assert done.err == (
        "edaformer_t.scenes, trained on synthetic street scenes (13 classes); not for photographs, for which `segzoo "
        "predict --model segformer_b0.nvidia_ade20k_512` (anything; not commercial) or `--model "
        "rtformer_slim.cityscapes` (streets; Apache-2.0) gets weights\n"
    )
    assert done.out.startswith("street.png -> segzoo_masks/street.png: ")
    assert "road" in done.out
    assert files_below("segzoo_masks") == results_of("street")
    expected = segzoo.predict(model, "street.png")
    with Image.open("segzoo_masks/street.png") as mask:
        assert np.array_equal(np.asarray(mask), expected.mask)
    assert json.loads(Path("segzoo_masks/street_classes.json").read_text()) == expected.to_dict()
    with Image.open("segzoo_masks/street_overlay.png") as overlay:
        assert np.array_equal(np.asarray(overlay), np.asarray(expected.overlay(legend=True)))


def test_json_is_a_line_an_image(predict, place):
    place("a.png", "c.png")
    Path("b.png").write_bytes(b"no image")
    done = predict("a.png", "b.png", "c.png", "--json")
    assert done.code == 2
    first, bad, last = map(json.loads, done.out.splitlines())
    assert (first["image"], first["size"], first["model"]) == ("a.png", [128, 256], "edaformer_t.scenes")
    assert sum(label["pixels"] for label in first["classes"]) == 128 * 256
    assert Path(first["files"]["mask"]).exists()
    assert bad["image"] == "b.png"
    assert "no image" in bad["error"]
    assert last["files"]["mask"] == "segzoo_masks/c.png"
    assert "trained on" not in done.err
    again = predict("a.png", "--json")
    assert json.loads(again.out) == {"image": "a.png", "skipped": "segzoo_masks/a.png"}


def test_options(predict, place, model):
    place("street.png")
    assert predict("street.png", "-o", "views", "--scales", 0.5, 1, "--flip", "--no-legend").code == 0
    with Image.open("views/street.png") as mask:
        expected = segzoo.predict(model, "street.png", scales=(0.5, 1), flip=True)
        assert np.array_equal(np.asarray(mask), expected.mask)
    with Image.open("views/street_overlay.png") as overlay:
        assert overlay.size == (256, 128)
    assert predict("street.png", "-o", "half", "--dtype", "bf16", "--reduction", "fast").code == 0
    with Image.open("half/street.png") as mask:
        assert (np.asarray(mask) == expected.mask).mean() > 0.9


def test_batches(predict, place, model):
    place("a.png", "c.png", "d.png")
    Path("b.png").write_bytes(b"no image")
    Image.open("d.png").resize((100, 60)).save("d.png")
    done = predict("a.png", "b.png", "c.png", "d.png", "--batch-size", 4)
    done.refused("b.png is no image")
    assert files_below("segzoo_masks") == results_of("a", "c", "d")
    assert [line.split(" ")[0] for line in done.out.splitlines()] == ["a.png", "c.png", "d.png"]
    for name in "acd":
        with Image.open(f"segzoo_masks/{name}.png") as mask:
            assert (np.asarray(mask) == segzoo.predict(model, f"{name}.png").mask).mean() > 0.999


def test_progress_is_for_terminals(predict, place, monkeypatch, capsys):
    place("a.png", "b.png")
    opening, closing = predict("a.png", "b.png").err.splitlines()
    assert opening.startswith("edaformer_t.scenes")
    assert closing == "2 of 2 written to segzoo_masks"

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["predict", "a.png", "b.png", "--overwrite"]) == 0
    assert "images/s" in terminal.getvalue()
    assert "0/2" in terminal.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_windows_of_a_large_image_are_counted(place, folder, monkeypatch, capsys):
    """1,000 columns in windows of 512 with a stride of 341: they begin at 0, 341 and 488."""
    place("street.png")
    save_file(segzoo.create_model("test_edaformer").state_dict(), folder / "w.safetensors")
    tiny = ["predict", "street.png", "--overwrite", "--model", "test_edaformer", "--checkpoint", "w.safetensors"]
    slide = [*tiny, "--mode", "slide", "--resize", "64", "1000"]
    assert main(slide) == 0
    assert "windows" not in capsys.readouterr().err  # no terminal
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(slide) == 0
    assert "0/3" in terminal.getvalue() and "windows/s" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(tiny) == main([*slide, "--json"]) == 0  # one look; for a program
    assert "\r" not in terminal.getvalue()


OUTPUT_80 = """\
edaformer_t.scenes, trained on synthetic street scenes (13 classes); not for
  photographs, for which `segzoo predict --model segformer_b0.nvidia_ade20k_512`
  (anything; not commercial) or `--model rtformer_slim.cityscapes` (streets;
  Apache-2.0) gets weights
street.png -> segzoo_masks/street.png: road 22 %, sky 21 %, vegetation 14 %,
  person 7 %, sidewalk 6 %, car 6 %
segzoo: error: empty.png is empty; save or download it again
1 of 2 written to segzoo_masks; 1 failed
"""

OUTPUT_120 = """\
edaformer_t.scenes, trained on synthetic street scenes (13 classes); not for photographs, for which `segzoo predict
  --model segformer_b0.nvidia_ade20k_512` (anything; not commercial) or `--model rtformer_slim.cityscapes` (streets;
  Apache-2.0) gets weights
street.png -> segzoo_masks/street.png: road 22 %, sky 21 %, vegetation 14 %, person 7 %, sidewalk 6 %, car 6 %
segzoo: error: empty.png is empty; save or download it again
1 of 2 written to segzoo_masks; 1 failed
"""


@pytest.mark.parametrize(("width", "expected"), [(80, OUTPUT_80), (120, OUTPUT_120)])
def test_what_a_terminal_shows(place, monkeypatch, width, expected):
    place("street.png")
    Path("empty.png").write_bytes(b"")
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["predict", "street.png", "empty.png"]) == 2
    assert "".join(line.rpartition("\r")[2] for line in terminal.getvalue().splitlines(keepends=True)) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "gpu"), ["--device gpu: use cpu, cuda (one of several: cuda:1), mps or xpu"]),
        (("--device", "meta"), ["--device meta: use cpu"]),
        (("--alpha", "2"), ["--alpha"]),
        (("--scales", "1e9"), ["at most 64"]),
        (("--scales", "0"), ["scales", "0.75"]),
        (("--resize", "200000", "200000"), ["200000 x 200000 pixels", "SEGZOO_MAX_PIXELS"]),
        (("--reduction", '{"encoder":' * 100_000), ["not valid JSON"]),
        (("--reduction", "9" * 5000), ["not valid JSON"]),
        (("--reduction", "quick"), ["optimal"]),
        (("--num-classes", "5"), ["--num-classes 5", "have 13 classes", "--checkpoint"]),
        (("--model", "edaformer_b"), ["Google Drive", "pass it as --checkpoint FILE"]),
        (("--model", "edaformr_t"), ["edaformer_t"]),
        (("--checkpoint", "none.pth"), ["none.pth", "no such file"]),
    ],
)
def test_refusals(predict, place, options, words):
    place("street.png")
    done = predict("street.png", *options)
    done.refused(*words)
    errors = [line for line in done.err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert len(errors[0]) < 1000
    assert "checkpoint_path" not in done.err
    assert not Path("segzoo_masks").exists()


def test_info_of_sizes_that_cannot_be_counted(capsys):
    assert main(["info", "edaformer_t", "--size", "1000000", "1000000"]) == 2
    assert "1000000x1000000" in capsys.readouterr().err


def test_no_untrained_classifier_segments(predict, place, folder):
    place("street.png")
    save_file(segzoo.create_model("test_edaformer", num_classes=7).state_dict(), folder / "w.safetensors")
    tiny = ("street.png", "--model", "test_edaformer", "--checkpoint", "w.safetensors")
    predict(*tiny, "--num-classes", 5).refused("(7, 32, 1, 1)", "--num-classes")
    assert not Path("segzoo_masks").exists()
    done = predict(*tiny, "--num-classes", 7)
    assert (done.code, done.err) == (0, "test_edaformer with the weights of w.safetensors\n")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_bad_checkpoints(predict, place, folder, capsys):
    place("street.png")
    files = {"evil.pth": pickle.dumps({"a": Malicious()}), "empty.safetensors": b"", "cut.safetensors": b"\x08" * 30}
    files |= {f"text.{kind}": b"abc" for kind in ("pth", "pt", "bin", "pdparams", "zip")} | {"table.pth": b"a,b\n1,2\n"}
    files |= {"model.onnx": b"\x08\x08\x12\x07pytorch"}
    for name, data in files.items():
        Path(name).write_bytes(data)
        done = predict("street.png", "--checkpoint", name)
        done.refused(name)
        assert main(["convert", name, "edaformer_t.ade20k", "-o", "converted"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("segzoo: error: ") and name in error
        assert "weights_only" not in done.err + error  # torch's advice to run what is in the file
    predict("street.png", "--checkpoint", folder).refused("is a directory")
    assert not Path("converted").exists()
    assert not Path("segzoo_masks").exists()
    assert not Path("executed").exists()


# --- nothing is lost --------------------------------------------------------------------------------------------------


def test_results_that_exist_are_skipped(predict, place):
    place("a.png", "b.png")
    predict("a.png")
    Path("segzoo_masks/a.png").write_bytes(b"mended by hand")
    done = predict("a.png", "b.png")
    assert done.code == 0
    assert "1 of 2 written to segzoo_masks; 1 skipped, whose results exist (--overwrite writes them anew)" in done.err
    assert done.out.startswith("b.png")
    assert Path("segzoo_masks/a.png").read_bytes() == b"mended by hand"
    nothing = predict("a.png", "b.png")
    assert (nothing.code, nothing.out) == (0, "")
    assert "0 of 2 written to segzoo_masks; 2 skipped" in nothing.err
    assert predict("a.png", "b.png", "--overwrite").code == 0
    assert Path("segzoo_masks/a.png").read_bytes() != b"mended by hand"


def test_no_image_is_overwritten(predict, place, folder, street):
    place("a.png", "b_overlay.png")
    Path("link").symlink_to(folder)
    for options in ((), ("--overwrite",)):
        predict("a.png", "-o", "link", *options).refused("link/a.png is one of the images", "-o")
        predict("b_overlay.png", "other/b.png", "-o", ".", *options).refused("b_overlay.png is one of the images")
    assert files_below(".") == ["a.png", "b_overlay.png"]
    assert Path("a.png").read_bytes() == street


def test_a_failure_is_one_image_s_own(predict, place):
    """Images that cannot be read, one that is missing, and a name that is too long for its results."""
    long = "x" * 245
    place("a.png", f"{long}.png", "other/a.png", "z.png")
    Path("bad.jpg").write_bytes(b"no image")
    done = predict("a.png", "bad.jpg", f"{long}.png", "other/a.png", "missing.png", "z.png")
    done.refused("bad.jpg is no image", "missing.png: no such file", f"{long}", "cannot be written", "3 failed")
    assert "3 of 6 written to segzoo_masks; 3 failed" in done.err
    assert files_below("segzoo_masks") == results_of("a", "a-2", "z")
    assert [line.split(" -> ")[0] for line in done.out.splitlines()] == ["a.png", "other/a.png", "z.png"]


def test_what_was_written_is_listed_when_it_is_stopped(place, monkeypatch, capsys):
    place("a.png", "b.png")
    original = segzoo.Segmentation.save

    def save(result, path, **options):
        if "b.png" in str(path):
            raise KeyboardInterrupt
        return original(result, path, **options)

    monkeypatch.setattr(segzoo.Segmentation, "save", save)
    assert main(["predict", "a.png", "b.png"]) == 130
    assert capsys.readouterr().out.startswith("a.png -> segzoo_masks/a.png")
    assert files_below("segzoo_masks") == results_of("a")


def test_any_name_can_be_printed(place, monkeypatch, street):
    odd = os.fsdecode(b"\xff\xe4.png")
    place("a.png")
    Path(odd).write_bytes(street)
    Path(os.fsdecode(b"bad\xff.png")).write_bytes(b"no image")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["predict", "a.png", odd, os.fsdecode(b"bad\xff.png")]) == 2
    assert main(["predict", os.fsdecode(b"a\xff*"), "-o", "x"]) == 2
    assert b"\\udcff\\udce4.png -> segzoo_masks/\\udcff\\udce4.png" in out.buffer.getvalue()
    assert b"bad\\udcff.png is no image" in err.buffer.getvalue()
    assert b"a\\udcff* matches no file" in err.buffer.getvalue()
    assert len(list(Path("segzoo_masks").iterdir())) == 6


# --- which images -----------------------------------------------------------------------------------------------------


def sources(*arguments: str, recursive: bool = False, output: str = "segzoo_masks") -> list[str]:
    return [item.source for item in find_inputs(arguments, recursive=recursive, output=Path(output))]


def test_folders(place):
    place("d/b.png", "d/a.JPG", "d/sub/c.png", "d/sub/deep/a.webp", "d/.hidden/x.png", "d/.x.png", "d/masks/old.png")
    Path("d/notes.txt").write_text("no image")
    assert sources("d") == ["d/a.JPG", "d/b.png"]
    inputs = find_inputs(["d"], recursive=True, output=Path("d/masks"))
    assert [(item.source, item.place.as_posix()) for item in inputs] == [
        ("d/a.JPG", "a"),
        ("d/b.png", "b"),
        ("d/sub/c.png", "sub/c"),
        ("d/sub/deep/a.webp", "sub/deep/a"),
    ]
    Path("empty/sub").mkdir(parents=True)
    for recursive, hint in ((False, "; --recursive looks"), (True, "")):
        with pytest.raises(segzoo.SegzooError, match=f"empty has no image files{hint}"):
            sources("empty", recursive=recursive)


def test_a_folder_is_segmented_into_its_like(predict, place):
    place("d/street.png", "d/sub/street.png")
    assert predict("d", "--recursive", "-o", "d/masks").code == 0
    assert files_below("d/masks") == results_of("street", "sub/street")
    again = predict("d", "--recursive", "-o", "d/masks")  # the results are no images
    assert "0 of 2 written" in again.err


def test_wildcards(place):
    place("a1.png", "a2.png", "b.png", "d/a3.png", "x[1].png")
    assert sources("a*.png") == ["a1.png", "a2.png"]
    assert sources("**/a?.png") == ["a1.png", "a2.png", "d/a3.png"]
    assert sources("x[1].png") == ["x[1].png"]  # a file of this name
    with pytest.raises(segzoo.SegzooError, match="c.* matches no file"):
        sources("c*")


def test_lists_on_stdin(place, monkeypatch):
    def stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    place("a b.png", "d/c.png")
    stdin(b"a b.png\n\nd\nmissing.png\r\n")
    assert sources("first.png", "-") == ["first.png", "a b.png", "d/c.png", "missing.png"]
    stdin(b"two\nlines.png\0b\xff.png\0")  # find -print0
    assert sources("-") == ["two\nlines.png", os.fsdecode(b"b\xff.png")]
    for data, message in ((b"\n\n", "no paths"), (b"-\n", "names itself")):
        stdin(data)
        with pytest.raises(segzoo.SegzooError, match=message):
            sources("-")


def test_names_of_urls():
    urls = ["https://x.org/a/photo.jpg?size=1", "http://x.org", "http://[::1", "http://x.org/%2e%2e%2fup.png"]
    inputs = find_inputs(urls, recursive=False, output=Path("o"))
    assert [item.source for item in inputs] == urls
    assert [item.place.as_posix() for item in inputs] == ["photo", "image", "image", "up"]


def named(*stems: str) -> list[Input]:
    return [Input(f"{i}/{stem}.png", PurePath(stem)) for i, stem in enumerate(stems)]


def test_results_have_names_of_their_own():
    places = output_files(named("a", "a_overlay", "a", "b_overlay", "b", "a-2", "a"), Path("out"), SavedFiles.of)
    assert [files.mask.name for files in places] == [
        *("a.png", "a_overlay-2.png", "a-2.png", "b_overlay.png", "b-2.png", "a-2-2.png", "a-3.png")
    ]
    assert len(set(itertools.chain(*places))) == 3 * len(places)


def calls(work) -> int:
    """Calls of functions, Python's and C's, during `work`."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_names_of_many_images_take_linear_time():
    """`*/img.png`: every image has the same stem."""
    small, large = (named(*["img"] * n) for n in (200, 2000))
    output_files(small, Path("out"), SavedFiles.of)
    work = [calls(lambda items=items: output_files(items, Path("out"), SavedFiles.of)) for items in (small, large)]
    assert work[1] < 11 * work[0]
