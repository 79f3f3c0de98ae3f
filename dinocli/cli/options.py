"""Options shared by commands, and the default checkpoint and features."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dinocli.cli import console
from dinocli.cli.layout import MACHINE, METHOD, OUTPUT, RECIPE, SPEED
from dinocli.cli.places import features_place, images_place, images_places, photo_places
from dinocli.cli.words import Misuse
from dinocli.core.errors import DinoError
from dinocli.core.runs import CHECKPOINT, RUNS, newest_run

if TYPE_CHECKING:
    import torch

    from dinocli.features.encoder import Encoder
    from dinocli.features.gallery import Gallery
    from dinocli.features.store import Provenance

Images = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        callback=images_place,
        help="Folder of images, searched recursively; a .zip or .tar of one; a .txt or .csv list of files; .parquet or "
        ".arrow files; tar shards (x-{000..009}.tar, a folder of them, pipe:COMMAND); any of these but archives at "
        "s3://, gs://, az:// or https://; torchvision:NAME or hf://datasets/USER/NAME.",
    ),
]
ManyImages = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES...",
        callback=images_places,
        help="Folders of images, searched recursively; .zip or .tar archives; .txt or .csv lists of files; .parquet or "
        ".arrow files; tar shards (x-{000..009}.tar, a folder of them, pipe:COMMAND); any of these but archives at "
        "s3://, gs://, az:// or https://; torchvision:NAME or hf://datasets/USER/NAME. Several are read together, or "
        "in proportions: A:0.7 B:0.3.",
    ),
]
Photos = Annotated[
    list[Path], typer.Argument(metavar="IMAGES...", callback=photo_places, help="Photos, folders, and lists of photos.")
]
# The help of --set, which ends with the keys that each command accepts.
_SET = "Override a setting of the preset; may be repeated. Keys: "
AllSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help=_SET + "any of docs/presets.md.", rich_help_panel=RECIPE),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=_SET + "images.NAME, and backbone.options.num_heads for official files.",
        rich_help_panel=METHOD,
    ),
]
ShapeSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help=_SET + "backbone.options.num_heads for official files.",
        rich_help_panel=METHOD,
    ),
]
Limits = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET + "images.NAME.", rich_help_panel=METHOD)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=MACHINE)]
Workers = Annotated[
    int | None,
    typer.Option(
        min=0, help="Number of processes that decode images. Default: chosen for the machine.", rich_help_panel=MACHINE
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=OUTPUT)]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        help="Run folder, ckpt.safetensors, official .pth of DINO or DINOv2, timm:NAME, or dinocli:mini, which comes "
        "with the package. Default: ./ckpt.safetensors, else the newest run.",
        rich_help_panel=METHOD,
    ),
]
Checkpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint",
        help="Run folder, ckpt.safetensors, official .pth of DINO or DINOv2, timm:NAME, or untrained:NAME with the "
        "initial weights of a preset or run; may be repeated. Default: ./ckpt.safetensors, else the newest run.",
        rich_help_panel=METHOD,
    ),
]
SameCheckpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Same as the argument CHECKPOINT.", rich_help_panel=METHOD)
]
NetworkName = Annotated[
    Literal["teacher", "student"],
    typer.Option("--network", help="Network to load from a file that holds both.", rich_help_panel=METHOD),
]
FacetName = Annotated[
    Literal["token", "query", "key", "value"],
    typer.Option(
        "--facet",
        help="Patch features to compare: block output (token), or query, key or value of its attention.",
        rich_help_panel=METHOD,
    ),
]
Layer = Annotated[
    int, typer.Option(help="Block whose patches are compared: 1 is the first, -1 the last.", rich_help_panel=METHOD)
]
Tokens = Annotated[
    Literal["cls", "patches", "cls+avg"],
    typer.Option(help="Tokens that form an image feature.", rich_help_panel=METHOD),
]
Size = Annotated[
    int | None,
    typer.Option(
        min=8, help="Side in pixels of the square network input. Default: the training size.", rich_help_panel=METHOD
    ),
]
EncoderPrecision = Annotated[
    Literal["bfloat16", "float32"],
    typer.Option(
        "--precision",
        help="Precision of matrix products. bfloat16 needs device support and is at least twice as fast. It moves "
        "the k-NN accuracy of small networks by up to 0.25 points.",
        rich_help_panel=SPEED,
    ),
]
EncoderBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size", min=1, help="Images per batch. Default: 64 on a CPU, 256 elsewhere.", rich_help_panel=SPEED
    ),
]
ShortSide = Annotated[
    int | None,
    typer.Option(
        "--short-side",
        min=8,
        help="Short side in pixels of the resized photos. Default: 480/224 of the training size.",
        rich_help_panel=METHOD,
    ),
]
Mass = Annotated[
    float,
    typer.Option(
        "--mass",
        min=0.01,
        max=1,
        help="Share of the attention mass that an attention mask covers.",
        rich_help_panel=METHOD,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(min=1e-4, help="Temperature of the vote weights exp(cosine / temperature).", rich_help_panel=METHOD),
]
Tau = Annotated[
    float,
    typer.Option(
        "--tau",
        min=-1,
        max=1,
        help="With the cut: cosine above which two patches count as similar.",
        rich_help_panel=METHOD,
    ),
]
FeatureFolder = Annotated[
    Path | None,
    typer.Option(
        "--features",
        callback=features_place,
        help="Folder of features. Default: ./features, else that of the newest run.",
        rich_help_panel=METHOD,
    ),
]
DataNow = Annotated[
    str | None,
    typer.Option(
        "--data", help="New location of the images, if they moved since `dino extract`.", rich_help_panel=METHOD
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=-1,
        max=1,
        help="Minimum cosine of two near-duplicates; `dino dedup` without --threshold helps to choose it.",
        rich_help_panel=METHOD,
    ),
]

# File extensions. An output folder with one of these is accepted only if it already exists. A name in .tar is
# always accepted, because it may come from the source.
_ARCHIVES = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_FILES = (
    *(".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".onnx", ".npy", ".npz", ".h5", ".parquet"),
    *(".png", ".jpg", ".jpeg", ".gif", ".mp4", ".pdf", ".html", ".csv", ".tsv", ".json", ".txt", ".log", ".toml"),
)


def output_place(path: Path, option: str = "--out", *, file: str = "") -> Path:
    """Check that an output path is local and writable, without writing; return it with `~` expanded.

    Args:
        path: Path of the output, as typed.
        option: Option or argument to name in messages.
        file: File name to suggest, for an output that is one file. If empty, the output is a folder.

    Raises:
        DinoError: If the path is an address, is a file instead of a folder or the reverse, is a new folder named like
            a file, or cannot be written.
    """
    use = f"use {option}" if option.startswith("-") else f"for {option}, name"
    wanted = "file" if file else "folder"
    if address := _parse_address(path):
        local = file or _drop_extensions(Path(address.rpartition(":")[2])).name or "results"
        if address.startswith("file:"):
            hint = f"{use} {address.removeprefix('file://')}"
        else:
            hint = f"{use} {local}, and copy that to {address} afterwards"
        raise DinoError(f"{option} {address} is an address; expected a local {wanted}", hint)
    if path.parts[:1] == ("~",):  # bash does not expand it in --out=~/runs
        path = path.expanduser()
    suffix, there = path.suffix.lower(), os.path.lexists(path)
    instead = file or str(_drop_extensions(path) if suffix in (*_ARCHIVES, *_FILES) else f"{path}-2")
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


def note_inside(out: Path, *places: str) -> None:
    """Print a note if an output is inside a folder of images, which is allowed, because outputs are not read."""
    above = out.resolve().parents
    for place in places:
        if os.path.isdir(place) and Path(place).resolve() in above:
            console.say(f"note: the output {out} is inside the images of {place}; dino never reads it as images")


def refuse_address(value: str, option: str, expected: str) -> None:
    """Refuse an input at an address such as s3://, which this option does not read.

    Raises:
        DinoError: If the value is an address.
    """
    if "://" in value and (address := _parse_address(Path(value))):
        raise DinoError(
            f"{option} {address} is an address; expected {expected}",
            f"copy it here first, and name the copy: {Path(address).name or 'DIR'}",
        )


def _drop_extensions(path: Path) -> Path:
    """Drop file extensions: run.tar.gz becomes run, and run.v1 stays."""
    while path.suffix.lower() in (*_ARCHIVES, *_FILES, ".tar"):
        path = path.with_suffix("")
    return path


def _parse_address(path: Path) -> str:
    """Return the address as typed, such as s3://bucket/x or user@host:/x; an empty string for a path."""
    words = path.as_posix()
    if re.match(r"[\w.-]+@[\w.-]+:", words):
        return words
    # Path drops the second slash, and would name a local folder s3:/bucket/x. One letter is a Windows drive.
    scheme, colon, rest = words.partition(":")
    if colon and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+", scheme) and (not rest or rest.startswith("/")):
        return f"{scheme}://{rest.lstrip('/')}" if scheme != "file" else f"file:///{rest.lstrip('/')}"
    return ""


