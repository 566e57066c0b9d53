"""`python -m deeplabzoo.export` writes a file with the outputs of the model and with metadata, or no file at all."""

import copy
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.layers.conv2d_same import Conv2dSame

import deeplabzoo
from deeplabzoo.cli import export as command
from deeplabzoo.errors import DeepLabZooError
from deeplabzoo.export.exporter import export, read_export
from deeplabzoo.export.formats import SUFFIXES, DynamicConv2dSame, ExportConfig, Format, executorch_runner, runner
from deeplabzoo.hub.manifest import BundledSource, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.optimization.graph_backend import openvino_runner
from deeplabzoo.processing.preprocessing import prepare

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
PERSON = "deeplabv3plus_mobilenetv2_person"
BUNDLED = [row.full_name for row in released() if isinstance(row.source, BundledSource)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = DeepLabConfig(architecture="deeplabv3plus", encoder="mobilenetv2_050", num_classes=3, head_channels=32)
    path = tmp_path / "small.safetensors"
    DeepLab(config).eval().save(path)
    return str(path)


def facts_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def labelled_folder(root: Path, side: int = 96) -> Path:
    """Return a dataset of two images whose masks are predictions of the person model."""
    predictor = deeplabzoo.Predictor(deeplabzoo.create(PERSON, pretrained=True), device="cpu")
    for part in ("images", "masks"):
        (root / "val" / part).mkdir(parents=True)
    for name in ("astronaut.jpg", "cat.jpg"):
        image = Image.open(IMAGES / name).convert("RGB").resize((side, side))
        image.save(root / "val" / "images" / f"{name[:3]}.png")
        Image.fromarray(predictor(image).labels).save(root / "val" / "masks" / f"{name[:3]}.png")
    return root


def test_a_model_becomes_a_file_that_is_measured_and_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file passes the parity check and keeps the mIoU; both are stored in it with licence, classes and preprocessing."""
    root, out = labelled_folder(tmp_path / "data"), tmp_path / "person.onnx"
    words = [PERSON, "--format", "onnx", "--out", str(out), "--check", "folder:2", "--root", str(root)]
    assert command.main([*words, "--json", str(tmp_path / "report.json")]) == 0
    printed = capsys.readouterr().out
    assert "100.000 % of labels equal on 2 images" in printed
    assert re.search(r"mIoU 100\.00 exported, 100\.00 original, \+0\.00 points on the first 2 of folder val", printed)
    facts = facts_of(out)
    assert json.loads(facts["check"])["miou_exported"] == pytest.approx(100)
    assert json.loads(facts["classes"]) == ["background", "person"]
    assert json.loads(facts["source"])["tag"] == "v1"
    assert facts["licence"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "person.onnx", "report.json"]
    report = read_export(tmp_path / "report.json")
    assert (report.model, report.format, report.precision, report.size) == (f"{PERSON}.v1", "onnx", "fp32", None)
    assert report.check is not None
    assert (report.check.images, report.check.miou_exported) == (2, pytest.approx(100))
    assert report.bytes == out.stat().st_size
    assert report.weights_sha256 == json.loads(facts["source"])["sha256"]
    assert report.command is not None
    assert report.command.startswith(f"python -m deeplabzoo.export {PERSON} --format onnx")


@pytest.mark.parametrize("output", ["argmax", "uint8"])
def test_openvino_labels_of_one_size(checkpoint: str, tmp_path: Path, output: str) -> None:
    """An .xml and its .bin for a fixed size return labels in the requested type."""
    out = tmp_path / "small.xml"
    assert command.main([checkpoint, "--format", "openvino", "--output", output, "--size", "65", "97", "--out", str(out)]) == 0
    image = torch.randn(1, 3, 65, 97)
    labels = openvino_runner(out)(image.numpy())
    assert labels.dtype == {"argmax": np.int32, "uint8": np.uint8}[output]
    expected = deeplabzoo.load(checkpoint).predict_labels(image).numpy()
    assert (labels == expected).mean() > 0.99
    assert out.with_suffix(".bin").is_file()


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 2, 2), (3, 3, 1), (1, 2, 1)])
def test_dynamic_padding_equals_tensorflow_same_padding(kernel: int, stride: int, dilation: int) -> None:
    """The rule in integers pads as timm's does, for every remainder of height and width."""
    torch.manual_seed(0)
    conv = Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
    twin = copy.deepcopy(conv)
    twin.__class__ = DynamicConv2dSame
    for height, width in itertools.product(range(7, 13), repeat=2):
        image = torch.randn(1, 2, height, width)
        assert torch.equal(twin(image), conv(image))


def test_torch_export_of_tensorflow_same_padding_terminates() -> None:
    """With dynamic shapes the symbolic size stays short after four strided layers; with timm's rule the export never ends."""
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*(Conv2dSame(3, 3, 3, stride=2) for _ in range(4)))
    for layer in stack:
        layer.__class__ = DynamicConv2dSame
    axes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(stack.eval(), (torch.zeros(2, 3, 97, 129),), dynamic_shapes=(axes,))
    (answer,) = (node for node in program.graph.nodes if node.op == "output")
    assert len(str(answer.args[0][0].meta["val"].shape[2])) < 100
    image = torch.randn(1, 3, 64, 81)
    torch.testing.assert_close(program.module()(image), stack(image))


