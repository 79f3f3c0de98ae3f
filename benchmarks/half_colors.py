"""Difference between crops of JPEGs whose colors at half resolution are interpolated, as by libjpeg, or repeated.

    pip install simplejpeg
    python benchmarks/half_colors.py PHOTOS

torchvision's nvJPEG repeats them. Here libjpeg-turbo does so on a CPU, in its fast mode. Photos with other colors are
skipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from dinocli.data.views.crops import crop_boxes, crop_tries, cut, uniforms

VIEWS = {224: (0.25, 1.0), 96: (0.05, 0.25)}  # side and areas of global and local crops


def differences(data: bytes, number: int) -> list[tuple[float, float]]:
    """Return the mean and the largest difference of a crop of each kind, in levels."""
    import simplejpeg  # only here: the project does not depend on it

    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    interpolated, repeated = (simplejpeg.decode_jpeg(data, fastupsample=fast) for fast in (False, True))
    numbers, _ = uniforms(0, 0, number, len(VIEWS))
    (tries,) = crop_tries(numbers[None], np.array(list(VIEWS.values())))
    found = []
    for side, box in zip(VIEWS, crop_boxes(tries, height, width), strict=True):
        crops = (cut(pixels, box, (side, side)).int() for pixels in (interpolated, repeated))
        difference = np.abs(np.subtract(*(crop.numpy() for crop in crops)))
        found.append((float(difference.mean()), float(difference.max())))
    return found


def main() -> None:
    """Print the table."""
    import simplejpeg

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    files = [path.read_bytes() for path in sorted(Path(parser.parse_args().photos).rglob("*")) if path.is_file()]
    half = [data for data in files if simplejpeg.decode_jpeg_header(data)[2:] == ("YCbCr", "420")]
    found = np.array([differences(data, number) for number, data in enumerate(half)])  # [photos, views, 2]
    table = Table("crop", "mean difference", "its largest", "largest difference, median", "its largest")
    for side, each in zip(VIEWS, found.swapaxes(0, 1), strict=True):
        mean, most = each.T
        table.add_row(
            f"{side} pixels", f"{mean.mean():.2f}", f"{mean.max():.2f}", f"{np.median(most):.0f}", f"{most.max():.0f}"
        )
    console = Console(width=120)
    console.print(f"{len(half)} of {len(files)} photos have colors at half resolution; differences in levels")
    console.print(table)


if __name__ == "__main__":
    main()