def _check_writable(path: Path, option: str, use: str) -> None:
    folders = [*([path.absolute()] if path.is_dir() else []), *path.absolute().parents]
    nearest = next(folder for folder in folders if os.path.lexists(folder))
    if not nearest.is_dir():
        raise DinoError(f"{option} {path} is below {nearest}, which is a file", f"{use} {path.name}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise DinoError(
            f"no permission to write {option} {path}: {nearest} is read-only for you", f"{use} ~/{path.name}"
        )


def compiles(device: torch.device, *, asked: bool) -> bool:
    """Return whether torch.compile works on a device; print a note if not.

    Raises:
        DinoError: If it does not work and --compile was given.
    """
    from dinocli.core.device import why_not_compiled

    fault = why_not_compiled(device)
    if fault and asked:
        raise DinoError(f"torch cannot compile here: {fault}", "omit --compile, or install a C++ compiler")
    if fault:
        console.say(f"note: torch cannot compile here; the run is slower without it: {fault}")
    return not fault


def decodes(device: torch.device) -> bool:
    """Return whether a device decodes JPEGs; print a note if not."""
    from dinocli.data.decode.torch_codecs import why_no_jpegs

    if fault := why_no_jpegs(device):
        console.say(f"note: torchvision cannot decode JPEGs on {device}; the workers decode them: {fault}")
    return not fault


