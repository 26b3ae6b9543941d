"""Hooks of mkdocs for the site, which `mkdocs.yml` names.

Pages link to files of the repository that lie outside docs/, as GitHub needs it. The site takes these files in, below
repository/, and what they link to in turn; folders and programs get a page that shows them. Links are rewritten, so
that they hold in both places and nothing depends on an address. Pictures lead to themselves in full size. After the
build, a page that would fetch anything from elsewhere is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TAKEN_IN = "repository/"
SHOWN = {".py": "python", ".toml": "toml"}  # suffix of a file that gets a page -> language
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
# What a browser fetches by itself; a link that a reader follows is no such thing.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc(?:set)?=["']?((?:https?:)?//[^"'\s>]*)"""
    r"""|<link\b(?=[^>]*\srel=["']?(?:stylesheet|icon|preload|preconnect|prefetch))"""
    r"""[^>]*?\shref=["']?((?:https?:)?//[^"'\s>]*)"""
    r"""|(?:@import\s+|url\()["']?((?:https?:)?//[^"')\s]*)"""
)


def folder_of(uri: str) -> Path:
    """Where the source of a page of the site lies in the repository."""
    source = ROOT / uri.removeprefix(TAKEN_IN) if uri.startswith(TAKEN_IN) else DOCS / uri
    return source.parent


def uri_of(path: Path) -> str:
    """Where a file of the repository stands in the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    uri = TAKEN_IN + path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"{uri}/index.md"
    return f"{uri}.md" if path.suffix in SHOWN else uri


def target(link: str, uri: str) -> Path | None:
    """What a link of a page leads to; None if that is nothing in the repository."""
    path = Path(os.path.normpath(folder_of(uri) / link))
    return path if path.exists() and path.is_relative_to(ROOT) else None


def rewritten(markdown: str, uri: str) -> str:
    """The text of a page with the site's own links."""

    def replace(match: re.Match[str]) -> str:
        path = target(match[1], uri)
        return match[1] if path is None else os.path.relpath(uri_of(path), PurePosixPath(uri).parent)

    return LINK.sub(replace, markdown)


def text_of(path: Path) -> str | None:
    """The page of a file or folder; None if it stands in the site as it is."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file() and not file.name.startswith((".", "_")))
        return f"# `{name}`\n\n" + "".join(f"- [{file}]({file})\n" for file in names)
    if path.suffix in SHOWN:
        code = path.read_text(encoding="utf-8")
        return f"{NOT_SEARCHED}# `{name}`\n\n````{SHOWN[path.suffix]}\n{code}````\n"
    return path.read_text(encoding="utf-8") if path.suffix == ".md" else None


def taken_in(uris: Iterable[str]) -> dict[str, Path]:
    """What the pages `uris` link to outside docs/, and what that links to: URI -> file or folder."""
    found: dict[str, Path] = {}
    waiting = [(uri, folder_of(uri) / PurePosixPath(uri).name) for uri in uris]
    while waiting:
        uri, path = waiting.pop()
        if uri.startswith(TAKEN_IN):
            found[uri] = path
        for link in LINK.findall((not path.suffix or path.suffix == ".md") and text_of(path) or ""):
            to = target(link, uri)
            if to is not None and uri_of(to).startswith(TAKEN_IN) and uri_of(to) not in found:
                waiting.append((uri_of(to), to))
    return found


def in_nav(nav: Any) -> Iterator[str]:
    """The pages that a nav names."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from in_nav(item)


def foreign(text: str) -> list[str]:
    """The addresses that a browser would fetch for a page or style sheet."""
    return [next(filter(None, groups)) for groups in FETCHED.findall(text)]


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    pages = [file.src_uri for file in files.documentation_pages()]
    pages += [uri for uri in in_nav(config.nav or []) if uri.startswith(TAKEN_IN)]
    for uri, path in taken_in(pages).items():
        text = text_of(path)
        source = {"abs_src_path": str(path)} if text is None else {"content": text}
        files.append(File.generated(config, uri, **source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return rewritten(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return re.sub(r'(<img\b[^>]*\ssrc="([^"]+)"[^>]*>)', r'<a href="\2">\1</a>', html)


def on_post_build(config: MkDocsConfig) -> None:
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    for file in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        addresses = foreign(file.read_text(encoding="utf-8"))
        if addresses:
            raise PluginError(f"{file.relative_to(site)} would fetch {', '.join(addresses)}")
