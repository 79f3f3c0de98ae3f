"""Diffusion: U-Net features of a Stable Diffusion model. Only this file uses diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinocli.core.errors import DinoError
from dinocli.data.decode.pixels import Pixels
from dinocli.data.views.crops import cut

LONG_SIDE = 960  # pixels, as in the paper
STEP = 100  # noise step, of 1,000, as in the paper
DIMS = 256  # per layer, after joint PCA with the other photo, as in the paper
_SEED = 42
_NAMES = "use a local folder, or a Hub name such as stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True, eq=False)
class Diffusion:
    """Frozen Stable Diffusion model of the first or second series.

    Attributes:
        unet: Denoising U-Net.
        vae: Autoencoder from photos to latents.
        scheduler: Noise schedule.
        caption: Embedding of the caption for the U-Net. [1, T, D]
    """

    unet: Any  # diffusers' classes are untyped
    vae: Any
    scheduler: Any
    caption: Tensor

    @torch.no_grad()
    def layers(self, pixels: Pixels, long_side: int = LONG_SIDE) -> list[Tensor]:
        """Return the inputs of decoder layers 2, 5 and 8 at one noise step, the coarsest first. [h, w, C] each

        The result is deterministic: the latents are the mean of the encoder's distribution, and the noise has a fixed
        seed. The noise is drawn at the model's training size, then enlarged.

        Args:
            pixels: Pixels of the photo. [H, W, 3]
            long_side: Long side in pixels after resizing; both sides are then rounded to a multiple that all layers
                can halve.

        Source: Zhang et al., arXiv 2305.15347; Junyi42/sd-dino@48278d9 extractor_sd.py and, in its ODISE,
        meta_arch/ldm.py. The original pads photos to squares; here the whole photo is resized.
        """
        latents = self._latents(pixels, long_side)
        side = int(self.unet.config.sample_size)
        noise = torch.randn(1, latents.shape[1], side, side, generator=torch.Generator().manual_seed(_SEED))
        noise = F.interpolate(noise, size=latents.shape[-2:], mode="bicubic", align_corners=False).to(latents)
        step = torch.tensor([STEP], device=latents.device)
        outputs: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _m, _i, out: outputs.append(_take_tensor(out)))
            for module in self._find_modules()
        ]
        try:
            self.unet(self.scheduler.add_noise(latents, noise, step), step, encoder_hidden_states=self.caption)
        finally:
            for hook in hooks:
                hook.remove()
        return [output[0].permute(1, 2, 0).float() for output in outputs]

    def _latents(self, pixels: Pixels, long_side: int) -> Tensor:
        """Encode a photo as latents. [1, C, h, w]"""
        height, width = pixels.shape[:2]
        # The encoder halves a photo for each of its blocks but the last, and the U-Net halves the latents.
        multiple = 2 ** (len(self.vae.config.block_out_channels) + len(self.unet.up_blocks) - 2)
        rows, columns = (
            max(1, round(s * long_side / max(height, width) / multiple)) * multiple for s in (height, width)
        )
        image = cut(pixels, (0, 0, height, width), (rows, columns)).to(self.caption.device)
        latents: Tensor = self.vae.encode(image[None].float() / 127.5 - 1).latent_dist.mean
        return latents * self.vae.config.scaling_factor

    def _find_modules(self) -> list[Any]:
        """Return the modules that feed the last layer of each decoder block, except for the finest block."""
        blocks = list(self.unet.up_blocks)[:-1]
        return [(getattr(block, "attentions", None) or block.resnets)[-2] for block in blocks]


def _take_tensor(output: Any) -> Tensor:
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


def load_diffusion(model: str, device: torch.device, caption: str = "") -> Diffusion:
    """Load a model in diffusers' format; weights are read only from safetensors, never from pickles.

    Args:
        model: Local folder, or name on the hub.
        device: Device for the model, which takes several GB.
        caption: Description of the photos; the paper uses "a photo of a CLASS". Empty if unknown.

    Raises:
        DinoError: If diffusers is not installed, or the model is missing or of another kind.
    """
    try:
        diffusers, transformers = import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise DinoError(f"--sd needs diffusers and transformers: {error}", "pip install 'dinocli[sd]'") from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    def load_part(read: Callable[..., Any], folder: str, **more: Any) -> Any:
        try:
            return read(model, subfolder=folder, **more)
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DinoError(f"no Stable Diffusion model at {model}: its {folder}: {reason}", _NAMES) from None

    config = load_part(diffusers.UNet2DConditionModel.load_config, "unet")
    # The XL series needs more inputs than the caption, and inpainting models need more channels than the latents.
    if config.get("addition_embed_type") or config.get("in_channels", 4) != 4:
        raise DinoError(f"{model} is of another kind; expected a Stable Diffusion 1 or 2 model", _NAMES)
    weights = {"use_safetensors": True, "low_cpu_mem_usage": False}
    unet = load_part(diffusers.UNet2DConditionModel.from_pretrained, "unet", **weights).eval().to(device)
    tokens = load_part(transformers.CLIPTokenizer.from_pretrained, "tokenizer")
    text = load_part(transformers.CLIPTextModel.from_pretrained, "text_encoder", use_safetensors=True).eval().to(device)
    max_tokens = text.config.max_position_embeddings
    ids = tokens(caption, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        embedding = text(ids.to(device))[0]
    vae = load_part(diffusers.AutoencoderKL.from_pretrained, "vae", **weights).eval().to(device)
    scheduler = load_part(diffusers.DDPMScheduler.from_pretrained, "scheduler")
    return Diffusion(unet, vae, scheduler, embedding)
