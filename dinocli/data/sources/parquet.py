"""Images in Parquet and Arrow files, as of Hugging Face's datasets, read by row group."""

from __future__ import annotations

import json
import os
import re
import shlex
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError, reason_of
from dinocli.data.images import DEFAULTS, ImagesConfig, megabytes_over
from dinocli.data.sources.indexed import StoredImages, number_labels
from dinocli.data.sources.kinds import kind_of
from dinocli.data.sources.listing import ARRAY, JUNK, SUFFIXES, Names
from dinocli.data.sources.outputs import SIGNS, recognise
from dinocli.data.sources.parts import holder_of
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.remote_file import RemoteFile
from dinocli.data.sources.store import is_remote

PARQUET, ARROW = ".parquet", ".arrow"
_IMAGE, _LABEL = ("image", "img", "jpg", "png", "bytes"), ("label", "labels", "class", "fine_label", "target")
_KEPT = 2**28  # bytes of row groups that a process keeps
_BLOCK = 2**20  # bytes read at once from an address; the labels of each row group lie apart
_LARGEST = 2**30  # bytes of a row group, which is read as a whole
_SPLIT = re.compile(r"(?:^|[/_.-])(train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?=[/_.-])")


class _Table(NamedTuple):
    """Contents of a file: its columns, rows per group, size per group in bytes, labels, and class names if any."""

    image: str
    rows: list[int]
    sizes: list[int]
    labels: list[Any]
    names: list[str] | None
    empty: int


@dataclass(frozen=True, eq=False)
class ParquetImages(StoredImages):
    """Images in the rows of Parquet or Arrow files.

    Attributes:
        groups: Reader of the row groups.
        ends: Number of rows up to the end of each row group. [G]
        sizes: Size of each row group in bytes. [G]
    """

    groups: RowGroups
    ends: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """Checksum of the names, their order, and the row groups' rows and sizes."""
        return f"{zlib.crc32(self.sizes.tobytes(), zlib.crc32(self.ends.tobytes(), int(super().fingerprint, 16))):08x}"

    @property
    def blocks(self) -> tuple[NDArray[np.int64], int]:
        # Half of what a process keeps, so that the groups of two windows fit while one follows the other.
        return self.ends, max(1, int(_KEPT / 2 / max(1, self.sizes.max(initial=1))))

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> bytes:
        """Return the bytes of an image.

        Raises:
            Refused: If the row has no bytes, they are too large, or the row group is corrupt.
            OSError: If the file cannot be read.
        """
        group = int(np.searchsorted(self.ends, index, "right"))
        first = int(self.ends[group - 1]) if group else 0
        cell = self.groups[group][index - first]
        if not cell.is_valid:
            raise Refused("no bytes: the row names a path only, which is not followed")
        size = len(cell.as_buffer())
        if size > images.max_megabytes * 1e6:
            raise Refused(f"too large: {megabytes_over(size, images.max_megabytes)}")
        return cell.as_buffer().to_pybytes()


