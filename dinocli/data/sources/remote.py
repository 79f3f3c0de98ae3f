"""Images at addresses such as s3://bucket/photos: folders, lists, Parquet files; and what folders of shards hold."""

from __future__ import annotations

import os
import posixpath
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocli.core.errors import DinoError
from dinocli.data.decode.extras import VIDEO
from dinocli.data.images import DEFAULTS, ImagesConfig, megabytes_over
from dinocli.data.sources.indexed import StoredImages
from dinocli.data.sources.listing import KNOWN, SUFFIXES, Names
from dinocli.data.sources.lists import LISTS, fields_of, merge_rows, parse_list
from dinocli.data.sources.members import select_images
from dinocli.data.sources.parquet import ARROW, PARQUET, ParquetImages, open_remote_parquet
from dinocli.data.sources.regular import Refused
from dinocli.data.sources.remote_file import RemoteFile
from dinocli.data.sources.shards import Shards, is_shards, open_shards, open_shards_at
from dinocli.data.sources.store import (
    Denied,
    Store,
    download,
    endpoint_of,
    is_remote,
    keep,
    place_of,
    read_kept,
    resolve,
    size_of,
    version_of,
)

# Single files that are not read from addresses: archives, tables of Arrow, images, videos.
_SINGLE = (".zip", ".gz", ".7z", ARROW, *KNOWN, *VIDEO.suffixes)
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
        if (kept := read_kept(place, size)) is not None:
            return kept
        data = download(self.store, key, size, images.max_megabytes)
        keep(place, data)
        return data


def is_single(spec: str) -> bool:
    """Return whether an address is of a single file that is not read from there, by its name."""
    return spec.lower().endswith(_SINGLE)


def open_remote(spec: str) -> RemoteImages | ParquetImages | Shards:
    """Open a folder, a list of images, or a Parquet file at an address.

    A folder of tar shards or Parquet files without images is opened as what it holds.

    Raises:
        DinoError: If it does not exist, holds no image, is a single file of another kind, or cannot be read.
    """
    suffix = os.path.splitext(spec)[1].lower()
    if is_shards(spec):
        return open_shards(spec)
    if suffix in LISTS:
        return _open_list(spec)
    if suffix == PARQUET:
        return open_remote_parquet(spec, [spec])
    if is_single(spec):
        raise DinoError(
            f"{spec} is a single file; expected a folder, tar shards, a list or a Parquet file",
            "copy the file to this machine, and name the copy",
        )
    store, base = resolve(spec.rstrip("/") + "/")
    try:
        files = _list(store, base)
    except FileNotFoundError as error:
        raise _missing(spec, "a folder of images") from error
    keys = list(files)
    if SUFFIXES.isdisjoint(os.path.splitext(key)[1].lower() for key in keys):
        shown = [store.address_of(key) for key in keys if not posixpath.basename(key).startswith(".")]
        if shards := sorted(url for url in shown if url.lower().endswith(".tar")):
            return open_shards_at(shards, spec)
        if tables := [url for url in shown if url.lower().endswith(PARQUET)]:
            return open_remote_parquet(spec, tables)

    def marker(row: int, most: int) -> bytes:
        return download(store, keys[row], size_of(files[keys[row]]), most / 1e6)

    rows, names, classes, labels, notes = select_images(spec, [key.removeprefix(base) for key in keys], marker)
    chosen = [keys[row] for row in rows.tolist()]
    return _images(spec, store, chosen, files, names=names, classes=classes, labels=labels, notes=notes)


def _open_list(spec: str) -> RemoteImages:
    """Open a list at an address; its paths are relative to its own folder, or addresses of the same kind.

    Raises:
        DinoError: If the list does not exist, is empty, or its first image does not exist.
    """
    store, base = resolve(spec[: spec.rindex("/") + 1])
    try:
        data = RemoteFile(spec).readall()
    except FileNotFoundError as error:
        raise _missing(spec, "a list of images") from error
    except Refused as error:
        raise DinoError(
            f"{spec} cannot be read: {error}", "copy the list to this machine, and name the copy"
        ) from error

    web, mark, folder = base.partition("://") if store.is_web else ("", "", base)

    def key_of(name: str) -> str:
        if is_remote(name):
            return resolve(name)[1]
        return web + mark + posixpath.normpath(posixpath.join(folder, name))

    @cache
    def is_file(name: str) -> bool:
        try:
            about = store.state_of(key_of(name)) if name else {}
        except (FileNotFoundError, Denied):
            return False
        return about.get("type") == "file"

    listed, clash = merge_rows(parse_list(data, spec, is_file), spec, key_of)
    chosen = [key_of(entry.name) for entry in listed.entries]
    try:  # one request for a thousand files, if the server lists them
        files = {} if store.is_web else _list(store, base)
    except (FileNotFoundError, Denied):
        files = {}
    return _images(spec, store, chosen, files, **fields_of(listed, clash))


def _images(
    spec: str, store: Store, keys: list[str], stated: Mapping[str, Mapping[str, Any]], **fields: Any
) -> RemoteImages:
    """Return images at addresses; the server is asked about those that a listing says nothing about."""
    # A page of links states neither sizes nor versions.
    lacking = [key for key in keys if store.is_web or key not in stated]
    with ThreadPoolExecutor(_THREADS) as pool:
        # Reading a file that does not exist reports it.
        answers = (about or {} for about in pool.map(store.state_if_any, lacking))
        stated = dict(stated) | dict(zip(lacking, answers, strict=True))
    sizes = np.array([size_of(stated[key]) for key in keys], np.int64)
    versions = Names.of([version_of(stated[key]) for key in keys])
    about: dict[str, Any] = {"store": store, "keys": keys, "sizes": sizes, "versions": versions}
    return RemoteImages(where=spec, root=Path(spec), **fields, **about, endpoint=endpoint_of(store.files))


def _list(store: Store, base: str) -> dict[str, Mapping[str, Any]]:
    """Return what the server states about each file below a folder, by key.

    Raises:
        FileNotFoundError: If it does not exist or is empty.
        DinoError: If it cannot be read.
    """
    where = store.address_of(base).rstrip("/")
    address = base if store.is_web else base.rstrip("/")
    found = store.retry(lambda: store.files.find(address, detail=True), where, tries=2)
    if not found:  # fsspec's listing over HTTP hides errors of the connection
        store.retry(lambda: store.files.info(address), where, tries=2)
    # Keys that end with a slash are placeholders of folders.
    files = {key: about for key, about in found.items() if key.startswith(base) and not key.endswith("/")}
    if not files:
        raise FileNotFoundError(where)
    return files


def _missing(spec: str, expected: str) -> DinoError:
    return DinoError(f"{spec} does not exist or is empty; expected {expected}", "check the address")