def test_torch_export_round_trip(checkpoint: str, tmp_path: Path) -> None:
    """A .pt2 file runs with torch only and has its metadata in an extra file."""
    out = tmp_path / "small.pt2"
    assert command.main([checkpoint, "--format", "torch-export", "--out", str(out)]) == 0
    extra = {"deeplabzoo.json": ""}
    program = torch.export.load(out, extra_files=extra)
    assert json.loads(json.loads(extra["deeplabzoo.json"])["config"])["encoder"] == "mobilenetv2_050"
    image = torch.randn(3, 3, 81, 45)
    answer = program.module()(image)
    assert not answer.requires_grad, "numpy() refuses outputs that require gradients"
    with torch.inference_mode():
        torch.testing.assert_close(answer, deeplabzoo.load(checkpoint)(image), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "uint8"])
def test_executorch_runs_in_its_own_runtime(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .pte file passes the parity check on random and real images; its JSON file holds the metadata."""
    pytest.importorskip("executorch", reason="executorch is not installed")
    root, out = labelled_folder(tmp_path / "data"), tmp_path / "person.pte"
    words = [PERSON, "--format", "executorch", "--output", output, "--size", "96", "96", "--out", str(out)]
    assert command.main([*words, "--check", "folder:2", "--root", str(root)]) == 0
    assert "100.000 % of labels equal on 2 images" in capsys.readouterr().out
    facts = json.loads(out.with_suffix(".json").read_text())
    assert json.loads(facts["classes"]) == ["background", "person"]
    assert json.loads(facts["check"])["miou_exported"] > 99
    assert facts["output"] == output


def test_missing_executorch_raises_with_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch is not an extra of the package, since it requires a certain torch."""
    for module in ("executorch", "executorch.runtime"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DeepLabZooError, match="pip install executorch"):
        executorch_runner(tmp_path / "model.pte")


def test_int8_file_labels_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An int8 file is calibrated on a folder, verified on its images, and marked as int8."""
    photos = labelled_folder(tmp_path / "data", 160) / "val" / "images"
    out = tmp_path / "person8.onnx"
    words = ["--calibrate", str(photos), "--out", str(out), "--json", str(tmp_path / "report.json")]
    assert command.main([PERSON, "--format", "onnx", "--int8", *words]) == 0
    assert "int8" in capsys.readouterr().out
    report = read_export(tmp_path / "report.json")
    assert report.calibration is not None
    assert (report.precision, report.calibration.images, report.check) == ("int8", 2, None)
    assert facts_of(out)["precision"] == "int8"
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(out).graph.node}


def test_a_file_that_fails_the_parity_check_is_not_kept(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong outputs are detected, and an older file of that name remains unchanged."""
    out = tmp_path / "small.onnx"
    out.write_bytes(b"older")
    real = command_runner()
    monkeypatch.setattr("deeplabzoo.export.exporter.runner", lambda kind, path: lambda image: real(kind, path)(image) + 1)
    assert command.main([checkpoint, "--format", "onnx", "--out", str(out)]) == 1
    assert "outputs of the exported file differ from those of the model on random images" in capsys.readouterr().err
    assert out.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx", "small.safetensors"]


def command_runner():  # type: ignore[no-untyped-def]
    return runner


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--format", "coreml", "--out", "x.mlpackage"], "'coreml' is not supported: coremltools"),
        (["--format", "litert", "--out", "x.tflite"], "'litert' is not supported: litert-torch"),
        (["--format", "executorch", "--out", "x.pte"], "requires a fixed image size; set it with --size H W"),
        (["--format", "onx", "--out", "x.onnx"], "Unknown format 'onx'.*Did you mean 'onnx'"),
        (["--format", "onnx", "--out", "x.xml"], r"must end in \.onnx"),
        (["--format", "onnx", "--out", "no/such/x.onnx"], "does not exist"),
        (["--format", "onnx", "--out", "x.onnx", "--int8"], "--int8 and --calibrate DIR go together"),
        (["--format", "torch-export", "--out", "x.pt2", "--int8", "--calibrate", "."], "--int8 is for the formats"),
        (["--format", "onnx", "--out", "x.onnx", "--check", "voc"], "--check needs --root"),
        (["--format", "onnx", "--out", "x.onnx", "--check", "voc", "--root", "."], "must be a dataset and a number"),
        (["--format", "onnx", "--out", "x.onnx", "--size", "8", "8"], "at least 33 x 33"),
    ],
)
def test_invalid_arguments_are_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command fails before a model is loaded, with a non-zero exit code."""
    monkeypatch.chdir(tmp_path)
    assert command.main([PERSON, *words]) in (1, 2)
    assert re.search(f"^error: .*{sentence}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_script_in_the_documentation_runs_with_onnxruntime_and_numpy_only(tmp_path: Path) -> None:
    """The script of docs/export.md labels an image as the package does, in a process that imports no torch."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    script = re.search(r"```python\n(# labels\.py\n.*?)```", page, re.DOTALL)
    assert script
    assert command.main([PERSON, "--format", "onnx", "--out", str(tmp_path / "model.onnx")]) == 0
    image = Image.open(IMAGES / "astronaut.jpg").convert("RGB").resize((192, 160))
    image.save(tmp_path / "image.png")
    program = script[1] + "\nimport sys\nassert not {'torch', 'deeplabzoo', 'timm'} & set(sys.modules)\n"
    (tmp_path / "labels.py").write_text(program)
    subprocess.run([sys.executable, "labels.py", "model.onnx", "image.png", "labels.png"], cwd=tmp_path, check=True)
    net = deeplabzoo.create(PERSON, pretrained=True)
    expected = deeplabzoo.Predictor(net, device="cpu")(image).labels
    assert prepare(np.asarray(image), net.preprocessing).valid_hw == (160, 192)
    assert (np.asarray(Image.open(tmp_path / "labels.png")) == expected).mean() > 0.999


