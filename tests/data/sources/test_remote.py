from __future__ import annotations

import io
import os
import random
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, write_images
from remote_servers import Bucket, Handler, cached

from dinocli.apps.pack import pack
from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources.open import image_folder, open_images, open_source, splits
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.remote import RemoteImages
from dinocli.data.sources.remote_file import RemoteFile
from dinocli.data.sources.shards import Shards, read_sample
from dinocli.data.sources.store import is_remote
from dinocli.method.preset import load_preset
from dinocli.train.logger import Progress
from dinocli.train.plan import Plan, Saving
from dinocli.train.pretrain import pretrain

pytest.importorskip("fsspec")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("s3://b/x", True), ("https://h/x/", True), ("az://c", True), ("https://h/list.csv", True),
     ("hf://datasets/a/b", False), ("s3:/b/x", False), ("pipe:cat s3://b", False), ("photos", False)],
)  # fmt: skip
def test_addresses(spec: str, expected: bool) -> None:
    assert is_remote(spec) == expected


def test_a_folder_over_http(web: tuple[str, dict[str, list[str]], Path], tmp_path: Path) -> None:
    address, faults, folder = web
    local = open_images(str(folder))
    source = open_source(address)
    assert isinstance(source, RemoteImages)
    assert (list(source.names), source.classes) == (list(local.names), ["cat", "dog"])
    faults["/photos/cat/0000.png"] = ["cut", "503"]
    faults["/photos/dog/0001.png"] = ["500", "cut", "cut"]
    assert [source.read(i) for i in range(4)] == [local.read(i) for i in range(4)]
    assert not any(faults.values())
    assert len(cached(tmp_path)) == 4
    faults["/photos/dog/0000.png"] = ["cut"] * 9
    assert source.read(2) == local.read(2)  # from the cache
    for path in cached(tmp_path):
        path.unlink()
    with pytest.raises(DinoError, match=r"dog/0000\.png cannot be read after 5 attempts: ") as error:
        source.read(2)
    assert "it resumes" in error.value.hint
    with pytest.raises(DinoError, match=r"cannot be read after 2 attempts: .*(Connect|connect)"):
        open_source("http://127.0.0.1:9/photos/")  # the reason, not the address again
    assert not cached(tmp_path)  # nothing truncated is kept
    (folder / "cat" / "0001.png").unlink()
    with pytest.raises(FileNotFoundError):
        source.read(1)
    with pytest.raises(Refused, match="too large"):
        source.read(0, ImagesConfig(max_megabytes=1e-5))


def test_a_replaced_file_over_http_is_read_anew(web: tuple[str, dict[str, list[str]], Path], tmp_path: Path) -> None:
    address, _, folder = web
    before = open_images(address)
    assert before.read(0) == (folder / "cat" / "0000.png").read_bytes()
    file = folder / "cat" / "0000.png"
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, (1e9, 1e9))  # HTTP states times in whole seconds
    after = open_images(address)
    assert after.read(0) == file.read_bytes()
    assert after.fingerprint != before.fingerprint
    assert open_images(address).fingerprint == after.fingerprint


