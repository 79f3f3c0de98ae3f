#!/usr/bin/env bash
# timm's DINOv3 names without `_qkvb` drop the biases of queries and values from a released file, and load "strictly".
#
# DINOv3 released some sizes with biases that are all zero, and timm has two names for one architecture:
# `vit_small_patch16_dinov3` without these biases and `vit_small_patch16_dinov3_qkvb` with them. A file with other biases,
# for example fine-tuned in the released code, loads into the first name and gives other features. There is no exception
# and no warning; a printed line says for each block that q_bias is not a parameter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import timm
import torch

print(f"torch {torch.__version__}, timm {timm.__version__}")
torch.manual_seed(0)
whole = timm.create_model("vit_small_patch16_dinov3_qkvb", num_classes=0)
# The file as facebookresearch/dinov3 names it: one bias for queries, keys and values.
file = {}
for key, value in whole.state_dict().items():
    key = key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
    if key.endswith("q_bias"):
        width = len(value)
        file[key.replace("q_bias", "qkv.bias")] = torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)])
    elif not key.endswith(("k_bias", "v_bias")):
        file[key] = torch.ones_like(value) if ".gamma" in key else value  # LayerScale starts near 0, and is larger once trained
torch.save(file, "released.pth")

images = torch.randn(1, 3, 256, 256)
features = {}
for name in ("vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"):
    network = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": "released.pth"})
    with torch.no_grad():
        features[name] = network.eval()(images)
    print(f"{name}: loaded, features {features[name][0, :3].tolist()}")
one, other = features.values()
cosine = float(torch.nn.functional.cosine_similarity(one, other))
print(f"cosine of the two: {cosine:.3f}")
assert cosine < 0.99, "the name without _qkvb keeps the biases now"
PYTHON
