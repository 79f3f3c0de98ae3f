"""Networks: backbones, heads, and both combined."""
