"""Old spellings: each is accepted, with one note that names the new one."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer
from test_cli import SMALL, Dino, dino  # noqa: F401  a fixture

from dinocli.cli import app
from dinocli.cli.renamed import renew

OLD = [
    ("attn-map a.jpg --keep 0.5 --size=240", "attn-map a.jpg --mass 0.5 --short-side=240",
     "--keep is now --mass, --size is now --short-side"),
    ("segment a.jpg --keep 0.5 --by attention", "segment a.jpg --mass 0.5 --by attention", "--keep is now --mass"),
    ("segment a.jpg --size 96 --head h.safetensors", "segment a.jpg --short-side 96 --classifier h.safetensors",
     "--size is now --short-side, --head is now --classifier"),
    ("segment a.jpg --pca", "segment a.jpg --by pca", "--pca is now --by pca"),
    ("segment a.jpg --by attention --pca", "segment a.jpg --foreground attention --by pca",
     "--pca is now --by pca, --by is now --foreground"),
    ("segment a.jpg --evaluate masks --by cut --keep 0.5", "eval segment a.jpg --truth masks --by cut --mass 0.5",
     "dino segment --evaluate is now dino eval segment --truth, --keep is now --mass"),
    ("segment --train data --epochs 2 --out o", "eval segment --train data --epochs 2 --out o",
     "dino segment --train is now dino eval segment --train"),
    ("match a.jpg b.jpg --size 32 --sd-size 64", "match a.jpg b.jpg --short-side 32 --sd-long-side 64",
     "--size is now --short-side, --sd-size is now --sd-long-side"),
    ("match a.jpg b.jpg --keypoints=k.csv --pck-of image", "eval match a.jpg b.jpg --keypoints=k.csv --pck-of image",
     "dino match --keypoints is now dino eval match --keypoints"),
    ("track f --mask m.png --size 240 --top 3", "track f --mask m.png --short-side 240 --k 3",
     "--size is now --short-side, --top is now --k"),
    ("track f --mask m.png --evaluate t", "eval track f --mask m.png --truth t",
     "dino track --evaluate is now dino eval track --truth"),
    ("search --evaluate gnd.json --data d --size 96 --multiscale", "eval retrieval gnd.json --images d --long-side 96 --multiscale",
     "dino search --evaluate is now dino eval retrieval, --data is now --images, --size is now --long-side"),
    ("search --evaluate=copies --size 96 --whiten w", "eval copies copies --size 96 --whiten w",
     "dino search --evaluate is now dino eval copies"),
    ("pack i o --side 64", "pack i o --short-side 64", "--side is now --short-side"),
    ("export --to official --heads", "export --to official --projection-head", "--heads is now --projection-head"),
]  # fmt: skip
NEW = [
    "", "pretrain i --keep 3 --set views.local.size=8", "extract c i --size 224", "attn-map a.jpg --head 2 --film gif",
    "search a.jpg --data d --k 3", "linear --paper d --size 64", "track f --mask m.png -- --size",
    *(new for _, new, _ in OLD),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "note"), OLD, ids=[old for old, *_ in OLD])
def test_an_old_spelling_is_the_new_command_and_one_note(
    old: str, new: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "copies").mkdir()
    words, said = renew(shlex.split(old))
    assert shlex.join(words) == new
    assert said == f"{note}; the old spelling works until version 0.3"
    command = typer.main.get_command(app).commands[words.pop(0)]
    command = command.commands[words.pop(0)] if hasattr(command, "commands") else command
    command.make_context(new, words, resilient_parsing=True)


@pytest.mark.parametrize("line", NEW)
def test_a_new_spelling_is_left_alone(line: str) -> None:
    assert renew(shlex.split(line)) == (shlex.split(line), "")


def test_the_note_is_one_line_before_the_command_does_its_work(dino: Dino, images: Path) -> None:  # noqa: F811
    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    done = dino("attn-map", "images/a/0000.png", "--keep", "0.5", "--size", "32")
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert notes == ["note: --keep is now --mass, --size is now --short-side; the old spelling works until version 0.3"]
    assert done.stdout == "attention/0000.png\n"
    asked = ("images/a", "--evaluate", "images/a", "--json")
    assert "none of 6 photos has a mask" in dino("segment", *asked, code=1).stderr
    error = dino("attn-map", "images", "--keep", "60", code=2).stderr.splitlines()
    assert error[-2:] == ["error: --mass 60 is too large; expected 1 or less", "hint: use --mass 1 or less"]
