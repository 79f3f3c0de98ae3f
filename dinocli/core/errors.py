"""Errors that users can fix, and escaping of names for printing."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class DinoError(Exception):
    """Error that the user can fix.

    Args:
        message: One line: the value that came, and what is valid.
        hint: One line: what to type instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.add_note(f"hint: {hint}")  # shown in a Python traceback, where no command line prints it

    def __reduce__(self) -> tuple[type[DinoError], tuple[str, str]]:
        # Worker processes pickle their error for the parent; the default would lose the hint.
        return DinoError, (self.message, self.hint)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's text; its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def visible(text: str) -> str:
    r"""Escape characters that a terminal or a browser interprets or hides, such as the escape character as `\x1b`.

    These are control and text direction characters, line ends, and bytes that are not valid text.
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    # Arabic, Indian scripts and emoji need the two joiners.
    if (
        character.isprintable()
        or unicodedata.category(character) not in _CONTROL_CATEGORIES
        or character in "\u200c\u200d"
    ):
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # Python's surrogate for a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


_CONTROL_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # of Unicode: control, format, surrogate, line, paragraph


def nearest(word: str, words: Iterable[str], least: float = 0.0) -> str:
    """Return the valid word that is most similar to `word`, or an empty string if none is similar enough.

    Args:
        word: Word that was typed.
        words: Valid words.
        least: Minimum similarity, from 0 for any word to 1 for equal ones; a ratio of `difflib`.
    """
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=least)
    return close[0] if close else ""
