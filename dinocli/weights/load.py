"""Loading of encoders and initial weights from checkpoints, files of other tools and timm models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import safe_open

from dinocli.core.errors import DinoError, nearest, reason_of
from dinocli.core.runs import run_of
from dinocli.core.tensors import fingerprint
from dinocli.data.images import ImagesConfig
from dinocli.features.encoder import Channels, Encoder, with_images
from dinocli.method import shipped
from dinocli.method.preset import AnyMethod, Preset, load_preset
from dinocli.models.architecture import BackboneConfig, adapt, create_timm
from dinocli.models.backbone import Backbone
from dinocli.models.head import ClassifierHead
from dinocli.models.network import load_strictly
from dinocli.models.positions import Positions
from dinocli.weights.checkpoint import Weights, Which, read_weights, refuse_not_finite
from dinocli.weights.identify import TRANSFORMERS, UNTRAINED, config_of, timms_name
from dinocli.weights.official import HEADS, heads_are_assumed, official_architecture
from dinocli.weights.released import IMAGENET, Preprocessing

LOCAL = "local-dir:"
_PATIENCE = 8.0  # seconds to wait for the hub's answer
# Files of weights in a folder or a repository, in the order in which timm prefers them.
_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
_BIAS = ".attn.qkv.bias"


def load_encoder(source: str, device: torch.device, which: Which = "teacher", overrides: Sequence[str] = ()) -> Encoder:
    """Load an encoder.

    Args:
        source: Run folder, `ckpt.safetensors`, official `.pth` of DINO or DINOv2, `timm:NAME` with released weights, or
            `untrained:NAME` with the initial weights of a preset, or of a run's or checkpoint's preset.
        device: Device that the network is moved to.
        which: Network to load if a file holds both.
        overrides: Settings as for `--set`: `images.key=value`, and `backbone.key=value` if the file does not store its
            architecture.

    Raises:
        DinoError: If the source does not exist, or its weights or an override do not fit.
    """
    shape = [override for override in overrides if override.strip().startswith("backbone.")]
    limits = [override for override in overrides if override not in shape]
    if source.startswith(UNTRAINED):
        if shape:
            raise _fixed_shape(source, shape[0])
        return with_images(_load_untrained(source.removeprefix(UNTRAINED), source, device), limits)
    if not source.startswith("timm:"):
        encoder = encoder_of(read_weights(Path(source), which), source, device, shape)
        encoder = replace(encoder, run=run_of(Path(source)))
    elif shape:
        raise _fixed_shape(source, shape[0])
    else:
        backbone, preprocessing = load_timm(source.removeprefix("timm:"))
        encoder = _freeze(backbone, *preprocessing, source, device)
        encoder = replace(encoder, images=ImagesConfig(channels=encoder.channels))
    return with_images(encoder, limits)


def encoder_of(weights: Weights, source: str, device: torch.device, overrides: Sequence[str] = ()) -> Encoder:
    """Build the encoder of weights already read.

    Raises:
        DinoError: If the network is unknown, or its weights or an override do not fit.
    """
    architecture = architecture_of(weights, source, overrides)
    backbone = architecture.build(drop_path=False)
    load_strictly(backbone.model, weights.backbone, source)
    if weights.preset:
        return replace(_build(backbone, source, device, weights.preset), step=weights.step)
    preprocessing = preprocessing_of(weights, architecture, source)
    encoder = replace(_freeze(backbone, *preprocessing, source, device), notes=weights.notes)
    encoder = replace(encoder, images=ImagesConfig(channels=encoder.channels))
    if weights.architecture or not heads_are_assumed(architecture):
        return encoder
    heads = architecture.options["num_heads"]
    if (note := note_on_heads(weights, architecture, source, overrides)) is None:
        # With another number of heads the same weights compute other features, which must not be compared.
        return replace(encoder, fingerprint=fingerprint({"": torch.tensor(heads), **backbone.model.state_dict()}))
    return replace(encoder, notes=(*weights.notes, note))


def note_on_heads(
    weights: Weights, architecture: BackboneConfig, source: str, overrides: Sequence[str] = ()
) -> str | None:
    """Return a note if the number of attention heads is assumed; None if it is known or an override sets it."""
    given = any(override.partition("=")[0].strip() == "backbone.options.num_heads" for override in overrides)
    if weights.architecture or given or not heads_are_assumed(architecture):
        return None
    heads = architecture.options["num_heads"]
    note = f"{source} does not store its number of attention heads; assuming {heads}, its width divided by 64"
    return f"{note} ({HEADS}N overrides this)"


def preprocessing_of(weights: Weights, architecture: BackboneConfig, source: str) -> Preprocessing:
    """Return the images that weights expect: of their preset, their file, or by default ImageNet's statistics.

    Raises:
        DinoError: If nothing states the mean and std of other than three channels.
    """
    if weights.preset:
        views = weights.preset.views
        return Preprocessing(views.global_1.size, views.mean, views.std)
    size, channels = (architecture.options.get(key, default) for key, default in (("img_size", 224), ("in_chans", 3)))
    found = weights.preprocessing or Preprocessing(size if isinstance(size, int) else 224, *IMAGENET)
    if channels != len(found.mean):
        raise DinoError(
            f"{source} takes {channels} channels and does not store their mean and std",
            "use the ckpt.safetensors that it was exported from",
        )
    return found


def architecture_of(weights: Weights, source: str, overrides: Sequence[str] = ()) -> BackboneConfig:
    """Return the architecture that is stored with weights, or infer it from their shapes.

    Raises:
        DinoError: If the network is unknown, or an override does not fit.
    """
    for override in overrides:
        if not override.strip().startswith("backbone."):
            raise DinoError(f"--set {override} has no effect here; expected backbone.KEY=VALUE", f"{HEADS}6")
    if weights.architecture is None:
        return official_architecture(weights.backbone, source, overrides)
    if overrides:
        raise _fixed_shape(source, overrides[0])
    return weights.architecture


def _fixed_shape(source: str, override: str) -> DinoError:
    return DinoError(
        f"--set {override} is only for official files of a plain ViT; the architecture of {source} is known",
        "remove that --set",
    )


def _build(backbone: Backbone, source: str, device: torch.device, preset: Preset) -> Encoder:
    views = preset.views
    encoder = _freeze(backbone, views.global_1.size, views.mean, views.std, source, device)
    return replace(encoder, images=preset.images.unpaired)


def _freeze(backbone: Backbone, size: int, mean: Channels, std: Channels, source: str, device: torch.device) -> Encoder:
    backbone = backbone.eval().requires_grad_(False).to(device)
    return Encoder(backbone, source, fingerprint(backbone.model.state_dict()), size, mean, std)


def untrained_encoder(weights: Weights, device: torch.device) -> Encoder:
    """Return an encoder with the checkpoint's architecture and random weights, as a baseline.

    Raises:
        DinoError: If this tool did not write the checkpoint.
    """
    if weights.preset is None:
        raise DinoError(
            "an untrained twin needs a checkpoint of this tool",
            f"use a ckpt.safetensors that `dino pretrain` wrote, or a preset such as {UNTRAINED}vits16",
        )
    return _start_untrained(weights.preset, "untrained", device)


def _load_untrained(name: str, source: str, device: torch.device) -> Encoder:
    if name in shipped.names() or name.endswith(".toml"):
        return _start_untrained(load_preset(name), source, device)
    if Path(name).exists():
        return replace(untrained_encoder(read_weights(Path(name)), device), source=source)
    close = nearest(name, shipped.names())
    raise DinoError(
        f"{source} names no preset, run or checkpoint", f"use {UNTRAINED}{close}; `dino presets` lists them"
    )


def _start_untrained(preset: Preset, source: str, device: torch.device) -> Encoder:
    torch.manual_seed(0)  # the same weights in every command
    return _build(preset.backbone.build(drop_path=False), source, device, preset)


def of_timm(backbone: Backbone) -> Weights:
    """Return the weights of a timm model."""
    return Weights(dict(backbone.model.state_dict()), {}, None)


def initial_weights(source: str) -> Weights:
    """Load weights to start training from: any source of `read_weights`, or a timm model's released weights.

    Raises:
        DinoError: If the source does not exist.
    """
    if source.startswith("timm:"):
        return of_timm(load_timm(source.removeprefix("timm:"))[0])
    return read_weights(Path(source))


def fitted_to(weights: Weights, backbone: Backbone) -> Weights | None:
    """Adapt three-channel weights to a backbone with other channels; return None if there is nothing to adapt.

    The first layer's filters are summed for one channel, or repeated and scaled for several. For images with equal
    channels, this preserves the scale of its output.

    Source: timm's adapt_input_conv.
    """
    first = backbone.model.pretrained_cfg.get("first_conv")
    key = f"{first}.weight"
    own, given = backbone.model.state_dict().get(key), weights.backbone.get(key)
    if own is None or given is None or own.shape[1] == given.shape[1] or given.shape[1] != 3:
        return None
    from timm.models import adapt_input_conv  # only here, as in `architecture`

    return replace(weights, backbone=weights.backbone | {key: adapt_input_conv(own.shape[1], given)})


def load_timm(name: str) -> tuple[Backbone, Preprocessing]:
    """Load a timm model with its released weights, and the images that it expects.

    Raises:
        DinoError: If timm has no such weights, or they cannot be downloaded.
    """
    _check_released(name)
    try:
        with _silence_hub():
            model = _download(name) if not name.startswith(LOCAL) else create_timm(name, pretrained=True)
    # If a file cannot be reached, the hub's client may raise any of dozens of types.
    except Exception as error:
        if isinstance(error, DinoError) and not name.startswith(LOCAL):
            raise
        cause = error.__cause__ or error
        why = reason_of(cause).split(". ")[0]
        if name.startswith(LOCAL):
            raise DinoError(
                f"timm:{name} cannot be loaded: {why}", "name a folder written by `dino export --to timm`"
            ) from error
        raise _no_download(name, why) from error
    released: Mapping[str, Any] = model.pretrained_cfg
    refuse_not_finite(model.state_dict(), f"timm:{name}", "use other weights")
    _refuse_dropped_biases(name, model)
    backbone = adapt(model, _positions_of(name, released))
    return backbone, Preprocessing(released["input_size"][-1], tuple(released["mean"]), tuple(released["std"]))


def _refuse_dropped_biases(name: str, model: Any) -> None:
    """Check that timm did not drop biases of DINOv3's own files, as its names without `_qkvb` do without a warning.

    Raises:
        DinoError: If it did: the features would be those of another network.
    """
    if type(model).__name__ != "Eva" or any(key.endswith(".q_bias") for key in model.state_dict()):
        return
    folder = Path(name.removeprefix(LOCAL))
    places = [folder / file for file in _FILES] if name.startswith(LOCAL) else map(Path, _cached_files(name))
    path = next((place for place in places if place.exists()), None)
    if path and _has_biases_of_dinov3(path):
        raise DinoError(
            f"timm:{name}: the network without `_qkvb` in its name drops the biases of queries and values in {path}",
            f"use {path} itself" if name.startswith(LOCAL) else "use the file of weights itself",
        )


def _has_biases_of_dinov3(path: Path) -> bool:
    """Return whether weights under DINOv3's own keys have biases of queries, keys or values other than 0."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            stored = {key: file.get_tensor(key) for key in keys if "storage_tokens" in keys and _BIAS in key}
    else:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = {key: value for key, value in content.items() if "storage_tokens" in content and _BIAS in key}
    biases = {key: value for key, value in stored.items() if key.endswith(_BIAS)}
    return any((value * stored.get(f"{key}_mask", torch.ones(()))).any() for key, value in biases.items())


