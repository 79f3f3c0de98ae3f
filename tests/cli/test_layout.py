"""The help: panels, examples, metavars, defaults, and one meaning per option."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import SMALL, Dino, dino, in_a_process  # noqa: F401  a fixture

from dinocli.cli import app, console
from dinocli.cli.layout import PANELS
from dinocli.cli.presets import complete_preset
from dinocli.method import shipped

ROOT = typer.main.get_command(app)
PANELS_OF_COMMANDS = {
    "Start": ["demo", "doctor", "presets"],
    "Main job": [
        "pretrain",
        "adapt",
        "finetune",
        "slurm",
        "runs",
        "report",
        "extract",
        "knn",
        "linear",
        "classify",
        "compare",
        "attn-map",
        "eval",
    ],
    "Find": ["search", "dedup", "curate", "anomaly"],
    "Look": ["plot", "segment", "match", "track"],
    "Share": ["pack", "export", "push"],
}


def commands(group: Any = ROOT, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")


ALL = dict(commands())
OPTIONS = [(name, p) for name, command in ALL.items() for p in command.params if p.param_type_name == "option"]
each = pytest.mark.parametrize("name", ALL)


def options_named(option: str) -> dict[str, Any]:
    return {name: p for name, p in OPTIONS if option in p.opts}


def examples_of(name: str) -> list[str]:
    return (ALL[name].epilog or "").split("\n\n")[1:]


def test_commands_are_in_panels_in_the_order_of_use(dino: Dino) -> None:  # noqa: F811
    panels: dict[str, list[str]] = {}
    for name, command in ROOT.commands.items():
        panels.setdefault(command.rich_help_panel, []).append(name)
    assert panels == PANELS_OF_COMMANDS
    drawn = dino("--help").stdout
    order = [
        word for panel, names in PANELS_OF_COMMANDS.items() for word in (f"─ {panel} ─", *(f"│ {n} " for n in names))
    ]
    places = [drawn.index(word) for word in order]
    assert places == sorted(places)
    assert list(ROOT.commands["eval"].commands) == ["retrieval", "copies", "segment", "match", "track"]


@each
def test_options_are_in_panels_in_one_order(name: str) -> None:
    panels = [p.rich_help_panel for p in ALL[name].params if p.param_type_name == "option"]
    assert set(panels) <= set(PANELS)
    assert panels == sorted(panels, key=PANELS.index)


@each
def test_the_help_fits_a_terminal_and_shows_no_python_type(
    name: str,
    dino: Dino,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        drawn = dino(*name.split(), "--help").stdout
        assert all(len(line.rstrip()) <= width for line in drawn.splitlines())
        assert not re.search(r"<(bool|int|float|str|path|list)", drawn), "a type of Python"
        for line in examples_of(name):
            assert f" {line} " in drawn + " ", f"{line} is wrapped at {width} columns"
        for option in (o for p in ALL[name].params for o in p.opts if o.startswith("--")):
            assert re.search(rf"{option}(?![\w-])", drawn), f"{option} is broken at {width} columns"


def test_every_command_has_two_examples() -> None:
    assert [name for name in ALL if len(examples_of(name)) < 2] == ["eval"]


@pytest.mark.parametrize("line", [line for name in ALL for line in examples_of(name)])
def test_examples_parse(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.partition(" > ")[0])
    assert words.pop(0) == "dino"
    name = max((n for n in ALL if words[: len(n.split())] == n.split()), key=len)
    rest = words[len(name.split()) :]
    if rest or not hasattr(ALL[name], "commands"):
        ALL[name].make_context(name, rest)


@each
def test_an_entry_names_its_default_once(name: str) -> None:
    for p in ALL[name].params:
        text, plain = p.help or "", p.default not in (None, False) and p.param_type_name == "option"
        assert "by default" not in text, p.opts
        assert not (plain and "Default:" in text), p.opts
        assert text.count("Default:") <= 1, p.opts


@each
def test_arguments_are_in_capitals_and_flags_have_no_type(name: str) -> None:
    command = ALL[name]
    for p in command.get_params(typer.Context(command)):
        if p.param_type_name == "argument":
            assert p.metavar == p.metavar.upper() != ""
        elif p.is_flag:
            assert p.metavar == ""
        else:
            assert p.metavar


MEANINGS = {
    "--size": "Side in pixels of the square network input. Default: ",
    "--short-side": "(Short side in pixels of the resized |Resize images with a longer short side to this many pixels)",
    "--long-side": "Long side in pixels of the resized photos",
    "--keep": "Number of newest saved states to keep",
    "--mass": "Share of the attention mass",
    "--k": "Number of nearest neighbours ",
    "--set": "Override a setting of the preset; may be repeated. Keys: ",
    "--out": "",
    "--truth": "",
}


@pytest.mark.parametrize("option", MEANINGS)
def test_an_option_means_one_thing(option: str) -> None:
    named = options_named(option)
    assert named
    for name, p in named.items():
        assert re.match(MEANINGS[option], p.help), name
    if option != "--out":
        assert len({p.metavar for p in named.values()}) == 1
    users = {
        "--keep": {"pretrain"},
        "--size": {"extract", "linear", "compare", "export", "eval copies"},
        "--mass": {"attn-map", "segment", "eval segment"},
    }
    assert set(named) == users.get(option, set(named))


def test_every_command_that_reads_weights_takes_them_as_checkpoint() -> None:
    reading = {
        "extract",
        "linear",
        "classify",
        "anomaly",
        "attn-map",
        "search",
        "segment",
        "match",
        "track",
        "export",
        "push",
    }
    assert set(options_named("--checkpoint")) == reading | {name for name in ALL if name.startswith("eval ")}
    with_argument = {n for n, c in ALL.items() for p in c.params if "CHECKPOINT" in str(p.metavar)}
    assert with_argument == {"extract", "export", "push"}


def test_names_of_presets_are_completed() -> None:
    assert complete_preset("") == [*shipped.names(), *shipped.stages()]
    assert complete_preset("vits") == [name for name in shipped.names() if name.startswith("vits")]
    assert complete_preset("zzz") == []


@pytest.mark.parametrize("words", ["dino pretrain images --preset tin", "dino presets show tin"])
def test_the_shell_completes_names_of_presets_without_torch(words: str, tmp_path: Path) -> None:
    asked = {"_DINO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = in_a_process(cwd=tmp_path, options=("-X", "importtime"), **asked)
    assert done.stdout.split() == [name for name in shipped.names() if name.startswith("tin")]
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("width", [80, 60])
def test_the_table_of_presets_breaks_no_word(width: int, dino: Dino, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    # Not COLUMNS: a console reads it only once, when it is created, which may be in another test.
    monkeypatch.setattr(console._data, "_width", width)
    drawn = dino("presets").stdout
    assert max(map(len, drawn.splitlines())) <= width
    words = set(drawn.split())
    for row in json.loads(dino("presets", "--json").stdout):
        assert set(" ".join(row.values()).split()) <= words, row["preset"]


def test_a_checkpoint_is_an_argument_or_an_option(dino: Dino, images: Path) -> None:  # noqa: F811
    dino("pretrain", "images", "--preset", "tiny", *SMALL, "--steps", "0", "--no-report")
    assert dino("extract", "images", "--checkpoint", "runs/tiny-1", "--json", "--workers", "0").stdout
    assert dino("export", "--checkpoint", "runs/tiny-1", "--to", "official").stdout == "tiny-1.pth\n"
    assert dino("push", "--checkpoint", "runs/tiny-1", "birds").stdout == "birds\n"
    assert dino("push", "--checkpoint", "runs/tiny-1").stdout == "tiny-1-hub\n"
