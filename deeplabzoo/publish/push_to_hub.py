"""Upload to the Hugging Face Hub: one commit with weights, config.json and model card, as `DeepLab.push_to_hub` calls it."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from deeplabzoo.checkpoints.build import ModelOverrides, build_from_checkpoint
from deeplabzoo.checkpoints.native import FORMAT, tensors_sha256
from deeplabzoo.errors import DeepLabZooError, DownloadError, OutputError, UsageError
from deeplabzoo.evaluation.report import Report
from deeplabzoo.hub.factory import read_released
from deeplabzoo.hub.manifest import Metric, WeightRow, released_rows
from deeplabzoo.hub.model_info import metric_to_dict
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.offline import offline_switch
from deeplabzoo.publish.manifest_row import manifest_json, model_facts
from deeplabzoo.publish.model_card import EXAMPLE_IMAGE, PushedModel, draw_overlay, pushed_model_card, read_thumbnail
from deeplabzoo.publish.release import CARD, FACTS, OVERLAY, WEIGHTS_ON_HUB, write_weights


def create_repository(repo: str, *, token: str | None = None, private: bool | None = None) -> None:
    """Create the repository if it does not exist, which checks name, token and network before the long work.

    Args:
        repo: owner/repo.
        token: Access token; None for that of `hf auth login`.
        private: Visibility of a new repository; None for the account's default.

    Raises:
        UsageError: An invalid repository name.
        DownloadError: Offline mode is on.
        OutputError: The Hub refused.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UsageError(f"A repository of the Hub must read owner/repo, not '{repo}'.")
    if switch := offline_switch():
        raise DownloadError(f"hf-hub:{repo} cannot be published: {switch} forbids the network.")
    from huggingface_hub import HfApi

    try:
        HfApi(token=token).create_repo(repo, repo_type="model", exist_ok=True, private=private)
    except Exception as error:  # the client also raises what its HTTP library does
        raise _upload_error(repo, error) from None


def upload(repo: str, folder: Path, message: str, *, token: str | None = None) -> str:
    """Upload a folder as one commit and return its hash, the revision that a manifest row names; raises OutputError."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi(token=token).upload_folder(repo_id=repo, folder_path=folder, commit_message=message).oid)
    except Exception as error:
        raise _upload_error(repo, error) from None


def _upload_error(repo: str, error: Exception) -> DeepLabZooError:
    """Return one sentence for what the client raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return UsageError(f"hf-hub:{repo} is not a valid repository name: {_first_line(error)}.")
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason, remedy = f"{type(error).__name__}: {_first_line(error)}", "try again later"
    if status == 401 or isinstance(error, errors.LocalTokenNotFoundError):
        reason, remedy = "no valid token was given", "log in with `hf auth login`, or pass a token with write access"
    elif isinstance(error, errors.GatedRepoError):
        reason, remedy = "it is gated and this account has no access", f"request access on https://huggingface.co/{repo}"
    elif status == 403:
        reason = f"the token has no write access ({_first_line(error)})"
        remedy = "log in with `hf auth login` as its owner, with a write token"
    elif status == 404:
        reason, remedy = "the repository does not exist, or the token cannot see it", "check the name and the token"
    elif status is None:
        reason, remedy = f"the Hub cannot be reached ({reason})", "check the network"
    return OutputError(f"hf-hub:{repo} cannot be published: {reason}; {remedy}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def push_to_hub(
    net: DeepLab,
    repo: str,
    *,
    token: str | None,
    private: bool | None,
    commit_message: str | None,
    reports: Sequence[Report],
    license: str | None,
    photo: str | Path | None,
) -> str:
    """Upload a model and return the commit; see `DeepLab.push_to_hub` for the arguments."""
    row = _released_row(net)
    _require_matching_reports(net, reports)
    shown = read_thumbnail(Path(photo)) if photo is not None else None
    create_repository(repo, token=token, private=private)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = {key: value for key, value in net.weights_source.items() if key != "source"}  # drop the path on this machine
        write_weights(net, folder / WEIGHTS_ON_HUB, "fp32", source)
        metrics = (*(row.metrics if row else ()), *(one for report in reports for one in _metrics(report)))
        published = PushedModel(net, repo, row, metrics, license or (row.license.weights if row else None))
        facts = {
            "library_name": FORMAT,
            **model_facts(net),
            "metrics": [metric_to_dict(one) for one in metrics],
            "license": published.license,
            "weights": source,
        }
        (folder / FACTS).write_text(manifest_json(facts), encoding="utf-8")
        if shown is not None:
            Image.fromarray(shown).save(folder / EXAMPLE_IMAGE, quality=90)
            draw_overlay(net, shown, folder / OVERLAY)
        (folder / CARD).write_text(pushed_model_card(published, with_example_image=shown is not None), encoding="utf-8")
        commit = upload(repo, folder, commit_message or "Weights, config and model card", token=token)
    logger.info(f"hub: hf-hub:{repo}@{commit[:12]}")
    return commit


def _metrics(report: Report) -> Iterator[Metric]:
    settings = report.protocol
    for name, value in (("mIoU", report.miou), ("pixel accuracy", report.pixel_accuracy)):
        yield Metric(
            name=name,
            value=round(100 * value, 2),
            unit="%",
            protocol=str(settings),
            data=report.data,
            split=report.split,
            images=report.images,
            output_stride=settings.output_stride,
            scales=settings.scales,
            flip=settings.flip,
            origin="measured",
            subset=report.subset,
            command=report.command or f'deeplabzoo.evaluate(net, "{report.data}", root, "{report.split}")',
            date=report.date[:10],
        )


def _released_row(net: DeepLab) -> WeightRow | None:
    """Return the row of the released checkpoint that has exactly these tensors; None once they were trained or adapted.

    `weights_source` describes the file that was loaded, not the present tensors, so the file is read again and compared.
    """
    name, tag = net.weights_source.get("name"), net.weights_source.get("tag")
    row = next((row for row in released_rows(name or "") if row.tag == tag), None)
    if row is None:
        return None
    try:
        original, _ = build_from_checkpoint(read_released(row), None, ModelOverrides())
    except DeepLabZooError as error:
        logger.warning(f"cannot compare with {row.full_name} ({error}); its metrics are left out of the model card")
        return None
    before, now = original.state_dict(), net.state_dict()
    same = before.keys() == now.keys() and all(torch.equal(tensor, now[key].cpu()) for key, tensor in before.items())
    return row if same and original.config == net.config else None


def _require_matching_reports(net: DeepLab, reports: Sequence[Report]) -> None:
    own = tensors_sha256(net) if reports else ""
    for report in reports:
        if report.weights.get("tensors_sha256") != own:
            raise UsageError(
                f"The report of {report.model} on {report.data} {report.split} is of other tensors than this model's; "
                "evaluate the model again before it is pushed."
            )
