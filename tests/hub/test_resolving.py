"""One resolver for names, tags, files, folders and addresses; and bare state dicts come back as the model that was saved."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deeplabzoo
from deeplabzoo.checkpoints.build import fields_of_shapes
from deeplabzoo.errors import DownloadError, UnknownNameError, UsageError, WeightsError
from deeplabzoo.hub.factory import load_named_model, open_checkpoint
from deeplabzoo.hub.manifest import BundledSource, released
from deeplabzoo.models.config import DeepLabConfig
from deeplabzoo.models.deeplab import DeepLab
from deeplabzoo.training.initialization import load_weights

BUNDLED = [row.name for row in released() if isinstance(row.source, BundledSource)]
IMAGE = torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(0))


def require_same_model(found: DeepLab, saved: DeepLab) -> None:
    """Require the same logits, bit for bit, and the same meaning of them."""
    with torch.no_grad():
        assert torch.equal(found(IMAGE), saved(IMAGE))
    assert found.preprocessing == saved.preprocessing
    assert (found.classes, found.palette) == (saved.classes, saved.palette)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", BUNDLED)
def test_a_bare_state_dict_under_a_released_name_is_the_saved_model(name: str, prefix: str, tmp_path: Path) -> None:
    """`torch.save(net.state_dict())`, then `create(the same name, pretrained=file)`, with and without tag."""
    net = deeplabzoo.create(name, pretrained=True)
    torch.save({prefix + key: tensor for key, tensor in net.state_dict().items()}, tmp_path / "bare.pth")
    for asked in (name, f"{name}.{net.weights_source['tag']}"):
        require_same_model(deeplabzoo.create(asked, pretrained=tmp_path / "bare.pth"), net)
    by_hand = deeplabzoo.create(f"{name}.{net.weights_source['tag']}").eval()
    by_hand.load_state_dict(net.state_dict())
    require_same_model(by_hand, net)


def test_a_bare_state_dict_trained_at_stride_8_needs_the_stride_alone(tmp_path: Path) -> None:
    """What tensors cannot show is given by the caller, and everything else is the released weights'."""
    net = deeplabzoo.create(BUNDLED[0], pretrained=True, output_stride=8)
    save_file(net.state_dict(), tmp_path / "bare.safetensors")
    require_same_model(deeplabzoo.create(BUNDLED[0], pretrained=tmp_path / "bare.safetensors", output_stride=8), net)


def test_the_released_configuration_of_another_library_is_lent(tmp_path: Path) -> None:
    """A model that began as torchvision's file keeps torchvision's arithmetic (stride 8, dilation of strided convolutions)."""
    row = next(row for row in released() if row.origin == "torchvision" and row.config.encoder == "mobilenetv3_large_100")
    net = DeepLab(row.config).eval()
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    found = deeplabzoo.create(row.name, pretrained=tmp_path / "bare.pth")
    assert found.config == row.config
    assert found.preprocessing == row.preprocessing
    with torch.no_grad():
        assert torch.equal(found(IMAGE), net(IMAGE))


def test_each_assumption_about_a_bare_state_dict_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No weights are released under this name, so what tensors do not show can only be assumed."""
    torch.save(deeplabzoo.create("deeplabv3plus_resnet10t").state_dict(), tmp_path / "bare.pth")
    with caplog.at_level(logging.WARNING):
        deeplabzoo.create("deeplabv3plus_resnet10t_voc", pretrained=tmp_path / "bare.pth")
    assumed = (
        "output stride 16",
        "atrous rates 6, 12, 18",
        "align_corners",
        "padding",
        "epsilon",
        "mean and std",
        "class names",
    )
    assert all(one in caplog.text for one in assumed)


VARIANTS: list[Mapping[str, object]] = [
    {"architecture": "deeplabv3"},
    {"architecture": "deeplabv3plus"},
    {"architecture": "deeplabv3", "atrous_rates": (), "refine_conv": False},
    {"architecture": "deeplabv3", "aspp_separable": True, "pooling_norm": False, "aux_head": True, "in_chans": 1},
    {"architecture": "deeplabv3plus", "aspp_separable": False, "decoder_separable": False, "in_chans": 4, "norm": "group"},
    {"architecture": "deeplabv3plus", "decoder_convs": 1, "decoder_channels": 64, "decoder_low_level_channels": 32},
    {"architecture": "deeplabv3plus", "decoder_kernel": 1, "decoder_separable": False, "head_channels": 128},
    {"architecture": "deeplabv3plus", "encoder_final_conv": True, "aspp_project_kernel": 3, "decoder_refine_conv": True},
    {"architecture": "deeplabv3plus", "decoder_low_level_expanded": True, "depthwise_norm": False, "num_classes": 5},
    {"architecture": "deeplabv3", "encoder": "mobilevit_xxs", "encoder_final_conv": False},
    {"architecture": "deeplabv3", "encoder": "drnd54", "in_chans": 6},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_names_and_shapes_show_every_field_that_changes_them(fields: Mapping[str, object]) -> None:
    config = DeepLabConfig.from_dict({"encoder": "mobilenetv2_035", **fields})
    with torch.device("meta"):
        state = DeepLab(config).state_dict()
    shown = fields_of_shapes(state, config.encoder)
    assert DeepLabConfig.from_dict({"architecture": "deeplabv3", "encoder": config.encoder, **shown}) == config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[DeepLab, Path]:
    """A model, and its tensors in a folder as `save_pretrained(max_shard_size=...)` lays them out."""
    net, folder = deeplabzoo.create(BUNDLED[0], pretrained=True), tmp_path_factory.mktemp("shards")
    names = sorted(net.state_dict())
    parts = {f"model-0000{part + 1}-of-00003.safetensors": names[part::3] for part in range(3)}
    for file, inside in parts.items():
        save_file({name: net.state_dict()[name] for name in inside}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return net, folder


def test_a_folder_of_shards_is_one_checkpoint(shards: tuple[DeepLab, Path]) -> None:
    net, folder = shards
    for source in (folder, folder / "model.safetensors.index.json"):
        found = deeplabzoo.create(BUNDLED[0], pretrained=source)
        require_same_model(found, net)
        assert len(found.weights_source["sha256"]) == 64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "names the shard"),
        ({"weight_map": {"a": "gone.safetensors"}}, "is missing; download the whole folder"),
        ({"weight_map": {"surplus": "model-00001-of-00003.safetensors"}}, "lack 1 of its tensors, such as 'surplus'"),
        ({"weight_map": ["a"]}, "is not an index of shards"),
        ([], "is not an index of shards"),
    ],
)
def test_a_wrong_index_of_shards_is_one_sentence(
    shards: tuple[DeepLab, Path], change: object, reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in shards[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps(change))
    with pytest.raises(WeightsError, match=reason):
        deeplabzoo.load(folder)


def test_every_entry_point_resolves_alike(shards: tuple[DeepLab, Path], tmp_path: Path) -> None:
    """A name, a name with tag, a file and a folder mean the same to `load`, `--weights`, and a recipe's init and teacher."""
    net, _ = shards
    folder = tmp_path / "folder"
    folder.mkdir()
    net.save(folder / "model.safetensors")
    for source in (BUNDLED[0], f"{BUNDLED[0]}.v1", str(folder), str(folder / "model.safetensors")):
        for resolve in (deeplabzoo.load, load_named_model, load_weights):
            require_same_model(resolve(source), net)  # type: ignore[operator]


