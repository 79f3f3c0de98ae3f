from __future__ import annotations

import functools
import http.client
import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_images

from dinocli.core.errors import DinoError
from dinocli.data.images import ImagesConfig
from dinocli.data.loader.plain import plain_batches
from dinocli.data.sources import store
from dinocli.data.sources.open import open_images, open_source, splits
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.remote import RemoteImages, is_remote

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_PAUSE", 0.01)


def cached(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache" / "dinocli" / "remote").rglob("*") if path.is_file()]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; the first answers to each path fail as `faults` says."""

    def __init__(self, *args: Any, faults: dict[str, list[str]], **options: Any) -> None:
        self.faults = faults
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        pending = self.faults.get(self.path, [])
        fault = pending.pop(0) if pending else ""
        if fault == "cut":
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-7])
        elif fault:
            self.send_error(int(fault))
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


def serve(handler: Any) -> tuple[http.server.ThreadingHTTPServer, str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, dict[str, list[str]], Path]]:
    pytest.importorskip("aiohttp")
    for seed, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "site" / "photos" / name, 2, seed=seed)
    faults: dict[str, list[str]] = {}
    server, address = serve(functools.partial(Handler, directory=str(tmp_path / "site"), faults=faults))
    yield f"{address}/photos", faults, tmp_path / "site" / "photos"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("s3://b/x", True), ("https://h/x/", True), ("az://c", True), ("s3://b/x.tar", False), ("hf://datasets/a/b", False),
     ("https://h/list.csv", False), ("https://h/a.JPG", False), ("s3:/b/x", False), ("photos", False)],
)  # fmt: skip
def test_addresses_of_folders(spec: str, expected: bool) -> None:
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


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_SHELVES", 1)
    monkeypatch.setattr(store, "_BUDGET", 2500)
    places = [store.place_of(f"s3://b/{i}.jpg 1000") for i in range(5)]
    for number, place in enumerate(places):
        store.keep(place, bytes(1000))
        os.utime(place, ns=(number, number))
        assert place.exists()
    store.keep(tmp_path / "large", bytes(3000))
    assert cached(tmp_path) == [path for path in cached(tmp_path) if path in places[-2:]]
    assert len(cached(tmp_path)) == 2


# A real S3 endpoint on loopback.


class Proxy(http.server.BaseHTTPRequestHandler):
    """Proxy that cuts or delays answers for objects, or passes them on."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, behind: int, faults: dict[str, list[str]], asked: list[str]) -> None:
        self.behind, self.faults, self.asked = behind, faults, asked
        super().__init__(*args)

    def handle_any(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        pending = self.faults.get(name, []) if self.command == "GET" else []
        fault = pending.pop(0) if pending else ""
        if fault == "late":
            time.sleep(1.5)
            self.close_connection = True
            return
        self.asked.append(f"{self.command} {name}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.behind)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

    def log_message(self, *args: Any) -> None:
        pass


class Bucket:
    """Bucket `photos` on a server of moto, behind a proxy that fails as `faults` says for the first answers."""

    def __init__(self, behind: int) -> None:
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        handler = functools.partial(Proxy, behind=behind, faults=self.faults, asked=self.asked)
        self.server, self.address = serve(handler)
        self.files: Any = fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{behind}", skip_instance_cache=True)
        if not self.files.exists("photos"):
            self.files.mkdir("photos")


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    server_of = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    made = Bucket(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.address)
    config = {"config_kwargs": {"connect_timeout": 1, "read_timeout": 0.5, "retries": {"max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", config)
    yield made
    made.server.shutdown()
    made.server.server_close()


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


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(protocol: str, **options: Any) -> Callable[[], None]:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    with pytest.raises(DinoError, match="s3:// needs the package s3fs, which is not installed") as error:
        open_source("s3://photos/a")
    assert error.value.hint == "pip install 'dinocli[s3]'"
