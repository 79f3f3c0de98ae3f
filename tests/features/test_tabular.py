from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import write_stored

from dinocli.core.errors import DinoError
from dinocli.core.version import __version__
from dinocli.features import tabular
from dinocli.features.store import Features, Provenance, read_features
from dinocli.features.tabular import FILES, TableFormat, check_format, write_tabular
from dinocli.features.writer import write_features

PROVENANCE = Provenance("ckpt.safetensors", "0123456789abcdef", "cls", 1, 224, "data", step=7)
NAMES = ["b/ünïcode 0.png", 'a/"quoted", 1.png', "2.png"]
LABELS, CLASSES = [1, 0, -1], ["a", "b"]
VALUES = np.array([[0.1, -1e-7, 3], [1 / 3, 65000, 0], [5e-8, 2, 1]], np.float32)


def stored(folder: Path, dtype: str = "float32", values: np.ndarray = VALUES, **changed: object) -> Features:
    """Features of three images in two batches: one of each class, and one without a label."""
    place = folder / "val.safetensors"
    with write_features(place, replace(PROVENANCE, **changed), CLASSES, dtype=dtype) as writer:
        for rows in (slice(0, 2), slice(2, 3)):
            writer.append(values[rows], LABELS[rows], NAMES[rows])
        writer.skipped["bad.png"] = "no image"
    return read_features(place)


def check_origin(about: dict[str, object], dtype: str) -> None:
    assert about["dinocli"] == __version__
    assert (about["fingerprint"], about["step"], about["size"], about["resize"]) == ("0123456789abcdef", 7, 224, 256)
    assert (about["shape"], about["dtype"]) == ([3, 3], dtype)
    assert (about["classes"], about["skipped"]) == (CLASSES, {"bad.png": "no image"})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [1, 2**20], ids=["rows", "whole"])
def test_csv_reads_back_as_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int
) -> None:
    monkeypatch.setattr(tabular, "_BLOCK_BYTES", block)
    done: list[int] = []
    table, about = write_tabular(stored(tmp_path, dtype), "val", tmp_path / "out", "csv", done.append)
    with table.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["path", "label", "class", "split", "f0", "f1", "f2"]
    assert [row[:4] for row in rows] == [
        [NAMES[0], "1", "b", "val"],
        [NAMES[1], "0", "a", "val"],
        [NAMES[2], "", "", "val"],
    ]
    assert np.array_equal(np.array([row[4:] for row in rows]).astype(dtype), VALUES.astype(dtype))
    assert done == ([1, 2, 3] if block == 1 else [3])
    check_origin(json.loads(about.read_text()), dtype)


@pytest.mark.parametrize("shape", [(3,), (5, 3)], ids=["images", "patches"])
def test_numpy_loads_the_matrix_and_its_rows_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(tabular, "_BLOCK_BYTES", 20)
    values = np.arange(3 * np.prod(shape), dtype=np.float32).reshape(3, *shape)
    features = stored(tmp_path, "float16", values, tokens="patches" if len(shape) == 2 else "cls")
    matrix, rows, about = write_tabular(features, "val", tmp_path, "npy")
    loaded = np.load(matrix)
    assert loaded.dtype == np.float16 and np.array_equal(loaded, values)
    assert rows.read_text(encoding="utf-8").splitlines()[1:] == [
        f"{NAMES[0]},1,b,val",
        '"a/""quoted"", 1.png",0,a,val',
        "2.png,,,val",
    ]
    assert json.loads(about.read_text())["shape"] == [3, *shape]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("block", [1, 2**20], ids=["rows", "whole"])
def test_parquet_holds_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, block: int) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(tabular, "_BLOCK_BYTES", block)
    (path,) = write_tabular(stored(tmp_path, dtype), "val", tmp_path, "parquet")
    table = pq.read_table(path)
    assert table.schema.field("feature").type == pa.list_(pa.from_numpy_dtype(dtype), 3)
    assert table["path"].to_pylist() == NAMES
    assert (table["label"].to_pylist(), table["class"].to_pylist()) == ([1, 0, None], ["b", "a", None])
    assert table["split"].to_pylist() == ["val"] * 3
    assert np.array_equal(np.array(table["feature"].to_pylist(), dtype), VALUES.astype(dtype))
    assert pq.ParquetFile(path).num_row_groups == (3 if block == 1 else 1)
    check_origin(json.loads(table.schema.metadata[b"dinocli"]), dtype)


