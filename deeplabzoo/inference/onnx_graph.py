"""A DeepLab as an ONNX graph: any batch and size, no Python left in it, proven against the network before it is used.

The tracing exporter of torch is used on purpose. Its successor (`dynamo=True`) gives the same numbers for every encoder tried
and takes ten to sixty seconds where this one takes one to two, which a user would wait for at every first run of an engine;
what tracing is known to get wrong, sizes kept as numbers, is written out in `onnx_forms` and looked for by `require_parity`.
"""

import io
import json
import warnings
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

import deeplabzoo
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.inference.onnx_forms import traceable
from deeplabzoo.inference.optional import require
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.zoo.manifest import released

Output = Literal["low", "logits", "argmax", "uint8"]
OUTPUTS: tuple[Output, ...] = ("low", "logits", "argmax", "uint8")
OPSET = 18
"""ONNX operator set: read by ONNX Runtime from 1.14 and OpenVINO from 2023.0; the first with antialiasing-free exact Resize."""

RELATIVE_TOLERANCE = 1e-3
"""Largest difference between graph and network that passes, relative to the largest logit: rounding stays 10 to 100 times
below it for random weights, a size that was kept as a number is far above it."""

_TRACED_HW = (97, 129)
_PROOF_SHAPES = ((1, 64, 96), (2, 65, 33))
Runner = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.generic]]


class GraphForm(nn.Module):
    """The computation that goes into a file: image B x C x H x W to what `output` says.

    `low`: logits at the head's own size, B x h x w x classes, the layout that label code reads fastest; `logits`: B x classes
    x H x W; `argmax` and `uint8`: B x H x W class numbers in int32 and uint8.
    """

    def __init__(self, net: DeepLab, output: Output) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Run the network on a normalised float image."""
        low_BCHW = self.net.forward_low_resolution(image_BCHW)
        if self.output == "low":
            return low_BCHW.permute(0, 2, 3, 1)
        logits_BCHW = F.interpolate(
            low_BCHW, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=self.net.config.align_corners
        )
        if self.output == "logits":
            return logits_BCHW
        return logits_BCHW.argmax(dim=1).to(torch.uint8 if self.output == "uint8" else torch.int32)


def onnx_bytes(net: DeepLab, output: Output = "logits", size: tuple[int, int] | None = None) -> bytes:
    """Return the network as an ONNX file: input `image`, output `logits` or `labels`, weights and description inside.

    Batch, height and width are open; with `size` (height, width) they are fixed, the batch at one. Raises UsageError for
    `uint8` with more than 256 classes, DeepLabZooError where torch cannot write this network or `onnx` is not installed.
    """
    require("onnx", extra="export", purpose="writing ONNX")
    if output not in OUTPUTS:
        raise UsageError(f"Unknown output {output!r}; expected one of {', '.join(OUTPUTS)}.")
    if output == "uint8" and net.num_classes > 256:
        raise UsageError(f"uint8 holds 256 class numbers and this network has {net.num_classes}; take output 'argmax'.")
    form = GraphForm(traceable(net), output).eval()
    name = "labels" if output in ("argmax", "uint8") else "logits"
    # a batch of two when it is open, as a lone sample could be taken for a constant
    image_BCHW = torch.zeros(1 if size else 2, net.config.in_chans, *(size or _TRACED_HW))
    open_axes = {"image": {0: "batch", 2: "height", 3: "width"}, name: {0: "batch"}}
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # that it is the tracing exporter, and that shapes are read while tracing: both are meant
        try:
            torch.onnx.export(
                form,
                (image_BCHW,),
                file,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=OPSET,
                input_names=["image"],
                output_names=[name],
                dynamic_axes=None if size else open_axes,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise DeepLabZooError(
                f"torch {torch.__version__} cannot write {net.config.architecture} on {net.config.encoder} as ONNX ({reason}); "
                "use the engine 'torch'."
            ) from error
    return _described(file.getvalue(), description(net, output))


def description(net: DeepLab, output: Output) -> dict[str, str]:
    """Return what a user of the file needs beside the numbers, as metadata: text, JSON where it is not a word.

    `classes`, `palette`, `preprocessing`, `config`, `weights` (source, hash, licence where the manifest row names one),
    `output` and the version that wrote it. The keys are those of our safetensors files wherever they mean the same.
    """
    return {
        "format": "deeplabzoo",
        "deeplabzoo": deeplabzoo.__version__,
        "output": output,
        "config": json.dumps(net.config.to_dict()),
        "classes": json.dumps(net.classes),
        "palette": json.dumps(net.palette),
        "preprocessing": json.dumps(net.preprocessing.to_dict()),
        "source": json.dumps(net.weights_source),
        "licence": _licence(net),
    }


def require_parity(
    net: DeepLab, run: Runner, output: Output, shapes: tuple[tuple[int, int, int], ...] = _PROOF_SHAPES
) -> float:
    """Compare a graph with its network on random images B x H x W of other shapes than it was traced with.

    Returns the largest difference relative to the largest logit. Labels are compared as labels: 99 % must be equal, since
    random images have near-ties. Raises DeepLabZooError in one sentence where they differ.
    """
    generator = torch.Generator().manual_seed(0)
    form = GraphForm(traceable(net), output).eval()
    worst = 0.0
    for batch, height, width in shapes:
        image_BCHW = torch.randn(batch, net.config.in_chans, height, width, generator=generator)
        with torch.inference_mode():
            expected = form(image_BCHW).numpy()
        worst = max(worst, difference(expected, run(image_BCHW.numpy())))
    allowed = RELATIVE_TOLERANCE if output in ("low", "logits") else 0.01
    if not worst <= allowed:
        raise DeepLabZooError(
            f"The ONNX graph of {net.config.architecture} on {net.config.encoder} does not compute what the network does "
            f"(difference {worst:.2g}, at most {allowed:g} allowed); use the engine 'torch'."
        )
    return worst


def difference(expected: npt.NDArray[np.generic], given: npt.NDArray[np.generic]) -> float:
    """Return how far two outputs are apart: logits relative to the largest one, labels as the share that differs."""
    if expected.shape != given.shape:
        return float("inf")
    if expected.dtype.kind != "f":
        return float((expected != given).mean())
    ours, theirs = expected.astype(np.float64), given.astype(np.float64)
    return float(np.abs(ours - theirs).max() / max(float(np.abs(ours).max()), 1e-12))


def _licence(net: DeepLab) -> str:
    """Return the licence that the manifest states for these very weights; empty for all others."""
    sha256 = net.weights_source.get("sha256")
    return next((row.license.weights for row in released() if sha256 is not None and row.sha256 == sha256), "")


def _described(model: bytes, facts: dict[str, str]) -> bytes:
    import onnx

    proto = onnx.load_from_string(model)
    proto.producer_name, proto.producer_version = "deeplabzoo", deeplabzoo.__version__
    onnx.helper.set_model_props(proto, facts)
    whole: bytes = proto.SerializeToString()
    return whole
