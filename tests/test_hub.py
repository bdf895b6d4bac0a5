"""The hub, without one: what would be pushed, when, and what is said where nothing can be."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from expunge import REPO, ExpungeError, RunConfig, UnlearnConfig, UnlearnTrainer, hub
from expunge.pipeline import train
from expunge.plan import Plan


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """A hub that takes everything; what it was asked."""
    made: list[tuple] = []

    def create_repo(self, name, private=None, exist_ok=False):
        made.append(("create", name, private))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, repo_id, folder_path, revision=None, commit_message=None):
        made.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return made


@pytest.fixture
def settings(tmp_path, tiny_model, tokenizer, pairs) -> RunConfig:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    lines = [f'{{"prompt": "{p.prompt}", "chosen": "{p.chosen}", "rejected": "{p.rejected}"}}\n' for p in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    training = {"max_steps": 2, "save_steps": 1, "push_to_hub": True, "hub_private_repo": True}
    config = RunConfig(model=str(tmp_path / "tiny"), training=training)
    config.data.train = str(tmp_path / "pairs.jsonl")
    return config


def test_the_edited_model_is_pushed_once_and_nothing_else(tmp_path, calls, settings):
    for _ in range(2):
        train(Plan.of(settings, tmp_path / "mine", quiet=True))
    assert [call[0] for call in calls] == ["create", "upload"]
    assert calls[0] == ("create", "mine", True)
    name, files = calls[1][1:]
    assert name == "me/mine" and "model.safetensors" in files
    assert not [file for file in files if "heads" in file or "checkpoint" in file or "optimizer" in file]


def test_a_hub_that_cannot_be_written_to_says_so_before_training(tmp_path, settings, monkeypatch):
    def refuse(*_, **__):
        raise LocalTokenNotFoundError("Token is required.\nSee the documentation.")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ExpungeError, match=r"cannot write to mine on the hub \(Token is required\.\); log in") as caught:
        train(Plan.of(settings, tmp_path / "mine", quiet=True))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_secrets_and_checkpoints_are_no_settings(tmp_path):
    with pytest.raises(ExpungeError, match="a secret does not belong among settings") as caught:
        hub.check_settings(UnlearnConfig(str(tmp_path), hub_token="hf_secret"))
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(ExpungeError, match="checkpoints are not pushed"):
        hub.check_settings(UnlearnConfig(str(tmp_path), push_to_hub=True, hub_strategy="all_checkpoints"))


def test_the_trainer_itself_names_the_way(tmp_path, tiny_model, tokenizer, pairs):
    with pytest.raises(ExpungeError, match=r"after trainer\.save_model\(folder\) call huggingface_hub\.upload_folder"):
        UnlearnTrainer(tiny_model(), REPO(), UnlearnConfig(str(tmp_path), push_to_hub=True), pairs, tokenizer)
