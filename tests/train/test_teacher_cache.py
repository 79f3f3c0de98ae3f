"""Features of teachers for fixed views: computed once, and read back by every step."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import together, write_images
from safetensors.torch import load_file

from dinocli.core.errors import DinoError
from dinocli.data.sources.open import image_folder
from dinocli.method.feature_distillation import FeatureDistillation
from dinocli.method.preset import load_preset
from dinocli.models.architecture import BackboneConfig
from dinocli.train.plan import Plan
from dinocli.train.pretrain import pretrain, rehearse
from dinocli.train.teacher_cache import check_space, describe
from dinocli.weights.checkpoint import read_weights
from dinocli.weights.feature_teachers import FeatureTeachers
from dinocli.weights.load import _freeze, load_encoder

CPU = torch.device("cpu")
SMALL = [
    "backbone.options={img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2}",
    "views.global_1.size=16",
    "losses.features.adaptor={kind='linear'}",
    "training.batch_size=4",
    "training.epochs=8",
    "optimizer.lr.warmup_epochs=0",
    "optimizer.lr.start=0.05",
    "training.precision=float32",
]


def teachers_of(*seeds: int) -> FeatureTeachers:
    encoders = []
    for seed in seeds:
        torch.manual_seed(seed)
        options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
        backbone = BackboneConfig(name="vit_tiny_patch16_224", options=options).build(drop_path=False)
        encoders.append(_freeze(backbone, 16, (0.5,) * 3, (0.3,) * 3, f"teacher {seed}", CPU))
    return FeatureTeachers(tuple(encoders))


def plan_of(images: Path, *more: str, teachers: FeatureTeachers | None = None, **changes: object) -> Plan:
    preset = load_preset("distill-features", [*SMALL, *more])
    source = image_folder(images)
    made = Plan("small", preset, source, 6, Path("runs/a"), CPU, 0, None, teacher=teachers or teachers_of(1))
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture(name="here")
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def run(plan: Plan) -> Path:
    notes: list[str] = []
    return pretrain(plan, lambda progress: None, notes.append).folder


def test_a_run_learns_from_features_and_is_read_as_an_encoder(here: Path, images: Path) -> None:
    plan = plan_of(images, stop=24, monitor=str(images), report=True, teachers=teachers_of(1, 2))
    folder = run(plan)
    losses = losses_of(folder)
    assert losses[-1] < losses[0] - 0.02
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"class_cosine_1", "patch_cosine_2", "patch_smooth_l1_2", "features/class", "knn", "rank"} <= set(line)
    encoder = load_encoder(str(folder), CPU)
    assert encoder.size == 16 and encoder.backbone.width == 16 and encoder.step == 24
    assert read_weights(folder).heads == {}
    assert (folder / "report.html").read_text().count("Agreement with the teachers")
    state = json.loads((folder / "state" / "24" / "state.json").read_text())
    assert state["teacher"] == plan.teacher.fingerprint


def test_statistics_do_not_depend_on_batch_workers_or_resume(here: Path, images: Path) -> None:
    def statistics(folder: Path) -> dict[str, torch.Tensor]:
        state = max((folder / "state").iterdir(), key=lambda path: int(path.name))
        return {k: v for k, v in load_file(state / "trainer.safetensors").items() if "standardizers" in k}

    found = [
        statistics(
            run(plan_of(images, f"training.batch_size={size}", stop=stop, workers=workers, out=Path(f"runs/{i}")))
        )
        for i, (size, stop, workers) in enumerate([(4, 2, 0), (6, 2, 2), (4, 0, 0)])
    ]
    assert len(found[0]) == 4
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_ends_in_the_same_bits(here: Path, images: Path, cached: bool) -> None:
    more = {"teacher_cache": Path("cache")} if cached else {}
    whole = plan_of(images, "views.fixed=2", **more)
    end = run(whole)
    parted = replace(whole, out=Path("runs/b"))
    stopped = pretrain(parted, lambda progress: os.kill(os.getpid(), signal.SIGINT))
    assert stopped.stopped
    with pytest.raises(DinoError, match="began with another teacher than teacher 2"):
        run(replace(parted, teacher=teachers_of(2)))
    assert pretrain(parted, lambda progress: None).began == stopped.step
    assert (parted.out / "ckpt.safetensors").read_bytes() == (end / "ckpt.safetensors").read_bytes()


def test_features_read_back_give_the_same_losses(here: Path, images: Path) -> None:
    """float16 rounds standardized features to about three digits."""
    two = teachers_of(1, 2)
    more = ["views.fixed=2", "losses.features.teacher_size=32", "training.batch_size=5"]
    plain = run(plan_of(images, *more, teachers=two, out=Path("runs/plain")))
    cached = plan_of(images, *more, teachers=two, out=Path("runs/written"), teacher_cache=Path("cache"))
    facts = check_space(cached)
    assert not facts.stored and not Path("cache").exists()
    assert f"take {facts.bytes / 1e6:.1f} MB of disk" in describe(facts)
    written = run(cached)
    # 12 images, 2 views of each, 64 patches and a class token of 24 numbers, 2 bytes, 2 teachers
    assert facts.bytes == 12 * 2 * 65 * 24 * 2 * 2
    files = {path.name: path for path in facts.folder.iterdir()}
    assert set(files) == {"cache.json", "statistics.safetensors", "teacher-1.safetensors", "teacher-2.safetensors"}
    size = sum(files[f"teacher-{i}.safetensors"].stat().st_size for i in (1, 2))
    assert facts.bytes < size < facts.bytes + 4096
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    read = run(replace(cached, out=Path("runs/read")))
    assert {name: path.stat().st_mtime_ns for name, path in files.items()} == before
    assert "replace the teacher" in describe(check_space(cached))
    assert losses_of(read) == losses_of(written)
    assert losses_of(plain) == pytest.approx(losses_of(read), rel=1e-3)
    assert losses_of(plain)[0] != losses_of(plain)[-1]


def test_the_teachers_do_not_run_if_their_features_are_stored(
    here: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(images, "views.fixed=1", teacher_cache=Path("cache"))
    run(plan)

    def fail(*arguments: object) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr("dinocli.method.feature_distillation.TeacherNetwork.forward", fail)
    run(replace(plan, out=Path("runs/b")))
    with pytest.raises(AssertionError, match="the teacher ran"):
        run(replace(plan, out=Path("runs/c"), teacher_cache=Path("other")))
    assert not list(Path("other").glob("*/cache.json")), "an interrupted write leaves no cache"


def test_another_teacher_set_or_setting_has_its_own_features(here: Path, images: Path) -> None:
    plan = plan_of(images, "views.fixed=1", teacher_cache=Path("cache"), stop=0)
    run(plan)
    folder = check_space(plan).folder
    same = [
        plan_of(
            images, "views.fixed=1", "training.batch_size=6", "optimizer.lr.start=0.1", teacher_cache=Path("cache")
        ),
        plan_of(images, "views.fixed=1", "backbone.options.embed_dim=12", teacher_cache=Path("cache")),
    ]
    assert all(check_space(other).folder == folder for other in same), "neither the student nor its optimizer matters"
    options = {"teacher_cache": Path("cache")}
    others = [
        plan_of(images, "views.fixed=1", teachers=teachers_of(2), **options),
        plan_of(images, "views.fixed=2", **options),
        plan_of(images, "views.fixed=1", "training.seed=1", **options),
        plan_of(images, "views.fixed=1", "views.global_1.flip=0.1", **options),
        plan_of(images, "views.fixed=1", "losses.features.teacher_size=32", **options),
        plan_of(write_images(here / "more", 5), "views.fixed=1", **options),
    ]
    found = [check_space(other) for other in others]
    assert len({facts.folder for facts in found} | {folder}) == 7
    assert all(not facts.stored and facts.others == 1 for facts in found)
    assert "1 of other teachers, images or settings stay" in describe(found[0])
    # The same names with other contents are other images too.
    shutil.copy(images / "a" / "0000.png", images / "a" / "0001.png")
    assert check_space(plan).folder != folder


def test_an_unreadable_image_keeps_the_place_of_its_views(here: Path, images: Path) -> None:
    for i in range(6, 30):
        shutil.copy(images / "a" / f"{i % 6:04}.png", images / "a" / f"{i:04}.png")
    (images / "a" / "0003.png").write_bytes(b"no image")
    more = ["views.fixed=1", "training.batch_size=12"]
    plain = run(plan_of(images, *more, stop=4))
    cached = run(plan_of(images, *more, stop=4, out=Path("runs/b"), teacher_cache=Path("cache")))
    assert losses_of(cached) == pytest.approx(losses_of(plain), rel=1e-3)


def test_a_damaged_cache_is_an_error_that_names_it(here: Path, images: Path) -> None:
    plan = plan_of(images, "views.fixed=1", teacher_cache=Path("cache"), stop=0)
    run(plan)
    file = check_space(plan).folder / "teacher-1.safetensors"
    bytes_ = bytearray(file.read_bytes())
    bytes_[-500] ^= 1
    file.write_bytes(bytes_)
    with pytest.raises(DinoError, match=r"the teacher features in cache/.* are damaged") as error:
        run(replace(plan, out=Path("runs/b")))
    assert error.value.hint.startswith("remove cache/")


def test_a_full_disk_is_an_error_before_anything_is_written(
    here: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(images, "views.fixed=4", teacher_cache=Path("cache/below"))
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    for check in (rehearse, run):
        with pytest.raises(DinoError, match=r"features take 0\.1 MB; cache/below has 0\.1 MB free") as error:
            check(plan)
        assert "--set views.fixed=2" in error.value.hint
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("more", "message", "hint"), [([], "needs fixed views, and every epoch draws new ones", "--set views.fixed=4")]
)
def test_a_cache_needs_fixed_views(here: Path, images: Path, more: list[str], message: str, hint: str) -> None:
    with pytest.raises(DinoError, match=message) as error:
        plan_of(images, *more, teacher_cache=Path("cache"))
    assert hint in error.value.hint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_preparation_and_leaves_nothing(
    here: Path, images: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    plan = plan_of(images, "views.fixed=2", teacher_cache=Path("cache"))
    made = FeatureDistillation.targets

    def stop(*arguments: object) -> object:
        os.kill(os.getpid(), number)
        return made(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FeatureDistillation, "targets", stop)
        run(plan)
    assert not [path for path in Path("cache").glob("*") if not path.name.startswith(".")] and not plan.out.exists()
    assert run(plan) == plan.out, "the same command starts again"


def train_together(plan: Plan) -> str:
    try:
        run(plan)
    except DinoError as error:
        return f"{error.message}; {error.hint}"
    return ""


def test_several_processes_read_features_that_one_has_written(here: Path, images: Path) -> None:
    more = ["views.fixed=2", "training.batch_size=4"]
    plan = plan_of(images, *more, teacher_cache=Path("cache"))
    for said in together(2, train_together, plan):
        assert "a single process must write the teacher's features, not 2; run the same command in one" in said
    alone = run(replace(plan, out=Path("runs/alone")))
    shutil.rmtree("runs/a", ignore_errors=True)
    assert together(2, train_together, plan) == ["", ""]
    assert losses_of(Path("runs/a")) == pytest.approx(losses_of(alone), rel=1e-4)
