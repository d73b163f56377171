"""Pictures for the README: `python -m benchmarks.pictures OUT_DIR RUN [--step N]`, light and dark.

panel-light.svg, panel-dark.svg    the live panel after step N, by rich from the recorded metrics (default: three
                                   quarters of the run)
report-light.png, report-dark.png  the top of the report, by a real Chromium; left out if there is none

OUT_DIR of the committed ones is docs/pictures, and RUN a run of examples/quickstart.toml.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from benchmarks.lib.browser import find_chromium, shoot
from or1.config import Config
from or1.report.live import RunDisplay
from or1.report.page import write_report
from or1.report.page_data import load_run
from or1.report.records import step_seconds

MOST_BYTES = 150_000
"""Largest size of a picture."""
_COLUMNS = 80
_WIDTH, _HEIGHT, _SCALE = 1240, 1030, 1.5
# Background, text, then black, red, green, yellow, blue, magenta, cyan of the terminal.
_THEMES = {
    "light": [(252, 252, 250), (36, 36, 32), (60, 60, 56), (186, 38, 38), (12, 122, 61), (150, 105, 0), (30, 96, 190)]
    + [(150, 50, 150), (0, 120, 140)],
    "dark": [(24, 24, 23), (226, 225, 220), (110, 110, 104), (239, 111, 110), (63, 191, 120), (217, 170, 60)]
    + [(90, 159, 234), (200, 130, 220), (70, 190, 205)],
}
_RECENT = 10  # steps behind the time left, as in the live panel

# The SVG that rich writes names a font on a server, which no viewer of a README loads.
_FORMAT = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 17px; font-weight: 600; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def panel(run_dir: Path, step: int | None, title: str, scheme: str) -> str:
    """Return the live panel after a step as SVG, with the values, times and evaluations that the run recorded.

    step  None: three quarters of the recorded steps
    """
    from rich.console import Console
    from rich.terminal_theme import TerminalTheme

    run = load_run(run_dir)
    if not isinstance(run.config, Config):
        raise SystemExit(f"{run_dir} has no config.resolved.json of this or1")
    last = step if step is not None else round(0.75 * run.last_step)
    records = [record for record in run.records if record["step"] <= last]
    console = Console(
        record=True, file=io.StringIO(), force_terminal=True, width=_COLUMNS, color_system="truecolor", emoji=False
    )
    display = RunDisplay(run.config.total_steps, run.config.stage, console)
    display.recall(records)
    seconds = [step_seconds(record) for record in records]
    recent = seconds[-_RECENT:]
    console.print(display.still(sum(seconds), (run.config.total_steps - last) * sum(recent) / len(recent)))
    page, ink, *colours = _THEMES[scheme]
    theme = TerminalTheme(page, ink, [*colours, ink], [*colours, ink])
    text = console.export_svg(title=title, theme=theme, code_format=_FORMAT, unique_id=f"or1-{scheme}")
    return re.sub(r"[ \t]+\n", "\n", text)


def report(run_dir: Path, out: Path, scheme: str) -> Path:
    """Write the top of the report as a PNG of at most MOST_BYTES and return its path."""
    from PIL import Image

    shoot(write_report(run_dir), out, width=_WIDTH, height=_HEIGHT, scheme=scheme, scale=_SCALE)
    # A page has few colours, so a palette halves the file and nothing is lost to the eye.
    with Image.open(out) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(out, optimize=True)
    return out


def main() -> int:
    """Write the pictures, print their sizes, and return 1 if one is too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, help="step of the panel (default: three quarters of the run)")
    parser.add_argument("--title", default="or1 train examples/quickstart.toml", help="title of the panel's window")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = []
    for scheme in ("light", "dark"):
        path = arguments.out / f"panel-{scheme}.svg"
        path.write_text(panel(arguments.run, arguments.step, arguments.title, scheme), encoding="utf-8")
        written.append(path)
        if find_chromium() is not None:
            written.append(report(arguments.run, arguments.out / f"report-{scheme}.png", scheme))
    for path in written:
        print(f"{path} {path.stat().st_size:,} bytes")
    if find_chromium() is None:
        print("no Chromium, so no picture of the report; install the package chromium, or name one in OR1_CHROMIUM")
    return int(any(path.stat().st_size > MOST_BYTES for path in written))


if __name__ == "__main__":
    raise SystemExit(main())
