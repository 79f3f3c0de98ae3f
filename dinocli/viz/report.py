"""Report of a run: curves.png and a self-contained HTML page."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinocli.core.atomic import write_text
from dinocli.core.checksums import parse
from dinocli.core.runs import CURVES, METRICS, REPORT, STAGES, VERDICT
from dinocli.method.settings import flat, shipped_as
from dinocli.viz.curves import chart_svg, write_sheet
from dinocli.viz.history import Curve, read_history
from dinocli.viz.page import facts_of, figure_of, page_of, sections_of, table_of, text_of, tile_of
from dinocli.viz.panels import Chart, LossFacts, charts

_TIMES = 8  # maximum number of steps whose attention is shown
_TILES = 12  # maximum number of photos, even if the folder holds more
Tiles = list[str]  # data: URLs


def write_report(folder: Path) -> None:
    """Write `curves.png` and `report.html` into a run folder, from its metrics, preset and pictures.

    The page omits missing files and skips corrupt ones.

    Raises:
        OSError: If the disk is full or the folder is not writable.
    """
    history, preset = read_history(folder / METRICS), read_json(folder / "preset.json")
    drawn = charts(history, read_losses(preset))
    write_sheet(drawn, folder / CURVES)
    pictures = folder / "pictures"
    bodies = {
        "Verdict": _render_verdict(folder / VERDICT),
        "Stages": _render_stages(folder / STAGES, preset),
        "Curves": render_curves(drawn),
        "Attention": _render_attention(pictures),
        "Neighbours": _render_neighbours(pictures),
        "Settings": _render_settings(preset),
        "Values": _render_values(history),
    }
    nav, sections = sections_of(bodies.items())
    title = text_of(folder.resolve().name)
    head = f"<header><h1>{title}</h1>{_render_facts(history, preset)}{nav}</header>"
    write_text(folder / REPORT, page_of(title, f"{head}<main>{sections}</main>"))


def draw_curves(history: Mapping[str, Curve], preset: dict[str, Any], path: Path) -> None:
    """Write the curves of a run as a PNG.

    Args:
        history: Logged values by key.
        preset: Stored preset of the run.
        path: Output file.

    Raises:
        OSError: If the disk is full or the path is not writable.
    """
    write_sheet(charts(history, read_losses(preset)), path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in a JSON file; empty if the file is missing or corrupt."""
    try:
        data = parse(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _get(data: object, *keys: str) -> Any:
    """Return the value at nested keys, or None if an older version lacks a key."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def read_losses(preset: dict[str, Any]) -> dict[str, LossFacts]:
    """Return the weight and the prototypes of each loss on prototypes in a stored preset."""
    facts = {}
    for name, loss in (_get(preset, "losses") or {}).items():
        prototypes = _get(preset, "heads", str(_get(loss, "head")), "prototypes")
        if isinstance(prototypes, int) and prototypes > 1:
            facts[name] = LossFacts(float(_get(loss, "weight") or 1.0), prototypes)
    return facts


def _render_facts(history: Mapping[str, Curve], preset: dict[str, Any]) -> str:
    """Render the progress of the run as a list of figures."""
    facts = {"recipe": _get(preset, "about", "recipe")}
    last = {key: curve.values[-1] for key, curve in history.items() if len(curve.finite)}
    if history:
        step, epochs = max(curve.steps[-1] for curve in history.values()), _get(preset, "training", "epochs")
        facts["steps"] = f"{step:,.0f}"
        if last.get("epoch", 0) > 0 and epochs:
            facts["steps"] += f" of {step / last['epoch'] * epochs:,.0f}"
            facts["epochs"] = f"{last['epoch']:.6g} of {epochs}"
    for key, name, form in _FIGURES:
        if key in last:
            facts[name] = form.format(last[key])
    facts["written"] = time.strftime("%Y-%m-%d %H:%M")
    return facts_of(facts.items())


def _render_stages(path: Path, preset: dict[str, Any]) -> str:
    """Render the stages that led to the run, and the run itself as the last one; empty if it continues no other."""
    earlier = read_json(path).get("stages")
    if not isinstance(earlier, list):
        return ""
    lines = [(_get(s, "recipe"), _get(s, "source"), _get(s, "steps"), _get(s, "batch_size")) for s in earlier]
    lines.append((_get(preset, "about", "recipe"), "this run", None, _get(preset, "training", "batch_size")))
    started = ["random or initial weights"]
    started += ["with optimizer" if _get(stage, "optimizer") else "optimizer anew" for stage in earlier]
    rows = [(n, *cells, start) for n, (cells, start) in enumerate(zip(lines, started, strict=True), 1)]
    return table_of(("", "recipe", "run", "steps", "batch", "start"), rows, "Stages")


def _render_verdict(path: Path) -> str:
    """Render the comparison of an adaptation with its released weights; empty if there is none."""
    rows = read_json(path).get("rows")
    if not isinstance(rows, list):
        return ""
    table = table_of(("figure", "released", "adapted", "difference"), rows, "Verdict")
    return f"<p>{text_of(_get(read_json(path), 'verdict') or '')}</p>{table}"


_FIGURES = (
    ("loss", "loss", "{:.3f}"),
    ("knn", "k-NN", "{:.1f} %"),
    ("rank", "effective rank", "{:.1f}"),
    ("images_per_second", "images per second", "{:,.0f}"),
    ("skipped", "skipped steps", "{:.0f}"),
)


def render_curves(drawn: list[Chart]) -> str:
    """Return charts with their descriptions as HTML."""
    if not drawn:
        return "<p>No values logged yet.</p>"
    text = ""
    for chart in drawn:
        label = text_of(f"{chart.title}: {_describe(chart)}")
        text += f"<figure><h3>{text_of(chart.title)}</h3>{chart_svg(chart, label)}"
        text += f"<figcaption>{text_of(chart.healthy)}</figcaption></figure>"
    return f"<div class='panels'>{text}</div>"


def _describe(chart: Chart) -> str:
    """Describe a chart for screen readers: the first and last value of each curve."""
    ends = [(axis.title, name, curve.finite) for axis in chart.axes for name, curve in axis.curves.items()]
    return "; ".join(f"{title}, {name}, from {v[0]:.4g} to {v[-1]:.4g}" for title, name, v in ends if len(v))


def _render_attention(pictures: Path) -> str:
    steps = _space_evenly(_list_steps(pictures, "attention"))
    photos, maps = _read_row(pictures / "photos.jpg"), {s: _read_row(pictures / f"attention-{s}.jpg") for s in steps}
    maps = {step: tiles for step, tiles in maps.items() if tiles and len(tiles) == len(photos)}
    if not maps:
        return ""
    text = (
        "<p>Attention of the teacher's class token in the last block, averaged over the heads. Each map is scaled from "
        "its minimum (black) to its maximum (yellow). In a healthy run the maps differ between photos and come to "
        "separate objects from the background.</p>"
    )
    for i, (photo, name) in enumerate(zip(photos, _read_names(pictures, len(photos)), strict=True)):
        tiles = figure_of(photo, f"Photo {i + 1}: {name}", "photo")
        for step, row in maps.items():
            tiles += figure_of(row[i], f"Photo {i + 1}, attention at step {step}", f"step {step:,}")
        text += f"<h3 class='name'>{name}</h3><div class='tiles'>{tiles}</div>"
    return text


def _render_neighbours(pictures: Path) -> str:
    steps = _list_steps(pictures, "neighbours")
    photos = _read_row(pictures / "photos.jpg")
    grids = {
        s: _read_grid(pictures / f"neighbours-{s}.jpg", len(photos)) for s in dict.fromkeys(steps[:1] + steps[-1:])
    }
    grids = {step: rows for step, rows in grids.items() if rows}
    if not grids:
        return ""
    text = (
        "<p>Nearest neighbours among a few hundred photos, by cosine similarity of their features, nearest first. An "
        "untrained network matches colors; a trained one matches content. The same neighbours for every photo "
        "indicate collapse.</p>"
    )
    for i, name in enumerate(_read_names(pictures, len(photos))):
        text += f"<h3 class='name'>{name}</h3><div class='times'>"
        for step, rows in grids.items():
            tiles = figure_of(rows[i][0], f"Photo {i + 1}: {name}", "photo")
            tiles += "".join(
                figure_of(tile, f"Neighbour {k} of photo {i + 1} at step {step}", str(k))
                for k, tile in enumerate(rows[i][1:], 1)
            )
            text += f"<div><p>step {step:,}</p><div class='tiles six'>{tiles}</div></div>"
        text += "</div>"
    return text


def _read_names(pictures: Path, count: int) -> list[str]:
    """Return the photos' names, escaped for the page."""
    names = _get(read_json(pictures / "photos.json"), "names")
    names = names if isinstance(names, list) else []
    return [text_of(names[i] if i < len(names) else f"photo {i + 1}") for i in range(count)]


def _list_steps(pictures: Path, kind: str) -> list[int]:
    found = (re.fullmatch(rf"{kind}-([0-9]+)\.jpg", path.name) for path in pictures.glob(f"{kind}-*.jpg"))
    return sorted(int(match[1]) for match in found if match)


def _space_evenly(steps: list[int]) -> list[int]:
    """Return the first step, the last, and evenly spaced ones between."""
    return [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, _TIMES).round().astype(int))] if steps else []


