"""Hooks of MkDocs: pages may name files of the repository by links that work on the git forge and on the site alike.

Each file outside `docs/` that a page links to gets a page of the site: Markdown as it is, a notebook as its cells and a
link to download it, anything else as a listing. The README is the site's first page.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the README, and a page for each file outside `docs/` that a page links to, directly or not."""
    _add(files, config, "README.md")
    left = [
        "README.md",
        *(f"docs/{file.src_uri}" for file in files.documentation_pages() if file.src_uri != "index.md"),
    ]
    while left:
        path = left.pop()
        for target in _targets(path):
            if files.get_file_from_path(_uri(target)) is None:
                _add(files, config, target)
                left += [target] if target.endswith((".md", ".ipynb")) else []
    return files


def on_page_markdown(markdown: str, *, page: Any, **_others: Any) -> str:
    """Has the links to files of the repository point to their pages."""
    uri = str(page.file.src_uri)
    path = _path(uri)

    def place(match: re.Match[str]) -> str:
        target = _resolved(path, match["target"])
        if target is None:
            return match[0]
        return posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".") + (match["anchor"] or "")

    return LINK.sub(place, markdown)


def _add(files: Files, config: Any, path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        files.append(File.generated(config, path, content=text))
        text = _cells(text, posixpath.basename(path))
    elif not path.endswith(".md"):
        text = f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n````\n"
    files.append(File.generated(config, _uri(path), content=text))


def _cells(text: str, name: str) -> str:
    """A notebook as Markdown."""
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    title, *others = [source if kind == "markdown" else f"```python\n{source}\n```" for source, kind in cells]
    download = f'<a href="{name}" download>Download this notebook</a>'
    return "\n\n".join([title, download, *others])


def _targets(path: str) -> Iterator[str]:
    """The files of the repository that a page links to, as paths from its root."""
    for match in LINK.finditer((ROOT / path).read_text(encoding="utf-8")):
        target = _resolved(path, match["target"])
        if target is not None:
            yield target


def _resolved(path: str, target: str) -> str | None:
    """The file that a link in the file `path` means, as a path from the root; None where it means no file."""
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return found if not found.startswith("..") and (ROOT / found).is_file() else None


def _uri(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return path if path.endswith(".md") else f"{path}.md"


def _path(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    if uri == "index.md":
        return "README.md"
    own = f"docs/{uri}"
    return own if (ROOT / own).is_file() else uri.removesuffix("" if (ROOT / uri).is_file() else ".md")
