"""Features in the forms of other tools: Parquet, CSV, and a NumPy matrix with a table of its rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dinocli.core.atomic import atomic
from dinocli.core.errors import DinoError
from dinocli.core.tables import write_table
from dinocli.core.version import __version__
from dinocli.data.views.crops import resize_for
from dinocli.features.store import Features

TableFormat = Literal["parquet", "csv", "npy"]
# Endings of the files of each format. The first holds the features.
FILES: dict[TableFormat, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv", ".json"),
    "npy": (".npy", ".rows.csv", ".json"),
}
_COLUMNS = ("path", "label", "class", "split")
_BLOCK_BYTES = 32 * 2**20  # features in memory at a time, and a row group of Parquet

Report = Callable[[int], None]


def write_tabular(
    features: Features, split: str, folder: Path, to: TableFormat, report: Report = lambda images: None
) -> list[Path]:
    """Write the features of a split for other tools, block by block. The files appear only if all are complete.

    Each image has its path, label, class name and split; an unlabelled image has empty labels. Random views are not
    written. The origin of the features is JSON: in Parquet's schema under the key `dinocli`, else in a file beside.

    Args:
        features: Features of S images.
        split: Name of the split, which also names the files.
        folder: Output folder.
        to: `parquet`: a column `feature` of lists of fixed size. `csv`: columns `f0` to `fD-1`. `npy`: the matrix
            [S, ...], and a CSV file of the other columns.
        report: Callback that receives the number of finished images.

    Returns:
        The written files; the first holds the features.

    Raises:
        DinoError: If pyarrow is missing, or the features do not fit the format.
        OSError: If the disk is full or the folder is not writable.
    """
    check_format(to, features.provenance.tokens)
    paths = [folder / f"{split}{ending}" for ending in FILES[to]]
    about = json.dumps(_describe(features), indent=2)
    with ExitStack() as stack:
        drafts = [stack.enter_context(atomic(path)) for path in paths]
        if to == "parquet":
            _write_parquet(features, split, drafts[0], about, report)
        elif to == "csv":
            names = [f"f{i}" for i in range(features.values.shape[1])]
            write_table(drafts[0], [*_COLUMNS, *names], _list_wide_rows(features, split, report))
        else:
            _write_matrix(features, drafts[0], report)
            write_table(drafts[1], _COLUMNS, (_as_text(row, split) for row in features.rows()))
        if to != "parquet":
            drafts[-1].write_text(about + "\n", encoding="utf-8")
    return paths


def check_format(to: TableFormat, tokens: str) -> None:
    """Check that features can be written in a format, before they are computed.

    Raises:
        DinoError: If pyarrow is missing, or the features are patch tokens, which CSV does not hold.
    """
    if to == "parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            hint = "pip install 'dinocli[parquet]', or use --to csv"
            raise DinoError("--to parquet needs the package pyarrow, which is not installed", hint) from error
    if to == "csv" and tokens == "patches":
        raise DinoError(
            "--to csv holds one feature vector per image; these features are patch tokens",
            "use --to parquet or --to npy, or extract with --tokens cls",
        )


def _describe(features: Features) -> dict[str, Any]:
    """Return the origin and the settings of features, as JSON holds them."""
    return {
        "dinocli": __version__,
        **vars(features.provenance),
        "resize": resize_for(features.provenance.size),  # short side in pixels before the center crop of `size`
        "shape": list(features.values.shape),
        "dtype": features.values.dtype.name,
        "classes": features.classes,
        "skipped": features.skipped,
    }


def _list_blocks(features: Features, report: Report) -> Iterator[NDArray[Any]]:
    """Yield the features in blocks of bounded size, in their stored type, and report each when it is used."""
    values = features.values
    width = max(1, values.dtype.itemsize * int(np.prod(values.shape[1:])))
    step = max(1, _BLOCK_BYTES // width)
    for first in range(0, len(values), step):
        block = np.ascontiguousarray(values[first : first + step], values.dtype)
        yield block
        report(first + len(block))


def _list_wide_rows(features: Features, split: str, report: Report) -> Iterator[Sequence[str]]:
    rows = features.rows()
    for block in _list_blocks(features, report):
        # numpy's shortest text that reads back as the same number.
        for numbers in block.astype(str).tolist():
            yield [*_as_text(next(rows), split), *numbers]


def _as_text(row: tuple[str, int | None, str | None], split: str) -> list[str]:
    return ["" if value is None else str(value) for value in (*row, split)]


def _write_matrix(features: Features, draft: Path, report: Report) -> None:
    values = features.values
    with draft.open("wb") as file:
        about = {"descr": values.dtype.str, "fortran_order": False, "shape": values.shape}
        np.lib.format.write_array_header_1_0(file, about)
        for block in _list_blocks(features, report):
            file.write(block.data)


def _write_parquet(features: Features, split: str, draft: Path, about: str, report: Report) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    feature = pa.from_numpy_dtype(features.values.dtype)
    for size in reversed(features.values.shape[1:]):
        feature = pa.list_(feature, size)
    columns = {"path": pa.string(), "label": pa.int64(), "class": pa.string(), "split": pa.string(), "feature": feature}
    schema = pa.schema(list(columns.items()), {"dinocli": about})
    rows = features.rows()
    # Dictionaries of floats only cost time: hardly any two are equal.
    with pq.ParquetWriter(draft, schema, compression="zstd", use_dictionary=["class", "split"]) as writer:
        for block in _list_blocks(features, report):
            paths, labels, classes = zip(*islice(rows, len(block)), strict=True)
            cells = pa.array(block.ravel())
            for size in reversed(block.shape[1:]):
                cells = pa.FixedSizeListArray.from_arrays(cells, size)
            texts = (pa.array(map(_to_unicode, names), pa.string()) for names in (paths, classes, [split] * len(block)))
            path, kind, part = texts
            writer.write_batch(pa.record_batch([path, pa.array(labels, pa.int64()), kind, part, cells], schema=schema))


def _to_unicode(name: str | None) -> str | None:
    r"""Write bytes of a file name that are not UTF-8 as `\xff`, because Parquet holds valid text only."""
    return name and name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
