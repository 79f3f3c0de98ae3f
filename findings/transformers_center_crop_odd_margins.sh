#!/usr/bin/env bash
# The center crop of transformers' image processors is one pixel beside torchvision's for every second odd margin.
#
# Both cut the middle of an image. If the pixels to remove are an odd number, the middle lies between two crops. The
# processors of transformers, which call torchvision, take the upper and left one; torchvision rounds half to even. So they
# agree for margins of 1, 5, 9, ... and differ by a pixel for 3, 7, 11, ... A network exported with its processor then sees
# other pixels than in training, for some shapes of photos only, without a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow==12.2.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch
import torchvision
import transformers
from torchvision.transforms.v2 import functional

print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__}")
processor = transformers.BitImageProcessor(
    do_resize=False, crop_size={"height": 10, "width": 10}, do_rescale=False, do_normalize=False, do_convert_rgb=False
)
differ = []
for margin in range(13):
    rows = np.arange(10 + margin, dtype=np.uint8)[:, None, None]  # each row holds its own number
    image = np.tile(rows, (1, 10, 3))
    ours = int(processor(image, return_tensors="np")["pixel_values"][0][0, 0, 0])
    torchs = int(functional.center_crop(torch.from_numpy(image).permute(2, 0, 1), [10, 10])[0, 0, 0])
    print(f"margin {margin}: first row {ours} by transformers, {torchs} by torchvision")
    if ours != torchs:
        differ.append(margin)
assert differ == [3, 7, 11], f"the behaviour changed: they differ for margins {differ}"
print("the center crops differ by a pixel for margins", differ)
PYTHON
