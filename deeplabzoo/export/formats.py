"""Writers of the formats, and readers that run what was written as a stranger would."""

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
from deeplabzoo.optimization.quantization import Calibration, quantised_bytes
from deeplabzoo.optional_imports import require_module

# What an exported file shall be, as plain data; and what cannot be, in a sentence.


Format = Literal["onnx", "torch-export", "openvino", "executorch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "executorch": ".pte"}
UNSUPPORTED_FORMATS = {
    "coreml": "coremltools converts it on Linux, but a CoreML file runs on macOS alone, so it could not be proven",
    "litert": "litert-torch asks for torch below 2.15, and what it wrote with torch 2.15 did not run (docs/export.md)",
}
"""Formats that people ask for -> why there is no such file."""


@dataclass(frozen=True)
class ExportConfig:
    """One file: format, what it answers, whether its sizes are open, and whether it counts in 8 bits."""

    format: Format
    out: Path
    output: Output = "logits"
    size: tuple[int, int] | None = None
    """(height, width) of the only image it takes; None leaves batch, height and width open."""
    opset: int = OPSET
    """ONNX operator set of an onnx file."""
    dynamic_batch: bool = False
    """With `size`: whether the batch size stays dynamic (onnx, openvino)."""
    calibrate: str | None = None
    """Folder of photos for an int8 file; None is float32."""

    def check(self) -> None:
        """Raise UsageError or OutputError for what cannot be made, before any work is done."""
        suffix = SUFFIXES[self.format]
        if self.out.suffix != suffix:
            raise UsageError(f"--out '{self.out}' must end in {suffix}, as files of the format {self.format} do.")
        if not self.out.parent.is_dir():
            raise OutputError(f"The folder '{self.out.parent}' of --out does not exist; make it, or name another place.")
        if self.calibrate is not None and self.format not in ("onnx", "openvino"):
            raise UsageError(f"--int8 is for the formats onnx and openvino; leave it out with {self.format}.")
        if self.opset not in OPSETS:
            raise UsageError(f"--opset must be between {OPSETS[0]} and {OPSETS[-1]}, not {self.opset}.")
        if self.opset != OPSET and self.format != "onnx":
            raise UsageError(f"--opset is for the format onnx; leave it out with {self.format}.")
        if self.dynamic_batch and (self.size is None or self.format not in ("onnx", "openvino")):
            raise UsageError("--dynamic-batch goes with --size H W and the formats onnx and openvino.")
        if self.size is None and self.format == "executorch":
            raise UsageError("A file of the format executorch takes images of one size; name it with --size H W.")
        if self.size is not None and min(self.size) < 33:
            raise UsageError(f"--size must be at least 33 x 33 pixels, not {self.size[0]} x {self.size[1]}.")


# ExecuTorch files, for phones and boards: one fixed size, computed by XNNPACK where it can; the description lies beside them.
#
# ExecuTorch is not one of deeplabzoo's extras: each of its releases asks for certain releases of torch.


def write_executorch(program: Any, path: Path, facts: Mapping[str, str]) -> None:
    """Lower an exported program for XNNPACK into `path`, with its description beside it; raises DeepLabZooError."""
    lowering, xnnpack = _library("executorch.exir"), _library("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    lowered = lowering.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)
    add_sidecar_metadata(path, facts)


def add_sidecar_metadata(path: Path, facts: Mapping[str, str]) -> None:
    """Put facts into the JSON file beside a .pte, which itself has no room for words."""
    beside = path.with_suffix(".json")
    known = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    beside.write_text(json.dumps({**known, **facts}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def executorch_runner(path: Path) -> Runner:
    """Open a .pte in ExecuTorch's own runtime for Python."""
    method = _library("executorch.runtime").Runtime.get().load_program(path).load_method("forward")
    return lambda image: method.execute([torch.from_numpy(image)])[0].numpy()


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise DeepLabZooError(
            "Writing ExecuTorch needs executorch; install it with `pip install executorch` (it may ask for another torch)."
        ) from None


# TensorFlow's padding for torch.export, written so that open sizes stay short terms.
#
# How much such a layer pads depends on the size of its input. torch.export carries sizes as symbolic terms; from timm's rule,
# which divides as floats and takes maxima, each layer makes a longer one, and after four of them the export does not end.


class DynamicConv2dSame(Conv2dSame):
    """timm's convolution with 'SAME' padding; the padded side is `stride * (cells - 1) + reach + 1`: `cells` come out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x ceil(H / stride) x ceil(W / stride)."""
        paddings: list[int] = []
        sides = zip(x.shape[-2:], self.stride, self.dilation, self.kernel_size, strict=True)
        for side, stride, rate, kernel in reversed(list(sides)):  # F.pad takes the last axis first
            reach = rate * (kernel - 1)
            if reach < stride - 1:  # cells that no window reads: only timm's rule with its maximum is right
                out: torch.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
                return out
            cells = (side + stride - 1) // stride
            total = stride * (cells - 1) + reach + 1 - side
            paddings += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, paddings), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def with_dynamic_shapes(net: DeepLab) -> DeepLab:
    """Return a float32 copy in eval mode on the CPU that torch.export follows for every size; same numbers."""
    twin = copy.deepcopy(net).cpu().float().eval()
    for module in twin.modules():
        if type(module) is Conv2dSame:
            module.__class__ = DynamicConv2dSame  # the same layer and state; only its forward differs
    return twin


Metadata = dict[str, str]


def write(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    """Write the network in the format wished for; `facts` are put beside its own description.

    Raises UsageError and DeepLabZooError in one sentence where network and format do not go together.
    """
    writers: dict[Format, Callable[[DeepLab, ExportConfig, Path, Metadata], None]] = {
        "onnx": _write_onnx,
        "torch-export": _write_torch_export,
        "openvino": _write_openvino,
        "executorch": _write_executorch,
    }
    writers[config.format](net, config, path, facts)


def runner(format: Format, path: Path) -> Runner:
    """Open a written file in the runtime that it is for."""
    if format == "torch-export":
        program = torch.export.load(path).module()
        return lambda image: program(torch.from_numpy(image)).numpy()
    if format == "executorch":
        return executorch_runner(path)
    return onnxruntime_runner(path) if format == "onnx" else openvino_runner(path)


def add_metadata(format: Format, path: Path, facts: Metadata) -> None:
    """Put more facts into a written file's metadata; torch's format takes them when it is written alone."""
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
        model = quantised_bytes(model, Calibration(net, config.calibrate), facts)
    path.write_bytes(model)
    add_metadata("onnx", path, facts)


def _write_openvino(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    ov = require_module("openvino", extra="openvino", purpose="Writing OpenVINO")
    graph = onnx_bytes(net, config.output, config.size, dynamic_batch=_dynamic_batch(config))
    if config.calibrate is None:
        model = ov.Core().read_model(graph)
    else:
        from deeplabzoo.optimization.quantization import quantised

        model = quantised(graph, Calibration(net, config.calibrate))
    _save_openvino(model, path, {**onnx_metadata(net, config.output), **facts})


def _write_torch_export(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    _save_torch_export(_export_program(net, config), path, {**onnx_metadata(net, config.output), **facts})


def _write_executorch(net: DeepLab, config: ExportConfig, path: Path, facts: Metadata) -> None:
    with _quiet():
        write_executorch(_export_program(net, config), path, {**onnx_metadata(net, config.output), **facts})


def _export_program(net: DeepLab, config: ExportConfig) -> torch.export.ExportedProgram:
    # a copy, without gradients: else the answers of the file that is run could not become arrays
    form = ExportModule(with_dynamic_shapes(net), config.output).eval().requires_grad_(False)
    # sides that no layer takes for a constant or for one another
    image_BCHW = torch.zeros(1 if config.size else 2, net.config.in_chans, *(config.size or (97, 129)))
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(form, (image_BCHW,), dynamic_shapes=None if config.size else (axes,))
    except Exception as error:  # torch raises a dozen kinds here, and each is a page long
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
    beside = path.with_name(f"new-{path.name}")  # the weights of `model` may still be read from the old file
    ov.save_model(model, beside, compress_to_fp16=False)
    for suffix in (".bin", ".xml"):
        beside.with_suffix(suffix).replace(path.with_suffix(suffix))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what exporters say to their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