@pytest.mark.parametrize("source", ["gone.pth", "gone.safetensors", "no/such/file", "gone.CKPT"])
def test_a_missing_file_is_the_same_sentence_everywhere(source: str) -> None:
    calls = (
        deeplabzoo.load,
        load_named_model,
        load_weights,
        open_checkpoint,
        lambda one: deeplabzoo.create("deeplabv3_resnet18", pretrained=one),
        lambda one: deeplabzoo.create("deeplabv3_resnet18", encoder_pretrained=one),
    )
    for call in calls:
        with pytest.raises(WeightsError) as caught:
            call(source)  # type: ignore[operator]
        assert str(caught.value) == f"There is no weights file '{source}'."


def test_a_mistyped_name_is_not_called_a_missing_file() -> None:
    for call in (deeplabzoo.load, load_named_model, load_weights):
        with pytest.raises(UnknownNameError, match="Did you mean"):
            call("deeplabv3plus_mobilenetv2_vocc")  # type: ignore[operator]


def test_a_model_without_weights_trains_in_a_loop_that_never_calls_train(tmp_path: Path) -> None:
    """PyTorch Lightning keeps the mode since 2.2: batch norm has to move, as in models of timm and SMP."""
    net = deeplabzoo.create("deeplabv3_resnet10t", num_classes=2, aux_head=True)
    before = net.encoder.get_buffer("bn1.running_mean").clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    out = net(torch.rand(2, 3, 33, 33))
    (out.logits.mean() + out.aux_logits.mean()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert not torch.equal(before, net.encoder.get_buffer("bn1.running_mean"))
    net.save(tmp_path / "net.safetensors")
    assert not deeplabzoo.load(tmp_path / "net.safetensors").training
    assert not deeplabzoo.create(BUNDLED[0], pretrained=True).training


def test_the_offline_switch_is_obeyed_by_every_way_to_imagenet_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`create`, and `DeepLab(config, encoder_pretrained=True)` as training and users build it."""
    import socket

    attempts: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: attempts.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: attempts.append(arguments) or [])
    monkeypatch.setenv("DEEPLABZOO_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "nowhere")
    config = DeepLabConfig(architecture="deeplabv3", encoder="resnet10t")
    for call in (
        lambda: deeplabzoo.create("deeplabv3_resnet10t", encoder_pretrained=True),
        lambda: DeepLab(config, encoder_pretrained=True),
    ):
        with pytest.raises(DownloadError, match="use encoder_pretrained=False"):
            call()
    assert attempts == []


@pytest.mark.parametrize(("tensor", "value"), [("head.aspp.pool.norm.running_var", -1.0), ("encoder.conv_stem.weight", 3e38)])
def test_values_that_make_every_pixel_0_are_refused(tensor: str, value: float, tmp_path: Path) -> None:
    """A negative variance gives NaN, weights near the limit of float32 give infinities: all labels 0, and no other sign."""
    net = deeplabzoo.create(BUNDLED[0], pretrained=True)
    net.state_dict()[tensor].view(-1)[0] = value
    net.save(tmp_path / "net.safetensors")
    with pytest.raises(WeightsError, match=f"the tensor '{tensor}' with values"):
        deeplabzoo.load(tmp_path / "net.safetensors")


def test_weights_of_a_name_and_of_a_file_are_not_mixed(tmp_path: Path) -> None:
    net = deeplabzoo.create(BUNDLED[0], pretrained=True)
    net.save(tmp_path / "net.safetensors")
    with pytest.raises(UsageError, match="holds its own weights; leave --weights out"):
        load_named_model(str(tmp_path / "net.safetensors"), "v1")
