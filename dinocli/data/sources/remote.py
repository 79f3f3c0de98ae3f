"""Folders of images at addresses such as s3://bucket/photos, read through fsspec with a local cache of bounded size."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import VIDEO
from dinocli.data.images import DEFAULTS, ImagesConfig, megabytes_over
from dinocli.data.sources.indexed import StoredImages
from dinocli.data.sources.listing import KNOWN, Names
from dinocli.data.sources.lists import LISTS
from dinocli.data.sources.members import select_images
from dinocli.data.sources.parquet import ARROW, PARQUET
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.store import NEEDS, UNKNOWN, Store, download, endpoint_of, keep, place_of, size_of, version_of

# Single files, which are not read from addresses: archives, lists, tables, images, videos.
_SINGLE = (".tar", ".zip", ".gz", ".tgz", ".zst", ".7z", PARQUET, ARROW, *LISTS, *KNOWN, *VIDEO.suffixes)
_THREADS = 32  # files asked about at once


@dataclass(frozen=True, eq=False)
class RemoteImages(StoredImages):
    """Images in a remote folder.

    Attributes:
        store: File system.
        keys: Address of each image without its protocol. [S]
        sizes: Size of each image in bytes, as listed; -1 if unknown. [S]
        versions: Checksum or time of each image, as the server states it; empty if it states none. [S]
        endpoint: Server or account that the addresses belong to.
    """

    store: Store
    keys: list[str]
    sizes: NDArray[np.int64]
    versions: Names
    endpoint: str

    @property
    def fingerprint(self) -> str:
        """Checksum of the names, their order, the sizes, and the versions that the server states."""
        versions = "\n".join(self.versions).encode()
        return f"{zlib.crc32(versions, zlib.crc32(self.sizes.tobytes(), int(super().fingerprint, 16))):08x}"

    def read(self, index: int, images: ImagesConfig = DEFAULTS) -> bytes:
        """Return the bytes of an image, from the cache if it is there.

        Raises:
            Refused: If it is too large, or no longer the file that was listed.
            FileNotFoundError: If it no longer exists.
            DinoError: If the network fails; the run can then be resumed.
        """
        size, key = int(self.sizes[index]), self.keys[index]
        if size > images.max_megabytes * 1e6:
            raise Refused(f"too large: {megabytes_over(size, images.max_megabytes)}")
        version = self.versions[index]
        if not version:  # the image may have changed since it was kept
            return download(self.store, key, size, images.max_megabytes)
        place = place_of(f"{self.endpoint} {self.store.protocol}://{key} {size} {version}")
        try:
            data = place.read_bytes()
            if size in (UNKNOWN, len(data)):
                return data
        except OSError:
            pass
        data = download(self.store, key, size, images.max_megabytes)
        keep(place, data)
        return data


def is_remote(spec: str) -> bool:
    """Return whether a source is a folder at an address that fsspec reads, by its name."""
    protocol, mark, path = spec.partition("://")
    return bool(mark) and protocol in NEEDS and not path.lower().endswith(_SINGLE)


def open_remote(spec: str) -> RemoteImages:
    """List a remote folder.

    Raises:
        DinoError: If it does not exist, holds no image, or cannot be read.
    """
    store = Store(spec.partition("://")[0])
    web = store.protocol in ("http", "https")
    address = spec.rstrip("/") + "/" * web
    missing = DinoError(f"{spec} does not exist or is empty; expected a folder of images", "check the address")
    try:
        found = store.retry(lambda: store.files.find(address, detail=True), spec, tries=2)
        if not found:  # fsspec's listing over HTTP hides errors of the connection
            store.retry(lambda: store.files.info(address), spec, tries=2)
    except FileNotFoundError as error:
        raise missing from error
    base = address if web else store.files._strip_protocol(address) + "/"
    # Keys that end with a slash are placeholders of folders.
    files = {key: about for key, about in found.items() if key.startswith(base) and not key.endswith("/")}
    if not files:
        raise missing
    keys = list(files)

    def marker(row: int, most: int) -> bytes:
        return download(store, keys[row], size_of(files[keys[row]]), most / 1e6)

    rows, names, classes, labels, notes = select_images(spec, [key.removeprefix(base) for key in keys], marker)
    chosen = [keys[row] for row in rows.tolist()]
    if web:  # a page of links states neither sizes nor versions
        with ThreadPoolExecutor(_THREADS) as pool:
            files = dict(zip(chosen, pool.map(lambda key: _ask(store, key), chosen), strict=True))
    sizes = np.array([size_of(files[key]) for key in chosen], np.int64)
    versions = Names.of([version_of(files[key]) for key in chosen])
    fields = names, classes, labels, store, chosen, sizes, versions, endpoint_of(store.files)
    return RemoteImages(spec, Path(spec), *fields, notes=notes)


def _ask(store: Store, key: str) -> Mapping[str, Any]:
    """Return what the server states about a file; nothing if it does not exist, which reading it reports."""
    try:
        return store.retry(lambda: store.files.info(key), key)
    except FileNotFoundError:
        return {}
