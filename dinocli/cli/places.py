"""Checks of arguments that name files; the hint of an error is the corrected command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dinocli.cli.words import Words, words_of
from dinocli.core.errors import DinoError

if TYPE_CHECKING:
    from dinocli.weights.identify import Kind


def images_place(context: typer.Context, value: str | None) -> str | None:
    """Check that an argument names images.

    Raises:
        DinoError: If it names a checkpoint, features, a single image, an archive, a video or an address.
    """
    if value is not None and not context.resilient_parsing:
        _check_images(words_of(context), value)
    return value


def images_places(context: typer.Context, value: list[str]) -> list[str]:
    """Check that arguments name images, as `images_place` does.

    Patterns, files of several images such as volumes and videos and, of several arguments, image files are valid too.
    """
    from dinocli.data.sources.parts import holder_of
    from dinocli.data.sources.several import split_weight
    from dinocli.weights.identify import kind_of

    for each in [] if context.resilient_parsing else value:
        place, _ = split_weight(each)
        kind = kind_of(place)
        holds = os.path.isfile(place) and holder_of(place)
        if not holds and kind != "pattern" and not (kind == "image" and len(value) > 1):
            _check_images(words_of(context), place)
    return value


def _check_images(words: Words, value: str) -> None:
    from dinocli.data.sources.hub import HUB
    from dinocli.data.sources.remote import is_single
    from dinocli.data.sources.store import is_remote
    from dinocli.weights.identify import NAMES, kind_of

    kind = kind_of(value)
    if words.command == "pack":
        _check_pack(words, kind)
    if value.startswith(HUB) or (is_remote(value) and not is_single(value)):
        return
    hint = _hint_for_images(words, value, kind)
    if hint:
        named = "IMAGES " * (kind == "address")
        raise DinoError(f"{named}{value} is {NAMES[kind]}; expected images: a folder, a list, or tar shards", hint)


def normal_place(context: typer.Context, value: str) -> str:
    """Check that an argument names images, as `images_place` does, or a memory bank."""
    from dinocli.weights.identify import kind_of

    if context.resilient_parsing or kind_of(value) == "bank":
        return value
    return images_place(context, value) or value


def _hint_for_images(words: Words, value: str, kind: Kind) -> str:
    """Return the hint for a value that is not a set of images, or an empty string if it may be one."""
    from dinocli.weights.identify import WEIGHTS

    path, quoted = Path(value), shlex.quote(value)
    stem = shlex.quote(path.stem)
    if kind in WEIGHTS:
        option = "--init" if words.command == "pretrain" else "--checkpoint"
        if words.command == "extract":
            return f"dino extract {quoted} IMAGES"
        if words.command == "compare":
            return _replace_value(words, value, "IMAGES")
        return f"dino {words.command} IMAGES" + (f" {option} {quoted}" if option in words.known else "")
    if kind == "classifier":
        return f"dino classify IMAGES --with {quoted}"
    if kind == "bank":
        return f"dino anomaly {quoted} --test IMAGES"
    if kind == "features":
        return f"dino knn --features {shlex.quote(str(path if path.is_dir() else path.parent))}"
    if kind in ("image", "pattern"):
        folder = path.parent if kind == "image" or path.parent.is_dir() else Path()
        return _replace_value(words, value, str(folder))
    if kind == "archive" and path.suffix.lower() != ".zip":  # ZIP files are read as they are
        return f"7z x {quoted} -o{stem}, then {_replace_value(words, value, path.stem)}"
    if kind == "video":
        return (
            f"mkdir {stem} && ffmpeg -i {quoted} -r 2 {stem}/%05d.png, then {_replace_value(words, value, path.stem)}"
        )
    if kind == "address":
        if value.endswith(".tar"):
            return _replace_value(words, value, f"pipe:curl -sL {value}")
        name = value.rstrip("/").rpartition("/")[2] or "images"
        return f"copy it here first, then {_replace_value(words, value, name)}"
    return "name a folder of images" if kind == "graph" else ""


def _check_pack(words: Words, kind: Kind) -> None:
    from dinocli.weights.identify import kind_of

    if len(words.places) != 2 or kind in ("images", "image"):
        return
    images, out = words.positional
    theirs = kind_of(out)
    if theirs in ("images", "source") and (kind in ("missing", "folder") or (kind == "source" and theirs == "images")):
        raise DinoError(
            f"{images} holds no images, but {out} does; expected the images first", words.ordered([out, images])
        )


def checkpoint_and_images(context: typer.Context, value: list[str]) -> list[str]:
    """Check the order and the kinds of `[CHECKPOINT] DATA`.

    Raises:
        DinoError: If they are swapped, the images are missing, or one is another kind of file.
    """
    if not value or context.resilient_parsing or context.params.get("merge"):  # parts of features
        return value
    from dinocli.weights.identify import NAMES, WEIGHTS, kind_of

    words, kinds = words_of(context), [kind_of(word) for word in value]
    if len(value) == 1:
        if kinds[0] in WEIGHTS:
            again = ["IMAGES"] if words.value(["--checkpoint"]) else [value[0], "IMAGES"]
            raise DinoError(f"{value[0]} is {NAMES[kinds[0]]}; expected images after it", words.ordered(again))
    elif kinds[1] in WEIGHTS:
        if kinds[0] not in WEIGHTS and kinds[0] != "missing":
            first = f"{value[1]} is {NAMES[kinds[1]]}, and {value[0]} is {NAMES[kinds[0]]}"
            raise DinoError(f"the checkpoint comes first: {first}", words.ordered([value[1], value[0]]))
    elif kinds[0] in ("images", "image", "features", "classifier", "bank", "source") and not value[0].endswith(".txt"):
        hint = words.ordered(["ckpt.safetensors", value[1]])
        raise DinoError(f"{value[0]} is {NAMES[kinds[0]]}; expected a checkpoint before the images", hint)
    images_place(context, value[-1])
    return value


def network_places(context: typer.Context, value: list[str]) -> list[str]:
    """Check that arguments name at least two networks.

    Raises:
        DinoError: If one names images, features or another kind of file, or there is only one.
    """
    if not value or context.resilient_parsing:
        return value
    from dinocli.weights.identify import NAMES, WEIGHTS, kind_of

    words = words_of(context)
    for word in value:
        kind = kind_of(word)
        if kind in WEIGHTS or kind == "missing":  # loading reports a missing file, with the nearest name
            continue
        others = [other for other in words.positional if other != word]
        images = kind in ("images", "source") and not words.value(["--on"])
        networks = [*others, *["OTHER"] * (len(others) < 2)]
        hint = words.ordered(networks, "--on", word) if images else "name run folders, checkpoints or timm:NAME"
        raise DinoError(f"{word} is {NAMES[kind]}; expected a checkpoint", hint)
    if len(value) < 2:
        raise DinoError(f"one network: {value[0]}; expected at least two", words.ordered([*value, "OTHER"]))
    return value


def is_weights(value: str) -> bool:
    """Return whether a word names a run, a checkpoint or a model of timm."""
    from dinocli.weights.identify import WEIGHTS, kind_of

    return kind_of(value) in WEIGHTS


def run_before_out(context: typer.Context, value: str | None) -> str | None:
    """Check the order of `[CHECKPOINT] [OUT]`.

    Raises:
        DinoError: If they are swapped.
    """
    if value is None or context.resilient_parsing:
        return value
    from dinocli.weights.identify import NAMES, WEIGHTS, kind_of

    words = words_of(context)
    if len(words.places) == 2 and kind_of(value) not in WEIGHTS and (kind := kind_of(words.positional[1])) in WEIGHTS:
        run = words.positional[1]
        raise DinoError(
            f"the checkpoint comes first: {run} is {NAMES[kind]}, and {value} is not", words.ordered([run, value])
        )
    return value


def photo_places(context: typer.Context, value: list[Path] | None) -> list[Path] | None:
    """Check that arguments name photos and folders of photos.

    Raises:
        DinoError: If one names a checkpoint, features, a number, a pattern, an archive or an address.
    """
    if context.resilient_parsing:
        return value
    for path in value or []:
        _check_photo(words_of(context), str(path))
    return value


def photo_place(context: typer.Context, value: Path) -> Path:
    """Check that an argument names a photo, as `photo_places` does."""
    if not context.resilient_parsing:
        _check_photo(words_of(context), str(value))
    return value


def _check_photo(words: Words, value: str) -> None:
    from dinocli.weights.identify import NAMES, WEIGHTS, kind_of

    kind = kind_of(value)
    typed = next((word for word in words.positional if word == value or str(Path(word)) == value), value)
    others = [word for word in words.positional if word != typed]
    tracks = words.command in ("track", "eval track")
    expected = "expected a folder of frames or a video" if tracks else "expected photos or folders of photos"
    if kind in WEIGHTS and "--checkpoint" in words.known:
        photos = others or ["FRAMES" if tracks else "photo.jpg"]
        if words.command in ("match", "eval match") and len(photos) < 2:
            photos = [*photos, "b.jpg"]
        again = words.ordered(photos) if words.value(["--checkpoint"]) else words.ordered(photos, "--checkpoint", typed)
        raise DinoError(f"{typed} is {NAMES[kind]}; {expected}", again)
    if kind == "features" and "--features" in words.known:
        raise DinoError(
            f"{typed} is {NAMES[kind]}; {expected}", words.ordered(others or ["photo.jpg"], "--features", typed)
        )
    if kind == "classifier":
        again = words.ordered(others or ["photo.jpg"], "--with", typed) if "--with" in words.known else ""
        raise DinoError(f"{typed} is {NAMES[kind]}; {expected}", again or f"dino classify IMAGES --with {typed}")
    if kind == "bank":
        raise DinoError(f"{typed} is {NAMES[kind]}; {expected}", f"dino anomaly {typed} --test IMAGES")
    if kind == "missing" and typed.isdecimal() and words.command == "search":
        count = max(1, int(typed))
        raise DinoError(f"no photo is named {typed}", words.ordered(others or ["photo.jpg"], "--k", str(count)))
    if kind == "pattern":
        folder = Path(typed).parent
        folder = folder if folder.is_dir() else Path()
        raise DinoError(f"{typed} is {NAMES[kind]}", words.ordered([*others, str(folder)]))
    if kind in ("archive", "address", "graph"):
        raise DinoError(
            f"{typed} is {NAMES[kind]}; {expected}", "unpack or copy it here, and name the folder of its images"
        )


def features_place(context: typer.Context, value: Path | None) -> Path | None:
    """Check that an option names a folder of features.

    Raises:
        DinoError: If it names images, a checkpoint, a run or a feature file.
    """
    if value is None or context.resilient_parsing:
        return value
    check_features(str(value), words_of(context))
    return value


def feature_places(context: typer.Context, value: list[Path] | None) -> list[Path] | None:
    """Check that options name folders of features, as `features_place` does."""
    for path in value or []:
        features_place(context, path)
    return value


def check_features(value: str, words: Words) -> None:
    """Check that a word names a folder of features, if it exists.

    Raises:
        DinoError: If it names images, a checkpoint, a run or a feature file.
    """
    from dinocli.features.store import FOLDER
    from dinocli.weights.identify import NAMES, WEIGHTS, kind_of

    kind, path, quoted = kind_of(value), Path(value), shlex.quote(value)
    expected = "expected a folder of features"
    if kind == "features" and path.is_file():
        raise DinoError(f"{value} is one file of features; {expected}", _replace_value(words, value, str(path.parent)))
    if kind == "run" and (path / FOLDER).is_dir():
        raise DinoError(f"{value} is {NAMES[kind]}; {expected}", _replace_value(words, value, str(path / FOLDER)))
    if kind in WEIGHTS:
        raise DinoError(
            f"{value} is {NAMES[kind]}; {expected}", f"dino extract {quoted} IMAGES, then dino {words.command}"
        )
    if kind == "classifier":
        raise DinoError(f"{value} is {NAMES[kind]}; {expected}", f"dino classify IMAGES --with {quoted}")
    if kind == "bank":
        raise DinoError(f"{value} is {NAMES[kind]}; {expected}", f"dino anomaly {quoted} --test IMAGES")
    if kind in ("images", "source", "image"):
        images = value if kind != "image" else str(path.parent)
        features = f"{Path(images).resolve().name}-features"
        make = shlex.join(["dino", "extract", "ckpt.safetensors", images, "--out", features])
        raise DinoError(
            f"{value} is {NAMES[kind]}; {expected}", f"{make}, then {_replace_value(words, value, features)}"
        )


def _replace_value(words: Words, old: str, new: str) -> str:
    """Return the command with one value replaced, typed as a word or as --option=value."""
    instead: dict[int, Sequence[str]] = {}
    for i, word in enumerate(words.typed):
        name, equals, value = word.partition("=")
        if str(Path(word)) == old or word == old:
            instead[i] = [new]
        elif equals and str(Path(value)) == old:
            instead[i] = [f"{name}={new}"]
    return words.again(instead)
