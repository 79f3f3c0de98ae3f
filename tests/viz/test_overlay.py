from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinocli.core.errors import DinoError
from dinocli.method.preset import load_preset
from dinocli.viz.overlay import list_values, overlay, read_runs, write_overlay


def write_run(folder: Path, *overrides: str, count: int = 30, **values: float) -> Path:
    """Write the preset and the metrics of a run, whose values grow with the steps."""
    folder.mkdir(parents=True)
    (folder / "preset.json").write_text(load_preset("tiny", list(overrides)).model_dump_json())
    lines = ({"step": 10 * i, **{key: value * (i + 1) for key, value in values.items()}} for i in range(count))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three runs, of which only the second and third log k-NN, with two losses in the third."""
    return [
        write_run(tmp_path / "a", loss=1.0, **{"dino/kl": 0.1}),
        write_run(tmp_path / "b", "heads.dino.prototypes=64", loss=2.0, knn=1.0, **{"dino/kl": 0.2}),
        write_run(
            tmp_path / "c", "training.seed=5", count=7, loss=3.0, dino=2.0, knn=2.0, ibot=1.0, **{"ibot/kl": 0.3}
        ),
    ]


def test_each_axis_has_a_curve_per_run_in_the_order_of_the_runs(folders: list[Path]) -> None:
    runs = read_runs(folders)
    drawn = {chart.title: chart for chart in overlay(runs)}
    axes = {axis.title: axis for chart in drawn.values() for axis in chart.axes}
    assert all(list(axis.curves) == ["a", "b", "c"] and not axis.legend for axis in axes.values())
    names = [*(f"loss, nats: {name}" for name in ("loss", "dino", "ibot")), "KL, nats: dino", "KL, nats: ibot"]
    assert set(axes) == {*names, "accuracy, %"}
    for name in "abc":
        curve = axes["loss, nats: loss"].curves[name]
        np.testing.assert_array_equal(curve.values, runs[name].history["loss"].values)
    assert [len(curve.steps) for curve in axes["accuracy, %"].curves.values()] == [0, 30, 7]
    assert [len(curve.steps) for curve in axes["KL, nats: dino"].curves.values()] == [30, 30, 0]
    assert drawn["Loss"].axes[0].marks.keys() == {"ln K = 5.55", "ln K = 4.16"}, "one level per number of prototypes"


def test_only_the_values_that_are_named_are_drawn(folders: list[Path]) -> None:
    runs = read_runs(folders[:2])
    (chart,) = overlay(runs, ["dino/kl"])
    assert [axis.title for axis in chart.axes] == ["KL, nats"]
    assert list_values(runs, ["dino/kl"]) == [["step", "290", "290"], ["dino/kl", "3", "6"]]
    with pytest.raises(
        DinoError, match="--value dino/k is not logged by these runs; expected one of dino/kl, knn"
    ) as e:
        overlay(runs, ["dino/k"])
    assert e.value.hint == "--value dino/kl"


def test_the_page_lists_differences_and_last_values(folders: list[Path], tmp_path: Path) -> None:
    page = write_overlay(read_runs(folders), tmp_path / "out").read_text(encoding="utf-8")
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["heads.dino.prototypes", "256", "64", "256"] in rows and ["training.seed", "0", "0", "5"] in rows
    assert not any(row[0] == "training.batch_size" for row in rows), "the same in all runs"
    assert ["knn", "", "30", "14"] in rows
    assert re.findall(r'<b style="color: var\(--curve-(\d)\)">━━━</b> (\w)</li>', page) == [
        ("0", "a"),
        ("1", "b"),
        ("2", "c"),
    ]
    assert "<script" not in page and not re.findall(r"url\((?!#)", page)
    with Image.open(tmp_path / "out" / "curves.png") as sheet:
        sheet.load()
    same = [write_run(tmp_path / name, loss=1.0) for name in ("x", "y")]
    assert "All settings are the same." in write_overlay(read_runs(same), tmp_path / "out").read_text(encoding="utf-8")


def test_runs_of_the_same_name_are_distinguished_and_wrong_ones_refused(tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / name / "run", loss=1.0) for name in ("x", "y"))
    assert list(read_runs([one, other])) == [str(one), str(other)]
    with pytest.raises(DinoError, match="is given twice"):
        read_runs([one, one])
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(DinoError, match=f"{place} has no logged values in metrics.jsonl; expected a run folder"):
            read_runs([tmp_path / place])


def test_a_run_without_a_preset_is_drawn(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, loss=1.0) for name in ("x", "y")]
    (runs[0] / "preset.json").unlink()
    page = write_overlay(read_runs(runs), tmp_path / "out").read_text(encoding="utf-8")
    assert "backbone.name" in page
