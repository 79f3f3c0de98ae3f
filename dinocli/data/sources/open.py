"""Sources of images: folders, archives, lists of files, tar shards, packed pixels, torchvision's data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from dinocli.core.errors import DinoError, nearest, reason_of
from dinocli.core.resources import cache_folder
from dinocli.data.decode.extras import MEDICAL, SLIDES
from dinocli.data.decode.pixels import Data
from dinocli.data.images import DEFAULTS, ImagesConfig
from dinocli.data.sources.hub import HUB, fetch_dataset
from dinocli.data.sources.indexed import Images, StoredImages, folder_classes, label_fields
from dinocli.data.sources.joined import JoinedImages, join_images
from dinocli.data.sources.kinds import kind_of, looks_like_dicom, notes_of, remedy, unread
from dinocli.data.sources.listing import ARRAY, SUFFIXES, Listing, Names, list_files
from dinocli.data.sources.lists import LISTS, fields_of, merge_rows, read_list
from dinocli.data.sources.outputs import is_output
from dinocli.data.sources.parquet import is_parquet, open_parquet, parquet_splits
from dinocli.data.sources.parts import expand, holder_of, is_tiff
from dinocli.data.sources.pixels import PixelShards, is_pixels, open_pixels
from dinocli.data.sources.regular import begins_with
from dinocli.data.sources.remote import open_remote
from dinocli.data.sources.shards import Shards, is_shards, open_shards
from dinocli.data.sources.store import is_remote
from dinocli.data.sources.tar_files import open_tar
from dinocli.data.sources.zip_files import ZIP, open_zip

# First bytes of image files, for files without a suffix: JPEG, PNG, GIF, TIFF of both byte orders, BMP, WebP.
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"RIFF")
# Common folder names of a data set's splits, by the tool's name of the split.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl")  # tables of an image folder, as for Hugging Face
TORCHVISION = "torchvision:"
_NAMED = 6  # outputs listed by name in a message


@dataclass(frozen=True, eq=False)
class TorchvisionImages(StoredImages):
    """Images of a torchvision data set, which returns them decoded."""

    dataset: Any = None

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        return self.dataset[index][0]


@dataclass(frozen=True, eq=False)
class PackedImages(StoredImages):
    """Images that `dino pack --pixels` decoded."""

    pixels: PixelShards

    @property
    def fingerprint(self) -> str:
        return self.pixels.digest

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> Data:
        return self.pixels.read(index, images)


@dataclass(frozen=True, eq=False)
class FolderImages(Images):
    """Images of a folder.

    Attributes:
        listed: Messages about its files, without those about its table of images.
    """

    listed: tuple[str, ...] = field(default=(), kw_only=True)


Source = Images | Shards
S = TypeVar("S", Images, Shards, Source)


def open_source(spec: str) -> Source:
    """Open a source of images.

    Args:
        spec: Folder of images, of any depth; `.zip` or `.tar` archive of one; `.txt` or `.csv` list of files, with or
            without labels; Parquet or Arrow files, a folder of them, or `hf://datasets/USER/NAME`; tar shards
            (`shards/train-{000000..000999}.tar`, a folder of them, or `pipe:COMMAND`); a folder of packed pixels; a
            folder, list, Parquet file or tar shards at an address (`s3://bucket/photos`, `https://host/list.csv`); or
            `torchvision:NAME`, which is downloaded on first use. `/SPLIT` after the name selects a split other than the
            training split.

    Raises:
        DinoError: If the source does not exist or holds no image.
    """
    if not is_shards(spec):
        return open_remote(spec) if is_remote(spec) else open_images(spec)
    return (open_tar(Path(spec)) if is_archive(spec) else None) or open_shards(spec)


def open_images(spec: str) -> Images:
    """Open a source with random access: any source except tar shards.

    Raises:
        DinoError: If the source does not exist or holds no image.
    """
    if spec.startswith(TORCHVISION):
        name, _, split = spec.removeprefix(TORCHVISION).partition("/")
        parts = _torchvision(name, [split] if split else ["train"])
        return next(iter(parts.values()))
    if is_pixels(spec):
        return _packed_images(Path(spec))
    if spec.startswith(HUB):
        return open_images(str(fetch_dataset(spec)))
    if is_remote(spec):
        opened = open_remote(spec)
        if isinstance(opened, Shards):
            raise DinoError(f"{spec} holds tar shards; expected images with random access", "copy them to this machine")
        return opened
    if is_parquet(spec):
        return open_parquet(spec)
    path = Path(spec)
    if is_archive(spec) and (archive := open_zip(path) if path.suffix.lower() == ZIP else open_tar(path)):
        return archive
    return _file_list(path) if path.suffix.lower() in LISTS and path.is_file() else image_folder(path, held=True)


def is_archive(spec: str) -> bool:
    """Return whether a source is one file that may hold images as a folder does: ZIP or tar."""
    return spec.lower().endswith((ZIP, ".tar")) and os.path.isfile(spec)


def within(source: S, images: ImagesConfig) -> S:
    """Return a source of the single images in the source's files, such as the pages of a TIFF.

    Call it once the settings are known. Only folders, lists and several of them change. Files that the settings do not
    take are counted in the notes; classes that only they have are dropped. A note names the settings that another
    source ignores.

    Raises:
        DinoError: If no image is left.
    """
    if (asked := _settings(images)) and _reads_first(source):
        note = f"ignoring {', '.join(asked)} for {source.where}: only the files of folders and lists are read this way"
        return source if note in source.notes else replace(source, notes=(*source.notes, note))
    if isinstance(source, JoinedImages):
        return cast(S, join_images(source.where, [within(part, images) for part in source.parts], source.shares))
    if not isinstance(source, Images) or type(source) not in (Images, FolderImages) or not (source.held or asked):
        return source
    parts, missed = expand(source.root, source.names, images)
    added: list[str] = [f"not read: {unread(kinds)}; --set {setting}" for setting, kinds in missed.items()]
    if images.tile and not SLIDES.installed and (tiffs := sum(map(is_tiff, source.names))):
        added.append(f"{tiffs} .tif are read whole, pyramids too; {SLIDES.pip} reads the tiles of pyramids")
    if not parts:
        setting, kinds = next(iter(missed.items()))
        raise DinoError(f"no images in {source.where}: it holds {unread(kinds)}", f"--set {setting}")
    kept = list(dict.fromkeys(row for row, _ in parts))
    arrays = {row for row in kept if _is_array(source.names[row])}
    if isinstance(source, FolderImages) and 0 < len(arrays) < len(kept):  # a setting takes images beside them
        added.append(f"not read: {len(arrays)} {ARRAY}")
        parts, kept = [part for part in parts if part[0] not in arrays], [row for row in kept if row not in arrays]
    files: Any = source if len(kept) == len(source) else _keep(source, kept)
    place = {row: i for i, row in enumerate(kept)}
    names, rows = Names.of([name for _, name in parts]), [place[row] for row, _ in parts]
    metadata = {column: Names.of([cells[row] for row in rows]) for column, cells in files.metadata.items()}
    labels, notes = files.labels[rows], (*files.notes, *added)
    return replace(files, names=names, labels=labels, notes=notes, metadata=metadata, held=False)


def _settings(images: ImagesConfig) -> list[str]:
    """Return the settings that take several images of a file, as `images.key=value`."""
    values = {
        "pages": images.pages != "first" and images.pages,
        "every": images.every,
        "pair_within": images.pair_within,
        "tile": images.tile,
        "key": images.key,
    }
    return [f"images.{name}={value}" for name, value in values.items() if value]


def _reads_first(source: Source) -> bool:
    """Return whether only the first image of each file is read, whatever the settings are."""
    if isinstance(source, JoinedImages):
        return all(map(_reads_first, source.parts))
    decoded = isinstance(source, PackedImages | TorchvisionImages)
    return isinstance(source, Shards) or not (source.in_files or decoded)


def _keep(source: Images, rows: Sequence[int]) -> Images:
    """Return some files of a folder or list, with the classes that these files have."""
    names = Names.of([source.names[row] for row in rows])
    if isinstance(source, FolderImages):
        return _folder(source.root, names, source.listed)
    labels = [source.classes[label] if label >= 0 else "" for label in source.labels[rows].tolist()]
    metadata = {column: Names.of([cells[row] for row in rows]) for column, cells in source.metadata.items()}
    return replace(source, names=names, metadata=metadata, **label_fields(labels))


def splits(spec: str, images: ImagesConfig | None = None, *, several: bool = False) -> dict[str, Source]:
    """Open the splits of a labelled set: `train`, `val` and `test` if it has any, else the whole set as `all`.

    Args:
        spec: Source, as in `open_source`.
        images: Settings that say which files hold several images. If None, call `within` later.
        several: True if an image may have several labels.

    Raises:
        DinoError: If the set does not exist, a split holds no image, or an image has several labels.
    """
    if spec.startswith(HUB):
        return splits(str(fetch_dataset(spec)), images, several=several)
    opened = _open_splits(spec)
    for source in opened.values():
        if isinstance(source, Images) and not several:
            refuse_clash(source)
    return {split: within(source, images) if images else source for split, source in opened.items()}


def _open_splits(spec: str) -> dict[str, Source]:
    if spec.startswith(TORCHVISION) and "/" not in spec:
        return dict(_torchvision(spec.removeprefix(TORCHVISION), list(_SPLITS)))
    if is_parquet(spec):
        return dict(parquet_splits(spec))
    if is_archive(spec) or is_remote(spec):
        return _archive_splits(open_source(spec))
    root = Path(spec)
    found = {split: root / name for split, spellings in _SPLITS.items() for name in spellings if (root / name).is_dir()}
    # "test" may also be a class. Without "train", it is a split only if all other folders are outputs of this tool.
    beside = {p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")} if root.is_dir() else set()
    beside -= set(found.values())
    if not found or ("train" not in found and not all(is_output(str(path)) for path in beside)):
        return {"all": open_source(spec)}
    return {split: open_source(str(path)) for split, path in found.items()}


def refuse_clash(source: Images) -> None:
    """Check that no image has two labels.

    Raises:
        DinoError: If one has. The error names it and both labels.
    """
    if source.clash:
        raise DinoError(
            f"{source.where} gives {source.clash}; expected one label per image",
            "remove the wrong row; dino finetune --multi-label trains on several labels per image",
        )


def _archive_splits(source: Source) -> dict[str, Source]:
    """Return the parts of a source in folders named as splits; as with local folders, `test` may be a class."""
    names = {name.lower(): name for name in source.classes}
    found = {split: names[name] for split, spellings in _SPLITS.items() for name in spellings if name in names}
    if isinstance(source, Shards) or not found or ("train" not in found and len(found) < len(source.classes)):
        return {"all": source}
    numbers = {split: source.classes.index(name) for split, name in found.items()}
    return {split: source.below(found[split], np.flatnonzero(source.labels == k)) for split, k in numbers.items()}


def image_folder(root: Path, *, held: bool = False) -> Images:
    """List the images in a folder of any depth, ignoring hidden files and outputs of this tool.

    Arrays (.npy) count as images only in a folder without other images. If every image is in a subfolder, the
    top-level subfolders are the classes.

    Args:
        root: Folder to list.
        held: List files that hold images only by a setting too, for `within`.

    Raises:
        DinoError: If the folder is missing, is a file, or holds no image.
    """
    if not root.exists():
        raise DinoError(f"{root} does not exist; expected a folder of images", _nearest_place(root))
    if not root.is_dir():
        raise DinoError(f"{root} is a file; expected a folder of images", f"name its folder: {root.parent}")
    listing = list_files(root, _is_image)
    if not len(listing.names):  # next to images, arrays are mostly their features, masks or labels
        listing = list_files(root, _is_array)
    held = held and any(holder_of(f"x{kind}") for kind in listing.kinds)
    if held:
        listing = _with_held(root, listing)
    if not len(listing.names):
        raise _no_images(root, listing)
    return _folder(root, listing.names, tuple(_notes(root, listing)), held=held)


def _folder(root: Path, names: Names, notes: tuple[str, ...], *, held: bool = False) -> Images:
    classes, labels = folder_classes(names)
    found = FolderImages(str(root), root, names, classes, labels, notes=notes, held=held, listed=notes)
    table = next((root / name for name in _METADATA if (root / name).is_file()), None)
    return _described(found, table) if table else found


def _described(images: Images, table: Path) -> Images:
    """Add the labels and further columns of a folder's `metadata.csv` to its images. Images without a row are kept."""
    try:
        listed, clash = merge_rows(read_list(table), str(table), partial(_place, images.root))
    except DinoError as error:
        return replace(images, notes=(*images.notes, f"not using {table}: {error.message}"))
    entries = {os.path.normpath(entry.name): entry for entry in listed.entries}
    rows = [entries.pop(name, None) for name in images.names]
    notes = [*images.notes, *listed.notes]
    if None in rows:
        first = images.names[rows.index(None)]
        notes.append(f"{rows.count(None)} images have no row in {table}, such as {first}; they are read without labels")
    if entries:
        notes.append(f"{len(entries)} rows of {table} name no image of the folder, such as {next(iter(entries))}")
    metadata = {
        column: Names.of([row.more[i] if row else "" for row in rows]) for i, column in enumerate(listed.columns)
    }
    described = replace(images, notes=tuple(notes), metadata=metadata, clash=clash)
    labels = [row.label if row else "" for row in rows]
    return replace(described, **label_fields(labels)) if any(labels) else described


