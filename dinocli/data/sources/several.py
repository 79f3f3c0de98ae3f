"""Sources named by several paths, with weights or patterns."""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import extra_for
from dinocli.data.sources.indexed import Images
from dinocli.data.sources.joined import join_images
from dinocli.data.sources.kinds import kind_of
from dinocli.data.sources.listing import ARRAY, JUNK, SUFFIXES, Names
from dinocli.data.sources.open import Source, is_archive, open_source
from dinocli.data.sources.outputs import SIGNS, Ours, is_output, is_sheet, recognise
from dinocli.data.sources.parquet import is_parquet, open_parquet
from dinocli.data.sources.parts import holder_of
from dinocli.data.sources.pixels import is_pixels
from dinocli.data.sources.shards import is_shards, open_shards
from dinocli.data.sources.tar import PIPE, is_stream
from dinocli.data.sources.tar_files import list_tar

# A number at the end, but not the port of an address.
_WEIGHT = re.compile(r"(?!\w+://[^/]*$)(.+):(\d+\.?\d*|\.\d+)")
_NAMED = 6  # outputs listed by name in a note


def open_sources(specs: Sequence[str]) -> Source:
    """Open one or several sources as one.

    Args:
        specs: Sources as for `open_source`, patterns (`photos/2024-*`), and image files, also of several images.
            With a weight after each, `A:0.7 B:0.3`, an epoch has as many images as all sources together, in these
            proportions. Without weights, it has each image once.

    Raises:
        DinoError: If a source does not exist or holds no image, or only some have a weight.
    """
    places, weights = zip(*map(split_weight, specs), strict=True)
    if None not in weights:
        return _mix(specs, places, [weight or 0 for weight in weights])
    if any(weights):
        bare = places[weights.index(None)]
        place, _, typed = bare.rpartition(":")
        if place and os.path.exists(place):
            raise DinoError(f"the weight {typed!r} of {place} is not a number", f"{place}:0.7")
        if bare.startswith(PIPE):
            raise _refuse_stream(bare)
        raise DinoError(f"{bare} has no weight, but other sources have one", f"add one, such as {bare}:1")
    ours = list[str]()
    expanded = list(dict.fromkeys(path for place in places for path in expand(place, ours)))
    opened = _open_expanded(shlex.join(specs), expanded)
    if not ours:
        return opened
    named = ", ".join([*ours[:_NAMED], *([f"{len(ours) - _NAMED} more"] if ours[_NAMED:] else [])])
    return replace(opened, notes=(*opened.notes, f"ignoring {named}: written by dino"))


def _open_expanded(where: str, expanded: Sequence[str]) -> Source:
    for path in expanded:
        _refuse_missing_extra(path)
    if len(expanded) == 1 and not _is_photo(expanded[0]):
        return open_source(expanded[0])
    if all(is_shards(path) and not is_archive(path) for path in expanded):
        return open_shards(*expanded)
    if all(map(is_parquet, expanded)):  # as one source, which keeps few row groups in memory
        return open_parquet(*expanded)
    files = [path for path in expanded if _is_photo(path)]
    labels, held = np.full(len(files), -1, np.int32), any(holder_of(path) for path in files)
    title = files[0] if len(files) == 1 else "image files"
    loose = [Images(title, Path(), Names.of(files), [], labels, held=held)] if files else []
    opened = [_indexed(open_source(path)) for path in expanded if not _is_photo(path)]
    return join_images(where, [*loose, *opened])


def split_weight(spec: str) -> tuple[str, float | None]:
    """Split `PLACE:WEIGHT`; the weight is None if there is none. A pipe has none.

    Raises:
        DinoError: If the weight is 0.
    """
    # The end of a command may look like a weight: `--endpoint-url http://localhost:9000`.
    found = None if spec.startswith(PIPE) or os.path.exists(spec) else _WEIGHT.fullmatch(spec)
    if not found:
        return spec, None
    if not float(found[2]):
        raise DinoError(f"{spec} has the weight 0; expected a positive number", f"remove it, or {found[1]}:0.1")
    return found[1], float(found[2])


