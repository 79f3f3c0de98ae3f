from __future__ import annotations

from pathlib import Path

from dinocli.apps.doctor.measured import MEASURED, describe
from dinocli.method.preset import load_preset

DOCS = Path(__file__).parents[3] / "docs"


def test_each_row_stands_in_the_results_with_its_numbers() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    for row in MEASURED:
        steps = row.epochs * (load_preset(row.preset).training.steps_per_epoch or 0)
        low, high = row.knn
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(f"| `{row.preset}` | Imagenette, ten classes | {steps:,} |")
        ]
        assert len(lines) == 1, f"{row} in docs/results.md"
        assert f"{low}" in lines[0]
        assert f"{high}" in lines[0]
        assert f"| {row.untrained} |" in lines[0]


def test_the_line_names_epochs_minutes_and_the_untrained_network() -> None:
    line = describe("tiny")
    assert "32.9 untrained, 43.1 to 44.0 with --epochs 12 (2.5 core minutes), 51.2 with --epochs 40" in line
    assert describe("vits16") == ""
