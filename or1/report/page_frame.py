"""The frame of every page of or1: head, security policy, contents and footer; and the card of a plot."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from or1.core.errors import ReportError
from or1.core.files import write_whole
from or1.report.page_style import STYLE
from or1.report.page_text import clock, escaped

if TYPE_CHECKING:
    from or1.report.page_plots import Plot

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_HEADING = re.compile(r'<h2 id="([a-z]+)">([A-Za-z ]+)</h2>')


def framed(name: str, header: str, body: str, refresh_s: int = 0) -> str:
    """Return a whole page. Its contents list the headings of the body that have an id.

    name       title, escaped
    refresh_s  seconds after which a browser loads the page again; 0: never
    """
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title in _HEADING.findall(body))
    note = f", renewed every {refresh_s} s" if refresh_s else ""
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">{refresh}'
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{name} - or1 report</title><style>{STYLE}</style></head>\n<body><main>"
        f'{header}<nav aria-label="contents">{links}</nav>{body}'
        f"<footer>Written by or1 report, {clock(time.time())}{note}.</footer></main></body></html>\n"
    )


def write_page(target: Path, page: str) -> Path:
    """Write a page whole and return its path. Raises ReportError if the file cannot be written."""
    try:
        write_whole(target, page, durable=False, shared=True)
    except OSError as error:
        raise ReportError(f"{target} cannot be written: {error.strerror}") from error
    return target


def plot_card(plot: Plot) -> str:
    """Return the card of a plot, with its legend."""
    marks = "".join(
        f'<span><i class="{entry.mark}" style="{"background" if entry.mark == "fill" else "border-color"}:'
        f'var(--{entry.color})"></i>{escaped(entry.label)}</span>'
        for entry in plot.legend
    )
    legend = f'<div class="legend">{marks}</div>'
    return (
        f'<section class="card plot{" wide" if plot.wide else ""}"><h3>{escaped(plot.title)}</h3>'
        f'<p class="caption">{escaped(plot.caption)}</p>{legend}{plot.svg}</section>\n'
    )
