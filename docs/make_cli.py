"""Write docs/cli.md from the commands themselves.

    python docs/make_cli.py

The text comes from the signatures of the commands, not from the printed help, so that it does not depend on the
terminal or on typer's version. tests/test_docs.py keeps the file up to date.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from dinocli.cli import app
from dinocli.cli.layout import PANELS, split_examples

PAGE = Path(__file__).parent / "cli.md"
_WIDTH = 80
_HEAD = """\
# Commands

<!-- Made by docs/make_cli.py from the commands; do not edit. -->

`dino COMMAND --help` prints the same. Parts in brackets are optional; options with three dots may be repeated. Without
a checkpoint, commands use `./ckpt.safetensors`, else the newest run. Without `--features`, they use `./features`,
else those of the newest run.

Data goes to stdout, progress and notes to stderr. An error is one line and a hint, with exit code 1, or 2 for wrong
usage.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page: a table of the commands, then a section for each."""
    panels = [info.rich_help_panel for info in app.registered_commands]
    commands = [c for panel in dict.fromkeys(panels) for c in _commands(app, "dino") if c.panel == panel]
    rows = [f"| {c.panel} | [`{c.name}`](#{c.name.replace(' ', '-')}) | {_summary(c.text)} |" for c in commands]
    table = "\n".join(["| panel | command | purpose |", "|---|---|---|", *rows])
    return "\n".join([_HEAD, table, *map(_section, commands), ""])


@dataclass(frozen=True)
class Command:
    """Command or group.

    Attributes:
        panel: Panel of the help that lists the command, such as `Start`.
        name: Full name, such as `dino eval match`.
        text: Help text.
        examples: Command lines.
        callback: Function that runs the command. None for a group without one.
        group: True if the command has subcommands.
    """

    panel: str
    name: str
    text: str
    examples: list[str]
    callback: Callable[..., Any] | None
    group: bool


def _commands(group: typer.Typer, prefix: str, panel: str = "") -> Iterator[Command]:
    """Yield the commands of a group, in the order of the help."""
    for info in group.registered_commands:
        if info.callback and not info.hidden:
            name = f"{prefix} {info.name or info.callback.__name__.replace('_', '-')}"
            text, examples = split_examples(info.callback)
            yield Command(panel or str(info.rich_help_panel), name, text, examples, info.callback, group=False)
    for inner in group.registered_groups:
        app, name, place = inner.typer_instance, f"{prefix} {inner.name}", panel or str(inner.rich_help_panel)
        assert app
        callback = app.registered_callback and app.registered_callback.callback
        text, examples = split_examples(callback) if callback else (str(app.info.help), [])
        yield Command(place, name, text, examples, callback, group=True)
        yield from _commands(app, name, place)


def _section(command: Command) -> str:
    name, callback = command.name, command.callback
    arguments: list[tuple[str, ArgumentInfo, bool]] = []
    panels: dict[str, list[tuple[str, OptionInfo, Any]]] = {}
    hints = get_type_hints(callback, include_extras=True) if callback else {}
    for key, parameter in inspect.signature(callback).parameters.items() if callback else ():
        if get_origin(hints[key]) is not Annotated:
            continue
        kind, info = get_args(hints[key])[:2]
        if info.hidden:
            continue
        if isinstance(info, ArgumentInfo):
            arguments.append((str(info.metavar), info, parameter.default is inspect.Parameter.empty))
        else:
            panels.setdefault(str(info.rich_help_panel), []).append(
                (_option_name(key, kind, info), info, parameter.default)
            )
    words = [argument if required else f"[{argument}]" for argument, _, required in arguments]
    usage = " ".join(["usage:", name, "[OPTIONS]", *words, *(["COMMAND"] if command.group else [])])
    lines = [*textwrap.wrap(usage, _WIDTH, subsequent_indent="    "), ""]
    for paragraph in command.text.split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), _WIDTH, break_on_hyphens=False), ""]
    if arguments:
        lines += ["Arguments:", *(line for argument, info, _ in arguments for line in _entry(argument, info, [])), ""]
    for panel in (panel for panel in PANELS if panel in panels):
        lines.append(f"{panel}:")
        for option, info, default in panels[panel]:
            lines += _entry(option, info, _notes(option, info, default))
        lines.append("")
    if command.examples:
        lines += ["Examples:", *(f"  {example}" for example in command.examples), ""]
    return "\n".join(["", f"## {name}", "", "```text", *lines[:-1], "```"])


def _entry(name: str, info: ArgumentInfo | OptionInfo, notes: list[str]) -> list[str]:
    text = " ".join((info.help or "").split()) + (f" [{'; '.join(notes)}]" if notes else "")
    indent = " " * 8
    wrapped = textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return [f"  {name}", *wrapped]


def _notes(name: str, info: OptionInfo, default: Any) -> list[str]:
    notes = ["required"] if default is inspect.Parameter.empty else []
    if default is True:
        notes.append(f"default: {name.split(',')[0]}")
    elif default is not inspect.Parameter.empty and default is not None and default is not False:
        notes.append(f"default: {default}")
    if info.min is not None and info.max is not None:
        notes.append(f"{info.min} to {info.max}")
    elif info.min is not None:
        notes.append(f"at least {info.min}")
    return notes


def _option_name(key: str, kind: Any, info: OptionInfo) -> str:
    # typer stores the first name of an option in Annotated as its default.
    decls = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or [])]
    dashed = key.replace("_", "-")
    if _plain_kind(kind) is bool:
        return ", ".join(decls).replace("/", ", ") or f"--{dashed}, --no-{dashed}"
    names = ", ".join(decl for decl in decls if decl.startswith("-")) or f"--{dashed}"
    return f"{names} {info.metavar}" + (" ..." if _is_list(kind) else "")


def _plain_kind(kind: Any) -> Any:
    """Return a type without None, list and Annotated."""
    while get_args(kind) and get_origin(kind) is not Literal:
        kind = next(inner for inner in get_args(kind) if inner is not NoneType)
    return kind


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(get_origin(inner) is list for inner in get_args(kind))


def _summary(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    main()
