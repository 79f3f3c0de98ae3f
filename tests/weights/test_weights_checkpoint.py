from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import dinocli
from dinocli.core.errors import DinoError
from dinocli.core.tensors import write_tensors
from dinocli.method.preset import Preset, load_preset
from dinocli.models.network import Network
from dinocli.weights.checkpoint import not_finite, read_weights, write_checkpoint

SMALL = ["heads.dino.prototypes=16", "heads.dino.hidden=24", "heads.dino.bottleneck=8"]


@pytest.fixture
def preset() -> Preset:
    return load_preset("tiny-dino", SMALL)


@pytest.fixture
def network(preset: Preset) -> Network:
    torch.manual_seed(0)
    return preset.network()


def official(network: Network, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return a network's weights under the keys of the original's full checkpoint."""
    return {prefix + k.replace("heads.dino.", "head."): v for k, v in network.weights().items()}


def full_checkpoint(network: Network) -> dict[str, object]:
    """Return the original's format: DDP's prefix on the student, an argparse Namespace, numpy numbers."""
    student = {k: v + 1 for k, v in official(network, "module.").items()}
    return {
        "student": student,
        "teacher": official(network),
        "optimizer": {
            "state": {},
            "param_groups": [{"lr": np.float64(0.1), "weight_decay": np.float32(0.2), "n": np.int64(3)}],
        },
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", lr=0.1),
        "dino_loss": {"center": torch.zeros(1, 16)},
    }


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, preset: Preset, network: Network) -> None:
    write_checkpoint(tmp_path / "ckpt.safetensors", network.weights(), preset, 7)
    for source in (tmp_path, tmp_path / "ckpt.safetensors"):
        weights = read_weights(source)
        assert weights.preset == preset
        assert all(torch.equal(v, network.backbone.model.state_dict()[k]) for k, v in weights.backbone.items())
        assert set(weights.heads["dino"]) == set(network.heads["dino"].state_dict())
    with safe_open(tmp_path / "ckpt.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "7"
        assert {k.split(".")[0] for k in file.keys()} == {"backbone", "heads"}  # noqa: SIM118


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_full_official_checkpoint(tmp_path: Path, network: Network, which: str) -> None:
    torch.save(full_checkpoint(network), tmp_path / "checkpoint.pth")
    weights = read_weights(tmp_path / "checkpoint.pth", which)
    offset = 1 if which == "student" else 0
    for key, value in network.backbone.model.state_dict().items():
        torch.testing.assert_close(weights.backbone[key], value + offset)
    own = network.heads["dino"].state_dict()
    assert set(weights.heads["dino"]) == set(own)
    for key, value in weights.heads["dino"].items():
        torch.testing.assert_close(value, own[key] + offset)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "teacher"])
def test_a_backbone_alone_with_any_prefix(tmp_path: Path, network: Network, prefix: str, wrapper: str | None) -> None:
    stored = {prefix + k: v for k, v in network.backbone.model.state_dict().items()}
    torch.save({wrapper: stored} if wrapper else stored, tmp_path / "backbone.pth")
    weights = read_weights(tmp_path / "backbone.pth")
    assert set(weights.backbone) == set(network.backbone.model.state_dict())
    assert weights.heads == {}


class Stored:
    """Path as a pickle stores it: by class and parts."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return self.kind, ("c:", "images")


@pytest.mark.parametrize("kind", ["pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"])
def test_a_checkpoint_with_paths_in_its_arguments_is_read(
    tmp_path: Path, network: Network, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        module, _, name = kind.rpartition(".")
        patch.setitem(sys.modules, module, types.ModuleType(module))  # as on the system that wrote the file
        patch.setattr(sys.modules[module], name, type(name, (), {"__module__": module}), raising=False)
        path = Stored(getattr(sys.modules[module], name))
        args = argparse.Namespace(data_path=path, output_dir=path)
        torch.save(full_checkpoint(network) | {"args": args}, tmp_path / "checkpoint.pth")
    weights = read_weights(tmp_path / "checkpoint.pth")
    assert set(weights.backbone) == set(network.backbone.model.state_dict())


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a weights file was run')",))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"teacher": Attack()}, tmp_path / "evil.pth")
    with pytest.raises(DinoError, match="cannot be read as weights"):
        read_weights(tmp_path / "evil.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "a.pth is empty; expected a checkpoint"),
        ("a.pth", b"rubbish", "cannot be read"),
        ("a.safetensors", b"rubbish", "damaged"),
        ("a.pth", None, "does not exist"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_an_error(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DinoError, match=message) as error:
        read_weights(tmp_path / name)
    assert "\n" not in error.value.message


def test_a_file_without_the_requested_network_is_an_error(tmp_path: Path, preset: Preset, network: Network) -> None:
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(DinoError, match="holds no weights"):
        read_weights(tmp_path / "empty.pth")
    torch.save({"teacher": official(network)}, tmp_path / "teacher.pth")
    with pytest.raises(DinoError, match="holds no student"):
        read_weights(tmp_path / "teacher.pth", "student")
    write_checkpoint(tmp_path / "ckpt.safetensors", network.weights(), preset, 7)
    with pytest.raises(DinoError, match="only the teacher"):
        read_weights(tmp_path, "student")
    with pytest.raises(DinoError, match="run folder"):
        (tmp_path / "nothing").mkdir()
        read_weights(tmp_path / "nothing")


@pytest.mark.parametrize("key", ["preset", "backbone"])
@pytest.mark.parametrize(
    ("stored", "writer", "message", "hint"),
    [
        ("{", "", "its {key} cannot be read", "copy it again"),
        ('{"a":' * 100_000, "", "nested too deeply", "copy it again"),
        ("[]", dinocli.__version__, "should be", "--set"),
        ("later", "9.7", "there is no key novel; the file was written by dinocli 9.7", "pip install dinocli==9.7"),
    ],
    ids=["corrupt", "nested", "a list", "a later version"],
)
def test_metadata_that_cannot_be_read_are_reported_in_one_line(
    tmp_path: Path, preset: Preset, network: Network, key: str, stored: str, writer: str, message: str, hint: str
) -> None:
    if stored == "later":
        config = preset if key == "preset" else preset.backbone
        stored = json.dumps(config.model_dump(mode="json") | {"novel": 1})
    tensors = {name: value.numpy() for name, value in network.weights().items()}
    write_tensors(tmp_path / "ckpt.safetensors", tensors, {key: stored, "dinocli": writer})
    with pytest.raises(DinoError) as error:
        read_weights(tmp_path / "ckpt.safetensors")
    assert message.format(key=key) in error.value.message
    assert "\n" not in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_neither_read_nor_written(
    tmp_path: Path, preset: Preset, network: Network, bad: float
) -> None:
    path = tmp_path / "ckpt.safetensors"
    write_checkpoint(path, network.weights(), preset, 7)
    good = path.read_bytes()
    weights = {k: v.clone() for k, v in network.weights().items()}
    weights["backbone.blocks.1.attn.qkv.weight"][0, :3] = bad
    weights["heads.dino.mlp.0.bias"][1] = bad
    with pytest.raises(DinoError, match=r"step 8 .*blocks.1.attn.qkv.weight holds 3 of .* \(and 1 more tensor\)"):
        write_checkpoint(path, weights, preset, 8)
    assert path.read_bytes() == good, "the existing file is kept"
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "bad.safetensors", {"preset": preset.model_dump_json(), "step": "8"})
    torch.save({"teacher": weights}, tmp_path / "bad.pth")
    for name, states in (("bad.safetensors", True), ("bad.pth", False)):
        with pytest.raises(
            DinoError, match=rf"{name} cannot be used: backbone.blocks.1.attn.qkv.weight holds 3 of"
        ) as error:
            read_weights(tmp_path / name)
        assert ("RUN/state/STEP" in error.value.hint) == states, "only runs of this tool have states"


def test_values_beyond_float32_are_not_finite() -> None:
    wide = {"steps": torch.arange(3), "empty": torch.empty(0), "one": torch.tensor(1.0)}
    assert not_finite(wide) is None
    assert not_finite(wide | {"wide": torch.tensor([1e300, 1.0], dtype=torch.float64)}) == (
        "wide holds 1 of 2 values that are not finite"
    )
    for dtype in (torch.float16, torch.bfloat16):
        assert not_finite({"half": torch.tensor([3e38, float("nan")]).to(dtype)})
