"""Presets that ship with the tool: their names and their text, read without importing torch."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from dinocli.core.errors import DinoError, nearest

# From the cheapest to the most expensive, the order in which users try them.
_ORDER = ("tiny", "vits16", "vits8", "vitb16", "vitb8", "resnet50")


def _folder() -> Traversable:
    """Return the folder of the presets: part of the installed package, or beside the package in a checkout.

    Raises:
        DinoError: If it is in neither place.
    """
    try:
        return files("dinocli.presets")
    except ModuleNotFoundError:
        beside = Path(__file__).parents[2] / "presets"
        if (beside / "tiny.toml").is_file():
            return beside
        raise DinoError(f"the presets are not installed, and {beside} has none", "pip install .") from None


def names() -> list[str]:
    """Return the names of the shipped presets: known ones in a fixed order, then new ones."""
    found = {f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml")}
    return sorted(found, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def text(name: str) -> str:
    """Return the TOML text of a shipped preset.

    Raises:
        DinoError: If there is no preset of that name; the hint names the nearest one.
    """
    if name not in names():
        # timm and the papers write vit_s16 and ViT-S/16 for vits16.
        plain = {re.sub(r"[^a-z0-9]", "", known): known for known in reversed(names())}
        close = plain[nearest(re.sub(r"[^a-z0-9]", "", name.lower()), plain)]
        raise DinoError(f"there is no preset {name!r}", f"use --preset {close}; `dino presets` lists them")
    return (_folder() / f"{name}.toml").read_text(encoding="utf-8")