def _with_held(root: Path, listing: Listing) -> Listing:
    held = list_files(root, lambda path: holder_of(os.path.basename(path)) is not None, cached=False)
    kinds = {kind: count for kind, count in listing.kinds.items() if not holder_of(f"x{kind}")}
    return listing._replace(names=Names.of(sorted([*listing.names, *held.names])), kinds=kinds)


def _packed_images(folder: Path) -> PackedImages:
    pixels = open_pixels(folder)
    return PackedImages(str(folder), folder, pixels.names, pixels.classes, pixels.labels, pixels)


def _notes(root: Path, listing: Listing) -> Iterator[str]:
    if listing.ours:
        where = "here" if root == Path() else f"in {root}"
        *some, last = listing.ours[:_NAMED] + ([f"{len(listing.ours) - _NAMED} more"] if listing.ours[_NAMED:] else [])
        yield f"ignoring {', '.join(some) + ' and ' if some else ''}{last} {where}: written by dino"
    yield from notes_of(listing.kinds)


def _no_images(root: Path, listing: Listing) -> DinoError:
    """Return the error for a folder without images; it lists the files that are there."""
    seen = unread(listing.kinds) or "nothing"
    if listing.ours:
        seen += f", and outputs of dino ({', '.join(listing.ours[:_NAMED])})"
    return DinoError(f"no images in {root}: it holds {seen}", remedy(str(root), listing.kinds, listing.first))