@contextmanager
def _silence_hub() -> Iterator[None]:
    """Silence the log of the hub's client, which reports every retry; one error at the end is enough."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _check_released(name: str) -> None:
    """Check that a timm model name is valid, without network access.

    Raises:
        DinoError: If timm has no model of this name or no weights for it, or the folder does not exist.
    """
    if name.startswith(LOCAL):
        folder = name.removeprefix(LOCAL)
        config = config_of(Path(folder))
        if config.get("model_type") in TRANSFORMERS:
            raise DinoError(f"timm:{name}: {folder} is a transformers folder", f"use {folder}")
        if config and "architecture" not in config:
            raise DinoError(
                f"timm:{name}: {folder}/config.json names no architecture of timm",
                "name a folder written by `dino export --to timm`",
            )
        if not config:
            there = "has no config.json" if Path(folder).is_dir() else "is not a folder"
            raise DinoError(
                f"timm:{name}: {folder or 'the name'} {there}", "name a folder written by `dino export --to timm`"
            )
        return
    if name.startswith(("hf-hub:", "hf_hub:")):
        return
    import timm

    architecture, released = name.partition(".")[0], timm.list_models(pretrained=True)
    if name in released or (architecture == name and any(other.startswith(f"{name}.") for other in released)):
        return
    tags = [other for other in released if other.startswith(f"{architecture}.")]
    if not name:
        fault = "timm: must be followed by a model name"
    elif tags:
        fault = f"timm {timm.__version__} has no weights {name.partition('.')[2]!r} of {architecture}"
    elif timm.is_model(architecture):
        fault = f"timm {timm.__version__} has no pretrained weights of {architecture}"
    else:
        fault = f"timm {timm.__version__} has no model {name!r}"
    raise DinoError(
        fault, f"did you mean {' or '.join(f'timm:{other}' for other in _nearest(name, tags or released))}?"
    )


def _nearest(name: str, released: Sequence[str]) -> list[str]:
    """Return up to three similar names, nearest first: weights if all candidates are of one model, else models."""
    if as_timm := timms_name(name or "dino_vits16"):
        return [as_timm]
    models = {other.partition(".")[0] for other in released}
    among = sorted(models if len(models) > 1 else released)
    return get_close_matches(name if len(models) == 1 else name.partition(".")[0], among, n=3, cutoff=0.0)


def _download(name: str) -> Any:
    """Create a timm model with its pretrained weights; raise an error early if the hub does not answer.

    On its own, the hub's client retries for a minute or more. Wait that long only if the hub answers or the files are
    cached.
    """
    model = _start(partial(create_timm, name, pretrained=True))
    answer = _start(partial(_hub_answers, name))
    wait([model], 0.4 * _PATIENCE)
    if not model.done() and not _is_cached(name):
        wait([model, answer], 0.6 * _PATIENCE, FIRST_COMPLETED)
        if not model.done() and not (answer.done() and answer.result()):
            raise _no_download(name, f"{_hub()} does not answer")
    return model.result()


def _start(work: Callable[[], Any]) -> Future[Any]:
    """Run a function in a daemon thread, because a blocked network call cannot be cancelled."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _no_download(name: str, why: str) -> DinoError:
    return DinoError(
        f"could not download the pretrained weights of timm's {name}: {why}",
        f"connect to the network, or use a folder with config.json and weights: timm:{LOCAL}FOLDER",
    )


