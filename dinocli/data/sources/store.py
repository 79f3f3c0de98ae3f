"""Files at addresses such as s3://bucket/photo.jpg, read through fsspec with a local cache of bounded size."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dinocli.core.atomic import atomic
from dinocli.core.errors import DinoError, reason_of
from dinocli.core.resources import cache_folder
from dinocli.data.images import megabytes_over
from dinocli.data.sources.regular import Refused

# Package that reads each kind of address, and what to type for it.
NEEDS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "az": ("adlfs", "azure"),
    "https": ("aiohttp", "https"),
    "http": ("aiohttp", "https"),
}
_TRIES, _PAUSE = 5, 0.5  # attempts of a request, and seconds after the first, doubled after each
_BUDGET = 20 * 2**30  # bytes of the cache
_SHELVES = 256  # folders of the cache; each keeps its share of the budget, so that a write looks at few files
UNKNOWN = -1  # size of a file whose server does not state it
# Properties that change with the content: checksums first, then numbers and times of the last write.
_VERSIONS = ("ETag", "etag", "md5Hash", "Content-MD5", "generation", "LastModified", "last_modified", "Last-Modified")
_SETTINGS = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_")  # first letters of environment variables of the packages
T = TypeVar("T")


class Denied(DinoError):
    """Error for a file that the credentials do not open. Some servers report missing files so."""


class Store:
    """Files of one protocol, such as s3; every process opens its own connections.

    Args:
        protocol: Part of the address before `://`.

    Raises:
        DinoError: If the package for this protocol is missing.
    """

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._opened: tuple[int, Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return store_of, (self.protocol,)

    @property
    def is_web(self) -> bool:
        """True for addresses of the web, whose folders are pages of links and whose keys are the addresses."""
        return self.protocol in ("http", "https")

    @property
    def files(self) -> Any:
        """File system of fsspec in this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            package, extra = NEEDS[self.protocol]
            # Without a cache of listings: it would hide new files, and cut files that have grown.
            options = {} if self.is_web else {"use_listings_cache": False}
            try:
                files = fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
            except ImportError as error:
                raise DinoError(
                    f"{self.protocol}:// needs the package {package}, which is not installed",
                    f"pip install 'dinocli[{extra}]'",
                ) from error
            self._opened = os.getpid(), files
        return self._opened[1]

    def retry(self, request: Callable[[], T], address: str, tries: int = _TRIES) -> T:
        """Return the answer of a request, which is repeated up to `tries` times if the connection fails.

        Raises:
            FileNotFoundError: If the file does not exist.
            Refused: If the request refuses the file.
            Denied: If access is denied.
            DinoError: If every attempt fails.
        """
        denied: tuple[type[Exception], ...] = (PermissionError, *_no_credentials())
        for attempt in range(tries):
            try:
                return request()
            except denied as error:
                raise Denied(f"{address} may not be read: {reason_of(error)}", _CREDENTIALS) from error
            except (DinoError, Refused):  # no failure of the connection
                raise
            except Exception as error:  # fsspec's packages raise errors of many libraries
                if isinstance(error, FileNotFoundError) and not self._hides_failure(error):
                    raise
                if attempt == tries - 1:
                    # The missing file of `_hides_failure` has only the address; its cause names the failure.
                    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
                    reason = reason_of(cause if isinstance(cause, Exception) else error)
                    raise DinoError(
                        f"{address} cannot be read after {tries} attempts: {reason}",
                        "check the address and the network, and run the same command again: it resumes",
                    ) from error
                time.sleep(_PAUSE * 2**attempt * (1 + random.random()) / 2)
        raise AssertionError

    def _hides_failure(self, error: FileNotFoundError) -> bool:
        """Return whether a file may exist: over HTTP, fsspec reports every failed HEAD request as a missing file."""
        cause = error.__cause__
        return self.is_web and cause is not None and getattr(cause, "status", None) not in (404, 410)

    def address_of(self, key: str) -> str:
        """Return the address of a file with its protocol."""
        return key if "://" in key else f"{self.protocol}://{key}"

    def state_of(self, key: str) -> Mapping[str, Any]:
        """Return what the server states about a file.

        Raises:
            FileNotFoundError: If it does not exist.
            DinoError: If access is denied, or the network fails.
        """
        return self.retry(lambda: self.files.info(key), self.address_of(key))

    def state_if_any(self, key: str) -> Mapping[str, Any] | None:
        """Return what the server states about a file, or None if it does not exist.

        Raises:
            DinoError: If access is denied, or the network fails.
        """
        try:
            return self.state_of(key)
        except FileNotFoundError:
            return None


