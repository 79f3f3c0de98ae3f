from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.decode.image import decode
from dinocli.data.images import ImagesConfig
from dinocli.data.loader.mixture import epoch_order
from dinocli.data.sources import parquet
from dinocli.data.sources.open import open_images, splits
from dinocli.data.sources.outputs import marked
from dinocli.data.sources.parquet import is_parquet, open_parquet
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.several import open_sources

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(
    images: list[Any], labels: list[Any] | None = None, names: list[str] | None = None, kind: Any = STRUCT
) -> Any:
    """A table in the form of Hugging Face's `datasets`, which stores class names in the metadata of the schema."""
    columns = {"image": pa.array(images, kind)} | ({"label": pa.array(labels)} if labels is not None else {})
    features = {"image": {"_type": "Image"}} | ({"label": {"names": names, "_type": "ClassLabel"}} if names else {})
    made = pa.table(columns)
    return made.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    )


def rows(*contents: bytes | None) -> list[Any]:
    return [{"bytes": content, "path": f"/elsewhere/{i}.jpg"} for i, content in enumerate(contents)]


def parquet_file(path: Path, made: Any, group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=group, write_page_checksum=True)
    return path


def arrow_file(path: Path, made: Any, stream: bool = False) -> Path:
    with (
        pa.OSFile(str(path), "wb") as sink,
        (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, made.schema) as out,
    ):
        for batch in made.to_batches(max_chunksize=2):
            out.write_batch(batch)
    return path


CONTENTS = [bytes([i]) * (i + 1) for i in range(5)]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_images_and_labels_of_each_kind_of_file(tmp_path: Path, kind: str) -> None:
    made = table(rows(*CONTENTS), [1, 0, None, -1, 1], ["dog", "cat"])
    path = (
        parquet_file(tmp_path / "x.parquet", made)
        if kind == "parquet"
        else arrow_file(tmp_path / "x.arrow", made, kind == "stream")
    )
    source = open_images(str(path))
    assert [source.read(i) for i in (4, 0, 3, 1, 2)] == [CONTENTS[i] for i in (4, 0, 3, 1, 2)]
    assert (source.classes, source.labels.tolist()) == (["dog", "cat"], [1, 0, -1, -1, 1])
    assert source.names[3] == f"{path.name}/3"
    again = pickle.loads(pickle.dumps(source.groups))
    assert again[2][0].as_py() == CONTENTS[4]


def test_plain_bytes_and_labels_as_text(tmp_path: Path) -> None:
    made = table(CONTENTS[:2], ["north", None], kind=pa.binary()).rename_columns(["photo", "label"])
    source = open_images(str(parquet_file(tmp_path / "x.parquet", made)))
    assert (source.read(1), source.classes, source.labels.tolist()) == (CONTENTS[1], ["north"], [0, -1])


def test_class_names_are_mapped_by_name_over_files(tmp_path: Path) -> None:
    """`load_dataset` takes the first file's names for all files, even if their orders differ."""
    parquet_file(tmp_path / "0.parquet", table(rows(b"a", b"b"), [0, 1], ["cat", "dog"]))
    parquet_file(tmp_path / "1.parquet", table(rows(b"c", b"d"), [0, 1], ["dog", "cat"]))
    parquet_file(tmp_path / "2.parquet", table(rows(b"e"), [1]))  # a round trip through pandas drops the names
    source = open_images(str(tmp_path))
    assert [source.classes[label] for label in source.labels] == ["cat", "dog", "dog", "cat", "dog"]
    assert [note for note in source.notes if "2.parquet states no class names" in note]


def test_rows_without_bytes_are_named(tmp_path: Path) -> None:
    source = open_images(str(parquet_file(tmp_path / "x.parquet", table([*rows(b"a", None), None]))))
    assert source.notes == ("2 of 3 rows have no bytes, only a path, which is not followed",)
    assert source.read(0) == b"a"
    for row in (1, 2):
        with pytest.raises(Refused, match="no bytes: the row names a path only"):
            source.read(row)
    with pytest.raises(DinoError, match="its rows have only paths") as error:
        open_images(str(parquet_file(tmp_path / "y.parquet", table(rows(None, None)))))
    assert "save_to_disk" in error.value.hint


