"""Options that commands share, so that one thing has one spelling; and what a command takes when it is not told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli import console
from dinocli.errors import DinoError
from dinocli.runs import CHECKPOINT, newest_run

if TYPE_CHECKING:
    import torch

    from dinocli.encoder import Encoder
    from dinocli.gallery import Gallery

Images = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="Folder of images, of any depth; a .txt or .csv list of files; tar shards (x-{000..009}.tar, a folder of "
        "them, pipe:COMMAND); or torchvision:NAME.",
    ),
]
Limits = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="images.KEY=VALUE", help="Other limits or window for image files; may be repeated."),
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1 or mps.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Processes that decode images; chosen by the machine if absent.")
]
Json = Annotated[bool, typer.Option("--json", help="Print data instead of a table.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="Run folder, ckpt.safetensors, official .pth of DINO or DINOv2, or timm:NAME. "
        "If absent: ./ckpt.safetensors, else the newest run.",
    ),
]
NetworkName = Annotated[Literal["teacher", "student"], typer.Option("--network", help="Of a file that holds both.")]
FacetName = Annotated[
    Literal["token", "query", "key", "value"],
    typer.Option("--facet", help="Of a block: its output, or of its attention."),
]
Tokens = Annotated[Literal["cls", "patches", "cls+avg"], typer.Option(help="Features of an image.")]
Size = Annotated[int | None, typer.Option(min=8, help="Side of the images in pixels; the training's if absent.")]
ShortSide = Annotated[
    int | None,
    typer.Option(
        "--size",
        min=8,
        help="Short side in pixels to look at photos with; 480 for a network trained at 224, in that proportion for "
        "others.",
    ),
]


FeatureFolder = Annotated[Path | None, typer.Option("--features", help="Folder of features; ./features if absent.")]
DataNow = Annotated[
    str | None, typer.Option("--data", help="Where the images lie now; where `dino extract` found them if absent.")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=-1, max=1, help="Cosine from which two images are near-duplicates; `dino dedup` shows which to take."
    ),
]


def compiles(device: torch.device, *, asked: bool) -> bool:
    """Whether torch can compile for a device, as was tried; said where it cannot.

    Raises:
        DinoError: It cannot, and was asked to.
    """
    from dinocli.device import why_not_compiled

    fault = why_not_compiled(device)
    if fault and asked:
        raise DinoError(f"torch cannot compile here: {fault}", "leave --compile out, or install a C++ compiler")
    if fault:
        console.say(f"note: torch cannot compile here, and so the run is slower: {fault}")
    return not fault


def checkpoint_or_newest(given: str | None) -> str:
    """The checkpoint that was named, or `./ckpt.safetensors`, or the newest run's.

    Raises:
        DinoError: None was named and there is none.
    """
    if given:
        return given
    if Path(CHECKPOINT).exists():
        taken = Path(CHECKPOINT)
        console.say(f"checkpoint: {taken}" + (f" -> {taken.readlink()}" if taken.is_symlink() else "") + _step(taken))
        return str(taken)
    run = newest_run()
    if run is None:
        raise DinoError(
            "a checkpoint was wanted; none was named, and there is no ./ckpt.safetensors and no run in ./runs",
            "dino pretrain IMAGES --preset tiny",
        )
    console.say(f"checkpoint: {run / CHECKPOINT}{_step(run / CHECKPOINT)}")
    return str(run / CHECKPOINT)


def _step(checkpoint: Path) -> str:
    """The step that a checkpoint is of, so that one of a run which failed at its start is not taken for trained."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="numpy") as file:
            step = (file.metadata() or {}).get("step")
    except SafetensorError:
        return ""  # whoever reads the file says what is wrong with it
    return f", step {step}" if step else ""


def encoder_from(
    checkpoint: str | None, device: str, network: Literal["teacher", "student"], overrides: Sequence[str] | None
) -> Encoder:
    """The encoder that a command's options name.

    Raises:
        DinoError: There is no such checkpoint or device, the weights do not fit, or an override does not.
    """
    from dinocli.device import pick_device
    from dinocli.encoder import with_images
    from dinocli.loading import load_encoder

    return with_images(load_encoder(checkpoint_or_newest(checkpoint), pick_device(device), network), overrides or [])


def features_or_newest(given: Path | None) -> Path:
    """The feature folder that was named, or `./features`, or the newest run's.

    Raises:
        DinoError: None was named and there is none.
    """
    if given:
        return given
    from dinocli.features import FOLDER

    run = newest_run()
    for folder in [FOLDER] + ([run / FOLDER] if run else []):
        if folder.is_dir():
            console.say(f"features: {folder}")
            return folder
    raise DinoError(
        "features were wanted; none were named, and there is no ./features", "dino extract ckpt.safetensors DATA"
    )


def listed(gallery: Gallery, rows: Sequence[int], path: Path) -> list[Path]:
    """Write the list of some images' files, if they have any, and say what is in no list; what was written."""
    from dinocli.gallery import write_list

    try:
        odd = write_list(gallery, rows, path)
    except DinoError as none:
        console.say(f"note: no list was written: {none.message}; {none.hint}")
        return []
    for name in odd:
        console.say(f"note: {name!r} is not in the list, since its name holds a tab or the end of a line")
    return [path]
