"""`python -m tools.docs.compatibility`: docs/compatibility.md from the table of files and models that the tests try.

`GROUPS` is the table: each row builds a file or a model, and states for each column what happens. The page shows it, and
`tests/repository/test_compatibility.py` runs every cell of it.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from deeplabzoo.files import write_atomically
from tools.docs import compatibility_cases as make
from tools.docs.compatibility_cases import Case

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"


@dataclass(frozen=True)
class Row:
    """One line of the page."""

    id: str
    what: str
    """Markdown."""
    build: Callable[[Path], Case]
    """From an empty folder to the case."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Column -> a part of the error, or nothing where the column does not apply; the other columns of the group work."""


@dataclass(frozen=True)
class Group:
    """One table of the page."""

    title: str
    intro: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def cells(self) -> Iterator[tuple[Row, str, str]]:
        """Yield row, column and error (empty: it works); a file that does not load has no further cells."""
        for row in self.rows:
            for column in self.columns:
                if row.refused.get(column) != "":
                    yield row, column, row.refused.get(column, "")
                if column == "load" and column in row.refused:
                    break


# The tables.


_REFUSED_FILE = "has tensors of an unknown layout"

WRAPPERS = Group(
    "Wrappers",
    'State dicts of one of our models, `torch.save(…, "model.pth")`, loaded by `create(name, pretrained="model.pth")`. Of two\n'
    "copies the log names the one that is taken.",
    ("load", "predict", "evaluate"),
    (
        Row("bare", "`net.state_dict()` alone", make.saved(make.ours)),
        Row("ddp", "`module.` (DataParallel, DistributedDataParallel)", make.behind("module.")),
        Row("compiled", "`_orig_mod.` (torch.compile)", make.behind("_orig_mod.")),
        Row("fsdp", "`_fsdp_wrapped_module.` (FSDP)", make.behind("_fsdp_wrapped_module.")),
        Row("model", "`model.` (Lightning modules)", make.behind("model.")),
        Row("net", "`net.`", make.behind("net.")),
        Row("ddp-compiled", "`module._orig_mod.`", make.behind("module._orig_mod.")),
        Row("compiled-ddp", "`_orig_mod.module.`", make.behind("_orig_mod.module.")),
        Row("three", "`model.module._orig_mod.`", make.behind("model.module._orig_mod.")),
        Row(
            "lightning",
            "Lightning checkpoint: `state_dict` with `model.`, a loss and a metric beside it",
            make.saved(make.lightning),
        ),
        Row("training", "`model` beside optimizer, scheduler, `argparse.Namespace`, loss and numpy objects", make.training),
        Row("nested", "`checkpoint` → `state_dict` → tensors", make.saved(lambda: {"checkpoint": {"state_dict": make.ours()}})),
        Row(
            "ema-timm",
            "`state_dict_ema` beside `state_dict` (timm): EMA taken",
            make.saved(make.two("state_dict", "state_dict_ema")),
        ),
        Row("ema-model", "`model_ema` beside `model`: EMA taken", make.saved(make.two("model", "model_ema"))),
        Row(
            "ema-prefix",
            "`ema_model.` beside `online_model.` (ema-pytorch): EMA taken",
            make.saved(make.two_prefixes("online_model.", "ema_model.")),
        ),
        Row("ema-average", "`AveragedModel`: `n_averaged` beside `module.`", make.saved(make.average)),
        Row("ema-mmengine", "mmengine's EMA hook, which swaps the two", make.saved(make.mmengine)),
        Row("teacher", "`teacher.` beside `student.`: teacher taken", make.saved(make.two_prefixes("student.", "teacher."))),
        Row(
            "momentum",
            "`encoder_k.` beside `encoder_q.`: the query taken",
            make.saved(make.two_prefixes("encoder_k.", "encoder_q.")),
        ),
        Row(
            "branches",
            "`branch1.` beside `branch2.`",
            make.saved(make.two_prefixes("branch1.", "branch2.")),
            {"load": "The file holds several models"},
        ),
        Row(
            "optimizer",
            "an optimizer's state alone",
            make.saved(lambda: {"state": {}, "param_groups": []}),
            {"load": "holds no state dict"},
        ),
        Row(
            "pruned-file",
            "state dict of a pruned model (`weight_orig`, `weight_mask`); call `prune.remove` first",
            make.saved(make.modified(make.pruned)),
            {"load": _REFUSED_FILE},
        ),
        Row(
            "normed-file",
            "state dict with a parametrization (`weight_norm`); remove it first",
            make.saved(make.modified(make.weight_norm)),
            {"load": _REFUSED_FILE},
        ),
        Row(
            "lora-file",
            "state dict with LoRA layers; merge them first",
            make.saved(make.modified(make.lora)),
            {"load": _REFUSED_FILE},
        ),
    ),
)

