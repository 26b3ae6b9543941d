"""A process that reads cases, one after the other, within limits: `python fuzz_child.py READER`.

Each line of stdin is a case's file as JSON, each line of stdout says what came of it: {"outcome": "read", "refused" (a
SegzooError), "foreign" (anything else) or "changed" (refused, but the model is another one), "error": ..., "seconds":
of processor time}. Once everything is imported, each case may take SECONDS of processor time, and MEMORY bytes beyond
what is there. Too much memory is a MemoryError, which is foreign; what goes far beyond the time ends the process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import segzoo
from segzoo.data.segmentation import open_data, read_mask
from segzoo.preprocess import load_image

SECONDS = 5
MEMORY = 512 * 2**20

Reader = Callable[[Path], object]


def weights_reader() -> Reader:
    """A file into a model, which a refusal leaves as it was."""
    torch.manual_seed(0)
    model = segzoo.create_model("test_eft")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def read(path: Path) -> None:
        try:
            segzoo.load_weights(model, path)
        except segzoo.SegzooError:
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            raise
        model.load_state_dict(before)

    return read


def config_reader() -> Reader:
    """A saved model with the case as its config.json, from the folder to a forward pass."""

    def read(folder: Path) -> None:
        model = segzoo.create_model(f"local-dir:{folder}").eval().float()
        with torch.no_grad():
            model(torch.zeros(1, model.in_chans, 32, 32))

    return read


def plan_reader() -> Reader:
    """A plan as text or, behind "=", the object that the text spells in JSON; the model runs with what is taken."""
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer").eval()
    image = torch.randn(1, 3, 33, 47)

    def read(path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        plan = json.loads(text[1:]) if text.startswith("=") else text
        before = str(model)
        try:
            model.set_inference_reduction(plan)
        except segzoo.SegzooError:
            assert str(model) == before
            raise
        with torch.no_grad():
            assert model(image).isfinite().all()
        model.set_inference_reduction(None)

    return read


def read_data(path: Path) -> None:
    """A data set by its folder or list file: classes, and every image with its mask."""
    data = open_data(path)
    for index in range(len(data)):
        data[index]


READERS: dict[str, Callable[[], Reader]] = {
    "image": lambda: load_image,
    "safetensors": weights_reader,
    "pth": weights_reader,
    "old pth": weights_reader,
    "pdparams": weights_reader,
    "config": config_reader,
    "plan": plan_reader,
    "mask": lambda: read_mask,
    "classes": lambda: read_data,
    "list file": lambda: read_data,
}


def judge(read: Reader, path: Path) -> dict[str, object]:
    """Read one case within the limits."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    # A round number of seconds that SECONDS never reaches: this only ends what would never end.
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 2 * SECONDS + 1, resource.RLIM_INFINITY))
    start, outcome, error = time.process_time(), "read", ""
    try:
        read(path)
    except segzoo.SegzooError as refusal:
        outcome, error = "refused", str(refusal)
    except AssertionError:
        outcome, error = "changed", "refused, but the model has changed"
    except BaseException as foreign:
        places = [f"{Path(place.filename).name}:{place.name}" for place in traceback.extract_tb(foreign.__traceback__)]
        outcome, error = "foreign", f"{type(foreign).__name__} in {' < '.join(places[:0:-1][:4])}: {str(foreign)[:200]}"
    seconds = time.process_time() - start
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"outcome": outcome, "error": error, "seconds": seconds}


def main(name: str) -> None:
    torch.set_num_threads(1)
    Image.init()  # decoders are imported on first use
    read = READERS[name]()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(judge(read, Path(json.loads(line)))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
