"""Old spellings of commands and options, accepted until version 0.3 with a note that names the new one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinocli.cli.words import value_of

_UNTIL = "version 0.3"
# Old options by command, each with its new spelling.
_OPTIONS: dict[str, dict[str, str]] = {
    "attn-map": {"--keep": "--mass", "--size": "--short-side"},
    "segment": {
        "--keep": "--mass", "--size": "--short-side", "--head": "--classifier", "--pca": "--by pca",
    },
    "match": {"--size": "--short-side", "--sd-size": "--sd-long-side"},
    "track": {"--size": "--short-side", "--top": "--k"},
    "pack": {"--side": "--short-side"},
    "export": {"--heads": "--projection-head"},
    "pretrain": {"--tensorboard": "--log tensorboard"},
}  # fmt: skip
# Options that moved to another command: by old command and option, the new command and the option's new spelling.
# With an empty spelling, the option's value becomes an argument.
_MOVED: dict[tuple[str, str], tuple[str, str]] = {
    ("search", "--evaluate"): ("eval retrieval", ""),
    ("segment", "--evaluate"): ("eval segment", "--truth"),
    ("segment", "--train"): ("eval segment", "--train"),
    ("match", "--keypoints"): ("eval match", "--keypoints"),
    ("track", "--evaluate"): ("eval track", "--truth"),
}
_RETRIEVAL = {"--data": "--images", "--size": "--long-side"}


def renew(words: Sequence[str]) -> tuple[list[str], str]:
    """Return a command line in the new spelling, and a note that names it. The note is empty if nothing was old.

    Args:
        words: Command line without the program name.
    """
    if not words:
        return [], ""
    end = words.index("--") if "--" in words else len(words)
    command, typed = words[0], words[1:end]
    options = dict(_OPTIONS.get(command, {}))
    if command == "segment" and "--pca" in typed:
        options["--by"] = "--foreground"
    said, now = [], command
    for (old, mark), (moved, spelling) in _MOVED.items():
        if old == command and (value := value_of(typed, [mark])) is not None:
            now = moved
            if old == "search" and Path(value).is_dir():
                now = "eval copies"
            elif old == "search":
                options |= _RETRIEVAL
            options[mark] = spelling
            said.append(f"dino {old} {mark} is now dino {now} {spelling}".rstrip())
            break
    given = {word.partition("=")[0] for word in typed}
    said += [f"{old} is now {new}" for old, new in options.items() if old in given and (command, old) not in _MOVED]
    note = f"{', '.join(said)}; the old spelling works until {_UNTIL}" if said else ""
    return [*now.split(), *_respell(typed, options), *words[end:]], note


def _respell(typed: Sequence[str], options: Mapping[str, str]) -> list[str]:
    words: list[str] = []
    for word in typed:
        name, equals, value = word.partition("=")
        if name not in options:
            words.append(word)
        elif equals:
            words.append(f"{options[name]}={value}" if options[name] else value)
        else:
            words += shlex.split(options[name])
    return words
