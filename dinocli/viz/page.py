"""HTML page that needs only a browser: head, style, and escaped text."""

from __future__ import annotations

import html

from dinocli.core.errors import visible


def text_of(value: object) -> str:
    """Escape text for the page: no tags, no control or direction marks, no invalid characters from file names."""
    return html.escape(visible(str(value)))


def page_of(title: str, body: str) -> str:
    """Return a complete page, in the reader's light or dark mode, for desktop and phone.

    Args:
        title: Title, escaped by `text_of`.
        body: HTML whose pictures are `data:` URLs; the page forbids the browser to fetch anything.
    """
    return f"{_HEAD.replace('TITLE', title)}<body>{body}</body></html>\n"


_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE · dino pretrain</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #33373d; --soft: #5c636d; --line: #d5d9de; --bad: #b3261e;
  --mark: #fff1b8; --curve-0: #1f6fb4; --curve-1: #b9570f; --curve-2: #2f7d32; --curve-3: #7a4aa8; --curve-4: #a33c55; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #dfe3e8; --soft: #a4adb8; --line: #363c44;
  --bad: #ff8a80; --mark: #574a12; --curve-0: #6db6f2; --curve-1: #f2a15f; --curve-2: #7fcf83; --curve-3: #c3a0ea;
  --curve-4: #ec8fa6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 80rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 .5rem; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1.05rem; }
h3.name { font-size: .9rem; }
.panels h3 { margin: 0; font-size: 1rem; }
p { max-width: 46rem; margin: .5rem 0; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 1rem; }
dt, figcaption, small { color: var(--soft); font-size: .85rem; }
dd { margin: 0; font-size: 1.1rem; }
nav a { display: inline-block; padding: .4rem .9rem .4rem 0; color: var(--curve-0); }
figure { margin: 0; min-width: 0; }
svg { display: block; width: 100%; height: auto; font-family: system-ui, sans-serif; }
img { display: block; width: 100%; aspect-ratio: 1; border: 1px solid var(--line); border-radius: 3px; }
.panels { display: grid; gap: 1.75rem 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.tiles { display: grid; gap: .4rem; grid-template-columns: repeat(9, 1fr); }
.tiles.six { grid-template-columns: repeat(6, 1fr); }
.times p { margin: 0 0 .3rem; color: var(--soft); font-size: .85rem; }
.tiles figcaption { text-align: center; font-size: .8rem; }
.times { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.tables { columns: 2; column-gap: 2.5rem; }
.wide { overflow-x: auto; }
table { width: 100%; margin: 0 0 1.25rem; border-collapse: collapse; break-inside: avoid; font-size: .9rem; }
caption { padding: .3rem 0; text-align: left; font-weight: 600; font-size: 1rem; }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  font-weight: normal; font-variant-numeric: tabular-nums; }
tbody th { width: 45%; color: var(--soft); }
.wide th, .wide td { width: auto; text-align: right; white-space: nowrap; }
.wide th:first-child { text-align: left; }
mark { background: var(--mark); color: inherit; padding: 0 .2em; }
@media (max-width: 50rem) { body { padding: .9rem; } .tables { columns: 1; } tbody th { width: 58%; }
  .tiles { grid-template-columns: repeat(3, 1fr); } .tiles.six { gap: .25rem; } }
</style></head>
"""
