"""A DeepLab as an ONNX graph: any batch and size, no Python left in it, proven against the network before it is used.

The tracing exporter of torch is used on purpose. Its successor (`dynamo=True`) gives the same numbers for every encoder tried
and takes ten to sixty seconds where this one takes one to two, which a user would wait for at every first run of an engine;
what tracing is known to get wrong, sizes kept as numbers, is written out in `onnx_forms` and looked for by `require_parity`.
"""

import copy
import hashlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from timm.models.mobilevit import MobileVitBlock, MobileVitV2Block
from torch import nn

import deeplabzoo
from deeplabzoo.checkpoints.native import tensors_sha256
from deeplabzoo.errors import DeepLabZooError, UsageError
from deeplabzoo.files import ensure_folder, write_atomically
from deeplabzoo.hub.download import cache_folder
from deeplabzoo.hub.manifest import released
from deeplabzoo.log import logger
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.models.heads import ASPP
from deeplabzoo.optional_imports import require_module

# The few layers whose forward pass computes sizes in Python, written so that a trace keeps the sizes open.
#
# A trace follows tensors. Where a layer decides by a Python number (how many patches a map has, how large a window may be) the
# trace would keep the number of the picture that it was made with, and the file would be wrong for all others.


class TraceableMobileVitBlock(MobileVitBlock):
    """timm's MobileViT block; the resize to whole patches is always in the graph (of a map that has them, it is a copy)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x C x H x W to the same shape."""
        shortcut = x
        x = self.conv_1x1(self.conv_kxk(x))
        height, width = x.shape[-2:]
        rows, columns = _patches(height, self.patch_size[0]), _patches(width, self.patch_size[1])
        x = _to_patches(_resized(x, rows, columns, self.patch_size, align_corners=False), rows, columns, self.patch_size)
        batch, channels, area, count = x.shape
        x = self.norm(self.transformer(x.permute(0, 2, 3, 1).reshape(-1, count, self.conv_1x1.out_channels)))
        x = x.reshape(batch, area, count, channels).permute(0, 3, 1, 2)
        x = _from_patches(x, rows, columns, self.patch_size)
        x = self.conv_proj(F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False))
        if self.conv_fusion is not None:
            x = self.conv_fusion(torch.cat((shortcut, x), dim=1))
        return x


class TraceableMobileVitV2Block(MobileVitV2Block):
    """timm's MobileViT-v2 block, in the same way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x C x H x W to B x C x H' x W', which are whole patches."""
        rows, columns = (_patches(side, patch) for side, patch in zip(x.shape[-2:], self.patch_size, strict=True))
        x = self.conv_1x1(self.conv_kxk(_resized(x, rows, columns, self.patch_size, align_corners=True)))
        x = self.norm(self.transformer(_to_patches(x, rows, columns, self.patch_size)))
        folded: torch.Tensor = self.conv_proj(_from_patches(x, rows, columns, self.patch_size))
        return folded


class TraceableASPP(ASPP):
    """ASPP with a pooling window that is never larger than the map, as differences of running sums."""

    def _pool_windows(self, x: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
        size = x.shape[-2:]
        pooled = self.pool(_window_mean(_window_mean(x, 2, cells[0]), 3, cells[1]))
        return F.interpolate(pooled, size=size, mode="bilinear", align_corners=self.align_corners)


def traceable(net: DeepLab) -> DeepLab:
    """Return a copy of the network, in eval mode on the CPU, that a trace follows for every batch and size; same numbers."""
    twin = copy.deepcopy(net).cpu().float().eval()
    twin.aux_head = None
    for module in twin.modules():
        traced = _TRACEABLE.get(type(module))
        if traced is not None and not (isinstance(module, ASPP) and module.pooling_cells is None):
            module.__class__ = traced  # the same layer and state; only its forward differs
    return twin


_TRACEABLE: dict[type[nn.Module], type[nn.Module]] = {
    MobileVitBlock: TraceableMobileVitBlock,
    MobileVitV2Block: TraceableMobileVitV2Block,
    ASPP: TraceableASPP,
}


def _patches(side: int, patch: int) -> int:
    return (side + patch - 1) // patch


def _resized(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int], *, align_corners: bool) -> torch.Tensor:
    size = (rows * patch_size[0], columns * patch_size[1])
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def _to_patches(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int]) -> torch.Tensor:
    """B x C x H x W -> B x C x cells of a patch x patches."""
    height, width = patch_size
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels, rows, height, columns, width).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels, height * width, rows * columns)


def _from_patches(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int]) -> torch.Tensor:
    """B x C x cells of a patch x patches -> B x C x H x W."""
    height, width = patch_size
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels, height, width, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels, rows * height, columns * width)


