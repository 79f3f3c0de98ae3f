"""DINO by the original code and by dinocli, at equal steps: k-NN, rank, processor time and memory of both.

    git clone https://github.com/facebookresearch/dino
    python benchmarks/against_original.py DATA dino [--epochs 8] [--images 2400] [--seeds 3]

DATA holds `train` and `val` with class folders. `main_dino.py` runs unmodified on the CPU, in a process of its own that
replaces what the file imports: CUDA calls do nothing, NCCL becomes gloo, the ViT is the small one below, and
crops of 224 and 96 pixels have 48 and 24. dinocli runs the same network, crops, head, loss, schedules and optimizer in
float32. Both use one thread and one worker, and the same images.

Features are the class tokens of the averaged network, extracted in the same way for both, and classified by the
original's `knn_classifier` (k = 20, temperature 0.07). Time and memory are those of training with its workers;
memory is the largest resident size of one process.
"""

from __future__ import annotations

import argparse
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

_VIT = {"img_size": 48, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 6}
_SIZES = {224: 48, 96: 24}
_PROTOTYPES, _BATCH = 4096, 48
_LR, _MOMENTUM, _LOCALS = 0.004, 0.98, 4


class Score(NamedTuple):
    """Measured result of one run.

    Attributes:
        knn: k-NN accuracy in percent.
        rank: Effective rank of the test features.
        seconds: Processor time of training, in seconds.
        memory: Largest resident size of a process, in bytes.
    """

    knn: float
    rank: float
    seconds: float
    memory: int


def run_original(checkout: Path, words: Sequence[str]) -> None:
    """Run main_dino.py of a checkout on the CPU with command-line words; this changes torch in the whole process."""
    import torch._dynamo  # builds tables of torch's functions, in which replaced ones have no place

    sys.path.insert(0, str(checkout))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.synchronize = torch.cuda.set_device = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.hub.list = lambda *args, **kwargs: []  # type: ignore[assignment]
    of_torch = {"tensor": torch.tensor, "group": torch.distributed.init_process_group}
    torch.tensor = lambda *args, **kwargs: of_torch["tensor"](
        *args, **{k: v for k, v in kwargs.items() if k != "device"}
    )
    torch.distributed.init_process_group = lambda backend, **kwargs: of_torch["group"]("gloo", **kwargs)
    parallel = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = lambda module, device_ids: parallel(module)  # type: ignore[misc]
    # The same small ViT under the name that the command line knows.
    vits: Any = __import__("vision_transformer")
    vits.vit_tiny = lambda patch_size, **options: _small_vit(vits, options)
    _shrink_crops()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", "29517")
    sys.argv = ["main_dino.py", *words]
    runpy.run_path(str(checkout / "main_dino.py"), run_name="__main__")


def _small_vit(vits: ModuleType, options: dict[str, Any]) -> torch.nn.Module:
    norm = lambda width: torch.nn.LayerNorm(width, eps=1e-6)  # noqa: E731
    shape = _VIT | {"img_size": [_VIT["img_size"]]}
    return vits.VisionTransformer(**shape, mlp_ratio=4, qkv_bias=True, norm_layer=norm, **options)  # type: ignore[no-any-return]


def _shrink_crops() -> None:
    from torchvision import transforms

    crop = transforms.RandomResizedCrop
    transforms.RandomResizedCrop = lambda size, **options: crop(_SIZES[size], **options)  # type: ignore[misc,assignment]


