from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dinocli.core.errors import DinoError
from dinocli.data.sources.lists import read_list
from dinocli.data.sources.open import open_images, open_source, photos, splits

FILES = ("a/x.jpg", "a/y.jpg", "a/z w.jpg")
BOTH = [("a/x.jpg", "cat"), ("a/y.jpg", "dog")]
MARK = "\ufeff"


def written(folder: Path, name: str, text: str | bytes, files: tuple[str, ...] = FILES) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", f"{MARK}path,label\r\na/x.jpg,cat\r\na/y.jpg,dog\r\n"),
        ("l.csv", "Label;FileName\ncat;a/x.jpg\ndog;a/y.jpg\n"),
        ("l.csv", "path\tlabel\na/x.jpg\tcat\na/y.jpg\tdog\n"),
        ("l.csv", "sep=;\npath;label\na/x.jpg;cat\na/y.jpg;dog\n"),
        ("l.csv", f"{MARK}path,label\r\na/x.jpg,cat\r\na/y.jpg,dog\r\n".encode("utf-16-le")),
        ("l.csv", "path;label\na/x.jpg;cat\na/y.jpg;dog\n".encode("utf-16")),
        ("l.txt", "path\tlabel\r\na/x.jpg\tcat\r\na/y.jpg\tdog\r\n".encode("utf-16-be")),
        ("l.csv", " path , label \n a/x.jpg , cat \n a/y.jpg , dog \n"),
        ("l.csv", '"path","label"\n"a/x.jpg","cat"\n"a/y.jpg","dog"\n'),
        ("l.csv", "path,label\na\\x.jpg,cat\na\\y.jpg,dog\n"),
        ("l.csv", "path,label\ra/x.jpg,cat\ra/y.jpg,dog\r"),
        ("l.csv", "Image Path,id,Class Name\na/x.jpg,7,cat\na/y.jpg,8,dog\n"),
        ("l.csv", ",label,path\n0,cat,a/x.jpg\n1,dog,a/y.jpg\n"),
        ("l.csv", "path,label\na/x.jpg,cat\na/y.jpg,dog\n,\n,\n"),
        ("l.csv", "cat,a/x.jpg\ndog,a/y.jpg\n"),
        ("l.tsv", "path,label\na/x.jpg,cat\na/y.jpg,dog\n"),
        ("l.txt", "a/x.jpg,cat\na/y.jpg,dog\n"),
        ("l.txt", "a/x.jpg, cat\na/y.jpg, dog\n"),
        ("l.txt", "  a/x.jpg cat \r\n\r\n  a/y.jpg dog \r\n"),
        ("l.txt", f"{MARK}a/x.jpg\tcat\na/y.jpg\tdog"),
        ("l.txt", '"a/x.jpg" cat\n"a/y.jpg" dog\n'),
        ("l.txt", "a\\x.jpg cat\r\na\\y.jpg dog\r\n"),
    ],
)
def test_lists_as_spreadsheets_write_them(tmp_path: Path, name: str, text: str | bytes) -> None:
    entries, notes, _ = read_list(written(tmp_path, name, text))
    assert [entry[:2] for entry in entries] == BOTH
    assert not notes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/z w.jpg\na/y.jpg\n", [("a/z w.jpg", ""), ("a/y.jpg", "")]),
        ("a/z w.jpg Lynx lynx\na/y.jpg 3\n", [("a/z w.jpg", "Lynx lynx"), ("a/y.jpg", "3")]),
        ("b,c.jpg\na/y.jpg\n", [("b,c.jpg", ""), ("a/y.jpg", "")]),
        ("# list\n00ff cat\n", [("00ff", "cat")]),
        ("back\\slash.jpg\n", [("back\\slash.jpg", "")]),
        ('quo"te.jpg\n', [('quo"te.jpg', "")]),
        (" space.jpg\n", [(" space.jpg", "")]),
    ],
)
def test_names_equal_the_files_on_disk(tmp_path: Path, text: str, expected: list[tuple[str, str]]) -> None:
    odd = ("b,c.jpg", "00ff", "back\\slash.jpg", 'quo"te.jpg', " space.jpg")
    assert [e[:2] for e in read_list(written(tmp_path, "l.txt", text, FILES + odd)).entries] == expected


