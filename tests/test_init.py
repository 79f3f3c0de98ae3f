"""The package's own face: what a notebook calls, and that it gives what the commands write."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_features, write_images, write_run
from PIL import Image
from safetensors.torch import load_file

import dinocli
from dinocli.apps.attention.sheets import draw
from dinocli.cli import main
from dinocli.core.device import pick_device
from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.features.encoder import Encoder, quick
from dinocli.features.extract import extract
from dinocli.train.logger import Progress
from dinocli.weights.load import load_encoder

ROOT = Path(__file__).parent.parent


def test_it_gives_the_features_that_extract_stores(tmp_path: Path) -> None:
    source, images = write_run(tmp_path), write_images(tmp_path / "images", 7, size=70)
    Image.new("RGB", (90, 41), "olive").save(images / "photo.jpg")
    command = quick(load_encoder(str(source), pick_device("cpu")), "bfloat16", compiled=False)
    stored = extract(command, image_folder(images), tmp_path / "f.safetensors", data="d", batch_size=5)
    features = dinocli.read_features(stored.path)
    encoder = dinocli.load(source, device="cpu")
    given = encoder([images / name for name in features.paths], batch_size=5)
    assert given.dtype == torch.float32
    # Products in bfloat16, if the device has it: two ways to the same numbers may differ by the last of its eight bits.
    np.testing.assert_allclose(given.numpy(), features.values[:], rtol=0.02, atol=0.02)
    assert encoder.precision == command.precision
    assert dinocli.load(source, device="cpu", precision="float32").precision == "float32"


def test_one_image_is_a_row_and_every_choice_has_its_shape(tmp_path: Path, encoder: Encoder) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert encoder(pixels).shape == (1, 16)
    assert_same_features(encoder(pixels), encoder([Image.fromarray(pixels)]))
    assert encoder([pixels] * 5, tokens="patches", blocks=2, size=32, batch_size=2).shape == (5, 16, 32)
    assert encoder(pixels, tokens="cls+avg").shape == (1, 32)


def test_an_encoder_is_told_in_a_line(encoder: Encoder) -> None:
    assert repr(encoder).startswith("Encoder(source='x', fingerprint='0123', size=16")
    assert "Linear" not in repr(encoder)


def test_a_mistake_is_told_with_its_hint(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"no image")
    good = np.zeros((20, 30, 3), dtype=np.uint8)
    with pytest.raises(DinoError, match=r"torn\.jpg cannot be read: not an image"):
        encoder([good, tmp_path / "torn.jpg", good])
    with pytest.raises(DinoError, match=r"gone\.jpg cannot be read"):
        encoder("gone.jpg")
    with pytest.raises(DinoError, match="tokens='patch' is not valid") as caught:
        encoder(good, tokens="patch")
    assert caught.value.hint == 'tokens="patches"'
    assert caught.value.__notes__ == ['hint: tokens="patches"'], "a traceback shows it"
    with pytest.raises(DinoError, match="at least one patch of 8 pixels"):
        encoder(good, size=4)


def test_attention_is_what_the_command_draws(tmp_path: Path, encoder: Encoder) -> None:
    photo = write_images(tmp_path, 1, size=50) / "0000.png"
    drawn = draw([encoder], photo, tmp_path / "a", keep=0.5, size=32, raw=True)
    maps = dinocli.attention(encoder, photo, size=32)
    from safetensors.numpy import load_file

    np.testing.assert_allclose(load_file(drawn.raw)["heads"], maps.heads, rtol=1e-4, atol=1e-6)
    assert dinocli.attention(encoder, photo).heads.shape == (2, 4, 4)


def test_what_it_says_of_types_is_shipped() -> None:
    assert (ROOT / "dinocli" / "py.typed").is_file()
    assert (
        "py.typed"
        in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dinocli"]
    )


@pytest.mark.slow
def test_a_users_script_is_checked(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    lines = ["import dinocli", "encoder = dinocli.load('x')", "rows: list[int] = encoder(['a.jpg'])", "encoder(7)"]
    script.write_text("\n".join(lines))
    options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
    told = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(script)], capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert "user.py:3: error: Incompatible types" in told
    assert "user.py:4: error: Argument 1" in told
    assert "Found 2 errors" in told


def test_training_is_imported_without_libraries_that_only_networks_or_drawings_need() -> None:
    """Each takes a second or more, so wrong settings would be reported as much later."""
    late = ["timm", "torchvision", "matplotlib", "torch.distributed.fsdp", "torch._dynamo", "dinocli.viz.report"]
    line = f"import sys, dinocli.train.pretrain; print([name for name in {late} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


SHORT = {"preset": "tiny-dino", "batch_size": 4, "steps": 2, "device": "cpu", "report": False}


def test_pretraining_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path / "images", 6)
    monkeypatch.chdir(tmp_path)
    seen: list[Progress] = []
    run = dinocli.pretrain(images, **SHORT, workers=0, callbacks=[seen.append], training={"steps_per_epoch": 50})
    assert (run.step, run.folder, seen[-1].step) == (2, Path("runs/tiny-dino-1"), 2)
    command = ["pretrain", "images", "--preset", "tiny-dino", "--batch-size", "4", "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["dino", *command, "--workers", "0", "--no-report", "--out", "command"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    mine, other = load_file(run.checkpoint), load_file("command/ckpt.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in mine.items())
    assert dinocli.pretrain(images, **SHORT | {"steps": 3}, workers=0).began == 2  # the same settings resume


def test_pretraining_on_images_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    run = dinocli.pretrain(list(pixels), **SHORT)
    assert run.step == 2
    assert dinocli.pretrain(pixels, **SHORT | {"steps": 3}).began == 2  # the same images
    assert dinocli.pretrain(pixels[::-1], **SHORT).folder != run.folder
    with pytest.raises(DinoError, match=r"there is no key training\.epoch"):
        dinocli.pretrain(pixels, **SHORT, training={"epoch": 2})


def test_a_callback_that_raises_ends_the_run(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise StopIteration

    pixels = np.zeros((4, 40, 40, 3), dtype=np.uint8)
    with pytest.raises(StopIteration):
        dinocli.pretrain(pixels, **SHORT, out=tmp_path / "run", callbacks=[stop])
    assert dinocli.pretrain(pixels, **SHORT, out=tmp_path / "run").began > 0
