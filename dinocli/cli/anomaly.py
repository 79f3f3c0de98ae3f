"""`dino anomaly`: patches of photos that no normal photo has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dinocli.cli import console
from dinocli.cli.layout import METHOD, OUTPUT
from dinocli.cli.options import Checkpoint, Device, Json, NetworkName, NetworkOptions, Settings, ShortSide, output_place
from dinocli.cli.places import normal_place, photo_place
from dinocli.cli.words import Misuse

if TYPE_CHECKING:
    from dinocli.apps.anomaly.bank import Bank
    from dinocli.apps.anomaly.detect import Scored
    from dinocli.apps.anomaly.evaluate import Separation, Truth
    from dinocli.data.sources.indexed import Images
    from dinocli.features.encoder import Encoder

BANK, TABLE, SHEET, MAPS = "bank.safetensors", "scores.csv", "anomalies.png", "maps"
_AREA = 0.05
_LISTED = 20  # photos in the table; --json and the CSV file list all


def anomaly(
    normal: Annotated[
        str,
        typer.Argument(
            metavar="NORMAL",
            callback=normal_place,
            help="Normal photos: a folder, or a list of files; or bank.safetensors of an earlier call.",
        ),
    ],
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            metavar="DIR",
            callback=lambda context, value: value and photo_place(context, value),
            help="Photos to examine: a folder, or one photo. With class folders, one of them good, normal, or named "
            "like NORMAL, the AUROC is printed.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            metavar="MASKS",
            help="Score the distances of pixels against the masks of defects in this folder, named like the photos.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    good: Annotated[
        str | None,
        typer.Option("--good", metavar="NAME", help="Class folder of normal test photos.", rich_help_panel=METHOD),
    ] = None,
    checkpoint: Checkpoint = None,
    network: NetworkName = "teacher",
    layer: Annotated[
        list[int] | None,
        typer.Option(
            "--layer",
            help="Block whose patches are compared: 1 is the first, -1 the last; may be repeated. Default: -1.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    short_side: ShortSide = None,
    coreset: Annotated[
        int | None,
        typer.Option(
            "--coreset",
            min=2,
            help="Number of patches in the bank. Default: a tenth of those of NORMAL, at most 10,000.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    area: Annotated[
        float | None,
        typer.Option(
            "--area",
            min=1e-4,
            max=1,
            help="Share of a photo's patches, the most distant ones, whose mean distance is its score. Default: 0.05.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bank's selection.", rich_help_panel=METHOD)] = 0,
    overrides: Settings = None,
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="Folder for the bank, the scores and the pictures.", rich_help_panel=OUTPUT)
    ] = Path("anomalies"),
    json: Json = False,
) -> None:
    """Find photos, and places in them, with patches that no normal photo has.

    A memory bank keeps patches that cover those of normal photos. The distance of a patch to the bank is its anomaly.

    Examples:
        dino anomaly ./good --test ./parts
        dino anomaly anomalies/bank.safetensors --test ./parts --truth ./masks
    """
    for name, value in (("--truth", truth), ("--good", good)):
        if value and not test:
            raise Misuse(f"{name} needs --test", f"add --test DIR, or omit {name}")
    out = output_place(out)

    from dinocli.apps.anomaly.bank import is_bank
    from dinocli.data.sources.open import photos
    from dinocli.data.sources.photos import named_photos, spare

    stored = is_bank(Path(normal))
    if stored:
        fixed = {"--layer": layer, "--short-side": short_side, "--coreset": coreset, "--area": area}
        if given := next((name for name, value in fixed.items() if value), None):
            raise Misuse(f"{given} cannot be changed: it is stored in {normal}", f"omit {given}, or name the photos")
        if not test:
            raise Misuse(f"{normal} is a stored bank, which needs --test", f"dino anomaly {normal} --test DIR")
    names = {str(path): name for path, name in named_photos([test]).items()} if test else {}
    source = photos([test]) if test else None
    console.notes(source.notes if source else ())
    made = [out / SHEET, *(out / MAPS / f"{name}.png" for name in names.values())]
    spare([*made, out / BANK, out / TABLE], [Path(name) for name in names])

    from dinocli.apps.anomaly.evaluate import read_truth
    from dinocli.apps.anomaly.sheets import check_table_file
    from dinocli.data.sources.outputs import marked

    if test:
        check_table_file(out / TABLE)
        known = read_truth(names, normal, good, truth)  # before the bank, to fail at once
    options = NetworkOptions(checkpoint, network, overrides, device)
    with marked(out, "anomaly", made):
        if stored:
            bank, encoder = _open(Path(normal), options)
        else:
            bank, encoder = _build(normal, options, layer, short_side, coreset, area, seed, out / BANK)
        console.say(
            f"bank: {len(bank.patches)} patches of {bank.provenance.data}; scores of normal photos, each against the "
            f"others: median {sorted(bank.scores)[len(bank.scores) // 2]:.3f}, highest {bank.scores.max():.3f}"
        )
        written = [] if stored else [str(out / BANK)]
        told: dict[str, Any] = {
            "bank": normal if stored else str(out / BANK),
            "patches": len(bank.patches),
            "normal_scores": bank.scores.tolist(),
        }
        if source is not None:
            if stored and known.normal is None:
                known = read_truth(names, bank.provenance.data, good, truth)
            told |= _examine(bank, encoder, source, known, names, out, json=json)
            written += told["written"]
    if json:
        console.out_json(told | {"written": written})
    console.saved(written, f"dino anomaly {quote(told['bank'])} --test IMAGES")


def _open(path: Path, options: NetworkOptions) -> tuple[Bank, Encoder]:
    from dinocli.apps.anomaly.bank import read_bank

    bank = read_bank(path)
    hint = "use --checkpoint with the one it was built with, or build another bank: dino anomaly NORMAL"
    return bank, options.maker(bank.provenance, path, hint)


def _build(
    normal: str,
    options: NetworkOptions,
    layers: list[int] | None,
    short_side: int | None,
    coreset: int | None,
    area: float | None,
    seed: int,
    out: Path,
) -> tuple[Bank, Encoder]:
    from contextlib import ExitStack

    from dinocli.apps.anomaly.bank import BankSettings, check_bank_file, write_bank
    from dinocli.apps.anomaly.detect import build
    from dinocli.data.sources.open import open_images, within
    from dinocli.evals.attention import default_size

    check_bank_file(out)
    source = open_images(normal)
    encoder = options.encoder()
    source = within(source, encoder.images)
    console.notes(source.notes)
    settings = BankSettings(short_side or default_size(encoder), tuple(layers or [-1]), area or _AREA)
    with ExitStack() as stack:
        bars: dict[str, console.Advance] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in bars:
                stack.close()
                unit = "patches" if what == "select patches" else "images"
                bars[what] = stack.enter_context(console.progress(what, total, unit))
            bars[what](done)

        bank, skipped = build(encoder, source, settings, count=coreset, seed=seed, report=report)
    console.skipped(skipped)
    write_bank(out, bank)
    return bank, encoder


def _examine(
    bank: Bank, encoder: Encoder, source: Images, truth: Truth, names: Mapping[str, Path], out: Path, *, json: bool
) -> dict[str, Any]:
    """Score the test photos, draw them, and print the scores; return the results for --json."""
    from dinocli.apps.anomaly.detect import detect
    from dinocli.apps.anomaly.evaluate import evaluate
    from dinocli.apps.anomaly.sheets import draw_map, draw_sheet, scale_of, write_table

    with console.progress("compare", len(source), "images") as advance:
        found = detect(encoder, bank, source, advance)
    console.skipped(found.skipped)
    missing = {image: why for image, why in truth.skipped.items() if image not in found.skipped}
    if missing:
        image, why = next(iter(missing.items()))
        console.say(f"note: {len(missing)} photos count in no AUROC of pixels; {image}: {why}")
    separation, scale = evaluate(found.photos, truth), scale_of(bank, found.photos)
    ranked = sorted(found.photos, key=lambda one: -one.score)
    draw_sheet(ranked, truth.labels, truth.masks, out / SHEET, scale, encoder.images)
    with console.progress("draw", len(ranked), "maps") as advance:
        for done, one in enumerate(ranked, 1):
            draw_map(one, out / MAPS / f"{names[one.image]}.png", scale, encoder.images)
            advance(done)
    write_table(out / TABLE, ranked, truth.labels)
    if not json:
        _print_scores(ranked, truth, separation)
    return {
        "image_auroc": separation.images,
        "pixel_auroc": separation.pixels,
        "auroc_by_class": separation.by_class,
        "images": [
            {
                "image": one.image,
                "score": one.score,
                "above_normal": one.percentile,
                "class": truth.labels.get(one.image),
            }
            for one in ranked
        ],
        "skipped": found.skipped,
        "written": [str(out / SHEET), f"{out / MAPS}/", str(out / TABLE)],
    }


def _print_scores(ranked: Sequence[Scored], truth: Truth, separation: Separation) -> None:
    if len(ranked) > _LISTED:
        console.say(f"note: the table shows the {_LISTED} highest scores of {len(ranked)}; {TABLE} lists all")
    console.table(
        ["image", "score", "above normal %", "class"],
        [
            [one.image, f"{one.score:.4f}", f"{one.percentile:.0f}", truth.labels.get(one.image, "")]
            for one in ranked[:_LISTED]
        ],
    )
    rows: list[tuple[str, float]] = [("all", separation.images)] if separation.images is not None else []
    rows += list(separation.by_class.items()) if len(separation.by_class) > 1 else []
    rows += [("pixels", separation.pixels)] if separation.pixels is not None else []
    if rows:
        against = f", class {truth.normal} as normal" if truth.normal else ""
        console.table(["of", "AUROC %"], [[what, f"{area:.1f}"] for what, area in rows], title=f"AUROC{against}")
    elif truth.labels and truth.normal is None:
        console.say("note: no class is known to be normal, so no AUROC is computed; name it with --good")
