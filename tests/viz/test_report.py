from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinocli.method.preset import load_preset
from dinocli.viz.report import _space_evenly, write_report

KEYS = (
    "loss dino dino/teacher_entropy dino/kl dino/information dino/prototypes dino/temperature feature_std grad_norm lr weight_decay "
    "momentum images_per_second data_wait peak_memory knn rank uniformity"
).split()
VOID = {"meta", "img", "br", "link", "input"}
# Attributes that can make a browser fetch something.
FETCHING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Parser of a page that fails on tags that are not closed, or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.text.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def report(folder: Path) -> Page:
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text) < 6_000_000
    page = Page(text)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attributes in page.tags:
        for name in FETCHING & attributes.keys():
            value = attributes[name] or ""
            assert value.startswith(("data:image/jpeg;base64,", "#")), f"{tag} {name}={value[:80]}"
        assert not any(name.startswith("on") for name in attributes)
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    assert all(image["alt"] for image in page.all("img")) and all(svg["aria-label"] for svg in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    with Image.open(folder / "curves.png") as sheet:
        sheet.load()
    return page


def lines(folder: Path, count: int, keys: list[str] = KEYS) -> None:
    text = (json.dumps({"step": 10 * i, "epoch": i / 5, **dict.fromkeys(keys, 1 / (i + 1))}) for i in range(count))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in text))


