"""Graphs from images to features, for ONNX runtimes and torch.export."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinocli.core.errors import DinoError, reason_of
from dinocli.core.version import __version__
from dinocli.features.encoder import Encoder, TokenChoice, features_of
from dinocli.models.transformer import Transformer

_ONE_ONNX_FILE = 2**31  # bytes, a limit of the format

Loaded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GraphShape:
    """Sizes of the images that a graph takes; their number is always free.

    Attributes:
        size: Side of the images, in pixels; with `free`, the side that the network was trained at.
        free: True if height and width are free.
    """

    size: int
    free: bool = False

    def example(self, encoder: Encoder) -> Tensor:
        """Return images to trace with. A side that is free differs from the others. [2, C, H, W]"""
        width = self.size + encoder.backbone.patch_size * self.free
        return torch.zeros(2, encoder.channels, self.size, width)

    def dimensions(self, encoder: Encoder) -> dict[int, Any]:
        """Return the free dimensions of the images, as torch.export names them."""
        batch = {0: torch.export.Dim("batch")}
        if not self.free:
            return batch
        if not isinstance(encoder.backbone, Transformer):
            return batch | {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        rows, columns = torch.export.Dim("rows", min=1), torch.export.Dim("columns", min=1)
        return batch | {2: encoder.backbone.patch_size * rows, 3: encoder.backbone.patch_size * columns}


class _Features(nn.Module):
    """Module from images to one tensor of features, for tracing."""

    def __init__(self, encoder: Encoder, tokens: TokenChoice) -> None:
        super().__init__()
        self.backbone, self.tokens = encoder.backbone, tokens

    def forward(self, images: Tensor) -> Tensor:
        return features_of(self.backbone, images, self.tokens)


def _about(encoder: Encoder, tokens: TokenChoice, shape: GraphShape) -> dict[str, str]:
    """Return the metadata that users of a graph need."""
    numbers = {"size": shape.size, "any_size": shape.free, "mean": encoder.mean, "std": encoder.std}
    return {
        "dinocli": __version__,
        "fingerprint": encoder.fingerprint,
        "tokens": tokens,
        **{key: json.dumps(value) for key, value in numbers.items()},
    }


@contextmanager
def _graphs_can_fail(shape: GraphShape) -> Iterator[None]:
    try:
        yield
    # Tracing an arbitrary network may raise any type of error.
    except Exception as error:
        reason = reason_of(error)
        hint = "omit --any-size, or use --to timm" if shape.free else "--to timm"
        raise DinoError(f"torch cannot export a graph of this network: {reason}", hint) from error


def save_through_memory(write: Callable[[io.BytesIO], None], draft: Path) -> None:
    """Write through memory, because on a full disk torch's writer raises unclear errors or ends the process."""
    file = io.BytesIO()
    write(file)
    draft.write_bytes(file.getbuffer())


def write_torch_export(encoder: Encoder, tokens: TokenChoice, shape: GraphShape, draft: Path) -> Loaded:
    """Write a `.pt2`, and return the graph that torch.export loads from it.

    Raises:
        DinoError: If torch cannot trace the network.
    """
    with _graphs_can_fail(shape):
        free = {"images": shape.dimensions(encoder)}
        program = torch.export.export(_Features(encoder, tokens).eval(), (shape.example(encoder),), dynamic_shapes=free)
    about = {"dinocli.json": json.dumps(_about(encoder, tokens, shape))}
    save_through_memory(lambda file: torch.export.save(program, file, extra_files=about), draft)
    with draft.open("rb") as file:
        return torch.export.load(file).module()


def write_onnx(encoder: Encoder, tokens: TokenChoice, shape: GraphShape, draft: Path) -> Loaded:
    """Write an ONNX file, and return the graph that onnxruntime loads from it.

    Raises:
        DinoError: If a package is missing, the weights exceed the format's limit, or torch cannot trace the network.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise DinoError(f"ONNX needs the package {error.name}", "pip install 'dinocli[onnx]'") from error
    if sum(value.nbytes for value in encoder.backbone.state_dict().values()) > _ONE_ONNX_FILE:
        raise DinoError("these weights exceed 2 GB, the limit of an ONNX file", "--to torch-export")
    with _graphs_can_fail(shape):
        program: Any = torch.onnx.export(
            _Features(encoder, tokens).eval(),
            (shape.example(encoder),),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=(shape.dimensions(encoder),),
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(_about(encoder, tokens, shape))
    program.save(draft, external_data=False)
    return load_onnx(draft)


def load_onnx(path: Path) -> Loaded:
    """Return the function of an ONNX file: normalized images to features."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])
