#!/usr/bin/env bash
# LoRA of peft on `qkv` never learns in timm's BEiT, EVA-02 and DINOv3 networks with biases, and raises nothing.
#
# These networks do not call their `qkv` layer. They read its weight and add biases that they keep beside it, so the
# low-rank addition that peft puts into the layer's call never runs: its parameters are listed as trainable and get no
# gradient, while a head on top learns. On timm's plain ViT, whose attention calls the layer, the same settings work.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import timm
import torch

print(f"torch {torch.__version__}, timm {timm.__version__}, peft {peft.__version__}")
torch.manual_seed(0)
images = torch.randn(1, 3, 224, 224)
learns = {}
for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3_qkvb"):
    network = timm.create_model(name, num_classes=0)
    head = torch.nn.Linear(network.num_features, 2)
    network = peft.get_peft_model(network, peft.LoraConfig(r=4, target_modules=["qkv"]))
    head(network(images)).square().mean().backward()
    lora = {key: value for key, value in network.named_parameters() if "lora_" in key}
    reached = sum(value.grad is not None for value in lora.values())
    with torch.no_grad():
        before = network(images)
        for value in lora.values():
            value.normal_(std=0.1)
        moved = float((network(images) - before).abs().max())
    learns[name] = reached > 0 and moved > 0
    print(f"{name}: {reached} of {len(lora)} trainable tensors get a gradient; random ones move the output by {moved:.2g}")
assert learns == {
    "vit_tiny_patch16_224": True,
    "beit_base_patch16_224": False,
    "vit_small_patch16_dinov3_qkvb": False,
}, "peft reaches the qkv layer of these networks now"
PYTHON
