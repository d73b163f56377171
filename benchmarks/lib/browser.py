"""A page in a real Chromium: screenshots, and the layout that the browser computes. Nothing is fetched from a network.

A page of or1 forbids scripts, so a measure loads the page into a frame of another page, whose script reads the layout.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SCHEMES = {"dark": 0, "light": 1}  # blink's PreferredColorScheme
_LIMIT_S = 120

_MEASURE = """<!doctype html><meta charset=utf-8><body style="margin:0">
<iframe id=f src="{page}" style="border:0;width:{width}px;height:900px"></iframe><pre id=found></pre><script>
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
document.getElementById("f").onload = event => {{
  const view = event.target.contentWindow, page = view.document, style = each => view.getComputedStyle(each);
  const scrolls = each => each && (["auto", "scroll"].includes(style(each).overflowX) || scrolls(each.parentElement));
  const ground = each => {{
    for (; each; each = each.parentElement) {{
      const colour = rgb(style(each).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }}
    return [255, 255, 255];
  }};
  const shown = [...page.body.querySelectorAll("*")].filter(each => each.getClientRects().length);
  const name = each => (each.tagName + "." + (each.className.baseVal ?? each.className)).toLowerCase() + " "
    + each.textContent.slice(0, 40);
  const texts = shown.filter(each => [...each.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    && !each.closest("svg"));
  const contrast = each => {{
    const [a, b] = [light(rgb(style(each).color)), light(ground(each))].sort((x, y) => y - x);
    return (a + .05) / (b + .05);
  }};
  document.getElementById("found").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth,
    scroll_width: page.documentElement.scrollWidth,
    sticking_out: shown.filter(e => e.getBoundingClientRect().right > {width} + .5 && !scrolls(e.parentElement)
      && !e.closest("svg")).map(name),
    cut: texts.filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth && !scrolls(e)
      && style(e).display !== "inline").map(name),
    faint: texts.filter(e => contrast(e) < 3).map(e => name(e) + " " + contrast(e).toFixed(2)),
    background: light(ground(page.body)),
    plots: [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width),
    columns: [...page.querySelectorAll(".hover rect")].filter(e => e.getBoundingClientRect().width > 0).length,
    facts: [...page.querySelectorAll(".facts")].map(e => [e.getBoundingClientRect().width, e.children.length,
      [...e.children].map(c => c.getBoundingClientRect().width)]),
  }});
}};
</script>"""


def find_chromium() -> str | None:
    """Return the path of a Chromium, None if none is installed. OR1_CHROMIUM names another one."""
    return os.environ.get("OR1_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


def shoot(page: Path, out: Path, *, width: int, height: int, scheme: str, scale: float = 1.0) -> Path:
    """Write a PNG of the top of a page and return its path. scheme: "light" or "dark". Raises RuntimeError."""
    flags = [f"--window-size={width},{height}", f"--force-device-scale-factor={scale:g}", f"--screenshot={out}"]
    _run([*flags, "--hide-scrollbars", page.absolute().as_uri()], scheme)
    if not out.is_file():
        raise RuntimeError(f"Chromium wrote no picture of {page}")
    return out


def measure(page: Path, *, width: int, scheme: str) -> dict[str, Any]:
    """Return what the browser finds in a page that is `width` pixels wide. Raises RuntimeError.

    width, scroll_width  of the document; equal if nothing sticks out
    sticking_out, cut    elements beyond the right edge, and texts that do not fit into their element
    faint                texts with a contrast below 3
    background           luminance of the page, 0 to 1
    plots, columns       widths of the plots, and the number of columns with values under the pointer
    facts                width of each row of facts, number and widths of its cells
    """
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_MEASURE.format(page=page.absolute().as_uri(), width=width), encoding="utf-8")
        flags = ["--allow-file-access-from-files", "--window-size=1700,1000", "--virtual-time-budget=10000"]
        text = _run([*flags, "--dump-dom", frame.as_uri()], scheme)
    found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
    if not found or not found[1]:
        raise RuntimeError(f"Chromium measured nothing in {page}")
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def _run(flags: list[str], scheme: str) -> str:
    chromium = find_chromium()
    if chromium is None:
        raise RuntimeError("no Chromium: install the package chromium, or name one in OR1_CHROMIUM")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}",
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"Chromium ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
