"""Views of 2x224 + 8x96 by other packages, for benchmarks/data.py, which starts this in an environment with them.

For each line on stdin it makes the views of all photos, and prints the processor seconds. See `other_views.sh`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

WAYS = {"lightly-train": "lightly-train's DINO transform", "torchcodec": "torchvision v2 after torchcodec"}


def lightly_train(locals_: int) -> Callable[[Path], Any]:
    """Return the reading and the views of lightly-train's data set, with the scales and factors of DINO."""
    import cv2
    from lightly_train._data.file_helpers import ImageMode, open_image_numpy
    from lightly_train._methods.dino.dino_transform import DINOTransform, DINOTransformArgs

    cv2.setNumThreads(0)
    settings = DINOTransformArgs(num_channels=3)
    settings.random_resize.min_scale = 0.25
    settings.color_jitter.strength = 0.5  # of 0.8, 0.8, 0.4 and 0.2
    settings.local_view.num_views, settings.local_view.random_resize.max_scale = locals_, 0.25
    transform = DINOTransform(settings)
    return lambda path: [view["image"] for view in transform({"image": open_image_numpy(path, mode=ImageMode.RGB)})]


def torchcodec(locals_: int) -> Callable[[Path], Any]:
    """Return torchvision v2's pipelines, from torchcodec's decoding."""
    from data import per_crop_v2
    from torchcodec.decoders import ImageReadMode, decode_image

    pipelines = per_crop_v2()

    def views(path: Path) -> list[torch.Tensor]:
        image = decode_image(str(path), mode=ImageReadMode.RGB)
        return [pipeline(image) for pipeline in pipelines]

    return views


def main() -> None:
    """Serve one measurement per line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("photos", nargs="+", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    views = {"lightly-train": lightly_train, "torchcodec": torchcodec}[chosen.way](8)
    for _ in sys.stdin:
        began = time.process_time()
        for path in chosen.photos:
            made = views(path)
            torch.stack(made[:2]), torch.stack(made[2:])
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    main()
