from __future__ import annotations

import pytest

from dinocli.core.errors import DinoError, nearest, visible


def test_an_error_carries_its_hint() -> None:
    error = DinoError("--k is 5; expected at most 4", "use --k 4")
    assert (str(error), error.hint) == ("--k is 5; expected at most 4", "use --k 4")


def test_nearest_returns_the_most_similar_word() -> None:
    assert nearest("epoch", ["batch_size", "epochs", "seed"]) == "epochs"
    assert nearest("zzz", ["only"]) == "only"
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    "name", ["plain.jpg", "a b\u3000c\xa0d.jpg", "日本語.jpg", "é ñ", "می\u200cخواهم", "👩\u200d🔬.png", "C:\\x"]
)
def test_names_in_any_script_are_not_escaped(name: str) -> None:
    assert visible(name) == name


@pytest.mark.parametrize(
    ("sign", "shown"),
    [
        ("\x1b", r"\x1b"), ("\n", r"\n"), ("\r", r"\r"), ("\t", r"\t"), ("\a", r"\x07"), ("\0", r"\x00"), ("\x7f", r"\x7f"),
        ("\x9b", r"\x9b"), ("\x85", r"\x85"), ("\u202e", r"\u202e"), ("\u2066", r"\u2066"), ("\u200f", r"\u200f"),
        ("\u2028", r"\u2028"), ("\u2029", r"\u2029"), ("\ufeff", r"\ufeff"), ("\xad", r"\xad"), ("\U000e0041", r"\U000e0041"),
        ("\udce9", r"\xe9"), ("\ud800", r"\ud800"),
    ],
    ids=ascii,
)  # fmt: skip
def test_characters_that_a_terminal_interprets_are_escaped(sign: str, shown: str) -> None:
    assert visible(f"a{sign}[31m.jpg") == f"a{shown}[31m.jpg"
    visible(f"a{sign}").encode()
