from __future__ import annotations

import errno
import io
import itertools
import multiprocessing
import os
import signal
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import together, write_images
from PIL import Image

from dinocli.apps.pack import pack
from dinocli.core import device as device_module
from dinocli.core.device import float32_products
from dinocli.core.distributed import size
from dinocli.core.errors import DinoError
from dinocli.core.tensors import TensorStream
from dinocli.data.sources.open import Source, image_folder, open_source, photos
from dinocli.data.views.crops import crop_boxes, crop_tries, cut, draws, uniforms
from dinocli.features import encoder as encoder_module
from dinocli.features import extract as extract_module
from dinocli.features import writer as writer_module
from dinocli.features.encoder import Encoder, augmented, quick
from dinocli.features.extract import Extracted, extract
from dinocli.features.photos import encode
from dinocli.features.store import Provenance, read_features, read_splits
from dinocli.features.unfinished import forget
from dinocli.features.writer import FeatureWriter, write_features
from dinocli.models.architecture import BackboneConfig


@pytest.mark.parametrize(
    ("tokens", "blocks", "size", "shape"),
    [
        ("cls", 1, None, (16,)),
        ("cls", 3, None, (48,)),
        ("cls+avg", 1, None, (32,)),
        ("patches", 1, None, (4, 16)),
        ("patches", 2, 32, (16, 32)),
    ],
)
def test_shapes(
    tmp_path: Path, images: Path, encoder: Encoder, tokens: str, blocks: int, size: int | None, shape: tuple[int, ...]
) -> None:
    path = tmp_path / "f.safetensors"
    done = extract(encoder, image_folder(images), path, data="d", tokens=tokens, blocks=blocks, size=size, batch_size=5)
    assert (done.images, done.shape) == (12, shape)
    read = read_features(path)
    assert read.values.shape == (12, *shape)
    assert (read.provenance.tokens, read.provenance.blocks, read.provenance.size, read.provenance.fingerprint) == (
        tokens,
        blocks,
        size or 16,
        "0123",
    )


def test_rows_do_not_depend_on_batches_or_workers(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    values = []
    for i, (batch_size, workers) in enumerate([(12, 0), (5, 0), (5, 2)]):
        extract(
            encoder,
            image_folder(images),
            tmp_path / f"{i}.safetensors",
            data="d",
            batch_size=batch_size,
            workers=workers,
        )
        values.append(read_features(tmp_path / f"{i}.safetensors").values)
    # The order of float32 sums may depend on the batch size and on memory alignment.
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)
    np.testing.assert_allclose(values[1], values[2], atol=1e-5)


