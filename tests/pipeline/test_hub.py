"""The Hugging Face Hub is asked as the caller says; what goes there has a card of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mmdlm
from mmdlm import load
from mmdlm.pipeline import hub
from mmdlm.pipeline import model as model_file


def test_from_pretrained_asks_as_it_is_told(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(tiny_checkpoint)

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = mmdlm.Model.from_pretrained(
        "someone/tiny",
        revision="v1",
        token="hf_1",
        cache_dir=tmp_path,
        local_files_only=True,
        torch_dtype=torch.bfloat16,
        device="cpu",
    )
    assert model.denoiser.dtype == torch.bfloat16
    del asked[0]["allow_patterns"]
    assert asked == [
        {
            "name": "someone/tiny",
            "revision": "v1",
            "token": "hf_1",
            "cache_dir": tmp_path,
            "local_files_only": True,
        }
    ]
    asked.clear()
    load("someone/tiny", image_tokenizer="someone/tok/image_tokenizer", revision="v1", device="cpu")
    assert [(one["name"], one["revision"]) for one in asked] == [
        ("someone/tiny", "v1"),
        ("someone/tok", None),  # a revision is of one repository
    ]


def test_what_does_not_fit_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="revision 'v1' is of a repository .* leave one of both"):
        load(tiny_checkpoint, revision="v1")
    with pytest.raises(ValueError, match="same option"):
        mmdlm.Model.from_pretrained(
            tiny_checkpoint, torch_dtype=torch.float16, dtype=torch.bfloat16
        )
    with pytest.raises(ValueError, match="torch_dtype 'float17' is no dtype of torch"):
        mmdlm.Model.from_pretrained(tiny_checkpoint, torch_dtype="float17")
    with pytest.raises(TypeError, match="did you mean revision"):
        mmdlm.Model.from_pretrained(tiny_checkpoint, revison="v1")


def test_a_model_moves_itself(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, device="cpu")
    assert model.to("cpu", torch.bfloat16) is model
    assert model.denoiser.dtype == torch.bfloat16
    assert model.to(dtype=torch.float32, device="cpu").denoiser.dtype == torch.float32
    model.to("meta")
    assert model.device == torch.device("meta")
    assert next(model.image_tokenizer.parameters()).device == torch.device("meta")
    with pytest.raises(ValueError, match="device 'nowhere' cannot be used here"):
        model.to("nowhere")


def test_a_saved_model_has_a_card(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load(tiny_checkpoint, device="cpu")
    model.save_pretrained(tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "library_name: mmdlm" in card
    assert "pipeline_tag: text-to-image" in card
    assert "# mine" in card
    assert f"{model.denoiser.vocabulary.image_codes} image codes (16 x 16 pixels)" in card
    assert str(tmp_path) not in card
    for task in model.prompt_template.tasks_with(model.text_tokenizer):
        assert f"`{task}`" in card
    assert "`chat`" not in card
    assert load(tmp_path / "mine", device="cpu").caption is not None


@pytest.mark.parametrize("has_card", [False, True])
def test_a_model_is_pushed(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_card: bool
) -> None:
    calls: dict[str, Any] = {}

    class Api:
        def __init__(self, *, token: str | None) -> None:
            calls["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            calls["created"] = options
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
            return has_card

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            shutil.copytree(options.pop("folder_path"), tmp_path / "sent")
            calls["sent"] = options
            return SimpleNamespace(pr_url=None, commit_url="https://huggingface.co/a/b/commit/1")

    monkeypatch.setattr(model_file, "HfApi", Api)
    model = load(tiny_checkpoint, device="cpu")
    url = model.push_to_hub("someone/tiny", private=True, token="hf_1", commit_message="First")
    assert url == "https://huggingface.co/a/b/commit/1"
    assert calls == {
        "token": "hf_1",
        "created": {"private": True, "exist_ok": True},
        "sent": {
            "repo_id": "someone/tiny",
            "revision": None,
            "commit_message": "First",
            "create_pr": False,
            "ignore_patterns": ["README.md"] if has_card else None,
        },
    }
    assert 'mmdlm.load("someone/tiny")' in (tmp_path / "sent" / "README.md").read_text()
    load(tmp_path / "sent", device="cpu")


def test_what_the_hub_refuses_is_one_sentence(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, device="cpu")
    with pytest.raises(ValueError, match="does not take 'someone/tiny' .*`hf auth login`"):
        model.push_to_hub("someone/tiny")