class RowGroups:
    """Columns of image bytes by row group; the last ones are kept, in each process its own.

    Args:
        places: File, index in the file, and column of each row group.
        sizes: Size of each row group in bytes.
    """

    def __init__(self, places: Sequence[tuple[str, int, str]], sizes: Sequence[int]) -> None:
        self.places, self.sizes = places, sizes
        self._files: dict[str, Any] = {}
        self._kept: dict[int, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned worker opens its own files
        return RowGroups, (self.places, self.sizes)

    def __getitem__(self, group: int) -> Any:
        """Return the bytes of all rows of a group, as an array of pyarrow.

        Raises:
            Refused: If the group is corrupt.
        """
        kept = self._kept.pop(group, None)
        if kept is None:
            path, number, column = self.places[group]
            try:
                kept = _read_group(self._open(path), number, column)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
                said = reason_of(error)
                raise Refused(f"damaged: row group {number} of {path}: {said}") from error
        self._kept[group] = kept
        while len(self._kept) > 1 and sum(self.sizes[g] for g in self._kept) > _KEPT:
            self._kept.pop(next(iter(self._kept)))
        return kept

    def _open(self, path: str) -> Any:
        if path not in self._files:
            self._files[path] = _open(path)
        return self._files[path]


def is_parquet(spec: str) -> bool:
    """Return whether a source is a Parquet or Arrow file, or a folder with such files and no images beside them.

    Beside other files that may hold images, such as arrays and videos, a Parquet file must have a column of images.
    """
    if not os.path.isdir(spec):
        return spec.lower().endswith((PARQUET, ARROW)) and os.path.isfile(spec)
    found, others = list[str](), False
    for path in _walk(spec):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in SUFFIXES:
            return False
        if _is_table(path):
            found.append(path)
        elif not others:
            name = os.path.basename(path)
            others = kind_of(name) in ("", ARRAY) or holder_of(name) is not None
    return any(map(_has_images, found)) if others else bool(found)


def _walk(root: str) -> Iterator[str]:
    """Yield the files below a folder, except hidden ones and outputs of this tool."""
    for folder, folders, names in os.walk(root):
        ours = recognise(folder, SIGNS.intersection([*folders, *names]))
        if ours.whole and folder != root:  # the folder that the user names is read even if it is an output
            folders.clear()
            continue
        shown, folders[:] = (
            [name for name in some if not (name.startswith(".") or name in JUNK or ours.hides.fullmatch(name))]
            for some in (names, folders)
        )
        yield from (os.path.join(folder, name) for name in shown)


def _is_table(path: str) -> bool:
    # Cache files are other versions of the same rows.
    return path.lower().endswith((PARQUET, ARROW)) and not os.path.basename(path).startswith("cache-")


def _has_images(path: str) -> bool:
    try:
        schema = _schema(_open(path))
        return schema is not None and bool(_image_column(path, schema))
    except (OSError, ValueError, DinoError):
        return False


def open_parquet(*specs: str) -> ParquetImages:
    """Open Parquet or Arrow files, or all in folders, as one source.

    Raises:
        DinoError: If pyarrow is missing, a file is corrupt, or there is no column of images.
    """
    if len(specs) == 1:
        return _open_files(specs[0], _files(specs[0]))
    return _open_files(shlex.join(specs), [path for spec in specs for path in _files(spec)])


def open_remote_parquet(where: str, addresses: Sequence[str]) -> ParquetImages:
    """Open Parquet files at addresses. Of each file, only the labels and the row groups of wanted images are read.

    Args:
        where: File or folder as the user named it.
        addresses: Address of each file.

    Raises:
        DinoError: If pyarrow is missing, a file does not exist or is corrupt, there is no column of images, or the
            network fails.
    """
    return _open_files(where, sorted(addresses))


def parquet_splits(spec: str) -> dict[str, ParquetImages]:
    """Open the splits of files such as `train-00000-of-00002.parquet` and `test/data.arrow`, or all as `all`."""
    parts: dict[str, list[str]] = {}
    for path in _files(spec):
        found = _SPLIT.search(os.path.relpath(path, spec) if path != spec else "")
        key = found[1][:2] if found else ""
        parts.setdefault({"tr": "train", "va": "val", "te": "test"}.get(key, ""), []).append(path)
    if "train" not in parts or "" in parts:
        return {"all": open_parquet(spec)}
    return {split: _open_files(f"{spec}/{split}", files) for split, files in parts.items()}


def _files(path: str) -> list[str]:
    return sorted(filter(_is_table, _walk(path)), key=Path) if os.path.isdir(path) else [path]


def _open_files(where: str, files: Sequence[str]) -> ParquetImages:
    tables = [_list_file(path) for path in files]
    known = next((table.names for table in tables if table.names), None)
    notes = [
        f"{path} states no class names; its numbers are taken for the classes of another file"
        for path, table in zip(files, tables, strict=True)
        if known and not table.names and any(isinstance(label, int) for label in table.labels)
    ]
    labels = [_name(label, table.names or known) for table in tables for label in table.labels]
    if empty := sum(table.empty for table in tables):
        notes.append(f"{empty} of {len(labels)} rows have no bytes, only a path, which is not followed")
        if empty == len(labels):
            raise DinoError(
                f"the images of {where} are not in it: its rows have only paths",
                "name the folder of the image files, or write the set with their bytes (datasets: save_to_disk)",
            )
    classes, indexes = number_labels(labels)
    if known and set(classes) <= set(known):  # keeps the order of the data set
        place: dict[str | None, int] = {name: number for number, name in enumerate(known)}
        classes, indexes = known, np.array([place.get(label, -1) for label in labels], np.int32)
    titles = [_title(path, where) for path in files]
    counts = [len(table.labels) for table in tables]
    names = Names.of([f"{title}/{row}" for title, count in zip(titles, counts, strict=True) for row in range(count)])
    places = [(p, g, t.image) for p, t in zip(files, tables, strict=True) for g in range(len(t.rows))]
    sizes = [size for table in tables for size in table.sizes]
    ends = np.cumsum([rows for table in tables for rows in table.rows])
    groups = RowGroups(places, sizes)
    return ParquetImages(
        where, Path(where), names, classes, indexes, groups, ends, np.array(sizes, np.int64), notes=tuple(notes)
    )


def _name(label: Any, names: Sequence[str] | None) -> str | None:
    if label is None or (isinstance(label, int) and label < 0):
        return None
    if names and isinstance(label, int):
        return names[label] if label < len(names) else None
    return str(label)


def _title(path: str, where: str) -> str:
    """Return the name of a file in the folder that the user named; its path if there are several files or folders."""
    if path == where:
        return os.path.basename(path)
    return os.path.relpath(path, where) if os.path.isdir(where) else path.removeprefix(where.rstrip("/") + "/")


def _list_file(path: str) -> _Table:
    """Read the columns, row groups and labels of a file, but no image.

    Raises:
        DinoError: If it is corrupt, or has no column of images.
    """
    try:
        file = _open(path)
        schema = _schema(file)
        if schema is None:
            raise DinoError(f"{path} has no rows", "remove it, or write it again")
        image, label = _image_column(path, schema), next((name for name in _LABEL if name in schema.names), None)
        if _is_parquet_file(file):
            groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
            leaf = next(i for i in range(file.metadata.num_columns) if file.metadata.schema.column(i).path == image)
            rows, sizes = [g.num_rows for g in groups], [g.column(leaf).total_uncompressed_size for g in groups]
            counted = [g.column(leaf).statistics for g in groups]
            empty = sum(s.null_count or 0 for s in counted if s)
            labels = file.read(columns=[label], use_threads=False)[label].to_pylist() if label else []
        else:
            rows, sizes = [batch.num_rows for batch in file], [batch.nbytes for batch in file]
            empty = sum(_column_of(batch, image).null_count for batch in file)
            labels = [value for batch in file for value in batch[label].to_pylist()] if label else []
    except (OSError, ValueError) as error:
        said = reason_of(error)
        raise DinoError(f"{path} cannot be read: {said}", "copy or download it again") from error
    if path.lower().endswith(PARQUET) and max(sizes, default=0) > _LARGEST:
        name = os.path.basename(path)
        raise DinoError(
            f"{path} has a row group of {max(sizes) / 1e9:.1f} GB, which every worker would hold; expected up to 1 GB",
            f"write it again in smaller groups: pyarrow.parquet.write_table(table, {name!r}, row_group_size=100)",
        )
    return _Table(image, rows, sizes, labels or [None] * sum(rows), _class_names(schema, label), empty)


def _open(path: str) -> Any:
    """Open a Parquet file, or return the record batches of an Arrow file, mapped into memory."""
    pyarrow = _pyarrow()
    if is_remote(path):
        remote = RemoteFile(path, _BLOCK, held=0)  # all files of a set stay open
        return pyarrow.parquet.ParquetFile(remote, pre_buffer=False, page_checksum_verification=True)
    if path.lower().endswith(PARQUET):
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    mapped = pyarrow.memory_map(path)
    try:
        file = pyarrow.ipc.open_file(mapped)
    except pyarrow.ArrowInvalid:  # `save_to_disk` writes streams
        return list(pyarrow.ipc.open_stream(pyarrow.memory_map(path)))
    return [file.get_batch(i) for i in range(file.num_record_batches)]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DinoError(
            "Parquet and Arrow files need the package pyarrow, which is not installed", "pip install 'dinocli[parquet]'"
        ) from error
    return pyarrow


def _is_parquet_file(file: Any) -> bool:
    return not isinstance(file, list)


def _schema(file: Any) -> Any:
    """Return the schema of a file, or None if it has no record batch."""
    return file.schema_arrow if _is_parquet_file(file) else file[0].schema if file else None


def _read_group(file: Any, number: int, column: str) -> Any:
    if not _is_parquet_file(file):
        return _column_of(file[number], column)
    # Without threads: a forked worker has none of the threads that this process started.
    table = file.read_row_group(number, columns=[column], use_threads=False)
    return _column_of(table.combine_chunks().to_batches()[0], column)


def _column_of(batch: Any, column: str) -> Any:
    name, _, inner = column.partition(".")
    values = batch[name]
    # `field` would ignore rows whose whole struct is null.
    return values.flatten()[values.type.get_field_index(inner)] if inner else values


def _image_column(path: str, schema: Any) -> str:
    """Return the column of image bytes: `image.bytes` of a struct, or a binary column.

    Raises:
        DinoError: If there is none.
    """
    types = _pyarrow().types
    found: dict[str, str] = {}
    for field in schema:
        if types.is_struct(field.type) and any(
            field.type.field(i).name == "bytes" for i in range(field.type.num_fields)
        ):
            found[field.name] = f"{field.name}.bytes"
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            found[field.name] = field.name
    chosen = next((found[name] for name in _IMAGE if name in found), None) or next(iter(found.values()), None)
    if chosen is None:
        raise DinoError(
            f"{path} has no column of images; its columns are {', '.join(schema.names)[:300]}",
            "name a file with a column `image` of bytes, or of a struct with `bytes`",
        )
    return chosen


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Return the class names that Hugging Face's library stores in the metadata of a schema."""
    try:
        return list(json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"])
    except (TypeError, LookupError, ValueError):
        return None
