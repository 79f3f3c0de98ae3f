"""What a user did wrong, said so that it can be mended."""

from __future__ import annotations

import difflib
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


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of `words` that looks most like `word`; there is always one to name."""
    words = sorted(words)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return close[0] if close else ""
