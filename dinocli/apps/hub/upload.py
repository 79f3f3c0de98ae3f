"""Upload of a model folder to the Hugging Face Hub, by the hub's own client."""

from __future__ import annotations

import re
from pathlib import Path

from dinocli.core.errors import DinoError, reason_of

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def check_upload(repository: str) -> None:
    """Check the name of a repository, and that there is a token, before anything is written.

    Raises:
        DinoError: If the name is not `USER/NAME`, or the hub's client has no token.
    """
    from huggingface_hub import get_token

    if not _REPOSITORY.fullmatch(repository):
        raise DinoError(
            f"--upload {repository} is not a repository of the hub; expected USER/NAME",
            "use letters, digits, -, _ and ., such as --upload ada/my-birds",
        )
    if not get_token():
        raise DinoError(
            "no token for the Hugging Face Hub is stored here, and HF_TOKEN is not set",
            "hf auth login, with a token that may write from https://huggingface.co/settings/tokens",
        )


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a model folder, create the repository if it is missing, and return its address.

    Args:
        folder: Folder of `push`.
        repository: `USER/NAME`; see `check_upload`.
        private: If True, a new repository can be seen by its owner only.

    Raises:
        DinoError: If the hub cannot be reached, or refuses the token, the name or the files. The folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Upload a model of dinocli")
    # The client raises errors of several HTTP libraries, by version.
    except Exception as error:
        reason = reason_of(error)
        raise DinoError(
            f"the hub did not take {repository}: {reason}",
            f"check the token (hf auth whoami) and the network; {folder} is complete: hf upload {repository} {folder}",
        ) from error
    return address
