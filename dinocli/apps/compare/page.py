"""Page and picture of a comparison."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinocli.apps.compare.compare import METRICS, Comparison, Figures
from dinocli.core.atomic import write_text
from dinocli.data.decode.image import decode
from dinocli.data.decode.pixels import BadImage
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.open import Source
from dinocli.evals.bootstrap import Difference
from dinocli.viz.intervals import Interval, intervals_svg, write_intervals
from dinocli.viz.page import facts_of, figure_of, page_of, sections_of, table_of, text_of, tile_of
from dinocli.viz.picture import visible

PAGE, PICTURE = "compare.html", "compare.png"
_UNIT = "difference in accuracy, percentage points, with 95 % interval"
_SHOWN = 6  # photos per network and direction
_CLASSES = 100  # rows of the table of classes

Row = list[str]


def write_page(comparison: Comparison, source: Source | None, folder: Path, images: ImagesConfig = DEFAULTS) -> Path:
    """Write `compare.html`, and `compare.png` if there are differences; return the page.

    Args:
        comparison: Result to show.
        source: Source of the test split, to show images on which networks disagree. If None, or tar shards, none are.
        folder: Output folder.
        images: Settings and limits of image decoding.

    Raises:
        OSError: If the folder is not writable.
    """
    rows = list(_list_intervals(comparison))
    if rows:
        write_intervals(rows, _UNIT, folder / PICTURE)
    else:  # that of an earlier comparison
        (folder / PICTURE).unlink(missing_ok=True)
    names = [network.name for network in comparison.networks]
    verdicts = "".join(f"<p>{text_of(line)}.</p>" for line in comparison.verdicts)
    nav, sections = sections_of(
        [
            ("Verdict", verdicts),
            ("Figures", table_of(["figure", *names], list_rows(comparison), "Figures") + _EXPLAINED),
            ("Differences", _render_intervals(rows)),
            ("Photos", _render_photos(comparison, source, images) if isinstance(source, Images) else ""),
            ("Classes", _render_classes(comparison)),
        ]
    )
    title = text_of(f"{' and '.join(names)} on {comparison.data}")
    facts = facts_of(
        [
            ("images", f"{comparison.images:,}"),
            ("training images", f"{comparison.voters:,}" if comparison.voters and not comparison.leave_one_out else ""),
            ("classes", len(comparison.test.classes) if comparison.k else ""),
            ("neighbours", comparison.k),
            ("written", time.strftime("%Y-%m-%d %H:%M")),
        ]
    )
    head = f"<header><h1>{title}</h1>{facts}{nav}</header>"
    write_text(folder / PAGE, page_of(title, f"{head}<main>{sections}</main>"))
    return folder / PAGE


def list_rows(comparison: Comparison) -> list[Row]:
    """Return the rows of a table with a figure per row and a network per column."""
    networks = comparison.networks
    rows = [
        [
            f"{METRICS[metric]}, %",
            *map(_format_score, _scores(networks, metric), comparison.differences, [metric] * len(networks)),
        ]
        for metric in METRICS
        if any(score is not None for score in _scores(networks, metric))
    ]
    rows.append(["effective rank", *(f"{network.rank:.1f}" for network in networks)])
    rows.append(["uniformity", *(f"{network.uniformity:.2f}" for network in networks)])
    if any(network.lidar is not None for network in networks):
        rows.append(["LiDAR", *("" if network.lidar is None else f"{network.lidar:.1f}" for network in networks)])
    rows += [
        ["features", *(str(network.width) for network in networks)],
        ["parameters, M", *(f"{network.parameters / 1e6:.2f}" for network in networks)],
        ["float32, MB", *(f"{network.megabytes:.1f}" for network in networks)],
        ["images/s", *(_format_speed(network.images_per_second) for network in networks)],
        ["size, pixels", *(str(network.size) for network in networks)],
    ]
    if any(network.step is not None for network in networks):
        rows.append(["step", *("" if network.step is None else str(network.step) for network in networks)])
    return rows


def _scores(networks: Sequence[Figures], metric: str) -> list[float | None]:
    return [getattr(network, metric) for network in networks]


def _format_score(score: float | None, differences: Mapping[str, Difference], metric: str) -> str:
    if score is None:
        return ""
    change = differences.get(metric)
    return f"{score:.2f}" + (f" ({change.mean:+.1f}, {change.low:+.1f} to {change.high:+.1f})" if change else "")


def _format_speed(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


_EXPLAINED = (
    "<p>In parentheses: the difference to the first network, with the 95 % interval of a paired bootstrap over the "
    "test images. It does not contain the chance of training: another seed trains another network. Effective rank: "
    "number of directions that the features use. Uniformity: from 0 (all equal) to about -4 (evenly spread). LiDAR: "
    "number of directions that distinguish images, relative to random crops of one image. All three depend on the "
    "number of features, and none is an accuracy. Images per second: the encoder alone on this machine, without "
    "decoding.</p>"
)


def _list_intervals(comparison: Comparison) -> Iterator[Interval]:
    for network, differences in zip(comparison.networks, comparison.differences, strict=True):
        for metric, d in differences.items():
            certain = d.verdict != "no difference"
            yield Interval(f"{network.name}, {METRICS[metric]}", d.mean, d.low, d.high, certain)


def _render_intervals(rows: Sequence[Interval]) -> str:
    if not rows:
        return ""
    described = "; ".join(f"{row.label}: {row.mean:+.1f}, {row.low:+.1f} to {row.high:+.1f}" for row in rows)
    svg = intervals_svg(rows, _UNIT, text_of(f"Differences to the first network: {described}"))
    return f"<figure>{svg}<figcaption>Gray intervals are no difference beyond chance.</figcaption></figure>"


def _render_photos(comparison: Comparison, source: Images, images: ImagesConfig) -> str:
    """Render photos that only one of two networks classifies correctly by k-NN, for each network and the first."""
    if not comparison.k:
        return ""
    names = [network.name for network in comparison.networks]
    places = {name: row for row, name in enumerate(source.names)}
    first, text = comparison.answers[0]["knn"], ""
    for name, answers in zip(names[1:], comparison.answers[1:], strict=True):
        correct = answers["knn"]
        for only, other, rows in ((name, names[0], correct & ~first), (names[0], name, first & ~correct)):
            tiles, count = "", int(rows.sum())
            for row in _space_evenly(np.flatnonzero(rows)):
                path = comparison.test.paths[row]
                url = _read_tile(source, places.get(path), images)
                label = text_of(comparison.test.classes[comparison.test.labels[row]])
                if url:
                    tiles += figure_of(url, f"{label}: {text_of(path)}", label)
            if tiles:
                heading = text_of(f"{count:,} that {only} classifies correctly, and {other} does not")
                text += f"<h3>{heading}</h3><div class='tiles six'>{tiles}</div>"
    return (
        f"<p>Examples of the test images, with their class. k-NN, {comparison.k} neighbours.</p>{text}" if text else ""
    )


def _space_evenly(rows: np.ndarray) -> list[int]:
    return rows[np.unique(np.linspace(0, len(rows) - 1, _SHOWN).astype(np.int64))].tolist() if len(rows) else []


def _read_tile(source: Images, row: int | None, images: ImagesConfig) -> str:
    """Return a photo as a `data:` URL, or an empty string if it cannot be read."""
    if row is None:
        return ""
    try:
        pixels = decode(source.read(row, images), images)
    except OSError:
        return ""
    return "" if isinstance(pixels, BadImage) else tile_of(Image.fromarray(visible(pixels)))


def _render_classes(comparison: Comparison) -> str:
    """Render the k-NN accuracy of each class, the most different classes first."""
    if not comparison.k:
        return ""
    labels, correct = comparison.test.labels, [answers["knn"] for answers in comparison.answers]
    table = []
    for label in np.unique(labels).tolist():
        rows = labels == label
        scores = [100 * float(each[rows].mean()) for each in correct]
        table.append((max(scores) - min(scores), comparison.test.classes[label], int(rows.sum()), scores))
    table.sort(key=lambda row: -row[0])
    shown = [(name, count, *(f"{score:.1f}" for score in scores)) for _, name, count, scores in table[:_CLASSES]]
    names = [network.name for network in comparison.networks]
    left = f"<p>The {_CLASSES} most different of {len(table):,} classes.</p>" if len(table) > _CLASSES else ""
    return left + table_of(["class, k-NN %", "images", *names], shown, "Classes")
