"""ONNX graphs: write a DeepLab with dynamic shapes, verify its outputs against the model, cache it for the backends.

The graph is written by torch's tracing exporter (`dynamo=False`), which needs one to two seconds. Its successor (`dynamo=True`)
gives the same outputs for every encoder tried and needs ten to sixty seconds, at the first run of a backend on each model.
Tracing stores sizes that Python code computes as constants: the layers concerned are rewritten below, and `require_parity`
compares outputs at other sizes than the traced one.
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

# Layers whose forward computes sizes in Python, rewritten so that their shapes stay dynamic when traced.
#
# Tracing follows tensor operations. Where a layer branches on a Python number (whether a map divides into patches, how large a
# pooling window may be), the trace would store the number of the traced image, and the graph would be wrong for other sizes.


class TraceableMobileVitBlock(MobileVitBlock):
    """timm's MobileViT block with an unconditional resize to whole patches (an identity where the size already fits).

    The forward restates that of timm 1.0's MobileVitBlock, which skips the resize by a Python comparison of sizes.
    """

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
    """timm's MobileViTv2 block with an unconditional resize to whole patches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x C x H x W to B x C x H' x W', sizes rounded up to whole patches."""
        rows, columns = (_patches(side, patch) for side, patch in zip(x.shape[-2:], self.patch_size, strict=True))
        x = self.conv_1x1(self.conv_kxk(_resized(x, rows, columns, self.patch_size, align_corners=True)))
        x = self.norm(self.transformer(_to_patches(x, rows, columns, self.patch_size)))
        folded: torch.Tensor = self.conv_proj(_from_patches(x, rows, columns, self.patch_size))
        return folded


class TraceableASPP(ASPP):
    """ASPP whose pooling window is limited to the map's size, by cumulative sums: AvgPool takes constant sizes only."""

    def _pool_windows(self, x: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
        size = x.shape[-2:]
        pooled = self.pool(_window_mean(_window_mean(x, 2, cells[0]), 3, cells[1]))
        return F.interpolate(pooled, size=size, mode="bilinear", align_corners=self.align_corners)


def copy_model(net: DeepLab) -> DeepLab:
    """Return a deep copy, also of a model whose layers compute their weights.

    torch refuses to copy a tensor that was computed with gradients, as the weight of a pruned layer is; such a tensor is
    computed again at the next forward pass, so its values are enough.
    """
    tensors = [value for module in net.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(net, {id(tensor): tensor.detach().clone() for tensor in tensors if not tensor.is_leaf})


def traceable(net: DeepLab) -> DeepLab:
    """Return a float32 copy of the model on the CPU, in eval mode, whose trace is valid for every batch and image size."""
    twin = copy_model(net).cpu().float().eval()
    twin.aux_head = None
    for module in twin.modules():
        traced = _TRACEABLE.get(type(module))
        if traced is not None and not (isinstance(module, ASPP) and module.pooling_cells is None):
            module.__class__ = traced  # same state, other forward: timm's constructors cannot rebuild a layer from an instance
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
    """B x C x H x W -> B x C x pixels per patch x patches."""
    height, width = patch_size
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels, rows, height, columns, width).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels, height * width, rows * columns)


def _from_patches(x: torch.Tensor, rows: int, columns: int, patch_size: tuple[int, int]) -> torch.Tensor:
    """B x C x pixels per patch x patches -> B x C x H x W."""
    height, width = patch_size
    batch, channels = x.shape[:2]
    x = x.reshape(batch, channels, height, width, rows, columns).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels, rows * height, columns * width)


def _window_mean(x: torch.Tensor, dim: int, cells: int) -> torch.Tensor:
    """Mean over a sliding window of `cells` along `dim`, or over the whole dimension where that is shorter."""
    # private; torch.onnx.operators.shape_as_tensor is a wrapper of it. torch.minimum needs a tensor, and torch.tensor of
    # x.shape[dim] would be stored as a constant.
    length = torch._shape_as_tensor(x)[dim]
    window = torch.minimum(length, torch.tensor(cells))
    first = torch.zeros_like(x.narrow(dim, 0, 1))
    sums = torch.cat((first, x.cumsum(dim)), dim)
    places = torch.arange(cast(int, length - window + 1))  # a tensor argument, so that the graph computes it
    return (sums.index_select(dim, places + window) - sums.index_select(dim, places)) / window


Output = Literal["low", "logits", "argmax", "uint8"]
OUTPUTS: tuple[Output, ...] = ("low", "logits", "argmax", "uint8")
OPSET = 18
"""Default ONNX operator set: read by ONNX Runtime from 1.14 and OpenVINO from 2023.0."""
OPSETS = range(11, 22)
"""Supported operator sets: 11 is the first with a Resize that equals torch's interpolation, 21 the newest of onnx 1.16."""

