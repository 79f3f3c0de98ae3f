#!/usr/bin/env bash
# Pillow 13.0.0 turns white into black in deep JPEG 2000 color images.
#
# Samples of 16 bits are rounded to 8 without a limit: 65,408 and above wrap to 0. At 12 bits that begins at 4,088. So
# the brightest 0.2 % of the range is black, and gradients that stay below it look right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 pillow==13.0.0 imagecodecs==2026.3.6
"$folder/venv/bin/python" - <<'PYTHON'
import io

import imagecodecs
import numpy as np
import PIL
from PIL import Image

print(f"Pillow {PIL.__version__}, imagecodecs {imagecodecs.__version__}")
for bits, least in ((16, 65408), (12, 4088)):
    values = np.empty((16, 16, 3), np.uint16)
    values[:8], values[8:] = least - 1, 2**bits - 1
    data = imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits)
    assert np.array_equal(imagecodecs.jpeg2k_decode(data), values), "the file is valid and lossless"
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    below, white = pixels[0, 0].tolist(), pixels[15, 15].tolist()
    print(f"{bits} bits: {least - 1} is read as {below}, {2**bits - 1} (white) as {white}")
    assert below == [255] * 3, "values below the limit are right"
    assert white == [0] * 3, "white is white now"
PYTHON
