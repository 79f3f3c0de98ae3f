from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_images
from PIL import Image

from dinocli.data.loader.train import TrainBatches
from dinocli.data.sources.open import Images, image_folder
from dinocli.data.sources.shards import open_shards
from dinocli.engine.trainer import Trainer
from dinocli.evals.spread import effective_rank, uniformity
from dinocli.features.encoder import NotFinite
from dinocli.method.preset import Preset, load_preset
from dinocli.train import snapshots as module
from dinocli.train.plan import start_clock
from dinocli.train.snapshots import TILE, Photos

VIT = ["backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2}"]
RESNET = ["backbone={name='resnet10t'}", "views.global_1.size=32", "views.global_2.size=32", "views.local.size=16"]


@pytest.fixture
def source(images: Path) -> Images:
    return image_folder(images)


@pytest.fixture
def preset() -> Preset:
    return load_preset("tiny-dino", SMALL + VIT)


def test_the_choice_depends_on_the_seed_alone(source: Images, preset: Preset) -> None:
    first, again = Photos.of(source, preset), Photos.of(source, preset)
    other = Photos.of(source, load_preset("tiny-dino", [*SMALL, *VIT, "training.seed=1"]))
    assert torch.equal(first.pool, again.pool) and first.names == again.names
    assert first.names != other.names
    assert first.pool.shape == (12, 3, 16, 16) and first.pool.dtype == torch.uint8
    assert len(set(first.names)) == len(first.shown) == 6 and first.shown[0].shape == (34, 34, 3)


def test_the_pool_is_a_sample_of_a_large_source(
    source: Images, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POOL", 8)
    assert len(Photos.of(source, preset).pool) == 8


def test_unreadable_photos_are_skipped(images: Path, preset: Preset) -> None:
    for i, name in enumerate(["0000", "0001", "0002"]):
        (images / "a" / f"{name}.png").write_bytes(b"no image" * i)
    source = image_folder(images)
    (images / "b" / "0000.png").unlink()
    assert len(Photos.of(source, preset).pool) == 8


def test_a_large_jpeg_is_resized_as_in_the_evaluation(tmp_path: Path, preset: Preset) -> None:
    ramp = np.linspace(0, 255, 900).astype(np.uint8)
    pixels = np.stack([np.broadcast_to(ramp, (600, 900)), np.broadcast_to(ramp[:600, None], (600, 900))], -1)
    photo = np.concatenate([pixels, pixels[..., :1]], -1)
    Image.fromarray(photo).save(tmp_path / "a.jpg", quality=98)
    photos = Photos.of(image_folder(tmp_path), preset)
    whole = module.resize_and_center(photo, module.resize_for(16), 16)
    assert (photos.pool[0].int() - whole.int()).abs().max() <= 4


def test_the_first_photos_of_shards_are_chosen(tmp_path: Path, preset: Preset) -> None:
    folder = write_images(tmp_path / "images", 9)
    with tarfile.open(tmp_path / "s-000.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    photos = Photos.of(open_shards(str(tmp_path / "s-000.tar")), preset)
    assert photos.names == [f"s-000.tar/000{i}.png" for i in range(6)] and len(photos.pool) == 9


def test_a_snapshot_writes_pictures_and_figures(source: Images, preset: Preset, tmp_path: Path) -> None:
    photos, method = Photos.of(source, preset), preset.method()
    figures = photos.snapshot(method.teacher, 0, tmp_path)
    photos.snapshot(method.teacher, 20, tmp_path)
    wanted = [
        "attention-0.jpg",
        "attention-20.jpg",
        "neighbours-0.jpg",
        "neighbours-20.jpg",
        "photos.jpg",
        "photos.json",
    ]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == wanted
    sizes = {name: Image.open(tmp_path / "pictures" / name).size for name in wanted if name.endswith("jpg")}
    assert sizes["photos.jpg"] == sizes["attention-0.jpg"] == (6 * TILE, TILE)
    assert sizes["neighbours-20.jpg"] == (6 * TILE * 2 // 3, 6 * TILE * 2 // 3)
    assert json.loads((tmp_path / "pictures" / "photos.json").read_text())["names"] == photos.names
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preset.views.mean, preset.views.std))
    with torch.no_grad():
        features = method.teacher.eval().backbone((photos.pool / 255 - mean) / std).cls
    assert figures == pytest.approx({"rank": effective_rank(features), "uniformity": uniformity(features)}, rel=1e-4)


def test_neighbours_are_the_nearest_by_cosine_and_never_the_photo_itself() -> None:
    features = torch.tensor([[1.0, 0], [0, 1], [5, 1], [2, 0], [-1, 0]])
    assert module._nearest(features, 2, 3) == [[0, 3, 2, 1], [1, 2, 0, 3]]
    assert module._nearest(torch.ones(3, 2), 2, 5) == [[0, 1, 2], [1, 0, 2]], "equal features, fewer than five"


def test_a_convolutional_network_has_no_maps(source: Images, tmp_path: Path) -> None:
    preset = load_preset("resnet50", SMALL + RESNET)
    figures = Photos.of(source, preset).snapshot(preset.method().teacher, 5, tmp_path)
    assert set(figures) == {"rank", "uniformity"}
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "neighbours-5.jpg",
        "photos.jpg",
        "photos.json",
    ]


