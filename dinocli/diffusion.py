"""Diffusion: what the U-Net of a Stable Diffusion model makes of a photo. The one file that knows diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dinocli.data.crops import cut
from dinocli.data.decode import Pixels
from dinocli.errors import DinoError

LONG_SIDE = 960  # pixels, the paper's
STEP = 100  # of 1,000 steps of noise, the paper's
DIMS = 256  # of each layer, after PCA with the other photo: the paper's
_SEED = 42
_NAMES = "a local folder, or a hub name such as stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True, eq=False)
class Diffusion:
    """A frozen Stable Diffusion model of the first or second series.

    Attributes:
        unet: Takes the noise away.
        vae: Photos to latents.
        scheduler: How much noise a step has.
        caption: As the U-Net takes it. [1, T, D]
    """

    unet: Any  # diffusers' classes are untyped
    vae: Any
    scheduler: Any
    caption: Tensor

    @torch.no_grad()
    def layers(self, pixels: Pixels, long_side: int = LONG_SIDE) -> list[Tensor]:
        """What goes into layers 2, 5 and 8 of the decoder, at one step of noise. [h, w, C] each, the coarsest first

        The same photo gives the same: the latents are the mean of what the encoder says, and the noise is drawn from
        a seed at the size that the model was trained on, then enlarged.

        Args:
            pixels: [H, W, 3]
            long_side: What to resize the photo's long side to; both sides are then rounded to what the U-Net halves.

        Source: Zhang et al., arXiv 2305.15347; Junyi42/sd-dino@48278d9 extractor_sd.py and, in its ODISE,
        meta_arch/ldm.py, which pads photos to squares where here all of a photo is resized.
        """
        latents = self._latents(pixels, long_side)
        side = int(self.unet.config.sample_size)
        noise = torch.randn(1, latents.shape[1], side, side, generator=torch.Generator().manual_seed(_SEED))
        noise = F.interpolate(noise, size=latents.shape[-2:], mode="bicubic", align_corners=False).to(latents)
        step = torch.tensor([STEP], device=latents.device)
        seen: list[Tensor] = []
        hooks = [place.register_forward_hook(lambda _m, _i, out: seen.append(_first(out))) for place in self._places()]
        try:
            self.unet(self.scheduler.add_noise(latents, noise, step), step, encoder_hidden_states=self.caption)
        finally:
            for hook in hooks:
                hook.remove()
        return [made[0].permute(1, 2, 0).float() for made in seen]

    def _latents(self, pixels: Pixels, long_side: int) -> Tensor:
        """[1, C, h, w]"""
        height, width = pixels.shape[:2]
        # The encoder halves a photo for each of its blocks but the last, and the U-Net the latents.
        whole = 2 ** (len(self.vae.config.block_out_channels) + len(self.unet.up_blocks) - 2)
        rows, columns = (max(1, round(s * long_side / max(height, width) / whole)) * whole for s in (height, width))
        image = cut(pixels, (0, 0, height, width), (rows, columns)).to(self.caption.device)
        latents: Tensor = self.vae.encode(image[None].float() / 127.5 - 1).latent_dist.mean
        return latents * self.vae.config.scaling_factor

    def _places(self) -> list[Any]:
        """What the last layer of each block of the decoder takes, but that of the finest."""
        blocks = list(self.unet.up_blocks)[:-1]
        return [(getattr(block, "attentions", None) or block.resnets)[-2] for block in blocks]


def _first(output: Any) -> Tensor:
    made: Tensor = output if isinstance(output, Tensor) else output[0]
    return made


def load_diffusion(model: str, device: torch.device, caption: str = "") -> Diffusion:
    """Load a model in diffusers' form; weights are read as safetensors, never as pickles.

    Args:
        model: A folder, or a name on the hub.
        device: Where to compute.
        caption: What the photos show, in words; the paper has "a photo of a CLASS". Empty where nobody says it.

    Raises:
        DinoError: diffusers is not installed, the model is not there, or it is of another kind.
    """
    try:
        diffusers, transformers = import_module("diffusers"), import_module("transformers")
    except ImportError as error:
        raise DinoError(
            f"Stable Diffusion's features need diffusers and transformers: {error}", "pip install 'dinocli[sd]'"
        ) from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()

    def part(read: Callable[..., Any], folder: str, **more: Any) -> Any:
        try:
            return read(model, subfolder=folder, **more)
        except (OSError, ValueError, RuntimeError) as error:
            words = " ".join(str(error).split())[:200]
            raise DinoError(f"no Stable Diffusion model at {model}: its {folder}: {words}", _NAMES) from None

    config = part(diffusers.UNet2DConditionModel.load_config, "unet")
    # The XL series asks for more than a caption; those that paint over a part of a photo take more than latents.
    if config.get("addition_embed_type") or config.get("in_channels", 4) != 4:
        raise DinoError(
            f"a Stable Diffusion of the first or second series was wanted; {model} is of another kind", _NAMES
        )
    weights = {"use_safetensors": True, "low_cpu_mem_usage": False}
    unet = part(diffusers.UNet2DConditionModel.from_pretrained, "unet", **weights).eval().to(device)
    tokens = part(transformers.CLIPTokenizer.from_pretrained, "tokenizer")
    text = part(transformers.CLIPTextModel.from_pretrained, "text_encoder", use_safetensors=True).eval().to(device)
    longest = text.config.max_position_embeddings
    ids = tokens(caption, padding="max_length", max_length=longest, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        said = text(ids.to(device))[0]
    vae = part(diffusers.AutoencoderKL.from_pretrained, "vae", **weights).eval().to(device)
    scheduler = part(diffusers.DDPMScheduler.from_pretrained, "scheduler")
    return Diffusion(unet, vae, scheduler, said)
