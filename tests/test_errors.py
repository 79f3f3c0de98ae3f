from __future__ import annotations

from dinocli.errors import DinoError, nearest


def test_an_error_carries_its_hint() -> None:
    error = DinoError("five came", "--give four")
    assert (str(error), error.hint) == ("five came", "--give four")


def test_the_nearest_word() -> None:
    assert nearest("epoch", ["batch_size", "epochs", "seed"]) == "epochs"
    assert nearest("zzz", ["only"]) == "only"
    assert nearest("x", []) == ""
