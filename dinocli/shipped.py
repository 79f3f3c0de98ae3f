"""The presets that ship with the tool: their names and their text, read without importing torch."""

from __future__ import annotations

from importlib.resources import files

from dinocli.errors import DinoError, nearest

# From the cheapest to the dearest, so that a list reads in the order in which one tries them.
_ORDER = ("tiny", "vits16", "vits8", "vitb16", "vitb8", "resnet50")


def names() -> list[str]:
    """The shipped presets, known ones in a set order and new ones after them."""
    found = {f.name.removesuffix(".toml") for f in files("dinocli.presets").iterdir() if f.name.endswith(".toml")}
    return sorted(found, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def text(name: str) -> str:
    """The TOML text of a shipped preset.

    Raises:
        DinoError: There is no preset of that name; the hint names the nearest one.
    """
    if name not in names():
        raise DinoError(
            f"there is no preset {name!r}", f"did you mean {nearest(name, names())}? `dino presets` lists them"
        )
    return (files("dinocli.presets") / f"{name}.toml").read_text(encoding="utf-8")