def test_parquet_nests_patch_tokens_and_holds_any_file_name(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    values = np.arange(30, dtype=np.float32).reshape(3, 5, 2)
    features = replace(
        stored(tmp_path, values=values, tokens="patches"),
        paths=[b"\xff.png".decode("utf-8", "surrogateescape"), "1", "2"],
    )
    (path,) = write_tabular(features, "val", tmp_path, "parquet")
    table = pq.read_table(path)
    assert np.array_equal(table["feature"].to_pylist(), values)
    assert table["path"][0].as_py() == "\\xff.png"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_other_tools_read_parquet(tmp_path: Path, reader: str, dtype: str) -> None:
    pytest.importorskip("pyarrow")
    tool = pytest.importorskip(reader)
    (path,) = write_tabular(stored(tmp_path, dtype), "val", tmp_path, "parquet")
    if reader == "duckdb":
        columns = ["path", "class", "feature"]
        names, classes, rows = zip(*tool.sql(f"select {', '.join(columns)} from '{path}'").fetchall(), strict=True)
    else:
        table = tool.read_parquet(path)
        names, classes, rows = list(table["path"]), list(table["class"]), list(table["feature"])
    assert list(names) == NAMES
    assert [kind if isinstance(kind, str) else None for kind in classes] == ["b", "a", None]
    assert np.array_equal(np.array([list(row) for row in rows], dtype), VALUES.astype(dtype))


@pytest.mark.slow
def test_embedding_atlas_draws_the_features_of_a_parquet_file(tmp_path: Path) -> None:
    """Its own command makes a page; the file that the page reads has all rows, and a place for each."""
    pytest.importorskip("embedding_atlas")
    pq = pytest.importorskip("pyarrow.parquet")
    values = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    with write_features(tmp_path / "val.safetensors", PROVENANCE, ["a"], dtype="float32") as writer:
        writer.append(values, [0] * 60, [f"{i}.png" for i in range(60)])
    (path,) = write_tabular(read_features(tmp_path / "val.safetensors"), "val", tmp_path, "parquet")
    command = [str(Path(sys.executable).parent / "embedding-atlas"), str(path), "--vector", "feature"]
    subprocess.run([*command, "--export-application", str(tmp_path / "page.zip")], check=True, timeout=300)
    with zipfile.ZipFile(tmp_path / "page.zip") as page:
        page.extract("data/dataset.parquet", tmp_path)
    table = pq.read_table(tmp_path / "data" / "dataset.parquet")
    assert table["path"].to_pylist() == [f"{i}.png" for i in range(60)]
    places = np.column_stack([table["projection_x"].to_numpy(), table["projection_y"].to_numpy()])
    assert np.isfinite(places).all() and len(np.unique(places, axis=0)) == 60


# As in the docs. Vectors travel as JSON, which holds float32 exactly.
OPEN_IN_FIFTYONE = """
import json, sys
import fiftyone, pandas

dataset = fiftyone.Dataset("features")
for row in pandas.read_parquet(sys.argv[1]).itertuples():
    sample = fiftyone.Sample(filepath=sys.argv[2] + "/" + row.path, tags=[row.split], feature=row.feature)
    if pandas.notna(row[3]):
        sample["class"] = fiftyone.Classification(label=row[3])
    dataset.add_sample(sample)
assert isinstance(dataset.get_field("feature"), fiftyone.VectorField)
found = {key: dataset.values(key) for key in ("filepath", "tags", "class.label")}
found["feature"] = [vector.tolist() for vector in dataset.values("feature")]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fiftyone_opens_the_rows_of_a_parquet_file_as_samples(tmp_path: Path, dtype: str) -> None:
    """FiftyOne starts its own MongoDB server, in a process of its own, and holds the paths, classes and vectors."""
    found = find_spec("fiftyone")  # importing it would start its server in this process
    if found is None or found.origin is None:
        pytest.skip("the package fiftyone is not installed")
    pytest.importorskip("pyarrow")
    server = Path(found.origin).parent / "db" / "bin" / "mongod"
    if not server.exists() or subprocess.run([server, "--version"], capture_output=True).returncode:
        pytest.skip(f"{server}, the server of the package fiftyone, does not run on this machine")
    (path,) = write_tabular(stored(tmp_path, dtype), "val", tmp_path, "parquet")
    environment = os.environ | {
        "HOME": str(tmp_path),
        "FIFTYONE_DATABASE_DIR": str(tmp_path / "database"),
        "FIFTYONE_DATABASE_VALIDATION": "false",  # no message about the server's age
        "FIFTYONE_DO_NOT_TRACK": "true",
    }
    command = [sys.executable, "-c", OPEN_IN_FIFTYONE, str(path), "/photos"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    samples = json.loads(ran.stdout.splitlines()[-1])
    assert samples["filepath"] == [f"/photos/{name}" for name in NAMES]
    assert samples["tags"] == [["val"]] * 3
    assert samples["class.label"] == ["b", "a", None]
    assert np.array_equal(np.array(samples["feature"], dtype), VALUES.astype(dtype))


def test_pandas_gets_features_from_python(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = stored(tmp_path).to_pandas()
    assert list(table) == ["path", "label", "class", "split", "feature"]
    assert (list(table["path"]), set(table["split"])) == (NAMES, {"val"})
    assert table["label"].tolist()[:2] == [1, 0] and table["label"].isna().tolist() == [False, False, True]
    assert table["label"].dtype == pandas.Int64Dtype()
    assert table["class"].isna().tolist() == [False, False, True]
    assert np.array_equal(np.stack(table["feature"]), VALUES)


@pytest.mark.parametrize(
    ("package", "hint"),
    [("pandas", "pip install pandas"), ("pyarrow", "pip install 'dinocli[parquet]', or use --to csv")],
)
def test_a_missing_package_is_one_error_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, hint: str
) -> None:
    features = stored(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DinoError, match=package) as error:
        features.to_pandas() if package == "pandas" else write_tabular(features, "val", tmp_path / "new", "parquet")
    assert error.value.hint == hint
    assert not (tmp_path / "new").exists()


def test_csv_refuses_patch_tokens_before_they_are_computed() -> None:
    with pytest.raises(DinoError, match="these features are patch tokens") as error:
        check_format("csv", "patches")
    assert "--to npy" in error.value.hint
    check_format("npy", "patches")
    check_format("csv", "cls+avg")


@pytest.mark.parametrize("to", ["csv", "npy", "parquet"])
def test_a_failure_leaves_the_earlier_files(tmp_path: Path, to: TableFormat) -> None:
    if to == "parquet":
        pytest.importorskip("pyarrow")
    features = stored(tmp_path)
    before = {path: path.read_bytes() for path in write_tabular(features, "val", tmp_path / "out", to)}
    assert [path.name for path in before] == [f"val{ending}" for ending in FILES[to]]

    def stop(images: int) -> None:
        raise KeyboardInterrupt

    other = replace(features, labels=np.array([0, 0, 0]), paths=["x", "y", "z"])
    with pytest.raises(KeyboardInterrupt):
        write_tabular(other, "val", tmp_path / "out", to, stop)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_unnamed_classes_and_several_shards_are_written(tmp_path: Path) -> None:
    """Unlabelled images have neither label nor class, and shards are read as one table."""
    write_stored(tmp_path, "data", {"all": ["a.png", "b.png"]})
    features = read_features(tmp_path / "all.safetensors")
    table, _ = write_tabular(features, "all", tmp_path, "csv")
    assert table.read_text().splitlines() == [
        "path,label,class,split,f0,f1",
        "a.png,,,all,0.0,0.0",
        "b.png,,,all,1.0,1.0",
    ]
    with write_features(tmp_path / "many.safetensors", PROVENANCE, [], shard_bytes=1) as writer:
        for i in range(3):
            writer.append(VALUES[i : i + 1], [-1], [NAMES[i]])
    matrix, *_ = write_tabular(read_features(tmp_path / "many"), "many", tmp_path, "npy")
    assert np.array_equal(np.load(matrix), VALUES)