def test_float16_files_hold_nearly_the_same_features(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    whole, half = (
        read_features(extract(encoder, image_folder(images), tmp_path / f"{d}.safetensors", data="d", dtype=d).path)
        for d in ("float32", "float16")
    )
    np.testing.assert_allclose(half.values[:], whole.values[:], rtol=1e-3, atol=1e-6)
    sizes = [(tmp_path / f"{d}.safetensors").stat().st_size for d in ("float32", "float16")]
    assert sizes[0] - sizes[1] == 12 * 16 * 2


@pytest.mark.parametrize("there", [True, False])
def test_bfloat16_products_give_nearly_the_same_features_and_are_recorded(
    tmp_path: Path, images: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    for module in (encoder_module, device_module):
        monkeypatch.setattr(module, "has_bfloat16", lambda device: there)
    read = []
    for name, made in (("fine", encoder), ("coarse", quick(encoder, "bfloat16", compiled=False))):
        extract(made, image_folder(images), tmp_path / f"{name}.safetensors", data="d")
        read.append(read_features(tmp_path / f"{name}.safetensors"))
    fine, coarse = read
    assert (fine.provenance.precision, coarse.provenance.precision) == ("float32", "bfloat16" if there else "float32")
    a, b = (np.asarray(f.values) for f in read)
    assert np.allclose(a, b, rtol=0, atol=1e-5) == (not there), (
        "bfloat16 has eight significant bits: differences of about 1e-3"
    )
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.999
    if there:
        with pytest.raises(DinoError, match="made with different precisions"):
            read_splits(tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_views_do_not_depend_on_the_process_that_cuts_them(
    tmp_path: Path, images: Path, encoder: Encoder, count: int
) -> None:
    (images / "b" / "0000.png").write_bytes(b"no image")
    found = []
    for i, (batch_size, workers, seed) in enumerate([(12, 0, 0), (5, 2, 0), (5, 0, 1)]):
        path = tmp_path / f"{i}.safetensors"
        options = {"batch_size": batch_size, "workers": workers, "seed": seed}
        done = extract(encoder, image_folder(images), path, data="d", views=count, **options)
        assert (done.images, done.shape) == (11, (1 + count, 16))
        found.append(read_features(path))
    extract(encoder, image_folder(images), tmp_path / "plain.safetensors", data="d")
    plain = read_features(tmp_path / "plain.safetensors")
    assert (plain.views, plain.provenance.views, found[0].provenance.views) == (None, 0, count)
    assert found[0].values.shape == (11, 16)
    assert found[0].views.shape == (11, count, 16)
    np.testing.assert_allclose(found[0].values[:], plain.values[:], atol=1e-5)
    np.testing.assert_allclose(found[0].views[:], found[1].views[:], atol=1e-5)
    assert np.abs(found[1].views[:] - found[2].views[:]).max() > 1e-3, "another seed gives other views"
    # Compare with crops cut one by one.
    view = augmented(encoder, 16, count)
    name = found[0].paths[7]
    numbers, _ = uniforms(0, 0, list(image_folder(images).names).index(name), count)
    pixels = np.array(Image.open(images / name).convert("RGB"))
    for k, tries in enumerate(crop_tries(numbers[None], np.array([v.scale for v in view.all]))[0]):
        crop = cut(pixels, crop_boxes([tries], 32, 32)[0], (16, 16), "bilinear").float() / 255
        if draws(numbers[None], view.all).flip[k, 0]:
            crop = crop.flip(-1)
        ours = encoder.features((crop - 0.5)[None] / 0.5)[0].numpy()
        np.testing.assert_allclose(found[0].views[:][7, k], ours, atol=1e-4)
    assert len({v.tobytes() for v in found[0].views[:].reshape(-1, 16)}) == 11 * count


def test_views_of_patches_are_refused(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    with pytest.raises(DinoError, match="one feature vector per image"):
        extract(encoder, image_folder(images), tmp_path / "f.safetensors", data="d", tokens="patches", views=2)


def test_a_bad_file_is_named_and_all_others_are_kept(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    (images / "b" / "0000.png").write_bytes(b"no image")
    done = extract(encoder, image_folder(images), tmp_path / "f.safetensors", data="d")
    read = read_features(tmp_path / "f.safetensors")
    assert list(done.skipped) == list(read.skipped) == ["b/0000.png"]
    assert len(read) == 11
    assert read.labels.tolist() == [0] * 6 + [1] * 5
    assert read.paths[6] == "b/0001.png"


def test_no_readable_image_and_a_size_below_a_patch_are_errors(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    with pytest.raises(DinoError, match="one patch of 8"):
        extract(encoder, image_folder(images), tmp_path / "f.safetensors", data="d", size=4)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DinoError, match="none of the 12 images"):
        extract(encoder, image_folder(images), tmp_path / "f.safetensors", data="d")
    assert not (tmp_path / "f.safetensors").exists()


def small_encoder() -> Encoder:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    config = BackboneConfig(name="vit_tiny_patch16_224", options=options, positions="dino")
    return Encoder(config.build(drop_path=False).eval(), "x", "0123", 16, (0.5,) * 3, (0.5,) * 3)


def extracted(folder: Path, spec: str, workers: int) -> tuple[int, tuple[int, ...], dict[str, str]]:
    path = folder / f"of-{size()}.safetensors"
    done = extract(small_encoder(), open_source(spec), path, data="d", batch_size=4, workers=workers, views=2)
    return done.images, done.shape, done.skipped


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_several_processes_write_the_same_file_as_one(tmp_path: Path, images: Path, kind: str, workers: int) -> None:
    """Byte for byte, with a corrupt image and a number of batches that the processes do not share evenly."""
    write_images(images / "c", 5, seed=7)
    (images / "b" / "0003.png").write_bytes(b"no image")
    spec = images
    if kind == "shards":
        pack(image_folder(images), tmp_path / "packed", side=None, per_shard=5, name="x", report=lambda *a: None)
        spec = tmp_path / "packed"
    whole = extracted(tmp_path, str(spec), workers)
    assert whole[0] == 16
    for count in (2, 3):
        assert together(count, extracted, tmp_path, str(spec), workers) == [whole] * count
        assert (tmp_path / f"of-{count}.safetensors").read_bytes() == (tmp_path / "of-1.safetensors").read_bytes()


def test_features_of_packed_pixels_equal_those_of_the_files(tmp_path: Path, images: Path) -> None:
    pack(image_folder(images), tmp_path / "packed", per_shard=5, pixels=True)
    assert extracted(tmp_path, str(images), 0) == extracted(tmp_path, str(tmp_path / "packed"), 0)
    of_files, of_pixels = tmp_path / "files.safetensors", tmp_path / "of-1.safetensors"
    extracted(tmp_path, str(images), 0)
    of_pixels.rename(of_files)
    extracted(tmp_path, str(tmp_path / "packed"), 0)
    assert of_pixels.read_bytes() == of_files.read_bytes()


class Lossy(Encoder):
    """Encoder with non-finite features for images whose first pixel is bright, as if products overflowed."""

    def features(self, images: torch.Tensor, tokens: str = "cls", blocks: int = 1) -> torch.Tensor:
        made = super().features(images, tokens, blocks).clone()
        made[images[:, 0, 0, 0] > 0, ..., 3] = torch.inf
        made[images[:, 0, 0, 0] > 0, ..., :2] = torch.nan
        return made


@pytest.fixture
def lossy(encoder: Encoder, images: Path) -> Encoder:
    for path in sorted(images.rglob("*.png")):
        pixels = np.array(Image.open(path))
        pixels[:] = 20
        Image.fromarray(pixels).save(path)
    Image.fromarray(np.full((32, 32, 3), 230, np.uint8)).save(images / "a" / "0002.png")
    return Lossy(**vars(encoder))


@pytest.mark.parametrize("options", [{}, {"tokens": "patches"}, {"views": 2}, {"dtype": "float16"}], ids=str)
def test_an_image_whose_features_are_not_finite_is_skipped_and_named(
    tmp_path: Path, images: Path, lossy: Encoder, options: dict
) -> None:
    path = tmp_path / "f.safetensors"
    done = extract(lossy, image_folder(images), path, data="d", batch_size=5, **options)
    each = {"tokens": "12 of 64", "views": "9 of 48"}.get(next(iter(options), ""), "3 of 16")
    assert done.skipped == {"a/0002.png": f"not finite: {each} features"}
    read = read_features(path)
    assert (done.images, len(read), len(read.paths), len(read.labels)) == (11, 11, 11, 11)
    assert read.skipped == done.skipped and "a/0002.png" not in list(read.paths)


def test_nothing_is_written_if_no_features_are_finite(tmp_path: Path, images: Path, lossy: Encoder) -> None:
    for path in images.rglob("*.png"):
        Image.fromarray(np.full((32, 32, 3), 230, np.uint8)).save(path)
    with pytest.raises(
        DinoError, match=r"none of the 12 images .* can be used; a/0000.png: not finite: 3 of 16"
    ) as error:
        extract(lossy, image_folder(images), tmp_path / "out" / "f.safetensors", data="d", batch_size=5)
    assert "another checkpoint" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_calling_an_encoder_names_an_image_without_finite_features(images: Path, lossy: Encoder) -> None:
    assert lossy([images / "a" / "0000.png"]).isfinite().all()
    with pytest.raises(DinoError, match=r"0002.png: not finite: 3 of 16 features"):
        lossy([images / "a" / "0000.png", images / "a" / "0002.png"])


def test_a_query_without_finite_features_is_skipped(images: Path, lossy: Encoder) -> None:
    provenance = Provenance("x", "0123", "cls", 1, 16, "d")
    queries = encode(lossy, photos([images / "a"]), provenance, batch_size=4)
    assert [Path(name).name for name in queries.skipped] == ["0002.png"]
    assert len(queries.names) == len(queries.values) == 5
    with pytest.raises(DinoError, match="not finite"):
        encode(lossy, photos([images / "a" / "0002.png"]), provenance)


def test_labels_of_shards_are_stored(tmp_path: Path, images: Path, encoder: Encoder) -> None:
    def tar(name: str, labels: list[bytes]) -> Path:
        with tarfile.open(tmp_path / name, "w") as opened:
            for i, (path, label) in enumerate(zip(image_folder(images).names, labels, strict=False)):
                for member, data in ((f"{i}.png", (images / path).read_bytes()), (f"{i}.cls", label)):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    opened.addfile(info, io.BytesIO(data))
        return tmp_path / name

    def extracted(spec: str) -> tuple[list[str], list[int], int]:
        done = extract(encoder, open_source(spec), tmp_path / "f.safetensors", data="d")
        read = read_features(done.path)
        return read.classes, read.labels.tolist(), len(done.notes)

    words, numbers = tar("a.tar", [b"dog\n", b"cat", b"dog"]), tar("b.tar", [b"2\n", b"0"])
    assert extracted(str(words)) == (["cat", "dog"], [1, 0, 1], 0)
    assert extracted(f"pipe:cat {words}") == ([], [-1, -1, -1], 1)
    assert extracted(str(numbers)) == extracted(f"pipe:cat {numbers}") == (["0", "1", "2"], [2, 0], 0)


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_until(
    batches: int | None, out: Path, spec: Path, cause: Callable[[], object] = lambda: None, **options: Any
) -> tuple[list[int], list[str], Extracted]:
    """Extract in batches of four, and cause an end after some of them; return the reports and the messages."""
    reports: list[int] = []
    lines: list[str] = []

    def report(count: int) -> None:
        reports.append(count)
        if len(reports) == batches:
            cause()

    options = {"batch_size": 4, "data": "d"} | options
    encoder = options.pop("encoder", None) or small_encoder()
    return reports, lines, extract(encoder, open_source(str(spec)), out, **options, report=report, say=lines.append)


def killed_after(batches: int, out: Path, spec: Path, **options: Any) -> None:
    """Extract in a process that kills itself with SIGKILL after some batches."""
    context = multiprocessing.get_context("fork")  # this process has paid for importing torch

    def work() -> None:
        run_until(batches, out, spec, lambda: os.kill(os.getpid(), signal.SIGKILL), **options)

    process = context.Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def saving(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Save the progress after every batch."""
    monkeypatch.setattr(writer_module, "_SAVE_EVERY", 0)
    return monkeypatch


@pytest.mark.parametrize(
    ("kind", "shard_bytes", "options"),
    [
        ("folder", 2**31, {}),
        ("folder", 5 * 64, {"workers": 2, "views": 1}),
        ("tar", 2**31, {"workers": 2}),
        ("tar", 5 * 32, {"dtype": "float16"}),
    ],
)
def test_a_killed_extraction_resumes_to_the_same_bytes(
    tmp_path: Path, images: Path, saving: pytest.MonkeyPatch, kind: str, shard_bytes: int, options: dict[str, Any]
) -> None:
    saving.setitem(writer_module.write_features.__wrapped__.__kwdefaults__, "shard_bytes", shard_bytes)
    write_images(images / "c", 5, seed=7)
    for name in ("a/0001.png", "b/0003.png"):
        (images / name).write_bytes(b"no image")
    spec = images
    if kind == "tar":
        pack(image_folder(images), tmp_path / "packed", side=None, per_shard=5, name="x", report=lambda *a: None)
        spec = tmp_path / "packed"
    reports, lines, whole = run_until(None, tmp_path / "whole" / "f.safetensors", spec, **options)
    assert (lines, whole.images) == ([], 15)
    again = tmp_path / "again" / "f.safetensors"
    killed_after(2, again, spec, **options)
    killed_after(1, again, spec, **options)  # also in the resumed one
    assert not again.exists()
    rest, lines, resumed = run_until(None, again, spec, **options)
    assert rest == reports[3:]
    assert len(lines) == 1 and lines[0].startswith("resuming after ")
    assert (resumed.images, resumed.shape, resumed.skipped) == (whole.images, whole.shape, whole.skipped)
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "whole")


def resumed_bytes(out: Path, spec: Path) -> tuple[int, dict[str, str]]:
    _, _, done = run_until(None, out, spec)
    return done.images, done.skipped


def test_two_processes_resume_what_one_began(tmp_path: Path, images: Path, saving: pytest.MonkeyPatch) -> None:
    write_images(images / "c", 9, seed=7)
    (images / "a" / "0001.png").write_bytes(b"no image")
    run_until(None, tmp_path / "whole" / "f.safetensors", images)
    again = tmp_path / "again" / "f.safetensors"
    killed_after(3, again, images)
    [(count, skipped)] = {(n, tuple(s)) for n, s in together(2, resumed_bytes, again, images)}
    assert (count, skipped) == (20, ("a/0001.png",))
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "whole")


def test_an_extraction_with_other_settings_starts_anew(
    tmp_path: Path, images: Path, saving: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "others", 12, seed=3)
    place = tmp_path / "again" / "f.safetensors"
    weights = replace(small_encoder(), fingerprint="4567")
    for change, named in (
        ({"batch_size": 6}, "batch size"),
        ({"encoder": weights}, "weights"),
        ({"tokens": "cls+avg"}, "tokens"),
        ({"dtype": "float16"}, "dtype"),
        ({"spec": tmp_path / "others"}, "images, labels"),
    ):
        killed_after(2, place, images)
        spec = change.pop("spec", images)
        reports, lines, _ = run_until(None, place, spec, **change)
        folder = place.with_name(".f.unfinished")
        assert lines == [f"note: starting anew: the unfinished extraction in {folder} has other {named}"]
        assert reports[0] == change.get("batch_size", 4)
        assert os.listdir(place.parent) == ["f.safetensors"]


@pytest.mark.parametrize("name", ["00000.safetensors", "00000.safetensors.paths", "progress.json"])
def test_a_damaged_unfinished_extraction_starts_anew(
    tmp_path: Path, images: Path, saving: pytest.MonkeyPatch, name: str
) -> None:
    run_until(None, tmp_path / "whole" / "f.safetensors", images)
    again = tmp_path / "again" / "f.safetensors"
    killed_after(2, again, images)
    damaged = again.with_name(".f.unfinished") / name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    reports, lines, _ = run_until(None, again, images)
    assert reports == [4, 8, 12]
    assert len(lines) == 1 and lines[0].startswith("note: starting anew: the unfinished extraction in")
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "whole")


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_extraction_says_that_it_resumes(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, lines = tmp_path / "out" / "f.safetensors", list[str]()
    stop = {"data": "d", "batch_size": 4, "say": lines.append, "report": lambda count: press_ctrl_c()}
    with pytest.raises(KeyboardInterrupt):
        extract(small_encoder(), image_folder(images), place, **stop)
    assert not place.parent.exists() and not lines, "nothing was saved in so short a time"
    monkeypatch.setattr(writer_module, "_SAVE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        extract(small_encoder(), image_folder(images), place, **stop)
    assert [line.split(":")[0] for line in lines] == ["unfinished"]
    assert run_until(None, place, images)[1] == ["resuming after 4 images"]


def test_two_extractions_into_one_place_are_refused(tmp_path: Path, images: Path, saving: pytest.MonkeyPatch) -> None:
    place = tmp_path / "f.safetensors"

    def second() -> None:
        with pytest.raises(DinoError, match=r"another run is using .*\.f\.unfinished"):
            run_until(None, place, images)

    run_until(1, place, images, second)
    assert len(read_features(place)) == 12


def test_a_complete_split_of_an_interrupted_command_is_not_extracted_again(tmp_path: Path, images: Path) -> None:
    (images / "a" / "0001.png").write_bytes(b"no image")
    place = tmp_path / "f.safetensors"
    reports, _, first = run_until(None, place, images, recording=True)
    assert reports == [4, 8, 12]
    reports, lines, again = run_until(None, place, images, recording=True)
    assert (reports, lines, again) == ([], [f"{place} is complete"], first)
    assert run_until(None, place, images, dtype="float16")[0] == [4, 8, 12]
    assert run_until(None, place, images)[0] == [4, 8, 12], "the float16 file is another one"
    forget(place)
    assert sorted(os.listdir(tmp_path)) == [place.name, "images"]


def write_one_by_one(encoder: Encoder, source: Source, path: Path, data: str, batch_size: int) -> bytes:
    """Extract in a plain loop: compute a batch, wait for it, write it."""
    provenance = Provenance(encoder.source, encoder.fingerprint, "cls", 1, encoder.size, data)
    with write_features(path, provenance, source.classes) as writer:
        for batch in encoder.batches(source, size=encoder.size, batch_size=batch_size, workers=0):
            if batch.names:
                values = encoder.features(batch.images).float().cpu()
                kept, lost = encoder_module.finite_rows(values, batch.names)
                labels, names = ([of[i] for i in kept] for of in (batch.labels, batch.names))
                writer.append(values[kept].numpy(), labels, names)
                writer.skipped |= dict(lost)
            writer.skipped |= dict(batch.bad)
    return path.read_bytes()


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_extraction_has_the_bytes_of_a_plain_loop(
    tmp_path: Path, images: Path, lossy: Encoder, monkeypatch: pytest.MonkeyPatch, ahead: int, workers: int
) -> None:
    (images / "b" / "0001.png").write_bytes(b"no image")
    monkeypatch.setitem(extract_module._AHEAD, "cpu", ahead)
    source, path = image_folder(images), tmp_path / "f.safetensors"
    done = extract(lossy, source, path, data="d", batch_size=5, workers=workers)
    assert list(done.skipped) == ["a/0002.png", "b/0001.png"]
    assert path.read_bytes() == write_one_by_one(lossy, source, tmp_path / "plain.safetensors", "d", 5)


def record_events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with each launch of the network, and with each batch that is read."""
    events, features, fetch = list[str](), Encoder.features, extract_module.fetch

    def launch(encoder: Encoder, *arguments: Any) -> torch.Tensor:
        events.append("launch")
        return features(encoder, *arguments)

    def read_later(values: torch.Tensor) -> Callable[[], torch.Tensor]:
        wait = fetch(values)

        def read() -> torch.Tensor:
            events.append("read")
            return wait()

        return read

    monkeypatch.setattr(Encoder, "features", launch)
    monkeypatch.setattr(extract_module, "fetch", read_later)
    return events


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_batch_is_read_after_the_next_one_is_launched(
    tmp_path: Path, images: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setitem(extract_module._AHEAD, "cpu", ahead)
    events = record_events(monkeypatch)
    extract(encoder, image_folder(images), tmp_path / "f.safetensors", data="d", batch_size=4)
    assert events == (["launch", "launch", "read", "launch", "read", "read"] if ahead else ["launch", "read"] * 3)


def test_a_batch_is_written_while_the_next_one_is_computed(
    tmp_path: Path, images: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, append = [threading.Event() for _ in range(3)], FeatureWriter.append
    main, batches = threading.current_thread(), itertools.count()

    class Announced(Encoder):
        def features(self, *arguments: Any) -> torch.Tensor:
            assert threading.current_thread() is main
            begun[next(batches)].set()
            return super().features(*arguments)

    def wait_for_next(writer: FeatureWriter, *arguments: Any) -> None:
        assert threading.current_thread() is not main
        place = writer.batches + 1
        assert place == 3 or begun[place].wait(20), "the next batch waits for this one"
        append(writer, *arguments)

    monkeypatch.setattr(FeatureWriter, "append", wait_for_next)
    done = extract(Announced(**vars(encoder)), image_folder(images), tmp_path / "f.safetensors", data="d", batch_size=4)
    assert done.images == len(read_features(done.path)) == 12


@pytest.mark.parametrize("saves", [True, False])
def test_an_error_of_the_disk_comes_out_and_nothing_later_is_written(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, saves: bool
) -> None:
    run_until(None, tmp_path / "whole" / "f.safetensors", images)
    if saves:
        monkeypatch.setattr(writer_module, "_SAVE_EVERY", 0)
    calls, append, place, lines = list[str](), TensorStream.append, tmp_path / "again" / "f.safetensors", list[str]()

    def fail(stream: TensorStream, name: str, rows: Any) -> None:
        calls.append(name)
        if calls.count("values") == 3 and name == "labels":  # after an empty array and one batch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(stream, name, rows)

    with monkeypatch.context() as full:
        full.setattr(TensorStream, "append", fail)
        reports: list[int] = []
        with pytest.raises(OSError, match="No space") as error:
            extract(
                small_encoder(),
                image_folder(images),
                place,
                data="d",
                batch_size=4,
                report=reports.append,
                say=lines.append,
            )
    assert error.value.filename == str(place)
    assert calls[-2:] == ["values", "labels"] and reports == [4]
    assert place.parent.exists() == bool(lines) == saves
    assert run_until(None, place, images)[1] == (["resuming after 4 images"] if saves else [])
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "whole")


def test_an_error_of_the_network_comes_out_after_the_batch_before_is_written(
    tmp_path: Path, images: Path, saving: pytest.MonkeyPatch
) -> None:
    launches: list[int] = []

    class Failing(Encoder):
        def features(self, *arguments: Any) -> torch.Tensor:
            launches.append(len(arguments))
            if len(launches) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().features(*arguments)

    place = tmp_path / "f.safetensors"
    with pytest.raises(torch.OutOfMemoryError):
        run_until(None, place, images, encoder=Failing(**vars(small_encoder())))
    assert run_until(None, place, images)[1] == ["resuming after 8 images"]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"views": 2}], ids=str)
def test_a_gpu_has_the_next_batch_before_the_host_reads_one(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    (images / "b" / "0003.png").write_bytes(b"no image")
    here = extract(small_encoder(), image_folder(images), tmp_path / "here.safetensors", data="d", **options)
    encoder = small_encoder()
    encoder.backbone.cuda()
    events = record_events(monkeypatch)
    path = tmp_path / "there.safetensors"
    with float32_products("float32"):  # torch's own default rounds the patch embedding
        there = extract(encoder, image_folder(images), path, data="d", batch_size=4, workers=2, **options)
    each = ["launch"] * (1 + options.get("views", 0))
    assert events == [*each, *each, "read", *each, "read", "read"]
    assert there.skipped == here.skipped
    ours, wanted = read_features(path), read_features(here.path)
    assert list(ours.paths) == list(wanted.paths)
    np.testing.assert_allclose(ours.values[:], wanted.values[:], atol=1e-4)
    if options:
        np.testing.assert_allclose(ours.views[:], wanted.views[:], atol=1e-3)
