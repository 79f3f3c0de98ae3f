"""Data sets of the Hugging Face hub, downloaded to its cache and read from there."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from dinocli.core.errors import DinoError, reason_of

HUB = "hf://datasets/"
_TRIES, _PAUSE = 5, 0.5  # attempts, and seconds after the first, doubled after each
_PASSING = (408, 429, 500, 502, 503, 504)  # codes of HTTP with which a server says that it is late or busy
_ADDRESS = re.compile(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")


def fetch_dataset(spec: str) -> Path:
    """Download `hf://datasets/USER/NAME[@REVISION][/FOLDER]` unless it is in the cache, and return its local folder.

    Five attempts are made if the network or the server fails.

    Raises:
        DinoError: If the address is not valid, or the download fails.
    """
    found = _ADDRESS.fullmatch(spec.rstrip("/"))
    if not found:
        raise DinoError(f"{spec} names no data set; expected {HUB}USER/NAME", f"{HUB}USER/NAME, or with @REVISION")
    name, revision, folder = found.groups()
    for attempt in range(_TRIES):
        try:
            return Path(_download(name, revision, folder), folder or "")
        except _Passing as failure:  # finished files are kept
            if attempt == _TRIES - 1:
                raise _failure(spec, failure.__cause__ or failure) from failure
            time.sleep(_PAUSE * 2**attempt)
        except (OSError, ValueError) as error:  # errors of the hub's package are OSErrors
            raise _failure(spec, error) from error
    raise AssertionError


class _Passing(Exception):
    """Failure of the network or the server, which may have passed at the next attempt."""


def _download(name: str, revision: str | None, folder: str | None) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = f"{folder}/**" if folder else None
    # First the base of errors of the HTTP library, which is another one in each generation of the hub's package.
    passing: tuple[type[Any], ...] = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)
    try:
        return snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in _PASSING:
            raise _Passing from error
        raise
    except passing as error:
        raise _Passing from error


def _failure(spec: str, error: BaseException) -> DinoError:
    said = reason_of(error)
    return DinoError(
        f"{spec} could not be downloaded: {said}", "check name and network; for private sets: hf auth login"
    )
