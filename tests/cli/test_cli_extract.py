from __future__ import annotations

from pathlib import Path

from conftest import write_images

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
