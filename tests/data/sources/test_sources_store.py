from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from remote_servers import cached

from dinocli.core.errors import DinoError
from dinocli.data.sources import store
from dinocli.data.sources.open import open_source

fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.usefixtures("own_cache")


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


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(protocol: str, **options: Any) -> Callable[[], None]:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    with pytest.raises(DinoError, match="s3:// needs the package s3fs, which is not installed") as error:
        open_source("s3://photos/a")
    assert error.value.hint == "pip install 'dinocli[s3]'"
