"""Mistakes of a user: each is one error that names the value, and one hint with the command to type."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from safetensors.numpy import save_file
from test_cli import Dino, dino  # noqa: F401  a fixture


@pytest.fixture
def here(dino: Dino, tmp_path: Path) -> Dino:  # noqa: F811
    """Create one file or folder of each kind, mostly without valid content, and return the runner of commands."""
    write_images(tmp_path / "img", 4, size=8)
    write_images(tmp_path / "cls" / "a", 2, size=8)
    write_images(tmp_path / "cls" / "b", 2, size=8)
    write_images(tmp_path, 3, size=8)
    run = tmp_path / "runs" / "tiny-1"
    run.mkdir(parents=True)
    (run / "preset.json").write_text("{}")
    save_file({"x": np.zeros(1)}, run / "ckpt.safetensors", {"step": "7"})
    save_file({"x": np.zeros(1)}, tmp_path / "my ckpt.safetensors", {"step": "7"})
    for folder in ("feats", "other"):
        (tmp_path / folder).mkdir()
        save_file({"values": np.zeros(1)}, tmp_path / folder / "all.safetensors", {"dinocli": "features"})
    for name in ("pics.zip", "pics.7z", "film.mp4", "net.onnx", "notes.txt", "rows.npz", "mask.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    return dino


WORDS = [
    # Swapped arguments.
    ("extract img runs/tiny-1", "the checkpoint comes first: runs/tiny-1 is a run folder", "dino extract runs/tiny-1 img"),
    ("extract img 'my ckpt.safetensors' --out f", "the checkpoint comes first", "dino extract 'my ckpt.safetensors' img --out f"),
    ("extract img timm:resnet50", "timm:resnet50 is a model of timm", "dino extract timm:resnet50 img"),
    ("attn-map runs/tiny-1/ckpt.safetensors img", "is a checkpoint; expected photos", "dino attn-map img --checkpoint runs/tiny-1/ckpt.safetensors"),
    ("attn-map 0000.png runs/tiny-1 --mass 0.5", "is a run folder", "dino attn-map 0000.png --mass 0.5 --checkpoint runs/tiny-1"),
    ("attn-map runs/tiny-1", "is a run folder", "dino attn-map photo.jpg --checkpoint runs/tiny-1"),
    ("segment runs/tiny-1 0000.png", "is a run folder", "dino segment 0000.png --checkpoint runs/tiny-1"),
    ("match runs/tiny-1 0000.png", "is a run folder", "dino match 0000.png b.jpg --checkpoint runs/tiny-1"),
    ("match runs/tiny-1 0000.png 0001.png", "takes two arguments", "dino match --checkpoint runs/tiny-1 0000.png 0001.png"),
    ("track img mask.png", "takes one argument", "dino track img --mask mask.png"),
    ("track runs/tiny-1 --mask mask.png", "is a run folder; expected a folder of frames or a video",
     "dino track FRAMES --mask mask.png --checkpoint runs/tiny-1"),
    ("export out.pth runs/tiny-1", "unexpected argument out.pth", "dino export runs/tiny-1 --to official --out out.pth"),
    ("export runs/tiny-1 net2.onnx", "unexpected argument net2.onnx", "dino export runs/tiny-1 --to onnx --out net2.onnx"),
    ("export out runs/tiny-1 --to timm", "unexpected argument out", "dino export runs/tiny-1 --to timm --out out"),
    ("push out runs/tiny-1", "the checkpoint comes first", "dino push runs/tiny-1 out"),
    ("pack out img", "expected the images first", "dino pack img out"),
    ("pack empty img --short-side 64", "expected the images first", "dino pack img empty --short-side 64"),
    ("search feats 0000.png", "is a folder of features; expected photos", "dino search 0000.png --features feats"),
    ("curate feats other", "takes one argument; unexpected argument other", "dino curate feats --like other"),
    # Files that the shell listed, instead of one folder.
    ("extract img/0000.png img/0001.png img/0002.png", "got 3 image files (img/0000.png ...)", "dino extract img"),
    ("extract runs/tiny-1 img/0000.png img/0001.png --blocks 4", "2 image files", "dino extract runs/tiny-1 img --blocks 4"),
    ("extract 0000.png 0001.png 'my ckpt.safetensors' notes.txt img", "2 image files", "dino extract 'my ckpt.safetensors' ."),
    ("extract runs/tiny-1 cls/a cls/b", "got 2 folders (cls/a ...)", "dino extract runs/tiny-1 cls"),
    ("doctor img/0000.png img/0001.png", "2 image files", "dino doctor img"),
    ("pack img/0000.png img/0001.png out", "2 image files", "dino pack img out"),
    ("pack img/0000.png img/0001.png", "2 image files", "dino pack img img-shards"),
    ("doctor img/0000.png cls/a/0001.png", "2 image files", "one name per line in list.txt, then dino doctor list.txt"),
    ("doctor img cls", "got 2 folders (img ...)", "find img cls -type f > list.txt, then dino doctor list.txt"),
    ("pretrain img gone", "gone does not exist", "check the path"),
    ("pretrain img 'gone-*'", "nothing matches the pattern gone-*", "check the pattern"),
    ("pretrain img:0.5 cls", "cls has no weight, but other sources have one", "add one, such as cls:1"),
    ("pretrain rows.npz", "no images in rows.npz: it holds 1 .npz", "--set images.key=NAME reads the rows of that array"),
    ("pretrain img/0000.png", "img/0000.png is an image; expected images", "dino pretrain img"),
    ("extract img/*.JPG", "img/*.JPG is a pattern that matches no file", "dino extract img"),
    ("attn-map *.JPG", "*.JPG is a pattern", "dino attn-map ."),
    # Numbers and other values without their option.
    ("knn 20", "dino knn takes no argument; unexpected argument 20", "dino knn --k 20"),
    ("knn 0", "unexpected argument 0", "dino knn --k 20"),
    ("knn -5", "unexpected argument -5", "dino knn --k 20"),
    ("knn 2E1", "unexpected argument 2E1", "dino knn --k 20"),
    ("knn 1e400", "unexpected argument 1e400", "dino knn --features 1e400"),
    ("knn -- nan", "unexpected argument nan", "dino knn --features nan"),
    ("linear 0.1", "dino linear takes no argument; unexpected argument 0.1", "dino linear, which tries 13 learning rates"),
    ("search 5", "no photo is named 5", "dino search photo.jpg --k 5"),
    ("search img 5 --features feats", "no photo is named 5", "dino search img --features feats --k 5"),
    ("dedup 0.97", "unexpected argument 0.97", "dino dedup --threshold 0.97"),
    ("dedup 97", "unexpected argument 97", "dino dedup --threshold 0.97"),
    ("doctor img 50", "unexpected argument 50", "dino doctor img --sample 50"),
    ("pack img out 64", "unexpected argument 64", "dino pack img out --short-side 64"),
    ("extract runs/tiny-1 img 224", "unexpected argument 224", "dino extract runs/tiny-1 img --size 224"),
    ("export runs/tiny-1 official", "unexpected argument official", "dino export runs/tiny-1 --to official"),
    ("export onnx", "Missing option '--to'", "dino export --to onnx"),
    ("pretrain img tiny", "unexpected argument tiny", "dino pretrain img --preset tiny"),
    ("demo tiny", "unexpected argument tiny", "dino pretrain IMAGES --preset tiny"),
    ("demo here", "unexpected argument here", "dino demo --out here"),
    # Features, images and checkpoints mixed up.
    ("knn feats", "unexpected argument feats", "dino knn --features feats"),
    ("knn img", "unexpected argument img", "dino extract ckpt.safetensors img, then dino knn"),
    ("knn runs/tiny-1", "unexpected argument runs/tiny-1", "dino extract runs/tiny-1 IMAGES, then dino knn"),
    ("knn --features img", "img is a folder of images; expected a folder of features",
     "dino extract ckpt.safetensors img --out img-features, then dino knn --features img-features"),
    ("knn --features feats/all.safetensors", "is one file of features", "dino knn --features feats"),
    ("linear --features=runs/tiny-1", "is a run folder", "dino extract runs/tiny-1 IMAGES, then dino linear"),
    ("curate img --clusters 2", "img is a folder of images",
     "dino extract ckpt.safetensors img --out img-features, then dino curate img-features --clusters 2"),
    ("extract feats", "feats is a folder of features; expected images", "dino knn --features feats"),
    ("extract runs/tiny-1", "runs/tiny-1 is a run folder; expected images after it", "dino extract runs/tiny-1 IMAGES"),
    ("extract img cls", "img is a folder of images; expected a checkpoint", "dino extract ckpt.safetensors cls"),
    ("extract 0000.png", "0000.png is an image; expected images: a folder", "dino extract ."),
    ("pretrain runs/tiny-1", "is a run folder; expected images", "dino pretrain IMAGES --init runs/tiny-1"),
    ("doctor 'my ckpt.safetensors'", "is a checkpoint; expected images", "dino doctor IMAGES"),
    ("doctor pics.zip", "pics.zip is not a valid ZIP archive", "copy or download it again"),
    ("doctor pics.7z", "pics.7z is an archive", "7z x pics.7z -opics, then dino doctor pics"),
    ("extract film.mp4", "film.mp4 is a video", "mkdir film && ffmpeg -i film.mp4 -r 2 film/%05d.png, then dino extract film"),
    ("extract s3://bucket/photos.zip", "s3://bucket/photos.zip is an address", "copy it here first, then dino extract photos"),
    ("extract ftp://x.org/a.tar", "is an address", "dino extract 'pipe:curl -sL ftp://x.org/a.tar'"),
    ("linear --paper feats", "feats is a folder of features; expected images", "dino knn --features feats"),
    # Options.
    ("knn --K 20", "dino knn has no option --K", "dino knn --k 20"),
    ("knn -k 20", "has no option -k", "dino knn --k 20"),
    ("knn --nb_knn=20", "has no option --nb_knn", "dino knn --k=20"),
    ("knn –k 20", "–k begins with a long dash", "dino knn --k 20"),
    ("knn --checkpoint x", "has no option --checkpoint: it reads features", "dino extract CHECKPOINT IMAGES with that option, then"),
    ("extract --checkpoint runs/tiny-1 --data img --blocks 2", "has no option --data; that is an argument",
     "dino extract --checkpoint runs/tiny-1 --blocks 2 img"),
    ("extract --weights runs/tiny-1 img", "has no option --weights", "dino extract --checkpoint runs/tiny-1 img"),
    ("extract --checkpoint runs/tiny-1 runs/tiny-1", "expected images after it", "dino extract --checkpoint runs/tiny-1 IMAGES"),
    ("extract runs/tiny-1 img --checkpoint other.pth", "CHECKPOINT runs/tiny-1 and --checkpoint other.pth are two checkpoints",
     "remove --checkpoint other.pth, or the argument runs/tiny-1"),
    ("export runs/tiny-1 --to timm --checkpoint x", "are two checkpoints; expected one", "remove --checkpoint x"),
    ("push runs/tiny-1 --checkpoint x", "are two checkpoints; expected one", "remove --checkpoint x"),
    ("push runs/tiny-1 out --checkpoint x", "are two checkpoints; expected one", "remove --checkpoint x"),
    ("eval match 0000.png 0001.png --keypoints k.csv --size 240", "has no option --size",
     "dino eval match 0000.png 0001.png --keypoints k.csv --short-side 240"),
    ("eval retrieval gnd.json --img-size 240 --data img", "has no option --img-size", "dino eval retrieval gnd.json --long-side 240"),
    ("eval retrieval gnd.json --data img", "has no option --data", "dino eval retrieval gnd.json --images img"),
    ("eval segment img --evaluate masks", "has no option --evaluate", "dino eval segment img --truth masks"),
    ("extract runs/tiny-1 img --gpu", "has no option --gpu", "dino extract runs/tiny-1 img --device cuda"),
    ("extract runs/tiny-1 img -o f", "has no option -o", "dino extract runs/tiny-1 img --out f"),
    ("extract runs/tiny-1 img --batch_size 8", "has no option --batch_size", "dino extract runs/tiny-1 img --batch-size 8"),
    ("extract -h", "has no option -h", "dino extract --help"),
    ("attn-map img --zzz", "has no option --zzz", "dino attn-map --help"),
    ("extract runs/tiny-1 img --tokens patch", "--tokens patch is not one of cls, patches, cls+avg", "use --tokens patches"),
    ("extract runs/tiny-1 img --size 0", "--size 0 is too small; expected 8 or more", "use --size 8 or more"),
    ("attn-map img --mass 60", "--mass 60 is too large; expected 1 or less", "use --mass 1 or less"),
    ("knn --k many", "--k many is not a whole number", "use --k N"),
    ("knn --k 2.5", "--k 2.5 is not a whole number", "use --k N"),
    ("knn --k", "Option '--k' requires an argument", "dino knn --k VALUE"),
    ("search --features feats", "Missing argument 'IMAGES...'", "dino search --features feats photo.jpg"),
    ("pack img --out x", "no option --out; that is an argument", "dino pack img x"),
    ("pack --out x img --short-side 64", "no option --out; that is an argument", "dino pack img --short-side 64 x"),
    ("push --checkpoint runs/tiny-1 -o x", "no option -o; that is an argument", "dino push --checkpoint runs/tiny-1 x"),
    ("push -o x", "no option -o; that is an argument", "dino push CHECKPOINT x"),
    ("push runs/tiny-1 -o x", "no option -o; that is an argument", "dino push runs/tiny-1 x"),
    ("pack img", "Missing argument 'OUT'", "dino pack img img-shards"),
    ("match 0000.png", "Missing argument 'B'", "dino match 0000.png b.jpg"),
    ("extract", "Missing argument", "dino extract ckpt.safetensors IMAGES"),
    ("track img", "Missing option '--mask'", "dino track img --mask first.png"),
    ("segment", "Missing argument 'IMAGES...'", "dino segment photo.jpg"),
    ("eval segment", "takes --truth or --train; got neither", "dino eval segment IMAGES --truth MASKS, or"),
    ("eval segment img --truth img --train img", "got both", "dino eval segment IMAGES --truth MASKS, or"),
    ("eval segment --truth img", "no photos given", "dino eval segment IMAGES --truth img"),
    ("eval segment img --train img", "--train reads photos from its own folder; unexpected img", "omit the photos"),
    ("eval match 0000.png 0001.png", "Missing option '--keypoints'", "dino eval match 0000.png 0001.png --keypoints points.csv"),
    ("eval track img --mask mask.png", "Missing option '--truth'", "dino eval track img --mask mask.png --truth MASKS"),
    ("eval retrieval", "Missing argument 'GND'", "dino eval retrieval gnd_roxford5k.pkl"),
    # Commands.
    ("train img", "dino has no command train", "dino pretrain img"),
    ("evaluate", "dino has no command evaluate", "dino knn"),
    ("retrieval gnd.json", "dino has no command retrieval", "dino eval retrieval gnd.json"),
    ("eval segmnt img --truth img", "dino eval has no command segmnt", "dino eval segment img --truth img"),
    ("eval knn --k 5", "dino eval has no command knn", "dino knn --k 5"),
    ("eval img", "dino eval has no command img", "dino eval --help, which lists the commands"),
    ("version", "dino has no command version", "dino --version"),
    ("help knn", "dino has no command help", "dino knn --help"),
    ("Extract runs/tiny-1 img", "dino has no command Extract", "dino extract runs/tiny-1 img"),
    ("atn-map img", "dino has no command atn-map", "dino attn-map img"),
    ("attention img", "dino has no command attention", "dino attn-map img"),
    ("img", "dino has no command img", "dino pretrain img"),
    ("runs/tiny-1", "dino has no command runs/tiny-1", "dino extract runs/tiny-1 IMAGES"),
    ("fly", "dino has no command fly", "dino --help"),
    ("--k 20", "--k is an option of a command", "name the command first: dino knn --k 20"),
    ("presets vits16", "dino presets has no command vits16", "dino presets show vits16"),
    ("presets show", "Missing argument", "dino presets show vits16"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message", "hint"), WORDS, ids=[line for line, *_ in WORDS])
def test_a_mistake_is_answered_with_the_command_to_type(
    here: Dino, tmp_path: Path, line: str, message: str, hint: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = here(*shlex.split(line), code=None)
    error, said = done.stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert len(error) < 200, "no wall of names"
    assert said.startswith(f"hint: {hint}")
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before, "a mistake writes nothing"


OUTPUTS = [
    ("extract runs/tiny-1 img", "results"), ("attn-map 0000.png", "results"), ("segment 0000.png", "results"),
    ("match 0000.png 0001.png", "results"), ("track img --mask mask.png", "results"), ("search 0000.png", "search.png"),
    ("dedup", "results"), ("curate feats --clusters 2", "curated.txt"), ("demo", "results"),
    ("export runs/tiny-1 --to official", "tiny-1.pth"), ("export runs/tiny-1 --to timm", "results"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "name"), OUTPUTS, ids=[line for line, _ in OUTPUTS])
def test_an_output_that_is_an_address_or_an_archive_is_an_error_before_any_work(
    here: Dino, tmp_path: Path, line: str, name: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = here(*shlex.split(line), "--out", "s3://bucket/x", code=1)
    assert "error: --out s3://bucket/x is an address; expected a local" in done.stderr
    assert f"hint: use --out {'x' if name == 'results' else name}, and copy that to s3://bucket/x" in done.stderr
    done = here(*shlex.split(line), "--out", "pics.zip", code=1 if name == "results" else None)
    if name == "results":
        assert "error: --out pics.zip is a file; expected a folder" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("line", ["push runs/tiny-1", "pack img"])
def test_an_argument_that_is_an_address_is_an_error_before_any_work(here: Dino, line: str) -> None:
    done = here(*line.split(), "s3://bucket/x", code=1)
    assert "error: OUT s3://bucket/x is an address; expected a local folder" in done.stderr


def test_help_before_a_command_is_the_help_of_that_command(here: Dino) -> None:
    assert here("--help", "knn").stdout == here("knn", "--help").stdout != ""


def test_valid_commands_pass(here: Dino) -> None:
    """Accept arguments that resemble mistakes: a folder with a link to a checkpoint, a list, a number as a name."""
    Path("ckpt.safetensors").symlink_to("runs/tiny-1/ckpt.safetensors")
    Path("20").mkdir()
    write_images(Path("20"), 2, size=8)
    Path("list.txt").write_text("0000.png\n")
    for line in ("doctor .", "doctor 20", "doctor list.txt"):
        told = json.loads(here(*line.split(), "--json").stdout)
        assert told["images"]["read"] >= 1
