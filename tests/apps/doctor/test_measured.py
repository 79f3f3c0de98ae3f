from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from dinocli.apps.doctor import measured
from dinocli.apps.doctor.measured import MEASURED, Measured, choose, describe, nearest
from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset

DOCS = Path(__file__).parents[3] / "docs"


def test_each_row_stands_in_the_results_with_its_numbers() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    for row in MEASURED:
        steps = row.epochs * (load_preset(row.preset).training.steps_per_epoch or 0)
        low, high = row.knn
        lines = [line for line in text.splitlines() if line.startswith(f"| `{row.preset}` | {row.data} | {steps:,} |")]
        assert len(lines) == 1, f"{row} in docs/results.md"
        assert f"{low}" in lines[0]
        assert f"{high}" in lines[0]
        assert f"| {row.untrained} |" in lines[0]


def test_the_table_of_presets_has_the_same_rows_each_with_its_command() -> None:
    text = (DOCS / "presets.md").read_text(encoding="utf-8")
    _, _, section = text.partition("| images | data | core minutes | preset | epochs |")
    lines = section.partition("\n\n")[0].splitlines()[2:]
    assert len(lines) == len(MEASURED)
    for row, line in zip(MEASURED, lines, strict=True):
        knn = " to ".join(f"{value}" for value in sorted(set(row.knn)))
        cells = [f"{row.images:,}", row.data, f"{row.minutes:g}", f"`{row.preset}`", row.epochs, knn, row.untrained]
        *found, command = [cell.strip() for cell in line.strip("|").split("|")]
        assert found == [*map(str, cells), str(row.seeds)]
        assert command.startswith("`dino pretrain ")
        assert command.endswith(f" --preset {row.preset} --epochs {row.epochs}`")


def test_the_line_names_epochs_minutes_runs_and_the_untrained_network(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Measured(100, "photos", "mini", 40, 9, (51.2, 51.2), 32.9, 1),
        Measured(100, "photos", "tiny", 12, 2.5, (43.1, 44.0), 32.9, 3),
    )
    monkeypatch.setattr(measured, "MEASURED", rows)
    assert describe(100) == (
        "measured on photos, k-NN in %: 32.9 untrained, 43.1 to 44.0 by tiny with --epochs 12 (2.5 core minutes, 3 seeds), "
        "51.2 by mini with --epochs 40 (9 core minutes, one run)"
    )


def test_the_nearest_number_of_images_counts_by_ratio() -> None:
    sizes = sorted({row.images for row in MEASURED})
    for size in sizes:
        assert {row.images for row in nearest(size)} == {size}
    for small, large in pairwise(sizes):
        middle = (small * large) ** 0.5
        assert nearest(int(middle * 0.99))[0].images == small
        assert nearest(int(middle * 1.01))[0].images == large
    assert nearest(0)[0].images == sizes[0]
    assert nearest(None)[0].images == nearest(10**9)[0].images == sizes[-1]
    minutes = [row.minutes for row in nearest(9_469)]
    assert minutes == sorted(minutes)


def test_the_longest_run_that_fits_the_minutes_is_chosen() -> None:
    short = choose(9_469, 2.2)
    assert (short.preset, short.epochs) == ("tiny-muon", 9)
    assert choose(9_469, 8.9) is short
    assert (choose(9_469, 9).preset, choose(9_469, 9).epochs) == ("tiny", 40)
    with pytest.raises(DinoError, match=r"--minutes 1 is less than any measured run; expected 2\.2 or more"):
        choose(9_469, 1)
