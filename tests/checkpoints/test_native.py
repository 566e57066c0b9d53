"""A checkpoint rebuilds its model, bit for bit, or is refused in one sentence."""

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deeplabzoo.checkpoints.native import is_native_checkpoint, read_checkpoint
from deeplabzoo.errors import OutputError, UsageError, WeightsError
from deeplabzoo.models.config import DeepLabConfig, Preprocessing
from deeplabzoo.models.deeplab import DeepLab

CONFIG = DeepLabConfig(
    architecture="deeplabv3plus",
    encoder="mobilenetv2_035",
    num_classes=3,
    output_stride=8,
    atrous_rates=(6, 12),
    norm_eps=1e-3,
    align_corners=True,
    encoder_padding="same",
    aux_head=True,
)


@pytest.fixture(scope="module")
def net() -> DeepLab:
    torch.manual_seed(0)
    preprocessing = Preprocessing(size=(65, 97), resize="shortest", pad=True, mean=(0.5, 0.5, 0.5), channel_order="BGR")
    classes, palette = ["sky", "sea", "łąka"], [(0, 0, 255), (0, 128, 255), (0, 255, 0)]
    return DeepLab(CONFIG, classes=classes, palette=palette, preprocessing=preprocessing).eval()


@pytest.fixture
def saved(net: DeepLab, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    net.save(path, extra={"origin": "a test"})
    return path


def rebuilt(path: Path) -> DeepLab:
    checkpoint = read_checkpoint(path)
    return DeepLab.from_weights(
        checkpoint.config,
        checkpoint.state_dict,
        classes=checkpoint.classes,
        palette=checkpoint.palette,
        preprocessing=checkpoint.preprocessing,
    )


def with_metadata(path: Path, **changes: str) -> Path:
    """Rewrite a checkpoint with other metadata and the same tensors."""
    header_bytes = struct.unpack("<Q", path.read_bytes()[:8])[0]
    metadata = json.loads(path.read_bytes()[8 : 8 + header_bytes])["__metadata__"]
    save_file(load_file(path), path, {**metadata, **changes})
    return path


def test_a_saved_model_comes_back_bit_for_bit(net: DeepLab, saved: Path) -> None:
    """The file alone is enough: configuration, every tensor, names, colours, preprocessing, source."""
    again = rebuilt(saved)
    assert again.config == CONFIG
    assert (again.classes, again.palette, again.preprocessing) == (net.classes, net.palette, net.preprocessing)
    assert read_checkpoint(saved).source == {"origin": "a test"}
    assert again.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
    image = torch.rand(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(again(image), net(image))


def test_half_precision_halves_the_file_and_loads_as_float32(net: DeepLab, saved: Path, tmp_path: Path) -> None:
    """fp16 is a way to store: the network that comes back computes in float32, from values rounded once."""
    half = tmp_path / "half.safetensors"
    net.save(half, dtype=torch.float16)
    assert half.stat().st_size < 0.6 * saved.stat().st_size
    again = rebuilt(half)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    weight = net.head.classifier.weight
    assert torch.equal(again.head.classifier.weight, weight.half().float())
    assert torch.equal(weight, net.head.classifier.weight)
    assert again.encoder.bn1.num_batches_tracked.dtype == torch.int64  # type: ignore[union-attr]


def test_a_changed_stride_and_classifier_are_saved_as_they_are(tmp_path: Path) -> None:
    """What is saved is the network as it is now, not as it was created."""
    net = DeepLab(replace(CONFIG, atrous_rates=(12, 24, 36), aux_head=False))
    net.set_output_stride(16)
    net.reset_classifier(5)
    net.save(tmp_path / "now.safetensors")
    again = rebuilt(tmp_path / "now.safetensors")
    assert again.config.atrous_rates == (6, 12, 18)
    assert (again.output_stride, again.num_classes, len(again.classes)) == (16, 5, 5)


def test_own_files_are_recognised(saved: Path, tmp_path: Path) -> None:
    """By metadata, not by suffix; nothing else is mistaken for one."""
    foreign, text = tmp_path / "foreign.safetensors", tmp_path / "text.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    text.write_text("hello")
    assert is_native_checkpoint(saved)
    assert not any(map(is_native_checkpoint, (foreign, text, tmp_path / "absent")))


def test_a_failed_save_leaves_the_old_file(net: DeepLab, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing is atomic: a full disk costs the new file, not the old one, and leaves nothing partial behind."""
    before = saved.read_bytes()

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deeplabzoo.files.os.replace", full_disk)
    with pytest.raises(OutputError, match="No space left on device"):
        net.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_unwritable_output_is_a_sentence(net: DeepLab, tmp_path: Path) -> None:
    """A folder that does not exist, or a path that is a folder."""
    with pytest.raises(OutputError, match="Cannot write"):
        net.save(tmp_path / "absent" / "net.safetensors")
    with pytest.raises(OutputError, match="Cannot write"):
        net.save(tmp_path)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda whole: b"", "is empty"),
        (lambda whole: whole[:5], "not a whole safetensors file"),
        (lambda whole: whole[: len(whole) // 2], "not a whole safetensors file"),
        (lambda whole: whole + b"more", "not a whole safetensors file"),
        (lambda whole: struct.pack("<Q", 10**15) + whole[8:], "not a whole safetensors file"),
        (lambda whole: b"\x00" * len(whole), "not a whole safetensors file"),
        (lambda whole: pickle.dumps(print), "not a whole safetensors file"),
        (lambda whole: whole.replace(b'"F32"', b'"F64"', 1), "not a whole safetensors file"),
    ],
    ids=["empty", "stub", "truncated", "too long", "endless header", "zeros", "pickle", "lying type"],
)
def test_damaged_files_end_in_one_sentence(saved: Path, damage: object, sentence: str) -> None:
    """Never a traceback, never a half-loaded network, never a pickle that runs."""
    saved.write_bytes(damage(saved.read_bytes()))  # type: ignore[operator]
    with pytest.raises(WeightsError, match=sentence) as caught:
        read_checkpoint(saved)
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_a_sentence(tmp_path: Path) -> None:
    """What is not there is named."""
    with pytest.raises(WeightsError, match=r"There is no weights file .*absent"):
        read_checkpoint(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": "other"}, "not one of deeplabzoo's"),
        ({"version": "99"}, "format version 99"),
        ({"config": "{"}, "cannot be understood"),
        ({"config": "[]"}, "cannot be understood"),
        ({"config": '{"architecture": "fcn", "encoder": "resnet18"}'}, "must be one of deeplabv3, deeplabv3plus, not 'fcn'"),
        ({"config": '{"architecture": "deeplabv3", "encoder": "resnet18", "odd": 1}'}, "has an unknown field 'odd'"),
        ({"classes": '["one"]'}, "contradicts itself"),
        ({"palette": "[[1, 2]]"}, "cannot be understood"),
        ({"preprocessing": '{"std": [0, 1, 1]}'}, "std above 0"),
        ({"source": "3"}, "cannot be understood"),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(saved: Path, changes: dict[str, str], sentence: str) -> None:
    """The metadata is input like any other."""
    with pytest.raises(WeightsError, match=sentence):
        read_checkpoint(with_metadata(saved, **changes))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_classes": 4}, r"4 tensors have another shape \(head.classifier.weight is \(3, 256, 1, 1\), expected \(4, "),
        ({"architecture": "deeplabv3"}, "do not fit deeplabv3 on mobilenetv2_035 .* These are the weights of a deeplabv3plus"),
        ({"aux_head": False}, "8 tensors are left over"),
        ({"encoder": "resnet18", "encoder_padding": "symmetric"}, "are missing"),
        ({"head_channels": 10**9}, "have another shape|describes no model"),
        ({"head_channels": 10**18}, "describes no model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, fields: dict[str, object], sentence: str) -> None:
    """v3+ weights for v3, other class counts, a header that asks for a petabyte: named before memory is taken (VainF#112)."""
    checkpoint = read_checkpoint(saved)
    with pytest.raises(WeightsError, match=sentence) as caught:
        DeepLab.from_weights(replace(checkpoint.config, **fields), checkpoint.state_dict)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 900


def test_saving_keeps_the_permissions_of_a_new_file(saved: Path) -> None:
    """A temporary file is private; what it becomes is as readable as any file that the user writes."""
    other = saved.with_name("other")
    other.touch()
    assert saved.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"std": (1e-300, 1.0, 1.0)}, "or the input overflows"),
        ({"std": (1e300, 1.0, 1.0)}, "or the input overflows"),
        ({"mean": (1e308, 0.0, 0.0)}, "or the input overflows"),
        ({"size": (100_000, 100_000)}, "each at most 65535"),
        ({"size": (60_000, 60_000), "pad": True}, "where images are padded to it"),
    ],
)
def test_an_input_that_cannot_be_computed_is_refused(fields: dict[str, object], sentence: str) -> None:
    """Such numbers of a file would label every pixel 0, or end in the allocator."""
    with pytest.raises(UsageError, match=sentence):
        Preprocessing.from_dict(fields)


@pytest.mark.parametrize("field", ["atrous_rates", "multi_grid"])
def test_a_list_that_takes_minutes_to_build_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} must be at most 64 numbers, not 60000"):
        DeepLabConfig.from_dict({"architecture": "deeplabv3", "encoder": "resnet50", field: [1] * 60_000})
