"""Servers of files on this machine, which cut, delay or refuse their first answers as a test says."""

from __future__ import annotations

import functools
import hashlib
import http.client
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_images

from dinocli.data.sources import store

COMMIT = "a" * 40  # of the data set on the hub


def cached(folder: Path) -> list[Path]:
    return [path for path in (folder / "cache" / "dinocli" / "remote").rglob("*") if path.is_file()]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; the first answers to each path fail as `faults` says.

    Attributes:
        ranges: True to send only the requested bytes; Python's own server sends all.
        asked: Path, first and last byte of each answer of that kind.
    """

    ranges = False
    asked: list[tuple[str, int, int]] = []

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
        elif found := self.ranges and re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            data = Path(self.translate_path(self.path)).read_bytes()[int(found[1]) : int(found[2]) + 1]
            self.asked.append((self.path, *map(int, found.groups())))
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


def serve(handler: Any) -> tuple[http.server.ThreadingHTTPServer, str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


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
        import fsspec

        self.files: Any = fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{behind}", skip_instance_cache=True)
        if not self.files.exists("photos"):
            self.files.mkdir("photos")


class Hub(http.server.BaseHTTPRequestHandler):
    """Data set `me/pets` of the Hugging Face hub, with the files of a folder; the first answers fail as `faults` says."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, faults: dict[str, list[str]], **options: Any) -> None:
        self.folder, self.faults = folder, faults
        super().__init__(*args, **options)

    def handle_any(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/datasets/me/pets/resolve/{COMMIT}/")
        pending = self.faults.get(name, []) if self.command == "GET" else []
        fault = pending.pop(0) if pending else ""
        headers, data, status = {"Content-Type": "application/json"}, b"{}", 404
        if path.startswith("/api/datasets/me/pets/revision/"):
            status, data = 200, json.dumps({"id": "me/pets", "sha": COMMIT, "siblings": []}).encode()
        elif path == f"/api/datasets/me/pets/tree/{COMMIT}":
            files = sorted(file for file in self.folder.rglob("*") if file.is_file())
            tree = [
                {"type": "file", "oid": _digest(file.read_bytes()), "size": file.stat().st_size,
                 "path": file.relative_to(self.folder).as_posix()}
                for file in files
            ]  # fmt: skip
            status, data = 200, json.dumps(tree).encode()
        elif name != path and (self.folder / name).is_file():
            status, data = 200, (self.folder / name).read_bytes()
            headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT}
        if fault.isdecimal():
            status, data, headers = int(fault), b"{}", {"Content-Type": "application/json"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"

    do_GET = do_HEAD = handle_any

    def log_message(self, *args: Any) -> None:
        pass


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is downloaded in a folder of the test, and repeat requests at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_PAUSE", 0.01)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, dict[str, list[str]], Path]]:
    """Address of a folder of four images in two classes, the faults of its server, and the folder on disk."""
    pytest.importorskip("aiohttp")
    for seed, name in enumerate(("cat", "dog")):
        write_images(tmp_path / "site" / "photos" / name, 2, seed=seed)
    faults: dict[str, list[str]] = {}
    server, address = serve(functools.partial(Handler, directory=str(tmp_path / "site"), faults=faults))
    yield f"{address}/photos", faults, tmp_path / "site" / "photos"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def moto() -> Iterator[int]:
    """Port of a server that answers as S3 does."""
    server_of = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(moto: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A bucket that this process's credentials open, with short time limits."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    made = Bucket(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.address)
    import fsspec

    config = {"config_kwargs": {"connect_timeout": 1, "read_timeout": 0.5, "retries": {"max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", config)
    yield made
    made.server.shutdown()
    made.server.server_close()
