"""Matching keypoints of two photos, from a table, a list of landmarks or a homography."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinocli.core.checksums import parse
from dinocli.core.errors import DinoError

Points = NDArray[np.float64]
Sizes = tuple[tuple[int, int], tuple[int, int]]
_COLUMNS = ("x_a", "y_a", "x_b", "y_b")
_STEPS = 40  # grid points along the longer side of photo A, to map by a homography
_FORMS = (
    "use a CSV or JSON with x_a, y_a, x_b, y_b; a CSV with a photo and its x, y, x, y ... per row; "
    "or a homography's XML"
)


def read_keypoints(
    path: Path, a: Path, b: Path, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[Points, Points]:
    """Read matching keypoints of two photos, in pixels from the upper left. [P, 2] each

    Args:
        path: CSV or JSON of matching points (`x_a`, `y_a`, `x_b`, `y_b`), one per row; or CSV of landmarks, with the
            photo's name in the first column, then x and y in turn; or XML or text with the nine numbers of a
            homography from A to B. A homography maps a regular grid over A, without
            points that fall outside B.
        a: Path of photo A, whose name selects its landmarks.
        b: Path of photo B, whose name selects its landmarks.
        sizes: Height and width of each photo.

    Raises:
        DinoError: If the file is missing or has another format, does not name a photo, or has no point in both photos.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise _explain_unreadable(path) from None
    except FileNotFoundError:
        raise DinoError(f"{path} does not exist; expected a file of keypoints", "check the path") from None
    try:
        if path.suffix.lower() in (".xml", ".txt"):
            points = _apply_homography(_parse_homography(text), sizes)
        elif path.suffix.lower() == ".json":
            points = _parse_pairs([[row[name] for name in _COLUMNS] for row in parse(text)])
        else:
            points = _read_table(list(csv.reader(text.splitlines())), path, a, b)
    except (ValueError, KeyError, TypeError, IndexError):
        raise _explain_unreadable(path) from None
    is_known = np.isfinite(points[0]).all(1) & np.isfinite(points[1]).all(1)
    if not is_known.any():
        raise DinoError(f"{path} has no point in both photos", _FORMS)
    return points[0][is_known], points[1][is_known]


def landmarks(path: Path) -> dict[str, Points]:
    """Read landmarks from a CSV, by name of the photo; missing values are NaN. [P, 2] each

    Raises:
        DinoError: If the file is no CSV of landmarks.
    """
    try:
        _, *rows = csv.reader(path.read_text(encoding="utf-8-sig").splitlines())
        return {row[0]: _parse_numbers(row[1:]).reshape(-1, 2) for row in rows}
    except (ValueError, IndexError):
        raise _explain_unreadable(path) from None


def _explain_unreadable(path: Path) -> DinoError:
    return DinoError(f"{path} has no readable keypoints", _FORMS)


def _read_table(rows: list[list[str]], path: Path, a: Path, b: Path) -> tuple[Points, Points]:
    head = [name.strip().lower() for name in rows[0]]
    if set(_COLUMNS) <= set(head):
        return _parse_pairs([[row[head.index(name)] for name in _COLUMNS] for row in rows[1:]])
    known = landmarks(path)
    for photo in (a, b):
        if photo.name not in known:
            raise DinoError(
                f"{path} has no row for {photo.name}", f"name one of its {len(known)} photos, or another file"
            )
    return known[a.name], known[b.name]


def _parse_numbers(values: list[str]) -> Points:
    return np.array([float(value) if value.strip() else math.nan for value in values])


def _parse_pairs(rows: list[list[object]] | list[list[str]]) -> tuple[Points, Points]:
    points = np.array([[float(str(value)) for value in row] for row in rows]).reshape(-1, 4)
    return points[:, :2], points[:, 2:]


def _parse_homography(text: str) -> Points:
    """Parse a matrix from XML or text. [3, 3]"""
    data = re.search(r"<data>(.*?)</data>", text, re.DOTALL)
    return np.array([float(word) for word in (data[1] if data else text).split()]).reshape(3, 3)


def _apply_homography(homography: Points, sizes: Sizes) -> tuple[Points, Points]:
    (height, width), (height_b, width_b) = sizes
    step = max(height, width) / _STEPS
    y, x = np.mgrid[step / 2 : height : step, step / 2 : width : step]
    at_a = np.stack([x, y], -1).reshape(-1, 2)
    mapped = np.column_stack([at_a, np.ones(len(at_a))]) @ homography.T
    at_b = mapped[:, :2] / mapped[:, 2:]
    inside = (mapped[:, 2] > 0) & (at_b >= 0).all(1) & (at_b < [width_b, height_b]).all(1)
    return at_a[inside], at_b[inside]