def store_of(protocol: str) -> Store:
    """Return the store of a protocol, which all sources of a process share: to connect takes up to a second.

    After a change of the environment, such as other credentials, it is a new one.
    """
    return _connect(protocol, tuple(sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS))))


@cache
def _connect(protocol: str, settings: tuple[tuple[str, str], ...]) -> Store:
    return Store(protocol)


def is_remote(spec: str) -> bool:
    """Return whether a source is at an address that fsspec reads, by its name."""
    protocol, mark, _ = spec.partition("://")
    return bool(mark) and protocol in NEEDS


def resolve(address: str) -> tuple[Store, str]:
    """Return the file system of an address, and the key of the file or folder in it; a slash at the end stays."""
    store = store_of(address.partition("://")[0])
    if store.is_web:
        return store, address
    # The packages differ in whether they strip the slash too.
    return store, store.files._strip_protocol(address).rstrip("/") + "/" * address.endswith("/")


_CREDENTIALS = "set the credentials as for the cloud's own tool, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def _no_credentials() -> tuple[type[Exception], ...]:
    try:
        from botocore.exceptions import NoCredentialsError
    except ImportError:
        return ()
    return (NoCredentialsError,)


def size_of(about: Mapping[str, Any]) -> int:
    """Return the size of a file in bytes, as its server states it; -1 if it states none."""
    return UNKNOWN if about.get("size") is None else int(about["size"])


def version_of(about: Mapping[str, Any]) -> str:
    """Return a checksum, number or time that changes with a file, as its server states it; empty if it states none."""
    return next((f"{name} {about[name]}" for name in _VERSIONS if about.get(name)), "")


def endpoint_of(files: Any) -> str:
    """Return the server or account of a file system: buckets of different ones may have the same name."""
    if client := getattr(files, "s3", None):
        return str(client.meta.endpoint_url)
    # Attributes of gcsfs (base) and adlfs; the addresses of HTTP are complete.
    return " ".join(str(getattr(files, name, None)) for name in ("base", "account_url", "account_name"))


def download(store: Store, key: str, size: int, most: float) -> bytes:
    """Read a file completely; its length is compared with the size that the server states.

    Raises:
        Refused: If it is too large, or has another size than listed.
        DinoError: If the network fails.
    """

    def request() -> bytes:
        stated = size if size != UNKNOWN else store.files.info(key).get("size")
        if stated is not None and stated > most * 1e6:
            raise Refused(f"too large: {megabytes_over(stated, most)}")
        if stated is None:
            return store.files.cat_file(key)
        # One byte more than stated, so that an object that has grown is noticed. An empty range would read all of it.
        data = store.files.cat_file(key, start=0, end=stated + 1) if stated else b""
        if stated and len(data) == stated:
            return data
        now = store.files.info(key).get("size")
        if now != stated:
            raise Refused(f"changed: it has {now} bytes, and had {stated} when it was listed")
        if stated:
            raise EOFError(f"its body has {len(data)} of {stated} bytes")
        return data

    return store.retry(request, store.address_of(key))


def place_of(text: str) -> Path:
    """Return the path in the cache of what a text names."""
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return cache_folder() / "remote" / f"{int(digest[:2], 16) % _SHELVES:02x}" / digest[2:]


def read_kept(place: Path, size: int) -> bytes | None:
    """Return a file of the cache; None if it is not there, or has another size in bytes than known."""
    try:
        data = place.read_bytes()
    except OSError:
        return None
    return data if size in (UNKNOWN, len(data)) else None


def keep(place: Path, data: bytes) -> None:
    """Write a file to the cache, and remove the oldest ones that exceed its budget."""
    if len(data) > _BUDGET / _SHELVES:
        return
    try:
        with atomic(place) as draft:
            draft.write_bytes(data)
        kept = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(place.parent)]
        over = sum(size for _, size, _ in kept) - _BUDGET / _SHELVES
        for _, size, path in sorted(kept):
            if over <= 0:
                break
            os.unlink(path)
            over -= size
    except OSError:
        pass  # a full or unwritable disk only costs a download each time