@pytest.mark.parametrize(
    ("kind", "dtype", "wrapped"),
    [("onnx", torch.float16, False), ("onnx", torch.float64, True), ("onnx", torch.bfloat16, True)],
)
def test_a_model_in_another_dtype_is_exported_in_float32(
    kind: Format, dtype: torch.dtype, wrapped: bool, checkpoint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`net.half()` and the like, also in DataParallel: float32 logits of the same weights, and an unchanged model."""
    net = deeplabzoo.load(checkpoint).to(dtype)
    out = tmp_path / f"small{SUFFIXES[kind]}"
    export(torch.nn.DataParallel(net) if wrapped else net, ExportConfig(kind, out, size=(65, 97)))  # type: ignore[arg-type]
    assert "converted to float32" in caplog.text
    assert {one.dtype for one in net.parameters()} == {dtype}
    image_BCHW = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        expected = copy.deepcopy(net).float()(image_BCHW).numpy()
    np.testing.assert_allclose(runner(kind, out)(image_BCHW.numpy()), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino", "torch-export"])
@pytest.mark.parametrize("model", BUNDLED)
def test_every_bundled_model_exports(model: str, kind: Format, tmp_path: Path) -> None:
    """Every bundled model passes the parity check of the command in every format."""
    out = tmp_path / f"model{SUFFIXES[kind]}"
    assert command.main([model, "--format", kind, "--output", "uint8", "--out", str(out)]) == 0
