from __future__ import annotations

from pathlib import Path

from conftest import write_images
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture

from dinocli.apps.plot.columns import read_columns
from dinocli.cli.extract import _write_metadata
from dinocli.data.sources.open import open_images


def test_further_columns_of_a_list_are_written_as_plot_reads_them(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 2)
    (tmp_path / "list.csv").write_text("path,label,site,year\na/0000.png,cat,north,2021\na/0001.png,dog,south,2022\n")
    source = open_images(str(tmp_path / "list.csv"))
    _write_metadata(tmp_path / "val.csv", source, "val/")
    assert (tmp_path / "val.csv").read_text().splitlines()[0] == "path,site,year"
    columns = read_columns(tmp_path / "val.csv", ["val/a/0001.png", "val/a/0000.png"])
    assert [column.name for column in columns] == ["site", "year"]
    assert [columns[0].kinds[int(value)] for value in columns[0].values] == ["south", "north"]


def test_a_note_says_which_features_are_replaced(dino: Dino, tmp_path: Path, start: Path) -> None:  # noqa: F811
    write_images(tmp_path / "data", 5)
    dino("pretrain", "data", "--preset", "tiny", *SMALL, "--seed", "1", "--steps", "0", "--no-report", "--out", "run")
    options = ("--workers", "0", "--device", "cpu")
    for part in ("1/2", "2/2"):
        dino("extract", "run", "data", "--batch-size", "2", "--part", part, *options)
    assert "replacing" not in dino("extract", "--merge", "features").stderr
    assert "replacing" not in dino("extract", "run", "data", "--batch-size", "2", *options).stderr, "the same weights"
    whole = "features/all.safetensors"
    assert (
        f"note: replacing {whole}, the features of other weights: run"
        in dino("extract", str(start), "data", *options).stderr
    )
    assert (
        f"note: replacing {whole}, the features of other weights: {start}"
        in dino("extract", "--merge", "features").stderr
    )
