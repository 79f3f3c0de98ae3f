"""The method: read this folder and you know DINO, iBOT, DINOv2 and the short recipe of DINOv3."""
