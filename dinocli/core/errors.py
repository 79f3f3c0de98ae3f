"""Errors that users can fix, and names made safe to print."""

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


def visible(text: str) -> str:
    r"""Escape what a terminal or a browser obeys or hides: a name "a\x1b[2J\n.jpg" is shown as these characters.

    Escaped are control and direction marks, line ends, and bytes that are not valid text.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(sign: str) -> str:
    # Arabic, Indian scripts and emoji need the two joiners.
    if sign.isprintable() or unicodedata.category(sign) not in _OBEYED or sign in "\u200c\u200d":
        return sign
    code = ord(sign)
    if 0xDC80 <= code <= 0xDCFF:  # Python's surrogate for a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()


_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories: control, format, surrogate, line, paragraph


def nearest(word: str, words: Iterable[str], least: float = 0.0) -> str:
    """Return the most similar of `words`, or an empty string if none is similar enough.

    Args:
        word: Word that was typed.
        words: Valid words.
        least: Lowest similarity, from 0 for any word to 1 for equal ones; a ratio of `difflib`.
    """
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=least)
    return close[0] if close else ""
