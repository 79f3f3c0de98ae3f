"""README and docs: links resolve, commands parse, and tables list what the code has."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel

from dinocli.cli import app
from dinocli.method import shipped
from dinocli.method.preset import Preset

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

by_name = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# README


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def test_the_set_up_commands_are_the_first_two_code_blocks() -> None:
    blocks = [body.strip() for _, body in FENCE.findall(README)]
    assert blocks[:2] == ["pip install . && dino demo", 'pip install -e ".[dev]" && pytest']
    before = README.split("```")[0]
    assert not re.search(r"^(    |\t)\S", before, re.MULTILINE)  # an indented block is a code block too


def test_licence_and_gpus_are_stated() -> None:
    top = "\n".join(README.splitlines()[:12])
    assert "Apache-2.0, and the weights you train are yours" in top
    for page in (ROOT / "README.md", DOCS / "index.md", DOCS / "results.md", ROOT / "benchmarks" / "RESULTS.md"):
        assert re.search(r"[Nn]othing was measured on a\s+GPU", text_of(page)), page


# Links


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@by_name
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", text_of(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(text_of(path)), f"{target}: no such heading"


def test_every_picture_is_used() -> None:
    used = {Path(target).name for page in PAGES for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_of(page))}
    assert {path.name for path in (DOCS / "images").iterdir() if path.suffix in (".png", ".jpg")} == used


@pytest.mark.slow
def test_the_pictures_of_how_it_works_are_those_that_are_drawn(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "how_it_works.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (DOCS / "images").glob("how-*.png")}


# Commands


def lines_of_commands(text: str) -> Iterator[str]:
    """Yield what a reader would type: lines of bash blocks, `$` lines of consoles, indented lines."""
    for language, body in FENCE.findall(text):
        joined = body.replace("\\\n", " ")
        if language == "bash":
            yield from joined.splitlines()
        elif language == "console":
            yield from (line[2:] for line in joined.splitlines() if line.startswith("$ "))
    yield from re.findall(r"^    (dino .+)$", FENCE.sub("", text), re.MULTILINE)


def calls(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each call of dino in a line."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split, reader.commenters = True, "#"
    parts: list[list[str]] = [[]]
    for word in reader:
        if set(word) <= set("|&;<>"):
            parts.append([])
        else:
            parts[-1].append(word)
    for words in parts:
        if words[:1] == ["torchrun"] and "dinocli" in words:
            words = ["dino", *words[words.index("dinocli") + 1 :]]
        if words[:1] == ["dino"]:
            yield [word for word in words[1:] if word != "EXTRA"]  # EXTRA: options that a table lists


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """Find a command and the rest of its words."""
    assert words and words[0] in COMMANDS, f"there is no command {' '.join(words[:1])}"
    command, rest = COMMANDS[words[0]], words[1:]
    if rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@by_name
def test_commands_parse(page: Path) -> None:
    for line in lines_of_commands(text_of(page)):
        for words in calls(line):
            command, rest = command_of(words)
            if getattr(command, "commands", None) and not rest:
                continue  # `dino presets` alone lists them
            try:
                command.make_context(words[0], rest)
            except Exception as error:
                pytest.fail(f"{line}: {error}")


@by_name
def test_options_in_the_text_exist(page: Path) -> None:
    for span in re.findall(r"`(dino [a-z][^`]*)`", FENCE.sub("", text_of(page))):
        command, rest = command_of(re.sub(r"[\[\]]", "", span).split()[1:])
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]*", " ".join(rest)):
            assert option in known, f"{span}: there is no option {option}"


def test_every_command_is_in_the_readme_and_in_the_list_of_commands() -> None:
    listed = text_of(DOCS / "cli.md")
    assert len(COMMANDS) >= 7
    for name in COMMANDS:
        assert f"`dino {name}" in README, name
        assert f"## dino {name}\n" in listed, name


def test_the_list_of_commands_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_cli"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    assert text_of(DOCS / "cli.md") == module.page(), "run: python docs/make_cli.py"


# Presets

# Tables that several keys hold are listed once, under these names.
SHARED = {
    "ViewConfig": "VIEW",
    **dict.fromkeys(("CenteringConfig", "SinkhornKnoppConfig"), "TARGETS"),
    **dict.fromkeys(("Constant", "Warmup", "Cosine", "LinearByEpoch", "CosineByEpoch"), "SCHEDULE"),
}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every key of a preset and its default as the page prints it, all members of unions included."""
    keys: dict[str, str] = {}
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        path = f"{prefix}{name}" + (".NAME" if inner and get_origin(field.annotation) is dict else "")
        keys[path] = shown(field)
        for each in inner:
            keys |= keys_of(each, f"{SHARED.get(each.__name__, path)}.")
    return keys


def shown(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if isinstance(default, BaseModel):
        return ""
    return {"None": "none", "True": "true", "False": "false"}.get(str(default), str(default))


def test_every_key_of_a_preset_is_listed_with_its_default() -> None:
    rows = re.findall(r"^\| `([A-Za-z0-9_.]+)` \| ([^|]*)\| (\S[^|]*) \|$", text_of(DOCS / "presets.md"), re.MULTILINE)
    listed = {key: default.strip() for key, default, _ in rows}
    assert len(rows) == len(listed), "a key is listed twice"
    assert listed == keys_of(Preset)


def test_every_preset_is_listed() -> None:
    listed = text_of(DOCS / "presets.md")
    for name in shipped.names():
        assert f"`{name}`" in listed, name


# The site


def test_every_page_is_in_the_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}" in site, page