def _repository(name: str) -> tuple[str, str | None]:
    """Return the hub repository of a model, and its revision if the name includes one."""
    if ":" in name:
        repository, _, revision = name.partition(":")[2].partition("@")
        return repository, revision or None
    import timm

    return getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None) or f"timm/{name}", None


def announcement(source: str) -> str:
    """Return a line to print before loading timm weights: cached, or to download. Empty for local sources."""
    name = source.removeprefix("timm:")
    if name == source or name.startswith(LOCAL):
        return ""
    _check_released(name)
    return f"weights: {source}, " + ("cached" if _is_cached(name) else f"to download from {_hub()}")


def _hub() -> str:
    return str(huggingface_hub.constants.ENDPOINT).partition("://")[2]


def _hub_answers(name: str) -> bool:
    repository, revision = _repository(name)
    try:
        url = huggingface_hub.hf_hub_url(repository, "config.json", revision=revision)
        huggingface_hub.get_hf_file_metadata(url, timeout=_PATIENCE)
    except Exception as error:  # the type depends on the HTTP library of the client's release
        return getattr(error, "response", None) is not None
    return True


def _is_cached(name: str) -> bool:
    return any(_cached_files(name))


def _cached_files(name: str) -> Iterator[str]:
    """Yield the files of weights of a model that the hub's cache holds."""
    repository, revision = _repository(name)
    found = (huggingface_hub.try_to_load_from_cache(repository, file, revision=revision) for file in _FILES)
    yield from (place for place in found if isinstance(place, str))