def test_a_path_is_not_followed_even_if_its_file_is_there(tmp_path: Path) -> None:
    """`to_parquet` of an imagefolder stores absolute paths without bytes: on another machine, those of other files."""
    write_images(tmp_path / "photos", 1)
    cells = [{"bytes": None, "path": str(tmp_path / "photos" / "0000.png")}, *rows(b"b")]
    source = open_images(str(parquet_file(tmp_path / "x.parquet", table(cells))))
    assert source.read(1) == b"b"
    with pytest.raises(Refused, match="no bytes: the row names a path only, which is not followed"):
        source.read(0)


def test_sixteen_bits_of_an_image_in_a_row_keep_their_values(tmp_path: Path) -> None:
    """The `Image` feature of `datasets` would decode them modulo 256."""
    tiff = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 2**16, (16, 24, 3), dtype=np.uint16)
    file = io.BytesIO()
    tiff.imwrite(file, values, photometric="rgb")
    source = open_images(str(parquet_file(tmp_path / "x.parquet", table(rows(file.getvalue())))))
    np.testing.assert_allclose(decode(source.read(0)), values / 65535 * 255, atol=0.51)


def test_a_corrupt_row_group_is_one_line_and_spares_the_others(tmp_path: Path) -> None:
    contents = [np.random.default_rng(i).bytes(1000) for i in range(6)]
    path = tmp_path / "x.parquet"
    # Statistics would hold some contents a second time.
    pq.write_table(table(rows(*contents)), path, row_group_size=2, write_page_checksum=True, write_statistics=False)
    data = bytearray(path.read_bytes())
    data[data.index(contents[2][500:520])] ^= 255
    path.write_bytes(data)
    source = open_images(str(path))
    with pytest.raises(Refused, match=r"damaged: row group 1 of .*x\.parquet: [^\n]*$"):
        source.read(2)
    assert (source.read(1), source.read(4)) == (contents[1], contents[4])
    path.write_bytes(data[:100])
    with pytest.raises(DinoError, match=r"x\.parquet cannot be read: ") as error:
        open_images(str(path))
    assert "\n" not in error.value.message


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet_file(tmp_path / "x.parquet", table(rows(bytes(2000))))
    with pytest.raises(Refused, match=r"too large: 0\.002 megabytes, over 0\.001"):
        open_images(str(path)).read(0, ImagesConfig(max_megabytes=0.001))
    monkeypatch.setattr(parquet, "_LARGEST", 100)
    with pytest.raises(DinoError, match="has a row group of") as error:
        open_images(str(path))
    assert "row_group_size=100" in error.value.hint


def test_a_file_without_images(tmp_path: Path) -> None:
    path = parquet_file(tmp_path / "x.parquet", pa.table({"text": ["a"], "number": [1]}))
    with pytest.raises(DinoError, match="has no column of images; its columns are text, number"):
        open_images(str(path))


def test_memory_of_row_groups_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_KEPT", 5000)
    contents = [np.random.default_rng(i).bytes(1000) for i in range(20)]
    source = open_parquet(str(parquet_file(tmp_path / "x.parquet", table(rows(*contents)))))
    assert [source.read(i) for i in (*range(20), 3)] == [*contents, contents[3]]
    assert sum(source.sizes[group] for group in source.groups._kept) <= 5000
    ends, together = source.blocks
    assert (ends.tolist(), together) == (list(range(2, 21, 2)), 1)


def test_an_epoch_reads_each_row_group_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_KEPT", 50_000)  # four groups
    counts = {"a": 60, "b": 40}
    for seed, (name, count) in enumerate(counts.items()):
        contents = [np.random.default_rng((seed, i)).bytes(1000) for i in range(count)]
        parquet_file(tmp_path / f"{name}.parquet", table(rows(*contents)), group=10)
    write_images(tmp_path / "c", 30)
    a, b, c = (str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c"))
    reads = list[str]()
    read = parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda *of: reads.append("") or read(*of))

    def reads_of(source: Any) -> int:
        reads.clear()
        for row in epoch_order(len(source), source.mixture, 0, 0, source.blocks)[0].tolist():
            source.read(row)
        return len(reads)

    assert reads_of(open_sources([a])) == 6
    assert reads_of(open_sources([a, b])) == 10
    assert reads_of(open_sources([a, c, b])) == 10
    assert reads_of(open_sources([a]).take(np.arange(0, 60, 2))) == 6
    assert reads_of(open_sources([f"{a}:0.6", f"{b}:0.2", f"{c}:0.2"])) <= 6 * 2 + 4  # 78 draws of a's 60 images


