"""`dino segment`: foreground masks, patch colors by PCA, and classes of pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.options import Checkpoint, Device, Json, NetworkName, Settings, ShortSide, encoder_from, output_place
from dinocli.cli.places import photo_places
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.apps.segment.sheets import Segmented
    from dinocli.features.encoder import Encoder

By = Literal["attention", "cut"]
_BEST: By = "cut"  # better than attention on ECSSD, with every network tried
_UNREADABLE = ("none of the images can be read", "name a photo such as a .jpg")


def segment(
    images: Annotated[
        list[Path] | None, typer.Argument(callback=photo_places, help="Photos, and folders of photos.")
    ] = None,
    checkpoint: Checkpoint = None,
    by: Annotated[
        By | None,
        typer.Option(
            help="Foreground from a normalized cut over the similarity of patch keys (TokenCut), or from the attention "
            "of the class token. Default: cut; with --evaluate both."
        ),
    ] = None,
    keep: Annotated[
        float, typer.Option(min=0.01, max=1, help="With attention: share of its mass inside a mask.")
    ] = 0.6,
    tau: Annotated[float, typer.Option(min=-1, max=1, help="With cut: cosine above which patches are similar.")] = 0.2,
    masks: Annotated[bool, typer.Option("--masks", help="Also write each mask as a PNG at the photo's size.")] = False,
    pca: Annotated[
        bool, typer.Option("--pca", help="Color the patches of all photos instead, by one PCA over them.")
    ] = False,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="MASKS", help="Evaluate on masks named like their photos; draws nothing.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Train a linear head on images/ and masks/ (index PNGs) in this folder, with train/ and val/ or "
            "a tenth held out; evaluates it and writes head.safetensors.",
        ),
    ] = None,
    head: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the classes predicted by a trained head instead.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="With --train: training epochs.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="With --train: seed of the order and the held-out photos.")] = 0,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("segments"),
    size: ShortSide = None,
    network: NetworkName = "teacher",
    overrides: Settings = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Segment the foreground of photos without training, color their patches, or train a head for classes of pixels."""
    _check(images, {"--pca": pca, "--evaluate": evaluate, "--train": train, "--head": head}, masks=masks)
    made: list[Path] = []
    out = output_place(out)
    if not train:
        from dinocli.data.sources.photos import named_photos, spare

        files = named_photos(images or [])
        if pca:
            # A sheet shows several photos, so some of these names stay unused, which is harmless.
            made = [out / "pca.png", *(out / f"pca-{number}.png" for number in range(2, 1 + len(files)))]
            spare(made[:1], files)
        elif not evaluate:
            spare((out / f"{name}{end}" for name in files.values() for end in (".png", "-mask.png")), files)
            made = [out / f"{name}{end}" for name in files.values() for end in ([".png", "-mask.png"][: 1 + masks])]

    from dinocli.evals.attention import default_size

    encoder = encoder_from(checkpoint, device, network, overrides)
    side = size or default_size(encoder)
    if evaluate:
        _evaluate(encoder, files, evaluate, [by] if by else _ways(encoder), side, keep, tau, json=json)
        return

    from dinocli.data.sources.outputs import marked

    with marked(out, "segment", made):
        if train:
            _train(encoder, train, out, side, epochs, seed, json=json)
        elif pca:
            _pca(encoder, files, out, by or _BEST, side, keep, tau, json=json)
        elif head:
            from dinocli.apps.segment.linear_head import read_head
            from dinocli.apps.segment.sheets import draw_classes

            layer = read_head(head, encoder)
            classes = partial(draw_classes, encoder, layer, short_side=size, masks=masks)
            _draw(files, out, classes, json=json)
        else:
            from dinocli.apps.segment.sheets import draw_foreground

            one = partial(draw_foreground, encoder, by=by or _BEST, keep=keep, tau=tau, short_side=side, masks=masks)
            _draw(files, out, one, json=json)


def _check(images: list[Path] | None, ways: Mapping[str, object], *, masks: bool) -> None:
    """Check that the options fit together.

    Raises:
        DinoError: If they do not.
    """
    asked = [way for way, value in ways.items() if value]
    if masks and asked not in ([], ["--head"]):
        raise DinoError(f"--masks cannot be combined with {asked[0]}", f"omit --masks or {asked[0]}")
    if len(asked) > 1:
        raise DinoError(
            f"{' and '.join(asked)} cannot be combined; expected one of {', '.join(ways)}", f"omit {asked[1]}"
        )
    if "--train" in asked and images:
        raise DinoError(f"--train reads photos from its own folder; unexpected {images[0]}", "omit the photos")
    if "--train" not in asked and not images:
        raise DinoError("no photos given; expected photos or folders of photos", "dino segment photo.jpg")


