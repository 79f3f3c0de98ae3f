"""Layout of the help: panels of options, metavars, and the examples of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

# Panels of options, in the order of the help.
RECIPE, METHOD, RUN_FOLDER, MONITORING = "Recipe", "Method", "Run folder", "Monitoring"
SPEED, MACHINE, OUTPUT = "Speed and memory", "Machine", "Output"
PANELS = (RECIPE, METHOD, RUN_FOLDER, MONITORING, SPEED, MACHINE, OUTPUT)
_METAVARS = {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT", "bool": ""}
_EXAMPLES = "Examples:"


class Layout:
    """Mixin of commands and groups: help without Python types, and with `--help` in the output panel."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, including typer's `--help`, with types and panels set for the help."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        panels = [getattr(parameter, "rich_help_panel", None) for parameter in parameters]
        for parameter in parameters:
            if parameter.param_type_name == "argument":
                parameter.display_type_rich = lambda ctx: None  # typer prints a Python type such as <list[Path]>
            elif parameter.is_flag:
                parameter.metavar = ""
            if "--help" in parameter.opts and OUTPUT in panels:
                parameter.rich_help_panel = OUTPUT
        return parameters


def split_examples(function: Callable[..., Any]) -> tuple[str, list[str]]:
    """Split a command's docstring into its text and the commands after `Examples:`."""
    text, _, examples = (inspect.getdoc(function) or "").partition(f"\n{_EXAMPLES}\n")
    return text.strip(), [line.strip() for line in examples.splitlines() if line.strip()]


def epilog(examples: list[str]) -> str | None:
    """Return the examples as the end of a help page, with empty lines between, as typer drops single line breaks."""
    return "\n\n".join([_EXAMPLES, *examples]) if examples else None


def set_metavars(function: Callable[..., Any]) -> None:
    """Set the metavar of each option of a command: N, X, PATH, TEXT, or its choices."""
    hints = get_type_hints(function, include_extras=True)
    function.__annotations__ = hints  # else typer evaluates the strings again, into other objects
    for hint in hints.values():
        if get_origin(hint) is Annotated:
            kind, info = get_args(hint)[:2]
            if info.metavar is None:
                info.metavar = _choose_metavar(kind)


def _choose_metavar(kind: Any) -> str:
    while get_args(kind) and get_origin(kind) is not Literal:  # unwrap `X | None` and `list[X]`
        kind = next(inner for inner in get_args(kind) if inner is not NoneType)
    return "|".join(get_args(kind)) if get_origin(kind) is Literal else _METAVARS[kind.__name__]
