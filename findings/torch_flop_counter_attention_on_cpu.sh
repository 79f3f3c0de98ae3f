#!/usr/bin/env bash
# torch's FlopCounterMode counts no operation for scaled_dot_product_attention on a CPU, and the right number on meta.
#
# On a CPU the fused kernel runs as an operator that the counter has no formula for, and the counter skips it in silence.
# A transformer measured on a CPU therefore seems to cost as much for long sequences as its linear layers alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

print(f"torch {torch.__version__}")
tokens, width = 64, 32
expected = 2 * 2 * tokens * tokens * width  # two products, and a multiplication and an addition for each number
counted = {}
for device in ("cpu", "meta"):
    query = torch.ones(1, 1, tokens, width, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(query, query, query)
    counted[device] = counter.get_total_flops()
    print(f"{device:4}: {counted[device]} of {expected} operations")
assert counted == {"cpu": 0, "meta": expected}, "the counter knows the CPU's kernel now"
PYTHON
