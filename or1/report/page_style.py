"""The style sheet of the report, inlined into the page. Colours are variables, which dark mode redefines."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f5f2; --card: #fdfdfc; --ink: #14140f; --soft: #4b4a45; --muted: #77756e; --grid: #e2e1da;
  --line: #e7e6df; --accent: #2a78d6; --good: #0c7a3d; --bad: #c22f2e; --surprise: 214, 93, 14;
  --s0: #c3c1b7; --s1: #2a78d6; --s2: #1baf7a; --s3: #d99300; --s4: #008300; --s5: #6b4fd0; --s6: #e34948;
  --s7: #d55181; --s8: #eb6834;
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (prefers-color-scheme: dark) { :root {
  --page: #111110; --card: #1a1a19; --ink: #f3f2ed; --soft: #c5c3ba; --muted: #94928a; --grid: #33332f;
  --line: #2c2c29; --accent: #5a9fea; --good: #3fbf78; --bad: #ef6f6e; --surprise: 240, 130, 50;
  --s0: #55544e; --s1: #3987e5; --s2: #199e70; --s3: #c98500; --s4: #3da33d; --s5: #9085e9; --s6: #e66767;
  --s7: #d55181; --s8: #d95926; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -.005em; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.sub { color: var(--soft); margin: 4px 0 0; overflow-wrap: anywhere; }
.brand { color: var(--muted); font-size: 13px; letter-spacing: .02em; margin-bottom: 6px; }
nav { display: flex; flex-wrap: wrap; gap: 2px 18px; margin-top: 14px; font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.badge { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 12.5px; font-weight: 600;
  border: 1px solid currentColor; vertical-align: 4px; margin-left: 8px; letter-spacing: 0; white-space: nowrap; }
.badge.done, .up { color: var(--good); }
.badge.open { color: var(--accent); }
.down { color: var(--bad); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px;
  min-width: 0; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 8px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.grid > .wide { grid-column: 1 / -1; }
.evals { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  margin-top: 24px; }
.evals h3 { color: var(--soft); font-weight: 600; }
.score { display: flex; align-items: baseline; gap: 10px; flex-wrap: wrap; margin: 4px 0 10px; }
.score .from { font-size: 22px; color: var(--muted); }
.score .to { font-size: 38px; font-weight: 650; line-height: 1.15; letter-spacing: -.02em; }
.score .by { font-weight: 600; }
.track { position: relative; height: 14px; border-radius: 7px; background: var(--grid); }
.track i { position: absolute; top: 0; bottom: 0; border-radius: 7px; }
.track .was { background: var(--s0); left: 0; }
.track .gain { background: var(--accent); border-radius: 0 7px 7px 0; }
.track .loss { background: var(--bad); border-radius: 0 7px 7px 0; }
.track .ci { top: 6px; bottom: 6px; background: var(--ink); border-radius: 1px; opacity: .75; }
.scale { display: flex; justify-content: space-between; color: var(--muted); font-size: 11.5px; margin-top: 4px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); margin-top: 16px;
  padding: 0; overflow: hidden; }
.facts div { box-shadow: 1px 1px 0 var(--line); padding: 13px 14px; }
.facts b { display: block; font-size: 20px; font-weight: 620; letter-spacing: -.01em; white-space: nowrap; }
.facts span { color: var(--muted); font-size: 12.5px; }
.facts .alert b { color: var(--bad); }
.alarms { color: var(--bad); border-color: var(--bad); }
.notes { overflow-wrap: anywhere; margin: 16px 0 0; padding: 12px 20px 12px 36px; font-size: 14px; }
.notes:not(.alarms) { color: var(--soft); }
.caption { color: var(--muted); font-size: 13px; margin-top: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--soft); margin: 8px 0 4px; }
.legend i { display: inline-block; width: 16px; height: 0; border-top: 2.5px solid; vertical-align: middle;
  margin-right: 6px; }
.legend i.dash { border-top: 2px dashed; }
.legend i.fill { height: 10px; width: 10px; border: 0; border-radius: 3px; vertical-align: -1px; }
.plot { overflow-x: auto; }
.plot.wide svg { min-width: 640px; }
.plot svg { display: block; width: 100%; height: auto; overflow: visible; }
.hover rect { fill: var(--ink); fill-opacity: 0; }
.hover rect:hover { fill-opacity: .07; }
.plot svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: right; font-weight: 600; color: var(--soft); padding: 5px 12px; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
td { text-align: right; padding: 5px 12px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
.scroll { overflow: auto; max-height: 520px; }
.sample { display: flex; flex-direction: column; gap: 10px; margin-top: 0; }
.samples { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr));
  margin: 10px 0 26px; align-items: start; }
.tag { font-size: 12.5px; font-weight: 650; }
.tag::before { content: "\\25CF"; margin-right: 6px; }
.tag.solved { color: var(--good); }
.tag.partial { color: var(--accent); }
.tag.failed { color: var(--bad); }
.tag.truncated { color: var(--s8); }
.meta { color: var(--muted); font-size: 12.5px; overflow-wrap: anywhere; }
.label { color: var(--muted); font-size: 11.5px; font-weight: 600; letter-spacing: .03em; margin-bottom: 3px; }
pre { margin: 0; font: 12.5px/1.6 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--page); border-radius: 8px; padding: 10px 12px; max-height: 25em; overflow-y: auto;
  unicode-bidi: isolate; }
pre.short { max-height: 9em; }
pre i, .key i { font-style: normal; border-radius: 2px; }
.p1 { background: rgba(var(--surprise), .14); }
.p2 { background: rgba(var(--surprise), .30); }
.p3 { background: rgba(var(--surprise), .48); }
.p4 { background: rgba(var(--surprise), .72); }
.key { color: var(--muted); font-size: 12.5px; }
.key i { padding: 1px 6px; margin-left: 4px; color: var(--ink); }
.cut { color: var(--muted); font-style: italic; }
.config { columns: 3 330px; column-gap: 16px; }
.config .card { break-inside: avoid; margin-bottom: 16px; }
.config h3 { font-family: var(--mono); font-size: 13.5px; margin-bottom: 6px; }
.config td { white-space: normal; overflow-wrap: anywhere; font-size: 13px; padding: 3px 0 3px 12px; }
.config tr td:first-child { padding-left: 0; }
.config td:first-child { color: var(--soft); }
.config .own td { font-weight: 620; color: var(--ink); }
details { margin-top: 6px; }
summary { color: var(--muted); font-size: 12.5px; cursor: pointer; }
h2 + .caption { margin: -8px 0 14px; }
footer { color: var(--muted); font-size: 13px; margin-top: 40px; }
@media (max-width: 900px) { .facts b { font-size: 17px; } }
@media (max-width: 500px) { main { padding: 24px 14px 48px; } .plot svg text { font-size: 12.5px !important; }
  .card:not(.facts, .notes) { padding: 16px; } }
@media print { .card { break-inside: avoid; } pre { max-height: none; } }
"""
