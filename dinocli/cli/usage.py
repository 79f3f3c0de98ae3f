"""Parser errors as one line that names the given value, and one hint that says what to type."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from typing import Any

from dinocli.core.config import MEANT, find_keys
from dinocli.core.errors import DinoError, nearest
from dinocli.method import shipped

# Options of other tools and of the original DINO code, each with the option of this tool.
_SAME = {
    "--output": "--out", "--output-dir": "--out", "--save-dir": "--out", "--logdir": "--out", "--name": "--out",
    "--num-workers": "--workers", "--num-epochs": "--epochs", "--max-epochs": "--epochs", "--batch": "--batch-size",
    "--bs": "--batch-size", "--batch-size-per-gpu": "--batch-size", "--max-steps": "--steps", "--iterations": "--steps",
    "--pretrained": "--init", "--pretrained-weights": "--init", "--weights": "--init", "--config": "--preset",
    "--arch": "--preset", "--model": "--preset", "--backbone": "--preset", "--cuda": "--device", "--gpu": "--gpus",
    "--nproc-per-node": "--gpus", "--saveckp-freq": "--save-every", "--checkpoint-every": "--save-every",
    "--val": "--monitor", "--gradient-checkpointing": "--recompute", "--grad-accum": "--accumulate",
    "-b": "--batch-size", "-e": "--epochs", "-o": "--out", "-j": "--workers", "-p": "--preset", "-d": "--device",
}  # fmt: skip
_RESUMES = ("--resume", "--continue", "--resume-from", "--restart", "--auto-resume", "--load")
_IMAGES = ("--data", "--data-path", "--dataset", "--images", "--input", "--train", "--data-dir")


def explain(error: Any, words: Sequence[str]) -> tuple[str, str]:
    """Return the message and the hint for a usage error.

    Args:
        error: Usage error raised by typer's parser.
        words: Command line without the program name.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "dino"
    help_ = f"{command} --help"
    said = " ".join(error.format_message().replace("Value error, ", "").split()).rstrip(".")
    if getattr(error, "possibilities", None) is not None or said.startswith("No such option"):
        name = str(error.option_name)
        options = [option for param in context.command.params for option in param.opts] if context else []
        return f"No such option: {name}", _suggest_option(
            command, name, _find_value(name, words), options, words
        ) or help_
    if said.startswith("Got unexpected extra argument"):
        extra = re.sub(r"^[^(]*(\(s\) )?\(|\)$", "", said).split() or [""]
        message = f"{command} takes no argument {extra[0]}" + (f" and {len(extra) - 1} more" if extra[1:] else "")
        return message, _suggest_place(command, words, extra) or help_
    if said.startswith("Missing argument"):
        what = said.removeprefix("Missing argument").strip(" '")
        example = "dino pretrain ./images --preset tiny; see " if command == "dino pretrain" else ""
        return f"{command} needs {what}", f"{example}{help_}"
    if said.startswith("No such command"):
        name = said.split("'")[1]
        close = nearest(name, context.command.commands if context else [], least=0.6)
        return said, f"dino {close}; see {help_}" if close else help_
    param = getattr(error, "param", None)
    if param is not None and said.startswith("Invalid value"):
        return _explain_value(max(param.opts, key=len), said.partition(": ")[2], words) or (said, help_)
    return said, help_


def _find_value(option: str, words: Sequence[str]) -> str | None:
    """Return the value given for an option, or None if the option or its value is missing."""
    for i, word in enumerate(words):
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
        if word == option:
            after = words[i + 1] if i + 1 < len(words) else None
            return None if after is None or re.match(r"-[^\d.]", after) else after
    return None


