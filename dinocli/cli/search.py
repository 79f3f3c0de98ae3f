"""`dino search`: nearest images to photos."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import (
    DataNow,
    Device,
    FeatureFolder,
    Json,
    NetworkName,
    Photos,
    Settings,
    encoder_from,
    features_or_newest,
    output_place,
)

if TYPE_CHECKING:
    from dinocli.apps.search.index import About, Index, Kind
    from dinocli.apps.search.search import Hits
    from dinocli.features.gallery import Gallery


def search(
    images: Photos,
    features: FeatureFolder = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            help="Checkpoint that made the features, if it moved. Default: the path stored with them.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    network: NetworkName = "teacher",
    k: Annotated[
        int, typer.Option("--k", min=1, help="Number of nearest neighbours to find per photo.", rich_help_panel=METHOD)
    ] = 8,
    index: Annotated[
        Literal["auto", "exact", "ivf", "hnsw"],
        typer.Option(
            help="Exact search, or an approximate index stored next to the features; auto chooses by the image count.",
            rich_help_panel=METHOD,
        ),
    ] = "auto",
    data: DataNow = None,
    overrides: Settings = None,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Output picture.", rich_help_panel=OUTPUT)] = Path("search.png"),
    json: Json = False,
) -> None:
    """Find the images nearest to photos by the cosine similarity of their features, and draw them.

    Examples:
        dino search photo.jpg --features features
        dino search ./photos --k 20 --index ivf --json
    """
    out = output_place(out, file="search.png")
    folder = features_or_newest(features)

    from dinocli.data.sources.open import photos
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare
    from dinocli.features.gallery import open_gallery

    source = photos(images)
    console.notes(source.notes)
    spare([out], images)
    gallery = open_gallery(folder, data)

    from dinocli.apps.search.search import search  # these import torch
    from dinocli.apps.search.sheets import SHOWN, draw_hits
    from dinocli.features.encoder import quick
    from dinocli.features.photos import encode, same_encoder
    from dinocli.viz.picture import SHEET_ROWS, sheet_page

    encoder = encoder_from(checkpoint or gallery.provenance.source, device, network, overrides)
    encoder = quick(encoder, gallery.provenance.precision, compiled=False)  # type: ignore[arg-type]
    same_encoder(encoder, gallery.provenance)
    with console.progress("encode", len(source), "images") as advance:
        asked = encode(encoder, source, gallery.provenance, report=advance)
    console.skipped(asked.skipped)
    opened = _open_index(gallery, index)
    hits = list(search(opened, gallery, asked, k))
    with marked(out.parent, "search", [sheet_page(out, number) for number in range(1, 2 + len(hits) // SHEET_ROWS)]):
        written, unread = draw_hits(gallery, hits, out, encoder.images)
    pictures = [str(path) for path in written]
    if unread:
        name, reason = next(iter(unread.items()))
        console.say(f"note: {len(unread)} of the nearest images cannot be shown ({name}: {reason}); see --data")
    if k > SHOWN:
        console.say(f"note: the picture shows {SHOWN} nearest images per photo; the table and --json list all {k}")
    about = opened.about
    if json:
        told = {"index": about.kind, "recall": about.recall, "images": len(gallery), "found": [asdict(h) for h in hits]}
        console.out_json({**told, "skipped": asked.skipped, "pictures": pictures})
    else:
        _print(hits, gallery, about, pictures)
    console.saved(pictures, f"dino dedup --features {quote(str(folder))}")


def _print(hits: list[Hits], gallery: Gallery, about: About, pictures: list[str]) -> None:
    rows = [[Path(h.query).name, n.image, f"{n.cosine:.4f}", n.label or ""] for h in hits for n in h.neighbours]
    how = "exact search" if about.kind == "exact" else f"{about.kind} index, recall@10 {about.recall:.3f}"
    console.table(["photo", "image", "cosine", "class"], rows, title=f"nearest of {len(gallery)} images ({how})")
    for picture in pictures:
        console.out(picture)


def _open_index(gallery: Gallery, asked: Kind | Literal["auto"]) -> Index:
    from dinocli.apps.search.index import About, Index, digest_of, kind_for, open_index

    kind = kind_for(len(gallery)) if asked == "auto" else asked
    if kind == "exact":
        return Index(About("exact", len(gallery), ""), gallery.values)
    of = digest_of(gallery.values, gallery.digest)
    with console.progress(f"{kind} index", len(gallery), "images") as advance:
        return open_index(gallery.values, kind, gallery.folder, of, advance)
