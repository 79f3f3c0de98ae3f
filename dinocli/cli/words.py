"""Words of a command line, which hints reorder or complete."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinocli.core.errors import DinoError

_WORDS = "dinocli.words"


class Misuse(DinoError):
    """Usage error, which ends a command with exit code 2."""


@dataclass(frozen=True)
class Words:
    """Words after a command, split by its parser's rules.

    Attributes:
        command: Command name, with its group's name.
        typed: All words, with options.
        places: Indexes of the positional words.
        known: Options of the command; True if one takes a value.
    """

    command: str
    typed: list[str]
    places: list[int]
    known: dict[str, bool]

    @classmethod
    def of(cls, command: str, typed: Sequence[str], parameters: Sequence[Any]) -> Words:
        """Split words by the parameters of their command."""
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
        """Store the words in the context, for `words_of` in the checks of single arguments."""
        context.meta[_WORDS] = self

    @property
    def positional(self) -> list[str]:
        """Positional words."""
        return [self.typed[i] for i in self.places]

    def value(self, options: Sequence[str]) -> str:
        """Return the value typed for an option, or an empty string."""
        return value_of(self.typed, options) or ""

    def again(self, instead: Mapping[int, Sequence[str]], *more: str) -> str:
        """Return the command with words at some indexes replaced, and more words at its end."""
        words = [new for i, word in enumerate(self.typed) for new in instead.get(i, [word])]
        return shlex.join(["dino", *self.command.split(), *words, *more])

    def ordered(self, positional: Sequence[str], *more: str) -> str:
        """Return the command with its positional words replaced."""
        instead: dict[int, Sequence[str]] = {i: [] for i in self.places}
        if not self.places:
            return self.again({}, *positional, *more)
        *earlier, last = self.places
        instead |= {i: [word] for i, word in zip(earlier, positional, strict=False)}
        instead[last] = positional[len(earlier) :]
        return self.again(instead, *more)


def value_of(typed: Sequence[str], options: Sequence[str]) -> str | None:
    """Return the value typed for the first of some options, empty if it ends the line; None without the option."""
    for i, word in enumerate(typed):
        name, equals, value = word.partition("=")
        if name in options:
            return value if equals else typed[i + 1] if i + 1 < len(typed) else ""
    return None


def is_option(word: str) -> bool:
    """Return whether a word has the form of an option."""
    return word.startswith("-") and len(word) > 1 and not is_number(word)


def is_number(word: str) -> bool:
    """Return whether a word is a number."""
    return re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?", word) is not None


def words_of(context: Any) -> Words:
    """Return the words of the command that is being parsed."""
    words: Words = context.meta[_WORDS]
    return words
