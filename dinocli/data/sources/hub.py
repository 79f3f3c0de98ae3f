"""Data sets of the Hugging Face hub, downloaded to its cache and read from there."""

from __future__ import annotations

import re
from pathlib import Path

from dinocli.core.errors import DinoError

HUB = "hf://datasets/"
_ADDRESS = re.compile(rf"{HUB}([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")


def fetch_dataset(spec: str) -> Path:
    """Download `hf://datasets/USER/NAME[@REVISION][/FOLDER]` unless it is in the cache, and return its local folder.

    Raises:
        DinoError: If the address is not valid, or the download fails.
    """
    found = _ADDRESS.fullmatch(spec.rstrip("/"))
    if not found:
        raise DinoError(f"{spec} names no data set; expected {HUB}USER/NAME", f"{HUB}USER/NAME, or with @REVISION")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, revision, folder = found.groups()
    try:
        root = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=f"{folder}/**" if folder else None
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DinoError(
            f"{spec} could not be downloaded: {said}", "check name and network; for private sets: hf auth login"
        ) from error
    return Path(root, folder or "")
