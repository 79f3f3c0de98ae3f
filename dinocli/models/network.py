"""Network: a backbone with named heads, the class of both student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dinocli.core import foreach
from dinocli.core.distributed import local, whole
from dinocli.core.errors import DinoError
from dinocli.models.backbone import Backbone, MaskedPatches
from dinocli.models.head import ClassifierHead, Head
from dinocli.models.trained import effective_weights

Reads = Literal["class", "patches"]
CLASS: frozenset[Reads] = frozenset(["class"])


@dataclass(frozen=True)
class Encoding:
    """Output of a network for V views of B images; the first G views are global.

    Attributes:
        cls: Class tokens of the backbone. [V, B, D]
        globals: Number of global views G.
        class_logits: Logits of the class tokens, by the name of the head, or features without prototypes. [V, B, K]
        masked_logits: The same for the selected patches. [M, K]
        patches: Patch tokens of the global views, if requested. [G, B, N, D]
        grid: Rows and columns of these patches.
    """

    cls: Tensor
    globals: int
    class_logits: dict[str, Tensor]
    masked_logits: dict[str, Tensor] = field(default_factory=dict)
    patches: Tensor | None = None
    grid: tuple[int, int] = (0, 0)


class Network(nn.Module):
    """Backbone with heads.

    Args:
        heads: Heads by their names.
        reads: Tokens that each head reads. By default the class token.
        masking: If True, patches may be masked, and the network has a token that replaces them.

    Attributes:
        mover: Function that moves parameters towards others by a weight, in place.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: Mapping[str, Head | ClassifierHead],
        reads: Mapping[str, frozenset[Reads]] | None = None,
        *,
        masking: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.reads = {name: (reads or {}).get(name, CLASS) for name in heads}
        self.mask_token = nn.Parameter(torch.zeros(1, backbone.width)) if masking else None
        self._compiled = False
        self.mover: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None] = foreach.move

    def forward(
        self,
        crops: Sequence[Tensor],
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        *,
        with_patches: bool = False,
    ) -> Encoding:
        """Encode groups of views, one group per resolution.

        Args:
            crops: One [V, B, C, H, W] per resolution, the global views first; V may differ, B may not.
            mask: Mask of the global views' patches. If None, no patch is masked. [G, B, N], bool
            rows: Indices, among the G*B*N patches, of those that heads read. If None, all. [M], int64
            with_patches: If True, also return the patch tokens of the global views.
        """
        # Each head runs once on all views, which its BatchNorm needs.
        first = crops[0]
        masked = None if mask is None or self.mask_token is None else MaskedPatches(mask.flatten(0, 1), self.mask_token)
        wanted = with_patches or any("patches" in reads for reads in self.reads.values())
        flat = [group.flatten(0, 1) for group in crops]
        joint, tokens = self.backbone.encode(flat, masked, with_patches=wanted)
        cls = joint.unflatten(0, (-1, first.shape[1]))
        all_patches, grid = (tokens.patches.flatten(0, 1), tokens.grid) if tokens else (None, (0, 0))
        patches = (
            all_patches.index_select(0, rows) if all_patches is not None and rows is not None else all_patches
        )  # [M, D]
        class_logits, masked_logits = {}, {}
        for name, head in self.heads.items():
            class_input = cls.flatten(0, 1) if "class" in self.reads[name] else None
            patch_input = patches if "patches" in self.reads[name] else None
            of_class, of_patches = _apply_to_both(cast(Head, head), class_input, patch_input)
            if of_class is not None:
                class_logits[name] = of_class.unflatten(0, cls.shape[:2])
            if of_patches is not None:
                masked_logits[name] = of_patches
        kept = (
            all_patches.view(*first.shape[:2], -1, cls.shape[-1]) if with_patches and all_patches is not None else None
        )
        return Encoding(cls, len(first), class_logits, masked_logits, kept, grid)

    @torch.no_grad()
    def move_towards(self, student: Network, momentum: float | Tensor, done: Tensor, *, buffers: bool = False) -> None:
        """Move the parameters towards those of a student, merged with any low-rank additions.

        Args:
            student: Network of the same shape.
            momentum: Weight of the own parameters, possibly on the device; the student has the rest.
            done: False if the step was skipped: then nothing moves. [], bool
            buffers: If True, BatchNorm's statistics move too. A network that sees no image has none of its own.
        """
        # With FSDP each process averages its own shards; both networks are sharded in the same way.
        own, theirs = local(list(self.parameters())), local(effective_weights(student, self))
        # In a skipped step the weight is 0, because a Python `if` on `done` would make the host wait for the device.
        weight = ((1 - momentum) * done.to(own[0].dtype)).to(own[0].dtype)
        self.mover(own, theirs, weight)
        for mine, new in zip(self.buffers(), student.buffers(), strict=True) if buffers else ():
            if mine.is_floating_point():
                mine.lerp_(new, weight.to(mine.dtype))
            else:  # the number of batches; after a skipped step the engine restores it
                mine.copy_(new)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def outputs(self, head: str) -> int:
        """Return the number of outputs of a head: its prototypes K, or the width of its features without any."""
        return int(self.get_submodule(f"heads.{head}").outputs)  # type: ignore[arg-type]

    @property
    def blocks(self) -> list[nn.Module]:
        """Blocks of the backbone in order; empty if it has none."""
        return self.backbone.blocks

    def compile_blocks(self) -> None:
        """Compile the backbone's blocks, once for each image size."""
        self.backbone.compile_blocks(any_batch=False)
        self._compiled = True

    def eager(self) -> AbstractContextManager[Any]:
        """Return a context without compilation, for image sizes that are too rare to be worth compiling for."""
        return torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Return all weights and buffers, gathered, as `backbone.<timm's key>` and `heads.<name>.<key>`."""
        return {k.replace("backbone.model.", "backbone.", 1): whole(v) for k, v in self.state_dict().items()}

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load weights as `weights` returns them; all keys and shapes must match.

        Raises:
            DinoError: If a key is missing, unknown, or of another shape.
        """
        load_strictly(self, {k.replace("backbone.", "backbone.model.", 1): v for k, v in weights.items()}, source)


def _apply_to_both(head: Head, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return a head's logits of two sets of features; either may be None. The MLP runs once on both."""
    if a is None or b is None:
        return None if a is None else head(a), None if b is None else head(b)
    # Logits are separate tensors, because losses overwrite them with gradients, which torch forbids for views from
    # one split. The gradient of a view would also be a copy of all logits.
    of_a, of_b = head.squeezed(torch.cat([a, b])).split([len(a), len(b)])
    return head.last_layer(of_a), head.last_layer(of_b)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a module; if they do not fit, raise an error and change nothing.

    Raises:
        DinoError: If a key is missing, unknown, or of another shape; the line names the first one.
    """
    own = module.state_dict()
    for key, value in own.items():
        if key not in weights:
            raise _explain_misfit(source, f"{key} is missing")
        if weights[key].shape != value.shape:
            raise _explain_misfit(source, f"{key} is {_format_shape(weights[key])}; expected {_format_shape(value)}")
    unknown = next((k for k in weights if k not in own), None)
    if unknown is not None:
        raise _explain_misfit(source, f"{unknown} is unknown")
    module.load_state_dict(weights)


def _format_shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a single number"


def _explain_misfit(source: str, what: str) -> DinoError:
    return DinoError(
        f"the weights in {source} do not fit this network: {what}",
        "use the preset and the backbone that the weights were trained with",
    )
