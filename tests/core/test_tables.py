from __future__ import annotations

import csv
from pathlib import Path

from dinocli.core.tables import first_line, write_table


def test_a_table_comes_back_with_odd_names(tmp_path: Path) -> None:
    rows = [["a,b.jpg", 'say "x"'], ["d\udcff.png", "line\nbreak"]]
    write_table(tmp_path / "x.csv", ("image", "class"), rows)
    with (tmp_path / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file)) == [["image", "class"], *rows]
    assert first_line(tmp_path / "x.csv") == b"image,class\n"


def test_the_first_line_of_a_long_file_is_short(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"y" * 1000)
    assert first_line(tmp_path / "x.bin") == b"y" * 200
