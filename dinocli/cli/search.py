"""`dino search`: nearest images to a photo, and retrieval scores of a network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.options import (
    DataNow,
    Device,
    FeatureFolder,
    Json,
    NetworkName,
    Settings,
    encoder_from,
    features_or_newest,
    output_place,
)
from dinocli.cli.places import photo_places
from dinocli.cli.words import Misuse

if TYPE_CHECKING:
    from dinocli.apps.search.gallery import Gallery
    from dinocli.apps.search.index import Index, Kind
    from dinocli.features.encoder import Encoder


def search(
    queries: Annotated[
        list[Path] | None,
        typer.Argument(metavar="QUERY...", callback=photo_places, help="Photos, and folders of photos."),
    ] = None,
    features: FeatureFolder = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Images to find for each photo.")] = 8,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Checkpoint that made the features, if it has moved.")
    ] = None,
    index: Annotated[
        Literal["auto", "exact", "ivf", "hnsw"],
        typer.Option(
            help="Exact search, or an approximate index stored next to the features; auto chooses by the image count."
        ),
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Output picture.")] = Path("search.png"),
    data: DataNow = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="GND|COPIES",
            help="Evaluate a checkpoint instead, on gnd_roxford5k.pkl, gnd_rparis6k.pkl or the same as JSON, or on a "
            "folder like Copydays, with original/ and folders of copies.",
        ),
    ] = None,
    whiten: Annotated[Path | None, typer.Option(help="With copies: folder of images to fit the whitening on.")] = None,
    distractors: Annotated[
        Path | None,
        typer.Option(help="With copies: folder of distractor images, searched together with the originals."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="With --evaluate: longest side, or side of copies, in pixels. Default: the training size; 320/224 of "
            "it for copies.",
        ),
    ] = None,
    multiscale: Annotated[
        bool, typer.Option("--multiscale", help="With --evaluate GND: sum the features of three image sizes.")
    ] = False,
    network: NetworkName = "teacher",
    overrides: Settings = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the nearest images to photos by the cosine similarity of their features, and draw them."""
    if bool(evaluate) == bool(queries):
        got = "both" if queries else "neither"
        example = f" --features {features}" if features else ""
        raise Misuse(f"dino search takes photos or --evaluate; got {got}", f"dino search photo.jpg{example}")
    if evaluate:
        from dinocli.features.encoder import quick

        encoder = quick(encoder_from(checkpoint, device, network, overrides), "float32", compiled=False)
        if evaluate.is_dir():
            _copies(encoder, evaluate, distractors, whiten, size, json=json)
        else:
            _retrieval(encoder, evaluate, data, size, multiscale=multiscale, json=json)
        return
    out = output_place(out, file="search.png")
    folder = features_or_newest(features)

    from dinocli.apps.search.gallery import open_gallery
    from dinocli.apps.search.search import encode, same_encoder, search
    from dinocli.apps.search.sheets import ROWS, SHOWN, draw_hits, page
    from dinocli.data.sources.open import photos
    from dinocli.data.sources.outputs import marked
    from dinocli.data.sources.photos import spare
    from dinocli.features.encoder import quick

    source = photos(queries or [])
    spare([out], queries or [])
    gallery = open_gallery(folder, data)
    encoder = encoder_from(checkpoint or gallery.provenance.source, device, network, overrides)
    encoder = quick(encoder, gallery.provenance.precision, compiled=False)  # type: ignore[arg-type]
    same_encoder(encoder, gallery.provenance)
    with console.progress("encode", len(source), "images") as advance:
        asked = encode(encoder, source, gallery.provenance, report=advance)
    console.skipped(asked.skipped)
    opened = _index(gallery, index)
    hits = list(search(opened, gallery, asked, k))
    with marked(out.parent, "search", [page(out, number) for number in range(1, 2 + len(hits) // ROWS)]):
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
        return
    rows = [[Path(h.query).name, n.image, f"{n.cosine:.4f}", n.label or ""] for h in hits for n in h.neighbours]
    how = "exact search" if about.kind == "exact" else f"{about.kind} index, recall@10 {about.recall:.3f}"
    console.table(["photo", "image", "cosine", "class"], rows, title=f"nearest of {len(gallery)} images ({how})")
    for picture in pictures:
        console.out(picture)


def _index(gallery: Gallery, asked: Kind | Literal["auto"]) -> Index:
    from dinocli.apps.search.index import About, Index, digest_of, kind_for, open_index

    kind = kind_for(len(gallery)) if asked == "auto" else asked
    if kind == "exact":
        return Index(About("exact", len(gallery), ""), gallery.values)
    of = digest_of(gallery.values, gallery.digest)
    with console.progress(f"{kind} index", len(gallery), "images") as advance:
        return open_index(gallery.values, kind, gallery.folder, of, advance)


def _retrieval(
    encoder: Encoder, truth: Path, data: str | None, size: int | None, *, multiscale: bool, json: bool
) -> None:
    from dinocli.apps.search.retrieval import KS, read_ground_truth, retrieval

    read = read_ground_truth(truth)
    folder = Path(data) if data else truth.parent / "jpg"
    side, total = size or encoder.size, len(read.images) + len(read.queries)
    with console.progress("encode", total, "images") as advance:
        scores, skipped = retrieval(encoder, read, folder, size=side, multiscale=multiscale, report=advance)
    console.skipped(skipped)
    if json:
        console.out_json(
            {"size": side, "multiscale": multiscale, "scores": [asdict(s) for s in scores], "skipped": skipped}
        )
        return
    rows = []
    for s in scores:
        numbers = ["-" if n is None else f"{n:.2f}" for n in (s.mean_ap, *(s.precisions or (None for _ in KS)))]
        rows.append([s.level, *numbers, str(s.queries)])
    title = (
        f"retrieval by {encoder.source}: {len(read.images)} images, longest side {side}" + ", three sizes" * multiscale
    )
    console.table(["level", "mAP %", *(f"mP@{k} %" for k in KS), "queries"], rows, title=title)


def _copies(
    encoder: Encoder, folder: Path, distractors: Path | None, whiten: Path | None, size: int | None, *, json: bool
) -> None:
    from dinocli.apps.search.copies import copies

    patch = encoder.backbone.patch_size
    side = size or round(encoder.size * 320 / 224 / patch) * patch
    said = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal said
        if done == total or what != said:
            console.say(f"{what}: {done} of {total} images")
        said = what

    result = copies(encoder, folder, distractors=distractors, whiten=whiten, size=side, report=report)
    console.skipped(result.skipped)
    if json:
        console.out_json({"size": side, **asdict(result)})
        return
    rows = [[s.kind, f"{s.mean_ap:.2f}", f"{s.micro_ap:.2f}", str(s.queries)] for s in result.scores]
    whitened = f"whitened by {result.whitened}" if result.whitened else "not whitened"
    among = f"{result.originals} originals among {result.distractors} others"
    console.table(
        ["copies", "mAP %", "micro-AP %", "queries"],
        rows,
        title=f"copy detection by {encoder.source}: {among}, {whitened}, {side} pixels",
    )
