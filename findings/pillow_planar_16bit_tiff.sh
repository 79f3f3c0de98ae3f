#!/usr/bin/env bash
# Pillow 13.0.0 reads a 16-bit RGB TIFF in planes without an error, and the pixels are wrong unless it is compressed.
#
# An uncompressed TIFF whose three channels lie one after another ("separate") opens in mode RGB. Its pixels differ from
# the upper bytes of the stored values by more than 100 of 255 levels. The same values interleaved, or in planes under
# deflate, are read right, so a test with either of those does not notice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import PIL
import tifffile
from PIL import Image

print(f"Pillow {PIL.__version__}, tifffile {tifffile.__version__}")
y, x = np.mgrid[0:24, 0:40]
values = np.stack([x * 6, y * 10, (x + y) * 3], -1).astype(np.uint16) * 257  # upper byte and lower byte are equal
found = {}
for planes in ("contig", "separate"):
    for compression in (None, "deflate"):
        file = io.BytesIO()
        stored = values if planes == "contig" else np.ascontiguousarray(values.transpose(2, 0, 1))
        tifffile.imwrite(file, stored, photometric="rgb", planarconfig=planes, compression=compression)
        file.seek(0)
        read = tifffile.imread(file)
        assert np.array_equal(read if planes == "contig" else read.transpose(1, 2, 0), values), "the file is valid"
        with Image.open(file) as image:
            off = int(np.abs(np.asarray(image).astype(int) - values // 257).max())
        found[planes, compression] = off
        print(f"{planes:9} {compression or 'uncompressed':13} mode {image.mode}: off by up to {off} of 255 levels")
assert found.pop(("separate", None)) > 50, "Pillow reads planes of 16 bits now"
assert set(found.values()) == {0}, "another layout is wrong too"
PYTHON