def _suggest_option(command: str, name: str, value: str | None, options: list[str], words: Sequence[str]) -> str:
    """Return the hint for an unknown option, or an empty string if no known option or key is similar."""
    typed = f" {shlex.quote(value)}" if value is not None else ""
    spelled = name.replace("_", "-").lower()
    if spelled in options:
        return f"use {spelled}{typed}"
    if command == "dino pretrain":
        if spelled in _RESUMES:
            return f"remove {name}: the same command resumes its run; name another run with --out RUN"
        if spelled in _IMAGES:
            return f"give the images without an option: dino pretrain{typed or ' IMAGES'}"
    if (same := _SAME.get(spelled)) in options:
        if same == "--preset" and value not in [*shipped.names(), *shipped.stages()]:
            return f"use --preset NAME (dino presets lists them), or --set backbone.name={value or 'NAME'}"
        return f"use {same}{typed}"
    keys = _find_keys_of_preset(spelled.lstrip("-"), words) if "--set" in options and command == "dino pretrain" else []
    close = nearest(spelled, options, least=0.85 if keys else 0.75)
    if keys and (not close or spelled.lstrip("-").replace("-", "_") in MEANT):
        return "use " + " or ".join(f"--set {key}={value if value is not None else 'VALUE'}" for key in keys[:3])
    return f"use {close}{typed}" if close else ""


def _find_keys_of_preset(word: str, words: Sequence[str]) -> list[str]:
    """Return the preset keys that a word may mean, for the preset on the command line, without importing torch."""
    try:
        data = tomllib.loads(shipped.text(_find_value("--preset", words) or "vits16"))
    except DinoError:
        data = tomllib.loads(shipped.text("vits16"))
    return [key for key in find_keys(word, data) if not key.startswith("about.")]


def _suggest_place(command: str, words: Sequence[str], extra: list[str]) -> str:
    """Return the hint for surplus arguments, or an empty string if none fits."""
    if hint := suggest_set(words, extra):
        return hint
    if command == "dino knn" and extra[0].isdecimal():
        return f"use --k {extra[0]}"
    if command in ("dino knn", "dino linear", "dino dedup"):
        return f"use --features {shlex.quote(extra[0])}"
    return ""


def suggest_set(words: Sequence[str], extra: Sequence[str]) -> str:
    """Return the hint for words that belong to the value of --set before them, or an empty string if none does."""
    at = words.index(extra[0]) if extra[0] in words else 0
    if at >= 2 and words[at - 2] == "--set":
        if "=" not in words[at - 1] and "=" not in extra[0]:
            return f"use --set {words[at - 1]}={extra[0]}"
        return f"quote the value: --set '{' '.join([words[at - 1], *extra])}'"
    if "--set" in words and re.search(r"[\]}]$|^[\w.]+=", extra[-1]):
        return "quote the value: --set 'KEY=[0.5, 0.5]' or --set 'KEY={kind=\"constant\", value=0.1}'"
    return ""


def _explain_value(option: str, said: str, words: Sequence[str]) -> tuple[str, str] | None:
    """Return the message and the hint for an invalid option value, or None if the parser's error is not recognised."""
    value = _find_value(option, words)
    if value is None or not option.startswith("-"):
        return None
    came = f"{option} {value}"
    if value.strip("+-").lower() in ("nan", "inf", "infinity"):
        return f"{came} is not a finite number", f"use {option} NUMBER"
    if least := re.search(r"greater than or equal to (-?[\d.]+)|x>=(-?[\d.]+)", said):
        bound = least[1] or least[2]
        return f"{came} is too small; expected {bound} or more", f"use {option} {bound} or more"
    if most := re.search(r"less than or equal to (-?[\d.]+)|x<=(-?[\d.]+)", said):
        bound = most[1] or most[2]
        return f"{came} is too large; expected {bound} or less", f"use {option} {bound} or less"
    if "integer" in said:
        return f"{came} is not a whole number", f"use {option} N, such as {option} 4"
    if "is not one of" in said:
        choices = re.findall(r"'([^']*)'", said.partition("is not one of")[2])
        close = nearest(value, choices)
        return f"{came} is not one of {', '.join(choices)}", f"use {option} {close}" if close else ""
    return None