def _window_mean(x: torch.Tensor, dim: int, cells: int) -> torch.Tensor:
    """Mean over a sliding window of `cells` along `dim`, or over all of it where that is shorter."""
    length = torch._shape_as_tensor(x)[dim]
    window = torch.minimum(length, torch.tensor(cells))
    first = torch.zeros_like(x.narrow(dim, 0, 1))
    sums = torch.cat((first, x.cumsum(dim)), dim)
    places = torch.arange(cast(int, length - window + 1))  # a tensor, so that the trace computes it
    return (sums.index_select(dim, places + window) - sums.index_select(dim, places)) / window


Output = Literal["low", "logits", "argmax", "uint8"]
OUTPUTS: tuple[Output, ...] = ("low", "logits", "argmax", "uint8")
OPSET = 18
"""Default ONNX operator set: read by ONNX Runtime from 1.14 and OpenVINO from 2023.0."""
OPSETS = range(11, 22)
"""Operator sets that can be asked for: 11 is the first whose Resize computes what torch does, 21 what onnx 1.16 knows."""

RELATIVE_TOLERANCE = 1e-3
"""Largest difference between graph and network that passes, relative to the largest logit: rounding stays 10 to 100 times
below it for random weights, a size that was kept as a number is far above it."""

_TRACED_HW = (97, 129)
_PARITY_SHAPES = ((1, 64, 96), (2, 65, 33))
Runner = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.generic]]