def test_without_a_version_nothing_is_kept(
    web: tuple[str, dict[str, list[str]], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Handler, "date_time_string", lambda self, timestamp=None: "")
    address, _, folder = web
    for name in ("0000.png", "0001.png"):
        (folder / "cat" / "0000.png").write_bytes((folder / "dog" / name).read_bytes())
        assert open_images(address).read(0) == (folder / "dog" / name).read_bytes()
    assert not cached(tmp_path)


def test_errors_over_http(web: tuple[str, dict[str, list[str]], Path]) -> None:
    address, _, _ = web
    with pytest.raises(DinoError, match="does not exist or is empty"):
        open_source(f"{address}/gone")
    with pytest.raises(DinoError, match="cannot be read after 2 attempts"):
        open_source("http://127.0.0.1:9/photos")


def fill(bucket: Bucket, folder: Path, prefix: str) -> Any:
    """Upload a local folder, and return it as a source."""
    local = open_images(str(folder))
    for name in local.names:
        bucket.files.pipe_file(f"photos/{prefix}/{name}", local.read(local.places[name]))
    return local


def test_a_folder_in_s3_survives_cut_and_late_answers(bucket: Bucket, tmp_path: Path) -> None:
    write_images(tmp_path / "p" / "cat", 2)
    write_images(tmp_path / "p" / "dog [1]", 2, seed=1)
    local = fill(bucket, tmp_path / "p", "a")
    bucket.files.pipe_file("photos/a/empty.jpg", b"")
    bucket.files.touch("photos/a/folder/")
    source = open_source("s3://photos/a")
    assert list(source.names) == [*local.names, "empty.jpg"]
    bucket.faults |= {"0000.png": ["cut", "late", "cut"], "0001.png": ["late", "cut"]}
    assert [source.read(i) for i in range(4)] == [local.read(i) for i in range(4)]
    assert not any(bucket.faults.values())
    assert source.read(4) == b""
    bucket.asked.clear()
    assert source.read(3) == local.read(3)
    assert not bucket.asked  # from the cache
    (names,) = [splits("s3://photos/a")["all"].names]
    assert len(names) == 5


def test_workers_read_all_images_of_s3(bucket: Bucket, tmp_path: Path) -> None:
    write_images(tmp_path / "p" / "cat", 5, size=16)
    write_images(tmp_path / "p" / "dog", 4, size=16, seed=1)
    local = fill(bucket, tmp_path / "p", "w")
    bucket.faults |= {"0000.png": ["cut"], "0002.png": ["late"]}

    def batches(source: Any) -> list[Any]:
        options = {"size": 16, "mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 4, "device": torch.device("cpu")}
        return list(plain_batches(source, workers=2, **options))

    remote_, near = batches(open_source("s3://photos/w")), batches(local)
    assert [(batch.names, batch.labels, batch.bad) for batch in remote_] == [(b.names, b.labels, b.bad) for b in near]
    assert all(torch.equal(one.images, other.images) for one, other in zip(remote_, near, strict=True))


def test_an_object_that_changed_is_named(bucket: Bucket, tmp_path: Path) -> None:
    for name in "xyz":
        bucket.files.pipe_file(f"photos/c/{name}.jpg", b"1" * 100)
    source = open_source("s3://photos/c")
    bucket.files.pipe_file("photos/c/x.jpg", b"2" * 300)  # s3fs alone would return the first 100 bytes
    bucket.files.pipe_file("photos/c/y.jpg", b"2" * 50)
    bucket.files.rm_file("photos/c/z.jpg")
    for row, size in enumerate((300, 50)):
        with pytest.raises(Refused, match=f"changed: it has {size} bytes, and had 100 when it was listed"):
            source.read(row)
    with pytest.raises(FileNotFoundError):
        source.read(2)
    assert not cached(tmp_path)


def test_a_replaced_object_of_the_same_size_is_read_anew(bucket: Bucket) -> None:
    sources = []
    for digit in (b"1", b"2"):
        bucket.files.pipe_file("photos/e/x.jpg", digit * 100)
        sources.append(open_images("s3://photos/e"))
        assert sources[-1].read(0) == digit * 100
    assert sources[0].fingerprint != sources[1].fingerprint


def test_the_same_name_at_another_endpoint_is_another_object(
    bucket: Bucket, moto: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.files.pipe_file("photos/f/x.jpg", b"1" * 100)
    one = open_images("s3://photos/f")
    one.read(0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto}")
    other = open_images("s3://photos/f")
    assert isinstance(one, RemoteImages) and isinstance(other, RemoteImages)
    assert (one.endpoint, other.endpoint) == (bucket.address, f"http://127.0.0.1:{moto}")
    bucket.asked.clear()
    assert other.read(0) == one.read(0)
    assert not bucket.asked  # `one` from the cache, `other` from its own endpoint


def test_errors_of_s3_are_one_line(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(spec: str) -> str:
        with pytest.raises(DinoError) as error:
            open_source(spec)
        assert "\n" not in error.value.message + error.value.hint
        return error.value.message

    assert said("s3://photos/none") == "s3://photos/none does not exist or is empty; expected a folder of images"
    assert "does not exist" in said("s3://no-such-bucket/x")
    bucket.files.touch("photos/placeholder/")  # as the web console makes a folder
    assert said("s3://photos/placeholder").startswith("s3://photos/placeholder does not exist or is empty")
    bucket.files.pipe_file("photos/t/notes.txt", b"x")
    assert said("s3://photos/t") == "no images in s3://photos/t: it holds 1 .txt"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "s3://photos/t cannot be read after 2 attempts: Could not connect" in said("s3://photos/t")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.address)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    assert said("s3://photos/t") == "s3://photos/t may not be read: Unable to locate credentials"


class Keys:
    """File system of fsspec that keeps the slash at the end of an address, as those of gs:// and az:// do."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.held = files

    def _strip_protocol(self, address: str) -> str:
        return address.partition("://")[2]

    def info(self, key: str) -> dict[str, Any]:
        key = self._strip_protocol(key) or key
        if key not in self.held:
            raise FileNotFoundError(key)
        return {"name": key, "size": len(self.held[key]), "type": "file", "etag": str(self.held[key])}

    def find(self, folder: str, detail: bool) -> dict[str, dict[str, Any]]:
        return {key: self.info(key) for key in self.held if key.startswith(folder)}

    def cat_file(self, key: str, start: int, end: int) -> bytes:
        return self.held[key][start:end]


def test_folders_and_lists_of_packages_that_keep_the_last_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    held = {"b/p/cat/x.jpg": b"1", "b/p/dog/y.jpg": b"22", "b/pets/z.jpg": b"3", "b/l.csv": b"path\np/dog/y.jpg\n"}
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: Keys(held))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "of this test")
    for spec in ("gs://b/p", "gs://b/p/"):
        source = open_images(spec)
        assert (list(source.names), source.classes) == (["cat/x.jpg", "dog/y.jpg"], ["cat", "dog"])
        assert source.read(1) == b"22"
    assert open_images("gs://b/l.csv").read(0) == b"22"


# Lists, Parquet files and shards.


def written(bucket: Bucket, prefix: str, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        bucket.files.pipe_file(f"photos/{prefix}/{name}", data if isinstance(data, bytes) else data.encode())


def test_a_list_in_s3_keeps_labels_and_columns(bucket: Bucket) -> None:
    rows = "path,label,taken\na/x.jpg,cat,2024\n./a/x.jpg,cat,2024\na/y z.jpg,dog,2025\ngone.jpg,,\n../m/w.jpg,cat,\n"
    written(bucket, "l", {"list.csv": rows, "a/x.jpg": b"1", "a/y z.jpg": b"22", "unlisted.jpg": b"3"})
    written(bucket, "m", {"w.jpg": b"4444"})
    source = open_images("s3://photos/l/list.csv")
    assert list(source.names) == ["a/x.jpg", "a/y z.jpg", "gone.jpg", "../m/w.jpg"]
    assert (source.classes, source.labels.tolist()) == (["cat", "dog"], [0, 1, -1, 0])
    assert list(source.metadata["taken"]) == ["2024", "2025", "", ""]
    assert any("name an image again" in note for note in source.notes)
    assert [source.read(i) for i in (0, 1, 3)] == [b"1", b"22", b"4444"]
    with pytest.raises(FileNotFoundError):
        source.read(2)
    written(bucket, "l", {"other.txt": "nothing.jpg\n"})
    with pytest.raises(DinoError, match=r"first file of s3://photos/l/other.txt does not exist: s3://photos/l/nothing"):
        open_images("s3://photos/l/other.txt")
    with pytest.raises(DinoError, match=r"s3://photos/l/none\.csv does not exist or is empty; expected a list"):
        open_images("s3://photos/l/none.csv")


def test_a_list_over_http(web: tuple[str, dict[str, list[str]], Path]) -> None:
    address, faults, folder = web
    (folder / "list.txt").write_text("cat/0001.png\ndog/0000.png\n../photos/cat/0000.png\n")
    faults["/photos/list.txt"] = ["cut", "500"]
    source = open_images(f"{address}/list.txt")
    expected = [(folder / name).read_bytes() for name in ("cat/0001.png", "dog/0000.png", "cat/0000.png")]
    assert [source.read(i) for i in range(3)] == expected


def parquet(count: int, rows: int) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    tables = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": bytes([i]) * 50_000, "path": None} for i in range(count)]
    table = pyarrow.table({"image": images, "label": [i % 2 for i in range(count)]})
    data = io.BytesIO()
    tables.write_table(table, data, row_group_size=rows, compression="none", use_dictionary=False)
    return data.getvalue()


def test_parquet_files_in_s3_are_read_by_row_group(bucket: Bucket) -> None:
    data = parquet(100, 20)
    written(bucket, "q", {"data/train-0.parquet": data, "data/train-1.parquet": data, "README.md": "x"})
    bucket.faults["train-1.parquet"] = ["cut", "late"]
    source = open_source("s3://photos/q")
    assert not any(bucket.faults.values())
    assert len(source) == 200 and source.names[100] == "data/train-1.parquet/0"
    assert source.labels[:4].tolist() == [0, 1, 0, 1]
    bucket.faults["train-0.parquet"] = ["cut"]
    assert [source.read(i) for i in (45, 44, 145)] == [bytes([i]) * 50_000 for i in (45, 44, 45)]
    one = open_images("s3://photos/q/data/train-0.parquet")
    assert list(one.names[:1]) == ["train-0.parquet/0"] and one.read(99) == bytes([99]) * 50_000
    written(bucket, "r", {"x.parquet": data[:-9]})
    with pytest.raises(DinoError, match=r"s3://photos/r/x\.parquet cannot be read: "):
        open_source("s3://photos/r")


def test_one_image_of_a_parquet_file_costs_its_row_group_only(
    web: tuple[str, dict[str, list[str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyarrow's `dataset.take` would read the whole file, and a plain read of the group its other columns too."""
    pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(Handler, "ranges", True)
    monkeypatch.setattr(Handler, "asked", [])
    address, _, folder = web
    draw = random.Random(0)
    columns = {name: [draw.randbytes(30_000) for _ in range(1000)] for name in ("depth", "image", "thermal")}
    options: Any = {"row_group_size": 100, "compression": "none", "use_dictionary": False, "write_statistics": False}
    tables.write_table(pyarrow.table(columns), folder / "x.parquet", **options)
    source = open_images(f"{address}/x.parquet")
    assert source.read(456) == columns["image"][456]
    read = sum(last + 1 - first for _, first, last in Handler.asked)
    assert read <= 100 * 30_000 + 3 * 2**20, f"{read} of {(folder / 'x.parquet').stat().st_size} bytes"


def shards(folder: Path) -> dict[str, bytes]:
    """Return two shards of six images in two classes, and their index, as `dino pack` writes them."""
    for seed, name in enumerate(("cat", "dog")):
        write_images(folder / "p" / name, 3, size=16, seed=seed)
    pack(image_folder(folder / "p"), folder / "shards", per_shard=4)
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir() if path.suffix in (".tar", ".json")}


def test_shards_in_s3_are_the_same_samples_as_local_ones(bucket: Bucket, tmp_path: Path) -> None:
    files = shards(tmp_path)
    tars = sorted(name for name in files if name.endswith(".tar"))
    assert len(tars) > 1
    written(bucket, "s", files)
    bucket.faults[tars[0]] = ["cut", "late", "cut"]
    local = open_source(str(tmp_path / "shards"))
    numbers = "{" + tars[0].split(".")[0].rpartition("-")[2] + ".." + tars[-1].split(".")[0].rpartition("-")[2] + "}"
    stem = tars[0].rpartition("-")[0]
    for spec in ("s3://photos/s", f"s3://photos/s/{stem}-{numbers}.tar", f"s3://photos/s/{stem}-*.tar"):
        source = open_source(spec)
        assert isinstance(source, Shards) and isinstance(local, Shards)
        assert (source.count, source.classes) == (6, ["cat", "dog"])
        assert list(source.stream(0, 1)) == list(local.stream(0, 1))
        endless = source.stream(0, 2, seed=3), local.stream(0, 2, seed=3)
        assert [next(endless[0]) for _ in range(9)] == [next(endless[1]) for _ in range(9)]
        resumed = source.stream(0, 2, seed=3, skip=7)
        again = local.stream(0, 2, seed=3)
        assert next(resumed) == [next(again) for _ in range(8)][-1]
    assert not any(bucket.faults.values())
    before = source.fingerprint
    written(bucket, "s", {tars[0]: files[tars[0]][::-1]})
    assert open_source("s3://photos/s").fingerprint != before
    size = len(files[tars[0]])
    written(bucket, "s", {tars[0]: files[tars[0]][: size // 2]})
    (note,) = open_source("s3://photos/s").notes
    assert note.startswith(
        f"1 shards differ in size from index.json, such as s3://photos/s/{tars[0]} of {size // 2} bytes"
    )
    with pytest.raises(DinoError, match=r"s3://photos/s/none-1\.tar does not exist; expected tar shards"):
        open_source("s3://photos/s/none-{0..1}.tar".replace("{0..1}", "{1..2}"))
    with pytest.raises(DinoError, match="holds tar shards; expected images with random access"):
        open_images("s3://photos/s")


def test_without_an_index_the_shards_in_s3_are_read_but_not_counted(bucket: Bucket, tmp_path: Path) -> None:
    files = {name: data for name, data in shards(tmp_path).items() if name.endswith(".tar")}
    written(bucket, "u", files)
    source, local = open_source("s3://photos/u"), open_source(str(tmp_path / "shards"))
    assert isinstance(source, Shards) and isinstance(local, Shards)
    assert source.count is None
    assert [sample[:5] for sample in source.stream(0, 1)] == [sample[:5] for sample in local.stream(0, 1)]
    name = next(source.stream(0, 1)).name
    assert read_sample(source, name) == read_sample(local, name) != b""


def tar(*members: tuple[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_brackets_in_names_of_shards_in_s3_are_no_pattern(bucket: Bucket) -> None:
    """`cat` and `glob` of fsspec take brackets for a pattern, which such a name does not match itself."""
    written(bucket, "run [1]", {f"a [{n}]-00{n}.tar": tar((f"{n}.jpg", b"%d" % n)) for n in (0, 1)})
    both = [f"s3://photos/run [1]/a [{n}]-00{n}.tar" for n in (0, 1)]
    for spec, urls in (
        ("s3://photos/run [1]", both),
        (both[1], both[1:]),
        (both[0].replace("-000", "-{000..000}"), both[:1]),
    ):
        source = open_source(spec)
        assert isinstance(source, Shards)
        assert (source.where, list(source.urls)) == (spec, urls)
        assert [sample.data for sample in source.stream(0, 1)] == [url[-5:-4].encode() for url in urls]


def test_an_empty_member_of_a_shard_in_s3_is_empty(bucket: Bucket) -> None:
    """An empty range of S3 is the whole object."""
    written(bucket, "x", {"a-000.tar": tar(("a.jpg", b"1"), ("b.jpg", b""), ("b.cls", b""), ("c.jpg", b"3"))})
    source = open_source("s3://photos/x")
    assert isinstance(source, Shards)
    assert [(sample.data, sample.label) for sample in source.stream(0, 1)] == [(b"1", -1), (b"", -1), (b"3", -1)]
    written(bucket, "x", {"b.bin": b""})
    assert RemoteFile("s3://photos/x/b.bin").readall() == b""
    assert not [line for line in bucket.asked if line.startswith("GET b.bin")]


def test_a_single_image_or_archive_at_an_address_is_refused() -> None:
    for name in ("x.jpg", "x.zip", "x.arrow", "x.mp4"):
        with pytest.raises(DinoError, match=f"s3://b/{name} is a single file; expected a folder, tar shards, a list"):
            open_source(f"s3://b/{name}")
    with pytest.raises(DinoError, match="is compressed; expected plain tar files") as error:
        open_source("s3://b/x.tar.gz")
    assert error.value.hint == "unpack them, as with `gzip -d`"
    with pytest.raises(DinoError, match=r"ftp://b/x\.tar does not exist; expected tar shards"):
        open_source("ftp://b/x.tar")  # no address that is read, and no file


def test_a_run_on_shards_in_s3_resumes_to_the_same_bits(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(bucket, "v", shards(tmp_path))
    monkeypatch.chdir(tmp_path)
    preset = load_preset("tiny-dino", [*SMALL, "training.batch_size=2", "training.steps_per_epoch=4"])

    def run(out: str, source: str, stop: int | None = None) -> bytes:
        def report(progress: Progress) -> None:
            if progress.step == stop:
                os.kill(os.getpid(), signal.SIGINT)

        saving = Saving(seconds=None, steps=1)
        cpu = torch.device("cpu")
        plan = Plan("tiny", preset, open_source(source), 6, Path(out), cpu, 1, None, saving=saving)
        pretrain(plan, report)
        return (Path(out) / "ckpt.safetensors").read_bytes()

    whole = run("whole", "s3://photos/v")
    run("stopped", "s3://photos/v", 3)
    assert run("stopped", "s3://photos/v") == whole
