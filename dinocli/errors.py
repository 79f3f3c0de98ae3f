"""What a user did wrong, said so that it can be mended."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


class DinoError(Exception):
    """A mistake that the user can mend.

    Args:
        message: One line: what was wanted and what came.
        hint: One line: what to type instead.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.add_note(f"hint: {hint}")  # for whoever meets it in Python and not in the command line

    def __reduce__(self) -> tuple[type[DinoError], tuple[str, str]]:
        # A worker process hands its mistake to the one that started it.
        return DinoError, (self.message, self.hint)


def visible(text: str) -> str:
    r"""Escape what a terminal or a browser obeys or hides: a name "a\x1b[2J\n.jpg" is shown as these characters.

    These are control and direction marks, ends of lines, and bytes that are no letters.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(sign: str) -> str:
    # Arabic, Indian scripts and emoji need the two joiners.
    if sign.isprintable() or unicodedata.category(sign) not in _OBEYED or sign in "\u200c\u200d":
        return sign
    code = ord(sign)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()


_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's categories: control, format, surrogate, line, paragraph


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of `words` that looks most like `word`; there is always one to name."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return close[0] if close else ""
