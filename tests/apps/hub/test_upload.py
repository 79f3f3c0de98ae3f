from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dinocli.apps.hub.upload import check_upload, upload
from dinocli.core.errors import DinoError


class Hub:
    """Stand-in for the hub's client, which keeps the calls."""

    calls: list[tuple[str, Any]] = []
    failure: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.failure:
            raise self.failure
        self.calls.append(("create", (repo_id, private, exist_ok)))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str) -> None:
        assert commit_message
        self.calls.append(("upload", (sorted(path.name for path in folder_path.iterdir()), repo_id)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(Hub, "calls", [])
    return Hub


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_is_uploaded_to_a_repository_that_may_exist(hub: type[Hub], tmp_path: Path, private: bool) -> None:
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).touch()
    check_upload("ada/my-birds")
    assert upload(tmp_path, "ada/my-birds", private=private) == "https://huggingface.co/ada/my-birds"
    files = ["README.md", "config.json", "model.safetensors"]
    assert hub.calls == [("create", ("ada/my-birds", private, True)), ("upload", (files, "ada/my-birds"))]


@pytest.mark.parametrize("name", ["birds", "ada/my birds", "ada/birds/x", "https://huggingface.co/ada/birds", "ada/vö"])
def test_another_name_is_refused_before_anything_is_written(hub: type[Hub], name: str) -> None:
    with pytest.raises(DinoError, match="is not a repository of the hub; expected USER/NAME"):
        check_upload(name)


def test_a_missing_token_is_one_error(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(DinoError, match="no token for the Hugging Face Hub") as error:
        check_upload("ada/my-birds")
    assert error.value.hint.startswith("hf auth login")


@pytest.mark.parametrize(
    "failure", [ConnectionError("no route\nmore"), PermissionError(""), ValueError("403: no rights")]
)
def test_a_refusal_of_the_hub_is_one_error_and_keeps_the_folder(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: Exception
) -> None:
    monkeypatch.setattr(Hub, "failure", failure)
    reason = str(failure).partition("\n")[0] or "PermissionError"
    with pytest.raises(DinoError, match=f"the hub did not take ada/my-birds: {reason}") as error:
        upload(tmp_path, "ada/my-birds")
    assert error.value.hint.endswith(f"{tmp_path} is complete: hf upload ada/my-birds {tmp_path}")
