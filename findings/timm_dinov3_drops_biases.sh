#!/usr/bin/env bash
# timm loads a DINOv3 checkpoint with biases of queries and values into vit_small_patch16_dinov3 and drops these biases.
#
# Only names that end in `_qkvb` have them. timm's own conversion removes them for the other names before the weights are
# loaded, so that the strict load reports no unexpected key. The features then point elsewhere. The biases of the released
# weights are 0, but those of a backbone that was trained further are not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import timm
import torch

print(f"timm {timm.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
width, blocks = 384, 12
state = {
    "cls_token": torch.randn(1, 1, width),
    "storage_tokens": torch.randn(1, 4, width),
    "mask_token": torch.zeros(1, width),
    "rope_embed.periods": 100.0 ** (torch.arange(16) / 16),
    "patch_embed.proj.weight": 0.02 * torch.randn(width, 3, 16, 16),
    "patch_embed.proj.bias": torch.zeros(width),
    "norm.weight": torch.ones(width),
    "norm.bias": torch.zeros(width),
}
for i in range(blocks):
    block = {
        "norm1.weight": torch.ones(width), "norm1.bias": torch.zeros(width),
        "norm2.weight": torch.ones(width), "norm2.bias": torch.zeros(width),
        "attn.qkv.weight": 0.05 * torch.randn(3 * width, width),
        "attn.qkv.bias": torch.cat([torch.randn(width), torch.zeros(width), torch.randn(width)]),
        "attn.qkv.bias_mask": torch.cat([torch.ones(width), torch.zeros(width), torch.ones(width)]),
        "attn.proj.weight": 0.05 * torch.randn(width, width), "attn.proj.bias": torch.zeros(width),
        "ls1.gamma": torch.ones(width), "ls2.gamma": torch.ones(width),
        "mlp.fc1.weight": 0.02 * torch.randn(4 * width, width), "mlp.fc1.bias": torch.zeros(4 * width),
        "mlp.fc2.weight": 0.02 * torch.randn(width, 4 * width), "mlp.fc2.bias": torch.zeros(width),
    }
    state |= {f"blocks.{i}.{key}": value for key, value in block.items()}
path = f"{sys.argv[1]}/dinov3.pth"
torch.save(state, path)
images, features = torch.randn(4, 3, 64, 64), {}
for name in ("vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"):
    options = {"num_classes": 0, "global_pool": "token", "init_values": 1.0}
    model = timm.create_model(name, checkpoint_path=path, **options).eval()
    with torch.no_grad():
        features[name] = model(images)
    print(f"{name}: loaded without an error; q_bias: {model.blocks[0].attn.q_bias is not None}")
cosine = torch.nn.functional.cosine_similarity(*features.values()).mean().item()
print(f"cosine between the features of both: {cosine:.3f}")
assert cosine < 0.95, "the biases are kept now"
PYTHON
