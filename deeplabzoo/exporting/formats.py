"""Writers of the formats, and readers that run what was written as a stranger would."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.exporting.executorch import add_facts_beside, executorch_runner, write_executorch
from deeplabzoo.exporting.open_sizes import with_open_sizes
from deeplabzoo.exporting.wish import Format, Wish
from deeplabzoo.inference.calibration import Calibration
from deeplabzoo.inference.engines.onnx_runtime import session_runner
from deeplabzoo.inference.engines.openvino import compiled_runner
from deeplabzoo.inference.onnx_graph import GraphForm, Runner, description, onnx_bytes
from deeplabzoo.inference.optional import require
from deeplabzoo.inference.quantise import quantised_bytes
from deeplabzoo.models.deeplab import DeepLab

Facts = dict[str, str]


def write(net: DeepLab, wish: Wish, path: Path, facts: Facts) -> None:
    """Write the network in the format wished for; `facts` are put beside its own description.

    Raises UsageError and DeepLabZooError in one sentence where network and format do not go together.
    """
    writers: dict[Format, Callable[[DeepLab, Wish, Path, Facts], None]] = {
        "onnx": _write_onnx,
        "torch-export": _write_torch_export,
        "openvino": _write_openvino,
        "executorch": _write_executorch,
    }
    writers[wish.format](net, wish, path, facts)


def runner(format: Format, path: Path) -> Runner:
    """Open a written file in the runtime that it is for."""
    if format == "torch-export":
        program = torch.export.load(path).module()
        return lambda image: program(torch.from_numpy(image)).numpy()
    if format == "executorch":
        return executorch_runner(path)
    return session_runner(path) if format == "onnx" else compiled_runner(path)


def add_facts(format: Format, path: Path, facts: Facts) -> None:
    """Put more facts into a written file's metadata; torch's format takes them when it is written alone."""
    if format == "onnx":
        import onnx

        proto = onnx.load(path)
        known = {entry.key: entry.value for entry in proto.metadata_props}
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, {**known, **facts})
        path.write_bytes(proto.SerializeToString())
    elif format == "openvino":
        ov = require("openvino", extra="openvino", purpose="Writing OpenVINO")
        model = ov.Core().read_model(str(path)).clone()
        _save_openvino(model, path, facts)
    elif format == "executorch":
        add_facts_beside(path, facts)
    else:
        extra = {"deeplabzoo.json": ""}
        program = torch.export.load(path, extra_files=extra)
        _save_torch_export(program, path, {**json.loads(extra["deeplabzoo.json"]), **facts})


def _write_onnx(net: DeepLab, wish: Wish, path: Path, facts: Facts) -> None:
    model = onnx_bytes(net, wish.output, wish.size)
    if wish.calibrate is not None:
        model = quantised_bytes(model, Calibration(net, wish.calibrate), facts)
    path.write_bytes(model)
    add_facts("onnx", path, facts)


def _write_openvino(net: DeepLab, wish: Wish, path: Path, facts: Facts) -> None:
    ov = require("openvino", extra="openvino", purpose="Writing OpenVINO")
    graph = onnx_bytes(net, wish.output, wish.size)
    if wish.calibrate is None:
        model = ov.Core().read_model(graph)
    else:
        from deeplabzoo.inference.quantise_openvino import quantised

        model = quantised(graph, Calibration(net, wish.calibrate))
    _save_openvino(model, path, {**description(net, wish.output), **facts})


def _write_torch_export(net: DeepLab, wish: Wish, path: Path, facts: Facts) -> None:
    _save_torch_export(_exported(net, wish), path, {**description(net, wish.output), **facts})


def _write_executorch(net: DeepLab, wish: Wish, path: Path, facts: Facts) -> None:
    with _quiet():
        write_executorch(_exported(net, wish), path, {**description(net, wish.output), **facts})


def _exported(net: DeepLab, wish: Wish) -> torch.export.ExportedProgram:
    # a copy, without gradients: else the answers of the file that is run could not become arrays
    form = GraphForm(with_open_sizes(net), wish.output).eval().requires_grad_(False)
    # sides that no layer takes for a constant or for one another
    image_BCHW = torch.zeros(1 if wish.size else 2, net.config.in_chans, *(wish.size or (97, 129)))
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(form, (image_BCHW,), dynamic_shapes=None if wish.size else (axes,))
    except Exception as error:  # torch raises a dozen kinds here, and each is a page long
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise DeepLabZooError(
            f"torch.export cannot write {net.config.architecture} on {net.config.encoder} ({reason}); use --format onnx."
        ) from error


def _save_torch_export(program: Any, path: Path, facts: Facts) -> None:
    with _quiet():
        torch.export.save(program, path, extra_files={"deeplabzoo.json": json.dumps(facts)})


def _save_openvino(model: Any, path: Path, facts: Facts) -> None:
    ov = require("openvino", extra="openvino", purpose="Writing OpenVINO")
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