RELATIVE_TOLERANCE = 1e-3
"""Largest accepted difference between graph and model, relative to the largest logit. For random weights, rounding stays 10 to
100 times below it; a size stored as a constant is far above it."""

_TRACED_HW = (97, 129)
_PARITY_SHAPES = ((1, 64, 96), (2, 65, 33))
Runner = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.generic]]
"""Runs an exported file: normalized images B x C x H x W -> its output."""


class ExportModule(nn.Module):
    """A model with the output of an exported file.

    Args:
        net: The model.
        output: `low`: low-resolution logits B x h x w x classes, the layout that the postprocessing reads fastest; `logits`:
            B x classes x H x W; `argmax` and `uint8`: class indices B x H x W in int32 and uint8.
    """

    def __init__(self, net: DeepLab, output: Output) -> None:
        super().__init__()
        self.net, self.output = net, output

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Map normalized images B x C x H x W to the output."""
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
        raise UsageError(f"uint8 holds 256 class indices and this model has {net.num_classes}; use output 'argmax'.")
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
        # torch warns that this exporter is the older one, and of each shape read while tracing; see the module's docstring
        warnings.simplefilter("ignore")
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
                "use engine='torch'."
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
    """Return the metadata of an exported file: plain text or JSON by key.

    Keys: `classes`, `palette`, `preprocessing`, `config`, `source` and `licence` of the weights (where the manifest states
    one), `output`, and the version that wrote the file. They are named as in the safetensors checkpoints.
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
    """Compare the outputs of a graph and its model on random images.

    Args:
        net: The model.
        run: Runs the graph.
        output: The output of the graph, see `ExportModule`.
        shapes: (batch, height, width) of the images; by default other shapes than the traced one.

    Returns:
        The largest difference relative to the largest logit; for labels the share that differs (1 % is accepted, since random
        images have near-ties).

    Raises:
        DeepLabZooError: The outputs differ by more than rounding.
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
            f"The ONNX graph of {net.config.architecture} on {net.config.encoder} does not compute what the model does "
            f"(difference {worst:.2g}, at most {allowed:g} accepted); use engine='torch'."
        )
    return worst


def output_difference(expected: npt.NDArray[np.generic], given: npt.NDArray[np.generic]) -> float:
    """Return the largest difference of two outputs: relative to the largest logit; for labels the share that differs."""
    if expected.shape != given.shape:
        return float("inf")
    if expected.dtype.kind != "f":
        return float((expected != given).mean())
    ours, theirs = expected.astype(np.float64), given.astype(np.float64)
    return float(np.abs(ours - theirs).max() / max(float(np.abs(ours).max()), 1e-12))


def _licence(net: DeepLab) -> str:
    """Return the licence that the manifest states for these weights (by SHA-256); empty for all others."""
    sha256 = net.weights_source.get("sha256")
    return next((row.license.weights for row in released() if sha256 is not None and row.sha256 == sha256), "")


def _with_metadata(model: bytes, facts: dict[str, str], classes: tuple[int, int] | None = None) -> bytes:
    """Add metadata; `classes` is (axis, size) of the class dimension of the output, which torch's exporter leaves dynamic."""
    import onnx

    proto = onnx.load_from_string(model)
    proto.producer_name, proto.producer_version = "deeplabzoo", deeplabzoo.__version__
    onnx.helper.set_model_props(proto, facts)
    if classes is not None:
        proto.graph.output[0].type.tensor_type.shape.dim[classes[0]].dim_value = classes[1]
    whole: bytes = proto.SerializeToString()
    return whole


# Graphs of the backends, written once per model and cached.


_CACHE_VERSION = 1
"""Part of the cache key; to be increased when the graph of an unchanged model is written differently."""


def cached_graph(net: DeepLab, open_runner: Callable[[bytes], Runner]) -> Path:
    """Return the cached ONNX file of a model (`ExportModule` with output `low`); write and log it if it is not in the cache.

    Args:
        net: The model.
        open_runner: Opens a file's content in the backend, for the parity check before the file is cached.

    Raises:
        DeepLabZooError: The graph cannot be written, or fails the parity check.
        OutputError: The cache folder cannot be written.
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
    logger.info(f"ONNX graph written in {seconds:.1f} s, largest difference {apart:.0e} from the model (cached as {path})")
    return path


def graph_key(net: DeepLab) -> str:
    """Return a hexadecimal name for the graph of a model: equal for equal weights, configuration and versions."""
    facts = {
        "tensors": tensors_sha256(net),
        "config": net.config.to_dict(),
        "versions": [_CACHE_VERSION, OPSET, deeplabzoo.__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