CONTAINERS = Group(
    "File formats",
    "The same model in other containers. A file of ours states its model; the others are loaded by\n"
    "`create(name, pretrained=…)`.",
    ("load", "predict", "evaluate"),
    (
        Row("ours", "`net.save`: safetensors with our metadata, by `load`", make.native()),
        Row("safetensors", "safetensors, tensors alone", make.safetensors),
        Row(
            "sharded-safetensors",
            "folder of safetensors shards with `model.safetensors.index.json`",
            make.sharded("safetensors"),
        ),
        Row("sharded-bin", "folder of PyTorch shards with `pytorch_model.bin.index.json`", make.sharded("bin")),
        Row("zip", "`.pth`, PyTorch's zip", make.saved(make.ours)),
        Row("legacy", "`.pth` from before PyTorch 1.6", make.saved(make.ours, zipped=False)),
        Row("tar", "the same as `.pth.tar`", make.saved(lambda: {"state_dict": make.ours()}, name="model.pth.tar")),
        Row("arrays", "pickle of numpy arrays", make.arrays),
        Row(
            "module",
            "whole pickled model, `torch.save(net)`",
            make.saved(lambda: make.plain()),
            {"load": "is a whole pickled model"},
        ),
        Row("torchscript", "TorchScript archive", make.torchscript, {"load": "is a TorchScript archive, not a state dict"}),
        Row(
            "program",
            "`torch.export` archive, `.pt2`",
            make.exported_program,
            {"load": "is an exported program (torch.export), not a state dict"},
        ),
        Row("onnx", "ONNX", make.onnx_file, {"load": "is no weights file that deeplabzoo knows"}),
        Row(
            "tensorflow",
            "TensorFlow training checkpoint",
            make.tensorflow_checkpoint,
            {"load": "is a TensorFlow training checkpoint"},
        ),
    ),
)

LAYOUTS = Group(
    "Layouts of libraries",
    "Loaded by `load`, without a name. That the logits are those of the library is tested for each of them;\n"
    "[Converters](origins.md) lists all layouts, and what was checked.",
    ("load", "predict", "evaluate"),
    (
        Row("layout-ours", "deeplabzoo", make.native()),
        Row("layout-torchvision", "torchvision: state dict of `deeplabv3_mobilenet_v3_large`", make.torchvision_layout),
        Row("layout-transformers", "transformers: folder of a MobileNetV2", make.transformers_layout),
        Row("layout-smp", "segmentation_models_pytorch: folder of a DeepLabV3Plus on `resnet18`", make.smp_layout),
        Row("layout-vainf", "VainF: `model_state` of a DeepLabV3Plus on ResNet-50", make.vainf_layout),
    ),
)

DTYPES = Group(
    "Types in files",
    "A loaded model is float32, with the values of the file.",
    ("load", "predict", "evaluate"),
    (
        Row("ours-float16", "ours, `net.save(…, dtype=torch.float16)`", make.native(torch.float16)),
        Row("ours-bfloat16", "ours, bfloat16", make.native(torch.bfloat16)),
        Row("ours-float64", "ours, float64", make.native(torch.float64)),
        Row("pth-float16", "`.pth`, float16", make.tensors_of(torch.float16)),
        Row("pth-bfloat16", "`.pth`, bfloat16", make.tensors_of(torch.bfloat16)),
        Row("pth-float64", "`.pth`, float64", make.tensors_of(torch.float64)),
        Row("pth-float8", "`.pth`, float8 (e4m3fn)", make.tensors_of(torch.float8_e4m3fn)),
        Row("safetensors-float8", "safetensors, float8 (e4m3fn)", make.tensors_of(torch.float8_e4m3fn, safe=True)),
        Row(
            "pth-int8",
            "`.pth`, a tensor quantized to int8",
            make.saved(make.quantized_tensor),
            {"load": "which is no plain tensor with a name"},
        ),
        Row(
            "pth-complex",
            "`.pth`, a complex tensor",
            make.saved(make.complex_tensor),
            {"load": "which is no plain tensor with a name"},
        ),
    ),
)

_MEMORY = ("predict", "evaluate", "optimize", "save", "export")
_BY_HAND = "layers were replaced by hand"
_NOT_OPTIMIZED = "cannot be optimized, since"
_OTHER_CLASSES = "The classifier was replaced by one of 7 classes"