def _nearest_place(missing: Path) -> str:
    """Return a hint with the existing name most similar to a missing path."""
    above = next((parent for parent in missing.parents if parent.is_dir()), Path())
    first = missing.relative_to(above).parts[0]
    try:
        beside = {path.name.lower(): path for path in above.iterdir() if path.is_dir() or path.suffix in LISTS}
    except OSError:
        beside = {}
    close = nearest(first.lower(), beside, least=0.6)
    return f"did you mean {beside[close]}?" if close else "check the path with `ls`"


def photos(paths: Sequence[Path]) -> Images:
    """Combine image files, folders of images and lists of files into one source without labels.

    Raises:
        DinoError: If a path does not exist or a folder holds no image.
    """
    notes = list[str]()
    found: dict[str, str] = {}  # each image once, under its first name
    for path in paths:
        if not path.exists():
            raise DinoError(f"{path} does not exist; expected a photo or a folder", "check the path")
        for file in photo_files(path, notes):
            found.setdefault(os.path.abspath(file), str(file))
    names, labels = list(found.values()), np.full(len(found), -1, dtype=np.int32)
    return Images(", ".join(map(str, paths)), Path(), Names.of(names), [], labels, notes=tuple(notes))


def photo_files(path: Path, notes: list[str] | None = None) -> list[Path]:
    """Return the images of a folder or of a list of files, or the path itself.

    Args:
        path: File, folder or list.
        notes: List to which messages about files that are not read are added.

    Raises:
        DinoError: If the folder or list holds no image.
    """
    if path.is_dir():
        found = image_folder(path)
    elif path.suffix.lower() in LISTS and path.is_file():
        found = _file_list(path)
    else:
        return [path]
    if notes is not None:
        notes += found.notes
    return [found.root / name for name in found.names]


