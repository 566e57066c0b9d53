"""Export formats (ONNX, torch.export, OpenVINO, ExecuTorch): options, writers, metadata, and runners of the written files."""

import copy
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame

from deeplabzoo.errors import DeepLabZooError, OutputError, UsageError
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.graph_backend import onnxruntime_runner, openvino_runner
from deeplabzoo.optimization.onnx_export import OPSET, OPSETS, ExportModule, Output, Runner, onnx_bytes, onnx_metadata
from deeplabzoo.optimization.quantization import Calibration, quantized_bytes
from deeplabzoo.optional_imports import require_module

Format = Literal["onnx", "torch-export", "openvino", "executorch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "executorch": ".pte"}
UNSUPPORTED_FORMATS = {
    "coreml": "coremltools converts on Linux, but CoreML files run only on macOS, so the outputs cannot be verified",
    "litert": "litert-torch requires torch below 2.15, and its file from torch 2.15 did not run (docs/export.md)",
}
"""Unsupported format -> reason."""


@dataclass(frozen=True)
class ExportConfig:
    """Options of one exported file."""

    format: Format
    out: Path
    """Path of the file; its suffix is that of the format, and its folder exists."""
    output: Output = "logits"
    """What the file returns, see `onnx_export.ExportModule`."""
    size: tuple[int, int] | None = None
    """Fixed (height, width) of the images in pixels; None for dynamic batch size, height and width."""
    opset: int = OPSET
    """ONNX operator set, for the format onnx."""
    dynamic_batch: bool = False
    """Whether the batch size stays dynamic with a fixed `size` (onnx, openvino)."""
    calibrate: str | None = None
    """Folder, glob pattern or .txt list of calibration images for an int8 file; None for float32."""

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: Options that do not fit together.
            OutputError: The folder of `out` does not exist.
        """
        suffix = SUFFIXES[self.format]
        if self.out.suffix != suffix:
            raise UsageError(f"--out '{self.out}' must end in {suffix}, as files of the format {self.format} do.")
        if not self.out.parent.is_dir():
            raise OutputError(f"The folder '{self.out.parent}' of --out does not exist; create it or use another one.")
        if self.calibrate is not None and self.format not in ("onnx", "openvino"):
            raise UsageError(f"--int8 is for the formats onnx and openvino, not {self.format}; omit it.")
        if self.opset not in OPSETS:
            raise UsageError(f"--opset must be between {OPSETS[0]} and {OPSETS[-1]}, not {self.opset}.")
        if self.opset != OPSET and self.format != "onnx":
            raise UsageError(f"--opset is for the format onnx, not {self.format}; omit it.")
        if self.dynamic_batch and (self.size is None or self.format not in ("onnx", "openvino")):
            raise UsageError("--dynamic-batch requires --size H W and the format onnx or openvino; omit it for all others.")
        if self.size is None and self.format == "executorch":
            raise UsageError("The format executorch requires a fixed image size; set it with --size H W.")
        if self.size is not None and min(self.size) < 33:
            raise UsageError(f"--size must be at least 33 x 33 pixels, not {self.size[0]} x {self.size[1]}.")


# ExecuTorch: a fixed image size, run by XNNPACK where it supports an operation. It is not an extra of deeplabzoo, because each
# of its releases requires a certain release of torch.


def write_executorch(program: Any, path: Path, facts: Mapping[str, str]) -> None:
    """Lower an exported program for XNNPACK and write it to `path` (.pte) with its metadata beside it (.json).

    Raises:
        DeepLabZooError: ExecuTorch is not installed.
    """
    lowering, xnnpack = _library("executorch.exir"), _library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    lowered = lowering.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    add_sidecar_metadata(path, facts)


def add_sidecar_metadata(path: Path, facts: Mapping[str, str]) -> None:
    """Add metadata to the JSON file beside a .pte file, which cannot hold any."""
    beside = path.with_suffix(".json")
    known = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    beside.write_text(json.dumps({**known, **facts}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def executorch_runner(path: Path) -> Runner:
    """Open a .pte file in ExecuTorch's Python runtime; raises DeepLabZooError if ExecuTorch is not installed."""
    method = _library("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    return lambda image: method.execute([torch.from_numpy(image)])[0].numpy()


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise DeepLabZooError(
            "The format executorch needs executorch; install it with `pip install executorch` (it may replace torch)."
        ) from None


# TensorFlow's 'SAME' padding for torch.export with dynamic shapes.
#
# The padding depends on the size of the input, which torch.export represents as a symbolic expression. timm's rule (a float
# division and a maximum) makes the expression longer in every layer, and after four of them the export does not terminate.


class DynamicConv2dSame(Conv2dSame):
    """timm's convolution with 'SAME' padding by a rule in integers: padded side = stride * (outputs - 1) + kernel extent."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x ceil(H / stride) x ceil(W / stride)."""
        paddings: list[int] = []
        sides = zip(x.shape[-2:], self.stride, self.dilation, self.kernel_size, strict=True)
        for side, stride, dilation, kernel in reversed(list(sides)):  # F.pad takes the last axis first
            extent = dilation * (kernel - 1) + 1
            if extent < stride:  # the padding could be negative here; timm's maximum with 0 is needed
                out: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
                return out
            outputs = (side + stride - 1) // stride
            total = stride * (outputs - 1) + extent - side
            paddings += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, paddings), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def with_dynamic_shapes(net: DeepLab) -> DeepLab:
    """Return a float32 copy of the model on the CPU, in eval mode, that torch.export can export with dynamic shapes."""
    twin = copy.deepcopy(net).cpu().float().eval()
    for module in twin.modules():
        if type(module) is Conv2dSame:
            module.__class__ = DynamicConv2dSame  # same state, other forward; constructing a new layer would copy the weights
    return twin


Metadata = dict[str, str]


def write(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    """Write a model to `path` in the format of `config`.

    Args:
        net: The model, on the CPU in eval mode.
        config: Format and options.
        path: File to write.
        facts: Metadata, added to those of `onnx_export.onnx_metadata`.

    Raises:
        UsageError: Options that do not fit the model, or no calibration images.
        DeepLabZooError: The format does not support the model, or a library is missing.
    """
    writers: dict[Format, Callable[[DeepLab, ExportConfig, Path, Metadata], None]] = {
        "onnx": _write_onnx,
        "torch-export": _write_torch_export,
        "openvino": _write_openvino,
        "executorch": _write_executorch,
    }
    writers[config.format](net, config, path, facts)


def runner(format: Format, path: Path) -> Runner:
    """Open an exported file in its runtime; returns a function from images B x C x H x W to the output."""
    if format == "torch-export":
        program = torch.export.load(path).module()
        return lambda image: program(torch.from_numpy(image)).numpy()
    if format == "executorch":
        return executorch_runner(path)
    return onnxruntime_runner(path) if format == "onnx" else openvino_runner(path)


def add_metadata(format: Format, path: Path, facts: Metadata) -> None:
    """Add metadata to an exported file; a torch.export file is written again, since it stores them only then."""
    if format == "onnx":
        import onnx

        proto = onnx.load(path)
        known = {entry.key: entry.value for entry in proto.metadata_props}
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, {**known, **facts})
        path.write_bytes(proto.SerializeToString())
    elif format == "openvino":
        ov = require_module("openvino", extra="openvino", purpose="Writing OpenVINO")
        model = ov.Core().read_model(str(path)).clone()
        _save_openvino(model, path, facts)
    elif format == "executorch":
        add_sidecar_metadata(path, facts)
    else:
        extra = {"deeplabzoo.json": ""}
        program = torch.export.load(path, extra_files=extra)
        _save_torch_export(program, path, {**json.loads(extra["deeplabzoo.json"]), **facts})


def _dynamic_batch(config: ExportConfig) -> bool:
    return config.size is None or config.dynamic_batch


def _write_onnx(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    model = onnx_bytes(net, config.output, config.size, opset=config.opset, dynamic_batch=_dynamic_batch(config))
    if config.calibrate is not None:
        model = quantized_bytes(model, Calibration(net, config.calibrate), facts)
    path.write_bytes(model)
    add_metadata("onnx", path, facts)


def _write_openvino(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    ov = require_module("openvino", extra="openvino", purpose="Writing OpenVINO")
    graph = onnx_bytes(net, config.output, config.size, dynamic_batch=_dynamic_batch(config))
    if config.calibrate is None:
        model = ov.Core().read_model(graph)
    else:
        from deeplabzoo.optimization.quantization import quantize_for_openvino

        model = quantize_for_openvino(graph, Calibration(net, config.calibrate))
    _save_openvino(model, path, {**onnx_metadata(net, config.output), **facts})


def _write_torch_export(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    _save_torch_export(_export_program(net, config), path, {**onnx_metadata(net, config.output), **facts})


def _write_executorch(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    with _quiet():
        write_executorch(_export_program(net, config), path, {**onnx_metadata(net, config.output), **facts})


def _export_program(net: DeepLab, config: ExportConfig) -> torch.export.ExportedProgram:
    # without gradients, since `numpy()` refuses outputs that require them
    form = ExportModule(with_dynamic_shapes(net), config.output).eval().requires_grad_(False)
    # batch size 2 and different odd sides: torch.export specializes sizes of 1 and sizes that are equal
    image_BCHW = torch.zeros(1 if config.size else 2, net.config.in_chans, *(config.size or (97, 129)))
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(form, (image_BCHW,), dynamic_shapes=None if config.size else (axes,))
    except Exception as error:  # torch.export raises a dozen types of errors, with messages of a page
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DeepLabZooError(
            f"torch.export cannot write {net.config.architecture} on {net.config.encoder} ({reason}); use --format onnx."
        ) from error


def _save_torch_export(program: Any, path: Path, facts: Metadata) -> None:
    with _quiet():
        torch.export.save(program, path, extra_files={"deeplabzoo.json": json.dumps(facts)})


def _save_openvino(model: Any, path: Path, facts: Metadata) -> None:
    ov = require_module("openvino", extra="openvino", purpose="Writing OpenVINO")
    for key, value in facts.items():
        model.set_rt_info(value, ["deeplabzoo", key])
    beside = path.with_name(f"new-{path.name}")  # OpenVINO maps the weights of `model` from the old file while it writes
    ov.save_model(model, beside, compress_to_fp16=False)
    for suffix in (".bin", ".xml"):
        beside.with_suffix(suffix).replace(path.with_suffix(suffix))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log messages of the exporters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