def _read_row(path: Path) -> Tiles:
    rows = _read_grid(path, 1)
    return rows[0] if rows else []


def _read_grid(path: Path, rows: int) -> list[Tiles]:
    """Return the square tiles of a picture, row by row; none if it cannot be read."""
    try:
        with Image.open(path, formats=["JPEG"]) as file:
            page = file.convert("RGB")
    # Pillow's readers raise almost any error on a corrupt file.
    except Exception:
        return []
    side = page.height // max(1, rows)
    columns = min(_TILES, page.width // max(1, side))
    if not side or not columns:
        return []
    return [[tile_of(page.crop(_locate_tile(r, c, side))) for c in range(columns)] for r in range(min(rows, _TILES))]


def _locate_tile(row: int, column: int, side: int) -> tuple[int, int, int, int]:
    return column * side, row * side, (column + 1) * side, (row + 1) * side


def _render_settings(preset: dict[str, Any]) -> str:
    if not preset:
        return ""
    name, before = shipped_as(preset)
    text = f"<p>Highlighted settings differ from the preset <code>{name}</code>.</p>" if name else ""
    text += "<div class='tables'>"
    for table, values in preset.items():
        if table == "about":
            continue
        now, then = dict(flat(values)), dict(flat(_get(before, table)))
        keys = [key for key in dict.fromkeys([*now, *then]) if now.get(key) is not None or then.get(key) is not None]
        rows = "".join(_render_setting(key, now.get(key), then.get(key), marked=bool(name)) for key in keys)
        text += f"<table><caption>{text_of(table)}</caption><tbody>{rows}</tbody></table>" if rows else ""
    return text + "</div>"


def _render_setting(key: str, now: str | None, then: str | None, *, marked: bool) -> str:
    changed = marked and now != then
    note = f" <small>preset: {text_of(then or 'none')}</small>" if changed else ""
    value = f"<mark>{text_of(now or 'none')}</mark>{note}" if changed else text_of(now)
    return f'<tr><th scope="row">{text_of(key)}</th><td>{value}</td></tr>'


def _render_values(history: Mapping[str, Curve]) -> str:
    rows = []
    for key, curve in sorted(history.items()):
        if len(finite := curve.finite):
            figures = (curve.values[-1], curve.values[0], finite.min(), finite.max())
            rows.append((key, *(f"{value:.5g}" for value in figures), len(curve.steps)))
    return table_of(("value", "last", "first", "minimum", "maximum", "entries"), rows, "Values") if rows else ""
