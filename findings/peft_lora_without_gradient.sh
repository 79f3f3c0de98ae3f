#!/usr/bin/env bash
# peft's LoRA on `qkv` of timm's BEiT and DINOv3 networks counts as trainable and never gets a gradient.
#
# peft replaces the linear layer by one whose call adds the low-rank product. These networks never call the layer: they
# read its weight, to join it with separate biases. So the additions are part of no computation. Training runs without an
# error, changes nothing, and the merged weights are the old ones. In a plain vision transformer the same code works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import timm
import torch

print(f"peft {peft.__version__}, timm {timm.__version__}, torch {torch.__version__}")
learns = {}
for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3_qkvb"):
    torch.manual_seed(0)
    small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = peft.get_peft_model(timm.create_model(name, **small), peft.LoraConfig(target_modules=["qkv"]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter)
    output = model(torch.randn(2, 3, 224, 224))
    with_gradient = []
    if output.requires_grad:
        output.square().sum().backward()
        with_gradient = [parameter for parameter in trainable if parameter.grad is not None]
    learns[name] = len(with_gradient)
    print(f"{name}: {len(trainable)} trainable tensors, {len(with_gradient)} with a gradient")
assert learns == {"vit_tiny_patch16_224": 4, "beit_base_patch16_224": 0, "vit_small_patch16_dinov3_qkvb": 0}
PYTHON