SHAPES = Group(
    "Types, channels and classes of a model in memory",
    "*save* means `net.save` and `load` of that file, *export* an ONNX file that passes its parity check. Models of 16 and 64\n"
    "bits are exported, and optimized, in float32.",
    _MEMORY,
    (
        Row("half", "`net.half()`", make.of_dtype(torch.float16)),
        Row("bfloat16", "`net.bfloat16()`", make.of_dtype(torch.bfloat16)),
        Row("double", "`net.double()`", make.of_dtype(torch.float64)),
        Row("one-channel", "`in_chans=1` (RGB images become grey)", make.in_memory(in_chans=1)),
        Row("three-channels", "`in_chans=3`", make.in_memory(in_chans=3)),
        Row(
            "four-channels",
            "`in_chans=4`",
            make.in_memory(in_chans=4),
            {"evaluate": "datasets here are RGB, so it cannot be evaluated"},
        ),
        Row("one-class", "`num_classes=1` (sigmoid: background and foreground)", make.in_memory(num_classes=1)),
        Row("two-classes", "`num_classes=2`", make.in_memory(num_classes=2)),
        Row("many-classes", "`num_classes=21`", make.in_memory(num_classes=21)),
    ),
)

MODIFIED = Group(
    "Modified models",
    "A model that cannot be optimized is run as it is, with a warning that says why. `deeplabzoo.optimize` takes the model\n"
    "without its wrapper. A dash: the wrapper has no `save`; use that of the model inside.",
    _MEMORY,
    (
        Row("reset", "`reset_classifier(7)`", make.in_memory(make.reset)),
        Row(
            "replaced",
            "`head.classifier` replaced by a layer of 7 classes",
            make.in_memory(make.replaced),
            dict.fromkeys(_MEMORY, _OTHER_CLASSES),
        ),
        Row("stride", "`set_output_stride(8)`", make.in_memory(lambda net: net.set_output_stride(8))),
        Row(
            "pruned",
            "pruned (`torch.nn.utils.prune`)",
            make.in_memory(make.pruned),
            {"optimize": _NOT_OPTIMIZED, "save": _BY_HAND},
        ),
        Row("pruned-removed", "pruned, then `prune.remove`", make.in_memory(make.pruned_for_good)),
        Row(
            "normed",
            "`weight_norm`, a parametrization",
            make.in_memory(make.weight_norm),
            {"optimize": _NOT_OPTIMIZED, "save": _BY_HAND},
        ),
        Row("lora", "LoRA around the classifier", make.in_memory(make.lora), {"optimize": _NOT_OPTIMIZED, "save": _BY_HAND}),
        Row(
            "hook",
            "forward hook in the head (its code is not part of a saved file)",
            make.in_memory(make.hook),
            {"optimize": _NOT_OPTIMIZED},
        ),
        Row("training-mode", "in training mode, which it keeps", make.in_memory(make.in_training_mode)),
        Row("channels-last", "`channels_last` memory", make.in_memory(lambda net: net.to(memory_format=torch.channels_last))),
        Row("sync", "`SyncBatchNorm.convert_sync_batchnorm`", make.in_memory(nn.SyncBatchNorm.convert_sync_batchnorm)),
        Row(
            "compile",
            "`torch.compile(net)` (the model inside is run)",
            make.in_memory(make.compiled),
            {"optimize": _NOT_OPTIMIZED},
        ),
        Row("parallel", "`DataParallel`", make.in_memory(nn.DataParallel), {"optimize": _NOT_OPTIMIZED, "save": ""}),
        Row(
            "averaged",
            "`torch.optim.swa_utils.AveragedModel`",
            make.in_memory(AveragedModel),
            {"optimize": _NOT_OPTIMIZED, "save": ""},
        ),
    ),
)

GROUPS = (WRAPPERS, CONTAINERS, LAYOUTS, DTYPES, SHAPES, MODIFIED)


# The page.

_HEAD = """\
<!-- Written by `python -m tools.docs.compatibility`; do not edit. -->
# Compatibility

Which files and models load, predict, evaluate and export. Each cell is a test: a *yes* means that tensors, labels and the
confusion matrix are those of the original model, and a *no* quotes the error. The models are small, with random weights. A
loaded model is an ordinary one: what the last two tables state of export is true of it, whatever file it came from.

How a model is found in a file is described in [Converters](origins.md), the formats and options of export in
[Export](export.md).
"""


def cells() -> Iterator[tuple[Row, str, str]]:
    """Yield every cell of every table: row, column and a part of the error, which is empty where it works."""
    for group in GROUPS:
        yield from group.cells()


def compatibility_page() -> str:
    """Return the page as Markdown."""
    return "\n".join([_HEAD, *(line for group in GROUPS for line in _section(group))])


def _section(group: Group) -> Iterator[str]:
    outcomes = {(row.id, column): error for row, column, error in group.cells()}
    yield f"## {group.title}\n\n{group.intro}\n"
    yield f"| | {' | '.join(group.columns)} |"
    yield f"|---|{'---|' * len(group.columns)}"
    for row in group.rows:
        yield f"| {row.what} | {' | '.join(_cell(outcomes.get((row.id, column))) for column in group.columns)} |"
    yield ""


def _cell(error: str | None) -> str:
    if error is None:
        return "–"
    return f"no: “{error}”" if error else "yes"


def main() -> int:
    """Write the page."""
    page = compatibility_page().encode()
    write_atomically(PAGE, lambda file: file.write(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