def expand(place: str, ours: list[str]) -> list[str]:
    """Return the paths that match a pattern, sorted, or the place itself if it is no pattern or one of tar shards.

    As in a folder, outputs of this tool are ignored.

    Args:
        place: Path, address or pattern.
        ours: List to which the outputs that match are added; folders end with a slash.

    Raises:
        DinoError: If nothing matches.
    """
    local = not (place.startswith(PIPE) or "://" in place or place.lower().endswith(".tar"))
    if os.path.exists(place) or not (local and glob.has_magic(place)):
        return [place]
    found = sorted(glob.glob(place, recursive=True))
    if not found:
        raise DinoError(f"nothing matches the pattern {place}; expected images", "check the pattern with `ls`")
    base = os.path.dirname(place)
    while glob.has_magic(base):
        base = os.path.dirname(base)
    outputs = _outputs(base, found)
    ours += dict.fromkeys(filter(None, outputs.values()))
    kept = [path for path, output in outputs.items() if not output and JUNK.isdisjoint(path[len(base) :].split(os.sep))]
    if not kept:
        raise DinoError(
            f"the pattern {place} matches only outputs of dino, such as {ours[-1] if ours else found[0]}",
            "name a folder of outputs itself to read its pictures",
        )
    # As in a folder, arrays next to images are mostly their features, masks or labels.
    images = [path for path in kept if not path.lower().endswith(ARRAY)]
    return kept if place.lower().endswith(ARRAY) or not any(map(_is_photo, images)) else images


def _outputs(base: str, paths: Sequence[str]) -> dict[str, str]:
    """Return the output that each path below a folder belongs to; empty if none. The folder itself is no output."""

    @cache
    def recognised(folder: str) -> Ours:
        return recognise(folder, SIGNS.intersection(os.listdir(folder or ".")))

    @cache
    def output(path: str) -> str:
        folder, name = os.path.split(path)
        if path in (base, folder):
            return ""
        if above := output(folder):
            return above
        if recognised(folder).hides.fullmatch(name) or is_sheet(folder, name):
            return path
        return f"{path}/" if os.path.isdir(path) and recognised(path).whole else ""

    def match(path: str) -> str:
        if not os.path.isdir(path):
            return output(path)
        if is_shards(path) or is_pixels(path):  # packed images are written to be read
            return ""
        return output(path) or (f"{path.rstrip(os.sep)}/" if path.rstrip(os.sep) != base and is_output(path) else "")

    return {path: match(path) for path in paths}


def _is_photo(path: str) -> bool:
    """Return whether a path is a file of one image or, with the right setting, of several."""
    known = os.path.splitext(path)[1].lower() in {*SUFFIXES, ARRAY}
    return (known or holder_of(path) is not None) and os.path.isfile(path)


def _refuse_missing_extra(path: str) -> None:
    extra = extra_for(kind_of(os.path.basename(path)))
    if extra and not extra.installed and os.path.isfile(path):
        raise DinoError(f"{path} needs the package {extra.package}, which is not installed", extra.pip)


def _mix(specs: Sequence[str], places: Sequence[str], weights: Sequence[float]) -> Images:
    return join_images(shlex.join(specs), [_indexed(open_sources([place])) for place in places], weights)


def _indexed(source: Source) -> Images:
    """Return the images of shards with random access, which joined sources need.

    Raises:
        DinoError: If the shards come from a pipe.
    """
    if isinstance(source, Images):
        return source
    if any(map(is_stream, source.urls)):
        raise _refuse_stream(source.where)
    return join_images(source.where, [list_tar(Path(url)) for url in source.urls])


def _refuse_stream(where: str) -> DinoError:
    return DinoError(
        f"{where} is a stream; sources that are joined need random access", "name local tar files, or the stream alone"
    )