def one_checkpoint(argument: str | None, option: str | None) -> str | None:
    """Return the checkpoint given as an argument or with `--checkpoint`.

    Raises:
        Misuse: If both are given.
        DinoError: If it is a file of weights that does not exist.
    """
    if argument and option:
        raise Misuse(
            f"CHECKPOINT {argument} and --checkpoint {option} are two checkpoints; expected one",
            f"remove --checkpoint {option}, or the argument {argument}",
        )
    refuse_missing(argument or option)
    return argument or option


def refuse_missing(checkpoint: str | None) -> None:
    """Check that a checkpoint exists before torch is loaded, to fail at once.

    Raises:
        DinoError: If it is a file of weights that does not exist.
    """
    if checkpoint:
        from dinocli.weights.identify import refuse_missing_weights

        refuse_missing_weights(checkpoint)


def checkpoint_or_newest(given: str | None) -> str:
    """Return the given checkpoint, else `./ckpt.safetensors`, else the newest run's; print it if not given or a link.

    Raises:
        DinoError: If none is given and none exists.
    """
    if given and not Path(given).is_symlink():
        return given
    taken = Path(given or CHECKPOINT)
    if not taken.exists():
        if given:
            return given  # a broken link, which loading reports
        run = newest_run()
        if run is None:
            raise DinoError(
                "no checkpoint given, and neither ./ckpt.safetensors nor a run in ./runs exists",
                "dino pretrain IMAGES --preset tiny, or --checkpoint dinocli:mini to see an example",
            )
        taken = run / CHECKPOINT
    step = step_of(taken)
    link = f" -> {os.readlink(taken)}" if taken.is_symlink() else ""
    console.say(f"checkpoint: {taken}{link}" + (f", step {step}" if step is not None else ""))
    _note_longer(taken, step)
    return str(taken)


def _note_longer(taken: Path, step: int | None) -> None:
    """Print a note if another run was trained longer, because the newest may be a short trial."""
    others = {path: step_of(path) or 0 for path in RUNS.glob(f"*/{CHECKPOINT}") if not path.samefile(taken)}
    longest = max(others, key=lambda path: others[path], default=None)
    if step is not None and longest and others[longest] > step:
        console.say(f"note: {longest.parent} was trained longer ({others[longest]} steps); name it to use it")


