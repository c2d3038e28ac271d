"""A stand-in for the Hugging Face hub."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: repositories are folders, and calls are recorded."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    root, calls = tmp_path / "hub", []

    class Api:
        def __init__(self, **kwargs: Any) -> None:
            calls.append(("api", kwargs))

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            assert exist_ok
            calls.append(("create_repo", {"private": private}))
            repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            assert exist_ok
            calls.append(("create_branch", {"branch": branch}))

        def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
            return (root / repo_id / name).exists()

        def list_repo_files(self, repo_id: str, *, revision: str | None) -> list[str]:
            calls.append(("list", {"revision": revision}))
            folder = root / repo_id
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            calls.append(("upload_folder", kwargs))
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"commit to {repo_id}"

    def download(repo_id: str, name: str, *, subfolder: str | None, **kwargs: Any) -> str:
        calls.append(("download", {"name": name, **kwargs}))
        path = root / repo_id / (subfolder or "") / name
        if not path.exists():
            raise EntryNotFoundError(f"404: {name}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(root=root, calls=calls)
