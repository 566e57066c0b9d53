"""A model written as a file of ours or of another library, and compared with what is read back: tensors and logits."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialise

from deeplabzoo.checkpoints.converters import smp, torchvision, transformers
from deeplabzoo.checkpoints.converters.key_mapping import ExportedCheckpoint
from deeplabzoo.checkpoints.load import read_weights
from deeplabzoo.checkpoints.native import read_checkpoint
from deeplabzoo.checkpoints.state_dict import read_state_dict
from deeplabzoo.errors import OutputError, UsageError, WeightsError
from deeplabzoo.files import write_atomically
from deeplabzoo.models.deeplab import DeepLab

_PARITY_HW = (129, 193)
"""Odd, and several cells wide at every output stride."""


@dataclass(frozen=True)
class ParityResult:
    """How the model that is read back from a file differs from the one that was written, on one fixed input."""

    max_logit_error: float
    """Largest difference of the logits divided by their standard deviation; 0 for identical ones."""
    label_agreement: float
    """Share of the pixels with the same label, 0...1."""

    def __str__(self) -> str:
        if self.max_logit_error == 0:
            return "read back: every tensor and every logit is the same"
        return (
            f"read back: logits differ by at most {self.max_logit_error:.2g} of their spread, "
            f"{100 * self.label_agreement:.2f} % of the labels are the same"
        )


def write_verified_checkpoint(
    net: DeepLab, path: Path, *, extra: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[DeepLab, ParityResult]:
    """Write a model to a file, read it back and compare; the file gets its name after the comparison.

    Args:
        net: The model.
        path: The file; where an error is raised, an existing one is as it was.
        extra: JSON values kept as the checkpoint's `source`.
        dtype: Floating-point type in the file.

    Returns:
        The model that the file holds, and how it differs from `net`.

    Raises:
        OutputError: The file cannot be written.
        WeightsError: `dtype` cannot hold a tensor's values, or the file came out different.
    """
    expected = {name: _cast_checked(name, tensor, dtype) for name, tensor in net.state_dict().items()}
    target = Path(os.path.realpath(path))
    trial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.unproven")
    try:
        net.save(trial, dtype=dtype, extra=extra)
        written = read_checkpoint(trial, dtype=None)
        check_identical_tensors(expected, written.state_dict, path)
        assert written.config is not None
        back = DeepLab.from_weights(
            written.config,
            written.state_dict,
            classes=written.classes,
            palette=written.palette,
            preprocessing=written.preprocessing,
        )
        parity = compare_logits(net, back)
        if dtype is torch.float32 and parity.max_logit_error:
            raise WeightsError(f"'{path}' would give other logits than what was written into it, so it was not kept.")
        os.replace(trial, target)
    except OSError as error:
        raise OutputError(f"Cannot write '{path}': {error.strerror or error}.") from None
    finally:
        trial.unlink(missing_ok=True)
    return back, parity


def check_identical_tensors(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise WeightsError unless both have the same names, kinds, shapes and bytes."""
    wrong = sorted(expected.keys() ^ found.keys()) + [
        name for name in expected.keys() & found.keys() if _fingerprint(expected[name]) != _fingerprint(found[name])
    ]
    if wrong:
        raise WeightsError(
            f"'{path}' came out different from what was written into it ({wrong[0]}), so it was not kept; check the disk."
        )


def compare_logits(net: DeepLab, other: DeepLab) -> ParityResult:
    """Return how far apart the logits of two models are on one fixed input; both are run in eval mode."""
    image_BCHW = torch.randn(1, net.config.in_chans, *_PARITY_HW, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits, others = net(image_BCHW), other(image_BCHW)
    if torch.equal(logits, others):
        return ParityResult(0.0, 1.0)
    error = float((logits - others).abs().max() / logits.std())
    return ParityResult(error, float((logits.argmax(1) == others.argmax(1)).float().mean()))


def _fingerprint(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.detach().cpu().contiguous().numpy().tobytes()


def _cast_checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if bool((cast.isinf() & ~tensor.isinf()).any()):
        limit = torch.finfo(dtype).max
        raise WeightsError(f"'{name}' holds values above {limit:g}, which {dtype} cannot hold; write float32 instead.")
    return cast


# A model of ours written as the file or folder that another library's own class loads.

LIBRARIES: Mapping[str, Callable[[DeepLab], ExportedCheckpoint]] = {
    "torchvision": torchvision.export,
    "smp": smp.export,
    "transformers": transformers.export,
}
"""Name on the command line -> how a model is converted for it."""
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
WEIGHTS = "model.safetensors"


def is_folder_target(path: Path) -> bool:
    """Return whether a path means a folder: it has no suffix of a weights file."""
    return path.suffix not in FILE_SUFFIXES


def write_exported(exported: ExportedCheckpoint, path: Path, library: str) -> None:
    """Write the tensors alone, or a folder with the settings beside them; a file or a new folder comes whole or not at all.

    Args:
        exported: The converted model.
        path: A file, whose suffix decides between safetensors and torch.save, or a folder.
        library: Name of the library, for messages.

    Raises:
        UsageError: The library does not read this kind of output.
        OutputError: It cannot be written.
    """
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in exported.state_dict.items()}
    if not is_folder_target(path):
        if not exported.build:
            raise UsageError(f"{library} reads folders; give --out a name without a suffix, not '{path}'.")
        _write_tensors(state, path)
        return
    if not exported.folder:
        raise UsageError(f"{library} reads state dicts; end --out '{path}' in .pth or .safetensors.")
    try:
        trial = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent))
        try:
            trial.chmod(0o755)
            for name, settings in exported.settings.items():
                (trial / name).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (trial / WEIGHTS).write_bytes(serialise(state, {"format": "pt"}))
            trial.rename(path)  # succeeds over an empty folder, and over nothing else
        finally:
            shutil.rmtree(trial, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"Cannot write the folder '{path}': {error.strerror or error}.") from None


def read_exported(exported: ExportedCheckpoint, net: DeepLab, path: Path) -> tuple[DeepLab, ParityResult]:
    """Read what was written as a model of ours and return it, with how it differs from the exported one.

    What a bare state dict does not hold (strides, atrous rates, classes) is taken from `net`, as the library's class is built
    with it, too. Raises WeightsError where a tensor differs; what was written is then removed.
    """
    try:
        check_identical_tensors(exported.state_dict, read_state_dict(path / WEIGHTS if path.is_dir() else path), path)
        file = read_weights(path)
    except WeightsError:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    config = replace(net.config, aux_head=any(name.startswith("aux_head.") for name in file.state_dict))
    back = DeepLab.from_weights(
        config, file.state_dict, classes=net.classes, palette=net.palette, preprocessing=net.preprocessing
    )
    return back, compare_logits(net, back)


def _write_tensors(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        whole = serialise(state, {"format": "pt"})
        write_atomically(path, lambda file: file.write(whole))
    else:
        write_atomically(path, lambda file: torch.save(state, file))