def test_a_list_in_the_code_page_of_windows(tmp_path: Path) -> None:
    path = written(tmp_path, "l.csv", "path;label\nä.jpg;Bär\na/y.jpg;dog\n".encode("cp1252"), ("ä.jpg", "a/y.jpg"))
    assert read_list(path).entries[0][:2] == ("ä.jpg", "Bär")


def test_a_missing_label_is_named_and_the_others_stay(tmp_path: Path) -> None:
    path = written(tmp_path, "l.csv", "path,label\na/x.jpg,cat\na/y.jpg,\na/z w.jpg,dog\n,dog\n")
    source = open_source(str(path))
    assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [0, -1, 1])
    assert "1 of 3 images" in source.notes[1] and "row 3 (a/y.jpg)" in source.notes[1]
    assert "1 rows" in source.notes[0] and "row 5" in source.notes[0]
    source = open_source(str(written(tmp_path, "l.txt", "a/x.jpg\na/y.jpg\tcat\n")))
    assert (list(source.names), source.labels.tolist()) == (["a/x.jpg", "a/y.jpg"], [-1, 0])
    assert "row 1 (a/x.jpg)" in source.notes[0]


def test_columns_that_are_not_known_are_named(tmp_path: Path) -> None:
    with pytest.raises(DinoError, match="its columns are id, where_it_is, what") as error:
        read_list(written(tmp_path, "l.csv", "id,where_it_is,what\n1,a/x.jpg,cat\n"))
    assert "path,label" in error.value.hint
    _, notes, _ = read_list(written(tmp_path, "l.csv", "path,breed\na/x.jpg,cat\n"))
    assert "its other columns are breed" in notes[0]
    with pytest.raises(DinoError, match=r"first file .* does not exist: .*gone.jpg"):
        read_list(written(tmp_path, "l.csv", "gone.jpg,cat\na/x.jpg,dog\n"))
    with pytest.raises(DinoError, match="is empty"):
        read_list(written(tmp_path, "l.csv", "path,label\n"))


def test_an_image_that_a_list_repeats_counts_once(tmp_path: Path) -> None:
    rows = ["path,label", "a/x.jpg,cat", "./a/x.jpg,cat", "a/y.jpg,", f"{tmp_path}/a/y.jpg,dog", "a/z w.jpg,cat"]
    path = written(tmp_path, "l.csv", "\n".join(rows))
    source = open_source(str(path))
    assert list(source.names) == ["a/x.jpg", "a/y.jpg", "a/z w.jpg"]
    assert [source.classes[label] for label in source.labels] == ["cat", "dog", "cat"]
    assert f"2 rows of {path} name an image again: each image counts once" in source.notes
    assert not source.clash
    given = [path, tmp_path / "a" / "x.jpg", tmp_path / "a" / "y.jpg"]
    assert len(photos(given)) == 3, "also by its own name"


def test_two_labels_of_an_image_are_an_error_where_labels_count(tmp_path: Path) -> None:
    rows = ["path,label", "a/y.jpg,owl", "a/x.jpg,cat", "a/y.jpg,owl", "a/x.jpg,dog", "a/x.jpg,cat"]
    path = str(written(tmp_path, "l.csv", "\n".join(rows)))
    with pytest.raises(DinoError) as error:
        splits(path)
    assert error.value.message == (
        f"{path} gives a/x.jpg the labels cat (row 3) and dog (row 5); expected one label per image"
    )
    for source in (open_source(path), splits(path, several=True)["all"]):
        assert [source.classes[label] for label in source.labels] == ["owl", "cat;dog"]


def test_further_columns_are_kept(tmp_path: Path) -> None:
    for name, text in {
        "l.csv": "Camera,path,label,lens\nA,a/x.jpg,cat,35\n, a/y.jpg ,dog\n",
        "l.jsonl": '{"Camera": "A", "path": "a/x.jpg", "label": "cat", "lens": 35}\n\n'
        '{"label": "dog", "path": "a/y.jpg", "Camera": null}\n',
    }.items():
        entries, notes, columns = read_list(written(tmp_path, name, text))
        assert [entry[:2] for entry in entries] == BOTH
        assert (columns, [entry.more for entry in entries]) == (("Camera", "lens"), [("A", "35"), ("", "")])
        assert not notes
        source = open_source(str(tmp_path / name)).take(np.array([1, 0]))
        assert {key: list(values) for key, values in source.metadata.items()} == {
            "Camera": ["", "A"],
            "lens": ["", "35"],
        }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a/x.jpg"}\n[1]\n', r"line 2 of .*l\.jsonl is not a JSON object"),
        ('{"path": "a/x.jpg"\n', r"line 1 of .*l\.jsonl is not a JSON object"),
        ('{"id": 7, "text": "a"}\n', r"no key of .*l\.jsonl holds paths; its keys are id, text"),
        ('{"path": "gone.jpg"}\n', "the first file of .* does not exist"),
        ("\n", "is empty"),
    ],
)
def test_errors_of_json_lines(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DinoError, match=message):
        read_list(written(tmp_path, "l.jsonl", text))


