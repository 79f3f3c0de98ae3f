"""`dino dedup`: near-duplicate images by stored features, and a list of images to keep."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    DataNow,
    FeatureFolder,
    Json,
    Limits,
    Threshold,
    features_or_newest,
    listed,
    output_place,
)
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.search.dedup import Alike
    from dinocli.evals.units import Floats
    from dinocli.features.gallery import Gallery

_SHARES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of the images; the table shows a threshold for each share


def dedup(
    features: FeatureFolder = None,
    threshold: Threshold = None,
    all_pairs: Annotated[
        bool,
        typer.Option(
            "--all-pairs",
            help="Compare all pairs above 50,000 images too: the same groups, and a histogram of all images.",
            rich_help_panel=METHOD,
        ),
    ] = False,
    only: Annotated[
        Path | None,
        typer.Option(
            "--among",
            metavar="LIST",
            help="Compare only the images of this list of files, such as one saved in the page of `dino plot`.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    data: DataNow = None,
    overrides: Limits = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the list, the histogram and the sheets.", rich_help_panel=OUTPUT)
    ] = Path("dedup"),
    pages: Annotated[
        int, typer.Option(min=0, help="Maximum number of sheets to draw, with 20 groups each.", rich_help_panel=OUTPUT)
    ] = 5,
    json: Json = False,
) -> None:
    """Find near-duplicates by the cosine similarity of their features, draw them, and list the images to keep.

    The right threshold depends on the network. Without --threshold, a histogram and a table help to choose one.

    Examples:
        dino dedup --features features
        dino dedup --features features --threshold 0.9997
    """
    out = output_place(out)
    folder = features_or_newest(features)

    import numpy as np

    from dinocli.data.images import DEFAULTS
    from dinocli.data.sources.outputs import marked
    from dinocli.features.gallery import among, open_gallery

    images = DEFAULTS.changed(overrides or [])
    gallery = open_gallery(folder, data)
    if only:
        gallery = among(gallery, only)
        console.say(f"{only}: {len(gallery)} images")

    from dinocli.apps.search.dedup import choose  # these import torch or matplotlib
    from dinocli.apps.search.sheets import draw_groups
    from dinocli.viz.curves import write_histogram
    from dinocli.viz.picture import sheet_page

    count = len(gallery)
    if count < 2:
        raise DinoError(
            f"{folder} has too few images to compare ({count}); expected at least two", "extract more than one image"
        )
    found, best = _compare(gallery, threshold, all_pairs)
    histogram = out / "histogram.png"
    made = [histogram, *(sheet_page(out / "groups.jpg", number) for number in range(1, pages + 1))]
    with marked(out, "dedup", made):
        write_histogram(best, "cosine of each image to its nearest other one", threshold, histogram)
    if len(best) < count:
        console.say(f"note: the histogram is of {len(best)} random images of {count}; see --all-pairs")
    if found is None:
        # Rounded down, so that a threshold copied from the table finds at least that share.
        steps = {share: float(np.floor(1e6 * np.quantile(best, 1 - share)) / 1e6) for share in _SHARES}
        if json:
            console.out_json({"images": count, "thresholds": steps, "files": [str(histogram)]})
        else:
            rows = [[f"{100 * share:g}", f"{step:.6f}"] for share, step in steps.items()]
            console.table(["% of images with a neighbour this near", "threshold"], rows)
            console.out(str(histogram))
        console.saved(
            [histogram], f"the same command with --threshold {steps[0.01]:.6f} (or another), then check its sheets"
        )
        return
    groups = choose(found, lambda row: gallery.size(row, images))
    dropped = [row for group in groups for row in group.dropped]
    kept = np.setdiff1d(np.arange(count), dropped).tolist()
    files = [histogram, *draw_groups(gallery, groups, out / "groups.jpg", pages, images)]
    files += listed(gallery, kept, out / "keep.txt")
    largest = max((1 + len(group.dropped) for group in groups), default=0)
    if largest > max(100, count // 20):
        console.say(f"note: one group holds {largest} images: the threshold also joins images that are only similar")
    unread = sum(not any(gallery.size(group.kept, images)) for group in groups)
    if unread:
        console.say(f"note: {unread} groups have no readable image; the first of each is kept; see --data")
    if json:
        told = [
            {"kept": gallery.name(g.kept), "dropped": [gallery.name(row) for row in g.dropped], "cosines": g.cosines}
            for g in groups
        ]
        numbers = {"images": count, "threshold": threshold, "pairs": found.pairs, "kept": len(kept)}
        console.out_json({**numbers, "groups": told, "files": list(map(str, files))})
    else:
        numbers = {"images": count, "pairs": found.pairs, "groups": len(groups), "largest": largest, "kept": len(kept)}
        console.table(list(numbers), [[str(number) for number in numbers.values()]])
        for path in files:
            console.out(str(path))
    written = (out / "keep.txt") in files
    console.saved(
        files, f"dino pretrain {quote(str(out / 'keep.txt'))}" if written else "the same command with --data DIR"
    )


def _compare(gallery: Gallery, threshold: float | None, all_pairs: bool) -> tuple[Alike | None, Floats]:
    """Return the near-duplicates, if there is a threshold, and the cosines of images to their nearest neighbours.

    The cosines are those of all images if all pairs were compared, else of a sample.
    """
    import numpy as np

    from dinocli.apps.search.dedup import ALL_PAIRS_UP_TO, find_alike, sample_best

    count, found = len(gallery), None
    if threshold is not None or all_pairs or count <= ALL_PAIRS_UP_TO:
        with console.progress("compare", count * (count - 1) // 2, "pairs") as advance:
            found = find_alike(gallery.values, threshold, advance, all_pairs=all_pairs)
        if not np.isnan(found.best).any():
            return found if threshold is not None else None, found.best
    with console.progress("draw the histogram", count, "images") as advance:
        return found, sample_best(gallery.values, advance)
