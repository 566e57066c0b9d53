"""The way back: a network of ours written as the file or folder that another library's own class loads."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save as serialise

from deeplabzoo.errors import OutputError, UsageError, WeightsError
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.output import write_atomically
from deeplabzoo.zoo.conversion import Proof, compare, require_identical
from deeplabzoo.zoo.origins import smp, torchvision, transformers
from deeplabzoo.zoo.origins.exported import Exported
from deeplabzoo.zoo.state_dict import read_state_dict
from deeplabzoo.zoo.weights_file import read_weights

LIBRARIES: Mapping[str, Callable[[DeepLab], Exported]] = {
    "torchvision": torchvision.export,
    "smp": smp.export,
    "transformers": transformers.export,
}
"""By the name that the command line has for them."""
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
WEIGHTS = "model.safetensors"


def is_folder_form(path: Path) -> bool:
    """Whether a path means a folder: it has no suffix of a weights file."""
    return path.suffix not in FILE_SUFFIXES


def write_exported(exported: Exported, path: Path, library: str) -> None:
    """Write the tensors alone (by suffix: safetensors, or torch.save), or a folder with the settings beside them.

    A file comes whole or not at all, and so does a folder that was not there. Raises UsageError for a form that the library
    has not, OutputError where nothing can be written.
    """
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in exported.state_dict.items()}
    if not is_folder_form(path):
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


def read_exported(exported: Exported, net: DeepLab, path: Path) -> tuple[DeepLab, Proof]:
    """Read what was written and return it as a network of ours, with the proof that it is the one that was exported.

    What a bare state dict does not hold (strides, rates, classes) is as in `net`, since the library's class is told it too.
    Raises WeightsError where a tensor is not what it was; what was written is removed then.
    """
    try:
        require_identical(exported.state_dict, read_state_dict(path / WEIGHTS if path.is_dir() else path), path)
        file = read_weights(path)
    except WeightsError:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    config = replace(net.config, aux_head=any(name.startswith("aux_head.") for name in file.state_dict))
    back = DeepLab.from_weights(
        config, file.state_dict, classes=net.classes, palette=net.palette, preprocessing=net.preprocessing
    )
    return back, compare(net, back)


def _write_tensors(state: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        whole = serialise(state, {"format": "pt"})
        write_atomically(path, lambda file: file.write(whole))
    else:
        write_atomically(path, lambda file: torch.save(state, file))