class ExportModule(nn.Module):
    """The computation that goes into a file: image B x C x H x W to what `output` says.

    `low`: logits at the head's own size, B x h x w x classes, the layout that label code reads fastest; `logits`: B x classes
    x H x W; `argmax` and `uint8`: B x H x W class numbers in int32 and uint8.
    """

    def __init__(self, net: DeepLab, output: Output) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Run the network on a normalize_images float image."""
        low_BCHW = self.net.forward_low_resolution(image_BCHW)
        if self.output == "low":
            return low_BCHW.permute(0, 2, 3, 1)
        logits_BCHW = F.interpolate(
            low_BCHW, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=self.net.config.align_corners
        )
        if self.output == "logits":
            return logits_BCHW
        labels_BHW = logits_BCHW[:, 0] > 0 if self.net.config.num_classes == 1 else logits_BCHW.argmax(dim=1)
        return labels_BHW.to(torch.uint8 if self.output == "uint8" else torch.int32)


def onnx_bytes(
    net: DeepLab,
    output: Output = "logits",
    size: tuple[int, int] | None = None,
    *,
    opset: int = OPSET,
    dynamic_batch: bool | None = None,
) -> bytes:
    """Return the model as an ONNX file with input `image`, output `logits` or `labels`, weights and metadata.

    Args:
        net: The model.
        output: What the file computes, see `ExportModule`.
        size: (height, width) of the input in pixels; None for dynamic height and width.
        opset: ONNX operator set, 11 to 21.
        dynamic_batch: Whether the batch size is dynamic; default: exactly where height and width are.

    Raises:
        UsageError: Unknown output or opset, or `uint8` with more than 256 classes.
        DeepLabZooError: torch cannot write this model, or `onnx` is not installed.
    """
    dynamic_batch = size is None if dynamic_batch is None else dynamic_batch
    if opset not in OPSETS:
        raise UsageError(f"ONNX opset {opset} is not supported; expected {OPSETS[0]} to {OPSETS[-1]}.")
    require_module("onnx", extra="export", purpose="writing ONNX")
    if output not in OUTPUTS:
        raise UsageError(f"Unknown output {output!r}; expected one of {', '.join(OUTPUTS)}.")
    if output == "uint8" and net.num_classes > 256:
        raise UsageError(f"uint8 holds 256 class numbers and this network has {net.num_classes}; take output 'argmax'.")
    form = ExportModule(traceable(net), output).eval()
    name = "labels" if output in ("argmax", "uint8") else "logits"
    # two samples where the batch is dynamic, as a single one could be taken for a constant
    image_BCHW = torch.zeros(2 if dynamic_batch else 1, net.config.in_chans, *(size or _TRACED_HW))
    height, width = {"low": (1, 2), "logits": (2, 3)}.get(output, (1, 2))
    low = "low_" if output == "low" else ""
    dynamic_axes: dict[str, dict[int, str]] = {"image": {}, name: {}}
    if dynamic_batch:
        dynamic_axes = {"image": {0: "batch"}, name: {0: "batch"}}
    if size is None:
        dynamic_axes["image"] |= {2: "height", 3: "width"}
        dynamic_axes[name] |= {height: f"{low}height", width: f"{low}width"}
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
                opset_version=opset,
                input_names=["image"],
                output_names=[name],
                dynamic_axes=dynamic_axes,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise DeepLabZooError(
                f"torch {torch.__version__} cannot write {net.config.architecture} on {net.config.encoder} as ONNX ({reason}); "
                "use the engine 'torch'."
            ) from error
    model = file.getvalue() if size is None else fold_constants(file.getvalue())
    class_axis = {"low": 3, "logits": 1}.get(output)
    return _with_metadata(model, onnx_metadata(net, output), None if class_axis is None else (class_axis, net.num_classes))


def fold_constants(model: bytes) -> bytes:
    """Return an ONNX file without operations on constants, computed by ONNX Runtime's basic (standard-operator) optimizations.

    Where height and width are fixed, all shape arithmetic is constant. Importers of some runtimes (OpenCV before 5)
    cannot read it. Without ONNX Runtime the file is returned as it is.
    """
    try:
        ort = require_module("onnxruntime", extra="export", purpose="folding constants")
    except DeepLabZooError as error:
        logger.warning(f"the ONNX file keeps its shape arithmetic: {error}")
        return model
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        folded = onnx.load(options.optimized_model_filepath)
    used = {node.domain for node in folded.graph.node}
    sets = [one for one in folded.opset_import if one.domain in ("", *used)]  # ONNX Runtime lists all domains it knows
    del folded.opset_import[:]
    folded.opset_import.extend(sets)
    whole: bytes = folded.SerializeToString()
    return whole


def onnx_metadata(net: DeepLab, output: Output) -> dict[str, str]:
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
    net: DeepLab, run: Runner, output: Output, shapes: tuple[tuple[int, int, int], ...] = _PARITY_SHAPES
) -> float:
    """Compare a graph with its network on random images B x H x W of other shapes than it was traced with.

    Returns the largest difference relative to the largest logit. Labels are compared as labels: 99 % must be equal, since
    random images have near-ties. Raises DeepLabZooError in one sentence where they differ.
    """
    generator = torch.Generator().manual_seed(0)
    form = ExportModule(traceable(net), output).eval()
    worst = 0.0
    for batch, height, width in shapes:
        image_BCHW = torch.randn(batch, net.config.in_chans, height, width, generator=generator)
        with torch.inference_mode():
            expected = form(image_BCHW).numpy()
        worst = max(worst, output_difference(expected, run(image_BCHW.numpy())))
    allowed = RELATIVE_TOLERANCE if output in ("low", "logits") else 0.01
    if not worst <= allowed:
        raise DeepLabZooError(
            f"The ONNX graph of {net.config.architecture} on {net.config.encoder} does not compute what the network does "
            f"(difference {worst:.2g}, at most {allowed:g} allowed); use the engine 'torch'."
        )
    return worst


def output_difference(expected: npt.NDArray[np.generic], given: npt.NDArray[np.generic]) -> float:
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


def _with_metadata(model: bytes, facts: dict[str, str], classes: tuple[int, int] | None = None) -> bytes:
    """Add metadata; `classes` is (axis, number) of the class dimension, which the exporter leaves without a number."""
    import onnx

    proto = onnx.load_from_string(model)
    proto.producer_name, proto.producer_version = "deeplabzoo", deeplabzoo.__version__
    onnx.helper.set_model_props(proto, facts)
    if classes is not None:
        proto.graph.output[0].type.tensor_type.shape.dim[classes[0]].dim_value = classes[1]
    whole: bytes = proto.SerializeToString()
    return whole


# Graphs that engines run, written once per network and kept in the package's cache: a second start reads a file.


_CACHE_VERSION = 1
"""Raised when the graph of an unchanged network is written differently."""


def cached_graph(net: DeepLab, open_runner: Callable[[bytes], Runner]) -> Path:
    """Return the file of the network's low-resolution graph (`onnx_graph.ExportModule`, output `low`).

    Written where it is not there yet, after `open_runner` has run it and it agreed with the network; one line says so, with the
    time that it took. Raises what `onnx_bytes` and `require_parity` raise, OutputError where the cache cannot be written.
    """
    path = cache_folder() / "graphs" / f"{graph_key(net)}.onnx"
    if path.is_file():
        return path
    ensure_folder(path.parent)
    started = time.perf_counter()
    model = onnx_bytes(net, "low")
    apart = require_parity(net, open_runner(model), "low")
    write_atomically(path, lambda file: file.write(model))
    seconds = time.perf_counter() - started
    logger.info(f"ONNX graph written in {seconds:.1f} s, {apart:.0e} from the network (kept as {path})")
    return path


def graph_key(net: DeepLab) -> str:
    """Return a name for the graph of this network: equal for equal weights and configuration, under the same versions."""
    facts = {
        "tensors": tensors_sha256(net),
        "config": net.config.to_dict(),
        "versions": [_CACHE_VERSION, OPSET, deeplabzoo.__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
