"""Hook of mkdocs: files outside docs/ that pages link to become pages of the site, under source/.

On a code host the links of docs/ lead to files of the repository. The site has no repository beside it, so the hook
copies the linked files. Markdown becomes a page, other text a page with one block of code, a picture stays as it is. A
folder is its README.md, or a list of its files. What a copied page links to is copied as well.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(#[^)]*)?(?=\))")
_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
_LANGUAGES = {".py": "python", ".toml": "toml", ".sbatch": "bash", ".sh": "bash", ".json": "json", ".jsonl": "json"}
_PICTURES = {".svg", ".png"}


def on_config(config: Any) -> Any:
    """Name the repository of pyproject.toml, if there is one, in the head of every page."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    config.repo_url = next((urls[name] for name in ("repository", "source", "homepage") if name in urls), None)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a file of the site for everything outside docs/ that a page links to."""
    texts = {f"docs/{page.src_uri}": page.content_string for page in files.documentation_pages()}
    seen = set(texts)
    while texts:
        origin, text = texts.popitem()
        for target in _targets(origin, text):
            if target not in seen and not target.startswith("docs/"):
                seen.add(target)
                texts[target] = _add(target, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point every link at the file of the site instead of the file of the repository."""
    uri = page.file.src_uri

    def in_site(link: re.Match[str]) -> str:
        target = _target(_origin(uri), link[1])
        there = link[1] if target is None else posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".")
        return there + (link[2] or "")

    return _ROW.sub(_without_escapes, _LINK.sub(in_site, markdown))


def _without_escapes(row: re.Match[str]) -> str:
    """Return a row of a table with plain pipes in code. Code hosts need a backslash there, which mkdocs would show."""
    return re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), row[0])


def _add(target: str, files: Files, config: Any) -> str:
    """Add a file or folder of the repository to the site. Return its Markdown, "" for a picture."""
    path, uri = ROOT / target, _uri(target)
    if path.suffix in _PICTURES:
        files.append(File.generated(config, uri, abs_src_path=str(path)))
        return ""
    content = _markdown(target)
    files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return content


def _markdown(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith((".", "__")))
        return "\n".join([f"# {target}", "", *(f"- `{name}`" for name in names), ""])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    # A title in the table of contents of the site; the fence is longer than any in the file.
    return f"# {target}\n\n`````{_LANGUAGES.get(path.suffix, 'text')}\n{text}`````\n"


def _targets(origin: str, text: str) -> Iterator[str]:
    for link in _LINK.finditer(text):
        target = _target(origin, link[1])
        if target is not None:
            yield target


def _target(origin: str, link: str) -> str | None:
    """Return the path in the repository that a link of `origin` leads to. None for an address or a damaged link."""
    if "://" in link or link.startswith("mailto:"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    if path.startswith("..") or not (ROOT / path).exists():
        if origin.startswith("docs/") and path.startswith("docs/"):
            # Between pages, mkdocs names the damaged links itself.
            return None
        raise PluginError(f"{origin} links to {link}, which is not in the repository")
    if (ROOT / path / "README.md").is_file():
        return f"{path}/README.md"
    return path


def _uri(target: str) -> str:
    """Return the name in the site of a path in the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    as_it_is = Path(target).suffix in {".md", *_PICTURES}
    return f"source/{target}" if as_it_is else f"source/{target}.md"


def _origin(uri: str) -> str:
    """Return the path in the repository of a page of the site."""
    if not uri.startswith("source/"):
        return f"docs/{uri}"
    path = uri.removeprefix("source/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")