def test_taken_images_keep_the_runs_that_their_order_allows(tmp_path: Path) -> None:
    source = open_parquet(str(parquet_file(tmp_path / "x.parquet", table(rows(*CONTENTS)))))  # groups of 2, 2 and 1
    blocks = source.take(np.array([0, 2, 3, 3])).blocks
    assert blocks is not None
    assert blocks[0].tolist() == [1, 4]
    assert source.take(np.array([0, 2, 1])).blocks is None


def test_splits_by_file_names_and_folders(tmp_path: Path) -> None:
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/test-00000-of-00001.parquet",
    ):
        parquet_file(tmp_path / "a" / name, table(rows(name.encode()), [0], ["cat"]))
    found = splits(str(tmp_path / "a"))
    assert {split: len(part) for split, part in found.items()} == {"train": 2, "test": 1}
    assert found["test"].read(0).startswith(b"data/test")
    for name in ("train", "validation"):
        parquet_file(tmp_path / "b" / name / "data-00000-of-00001.parquet", table(rows(b"x")))
    assert set(splits(str(tmp_path / "b"))) == {"train", "val"}
    parquet_file(tmp_path / "c" / "part-0.parquet", table(rows(b"x")))
    assert set(splits(str(tmp_path / "c"))) == {"all"}


def test_a_folder_with_images_is_a_folder_of_images(tmp_path: Path) -> None:
    parquet_file(tmp_path / "embeddings.parquet", table(rows(b"x")))
    assert is_parquet(str(tmp_path))
    write_images(tmp_path / "deep", 1)
    assert not is_parquet(str(tmp_path))
    assert len(open_images(str(tmp_path))) == 1


def test_outputs_and_junk_beside_the_files_are_neither_images_nor_rows(tmp_path: Path) -> None:
    parquet_file(tmp_path / "data.parquet", table(rows(b"x")))
    with marked(tmp_path / "runs" / "a", "pretrain"):
        write_images(tmp_path / "runs" / "a", 1)
        parquet_file(tmp_path / "runs" / "a" / "all.parquet", table(rows(b"y", b"z")))
    write_images(tmp_path / "__MACOSX", 1)
    source = open_images(str(tmp_path))
    assert (list(source.names), source.read(0)) == (["data.parquet/0"], b"x")


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "1.2.840.1"])
def test_a_table_of_features_beside_arrays_is_no_set_of_images(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with marked(tmp_path / "features", "extract"):
        parquet_file(tmp_path / "features" / "all.parquet", pa.table({"path": ["x"], "feature": [[0.5]]}))
    assert not is_parquet(str(tmp_path))
    parquet_file(tmp_path / "own.parquet", pa.table({"path": ["x"], "feature": [[0.5]]}))
    assert not is_parquet(str(tmp_path)), "it has no column of images"
    parquet_file(tmp_path / "data.parquet", table(rows(b"x")))
    assert is_parquet(str(tmp_path))


def test_several_files_are_one_source_that_keeps_few_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, names in (("x", ["cat", "dog"]), ("y", ["dog", "cat"])):
        parquet_file(tmp_path / "data" / f"{name}.parquet", table(rows(*CONTENTS), [0, 1, 0, 1, 0], names))
    source = open_sources(["data/*.parquet"])
    assert isinstance(source, parquet.ParquetImages)
    assert source.names[4:6] == ["data/x.parquet/4", "data/y.parquet/0"]
    assert [source.classes[label] for label in source.labels.tolist()] == ["cat", "dog"] * 2 + ["cat"] + [
        "dog", "cat", "dog", "cat", "dog",
    ]  # fmt: skip
    assert [source.read(i) for i in range(10)] == CONTENTS * 2
    assert open_sources(["data/y.parquet", "data/x.parquet"]).fingerprint != source.fingerprint
