"""Write docs/cli.md from the commands themselves.

    python docs/make_cli.py

The text comes from the signatures of the commands, not from the drawn help, so it is the same for any terminal and any
release of typer. tests/test_docs.py keeps the file up to date.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from dinocli.cli import app

PAGE = Path(__file__).parent / "cli.md"
_WIDTH = 80
_METAVARS = {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}
_HEAD = """\
# Commands

<!-- Made by docs/make_cli.py from the commands; do not edit. -->

`dino COMMAND --help` prints the same. Parts in brackets are optional; options with three dots may be repeated. Commands
that get no checkpoint use `./ckpt.safetensors`, else the newest run. Without `--features` they use `./features`, else
those of the newest run.

Data goes to stdout, progress and notes to stderr. An error is one line and a hint, with exit code 1, or 2 for wrong
usage.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page: a table of the commands, then a section for each."""
    commands = list(_commands(app, "dino"))
    rows = [f"| [`{name}`](#{name.replace(' ', '-')}) | {_summary(callback)} |" for name, callback, _ in commands]
    table = "\n".join(["| command | purpose |", "|---|---|", *rows])
    return "\n".join([_HEAD, table, *(_section(*command) for command in commands), ""])


def _commands(group: typer.Typer, prefix: str) -> Iterator[tuple[str, Callable[..., Any], bool]]:
    """Yield name, function and whether it has commands of its own, in the order of the help."""
    for command in group.registered_commands:
        if command.callback and not command.hidden:
            name = command.name or command.callback.__name__.replace("_", "-")
            yield f"{prefix} {name}", command.callback, False
    for inner in group.registered_groups:
        if inner.typer_instance and inner.typer_instance.registered_callback and not inner.hidden:
            callback = inner.typer_instance.registered_callback.callback
            assert callback
            yield f"{prefix} {inner.name}", callback, True
            yield from _commands(inner.typer_instance, f"{prefix} {inner.name}")


def _section(name: str, callback: Callable[..., Any], group: bool) -> str:
    arguments: list[tuple[str, ArgumentInfo, Any, bool]] = []
    panels: dict[str, list[tuple[str, OptionInfo, Any]]] = {}
    hints = get_type_hints(callback, include_extras=True)
    for key, parameter in inspect.signature(callback).parameters.items():
        if get_origin(hints[key]) is not Annotated:
            continue
        kind, info = get_args(hints[key])[:2]
        if info.hidden:
            continue
        if isinstance(info, ArgumentInfo):
            required = parameter.default is inspect.Parameter.empty
            arguments.append((_argument_name(key, kind, info), info, kind, required))
        else:
            panels.setdefault(info.rich_help_panel or "Options", []).append(
                (_option_name(key, kind, info), info, parameter.default)
            )
    words = [argument if required else f"[{argument}]" for argument, _, _, required in arguments]
    usage = " ".join(["usage:", name, "[OPTIONS]", *words, *(["COMMAND"] if group else [])])
    lines = [*textwrap.wrap(usage, _WIDTH, subsequent_indent="    "), ""]
    for paragraph in (inspect.getdoc(callback) or "").split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), _WIDTH, break_on_hyphens=False), ""]
    if arguments:
        lines += [
            "Arguments:",
            *(line for argument, info, _, _ in arguments for line in _entry(argument, info, [])),
            "",
        ]
    for panel, options in panels.items():
        lines.append(f"{panel}:")
        for option, info, default in options:
            lines += _entry(option, info, _notes(option, info, default))
        lines.append("")
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


def _argument_name(key: str, kind: Any, info: ArgumentInfo) -> str:
    if info.metavar:
        return info.metavar if " " in info.metavar else info.metavar.strip("[]")
    return key.upper().replace("_", "-") + ("..." if _is_list(kind) else "")


def _option_name(key: str, kind: Any, info: OptionInfo) -> str:
    # In Annotated the first name of an option stands where its default would.
    decls = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or [])]
    dashed = key.replace("_", "-")
    if _plain_kind(kind) is bool:
        return ", ".join(decls).replace("/", ", ") or f"--{dashed}, --no-{dashed}"
    names = ", ".join(decl for decl in decls if decl.startswith("-")) or f"--{dashed}"
    return f"{names} {info.metavar or _metavar(_plain_kind(kind))}" + (" ..." if _is_list(kind) else "")


def _plain_kind(kind: Any) -> Any:
    """Return a type without None, list and Annotated."""
    while get_args(kind) and get_origin(kind) is not Literal:
        kind = next(inner for inner in get_args(kind) if inner is not NoneType)
    return kind


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(get_origin(inner) is list for inner in get_args(kind))


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return _METAVARS.get(kind.__name__, "VALUE")


def _summary(callback: Callable[..., Any]) -> str:
    paragraph = (inspect.getdoc(callback) or "").split("\n\n")[0]
    return " ".join(paragraph.split())


if __name__ == "__main__":
    main()
