"""Options that commands share, so that one thing has one spelling; and what a command takes when it is not told."""

from __future__ import annotations

import os
import re
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

# Names that promise a file. A folder of such a name is only taken if it exists already.
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_FILES = (
    *(".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".onnx", ".npy", ".npz", ".h5", ".parquet"),
    *(".png", ".jpg", ".jpeg", ".gif", ".mp4", ".pdf", ".html", ".csv", ".tsv", ".json", ".txt", ".log", ".toml"),
)


def output_place(path: Path, option: str = "--out", *, file: str = "") -> Path:
    """Return a local place that a command can write to, with `~` expanded; write nothing.

    Args:
        path: Value of the option.
        option: Option as the user types it, or the name of an argument.
        file: File name to suggest, for an output that is one file. If empty, the output is a folder.

    Raises:
        DinoError: An address, an existing path of the other kind, a folder named like a file, or no permission.
    """
    use = f"use {option}" if option.startswith("-") else f"for {option}, name"
    wanted = "file" if file else "folder"
    if address := _address(path):
        local = file or _plain(Path(address.rpartition(":")[2])).name or "results"
        if address.startswith("file:"):
            hint = f"{use} {address.removeprefix('file://')}"
        else:
            hint = f"{use} {local}, and copy that to {address} afterwards"
        raise DinoError(f"{option} {address} is an address; expected a local {wanted}", hint)
    if path.parts[:1] == ("~",):  # bash leaves it as it is in --out=~/runs
        path = path.expanduser()
    suffix, there = path.suffix.lower(), os.path.lexists(path)
    instead = file or str(_plain(path) if suffix in (*_ARCHIVES, *_FILES) else f"{path}-2")
    fault = ""
    if file and path.is_dir():
        fault, instead = "is a folder", str(path / file)
    elif there and not path.is_dir() and not (file and path.is_file()):
        fault = "is a file" if path.is_file() else "is a broken link" if path.is_symlink() else "is a device"
    elif not there and suffix in _ARCHIVES:
        fault = "is named like an archive"
    elif not there and not file and suffix in _FILES:
        fault = "is named like a file"
    if fault:
        raise DinoError(f"{option} {path} {fault}; expected a {wanted}", f"{use} {instead}")
    _check_writable(path, option, use)
    return path


def refuse_address(value: str, option: str, expected: str) -> None:
    """Check that a source is no s3:// or other address, which is read from nowhere here.

    Raises:
        DinoError: It is one.
    """
    if "://" in value and (address := _address(Path(value))):
        raise DinoError(
            f"{option} {address} is an address; expected {expected}",
            f"copy it here first, and name the copy: {Path(address).name or 'DIR'}",
        )


def _plain(path: Path) -> Path:
    """Drop the endings of files: run.tar.gz is run, and run.v1 stays."""
    while path.suffix.lower() in (*_ARCHIVES, *_FILES):
        path = path.with_suffix("")
    return path


def _address(path: Path) -> str:
    """Return what was typed, if it is s3://bucket/x or user@host:/x and not a path; else nothing."""
    words = path.as_posix()
    if re.match(r"[\w.-]+@[\w.-]+:", words):
        return words
    # A Path has lost the second slash, and would become the local folders s3:/bucket/x. One letter is a Windows drive.
    scheme, colon, rest = words.partition(":")
    if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) and (not rest or rest.startswith("/")):
        return f"{scheme}://{rest.lstrip('/')}" if scheme != "file" else f"file:///{rest.lstrip('/')}"
    return ""


def _check_writable(path: Path, option: str, use: str) -> None:
    folders = [*([path.absolute()] if path.is_dir() else []), *path.absolute().parents]
    nearest = next(folder for folder in folders if os.path.lexists(folder))
    if not nearest.is_dir():
        raise DinoError(f"{option} {path} lies below {nearest}, which is a file", f"{use} {path.name}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DinoError(
            f"no permission to write {option} {path}: {nearest} is read-only for you", f"{use} ~/{path.name}"
        )


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
    step = step_of(checkpoint)
    return "" if step is None else f", step {step}"


def step_of(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint; None if the file does not say, or cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="numpy") as file:
            step = (file.metadata() or {}).get("step", "")
    except (SafetensorError, OSError):
        return None  # whoever reads the file says what is wrong with it
    return int(step) if step.isdecimal() else None


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
