"""The edited model on the hub: `training.push_to_hub=true`. Only OUT/model is pushed, never a checkpoint.

    repo = reserve(args, default="first")      # before training: a hub that cannot be written to says so now
    push(Path("runs/first/model"), repo, args)

The token is that of `hf auth login` or of the environment variable HF_TOKEN; it is never a setting, as settings are kept.
"""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import TrainingArguments

from expunge.errors import ExpungeError

FAILURES = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)


def check_settings(args: TrainingArguments) -> None:
    """ExpungeError for a setting of the hub that is not kept as it would be by transformers."""
    if args.hub_token:
        raise ExpungeError(
            "training.hub_token: a secret does not belong among settings; set HF_TOKEN, or use `hf auth login`"
        )
    if args.push_to_hub and args.hub_strategy in ("checkpoint", "all_checkpoints"):
        raise ExpungeError("training.hub_strategy: checkpoints are not pushed, only the edited model, at the end; use end")


def reserve(args: TrainingArguments, default: str) -> str:
    """Make the repository `hub_model_id`, or `default` of the user that is logged in; its whole name."""
    name = args.hub_model_id or default
    try:
        return HfApi().create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    except FAILURES as error:
        raise _cannot(name, error) from None


def push(folder: Path, repo: str, args: TrainingArguments) -> str:
    """Upload a model's folder; the address of the commit."""
    try:
        return (
            HfApi()
            .upload_folder(
                repo_id=repo, folder_path=folder, revision=args.hub_revision, commit_message="Unlearned by expunge"
            )
            .commit_url
        )
    except FAILURES as error:
        raise _cannot(repo, error) from None


def _cannot(name: str, error: Exception) -> ExpungeError:
    reason = str(error).strip().split("\n")[0]
    hint = "log in (`hf auth login`, or HF_TOKEN), or leave it out"
    return ExpungeError(f"training.push_to_hub: cannot write to {name} on the hub ({reason}); {hint}")
