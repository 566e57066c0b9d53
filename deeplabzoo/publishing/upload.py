"""A folder put on the Hugging Face Hub, where `create("hf-hub:owner/repo")` finds it."""

from pathlib import Path

from deeplabzoo.errors import DeepLabZooError, DownloadError, OutputError, UsageError
from deeplabzoo.zoo.hub import offline_switch


def open_repository(repo: str, *, token: str | None = None, private: bool | None = None) -> None:
    """Make the repository if it is not there: proof, before the long work, that the network, the token and the name are right.

    `token` None takes the one of `hf auth login`; `private` None leaves it to the account. Raises UsageError for a name that
    is none, DownloadError where the network is switched off, OutputError for a refusal.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"A repository of the Hub must read owner/repo, not '{repo}'.")
    if switch := offline_switch():
        raise DownloadError(f"hf-hub:{repo} cannot be published: {switch} forbids the network.")
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).create_repo(repo, repo_type="model", exist_ok=True, private=private)
    except Exception as error:  # the client passes on what its HTTP library raises
        raise _refused(repo, error) from None


def upload(repo: str, folder: Path, message: str, *, token: str | None = None) -> str:
    """Upload a folder as one commit and return its hash, the revision that a manifest row names; raises OutputError."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi(token=token).upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid)
    except Exception as error:
        raise _refused(repo, error) from None


def _refused(repo: str, error: Exception) -> DeepLabZooError:
    """Return one sentence for what the client raised: what is wrong, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return UsageError(f"hf-hub:{repo} is no name for a repository: {_first_line(error)}.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason, remedy = f"{type(error).__name__}: {_first_line(error)}", "try again later"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        reason, remedy = "no valid token was given", "log in with `hf auth login`, or give one that may write there"
    elif isinstance(error, errors.GatedRepoError):
        reason, remedy = "it is gated and this account has no access", f"ask for it on https://huggingface.co/{repo}"
    elif status == 403:
        reason = f"the token may not write there ({_first_line(error)})"
        remedy = "log in with `hf auth login` as its owner, with a token that may write"
    elif status == 404:
        reason, remedy = "there is no such repository, or the token may not see it", "check the name and the token"
    elif status is None:
        reason, remedy = f"the Hub cannot be reached ({reason})", "check the network"
    return OutputError(f"hf-hub:{repo} cannot be published: {reason}; {remedy}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