def strip(columns: int, rows: int = 1, side: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run folder with metrics, preset and pictures."""
    folder = tmp_path / "tiny-1"
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    lines(folder, 41, [])  # no curves: drawing them is slow and has its own tests
    preset = load_preset("tiny-dino", ["views.local.scale=[0.1, 0.5]", "optimizer.clip=none"])
    (folder / "preset.json").write_text(preset.model_dump_json(indent=2))
    strip(6).save(pictures / "photos.jpg")
    (pictures / "photos.json").write_text(json.dumps({"names": [f"photo-{i}.jpg" for i in range(6)]}))
    for step in range(0, 400, 20):
        strip(6).save(pictures / f"attention-{step}.jpg")
        strip(6, 6).save(pictures / f"neighbours-{step}.jpg")
    return folder


def test_a_complete_run_gives_a_complete_page(run: Path) -> None:
    lines(run, 41)
    page = report(run)
    assert page.text["h1"] == ["tiny-1"]
    assert page.text["h2"] == ["Curves", "Attention", "Neighbours", "Settings", "Values"]
    facts = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert facts["steps"] == "400 of 400" and facts["epochs"] == "8 of 8" and facts["k-NN"] == "0.0 %"
    assert {"Loss", "k-NN accuracy", "Memory"} <= set(page.text["h3"])
    assert len(page.all("svg")) == 11
    assert {a["href"] for a in page.all("a")} == {"#curves", "#attention", "#neighbours", "#settings", "#values"}
    assert page.all("html")[0]["lang"] == "en"
    assert all(th.get("scope") for th in page.all("th"))


def test_attention_is_shown_at_a_few_steps_including_first_and_last(run: Path) -> None:
    page = report(run)
    alts = [image["alt"] for image in page.all("img")]
    of_first = [alt for alt in alts if alt.startswith("Photo 1, attention")]
    assert len(of_first) == 8 and of_first[0].endswith("step 0") and of_first[-1].endswith("step 380")
    assert len(alts) == 6 * 9 + 6 * 2 * 6
    assert {alt.partition("step ")[2] for alt in alts if alt.startswith("Neighbour")} == {"0", "380"}
    source = page.all("img")[0]["src"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(source))) as tile:
        assert tile.size == (24, 24)


@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 1000])
def test_steps_are_spaced_evenly(count: int) -> None:
    steps = [10 * i for i in range(count)]
    found = _space_evenly(steps)
    assert found == sorted(set(found)) and set(found) <= set(steps) and len(found) == min(8, count)
    assert found[:1] == steps[:1] and found[-1:] == steps[-1:]


def test_changed_settings_are_marked(run: Path) -> None:
    page = report(run)
    assert page.text["mark"] == ["[0.1, 0.5]", "none"]
    assert "preset: [0.15, 0.5]" in page.text["small"]
    assert page.text["caption"][:2] == ["backbone", "heads"]
    cells = dict(zip(page.text["th"], page.text["td"], strict=False))
    assert cells["name"] == "vit_tiny_patch16_224"


def test_a_users_own_preset_is_shown_without_marks(run: Path) -> None:
    preset = json.loads((run / "preset.json").read_text())
    preset["about"]["source"] = "mine"
    (run / "preset.json").write_text(json.dumps(preset))
    page = report(run)
    assert "mark" not in page.text and "caption" in page.text


@pytest.mark.parametrize("keys", [["loss"], ["knn", "lr"], ["grad_norm", "peak_memory", "dino/kl"]], ids=str)
def test_only_logged_values_are_drawn(keys: list[str], run: Path) -> None:
    lines(run, 5, keys)
    assert len(report(run).all("svg")) == len(keys)


def test_an_empty_folder_gives_an_empty_page(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert page.text["h2"] == ["Curves"] and page.text["p"] == ["No values logged yet."]


@pytest.mark.parametrize(
    "metrics",
    [b"", b'{"step": 1, "loss": 5}\n', b'{"step": 1, "loss": 5}\n{"step": 2, "lo', b'{"step": 1, "loss": "nan"}\n'],
    ids=["empty", "one line", "half a line", "not finite"],
)
def test_any_metrics_file_gives_a_page(metrics: bytes, run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(metrics)
    page = report(run)
    assert len(page.all("svg")) == bool(metrics)


def test_many_logged_lines_give_a_small_page(run: Path) -> None:
    lines(run, 20_000, ["loss", "knn"])
    assert len(report(run).all("svg")) == 2
    assert (run / "report.html").stat().st_size < 500_000


HOSTILE = [
    "<script>alert(1)</script>.jpg",
    "\"onerror='x' src=http://x.y/z",
    "a\u202egpj.exe",
    "caf\udce9\n\0.jpg",
    "&lt;",
    "",
]


def test_hostile_names_are_shown_as_text(run: Path) -> None:
    folder = run.rename(run.with_name("<b>&\"'\udce9"))
    (folder / "pictures" / "photos.json").write_text(json.dumps({"names": HOSTILE}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1, "<img src=x>": 2, "<i>/kl": 3}\n')
    page = report(folder)
    assert page.text["h1"] == ["<b>&\"'\\xe9"]
    assert {"<script>alert(1)</script>.jpg", r"a\u202egpj.exe", r"caf\xe9\n\x00.jpg", "&lt;"} <= set(page.text["h3"])
    assert "<img src=x>" in page.text["th"]
    assert not page.all("b") and not page.all("i")


@pytest.mark.parametrize(
    "names", [None, [], {}, {"names": 7}, {"names": ["one"]}, {"names": [1, None, {}, [], "", 2.5]}]
)
def test_names_may_be_missing(names: Any, run: Path) -> None:
    (run / "pictures" / "photos.json").write_text(json.dumps(names))
    assert len(report(run).all("img")) == 126


def test_corrupt_pictures_are_skipped(run: Path) -> None:
    pictures = run / "pictures"
    valid = (pictures / "attention-0.jpg").read_bytes()
    for name, data in {"attention-0": valid[:100], "attention-380": b"", "neighbours-0": b"<svg/>"}.items():
        (pictures / f"{name}.jpg").write_bytes(data)
    (pictures / "attention-x.jpg").write_bytes(valid)
    strip(3).save(pictures / "attention-400.jpg")
    alts = [image["alt"] for image in report(run).all("img")]
    assert sum(alt.startswith("Photo 1, attention") for alt in alts) == 6
    assert {alt.partition("step ")[2] for alt in alts if alt.startswith("Neighbour")} == {"380"}
    (pictures / "photos.jpg").unlink()
    page = report(run)
    assert page.text["h2"] == ["Curves", "Settings", "Values"]


def test_large_pictures_are_reduced_in_the_page(run: Path) -> None:
    for path in (run / "pictures").glob("attention-*.jpg"):
        strip(6, side=600).save(path)
    strip(6, side=600).save(run / "pictures" / "photos.jpg")
    assert len(report(run).all("img")) == 126


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"losses": {"dino": 7}, "heads": [], "training": null}', '{"a": {"b": 1}}']
)
def test_a_preset_of_another_version_is_shown_as_far_as_possible(text: str, run: Path) -> None:
    (run / "preset.json").write_text(text)
    page = report(run)
    assert "Curves" in page.text["h2"] and "mark" not in page.text
    assert dict(zip(page.text["dt"], page.text["dd"], strict=True))["steps"] == "400"


def test_a_full_disk_keeps_the_previous_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(run)
    before = (run / "report.html").read_bytes()

    def write_part(self: Path, text: str, **options: object) -> None:
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_part)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".*"))


def test_the_stages_of_a_run_are_listed_oldest_first_with_the_run_itself(tmp_path: Path) -> None:
    preset = load_preset("tiny-dino")
    (tmp_path / "preset.json").write_text(preset.model_dump_json())
    stages = [
        {"source": "runs/<a>", "recipe": "long", "steps": 400, "batch_size": 48, "optimizer": True},
        {"source": "b.safetensors", "recipe": "short", "steps": 20, "batch_size": 16, "optimizer": False},
    ]
    (tmp_path / "stages.json").write_text(json.dumps({"stages": stages}))
    report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = text.partition('id="stages"')[2].partition("</section>")[0]
    cells = [re.sub("<[^>]+>", "|", row) for row in table.split("<tr>")[2:]]
    assert [[cell for cell in row.split("|") if cell] for row in cells] == [
        ["1", "long", "runs/&lt;a&gt;", "400", "48", "random or initial weights"],
        ["2", "short", "b.safetensors", "20", "16", "with optimizer"],
        ["3", preset.about.recipe, "this run", str(preset.training.batch_size), "optimizer anew"],
    ]
    (tmp_path / "stages.json").write_text("damaged")
    report(tmp_path)
    assert 'id="stages"' not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_verdict_of_an_adaptation_is_a_table_on_top(tmp_path: Path) -> None:
    rows = [["k-NN, %", "31.0", "35.5", "+4.5 (+2.0 to +7.0)"], ["LiDAR <b>", "20.00", "21.00", "+1.00"]]
    (tmp_path / "verdict.json").write_text(json.dumps({"step": 40, "verdict": "verdict: better", "rows": rows}))
    page = report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = text.partition('id="verdict"')[2].partition("</section>")[0]
    assert re.findall(r"<td>(.*?)</td>", table)[:3] == ["31.0", "35.5", "+4.5 (+2.0 to +7.0)"]
    assert "LiDAR &lt;b&gt;" in table
    assert "verdict: better" in page.text["p"]
    (tmp_path / "verdict.json").write_text("damaged")
    report(tmp_path)
    assert 'id="verdict"' not in (tmp_path / "report.html").read_text(encoding="utf-8")
