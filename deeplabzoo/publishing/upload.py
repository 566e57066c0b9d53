"""A release on the Hugging Face Hub, where `create("hf-hub:owner/repo")` finds it."""

from pathlib import Path

from deeplabzoo.errors import DownloadError, OutputError, UsageError
from deeplabzoo.zoo.hub import offline_switch


def open_repository(repo: str) -> None:
    """Make the repository if it is not there: proof, before the long work, that the network, the token and the name are right.

    Raises UsageError for a name that is none, DownloadError where the network is switched off, OutputError for a refusal.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"--hub must read owner/repo, not '{repo}'.")
    if switch := offline_switch():
        raise DownloadError(f"hf-hub:{repo} cannot be published: {switch} forbids the network.")
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repo, repo_type="model", exist_ok=True)
    except Exception as error:  # the client passes on what its HTTP library raises
        raise OutputError(_refused(repo, error)) from None


def upload(repo: str, folder: Path, message: str) -> str:
    """Upload a folder as one commit and return its hash, the revision that a manifest row names; raises OutputError."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid)
    except Exception as error:
        raise OutputError(_refused(repo, error)) from None


def _refused(repo: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"hf-hub:{repo} cannot be published ({type(error).__name__}: {reason}); log in with `hf auth login` and a token that "
        "may write there."
    )
