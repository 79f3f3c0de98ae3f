"""Command line as words, which hints reorder or complete."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinocli.core.config import is_number
from dinocli.core.errors import DinoError

_WORDS = "dinocli.words"


class Misuse(DinoError):
    """Usage error, which ends a command with exit code 2."""


@dataclass(frozen=True)
class Words:
    """Words after a command, sorted into options and positional words as its parser does.

    Attributes:
        command: Command name with its group, such as `eval match`.
        typed: All words after the command, including options.
        places: Indexes of the positional words in `typed`.
        known: Options of the command, each with True if it takes a value.
    """

    command: str
    typed: list[str]
    places: list[int]
    known: dict[str, bool]

    @classmethod
    def of(cls, command: str, typed: Sequence[str], parameters: Sequence[Any]) -> Words:
        """Sort the words after a command by the parameters of that command."""
        options = [p for p in parameters if p.param_type_name == "option"]
        known = {name: not p.is_flag for p in options for name in (*p.opts, *p.secondary_opts)}
        places: list[int] = []
        i = 0
        while i < len(typed):
            word = typed[i]
            if word == "--":
                places += range(i + 1, len(typed))
                break
            if is_option(word):
                i += 1 + known.get(word, False)
                continue
            places.append(i)
            i += 1
        return cls(command, list(typed), places, {**known, "--help": False})

    def keep(self, context: Any) -> None:
        """Store the words in the context, where the callbacks of single arguments find them with `words_of`."""
        context.meta[_WORDS] = self

    @property
    def positional(self) -> list[str]:
        """Words that are neither options nor their values."""
        return [self.typed[i] for i in self.places]

    def value(self, options: Sequence[str]) -> str:
        """Return the value typed for an option, or an empty string."""
        return value_of(self.typed, options) or ""

    def again(self, instead: Mapping[int, Sequence[str]], *more: str) -> str:
        """Return the whole command line with the words at some indexes replaced, and `more` words appended."""
        words = [new for i, word in enumerate(self.typed) for new in instead.get(i, [word])]
        return shlex.join(["dino", *self.command.split(), *words, *more])

    def ordered(self, positional: Sequence[str], *more: str) -> str:
        """Return the whole command line with its positional words replaced, and `more` words appended."""
        instead: dict[int, Sequence[str]] = {i: [] for i in self.places}
        if not self.places:
            return self.again({}, *positional, *more)
        *earlier, last = self.places
        instead |= {i: [word] for i, word in zip(earlier, positional, strict=False)}
        instead[last] = positional[len(earlier) :]
        return self.again(instead, *more)


def value_of(typed: Sequence[str], options: Sequence[str]) -> str | None:
    """Return the value of whichever of the options comes first: empty if no word follows, None if none is given."""
    for i, word in enumerate(typed):
        name, equals, value = word.partition("=")
        if name in options:
            return value if equals else typed[i + 1] if i + 1 < len(typed) else ""
    return None


def is_option(word: str) -> bool:
    """Return whether a word looks like an option: it begins with a hyphen and is not a number."""
    return word.startswith("-") and len(word) > 1 and not is_number(word)


def words_of(context: Any) -> Words:
    """Return the words stored for the command being parsed."""
    words: Words = context.meta[_WORDS]
    return words
