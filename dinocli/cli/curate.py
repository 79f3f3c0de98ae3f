"""`dino curate`: training images selected from a pool, as a list of files."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import DataNow, Json, Threshold, listed, output_place
from dinocli.cli.places import feature_places, features_place
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.search.dedup import Alike
    from dinocli.core.tensors import Indices
    from dinocli.features.gallery import Gallery


def curate(
    pool: Annotated[
        Path,
        typer.Argument(
            metavar="POOL", callback=features_place, help="Folder of features of the pool, made by `dino extract`."
        ),
    ],
    like: Annotated[
        Path | None,
        typer.Option(
            callback=features_place,
            help="Folder of features of seed images; select their nearest neighbours.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, help="Number of nearest neighbours to select per seed.", rich_help_panel=METHOD)
    ] = 4,
    without: Annotated[
        list[Path] | None,
        typer.Option(
            callback=feature_places,
            help="Folder of features, such as of a test set; drop near-duplicates of its images. May be repeated.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    threshold: Threshold = None,
    clusters: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw from N k-means clusters of the pool instead; with --like, only from clusters that hold at least "
            "four seeds.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    each: Annotated[
        int, typer.Option(min=1, help="With --clusters: number of images to draw per cluster.", rich_help_panel=METHOD)
    ] = 100,
    seed: Annotated[
        int, typer.Option(min=0, help="With --clusters: seed of k-means and of the draw.", rich_help_panel=METHOD)
    ] = 0,
    data: DataNow = None,
    out: Annotated[
        Path, typer.Option(help="Output list, which `dino pretrain` reads as its images.", rich_help_panel=OUTPUT)
    ] = Path("curated.txt"),
    json: Json = False,
) -> None:
    """Select images from a pool: nearest to seed images, or balanced over clusters.

    With --threshold, first drop images near those of --without, with all their duplicates; then keep one image of each
    remaining group of duplicates.

    Examples:
        dino curate pool --like seeds --without val --threshold 0.9997
        dino curate pool --clusters 1000 --each 100 --out balanced.txt
    """
    out = output_place(out, file="curated.txt")
    if not like and not clusters:
        raise DinoError(
            "neither --like nor --clusters was given; expected at least one",
            "use --like FEATURES for nearest neighbours, or --clusters 100 for a balanced selection",
        )

    if without and threshold is None:
        raise DinoError(
            "--without needs --threshold, the cosine from which images are dropped",
            f"choose one with `dino dedup --features {pool}`",
        )

    import numpy as np

    from dinocli.features.gallery import belong_together, open_gallery

    gallery = open_gallery(pool, data)
    others = [open_gallery(folder) for folder in [*([like] if like else []), *(without or [])]]

    from dinocli.apps.search.curate import near_to, retrieve, whole_groups  # these import torch
    from dinocli.apps.search.dedup import choose

    for other in others:
        belong_together(gallery, other)
    seeds = others.pop(0) if like else None
    rows = np.arange(len(gallery))
    left = {"pool": len(rows)}
    if threshold is not None:
        alike = _find_duplicates(gallery, threshold)
        for other in others:
            with console.progress(f"compare with {other.folder}", len(gallery), "images") as advance:
                near = near_to(gallery.values, np.arange(len(gallery)), other.values, threshold, advance)
            # Check every image of a group, not only the kept one: any of them may be the held-out image.
            rows = np.setdiff1d(rows, whole_groups(near, alike.members))
            left[f"away from {other.folder}"] = len(rows)
        rows = np.setdiff1d(rows, [row for group in choose(alike, gallery.size) for row in group.dropped])
        left["without duplicates"] = len(rows)
    if not len(rows):
        raise DinoError("no image of the pool is left", f"use a --threshold above {threshold}")
    if clusters:
        rows = _select_by_clusters(gallery, rows, seeds, clusters, each, seed)
    elif seeds:
        with console.progress("retrieve", len(seeds), "seeds") as advance:
            rows = retrieve(gallery.values, rows, seeds.values, k, advance)
    left["chosen"] = len(rows)
    written = listed(gallery, rows.tolist(), out)
    if not written and not json:
        raise DinoError(f"no list of the {len(rows)} selected images was written", "use --json to print their names")
    if json:
        names = [gallery.name(row) for row in rows.tolist()]
        console.out_json({"left": left, "list": str(out) if written else None, "images": names})
    else:
        console.table(["step", "images left"], [[step, str(images)] for step, images in left.items()])
        for path in written:
            console.out(str(path))
    console.saved(written, f"dino pretrain {quote(str(out))}" if written else "the same command with --data DIR")


def _find_duplicates(gallery: Gallery, threshold: float) -> Alike:
    from dinocli.apps.search.dedup import find_alike

    count = len(gallery)
    with console.progress("compare", count * (count - 1) // 2, "pairs") as advance:
        return find_alike(gallery.values, threshold, advance)


def _select_by_clusters(
    gallery: Gallery, rows: Indices, seeds: Gallery | None, count: int, each: int, seed: int
) -> Indices:
    import numpy as np

    from dinocli.apps.search.curate import HELD, assign, clusters, held, sample

    console.say(f"{count} clusters of {len(rows)} images")
    centers = clusters(gallery.values, rows, count, seed)
    with console.progress("assign", len(rows), "images") as advance:
        of = assign(gallery.values, rows, centers, advance)
    if seeds is None:
        return sample(rows, of, each, seed)
    among = held(assign(seeds.values, np.arange(len(seeds)), centers))
    console.say(f"{len(among)} of the clusters hold {HELD} seeds or more")
    if not len(among):
        raise DinoError(
            f"none of the {count} clusters holds {HELD} of the {len(seeds)} seeds",
            "use fewer --clusters, or --k instead",
        )
    return sample(rows, of, each, seed, among)
