"""Files and models that docs/compatibility.md shows, made of a small model: see `compatibility`."""

import argparse
import copy
import functools
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from deeplabzoo.checkpoints.conversion import write_exported
from deeplabzoo.checkpoints.converters import smp, torchvision, transformers
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

NAME = "deeplabv3plus_lcnet_050"
"""The model that most rows are made of: the smallest encoder."""
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What a row builds: a file or a model, and the plain model whose tensors and labels are the right ones."""

    expected: DeepLab
    file: Path | None = None
    """A file or folder to load."""
    name: str | None = None
    """Model name for `create(name, pretrained=file)`, where the file does not tell it."""
    model: Any = None
    """A model in memory, where there is no file."""


# Models.


def _model(seed: int = 0, **fields: Any) -> DeepLab:
    """Return a small model in eval mode whose batch norms have statistics of their own, so that no two tensors are equal."""
    torch.manual_seed(seed)
    small = {"architecture": "deeplabv3plus", "encoder": "lcnet_050", "num_classes": 5, "head_channels": 16}
    net = DeepLab(DeepLabConfig(**{**small, **fields}))
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of one batch
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    nn.init.normal_(net.head.classifier.weight, std=1.0)
    coarse = torch.randn(4, net.config.in_chans, 5, 7)
    image_BCHW = nn.functional.interpolate(coarse, size=(65, 65), mode="bilinear") + 0.3 * torch.randn(
        4, coarse.shape[1], 65, 65
    )
    with torch.no_grad():
        net.train()(image_BCHW)
        logits_BCHW = net.eval().forward_low_resolution(image_BCHW)
        net.head.classifier.bias -= logits_BCHW.mean(dim=(0, 2, 3))  # otherwise one class may be everywhere
    for norm in norms:
        norm.momentum = 0.1
    return net


@functools.cache
def plain() -> DeepLab:
    """Return the model that most rows are made of."""
    return _model()


@functools.cache
def _other() -> DeepLab:
    """Return a second copy as training writes one beside the model: same names, other values."""
    return _model(seed=1)


def ours() -> dict[str, torch.Tensor]:
    """Return its state dict."""
    return dict(plain().state_dict())


def _prefixed(prefix: str, tensors: Tensors) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


# Files.


def saved(content: Callable[[], Any], *, name: str = "model.pth", zipped: bool = True) -> Callable[[Path], Case]:
    """Return a builder that writes `content()` as torch.save does, for the small model."""

    def build(folder: Path) -> Case:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whole modules are pickled with their code
            torch.save(content(), folder / name, _use_new_zipfile_serialization=zipped)
        return Case(plain(), folder / name, NAME)

    return build


def behind(prefix: str) -> Callable[[Path], Case]:
    """Return a builder of its state dict with a prefix before every name."""
    return saved(lambda: _prefixed(prefix, ours()))


def training(folder: Path) -> Case:
    """Write what a training script keeps beside the model."""
    net = plain()
    optimizer = torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1, momentum=0.9)
    beside = {
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        "epoch": 3,
        "best_score": np.float64(0.7),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "criterion": nn.CrossEntropyLoss(torch.ones(5)),
        "random": np.random.RandomState(0).get_state(),
    }
    return saved(lambda: {"model": ours(), **beside})(folder)


def lightning() -> Any:
    """Return a checkpoint as PyTorch Lightning writes it."""
    losses = {"loss.weight": torch.ones(5), "metric.confmat": torch.ones(5, 5)}
    return {
        "state_dict": _prefixed("model.", ours()) | losses,
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 0.1},
        "optimizer_states": [{"state": {}, "param_groups": []}],
    }


def two(trained: str, averaged: str) -> Callable[[], Any]:
    """Return a file of two copies under two keys; the second one is right."""
    return lambda: {trained: dict(_other().state_dict()), averaged: ours(), "epoch": 3}


def two_prefixes(wrong: str, right: str) -> Callable[[], Any]:
    """Return a state dict of two copies; the one under `right` is to be taken."""
    return lambda: _prefixed(wrong, _other().state_dict()) | _prefixed(right, ours())


def average() -> Any:
    """Return the state dict of an AveragedModel."""
    return {"n_averaged": torch.tensor(5), **_prefixed("module.", ours())}


def modified(change: Callable[[DeepLab], None]) -> Callable[[], Any]:
    """Return the state dict of a model that `change` modified."""

    def content() -> Any:
        net = _model()
        change(net)
        return net.state_dict()

    return content


def quantized_tensor() -> Any:
    """Return a state dict with a tensor quantized to int8."""
    return ours() | {"head.classifier.weight": torch.quantize_per_tensor(torch.zeros(5, 16), 0.1, 0, torch.qint8)}


def complex_tensor() -> Any:
    """Return a state dict with a complex tensor."""
    return ours() | {"head.classifier.bias": torch.zeros(5, dtype=torch.complex64)}


def mmengine() -> Any:
    """Return a checkpoint of mmengine, which keeps the average under `state_dict`."""
    return {"state_dict": ours(), "ema_state_dict": {"steps": torch.tensor(3), **_prefixed("module.", _other().state_dict())}}


def native(dtype: torch.dtype | None = None, **fields: Any) -> Callable[[Path], Case]:
    """Return a builder of a file that `net.save` writes."""

    def build(folder: Path) -> Case:
        net = _model(**fields) if fields else plain()
        net.save(folder / "model.safetensors", dtype=dtype)
        return Case(_rounded(net, dtype), folder / "model.safetensors")

    return build


def tensors_of(dtype: torch.dtype, *, safe: bool = False) -> Callable[[Path], Case]:
    """Return a builder that writes floating tensors of one dtype, without metadata."""

    def build(folder: Path) -> Case:
        state = {name: one.to(dtype) if one.is_floating_point() else one for name, one in ours().items()}
        if not safe:
            return Case(_rounded(plain(), dtype), saved(lambda: state)(folder).file, NAME)
        save_file(state, folder / "model.safetensors")
        return Case(_rounded(plain(), dtype), folder / "model.safetensors", NAME)

    return build


def _rounded(net: DeepLab, dtype: torch.dtype | None) -> DeepLab:
    """Return the float32 model that a file of another dtype holds."""
    twin = copy.deepcopy(net)
    state = {
        name: one.to(dtype).float() if dtype and one.is_floating_point() else one for name, one in net.state_dict().items()
    }
    twin.load_state_dict(state)
    return twin


def safetensors(folder: Path) -> Case:
    """Write tensors alone."""
    save_file(ours(), folder / "model.safetensors")
    return Case(plain(), folder / "model.safetensors", NAME)


def sharded(suffix: str) -> Callable[[Path], Case]:
    """Return a builder of a folder with two shards and their index."""

    def build(folder: Path) -> Case:
        names = sorted(ours())
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        halves = {f"{stem}-0000{part + 1}-of-00002.{suffix}": names[part::2] for part in range(2)}
        for file, half in halves.items():
            state = {name: ours()[name] for name in half}
            save_file(state, folder / file) if suffix == "safetensors" else torch.save(state, folder / file)
        index = {"weight_map": {name: file for file, half in halves.items() for name in half}}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")
        return Case(plain(), folder, NAME)

    return build


def arrays(folder: Path) -> Case:
    """Write a plain pickle of numpy arrays."""
    (folder / "model.pkl").write_bytes(pickle.dumps({name: tensor.numpy() for name, tensor in ours().items()}))
    return Case(plain(), folder / "model.pkl", NAME)


def torchscript(folder: Path) -> Case:
    """Write a TorchScript archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still in many folders
        torch.jit.save(torch.jit.trace(nn.Conv2d(3, 5, 1), torch.zeros(1, 3, 2, 2)), folder / "model.pt")
    return Case(plain(), folder / "model.pt", NAME)