def _draw(files: Mapping[Path, Path], out: Path, draw: Callable[[Path, Path], Segmented | str], *, json: bool) -> None:
    drawn: list[Segmented] = []
    skipped: dict[Path, str] = {}
    with console.progress("segment", len(files), "images") as advance:
        for done, (path, name) in enumerate(files.items(), 1):
            result = draw(path, out / name)
            if isinstance(result, str):
                skipped[path] = result
            else:
                drawn.append(result)
            advance(done)
    console.skipped(skipped)
    if not drawn:
        raise DinoError(*_UNREADABLE)
    empty = [d.image for d in drawn if d.shares.get("foreground") == 0]
    if empty:
        others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        console.say(f"note: no foreground found in {empty[0]}{others}: all patches are similar; try --tau 0.4")
    if json:
        console.out_json(
            [
                {"image": str(d.image), "picture": str(d.picture), "mask": d.mask and str(d.mask), "shares": d.shares}
                for d in drawn
            ]
        )
    else:
        for d in drawn:
            console.out(str(d.picture))


def _pca(
    encoder: Encoder, files: Mapping[Path, Path], out: Path, by: By, side: int, keep: float, tau: float, *, json: bool
) -> None:
    from dinocli.apps.segment.colors import PHOTOS, fit_colors
    from dinocli.apps.segment.sheets import draw_colors

    photos = list(files)
    with console.progress("fit the colors", min(len(photos), PHOTOS), "images") as advance:
        colors = fit_colors(encoder, photos, side, by, keep=keep, tau=tau, report=advance)
    if colors.least is None:
        console.say("note: no foreground found in any photo; the PCA includes all patches")
    with console.progress("draw", len(photos), "images") as advance:
        pages, skipped = draw_colors(encoder, colors, photos, out, short_side=side, report=advance)
    console.skipped(skipped)
    if json:
        console.out_json({"pictures": [str(page) for page in pages], "photos": len(photos) - len(skipped)})
    else:
        for page in pages:
            console.out(str(page))


def _ways(encoder: Encoder) -> list[By]:
    from dinocli.models.transformer import Transformer

    if isinstance(encoder.backbone, Transformer):
        return ["attention", "cut"]
    console.say("note: a convolutional network has no attention; evaluating the cut only")
    return ["cut"]


def _evaluate(
    encoder: Encoder,
    files: Mapping[Path, Path],
    folder: Path,
    ways: Sequence[By],
    side: int,
    keep: float,
    tau: float,
    *,
    json: bool,
) -> None:
    from dinocli.apps.segment.masks import MaskFolder, with_masks
    from dinocli.apps.segment.overlap import overlaps

    pairs, skipped = with_masks(files, MaskFolder(folder))
    with console.progress("measure", len(pairs), "images") as advance:
        result = overlaps(encoder, pairs, ways, short_side=side, keep=keep, tau=tau, report=advance)
    skipped |= result.skipped
    console.skipped(skipped)
    if not result.each:
        raise DinoError(
            f"none of {len(files)} photos has a mask of its name and size in {folder}", "name each mask like its photo"
        )
    if json:
        each = {str(path): scores for path, scores in result.each.items()}
        reasons = {str(path): reason for path, reason in skipped.items()}
        console.out_json({"jaccard": result.means, "photos": len(each), "each": each, "skipped": reasons})
        return
    console.table(
        ["foreground by", "Jaccard"],
        [[way, f"{mean:.3f}"] for way, mean in result.means.items()],
        title=f"overlap with the masks of {len(result.each)} photos, by {encoder.source} at {side} pixels",
    )


def _train(encoder: Encoder, root: Path, out: Path, side: int, epochs: int, seed: int, *, json: bool) -> None:
    from dinocli.apps.segment.linear_head import HEAD, train_head, write_head
    from dinocli.apps.segment.pairs import labelled_set

    with console.progress("segment", 100, "%") as advance:

        def report(stage: str, done: int, of: int) -> None:
            # First percent and share of each stage; the features take about half of the time.
            first, share = {"masks": (0, 5), "features": (5, 45), "train": (50, 30), "measure": (80, 20)}[stage]
            advance(first + share * done // of, f"{stage} {done}/{of}")

        data = labelled_set(root, seed=seed, report=lambda done, of: report("masks", done, of))
        head, result = train_head(
            encoder, data, out / "patches", short_side=side, epochs=epochs, seed=seed, report=report
        )
    path = out / HEAD
    write_head(path, head)
    console.skipped(result.skipped)
    if result.split_off:
        console.say(f"note: the data has no val/; {result.val_photos} of its photos were held out")
    if json:
        console.out_json(asdict(result) | {"path": str(path)})
        return
    console.table(
        ["class", "IoU %", f"IoU %, all {result.commonest}"],
        [[name, f"{iou:.1f}", f"{result.baseline.iou[name]:.1f}"] for name, iou in result.head.iou.items()],
        title=f"linear segmentation head on {encoder.source} at {side} pixels: {result.train_photos} training and "
        f"{result.val_photos} other photos",
    )
    console.table(
        ["", "mIoU %", "pixels right %"],
        [
            ["head", f"{result.head.miou:.2f}", f"{result.head.accuracy:.2f}"],
            [f"all {result.commonest}", f"{result.baseline.miou:.2f}", f"{result.baseline.accuracy:.2f}"],
        ],
    )
    console.out(str(path))