def _is_image(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    # DICOM files are often named by their number, 1.2.840.10008, which kind_of does not take for a suffix.
    if suffix in SUFFIXES or kind_of(suffix and f"x{suffix}"):
        return suffix in SUFFIXES
    return begins_with(path, _BEGINNINGS) or (MEDICAL.suffixes <= SUFFIXES and looks_like_dicom(path))


def _is_array(path: str) -> bool:
    return path.lower().endswith(ARRAY)


def _file_list(path: Path) -> Images:
    """Open a list of files, each image once. Images without a label get -1.

    Raises:
        DinoError: If the list is empty, names no files, or its first file does not exist.
    """
    listed, clash = merge_rows(read_list(path), str(path), partial(_place, path.parent))
    held = any(holder_of(entry.name) for entry in listed.entries)
    return Images(where=str(path), root=path.parent, **fields_of(listed, clash), held=held)


def _place(folder: Path, name: str) -> str:
    """Return the path of an image. Spellings such as ./a.jpg are the same; links to the same file are different."""
    return os.path.normpath(os.path.join(folder, name))


def _torchvision(name: str, wanted: Sequence[str]) -> dict[str, Images]:
    """Open the requested splits that a torchvision set has; a set without splits is returned as `all`.

    Raises:
        DinoError: If the set or split does not exist, or the download fails.
    """
    import inspect

    from torchvision import datasets

    known = [kind for kind in datasets.__all__ if isinstance(getattr(datasets, kind), type)]
    exact = next((kind for kind in known if kind.lower() == name.lower()), None)
    if exact is None:
        raise DinoError(f"torchvision has no data set {name!r}", f"did you mean {TORCHVISION}{nearest(name, known)}?")
    kind = getattr(datasets, exact)
    takes = inspect.signature(kind).parameters
    options: dict[str, Any] = {"root": str(cache_folder() / "torchvision" / exact)}
    if "download" in takes:
        options["download"] = True
    parts: dict[str, Images] = {}
    for part in wanted if {"split", "train"} & set(takes) else ["all"]:
        choice = {"split": part} if "split" in takes else {"train": part == "train"} if "train" in takes else {}
        if part == "val" and "train" in takes and "split" not in takes:
            continue
        try:
            dataset = kind(**options, **choice)
        except ValueError as error:
            if "split" in str(error) and len(wanted) > 1:
                continue  # the set lacks this split
            raise DinoError(f"torchvision's {exact} has no split {part!r}: {error}", f"{TORCHVISION}{exact}") from error
        except (RuntimeError, OSError, TypeError) as error:
            said = reason_of(error)
            raise DinoError(
                f"torchvision could not load {exact}: {said}",
                f"put its files into {options['root']}, or name a folder of images",
            ) from error
        parts[part] = _wrap_torchvision(dataset, f"{TORCHVISION}{exact}/{part}")
    return parts


def _wrap_torchvision(dataset: Any, where: str) -> Images:
    found = next(
        (getattr(dataset, key) for key in ("targets", "labels", "_labels", "y") if hasattr(dataset, key)), None
    )
    if found is None and hasattr(dataset, "_samples"):
        found = [label for _, label in dataset._samples]
    labels = np.asarray(found if found is not None else [-1] * len(dataset), dtype=np.int32)
    names = getattr(dataset, "classes", None) or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    classes = [name if isinstance(name, str) else ", ".join(name) for name in names] if labels.min() >= 0 else []
    places = Names.of([str(i) for i in range(len(dataset))])
    return TorchvisionImages(where, Path(where), places, classes, labels, dataset)