def test_numbers_as_labels_of_json_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "l.jsonl", '{"image": "a/x.jpg", "label": 10}\n{"image": "a/y.jpg", "label": 9}\n')
    assert open_source(str(path)).classes == ["9", "10"]


def test_metadata_of_a_folder(tmp_path: Path) -> None:
    table = written(
        tmp_path, "metadata.csv", "file_name,label,site\na/y.jpg,dog,north\n./a/x.jpg,cat,south\na/no.jpg,cat,\n"
    )
    source = open_source(str(tmp_path))
    assert list(source.names) == list(FILES)  # an image without a row stays
    assert [source.classes[label] if label >= 0 else "" for label in source.labels] == ["cat", "dog", ""]
    assert list(source.metadata["site"]) == ["south", "north", ""]
    assert source.notes[-2:] == (
        f"1 images have no row in {table}, such as a/z w.jpg; they are read without labels",
        f"1 rows of {table} name no image of the folder, such as a/no.jpg",
    )


def test_metadata_without_labels_keeps_the_classes_of_folders(tmp_path: Path) -> None:
    written(tmp_path, "metadata.jsonl", '{"file_name": "a/x.jpg", "text": "a cat"}\n', FILES[:1])
    source = open_source(str(tmp_path))
    assert (source.classes, list(source.metadata["text"])) == (["a"], ["a cat"])
    (tmp_path / "metadata.jsonl").write_text("no table")
    source = open_source(str(tmp_path))
    assert (source.classes, source.metadata) == (["a"], {})
    assert "not using" in source.notes[-1]
    assert "is not a JSON object" in source.notes[-1]


@pytest.mark.parametrize("folder", ["", "train"])
def test_metadata_with_two_labels_of_an_image_is_refused(tmp_path: Path, folder: str) -> None:
    rows = "file_name,label\na/x.jpg,cat\na/y.jpg,cat\n./a/x.jpg,dog\n"
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    written(place, "metadata.csv", rows, FILES[:2])
    with pytest.raises(DinoError, match=r"gives a/x\.jpg the labels cat \(row 2\) and dog \(row 4\)"):
        splits(str(tmp_path))
    source = splits(str(tmp_path), several=True)[folder or "all"]
    assert source.classes == ["cat", "cat;dog"]
    assert source.notes == (f"1 rows of {place / 'metadata.csv'} name an image again: each image counts once",)


@pytest.mark.parametrize("name", ["metadata.jsonl", "l.jsonl"])
def test_half_characters_of_json_are_replaced(tmp_path: Path, name: str) -> None:
    rows = '{"path": "a/x.jpg", "label": "\\ud83d", "text": "a \\udfffb"}\n{"path": "a/\\ud800.jpg", "label": "x"}\n'
    written(tmp_path, name, rows, FILES[:1])
    source = open_images(str(tmp_path if name == "metadata.jsonl" else tmp_path / name))
    assert source.classes[source.labels[0]] == "\ufffd"
    assert (source.names[0], source.metadata["text"][0]) == ("a/x.jpg", "a \ufffdb")


@pytest.mark.parametrize("name", ["v.nii.gz", "my film.mp4", "x.NPZ", "a.npy", "s.svs"])
def test_files_of_several_images_have_labels(tmp_path: Path, name: str) -> None:
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / name).touch()
    (tmp_path / "list.txt").write_text(f"n/{name} cat\nn/gone.nii big dog\n")
    entries = read_list(tmp_path / "list.txt").entries
    assert [(entry.name, entry.label) for entry in entries] == [(f"n/{name}", "cat"), ("n/gone.nii", "big dog")]