def original_words(images: Path, out: Path, epochs: int, seed: int) -> list[str]:
    """Return the command line of main_dino.py."""
    options = {
        "arch": "vit_tiny", "patch_size": _VIT["patch_size"], "out_dim": _PROTOTYPES, "use_fp16": "false",
        "batch_size_per_gpu": _BATCH, "epochs": epochs, "lr": _LR, "min_lr": 1e-5, "warmup_epochs": 1,
        "momentum_teacher": _MOMENTUM, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04, "drop_path_rate": 0.0,
        "local_crops_number": _LOCALS, "data_path": images, "output_dir": out, "seed": seed, "num_workers": 1,
        "saveckp_freq": epochs + 1,
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [*words, "--global_crops_scale", "0.4", "1.0", "--local_crops_scale", "0.15", "0.5"]


def our_words(images: Path, out: Path, epochs: int, seed: int) -> list[str]:
    """Return the words of `dino` for the same run."""
    options = ", ".join(f"{key}={value}" for key, value in _VIT.items())
    settings = {
        "backbone.name": "vit_tiny_patch16_224", "backbone.options": f"{{{options}}}", "backbone.drop_path": 0,
        "heads.dino.prototypes": _PROTOTYPES, "teacher.momentum.start": _MOMENTUM, "views.locals": _LOCALS,
        "views.global_1.size": 48, "views.global_2.size": 48, "views.local.size": 24,
        "views.local.scale": "[0.15, 0.5]", "optimizer.lr.start": _LR, "optimizer.lr.end": 1e-5,
        "optimizer.lr.warmup_epochs": 1, "training.precision": "float32",
    }  # fmt: skip
    words = ["pretrain", str(images), "--preset", "vits16-vanilla", "--epochs", str(epochs), "--seed", str(seed)]
    words += ["--batch-size", str(_BATCH), "--workers", "1", "--device", "cpu", "--no-report", "--out", str(out)]
    return [*words, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


def train(words: Sequence[str], log: Path) -> tuple[float, int]:
    """Run a command; return its processor time in seconds and the largest resident size of its processes in bytes.

    Raises:
        SystemExit: If it fails; its last lines are printed.
    """
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("\n".join([*log.read_text().splitlines()[-15:], f"failed: {' '.join(map(str, words[:4]))} ..."]))
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def score(checkpoint: Path, data: Path, folder: Path, classify: Any) -> tuple[float, float]:
    """Return the k-NN accuracy and the effective rank of a network's features."""
    from dinocli.evals.spread import effective_rank
    from dinocli.features.store import read_features

    words = ["extract", str(checkpoint), str(data), "--out", str(folder), "--precision", "float32", "--device", "cpu"]
    heads = ["--set", f"backbone.options.num_heads={_VIT['num_heads']}"] if checkpoint.suffix == ".pth" else []
    train([sys.executable, "-m", "dinocli", *words, *heads], folder.with_suffix(".log"))
    train_set, test_set = (read_features(folder / f"{split}.safetensors") for split in ("train", "val"))
    first, second = (torch.nn.functional.normalize(torch.tensor(part.values[:])) for part in (train_set, test_set))
    labels: list[Tensor] = [torch.tensor(part.labels[:]).long() for part in (train_set, test_set)]
    top1, _ = classify(first, labels[0], second, labels[1], 20, 0.07, len(train_set.classes))
    return top1, effective_rank(second)


def link_images(data: Path, folder: Path, count: int) -> Path:
    """Link up to `count` training images, the same number of each class; return their folder."""
    classes = sorted(path for path in (data / "train").iterdir() if path.is_dir())
    for kind in classes:
        (folder / kind.name).mkdir(parents=True)
        for image in sorted(kind.iterdir())[: count // len(classes)]:
            (folder / kind.name / image.name).symlink_to(image.resolve())
    return folder


def main(words: Sequence[str] | None = None) -> dict[str, list[Score]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("checkout", type=Path, nargs="?", help="clone of facebookresearch/dino")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(words)
    if options.checkout is None or not (options.checkout / "main_dino.py").is_file():
        problem = "no checkout given" if options.checkout is None else f"{options.checkout} holds no main_dino.py"
        parser.error(f"{problem}; hint: git clone https://github.com/facebookresearch/dino, then pass its folder")
    sys.path.append(str(options.checkout.resolve()))
    from eval_knn import knn_classifier

    found: dict[str, list[Score]] = {"original": [], "dinocli": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = link_images(options.data, folder / "images", options.images)
        for seed in range(options.seeds):
            for way in found:
                out = folder / f"{way}-{seed}"
                if way == "original":
                    out.mkdir()
                    start = [sys.executable, __file__, "--run-original", str(options.checkout.resolve())]
                    cost = train([*start, *original_words(images, out, options.epochs, seed)], out.with_suffix(".txt"))
                    weights = out / "checkpoint.pth"
                else:
                    start = [sys.executable, "-m", "dinocli"]
                    cost = train([*start, *our_words(images, out, options.epochs, seed)], out.with_suffix(".txt"))
                    weights = out / "ckpt.safetensors"
                result = score(weights, options.data, folder / f"features-{way}-{seed}", knn_classifier)
                found[way].append(Score(*result, *cost))
                print(f"seed {seed} {way}: {found[way][-1]}", flush=True)
        steps = options.epochs * (sum(1 for _ in images.rglob("*.*")) // _BATCH)
    table = Table("code", "steps", "processor s", "memory, GB", "k-NN, %", "rank")
    for way, scores in found.items():
        knn = [each.knn for each in scores]
        table.add_row(
            way,
            str(steps),
            f"{statistics.mean(each.seconds for each in scores):.0f}",
            f"{max(each.memory for each in scores) / 1e9:.2f}",
            f"{statistics.mean(knn):.1f} ({min(knn):.1f} to {max(knn):.1f})",
            f"{statistics.mean(each.rank for each in scores):.1f}",
        )
    Console().print(table)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run-original"]:
        run_original(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
