"""Benchmarks of a model against other libraries with the same weights; the names that the command line offers.

Importing this package needs no torch.
"""

from types import ModuleType
from typing import Literal

from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean
from deeplabzoo.optional_imports import import_without_telemetry

Task = Literal["labels", "logits"]
TASKS: dict[Task, str] = {"labels": "image -> labels", "logits": "image -> logits"}
"""Value of `--tasks` -> title in tables."""

OURS = "deeplabzoo"
"""The peer that is our own model as it was loaded, in float32, before `optimize()`."""
PEERS = ("torchvision", "smp", "transformers", "onnxruntime", "openvino", OURS)
"""Values of `--peers`."""
LIBRARY_OF = {peer: peer for peer in PEERS if peer != OURS} | {"smp": "segmentation_models_pytorch"}
"""The module that a peer needs."""
PLAIN = "plain"
"""Value of `--backend` for the model as it was loaded, without optimization."""

BackendName = Literal["ours", "torchvision", "ours_bf16"]
TRAINING_BACKENDS: dict[BackendName, str] = {
    "ours": "deeplabzoo, float32",
    "torchvision": "torchvision's reference recipe, float32",
    "ours_bf16": "deeplabzoo, amp=bf16 (opt-in; not the default on a CPU)",
}
"""Value of `--backends` of the training benchmark -> title in tables."""
TRAINING_MODELS = {
    "deeplabv3_mobilenetv3": "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50": "deeplabv3_resnet50",
    "deeplabv3_resnet101": "deeplabv3_resnet101",
}
"""Model of the training benchmark -> torchvision's name of it."""

_EXTRAS = {
    "torchvision": "torchvision",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "transformers": "transformers",
    "onnxruntime": "deeplabzoo[export]",
    "openvino": "deeplabzoo[openvino]",
    "onnxscript": "deeplabzoo[export]",
    "matplotlib": "deeplabzoo[train]",
    "torchmetrics": "torchmetrics",
    "tifffile": "deeplabzoo[large]",
}


def library(name: str) -> ModuleType:
    """Return an optional library; raises UsageError with the command that installs it if it is missing."""
    try:
        return import_without_telemetry(name)
    except ImportError:
        raise UsageError(f'{name} is required and not installed: pip install "{_EXTRAS[name]}".') from None


def require_peer(name: str) -> None:
    """Raise UnknownNameError, with the nearest name, for an unknown peer."""
    if name not in PEERS:
        raise UnknownNameError(f"Unknown peer {name!r}; expected one of {', '.join(PEERS)}.{did_you_mean(name, PEERS)}")
