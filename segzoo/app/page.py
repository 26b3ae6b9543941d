"""The page itself, by Gradio, and how it is served.

A picture stays in the visitor's browser, which sends it along with every click; here it lies in a file only while it is
received, and in memory only while it is worked on. Nothing is kept of a visitor: what was chosen comes with the click.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import io
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .._errors import ImageError, SegzooError, first_line
from . import pieces
from .bench import MAX_BYTES, SCENES, Bench, Choice, Picture, Reduction, decoded, installed_engines

MAX_BODY = 2 * MAX_BYTES  # of a request: a picture as text takes four thirds of its bytes
SHOWN_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif", "BMP": "image/bmp"}
NONE, BY_SITE, DEFAULT = "none", "by site", "optimal"
SLIDERS = 16  # sites at most that can be set one by one
MAX_FACTOR = 8
QUALITY = 90  # of the pictures that are shown
ABOUT_REDUCTION = "how many tokens attention sees: a preset, or a factor for each of its sites (.q: on its queries)"
NO_PICTURE = "choose a picture: upload one, take one, or take a scene"

# The browser says "input" also where a picture is removed, and sends the removed one, which it has as text already.
ONLY_FRESH = "picture => [picture && picture.url && picture.url.startsWith('data:') ? null : picture]"

CSS = """
.sz-headline {font-size: 1.15rem; margin: 0 0 .6rem}
.sz-note {font-size: .85rem; opacity: .75; margin: 0}
.sz-table + .sz-note {margin-top: .6rem}
.sz-problem {padding: .7rem .9rem; border-left: 4px solid #d53c00; background: var(--background-fill-secondary)}
.sz-table {border-collapse: collapse; border: none; width: 100%; font-variant-numeric: tabular-nums}
.sz-table tr {border: none}
.sz-table th, .sz-table td {padding: .25rem .5rem; border: none; border-bottom: 1px solid var(--border-color-primary);
  text-align: right; font-weight: 400; white-space: nowrap}
.sz-table th:first-child {text-align: left; white-space: normal}
.sz-table tr:first-child th {font-weight: 600; white-space: normal}
.sz-legend {display: flex; flex-wrap: wrap; gap: .3rem .9rem; font-size: .95rem}
.sz-swatch {display: inline-block; width: .95em; height: .95em; margin-right: .4em; vertical-align: -.1em;
  border: 1px solid #0006; border-radius: 2px}
#overlay .image-frame, #changes .image-frame {width: 100%}
#overlay .image-frame img, #changes .image-frame img {width: 100%; max-height: 75vh; object-fit: contain !important}
#sites > div:not(:has(*)) {display: none}
#sites > div:has(*) {display: grid; grid-template-columns: 1fr 1fr}
@media (max-width: 480px) {.sz-table th, .sz-table td {padding: .25rem .25rem; font-size: .85rem}}
"""


def serve(bench: Bench, *, host: str, port: int, on_ready: Callable[[str], object]) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Args:
        host, port: address on this machine.
        on_ready: called with the page's address once it can be opened.

    Raises:
        SegzooError: gradio is not installed, or the address cannot be taken.
    """
    check_installed()
    with tempfile.TemporaryDirectory(prefix="segzoo-app-") as folder, _environment(folder, host):
        import gradio  # makes a folder of its own for what it receives, unless it is told one

        page = build(bench, gradio)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                max_file_size=MAX_BYTES,
                app_kwargs={"middleware": [_gate()], "docs_url": None, "redoc_url": None},
                theme=gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
                css=CSS,
            )
        except OSError as error:
            raise SegzooError(
                f"the page cannot be served at {host}:{port}: the port is taken, or the address is none of this "
                f"machine ({first_line(error)}); choose others with --host and --port"
            ) from None
        try:
            with fetching_nothing():
                on_ready(address)
                _wait()
        finally:
            page.close(verbose=False)


def check_installed() -> None:
    """Raises SegzooError, naming the extra, where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise SegzooError("the page needs gradio; install it with pip install 'segzoo[app]'")


@contextlib.contextmanager
def _environment(folder: str, host: str) -> Iterator[None]:
    """What Gradio reads from the environment: where it puts what it receives, no telemetry, no proxy to ourselves."""
    direct = ",".join(
        filter(None, [os.environ.get("no_proxy", os.environ.get("NO_PROXY")), "localhost,127.0.0.1", host])
    )
    wanted = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "no_proxy": direct, "NO_PROXY": direct}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def fetching_nothing() -> Iterator[None]:
    """Gradio would fetch a picture from the address that a hand-made request has in its place; here it does not."""
    from gradio import processing_utils

    async def refuse(url: str, cache_dir: str) -> str:
        raise ValueError(f"the page fetches nothing, and so not {url}")

    before = processing_utils.async_ssrf_protected_download
    processing_utils.async_ssrf_protected_download = refuse
    try:
        yield
    finally:
        processing_utils.async_ssrf_protected_download = before


def _wait() -> None:
    """Until Ctrl-C or SIGTERM."""
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not ended.wait(1.0):  # a wait without end is not interrupted on every system
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _gate() -> Any:
    from starlette.middleware import Middleware

    return Middleware(Gate)


class Gate:
    """ASGI middleware: no file that was received is given out, and no request is received that has more than MAX_BODY
    bytes or does not say how many."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        refusal = _refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse(refusal[1], status_code=refusal[0])(scope, receive, send)


def _refusal(request: Any) -> tuple[int, str] | None:
    """Status and text of the answer to a request that is not to be received."""
    if request["path"].startswith(("/gradio_api/file", "/file")):
        return 404, "no file is given out"
    if request["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    length = dict(request["headers"]).get(b"content-length", b"")
    if not length.isdigit():
        return 411, "say how long the request is"
    return (413, "the request is too large") if int(length) > MAX_BODY else None


# --- the page ---------------------------------------------------------------------------------------------------------


def build(bench: Bench, gr: Any) -> Any:
    """The page as Gradio's Blocks.

    Args:
        gr: gradio.
    """
    first = bench.names[0]
    presets = reductions(bench, first)
    with gr.Blocks(title="segzoo", analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.HTML(
            "<h1>segzoo</h1><p>Give attention fewer tokens after training, and see what that saves and what it "
            "changes. Pictures are worked on here and kept nowhere.</p>",
            padding=False,
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = _image(
                    gr, label="Picture", elem_id="picture", sources=["upload", "webcam", "clipboard"], height=260
                )
                with gr.Row():
                    scenes = [
                        gr.Button(f"Scene {i + 1}", size="sm", min_width=80, elem_id=f"scene-{i + 1}")
                        for i in range(len(SCENES))
                    ]
                model = gr.Dropdown(
                    bench.names,
                    value=first,
                    label="Model",
                    info="those whose weights are on this machine; of any other name the page says how to get it",
                    allow_custom_value=True,
                    elem_id="model",
                )
                about = gr.HTML(padding=False)
                reduction = gr.Radio(
                    presets, value=_default(presets), label="Reduction", info=ABOUT_REDUCTION, elem_id="reduction"
                )
                with gr.Row(elem_id="sites"):
                    sliders = [
                        gr.Slider(1, MAX_FACTOR, step=1, min_width=150, buttons=[], elem_id=f"site-{i}", **options)
                        for i, options in enumerate(slider_options(bench, first, _default(presets), visible=False))
                    ]
                engine = gr.Radio(installed_engines(), value="torch", label="Engine", elem_id="engine")
            with gr.Column(scale=3, min_width=320):
                refusal = gr.Textbox(visible=False)  # why the last picture was none
                summary = gr.HTML(elem_id="summary", padding=False)
                overlay = _image(gr, label="Mask over the picture", interactive=False, elem_id="overlay")
                legend = gr.HTML(elem_id="legend", padding=False)
                changes = _image(gr, label="Pixels that the reduction changed", interactive=False, elem_id="changes")
                changes_legend = gr.HTML(elem_id="changes-legend", padding=False)
                areas = gr.HTML(elem_id="areas", padding=False)
                code = gr.Code(
                    language="python", label="The same in Python", interactive=False, wrap_lines=True, elem_id="code"
                )

        shown = [about, summary, overlay, legend, changes, changes_legend, areas, code]
        chosen = [picture, refusal, model, reduction, engine, *sliders]
        once: dict[str, Any] = {"trigger_mode": "always_last", "api_visibility": "private"}
        quiet: dict[str, Any] = {"show_progress": "hidden", **once}
        run: dict[str, Any] = {
            "fn": functools.partial(click, bench),
            "inputs": chosen,
            "outputs": shown,
            "show_progress": "minimal",
            "show_progress_on": [overlay, changes],
            **once,
        }

        page.load(functools.partial(bench.scene, SCENES[0]), None, picture, **quiet).then(**run)
        for button, seed in zip(scenes, SCENES, strict=True):
            button.click(functools.partial(bench.scene, seed), None, picture, **quiet).then(**run)
        picture.input(take, picture, [picture, refusal], js=ONLY_FRESH, **quiet).then(**run)
        follow = functools.partial(follow_model, bench, gr.update)
        model.input(follow, model, [reduction, *sliders], **quiet).then(**run)
        adjust = functools.partial(follow_reduction, bench, gr.update)
        reduction.input(adjust, [model, reduction], sliders, **quiet).then(**run)
        gr.on([engine.input, *(slider.input for slider in sliders)], **run)
    return page


def _image(gr: Any, *, label: str, **options: Any) -> Any:
    """Gradio's image, whose own ways in and out open what was uploaded before its size is known, and write what is
    shown to files. An event may give it values, but no `gr.update`: that would put Gradio's own in its place."""
    image = gr.Image(label=label, buttons=["download", "fullscreen"], **options)
    image.preprocess, image.postprocess = received, shown_image
    return image


def received(payload: Any) -> Picture | None:
    """What the browser sends, of Gradio's `ImageData`: a picture as text, or the file of a fresh upload, which is
    removed."""
    if payload is None:
        return None
    name = Path(payload.orig_name or "picture").name
    if payload.url and payload.url.startswith("data:"):
        return Picture(name, base64.b64decode(payload.url.partition(",")[2]))
    file = Path(payload.path).resolve()
    if Path(os.environ["GRADIO_TEMP_DIR"]).resolve() not in file.parents:
        return None
    try:
        return Picture(name, file.read_bytes())
    finally:
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another file is in it
            file.parent.rmdir()  # called after the picture's hash


def shown_image(value: Picture | Image.Image | None) -> Any:
    """A picture as text that a browser shows; in Gradio's `ImageData`."""
    from gradio.data_classes import ImageData

    if value is None:
        return None
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, format="WEBP", quality=QUALITY)
        value = Picture("segzoo.webp", stream.getvalue())
    with Image.open(io.BytesIO(value.data)) as image:
        kind = SHOWN_FORMATS[image.format or ""]
    return ImageData(url=f"data:{kind};base64,{base64.b64encode(value.data).decode()}", orig_name=value.name)


# --- what happens on a click ------------------------------------------------------------------------------------------


def take(picture: Picture | None) -> tuple[Picture | None, str]:
    """A new picture for the browser to keep, in a form that it shows and without loss; or none, and why."""
    if picture is None:
        return None, ""
    try:
        image_HWC = decoded(picture, 3)
    except ImageError as error:
        return None, str(error)
    with Image.open(io.BytesIO(picture.data)) as image:
        if image.format in SHOWN_FORMATS:
            return picture, ""
    stream = io.BytesIO()
    Image.fromarray(image_HWC).save(stream, format="PNG")
    if stream.tell() > MAX_BYTES:
        return None, f"{picture.name} is of a kind that browsers do not show, and too large as PNG; save it as JPEG"
    return Picture(picture.name, stream.getvalue()), ""


def click(
    bench: Bench, picture: Picture | None, refusal: str, model: str, reduction: str, engine: str, *factors: int
) -> list[Any]:
    """Everything that the page shows of an answer; where something is refused, a sentence and nothing else.

    Args:
        refusal: why there is no picture; "" where none was given.
    """
    nothing: list[Any] = [None, "", None, "", "", None]
    if picture is None:
        return ["", pieces.problem(refusal or NO_PICTURE), *nothing]
    try:
        answer = bench.answer(picture, Choice(model, reduction_of(bench, model, reduction, factors), engine))
    except SegzooError as error:
        return ["", pieces.problem(str(error)), *nothing]
    return [
        pieces.about(model, answer.row),
        pieces.summary(answer),
        pieces.overlay(answer.reduced.result),
        pieces.legend(answer.reduced.result),
        pieces.changes(answer),
        pieces.changes_legend(answer),
        pieces.areas(answer),
        answer.code,
    ]


def reduction_of(bench: Bench, model: str, reduction: str, factors: Sequence[int]) -> Reduction:
    """What the radio buttons and the sliders say."""
    if reduction == NONE:
        return None
    if reduction != BY_SITE:
        return reduction
    return {site: int(factor) for site, factor in zip(bench.sites(model), factors, strict=False) if factor > 1} or None


def reductions(bench: Bench, model: str) -> list[str]:
    """What there is to choose from."""
    return [*bench.presets(model), BY_SITE] if bench.sites(model) else [NONE]


def _default(choices: Sequence[str]) -> str:
    return DEFAULT if DEFAULT in choices else choices[0]


def slider_options(bench: Bench, model: str, reduction: str, *, visible: bool) -> list[dict[str, Any]]:
    """Label, value and visibility of every slider; one begins where the preset has it, if that is a plain factor."""
    factors = bench.factors(model, reduction if reduction in bench.presets(model) else None)
    options = [
        {"label": site, "value": min(factors[site], MAX_FACTOR), "visible": visible} for site in bench.sites(model)
    ]
    return (options + [{"label": "", "value": 1, "visible": False}] * SLIDERS)[:SLIDERS]


def follow_model(bench: Bench, update: Any, model: str) -> list[Any]:
    """Reductions and sliders of the model; of one that is not here none, and the click says why.

    Args:
        update: Gradio's change of a component.
    """
    try:
        choices = reductions(bench, model)
        options = slider_options(bench, model, _default(choices), visible=False)
    except SegzooError:
        return [update(choices=[NONE], value=NONE), *[update(visible=False)] * SLIDERS]
    return [update(choices=choices, value=_default(choices)), *(update(**option) for option in options)]


def follow_reduction(bench: Bench, update: Any, model: str, reduction: str) -> list[Any]:
    """The sliders are there for their own choice, and go along with a preset, so that one can go on from it."""
    if reduction == BY_SITE:
        count = len(bench.sites(model))
        return [update(visible=i < count) for i in range(SLIDERS)]
    return [update(**option) for option in slider_options(bench, model, reduction, visible=False)]
