"""The model in a weights file is found whatever it is wrapped in, and what was taken, dropped and left out is in the notes."""

import argparse
import collections
import json
import pathlib
import pickle
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import deeplabzoo
from deeplabzoo.checkpoints.converters import read_foreign, smp, torchvision, transformers
from deeplabzoo.checkpoints.state_dict import find_encoder, read_state_dict
from deeplabzoo.checkpoints.types import Checkpoint
from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab

Path = pathlib.Path
Tensors = dict[str, torch.Tensor]


def _ours() -> Tensors:
    torch.manual_seed(0)
    return dict(DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="mobilenetv2_035", num_classes=3)).state_dict())


def _torchvision() -> Tensors:
    net = DeepLab(torchvision._config("mobilenetv3_large_100", num_classes=3, in_chans=3, aux_head=False))
    return dict(torchvision.export(net).state_dict)


def _transformers() -> Tensors:
    config = transformers.mobilenetv2_config("mobilenetv2_035", {}, num_classes=3, in_chans=3, head_channels=256)
    return dict(transformers.export(DeepLab(config)).state_dict)


def _smp() -> Tensors:
    config = DeepLabConfig(
        architecture="deeplabv3plus", encoder="resnet18", num_classes=3, atrous_rates=(12, 24, 36), depthwise_norm=False,
        decoder_convs=1, decoder_refine_conv=True, align_corners=True, encoder_dilate_strided=True,
    )  # fmt: skip
    return dict(smp.export(DeepLab(config)).state_dict)


LAYOUTS: Mapping[str, Callable[[], Tensors]] = {
    "ours": _ours, "torchvision": _torchvision, "transformers": _transformers, "smp": _smp,
}  # fmt: skip


class ShortDict(dict[str, Tensors]):
    """Hypothesis prints the arguments of a test, and tensors are long."""

    def __repr__(self) -> str:
        return "layouts"


@pytest.fixture(scope="module")
def layouts() -> Mapping[str, Tensors]:
    return ShortDict({name: make() for name, make in LAYOUTS.items()})


