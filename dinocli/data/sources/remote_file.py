"""Files at addresses, read like local ones: by blocks, which are kept in the local cache."""

from __future__ import annotations

import io
from typing import Any

from dinocli.data.sources.regular import Refused
from dinocli.data.sources.store import UNKNOWN, endpoint_of, keep, place_of, read_kept, resolve, size_of, version_of

BLOCK = 2**22  # bytes of a block: large enough that a request costs little beside its bytes
_TOGETHER = 16  # blocks of one request at most


class RemoteFile(io.RawIOBase):
    """A file at an address. Each process opens its own connections.

    Args:
        address: Address such as `s3://bucket/train-000.tar`.
        block: Size of the blocks in bytes.
        held: Number of blocks in memory, for readers that take a few bytes at a time.

    Raises:
        FileNotFoundError: If it does not exist.
        Refused: If its server states no size.
        DinoError: If access is denied, the network fails, or the package for the protocol is missing.
    """

    def __init__(self, address: str, block: int = BLOCK, held: int = 2) -> None:
        super().__init__()
        self.address, self.block, self.held = address, block, held
        self._store, self._key = resolve(address)
        stated = self._store.state_of(self._key)
        self.size, self.version = size_of(stated), version_of(stated)
        if self.size == UNKNOWN:
            raise Refused(f"not read here: the server states no size of {address}")
        self._at = 0
        self._held: dict[int, bytes] = {}
        self._whole: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readall(self) -> bytes:
        return self.read(self.size - self._at) or b""

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; less than all of it only at the end of the file.

        Raises:
            Refused: If the file has changed.
            DinoError: If the network fails.
        """
        view = memoryview(buffer).cast("B")
        end = min(self._at + len(view), self.size)
        if end <= self._at:
            return 0
        first, last = self._at // self.block, (end - 1) // self.block
        begun = self._at
        for number, block in self._blocks(range(first, last + 1)):
            piece = block[self._at - number * self.block : end - number * self.block]
            view[self._at - begun : self._at - begun + len(piece)] = piece
            self._at += len(piece)
        return self._at - begun

    def _blocks(self, numbers: range) -> Any:
        """Yield number and bytes of blocks, from memory, the cache, or the server: neighbours by one request."""
        done = numbers.start
        while done < numbers.stop:
            if (block := self._find(done)) is not None:
                yield done, self._hold(done, block)
                done += 1
                continue
            stop = done + 1
            while stop < min(numbers.stop, done + _TOGETHER) and not self._is_near(stop):
                stop += 1
            data = self._fetch(done * self.block, min(stop * self.block, self.size))
            for number in range(done, stop):
                block = data[(number - done) * self.block : (number - done + 1) * self.block]
                if self.version:  # else the file may change under its kept blocks
                    keep(self._place(number), block)
                yield number, self._hold(number, block)
            done = stop

    def _is_near(self, number: int) -> bool:
        return number in self._held or (bool(self.version) and self._place(number).exists())

    def _find(self, number: int) -> bytes | None:
        if (held := self._held.get(number)) is not None:
            return held
        if self._whole is not None:
            return self._whole[number * self.block : (number + 1) * self.block]
        if not self.version:
            return None
        return read_kept(self._place(number), min(self.block, self.size - number * self.block))

    def _hold(self, number: int, block: bytes) -> bytes:
        self._held.pop(number, None)
        self._held[number] = block
        while len(self._held) > self.held:
            self._held.pop(next(iter(self._held)))
        return block

    def _place(self, number: int) -> Any:
        server = endpoint_of(self._store.files)
        return place_of(f"{server} {self.address} {self.size} {self.version} {self.block} {number}")

    def _fetch(self, first: int, end: int) -> bytes:
        def request() -> bytes:
            data: bytes = self._store.files.cat_file(self._key, start=first, end=end)
            # Asked after the bytes: a range of a file that was replaced meanwhile is as long as expected.
            now = self._store.files.info(self._key)
            if (size := size_of(now)) != self.size:
                raise Refused(f"changed: {self.address} has {size} bytes, and had {self.size} when it was opened")
            if version_of(now) != self.version:
                raise Refused(f"changed: {self.address} was replaced after it was opened")
            if len(data) == end - first:
                return data
            if len(data) == self.size:  # a server that always sends the whole file
                self._whole = data
                return data[first:end]
            raise EOFError(f"its body has {len(data)} of {end - first} bytes")

        return self._store.retry(request, self.address)