def exported_program(folder: Path) -> Case:
    """Write an archive of torch.export."""
    torch.export.save(torch.export.export(nn.Conv2d(3, 5, 1), (torch.zeros(1, 3, 2, 2),)), folder / "model.pt2")
    return Case(plain(), folder / "model.pt2", NAME)


def onnx_file(folder: Path) -> Case:
    """Write the beginning of an ONNX file."""
    (folder / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")  # the first two fields of every file that torch writes
    return Case(plain(), folder / "model.onnx", NAME)


def tensorflow_checkpoint(folder: Path) -> Case:
    """Write the end of a TensorFlow index, by which it is recognized."""
    (folder / "model.ckpt-30000.index").write_bytes(b"\0" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb")
    return Case(plain(), folder / "model.ckpt-30000.index", NAME)


# Layouts of other libraries.


def torchvision_layout(folder: Path) -> Case:
    """Write torchvision's layout."""
    net = _model(**_fields(torchvision._config("mobilenetv3_large_100", num_classes=5, in_chans=3, aux_head=False)))
    torch.save(dict(torchvision.export(net).state_dict), folder / "model.pth")
    return Case(net, folder / "model.pth")


def transformers_layout(folder: Path) -> Case:
    """Write a folder as transformers saves it."""
    config = transformers.mobilenetv2_config("mobilenetv2_035", {}, num_classes=5, in_chans=3, head_channels=256)
    net = _model(**_fields(config))
    write_exported(transformers.export(net), folder / "model", "transformers")
    return Case(net, folder / "model")


_SMP: Mapping[str, Any] = {
    "atrous_rates": (12, 24, 36), "depthwise_norm": False, "decoder_convs": 1, "decoder_refine_conv": True,
    "align_corners": True, "encoder_dilate_strided": True, "head_channels": 256,
}  # fmt: skip


def smp_layout(folder: Path) -> Case:
    """Write a folder as segmentation_models_pytorch saves it."""
    net = _model(encoder="resnet18", **_SMP)
    write_exported(smp.export(net), folder / "model", "segmentation_models_pytorch")
    return Case(net, folder / "model")


_VAINF: tuple[tuple[str, str], ...] = (
    (r"encoder\.", "backbone."),
    (r"head\.aspp\.branches\.(\d)\.conv\.", r"classifier.aspp.convs.\1.0."),
    (r"head\.aspp\.branches\.(\d)\.norm\.", r"classifier.aspp.convs.\1.1."),
    (r"head\.aspp\.pool\.conv\.", "classifier.aspp.convs.4.1."),
    (r"head\.aspp\.pool\.norm\.", "classifier.aspp.convs.4.2."),
    (r"head\.aspp\.project\.conv\.", "classifier.aspp.project.0."),
    (r"head\.aspp\.project\.norm\.", "classifier.aspp.project.1."),
    (r"head\.low_level\.conv\.", "classifier.project.0."),
    (r"head\.low_level\.norm\.", "classifier.project.1."),
    (r"head\.decoder\.0\.conv\.", "classifier.classifier.0."),
    (r"head\.decoder\.0\.norm\.", "classifier.classifier.1."),
    (r"head\.classifier\.", "classifier.classifier.3."),
)
"""From our names to those of its DeepLabV3+ on a ResNet."""


def vainf_layout(folder: Path) -> Case:
    """Write the layout of VainF/DeepLabV3Plus-Pytorch."""
    fields = {"aspp_separable": False, "decoder_separable": False, "decoder_convs": 1, "decoder_low_level_first": True}
    net = _model(encoder="resnet50", head_channels=256, **fields)
    state = {}
    for name, tensor in net.state_dict().items():
        theirs = next(re.sub(rf"^{ours}", new, name) for ours, new in _VAINF if re.match(ours, name))
        state[theirs] = tensor
    torch.save({"cur_itrs": 30000, "model_state": state, "best_score": 0.7}, folder / "model.pth")
    return Case(net, folder / "model.pth")


def _fields(config: DeepLabConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


# Models in memory.


def in_memory(change: Callable[[DeepLab], Any] = lambda net: None, **fields: Any) -> Callable[[Path], Case]:
    """Return a builder of a model that `change` modifies in place, or returns in a wrapper."""

    def build(folder: Path) -> Case:
        net = _model(**fields)
        changed = change(net)
        return Case(net.eval(), model=net if changed is None else changed)

    return build


def of_dtype(dtype: torch.dtype) -> Callable[[Path], Case]:
    """Return a builder of a model of another dtype; the right labels are those of float32 with the same values."""
    return lambda folder: Case(_rounded(plain(), dtype), model=_model().to(dtype))


class LoRA(nn.Module):
    """A convolution and a low-rank update beside it, as adapter libraries wrap layers."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map B x in x H x W to B x out x H x W."""
        updated: torch.Tensor = self.base(x) + self.up(self.down(x))
        return updated


def pruned(net: DeepLab) -> None:
    """Mask half of the classifier's weights."""
    prune.l1_unstructured(net.head.classifier, "weight", amount=0.5)


def pruned_for_good(net: DeepLab) -> None:
    """Prune, and keep the pruned weights alone."""
    pruned(net)
    prune.remove(net.head.classifier, "weight")


def weight_norm(net: DeepLab) -> None:
    """Parametrize the classifier."""
    parametrizations.weight_norm(net.head.classifier)


def lora(net: DeepLab) -> None:
    """Put an adapter around the classifier."""
    net.head.classifier = LoRA(net.head.classifier)  # type: ignore[assignment]


def hook(net: DeepLab) -> None:
    """Negate the output of ASPP."""
    net.head.aspp.register_forward_hook(lambda module, inputs, output: -output)


def replaced(net: DeepLab) -> None:
    """Replace the classifier by one of 7 classes."""
    net.head.classifier = nn.Conv2d(net.head.classifier.in_channels, 7, 1)  # type: ignore[assignment]


def reset(net: DeepLab) -> None:
    """Start a new classifier of 7 classes."""
    net.reset_classifier(7)
    nn.init.normal_(net.head.classifier.weight, std=1.0)


def compiled(net: DeepLab) -> Any:
    """Wrap the model as torch.compile does."""
    return torch.compile(net, backend="eager")  # no compiler is needed to show that the wrapper is removed


def in_training_mode(net: DeepLab) -> DeepLab:
    """Return a copy in training mode."""
    twin = copy.deepcopy(net)
    return twin.train()