def read(path: Path) -> Checkpoint:
    return read_foreign(path)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefixes=st.lists(
        st.sampled_from(["module.", "_orig_mod.", "model.", "net.", "segmentor.", "backbone.", "lit."]), max_size=3
    ),
    keys=st.lists(st.sampled_from(["state_dict", "model", "model_state_dict", "checkpoint"]), max_size=2),
    beside=st.booleans(),
    form=st.sampled_from(["zip", "old", "safetensors"]),
)
def test_a_model_is_found_behind_any_prefix_and_key(
    layout: str,
    prefixes: list[str],
    keys: list[str],
    beside: bool,
    form: str,
    layouts: Mapping[str, Tensors],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """As Lightning, DDP, torch.compile and their combinations write it, for every layout; what lies outside is counted."""
    path = tmp_path_factory.mktemp("wrapped") / ("net.safetensors" if form == "safetensors" else "net.pth")
    bare = path.with_name("bare.pth")
    torch.save(layouts[layout], bare)
    tensors = prefixed("".join(prefixes), layouts[layout])
    outside = bool(prefixes) and beside
    if outside:
        tensors |= {"loss.weight": torch.ones(3), "metric.confmat": torch.ones(3, 3)}
    if form == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        content: Any = tensors
        for key in keys:
            content = {key: content, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    found, expected = read(path), read(bare)
    assert same(found.state_dict, expected.state_dict)
    assert found.format_name == expected.format_name
    assert ("2 tensors beside the model dropped" in found.notes) == outside


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [
        ("model.", "ema_model.", 1),
        ("model.", "model_ema.module.", 1),
        ("online_model.", "ema_model.", 1),
        ("student.", "teacher.", 1),
        ("student.module.", "teacher.module.", 1),
        ("encoder_q.", "encoder_k.", 0),
        ("online_net.", "target_net.module.", 0),
        ("base_encoder.", "momentum_encoder.", 0),
        ("model.", "teacher.", 1),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_of_two_copies_the_one_that_is_evaluated_is_taken_and_named(
    first: str, second: str, taken: int, nested: bool, layouts: Mapping[str, Tensors], tmp_path: Path
) -> None:
    """EMA and teacher before what was trained, query and online encoders before their momentum copies."""
    copies = [layouts["ours"], {name: tensor + 1 for name, tensor in layouts["ours"].items()}]
    path = tmp_path / "net.pth"
    if nested:
        torch.save({first.rstrip("."): copies[0], second.rstrip("."): copies[1], "optimizer": {"state": {0: {}}}}, path)
    else:
        torch.save(prefixed(first, copies[0]) | prefixed(second, copies[1]), path)
    found = read(path)
    assert same(found.state_dict, copies[taken])
    names = (first.rstrip("."), second.rstrip("."))
    assert any(f"under '{names[taken]}' taken, those under '{names[1 - taken]}' left out" in note for note in found.notes)


@pytest.mark.parametrize(
    "content",
    [
        lambda ours: {"state_dict": ours, "state_dict_ema": {name: tensor + 1 for name, tensor in ours.items()}},
        lambda ours: {"n_averaged": torch.tensor(5), **prefixed("module.", {name: one + 1 for name, one in ours.items()})},
        lambda ours: {"ema": {"module": {name: tensor + 1 for name, tensor in ours.items()}, "decay": 0.99}, "model": ours},
        lambda ours: {"model": ours, "model_ema": {name: tensor + 1 for name, tensor in ours.items()}},
        lambda ours: {
            "state_dict": {name: tensor + 1 for name, tensor in ours.items()},
            "ema_state_dict": {"steps": torch.tensor(3), **prefixed("module.", ours)},
        },
    ],
    ids=["timm", "AveragedModel", "nested", "model_ema", "mmengine, which swaps the two"],
)
def test_ema_weights_are_taken_and_named(
    content: Callable[[Tensors], Any], layouts: Mapping[str, Tensors], tmp_path: Path
) -> None:
    path = tmp_path / "net.pth"
    torch.save(content(layouts["ours"]), path)
    found = read(path)
    assert same(found.state_dict, {name: tensor + 1 for name, tensor in layouts["ours"].items()})
    assert any(note.startswith("EMA weights") for note in found.notes)


def test_a_second_copy_of_mmcv_is_dropped(layouts: Mapping[str, Tensors], tmp_path: Path) -> None:
    """Its EMA hook keeps buffers called `ema_` and the name with underscores at the top of the state dict."""
    path = tmp_path / "net.pth"
    extra = {f"ema_{name.replace('.', '_')}": tensor for name, tensor in layouts["torchvision"].items()}
    torch.save({"state_dict": layouts["torchvision"] | extra}, path)
    torch.save(layouts["torchvision"], tmp_path / "bare.pth")
    found = read(path)
    assert same(found.state_dict, read(tmp_path / "bare.pth").state_dict)
    assert f"{len(extra)} tensors beside the model dropped" in found.notes


def test_two_models_of_equal_standing_are_refused(layouts: Mapping[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(prefixed("branch1.", layouts["ours"]) | prefixed("branch2.", layouts["ours"]), path)
    with pytest.raises(WeightsError, match=r"several models \('branch1', 'branch2'\)"):
        read(path)


class LossOfOurs(torch.nn.Module):
    """A loss object as a training script would keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(3))


HARMLESS: Mapping[str, Any] = {
    "args": argparse.Namespace(lr=0.1, out=Path("x")),
    "path": Path("run"),
    "loss": torch.nn.CrossEntropyLoss(torch.ones(3)),
    "own": LossOfOurs(),
    "score": np.float64(0.7),
    "history": np.arange(3),
    "names": np.array(["cat", "dog"]),
    "counts": collections.Counter("aab"),
    "queue": collections.deque([1]),
    "table": collections.defaultdict(list),
    "types": [collections.defaultdict(int), argparse.Namespace(kind=str), range(3)],
    "random": np.random.RandomState(0).get_state(),
    "size": torch.Size([1, 2]),
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "set": {1, 2},
    "complex": 1j,
    "optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9).state_dict(),
    "generator": torch.get_rng_state(),
}


@pytest.mark.parametrize("name", [*HARMLESS, "all"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_the_tensors_are_left_out(name: str, old: bool, protocol: int, tmp_path: Path) -> None:
    """Whatever a training script keeps beside them: no code of it runs, and the tensors load."""
    path = tmp_path / "net.pth"
    state = {"encoder.weight": torch.randn(2, 3), "head.bias": torch.arange(3)}
    others = dict(HARMLESS) if name == "all" else {name: HARMLESS[name]}
    torch.save(others | {"state_dict": state}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    assert same(read_state_dict(path), state)
    if name == "args":
        assert any("args (argparse.Namespace)" in note for note in read(path).notes)


@pytest.mark.parametrize("old", [False, True])
def test_a_whole_pickled_model_is_named_with_the_way_out(old: bool, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    for content in (torch.nn.Conv2d(1, 1, 1), {"model": torch.nn.Conv2d(1, 1, 1), "epoch": 3}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(content, path, _use_new_zipfile_serialization=not old)
        with pytest.raises(WeightsError, match=r"whole pickled model \(torch.nn.modules.conv.Conv2d\).*state_dict\(\)"):
            read(path)


def test_a_torchscript_archive_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), path)
    with pytest.raises(WeightsError, match=r"TorchScript archive.*state_dict\(\)"):
        read(path)


@pytest.mark.parametrize("length", range(64, 64 + 256))
def test_safetensors_of_every_header_length_are_read(length: int, tmp_path: Path) -> None:
    """The first bytes are the length, and may be those of a pickle, a zip, an archive or a protocol buffer."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, separators=(",", ":")).encode()
    for total in (length, length + (0x8B1F - 0x1F) if length % 256 == 0x1F else length):
        path = tmp_path / "net.bin"
        path.write_bytes(struct.pack("<Q", total) + header.ljust(total) + struct.pack("<2f", 1, 2))
        assert read(path).state_dict["a"].tolist() == [1.0, 2.0]
        assert deeplabzoo.checkpoints.state_dict.read_state_dict(path)["a"].tolist() == [1.0, 2.0]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
                           torch.int32, torch.float8_e4m3fn, torch.uint16]),
    shape=st.lists(st.integers(0, 4), max_size=4),
    view=st.sampled_from(["plain", "transposed", "slice", "expanded", "parameter", "channels_last"]),
    protocol=st.sampled_from([2, 3, 4, 5]),
    old=st.booleans(),
)  # fmt: skip
def test_tensors_come_back_as_pytorch_reads_them(
    dtype: torch.dtype, shape: list[int], view: str, protocol: int, old: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of every dtype and memory layout, from both of PyTorch's formats: bit for bit."""
    path = tmp_path_factory.mktemp("one") / "net.pth"
    tensor = torch.randint(0, 100, shape).to(dtype)
    if view == "transposed" and len(shape) > 1:
        tensor = tensor.transpose(0, 1)
    elif view == "slice" and shape and shape[0] > 1:
        tensor = tensor[1:]
    elif view == "parameter" and tensor.is_floating_point() and dtype is not torch.float8_e4m3fn:
        tensor = torch.nn.Parameter(tensor)
    elif view == "channels_last" and len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    state = {"a.weight": tensor, "tied": tensor}
    try:
        torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    except (NotImplementedError, AttributeError, KeyError, RuntimeError):
        return  # the old format has no such dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = torch.load(path, weights_only=False)["a.weight"]
        except AttributeError:
            return  # PyTorch writes dtypes in its old format that it cannot read
    found = read_state_dict(path)["a.weight"]
    assert torch.equal(found, expected.detach().float() if expected.is_floating_point() else expected)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (lambda: torch.empty(2, dtype=torch.bits8), "bits8"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8), "q"),
        (lambda: torch.zeros(2, dtype=torch.complex64), "Complex"),
        (lambda: torch.zeros(2, 2).to_sparse(), "sparse"),
        (lambda: torch.zeros(2, 2).to_sparse_csr(), "sparse"),
        (lambda: torch.zeros(2, device="meta"), "meta"),
        (lambda: torch.complex(torch.ones(2), torch.ones(2)).conj().imag, "negated"),
        (lambda: torch.zeros(2, dtype=torch.complex64).conj(), ""),
    ],
)
def test_tensors_of_other_kinds_end_in_a_sentence(make: Callable[[], torch.Tensor], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"a.weight": make(), "b.weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=rf"holds 'a.weight', which is no plain tensor with a name \(.*{kind}"):
        read_state_dict(path)


def test_memory_that_was_never_written_is_not_loaded_as_weights(tmp_path: Path) -> None:
    """A tensor's constructor with a length alone would yield whatever was in that memory before."""
    path = tmp_path / "net.pkl"
    for kind in (b"ctorch\nFloatTensor", b"ctorch\nTensor", b"ctorch.cuda\nFloatTensor"):
        path.write_bytes(b"\x80\x02}X\x01\x00\x00\x00a" + kind + b"\nK\x40\x85Rs.")
        with pytest.raises(WeightsError, match=r"'a', which is no plain tensor"):
            read_state_dict(path)


def test_files_load_in_many_threads_and_leave_the_hosts_warnings_alone(tmp_path: Path) -> None:
    """Nothing process-wide is changed for a load: no list of allowed names, no filter of warnings."""
    path = tmp_path / "net.pth"
    torch.save({"state_dict": {"a": torch.ones(2)}, "best": np.float64(0.5), "args": argparse.Namespace()}, path)
    filters, failures = list(warnings.filters), []

    def load() -> None:
        for _ in range(50):
            try:
                read_state_dict(path)
            except WeightsError as error:
                failures.append(error)
            if warnings.filters != filters:
                failures.append(AssertionError("the filters of warnings changed"))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failures


@pytest.mark.parametrize(
    "names",
    [
        ("cls_conv.weight", "shortcut_conv.0.weight", "aspp.branch5_conv.weight"),
        ("ASSP.aspp1.0.weight", "ASSP.conv1.weight", "decoder.conv1.weight"),
        ("pretrained.conv1.weight", "head.aspp.b0.0.weight", "auxlayer.block.0.weight"),
        ("base.layer1.conv1.conv.weight", "base.aspp.c0.weight", "base.layer5.block1.reduce.conv.weight"),
    ],
    ids=["bubbliiiing", "yassouali", "Tramac", "kazuto1011"],
)
def test_common_layouts_without_a_converter_are_named(names: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(prefixed("module.", dict.fromkeys(names, torch.zeros(1))), path)
    with pytest.raises(WeightsError, match=r"whose layout no converter reads; docs/origins\.md lists"):
        read(path)


def test_a_tensorflow_checkpoint_is_named_with_the_way_out(tmp_path: Path) -> None:
    """By its index, by a part of it, and by the prefix that TensorFlow itself is given."""
    index = tmp_path / "model.ckpt-30000.index"
    index.write_bytes(b"\0" * 40 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb")
    (tmp_path / "model.ckpt-30000.data-00000-of-00001").write_bytes(b"\0" * 40)
    for path in (index, tmp_path / "model.ckpt-30000.data-00000-of-00001", tmp_path / "model.ckpt-30000"):
        with pytest.raises(WeightsError, match=r"TensorFlow training checkpoint.*export_model\.py"):
            read(path)


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "backbone.",
        "encoder.",
        "model.encoder.",
        "module.encoder_q.",
        "module.base_encoder.",
        "state_dict.online.0.",
    ],
)
def test_an_encoder_is_found_behind_any_prefix(prefix: str) -> None:
    """As MoCo, DINO, BYOL, mmpretrain and Lightning write it, with the classifier or projector that it lay under left over."""
    encoder = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="mobilenetv2_035")).encoder.state_dict()
    state = prefixed(prefix, encoder) | {f"{prefix}fc.weight": torch.zeros(1), "queue": torch.zeros(1)}
    found, unused, _ = find_encoder(state, encoder)
    assert same(found, encoder)
    assert set(unused) == {f"{prefix}fc.weight", "queue"}


