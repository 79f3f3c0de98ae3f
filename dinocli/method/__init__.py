"""Training method: self-distillation with the losses and presets of DINO, iBOT, DINOv2 and DINOv3's short recipe."""