def test_a_network_with_rotary_positions_has_maps(source: Images, tmp_path: Path) -> None:
    preset = load_preset(
        "tiny-dino", [*SMALL, *VIT, "backbone.name=vit_small_patch16_dinov3", "backbone.positions=none"]
    )
    method = preset.method()
    Photos.of(source, preset).snapshot(method.teacher, 5, tmp_path)
    assert Image.open(tmp_path / "pictures" / "attention-5.jpg").size == (6 * TILE, TILE)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_photos_are_no_error(count: int, tmp_path: Path, preset: Preset) -> None:
    source = image_folder(write_images(tmp_path / "images", 3))
    for path in sorted((tmp_path / "images").iterdir())[count:]:
        path.write_bytes(b"")
    figures = Photos.of(source, preset).snapshot(preset.method().teacher, 1, tmp_path / "run")
    assert bool(figures) == (tmp_path / "run").exists() == (count == 2)


def test_non_finite_features_are_not_drawn(source: Images, preset: Preset, tmp_path: Path) -> None:
    method = preset.method()
    for parameter in method.teacher.parameters():
        parameter.fill_(math.nan)
    with pytest.raises(NotFinite, match=r"not finite: .* values of (attention|class tokens)"):
        Photos.of(source, preset).snapshot(method.teacher, 1, tmp_path)
    assert not list((tmp_path / "pictures").glob("*-1.jpg"))


@pytest.mark.parametrize("settings", [("tiny-dino", VIT), ("resnet50", RESNET)], ids=["vit", "resnet"])
def test_snapshots_do_not_change_a_bit_of_the_run(
    settings: tuple[str, list[str]], source: Images, tmp_path: Path
) -> None:
    preset = load_preset(settings[0], [*SMALL, *settings[1], "optimizer.lr_rule=none"])

    def trained(look: Callable[[int], None]) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  shows if anything draws from it
        method = preset.method()
        trainer = Trainer(method, preset.optimizer, start_clock(preset, source.count), batch_size=4)
        batches = TrainBatches(source, preset.views, batch_size=4, seed=0, device=torch.device("cpu"))
        methods.append(method)
        look(0)
        trainer.fit(batches, 4, lambda clock, values: look(clock.step))
        batches.close()
        state = {**method.state_dict(), "torch": torch.get_rng_state()}
        return state | {"numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}  # noqa: NPY002

    methods: list[torch.nn.Module] = []
    plain = trained(lambda step: None)

    def look(step: int) -> None:
        teacher = methods[-1].teacher
        modes = [m.training for m in teacher.modules()]
        Photos.of(source, preset).snapshot(teacher, step, tmp_path)
        assert [m.training for m in teacher.modules()] == modes and torch.is_grad_enabled()

    teacher_mixed = trained(look)
    assert plain.keys() == teacher_mixed.keys()
    for key, value in plain.items():
        assert torch.equal(value, teacher_mixed[key]), key


def test_each_module_gets_its_own_mode_back(source: Images, preset: Preset, tmp_path: Path) -> None:
    teacher = preset.method().teacher
    teacher.train()
    teacher.heads.eval()
    modes = [m.training for m in teacher.modules()]
    Photos.of(source, preset).snapshot(teacher, 1, tmp_path)
    assert [m.training for m in teacher.modules()] == modes and len(set(modes)) == 2


def test_a_full_disk_leaves_no_incomplete_picture(
    source: Images, preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, teacher = Photos.of(source, preset), preset.method().teacher
    photos.snapshot(teacher, 1, tmp_path)
    before = (tmp_path / "pictures" / "attention-1.jpg").read_bytes()

    def torn(self: Image.Image, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(OSError, match="No space left"):
        photos.snapshot(teacher, 1, tmp_path)
    assert (tmp_path / "pictures" / "attention-1.jpg").read_bytes() == before
    assert not list((tmp_path / "pictures").glob(".*"))
    assert Image.open(io.BytesIO(before)).size == (6 * TILE, TILE)