@pytest.mark.parametrize(
    ("first", "second", "taken"),
    [("student.backbone.", "teacher.backbone.", 1), ("encoder_q.", "encoder_k.", 0), ("online.", "target.", 0)],
)
def test_of_two_encoders_one_is_taken_and_named(first: str, second: str, taken: int) -> None:
    encoder = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="mobilenetv2_035")).encoder.state_dict()
    copies = [encoder, {name: tensor + 1 for name, tensor in encoder.items()}]
    found, unused, notes = find_encoder(prefixed(first, copies[0]) | prefixed(second, copies[1]), encoder)
    assert same(found, copies[taken])
    assert not unused
    assert f"under '{(first, second)[taken].rstrip('.')}' taken" in notes[0]


def test_a_pickle_is_not_taken_for_safetensors_nor_the_other_way(tmp_path: Path) -> None:
    path = tmp_path / "net.bin"
    path.write_bytes(pickle.dumps({"a": np.ones(2, np.float32)}, 4))
    assert read_state_dict(path)["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("key", ["meta", "mmengine", "lightning", "top"])
def test_class_names_in_a_file_are_used(key: str, layouts: Mapping[str, Tensors], tmp_path: Path) -> None:
    """Never those of a data set that has as many."""
    names, colours = ("wall", "rot", "moss"), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    beside = {
        "meta": {"meta": {"CLASSES": names, "PALETTE": colours}},
        "mmengine": {"meta": {"dataset_meta": {"classes": names, "palette": colours}}},
        "lightning": {"hyper_parameters": {"class_names": list(names)}},
        "top": {"classes": list(names)},
    }[key]
    path = tmp_path / "net.pth"
    torch.save({"state_dict": layouts["torchvision"], **beside}, path)
    found = read(path)
    assert found.classes == names
    if key in ("meta", "mmengine"):
        assert found.palette == ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    assert not any("names no classes" in note for note in found.notes)


def test_a_head_of_one_channel_becomes_background_and_foreground(layouts: Mapping[str, Tensors], tmp_path: Path) -> None:
    """Its sigmoid is the softmax of two logits of which the first is 0, in every layout; a class name in the file is kept."""
    last = {
        "torchvision": "classifier.4",
        "transformers": "segmentation_head.classifier.convolution",
        "smp": "segmentation_head.0",
    }
    path = tmp_path / "net.pth"
    for layout, name in last.items():
        one = {f"{name}.{kind}": layouts[layout][f"{name}.{kind}"][:1] for kind in ("weight", "bias")}
        for meta, foreground in (({}, "foreground"), ({"meta": {"CLASSES": ["crack"]}}, "crack")):
            torch.save({"state_dict": layouts[layout] | one, **meta}, path)
            found = read(path)
            assert found.config is not None
            assert (found.config.num_classes, found.classes) == (2, ("background", foreground))
            weight, bias = (found.state_dict[f"head.classifier.{kind}"] for kind in ("weight", "bias"))
            assert torch.equal(weight[1:], one[f"{name}.weight"])
            assert torch.equal(bias[1:], one[f"{name}.bias"])
            assert not weight[0].any()
            assert not bias[0].any()
            assert "one sigmoid channel made background and foreground" in found.notes


def test_the_auxiliary_head_of_a_replaced_classifier_is_dropped(tmp_path: Path) -> None:
    """`model.classifier[4] = Conv2d(256, 5, 1)` leaves the auxiliary head at 21 classes."""
    config = torchvision._config("resnet50", num_classes=21, in_chans=3, aux_head=True)
    state = dict(torchvision.export(DeepLab(config)).state_dict)
    state |= {"classifier.4.weight": torch.randn(5, 256, 1, 1), "classifier.4.bias": torch.randn(5)}
    path = tmp_path / "net.pth"
    torch.save(state, path)
    found = read(path)
    assert found.config is not None
    assert (found.config.num_classes, found.config.aux_head) == (5, False)
    assert found.dropped == ("auxiliary head (21 channels, the classifier has 5)",)
    DeepLab.from_weights(found.config, found.state_dict)


def test_of_mocos_two_encoders_the_query_encoder_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Through the public call, from a whole training checkpoint: which one was taken is in the log."""
    encoder = DeepLab(DeepLabConfig(architecture="deeplabv3", encoder="mobilenetv2_035")).encoder.state_dict()
    query = {name: tensor + 1 for name, tensor in encoder.items()}
    state = prefixed("module.encoder_k.", dict(encoder)) | prefixed("module.encoder_q.", query)
    path = tmp_path / "moco.pth"
    torch.save({"arch": "x", "state_dict": state | {"module.queue": torch.ones(3)}, "optimizer": {"state": {0: {}}}}, path)
    net = deeplabzoo.create("deeplabv3_mobilenetv2_035", encoder_pretrained=path)
    assert same(net.encoder.state_dict(), query)
    assert "weights under 'encoder_q' taken, those under 'encoder_k' left out" in caplog.text


def test_the_class_names_beside_a_bare_state_dict_are_used(layouts: Mapping[str, Tensors], tmp_path: Path) -> None:
    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": prefixed("model.", layouts["ours"]), "hyper_parameters": {"class_names": ["a", "b", "c"]}}, path)
    assert deeplabzoo.create("deeplabv3_mobilenetv2_035", pretrained=path).classes == ("a", "b", "c")
