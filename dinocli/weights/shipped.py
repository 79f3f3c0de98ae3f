"""Networks that come with the package, so that every command has one to show: `dinocli:NAME`."""

from __future__ import annotations

from pathlib import Path

from dinocli.core.errors import DinoError, nearest

PREFIX = "dinocli:"
_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the networks, without the prefix."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def place_of(source: Path) -> Path:
    """Return the file of a network such as `dinocli:mini`; any other path is returned unchanged.

    Raises:
        DinoError: If there is no network of this name.
    """
    if not str(source).startswith(PREFIX):
        return source
    name = str(source).removeprefix(PREFIX)
    if name not in names():
        known = ", ".join(PREFIX + each for each in names())
        raise DinoError(
            f"no network {source} comes with the package; expected {known}", PREFIX + nearest(name, names())
        )
    return _FOLDER / f"{name}.safetensors"
