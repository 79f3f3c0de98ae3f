"""`dino plot`: features in two dimensions."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import DataNow, Json, Limits, features_or_newest, output_place
from dinocli.cli.places import features_place

if TYPE_CHECKING:
    from dinocli.apps.plot.columns import Column
    from dinocli.features.gallery import Gallery

PICTURE, PAGE = "plot.png", "plot.html"
_CLUSTERS = 10  # without classes


def plot(
    features: Annotated[
        Path | None,
        typer.Argument(
            metavar="FEATURES",
            callback=features_place,
            help="Folder of features. Default: ./features, else that of the newest run.",
        ),
    ] = None,
    method: Annotated[
        Literal["pca", "tsne", "umap"],
        typer.Option(
            help="Projection: PCA; t-SNE (pip install 'dinocli[plot]'); UMAP (pip install 'dinocli[umap]').",
            rich_help_panel=METHOD,
        ),
    ] = "pca",
    clusters: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of k-means clusters to color by. Default: the number of classes, else 10.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            metavar="FILE",
            help="CSV file with images in its first column; color by its other columns too.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    color: Annotated[
        str | None,
        typer.Option(
            "--color",
            metavar="NAME",
            help="First column to color by: class, cluster, split, or one of --table. Default: class, else cluster.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of t-SNE, UMAP and the clusters.", rich_help_panel=METHOD)] = 0,
    data: DataNow = None,
    overrides: Limits = None,
    thumbnails: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of images with a thumbnail in the page, about 2 kB each; evenly spread if there are more.",
            rich_help_panel=OUTPUT,
        ),
    ] = 5000,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the page.", rich_help_panel=OUTPUT)] = Path(
        "plot"
    ),
    json: Json = False,
) -> None:
    """Plot features in two dimensions, as a picture and as a page to explore and select images, which works offline.

    Examples:
        dino plot
        dino plot features --method tsne --table predictions.csv --color predicted
    """
    out = output_place(out)
    folder = features_or_newest(features)

    from dinocli.apps.plot.page import thumbnails_of, write_page
    from dinocli.apps.plot.picture import write_picture
    from dinocli.apps.plot.project import project
    from dinocli.data.images import DEFAULTS
    from dinocli.data.sources.outputs import marked
    from dinocli.evals.balance import spaced_rows
    from dinocli.features.gallery import open_gallery

    images = DEFAULTS.changed(overrides or [])
    gallery = open_gallery(folder, data)
    columns = _columns(gallery, clusters, table, color, seed)
    console.say(f"{method}: {len(gallery)} images, {gallery.values.shape[1]} dimensions")
    projection = project(gallery.values, method, seed)
    count = len(gallery)
    rows = spaced_rows(count, thumbnails).tolist()
    with console.progress("thumbnails", len(rows), "images") as advance:
        small, unread = thumbnails_of(gallery, rows, images, advance)
    if unread:
        name, reason = next(iter(unread.items()))
        console.say(f"note: {len(unread)} images have no thumbnail ({name}: {reason}); see --data")
    elif len(rows) < count:
        console.say(f"note: {len(rows)} of the {count} images have a thumbnail; see --thumbnails")
    explained = "" if projection.explained is None else f", {100 * projection.explained:.0f} % of the variance"
    about = f"{count} images, {method.upper().replace('TSNE', 't-SNE')}{explained}"
    with marked(out, "plot", [out / PICTURE]):
        write_picture(out / PICTURE, projection.points, columns[0], f"{gallery.provenance.maker}: {about}")
        write_page(out / PAGE, gallery, projection.points, columns, small, gallery.provenance.maker, about)
    written = [str(out / PICTURE), str(out / PAGE)]
    if json:
        console.out_json(
            {
                "method": method,
                "explained": projection.explained,
                "columns": [column.name for column in columns],
                "images": [
                    {"image": gallery.name(row), "x": x, "y": y, "cluster": _cluster(columns, row)}
                    for row, (x, y) in enumerate(projection.points.tolist())
                ],
                "skipped": unread,
                "written": written,
            }
        )
    console.saved(written, f"dino search IMAGES --features {quote(str(gallery.folder))}")


def _columns(gallery: Gallery, clusters: int | None, table: Path | None, color: str | None, seed: int) -> list[Column]:
    """Return the columns to color by, the chosen one first."""
    from dinocli.apps.plot.columns import choose, named, read_columns
    from dinocli.apps.plot.project import cluster

    rows = range(len(gallery))
    labels = [gallery.label(row) for row in rows]
    kinds = len({label for label in labels if label is not None})
    found = cluster(gallery.values, clusters or min(len(gallery), kinds or _CLUSTERS), seed)
    columns = [named("class", labels)] if kinds else []
    columns.append(named("cluster", [str(number) for number in found.tolist()]))
    if len(gallery.parts) > 1:
        columns.append(named("split", [name for name, part in gallery.parts.items() for _ in range(len(part))]))
    if table:
        columns += read_columns(table, [gallery.name(row) for row in rows], with_split=len(gallery.parts) > 1)
    return choose(columns, color)


def _cluster(columns: list[Column], row: int) -> str:
    column = next(column for column in columns if column.name == "cluster")
    return column.kinds[int(column.values[row])]
