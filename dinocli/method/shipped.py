"""Names and TOML texts of the presets that ship with the tool, without importing torch."""

from __future__ import annotations

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from dinocli.core.errors import DinoError, nearest

# From the cheapest to the most expensive, the order in which users try them.
_STAGE = ".stage"  # end of a stage's file name before `.toml`
_ORDER = ("tiny", "vits16", "vits8", "vitb16", "vitb8", "resnet50")


def _find_folder() -> Traversable:
    """Return the folder of the presets: inside the installed package, or next to the package in a checkout.

    Raises:
        DinoError: If it is in neither place.
    """
    try:
        return files("dinocli.presets")
    except ModuleNotFoundError:
        checkout = Path(__file__).parents[2] / "presets"
        if (checkout / "tiny.toml").is_file():
            return checkout
        raise DinoError(f"the presets are not installed, and {checkout} has none", "pip install .") from None


def names() -> list[str]:
    """Return the names of the complete shipped presets: first those of `_ORDER`, then all others by name."""
    stems = {stem for stem in _list_stems() if not stem.endswith(_STAGE)}
    return sorted(stems, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))


def stages() -> list[str]:
    """Return the names of the shipped stages, which continue a finished run, by name."""
    return sorted(stem.removesuffix(_STAGE) for stem in _list_stems() if stem.endswith(_STAGE))


def _list_stems() -> list[str]:
    return [f.name.removesuffix(".toml") for f in _find_folder().iterdir() if f.name.endswith(".toml")]


def text(name: str) -> str:
    """Return the TOML text of a shipped preset or stage.

    Raises:
        DinoError: If there is no preset of that name; the hint names the nearest one.
    """
    if name in stages():
        return (_find_folder() / f"{name}{_STAGE}.toml").read_text(encoding="utf-8")
    if name not in names():
        # Users may type the spelling of timm or the papers, vit_s16 or ViT-S/16, for vits16.
        plain = {re.sub(r"[^a-z0-9]", "", known): known for known in reversed([*names(), *stages()])}
        close = plain[nearest(re.sub(r"[^a-z0-9]", "", name.lower()), plain)]
        raise DinoError(f"there is no preset {name!r}", f"use --preset {close}; `dino presets` lists them")
    return (_find_folder() / f"{name}.toml").read_text(encoding="utf-8")