def _positions_of(name: str, released: Mapping[str, Any]) -> Positions:
    """Return how the training of a timm model resampled positions: as the originals did, or as timm does."""
    # DINO, and DINOv2 without registers; see `official_architecture`.
    tag = released.get("tag")
    as_dino = tag == "dino" or (tag == "lvd142m" and "_reg" not in name)
    return "dino" if as_dino else "bicubic" if tag == "mae" else "antialias"


def start_from(
    method: AnyMethod, source: str, note: Callable[[str], None] = lambda line: None, *, weights: Weights | None = None
) -> list[str]:
    """Load initial weights into the student and its moving average: the backbone, and the heads of equal shape.

    Args:
        method: Method whose networks are initialized.
        source: Source of the weights, as for `initial_weights`.
        note: Callback that receives lines for the user: about a download, and about weights adapted to other channels.
        weights: Weights of the source. If None, they are read.

    Returns:
        Names of the heads that keep fresh weights; a classifier always does.

    Raises:
        DinoError: If the source does not exist, or its backbone has another shape.
    """
    if weights is None:
        if line := announcement(source):
            note(line)
        weights = initial_weights(source)
    if fitted := fitted_to(weights, method.student.backbone):
        note(f"note: {source} takes three channels; adapted the filters of its first layer to the images")
        weights = fitted
    fitting: dict[str, dict[str, torch.Tensor]] = {}
    for name, head in method.student.heads.items():
        if isinstance(head, ClassifierHead):
            continue  # other labels may be as many
        # The originals name a head after its loss; a shared head has the name of the loss on class tokens.
        theirs = "dino" if "class" in method.student.reads[name] else "ibot"
        stored = weights.heads.get(name) or weights.heads.get(theirs, {})
        if {k: v.shape for k, v in stored.items()} == {k: v.shape for k, v in head.state_dict().items()}:
            fitting[name] = stored
    for network in (method.student, method.average):
        load_strictly(network.backbone.model, weights.backbone, source)
        for name, stored in fitting.items():
            network.heads[name].load_state_dict(stored)
        if network.mask_token is not None and weights.mask_token is not None:
            network.mask_token.data.copy_(weights.mask_token)
    return [name for name in method.student.heads if name not in fitting]
