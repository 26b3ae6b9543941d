"""A process of its own with the real huggingface_hub client, driven by the tests line by line.

Each line of stdin is a job in JSON: {"name": ..., "options": {...}, "threads": n, "environ": {...}, "file_limit": n,
"read_only": folder}. With the limit no file may grow beyond n bytes, as on a full disk; below the folder nothing may be
written, as on a read-only mount. The answer is a line on stdout with a digest of every thread's model, or the error,
its type and what was logged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import segzoo
from segzoo.zoo.download import cache

cache.WAITS = (0.0,) * len(cache.WAITS)  # tried again at once


class Client:
    """The parent's end."""

    def __init__(self, environ: dict[str, str]):
        environ = {**environ, "PYTHONPATH": os.pathsep.join((*sys.path, environ.get("PYTHONPATH", "")))}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def start(
        self,
        name: str,
        *,
        threads: int = 1,
        environ: dict[str, str] | None = None,
        file_limit: int | None = None,
        read_only: str | None = None,
        **options: Any,
    ) -> None:
        job = {"name": name, "options": options, "threads": threads, "environ": environ or {}, "file_limit": file_limit}
        job["read_only"] = read_only
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, "the client has died"
        return json.loads(line)

    def create(self, name: str, **job: Any) -> dict[str, Any]:
        self.start(name, **job)
        return self.answer()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)


def digest(model: torch.nn.Module) -> str:
    """Of every name and value, and of which parameters are trained."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device}".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, parameter in model.named_parameters():
        total.update(f"{name} {parameter.requires_grad}".encode())
    return total.hexdigest()


read_only: str | None = None


def refuse_writing(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook, since root may write anywhere and an ordinary user may not mount."""
    writing = {"open": 2, "os.mkdir": None, "os.remove": None, "os.rename": None, "os.symlink": None}
    if read_only is None or event not in writing or not str(args[0]).startswith(read_only):
        return
    flags = args[2] if event == "open" else os.O_WRONLY
    if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise OSError(errno.EROFS, "Read-only file system", str(args[0]))


def run(job: dict[str, Any]) -> dict[str, Any]:
    global read_only
    read_only = job["read_only"]
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("segzoo").addHandler(handler)
    previous = {name: os.environ.get(name) for name in job["environ"]}
    os.environ.update(job["environ"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if job["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], limits[1]))
    result: dict[str, Any] = {}
    try:
        with ThreadPoolExecutor(job["threads"]) as pool:
            models = [pool.submit(segzoo.create_model, job["name"], **job["options"]) for _ in range(job["threads"])]
            models = [future.result() for future in models]
        result = {"digests": [digest(model) for model in models], "model": models[0].name}
    except segzoo.SegzooError as error:
        result = {"error": str(error), "type": type(error).__name__, "cause": type(error.__cause__).__name__}
    except Exception as error:  # what must never reach a user
        result = {"error": repr(error), "type": type(error).__name__}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        logging.getLogger("segzoo").removeHandler(handler)
        for name, value in previous.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return {**result, "log": messages}


if __name__ == "__main__":
    logging.lastResort = None
    sys.addaudithook(refuse_writing)
    sys.stderr = Path(os.devnull).open("w")  # progress bars
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