def step_of(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint, or None if the file lacks it or cannot be read."""
    from dinocli.core.tensors import read_metadata

    try:
        step = read_metadata(checkpoint).get("step", "")
    except (OSError, ValueError):
        return None  # loading the file reports the fault
    return int(step) if step.isdecimal() else None


def encoder_from(
    checkpoint: str | None, device: str, network: Literal["teacher", "student"], overrides: Sequence[str] | None
) -> Encoder:
    """Load the encoder that a command's options name, and print the notes of loading.

    Raises:
        DinoError: If the checkpoint or the device does not exist, or the weights or an override do not fit.
    """
    refuse_missing(checkpoint)
    from dinocli.core.device import pick_device
    from dinocli.weights.load import announcement, load_encoder

    source, picked = checkpoint_or_newest(checkpoint), pick_device(device)
    if line := announcement(source):
        console.say(line)
    encoder = load_encoder(source, picked, network, overrides or [])
    for note in encoder.notes:
        console.say(f"note: {note}")
    return encoder


def encoders_from(
    checkpoints: Sequence[str] | None,
    device: str,
    network: Literal["teacher", "student"],
    overrides: Sequence[str] | None,
) -> list[Encoder]:
    """Load the encoders of a repeated `--checkpoint`, in order, as `encoder_from` does; if none is given, the default.

    Raises:
        DinoError: If a checkpoint or the device does not exist, or the weights or an override do not fit.
    """
    if not checkpoints:
        return [encoder_from(None, device, network, overrides)]
    for checkpoint in checkpoints:
        refuse_missing(checkpoint)
    return [encoder_from(checkpoint, device, network, overrides) for checkpoint in checkpoints]


@dataclass(frozen=True)
class NetworkOptions:
    """Values of the options that name and place a network.

    Attributes:
        checkpoint: Checkpoint as typed. If None, the default is used.
        network: Network to load from a file that holds both.
        overrides: Settings from --set.
        device: Device as typed, such as `auto`.
    """

    checkpoint: str | None
    network: Literal["teacher", "student"]
    overrides: Sequence[str] | None
    device: str

    def encoder(self) -> Encoder:
        """Load the encoder, as `encoder_from` does."""
        return encoder_from(self.checkpoint, self.device, self.network, self.overrides)

    def maker(self, provenance: Provenance, path: Path, hint: str) -> Encoder:
        """Load the checkpoint that made the features of a file, such as of a classifier.

        Args:
            provenance: Provenance of the features.
            path: File that holds them.
            hint: Hint of the error for other weights.

        Raises:
            DinoError: If it is missing, or only checkpoints with other weights are there.
        """
        from dinocli.features.photos import same_encoder
        from dinocli.weights.maker import checkpoints_of

        places = [self.checkpoint] if self.checkpoint else checkpoints_of(provenance, path.parent)
        if not places:
            raise DinoError(
                f"the checkpoint of {path} is not here: {provenance.maker}", "name its current place with --checkpoint"
            )
        for place in places:
            encoder = encoder_from(place, self.device, self.network, self.overrides)
            if encoder.fingerprint == provenance.fingerprint:
                return encoder
        same_encoder(encoder, provenance, f"the features of {path} were", hint)
        return encoder


def features_or_newest(given: Path | None) -> Path:
    """Return the given feature folder, else `./features`, else the newest run's; print it if not given.

    Raises:
        DinoError: If none is given and none exists.
    """
    if given:
        return given
    from dinocli.features.store import FOLDER

    run = newest_run()
    for folder in [FOLDER] + ([run / FOLDER] if run else []):
        if folder.is_dir():
            console.say(f"features: {folder}")
            return folder
    raise DinoError(
        "no --features given, and neither ./features nor features of the newest run exist",
        "dino extract ckpt.safetensors IMAGES, or --features FOLDER",
    )


def listed(gallery: Gallery, rows: Sequence[int], path: Path) -> list[Path]:
    """Write a list of image files, print a note for each name that a list cannot hold, and return the files written."""
    from dinocli.features.gallery import write_list

    try:
        odd = write_list(gallery, rows, path)
    except DinoError as none:
        console.say(f"note: no list was written: {none.message}; {none.hint}")
        return []
    for name in odd:
        console.say(f"note: {name!r} is not in the list: the name contains a tab or a newline")
    return [path]
